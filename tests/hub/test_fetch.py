"""`hivewright fetch`: a model is downloaded once for all nodes of a machine, from a stand-in of the Hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.stand_in import HubStandIn
from worker import fetch, settings
from worker.errors import ModelError, ResourceError, SettingsError
from worker.policy import choice, policy

NAME = "somebody/tiny"
TINY = Path(choice.__file__).parent / "tiny"
# What a repository has beside, and no node loads.
OTHERS = ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "model.gguf", "README.md")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    stand_in = HubStandIn()
    model = {file.name: file.read_bytes() for file in TINY.iterdir()}
    stand_in.repos[NAME] = [model | dict.fromkeys(OTHERS, b"x" * 1000)]
    monkeypatch.setattr(policy, "HUB", policy.HfApi(endpoint=stand_in.endpoint, token=False))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield stand_in
    stand_in.close()


def settings_of(folder: Path, name: str = NAME) -> settings.Settings:
    flat = {"node_state_dir": str(folder / "state"), "model_name": name, "model_shared_dir": str(folder / "models")}
    return settings.from_flat(flat, "test")


def test_model_is_downloaded_once_and_loaded_without_the_hub(tmp_path: Path, hub: HubStandIn) -> None:
    of = settings_of(tmp_path)
    fetch.run(of)
    folder = tmp_path / "models/somebody--tiny"
    assert not {file.name for file in folder.iterdir()} & {*OTHERS, "onnx", ".cache"}
    assert sorted(file.name for file in folder.parent.iterdir()) == ["lock", "somebody--tiny"]
    num_requests, hub.trouble = hub.num_requests, 500
    fetch.run(of)
    assert policy.load(of.model).name == NAME
    assert hub.num_requests == num_requests


def test_model_that_the_machine_has_chosen_is_fetched(tmp_path: Path, hub: HubStandIn) -> None:
    of = settings_of(tmp_path, "auto")
    of.node.state_dir.mkdir()
    chosen = f'{{"name": "{NAME}", "pool": "small", "device": "cpu", "free_gib": 4.0}}'
    (of.node.state_dir / choice.CHOICE_FILE).write_text(chosen)
    fetch.run(of)
    assert (tmp_path / "models/somebody--tiny/config.json").is_file()


def test_download_that_is_cut_off_is_no_model_and_the_next_run_gets_what_is_missing(
    tmp_path: Path, hub: HubStandIn
) -> None:
    of = settings_of(tmp_path)
    hub.cut_after = 100_000
    with pytest.raises(ModelError, match=r"the download was cut off: .*; run it again"):
        fetch.run(of)
    assert choice.find_folder(of.model) is None
    part = tmp_path / "models/somebody--tiny.part"
    (part / ".cache/huggingface/download/x.incomplete").touch()
    hub.cut_after = None
    hub.downloads.clear()
    fetch.run(of)
    assert hub.downloads == ["model.safetensors from 0"]
    assert not part.exists()
    assert policy.load(of.model).name == NAME


def test_model_that_can_not_be_had_is_an_error_in_a_line(
    tmp_path: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="nobody/nothing: Hugging Face says 404: no such model"):
        fetch.run(settings_of(tmp_path, "nobody/nothing"))
    with pytest.raises(SettingsError, match="model/shared_dir: none; expected the folder"):
        fetch.run(settings.from_flat({"model_name": NAME}, "test"))
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match="model/shared_dir"):
            fetch.run(settings_of(tmp_path))
    monkeypatch.setattr(policy, "HUB", policy.HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(ModelError, match=r"not in .*models, and Hugging Face can't be reached"):
        fetch.run(settings_of(tmp_path))
    assert not (tmp_path / "models/somebody--tiny").exists()


@pytest.mark.parametrize(("place", "reason"), [("/proc/nope", "No such file or directory"), ("FILE", "File exists")])
def test_folder_that_can_not_be_had_is_an_error_in_a_line(place: str, reason: str, tmp_path: Path) -> None:
    folder = place.replace("FILE", str(tmp_path / "models"))
    (tmp_path / "models").touch()
    with pytest.raises(ResourceError) as caught:
        fetch.run(settings.from_flat({"model_name": NAME, "model_shared_dir": folder}, "test"))
    assert str(caught.value) == f"{folder} (model/shared_dir): {reason}; expected a folder to write in"


def test_folder_and_the_model_of_the_package_are_not_downloaded(tmp_path: Path, hub: HubStandIn) -> None:
    for name in (choice.TINY, str(TINY)):
        fetch.run(settings_of(tmp_path, name))
    assert hub.num_requests == 0
