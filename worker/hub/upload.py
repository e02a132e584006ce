"""Upload one folder to the Hugging Face Hub, as `python -m worker.hub.upload ORDER`.

ORDER is a JSON file that hub.py wrote. Exit code 0, or 1 with the reason in the last line.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars

from worker.runtime.files import read_secret
from worker.runtime.processes import die_with_parent


def main(order_file: str) -> None:
    order: dict[str, Any] = json.loads(Path(order_file).read_text())
    if not die_with_parent(order["parent"]):
        _fail("the worker is gone")
    os.nice(10)  # training comes first
    disable_progress_bars()
    try:
        token = read_secret(Path(order["token_file"]), "a Hugging Face token that may write")
        hub = HfApi(endpoint=order["endpoint"], token=token, library_name="hivewright")
        hub.create_repo(order["repo"], private=order["private"], exist_ok=True)
        hub.upload_folder(
            repo_id=order["repo"], folder_path=order["folder"], commit_message=order["message"]
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        _fail(f"{order['endpoint']} says {status}: {_first_line(error.server_message or error)}")
    except (httpx2.HTTPError, HFValidationError, OSError, RuntimeError, ValueError) as error:
        _fail(_first_line(error))


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fail(reason: str) -> NoReturn:
    print(reason, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
