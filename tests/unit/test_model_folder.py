"""Folders of trained models: new ones only, and whole or not at all."""

import pytest

from worker import model_folder
from worker.errors import SettingsError


def names(folder) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_folder_appears_when_it_is_whole(tmp_path) -> None:
    def fill(unfinished) -> None:
        assert not (tmp_path / "model").exists()
        (unfinished / "README.md").write_text("card")

    model_folder.make(tmp_path / "model", fill)
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/README.md").read_text() == "card"


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_remains_of_a_folder_that_can_not_be_filled(tmp_path, error) -> None:
    def fill(unfinished) -> None:
        (unfinished / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        model_folder.make(tmp_path / "model", fill)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_never_overwritten(tmp_path, kind) -> None:
    place = tmp_path / "model"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=r"--output .*/model: exists already; expected"):
        model_folder.make(place, lambda _: pytest.fail("was filled"))
    assert names(tmp_path) == ["model"]


def test_parent_must_be_a_folder(tmp_path) -> None:
    with pytest.raises(SettingsError, match="missing is not a folder that can be written to"):
        model_folder.require_new(tmp_path / "missing/model")
