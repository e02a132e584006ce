"""Download files of a model from the Hugging Face Hub: `python -m worker.commands.download`.

The process reads an order (JSON, see `Order`) from standard input; worker/commands/fetch.py writes
it, watches the folder, and ends a download that stalls. Exit code 0, or 1 with a `Failure` as JSON
in the last line of standard output.

Partial files are kept as NAME.partial, and the next attempt resumes them. Downloads through xet
can't be resumed: they are in huggingface_hub's own temporary files, which are removed.
"""

import hashlib
import http
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2  # huggingface_hub's HTTP client
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils.tqdm import disable_progress_bars

from worker.runtime.processes import die_with_parent

PARTIAL = ".partial"
_PARALLEL = 4
_CONNECT_SECONDS = 10.0
_HASH_CHUNK = 16 << 20


@dataclass(frozen=True)
class File:
    """A file of a repository. `sha256`: of content in git-lfs or xet; None: not known."""

    name: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class Failure:
    """The reason why an attempt ended. `status`: the Hub's HTTP status; `errno`: this machine's."""

    reason: str
    status: int | None = None
    is_gated: bool = False
    errno: int | None = None


@dataclass(frozen=True)
class Order:
    """Files of one revision. `token` None: the one that huggingface_hub finds on this machine.

    `stall_seconds`: time limit without any progress of a file.
    """

    parent: int
    endpoint: str
    repo: str
    revision: str
    folder: str
    files: list[File]
    token: str | bool | None
    stall_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_order(text: str) -> Order:
    fields: dict[str, Any] = json.loads(text)
    return Order(**fields | {"files": [File(**file) for file in fields["files"]]})


def main() -> None:
    order = read_order(sys.stdin.read())
    if not die_with_parent(order.parent):
        sys.exit("the process that wanted the files has ended")
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        futures = [pool.submit(_get, order, file) for file in order.files]
        try:
            for future in futures:
                future.result()
        except Exception as error:  # noqa: BLE001 - xet's errors have no class of their own
            print(json.dumps(asdict(_failure(error))), flush=True)
            # Do not wait for the other files: their partial files are kept.
            os._exit(1)


def _failure(error: Exception) -> Failure:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        reason = _first_line(error.server_message or text)
        return Failure(reason, error.response.status_code, isinstance(error, GatedRepoError))
    errno = error.errno if isinstance(error, OSError) else None
    return Failure(_first_line(text), errno=errno)


def _first_line(text: str) -> str:
    return text.splitlines()[0][:200]


def _get(order: Order, file: File) -> None:
    target = Path(order.folder) / file.name
    if target.exists():
        return
    url = hf_hub_url(order.repo, file.name, revision=order.revision, endpoint=order.endpoint)
    headers = build_hf_headers(token=order.token, library_name="hivewright")
    if is_xet_available() and is_in_xet(order, url):
        hub = HfApi(endpoint=order.endpoint, token=order.token)
        hub.hf_hub_download(order.repo, file.name, revision=order.revision, local_dir=order.folder)
        return
    partial = target.with_name(target.name + PARTIAL)
    try:
        _append(url, headers, partial, file.size, order.stall_seconds)
    except httpx2.ReadTimeout:
        seconds = order.stall_seconds
        raise TimeoutError(f"nothing arrived of {file.name} for {seconds:g} s") from None
    if file.sha256 is not None and _sha256(partial) != file.sha256:
        partial.unlink()
        raise ValueError(f"{file.name}: its SHA-256 is not the Hub's; it is downloaded again")
    partial.replace(target)


def _append(
    url: str,
    headers: dict[str, str],
    partial: Path,
    size: int | None,
    seconds: float,
) -> None:
    """Resume a download. huggingface_hub's own http_get loses up to 10 MB when interrupted."""
    with partial.open("ab", buffering=0) as stream:
        begin = stream.tell()
        if size is not None and begin == size:
            return
        if size is not None and begin > size:
            stream.truncate(begin := 0)
        # A compressed answer could not be resumed.
        headers = headers | {"Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        limits = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS)
        with get_session().stream(
            "GET", url, headers=headers, timeout=limits, follow_redirects=True
        ) as answer:
            hf_raise_for_status(answer)
            if begin and answer.status_code != http.HTTPStatus.PARTIAL_CONTENT:
                stream.truncate(0)
            for chunk in answer.iter_bytes():
                stream.write(chunk)
    if size is not None and (arrived := partial.stat().st_size) != size:
        raise ValueError(f"{partial.name}: {arrived} bytes have arrived; expected {size}")


def is_in_xet(order: Order, url: str) -> bool:
    """Return whether the Hub serves the file through xet."""
    found = get_hf_file_metadata(url, token=order.token, endpoint=order.endpoint)
    return found.xet_file_data is not None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            os.utime(file)  # shows progress to fetch.py, which watches the folder
    return digest.hexdigest()


if __name__ == "__main__":
    main()
