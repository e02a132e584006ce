"""`hivewright fleet harvest`: ranking, and a harvest of real checkpoints through real commands."""

import argparse
import base64
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deploys import harvest
from deploys.fleet import harvest_command
from deploys.fleet.harvest_command import Offer, Slot
from deploys.fleet.pyinfra_process import Ran
from deploys.paths import CONFIGURATION, CURRENT
from tests.unit.test_node import enrolled, make_node
from worker.cli import _parser
from worker.errors import SettingsError, WorkerError

SHAPES = {"a": [2, 2]}
SHIM = """#!/bin/sh
while case $1 in --*) true;; *) false;; esac; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/sh
exec {python} "$@"
"""


def make_offer(name: str, rewards: Sequence[float], **changes: Any) -> Offer:
    given: dict[str, Any] = {
        "slot": Slot(name, 0),
        "file": Path(name),
        "tasks": "same",
        "rewards": {("gcd", 0): rewards},
        "round": 5,
        "rounds_trained": 5,
        "origin": {"model": "tiny"},
        "shapes": SHAPES,
        **changes,
    }
    return Offer(**given)


def test_best_comes_first_and_only_equal_models_are_averaged(capsys: Any) -> None:
    offers = [
        make_offer("worse", [0.2, 0.2]),
        make_offer("best", [0.5, 0.6, 0.0]),
        make_offer("other", [0.3, 0.3], origin={"model": "smollm2", "base_weights": "abcd"}),
        make_offer("wider", [0.3, 0.3], shapes={"a": [4, 4]}),
        make_offer("elsewhere", [1.0, 1.0], tasks="others"),
    ]
    ranked = harvest_command.rank(offers)
    assert [offer.slot.host for offer in ranked] == ["best", "worse"]
    said = capsys.readouterr().out
    assert "best/0: held-out reward 0.550 after 5 rounds" in said  # only tasks that all answered
    assert "other/0: not in the average: its weights are of adapters of smollm2 (abcd)" in said
    assert "wider/0: not in the average" in said
    assert "elsewhere/0: left out" in said


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(WorkerError, match="no held-out task in common"):
        harvest_command.rank([make_offer("a", [0.1]), make_offer("b", [])])


def test_slots_and_levels_of_a_fleet() -> None:
    worker = "hivewright-worker@{}.service"
    reports = {
        "h1": [{"unit": "hivewright-keeper.service", "status": None}],
        "h2": [
            {"unit": worker.format(0), "status": {"levels": {"gcd": 2}}},
            {"unit": worker.format(1), "status": {"levels": {"gcd": 1, "sums": 3}}},
        ],
        "h3": [{"unit": worker.format(0), "status": None}],
    }
    slots, levels = harvest_command.find_slots(reports)
    assert list(map(str, slots)) == ["h2/0", "h2/1", "h3/0"]
    assert levels == {"gcd": 2, "sums": 3}


