"""`hivewright fetch`: a model is downloaded once for all nodes of a machine, from a stand-in."""

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.stand_in import HubStandIn
from worker import settings
from worker.commands import fetch
from worker.errors import ModelError, ResourceError, SettingsError
from worker.policy import model_sizing, policy
from worker.runtime.state_dir import StateDir

NAME = "somebody/tiny"
TINY = Path(model_sizing.__file__).parent / "tiny"
# Other files of a repository, which no node loads.
OTHERS = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "model.gguf",
    "README.md",
)
# Enough for the process that downloads to start on a busy machine.
SHORT_STALL_SECONDS = 8.0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    stand_in = HubStandIn()
    model = {file.name: file.read_bytes() for file in TINY.iterdir()}
    stand_in.repos[NAME] = [model | dict.fromkeys(OTHERS, b"x" * 1000)]
    monkeypatch.setattr(policy, "HUB", policy.HfApi(endpoint=stand_in.endpoint, token=False))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    yield stand_in
    stand_in.close()


def settings_of(folder: Path, name: str = NAME) -> settings.Settings:
    flat = {
        "node_state_dir": str(folder / "state"),
        "model_name": name,
        "model_shared_dir": str(folder / "models"),
    }
    return settings.from_flat(flat, "test")


def test_model_is_downloaded_once_and_loaded_without_the_hub(
    tmp_path: Path, hub: HubStandIn
) -> None:
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
    StateDir(of.node.state_dir).model_choice.write_text(chosen)
    fetch.run(of)
    assert (tmp_path / "models/somebody--tiny/config.json").is_file()


def test_download_that_is_cut_off_is_no_model_and_the_next_run_gets_what_is_missing(
    tmp_path: Path, hub: HubStandIn
) -> None:
    of = settings_of(tmp_path)
    hub.cut_after = 100_000
    with pytest.raises(
        ModelError, match=r"the download failed in 2 attempts: .*, then run this again"
    ):
        fetch.run(of)
    assert model_sizing.find_folder(of.model) is None
    part = tmp_path / "models/somebody--tiny.part"
    (part / ".cache/huggingface/download").mkdir(parents=True)
    (part / ".cache/huggingface/download/x.incomplete").touch()
    hub.cut_after = None
    hub.downloads.clear()
    fetch.run(of)
    # Other files may have been cut off too: files are downloaded side by side.
    assert [each for each in hub.downloads if each.startswith("model.safetensors")] == [
        "model.safetensors from 200000"
    ]
    assert not part.exists()
    assert policy.load(of.model).name == NAME


