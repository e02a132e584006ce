"""Status files of services: missing, valid and damaged."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from worker.errors import WorkerError
from worker.runtime import status_file

KIND = TypeAdapter(dict[str, int])


def test_status_is_read_and_none_before_the_first(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    assert status_file.read(file, KIND, "counts", "keeper") is None
    file.write_text('{"round": 3}')
    assert status_file.read(file, KIND, "counts", "keeper") == {"round": 3}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"round": "x"}'])
def test_damaged_status_names_file_and_service(tmp_path: Path, content: str) -> None:
    file = tmp_path / "status.json"
    file.write_text(content)
    with pytest.raises(WorkerError, match=f"^{file}: not counts .*; restart the keeper$"):
        status_file.read(file, KIND, "counts", "keeper")


def test_status_that_can_not_be_read_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="IsADirectoryError"):
        status_file.read(tmp_path, KIND, "counts", "keeper")
