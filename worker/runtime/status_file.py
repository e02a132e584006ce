"""Read the status that a service writes for its metrics endpoint."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from worker.errors import WorkerError

T = TypeVar("T")


def read(
    file: Path,
    kind: TypeAdapter[T],
    expected: str,
    service: str,
) -> T | None:
    """Return the content of a status file; None before it was first written.

    `expected` says what the file should be, `service` which service writes it. Raises WorkerError
    with both if it can't be read or is invalid.
    """
    try:
        return kind.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise WorkerError(
            f"{file}: not {expected} ({type(error).__name__}); restart the {service}"
        ) from None
