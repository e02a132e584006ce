"""The name of an inventory, as an operator gives it: a file, and nothing that could be taken for something else."""

import difflib
from pathlib import Path

from worker.errors import SettingsError

EXPECTED = "expected an inventory file, a copy of inventory/example.py"


def whole_path(name: str) -> str:
    """Where the file is, whatever folder it is then asked for from. Raises SettingsError if there is none.

    pyinfra would take the name of a file that is not there for that of a host.
    """
    file = Path(name)
    if file.is_file():
        return str(file.absolute())
    if file.exists():
        raise SettingsError(f"{name}: is no file; {EXPECTED}")
    close = difflib.get_close_matches(name, map(str, file.parent.glob("*.py")), n=1)
    raise SettingsError(f"{name}: no such file; {f'did you mean {close[0]}?' if close else EXPECTED}")