def test_model_that_can_not_be_had_is_an_error_in_a_line(
    tmp_path: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ModelError, match=r"nobody/nothing: Hugging Face says 404 .*: no such model"
    ):
        fetch.run(settings_of(tmp_path, "nobody/nothing"))
    with pytest.raises(SettingsError, match=r"model\.shared_dir: not set; expected the folder"):
        fetch.run(settings.from_flat({"model_name": NAME}, "test"))
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"model\.shared_dir"):
            fetch.run(settings_of(tmp_path))
    monkeypatch.setattr(policy, "HUB", policy.HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(ModelError, match=r"not in .*models, and Hugging Face can't be reached"):
        fetch.run(settings_of(tmp_path))
    assert not (tmp_path / "models/somebody--tiny").exists()


@pytest.mark.parametrize(
    ("place", "reason"), [("/proc/nope", "No such file or directory"), ("FILE", "File exists")]
)
def test_folder_that_can_not_be_had_is_an_error_in_a_line(
    place: str, reason: str, tmp_path: Path
) -> None:
    folder = place.replace("FILE", str(tmp_path / "models"))
    (tmp_path / "models").touch()
    with pytest.raises(ResourceError) as caught:
        fetch.run(settings.from_flat({"model_name": NAME, "model_shared_dir": folder}, "test"))
    assert (
        str(caught.value) == f"{folder} (model.shared_dir): {reason}; expected a folder to write in"
    )


def test_folder_and_the_model_of_the_package_are_not_downloaded(
    tmp_path: Path, hub: HubStandIn
) -> None:
    for name in (model_sizing.TINY, str(TINY)):
        fetch.run(settings_of(tmp_path, name))
    assert hub.num_requests == 0


def is_whole(folder: Path) -> bool:
    names = {file.name for file in TINY.iterdir()}
    return {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: (TINY / name).read_bytes() for name in names
    }


def test_download_that_stands_still_is_logged_and_goes_on_where_it_stopped(
    tmp_path: Path,
    hub: HubStandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "STALL_SECONDS", SHORT_STALL_SECONDS)
    monkeypatch.setattr(fetch, "REPORT_SECONDS", 0.5)
    hub.stall_after = 1_000_000
    fetch.run(settings_of(tmp_path))
    assert [each for each in hub.downloads if "safetensors" in each] == [
        "model.safetensors from 0",
        "model.safetensors from 1000000",
    ]
    assert "resuming, without xet (attempt 2 of 2)" in caplog.text
    assert "nothing arrived" in caplog.text
    assert re.search(
        r"^downloading somebody/tiny: 1 of 2 MB, \d+\.\d MB/s$", capfd.readouterr().err, re.M
    )
    assert is_whole(tmp_path / "models/somebody--tiny")


def test_download_of_which_nothing_arrives_any_more_is_one_error_and_keeps_what_has_arrived(
    tmp_path: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALL_SECONDS", SHORT_STALL_SECONDS)
    hub.stall_after = 600_000
    with pytest.raises(
        ModelError, match=r"the download failed in 2 attempts: nothing arrived .*; check"
    ) as e:
        fetch.run(settings_of(tmp_path))
    assert len(str(e.value).splitlines()) == 1
    partial = tmp_path / "models/somebody--tiny.part/model.safetensors.partial"
    assert partial.stat().st_size == 1_200_000, hub.downloads


def test_xet_that_never_answers_is_given_up_for_plain_http(
    tmp_path: Path,
    hub: HubStandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(fetch, "STALL_SECONDS", SHORT_STALL_SECONDS)
    hub.has_xet = True
    fetch.run(settings_of(tmp_path))
    assert hub.xet_requests
    assert f"nothing arrived for {SHORT_STALL_SECONDS:g} s" in caplog.text
    assert [each for each in hub.downloads if "safetensors" in each] == ["model.safetensors from 0"]
    assert is_whole(tmp_path / "models/somebody--tiny")


def test_partial_files_that_are_of_another_revision_or_damaged_are_not_gone_on_from(
    tmp_path: Path, hub: HubStandIn
) -> None:
    part = tmp_path / "models/somebody--tiny.part"
    part.mkdir(parents=True)
    (part / ".revision").write_text("0" * 40)
    (part / "model.safetensors.partial").write_bytes(b"x" * 1000)
    fetch.run(settings_of(tmp_path))
    assert "model.safetensors from 0" in hub.downloads
    shutil.rmtree(tmp_path / "models/somebody--tiny")
    part.mkdir(parents=True)
    (part / ".revision").write_text(f"{1:040d}")
    (part / "model.safetensors.partial").write_bytes(b"x" * 1000)
    hub.downloads.clear()
    fetch.run(settings_of(tmp_path))
    assert [each for each in hub.downloads if "safetensors" in each] == [
        "model.safetensors from 1000",
        "model.safetensors from 0",
    ]
    assert is_whole(tmp_path / "models/somebody--tiny")


@pytest.mark.parametrize(
    ("readers", "is_gated", "token", "name", "message"),
    [
        (
            {"hf_good"},
            False,
            None,
            NAME,
            r"says 401 .*private or gated, or there is no such model; .*model_token_file",
        ),
        (
            {"hf_good"},
            False,
            "hf_bad",
            NAME,
            r"says 401 .*it rejects the token; .*model_token_file",
        ),
        (
            {"hf_good"},
            True,
            None,
            NAME,
            r"says 401 .*gated; accept its terms at http\S+/somebody/tiny .*model_token_f",
        ),
        (
            {"hf_good"},
            True,
            "hf_bad",
            NAME,
            r"says 403 .*gated, or not for this token; .*model_token_file",
        ),
        (
            None,
            False,
            None,
            "nobody/nothing",
            r"says 404 .*no such model, or a private one, which needs .*model_token",
        ),
        (
            None,
            False,
            "hf_x",
            "nobody/nothing",
            r"says 404 .*no such model, or one that this token may not see",
        ),
    ],
)
def test_refusals_are_told_apart_and_name_the_key(
    readers: set[str] | None,
    is_gated: bool,
    token: str | None,
    name: str,
    message: str,
    tmp_path: Path,
    hub: HubStandIn,
) -> None:
    hub.readers, hub.is_gated = readers, is_gated
    options = argparse.Namespace(token_file=None)
    if token is not None:
        options.token_file = tmp_path / "token"
        options.token_file.write_text(token)
    with pytest.raises(ModelError, match=message) as refused:
        fetch.run(settings_of(tmp_path, name), options)
    assert "hf_" not in str(refused.value)
    assert not (tmp_path / "models" / name.replace("/", "--")).exists()


@pytest.mark.parametrize("is_gated", [True, False])
def test_private_and_gated_models_are_fetched_with_a_token(
    tmp_path: Path, hub: HubStandIn, is_gated: bool
) -> None:
    hub.readers, hub.is_gated = {"hf_good"}, is_gated
    file = tmp_path / "token"
    file.write_text("hf_good\n")
    of = settings_of(tmp_path)
    model = of.model.model_copy(update={"token_file": file})
    fetch.run(of.model_copy(update={"model": model}))
    assert is_whole(tmp_path / "models/somebody--tiny")


def test_token_file_that_has_no_token_is_a_settings_error(tmp_path: Path, hub: HubStandIn) -> None:
    options = argparse.Namespace(token_file=tmp_path / "token")
    with pytest.raises(SettingsError, match=r"token \(--token-file\): No such file"):
        fetch.run(settings_of(tmp_path), options)
    options.token_file.write_text("two words")
    with pytest.raises(
        SettingsError, match=r"token \(--token-file\): 2 words instead of one; expected one word"
    ):
        fetch.run(settings_of(tmp_path), options)
    assert hub.num_requests == 0