@pytest.mark.parametrize("fault", ["empty", "no-weights", "rewards", "header"])
def test_unusable_offers_are_refused(fault: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {"tasks": "", "rewards": [], "round": 1, "rounds_trained": 1}
    said |= {"origin": {}} | ({"rewards": 7} if fault == "rewards" else {})
    header = b"{" if fault == "header" else b"{}"
    weights = struct.pack("<Q", len(header)) + header
    files = {"offer.json": json.dumps(said).encode(), "weights/model.safetensors": weights}
    if fault == "no-weights":
        del files["weights/model.safetensors"]
    file = tmp_path / "offer.tar"
    with tarfile.open(file, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    if fault == "empty":
        file.write_bytes(b"")
    with pytest.raises((tarfile.TarError, OSError, ValueError, KeyError, TypeError)):
        harvest_command.read_offer(Slot("h1", 0), file)


def test_output_must_be_new(tmp_path: Path) -> None:
    words = ["fleet", "harvest", "inventory.py", "--output", str(tmp_path)]
    with pytest.raises(SettingsError, match="exists already"):
        harvest_command.run(_parser().parse_args(words))


class Connector:
    """Runs a host's scripts in this machine's shell, with the host's folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, Any]:
        script = command.get_raw_value()
        for folder in (CURRENT, CONFIGURATION):
            script = script.replace(str(folder), str(self.root / folder.name))
        script = script.replace(harvest.FOLDER, str(self.root))
        done = subprocess.run(
            ["sh", "-c", script],
            input="".join(arguments.get("_stdin", [])),
            capture_output=True,
            text=True,
            timeout=arguments["_timeout"],
            check=False,
            env={**os.environ, "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"},
        )
        if done.returncode:
            self.stderr = done.stderr
        return done.returncode == 0, SimpleNamespace(stdout_lines=done.stdout.splitlines())


class Hosts:
    """Takes pyinfra's place: operations run on a Connector for each host."""

    def __init__(self, roots: dict[str, Path]) -> None:
        self.connectors = {name: Connector(root) for name, root in roots.items()}

    def operation(self, host: str, name: str, log: Path, *arguments: str, timeout: float) -> Ran:
        assert name == "deploys.harvest.run"
        given = dict(argument.split("=", 1) for argument in arguments)
        connector = self.connectors[host]
        is_done = harvest._run(
            None,
            SimpleNamespace(connector=connector),
            int(given["slot"]),
            given["part"],
            given["options"],
            int(given["seconds"]),
            Path(given["file"]),
            Path(given["sent"]) if "sent" in given else None,
        )
        lines = connector.stderr.splitlines()
        return Ran("done") if is_done else Ran("failed", "\n".join(lines[-1:]))

    def stop(self) -> None:
        raise AssertionError("interrupted")


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """Return three hosts: trained, the same with noise in its weights, without a checkpoint."""
    monkeypatch.setattr(harvest.fact_cache, "arguments_of_facts", lambda host: {})
    monkeypatch.setattr(harvest, "print_host_combined_output", lambda host, output: None)
    roots = {name: tmp_path / name for name in ("h1", "h2", "h3")}
    for root in roots.values():
        for name, content in (
            ("bin/systemd-run", SHIM),
            ("current/environment/bin/python", PYTHON.format(python=sys.executable)),
        ):
            file = root / name
            file.parent.mkdir(parents=True)
            file.write_text(content)
            file.chmod(0o755)
        (root / "etc").mkdir()
    node = make_node(enrolled(roots["h1"] / "node", generation_num_generations=4))
    node.train()
    node.close()
    for name in ("h1", "h2", "h3"):
        if name != "h1":
            shutil.copytree(roots["h1"] / "node", roots[name] / "node")
        made = node.settings.model_dump(mode="json") | {}
        made["node"]["state_dir"] = str(roots[name] / "node")
        (roots[name] / "hivewright").mkdir()
        (roots[name] / "hivewright/worker-0.yaml").write_text(yaml.safe_dump(made))
    file = max((roots["h2"] / "node/checkpoints").iterdir()) / "model.safetensors"
    noise = {k: w + 3 * w.std() * torch.randn(w.shape) for k, w in load_file(file).items()}
    save_file(noise, file)
    shutil.rmtree(roots["h3"] / "node/checkpoints")
    return Hosts(roots)


def test_best_model_comes_home(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    folder, output = tmp_path / ".harvest-test", tmp_path / "model"
    folder.mkdir()
    options = argparse.Namespace(tasks=4, seed=0, seconds=60)
    harvesting = harvest_command.Harvesting(hosts, folder, options, {"gcd": 1})  # type: ignore[arg-type]
    offers, failed = harvesting.collect([Slot(name, 0) for name in ("h1", "h2", "h3")])
    assert list(failed) == ["h3/0"]
    assert "no checkpoint yet; let the node finish a round first" in failed["h3/0"]
    ranked = harvest_command.rank(offers)
    assert [str(offer.slot) for offer in ranked] == ["h1/0", "h2/0"]
    result = harvesting.bring(ranked, output)
    assert result["chosen"] == "best"
    assert result["average"] is not None
    model = AutoModelForCausalLM.from_pretrained(output)
    checkpoints = tmp_path / "h1/node/checkpoints"
    weights = load_file(max(checkpoints.iterdir()) / "model.safetensors")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert "## Harvest" in (output / "README.md").read_text()
    for name in ("h1", "h2", "h3"):
        assert not list((tmp_path / name).glob("hivewright-harvest-*"))


def test_pieces_arrive_whole(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    script = harvest.piece_script(str(tmp_path / "file"), 0)
    said = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    assert base64.b64decode(said) == content
