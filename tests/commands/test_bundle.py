"""The support bundle: what is in it, and no secret, wherever the log is cut."""

import importlib.metadata
import json
import os
import tarfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.limits import largest_file, without_rights
from worker import settings
from worker.commands import bundle
from worker.errors import ResourceError
from worker.settings import Settings

TOKEN = "planted-account-token-77"
KEY = "-----BEGIN PRIVATE KEY-----\n" + "MIIBVw\n" * 20 + "-----END PRIVATE KEY-----"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a node in worker-0, whose log is below tmp_path."""
    folder = tmp_path / "worker-0"
    folder.mkdir()
    (folder / "account.token").write_text(TOKEN)
    monkeypatch.setattr(bundle, "LOGS", tmp_path / "log")
    return settings.from_flat({"node_state_dir": str(folder)}, "test")


def logged(node: Settings, text: str) -> None:
    file = bundle.LOGS / "worker-0/hivewright-worker@0.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def written(node: Settings, file: Path) -> dict[str, str]:
    bundle.write(file, node, [{"check": "disk", "verdict": "ok"}])
    with tarfile.open(file) as tar:
        found = {}
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            found[member.name.removeprefix("hivewright-support/")] = stream.read().decode()
    return found


def test_bundle_of_a_node_that_never_ran_has_all_parts(node: Settings, tmp_path: Path) -> None:
    found = written(node, tmp_path / "b.tgz")
    assert json.loads(found["findings.json"]) == [{"check": "disk", "verdict": "ok"}]
    assert yaml.safe_load(found["settings.yaml"])["node"]["state_dir"] == str(node.node.state_dir)
    assert json.loads(found["versions.json"])["torch"]
    assert found["rounds.jsonl"] == found["status.json"] == ""
    assert found["log.txt"] == f"no {bundle.LOGS}/worker-0/hivewright-worker@0.log\n"


def test_newest_rounds_and_the_end_of_the_log_are_kept(
    node: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "NUM_LOG_BYTES", 10)
    monkeypatch.setattr(bundle, "NUM_ROUNDS", 2)
    logged(node, "first line\nlast line\n")
    (node.node.state_dir / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2}\n{"round": 3}\n')
    found = written(node, tmp_path / "b.tgz")
    assert found["log.txt"] == "last line\n"
    assert found["rounds.jsonl"] == '{"round": 2}\n{"round": 3}\n'


@pytest.mark.parametrize("secret", [TOKEN, KEY, "hf_abcdefghijklmnop", "0x" + "ab" * 32])
@pytest.mark.parametrize("cut", [1, 5, 17])
def test_log_that_is_cut_within_a_secret_shows_none_of_it(
    node: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str, cut: int
) -> None:
    monkeypatch.setattr(bundle, "NUM_LOG_BYTES", len(secret) - cut + 4)
    logged(node, f"before {secret} end")
    text = written(node, tmp_path / "b.tgz")["log.txt"]
    assert text.endswith(" end")
    kept = secret[-12:] if secret != KEY else "MIIBVw"
    assert kept not in text


def test_key_whose_end_is_missing_is_hidden(node: Settings, tmp_path: Path) -> None:
    logged(node, f"before {KEY[:90]}")
    assert "MII" not in written(node, tmp_path / "b.tgz")["log.txt"]


@pytest.mark.parametrize("order", [1, -1])
def test_token_that_contains_another_one_is_hidden_whole(order: int) -> None:
    known = ["token-one", "token-one-and-more"][::order]
    assert bundle.redact("a token-one-and-more b token-one", known) == "a [redacted] b [redacted]"


@given(st.text(max_size=60), st.text(max_size=60))
def test_known_token_is_in_no_text(before: str, after: str) -> None:
    assert TOKEN not in bundle.redact(f"{before}{TOKEN}{after}", [TOKEN])


@pytest.mark.parametrize(
    "text",
    [
        "round=7 reward=0.512 peer=QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "/ip4/192.0.2.1/tcp/38000",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "0x" + "a" * 40,
        "ab" * 33,
        "hf_short",
    ],
)
def test_what_helps_is_not_redacted(text: str) -> None:
    assert bundle.redact(text) == text


def test_file_in_the_state_folder_that_is_no_text_is_taken_as_far_as_it_is(
    node: Settings, tmp_path: Path
) -> None:
    (node.node.state_dir / "status.json").write_bytes(b"\xff\xfe\0 half")
    assert written(node, tmp_path / "b.tgz")["status.json"].endswith("\0 half")


def test_file_without_rights_is_left_out(node: Settings, tmp_path: Path) -> None:
    file = node.node.state_dir / "status.json"
    file.write_text("{}")
    with without_rights(file):
        assert bundle._read(file) == ""


def test_short_words_are_no_tokens(node: Settings, tmp_path: Path) -> None:
    (node.node.state_dir / "account.token").write_text("rounds\n")
    logged(node, "rounds go on")
    assert written(node, tmp_path / "b.tgz")["log.txt"] == "rounds go on"


def test_damaged_package_of_the_environment_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged:
        metadata: dict[str, None] = {}  # noqa: RUF012
        version = "1"

    real = importlib.metadata.distributions
    Damaged.metadata = {"Name": None}
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Damaged, *real()])
    assert "torch" in bundle._versions()


@pytest.mark.parametrize(
    ("script", "shown"),
    [("echo card", "card\n"), (r"printf 'a\377b'", "a\ufffdb"), ("exit 9", "")],
)
def test_output_of_nvidia_smi_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, shown: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert bundle._nvidia_smi() == shown


def test_machine_without_nvidia_smi_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bundle._nvidia_smi() == "no nvidia-smi\n"


def test_full_disk_names_the_file_and_the_option(node: Settings, tmp_path: Path) -> None:
    with (
        largest_file(100),
        pytest.raises(ResourceError, match=r"b.tgz: can't be written: .* with --bundle"),
    ):
        bundle.write(tmp_path / "b.tgz", node, [])
