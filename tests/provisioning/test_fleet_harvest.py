"""`hivewright fleet harvest`: ranking, and a harvest of real checkpoints through real commands."""

import argparse
import base64
import dataclasses
import io
import json
import math
import os
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

from deploys import harvest_part
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
FAILS = """#!/bin/sh
echo 'a warning' >&2
echo 'hivewright harvest offer: TrainingError (exit 8): x: no checkpoint yet' >&2
exit 8
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


def test_slow_worker_is_left_out_and_the_others_are_compared_on_all_their_tasks(
    capsys: Any,
) -> None:
    offers = [
        make_offer("slow", [1.0]),
        make_offer("good", [0.0, 0.9, 0.9, 0.9]),
        make_offer("lucky", [1.0, 0.1, 0.1, 0.1]),
    ]
    ranked = harvest_command.rank(offers)
    assert [offer.slot.host for offer in ranked] == ["good", "lucky"]
    said = capsys.readouterr().out
    assert "slow/0: left out: it answered only 1 held-out tasks in time, good/0 answered 4" in said


def test_nothing_in_common_is_an_error() -> None:
    other = dataclasses.replace(make_offer("b", []), rewards={("other", 0): [1.0]})
    with pytest.raises(WorkerError, match="no held-out task in common"):
        harvest_command.rank([make_offer("a", [0.1]), other])


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


FAULTS: dict[str, dict[str, Any]] = {
    "rewards": {"rewards": 7},
    "one-reward": {"rewards": [["gcd", 0, 7]]},
    "reward-of-text": {"rewards": [["gcd", 0, ["high"]]]},
    "large-reward": {"rewards": [["gcd", 0, [7.5]]]},
    "nan": {"rewards": [["gcd", 0, [math.nan]]]},
    "unhashable": {"rewards": [[["gcd"], 0, [1.0]]]},
    "rounds": {"rounds_trained": "many"},
    "origin": {"origin": {"model": ["tiny"]}},
}
HEADERS = {"header": b"{", "header-list": b"[1]", "header-shape": b'{"a": {"shape": 7}}'}


@pytest.mark.parametrize("fault", ["empty", "no-weights", "huge", *FAULTS, *HEADERS])
def test_unusable_offers_are_refused(fault: str, tmp_path: Path) -> None:
    said: dict[str, Any] = {"tasks": "", "rewards": [], "round": 1, "rounds_trained": 1}
    said |= {"origin": {}} | FAULTS.get(fault, {})
    header = HEADERS.get(fault, b"{}")
    weights = struct.pack("<Q", 1 << 40 if fault == "huge" else len(header)) + header
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
    with pytest.raises((tarfile.TarError, OSError, ValueError, KeyError)) as caught:
        harvest_command.read_offer(Slot("h1", 0), file)
    assert "\n" not in str(caught.value)


def test_output_must_be_new(tmp_path: Path) -> None:
    words = ["fleet", "harvest", "inventory.py", "--output", str(tmp_path)]
    with pytest.raises(SettingsError, match="exists already"):
        harvest_command.run(_parser().parse_args(words))


class Connector:
    """Runs a host's scripts in this machine's shell, with the host's folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stderr = ""

    def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, Any]:
        script = command.get_raw_value()
        for folder in (CURRENT, CONFIGURATION):
            script = script.replace(str(folder), str(self.root / folder.name))
        script = script.replace(harvest_part.FOLDER, str(self.root))
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
        assert name == "deploys.harvest_part.run"
        given = dict(argument.split("=", 1) for argument in arguments)
        connector = self.connectors[host]
        is_done = harvest_part._run(
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
    """Return two hosts: one with a trained worker, one whose command fails."""
    monkeypatch.setattr(harvest_part.fact_cache, "arguments_of_facts", lambda host: {})
    monkeypatch.setattr(harvest_part, "print_host_combined_output", lambda host, output: None)
    roots = {name: tmp_path / name for name in ("h1", "h2")}
    for name, program in (("h1", PYTHON.format(python=sys.executable)), ("h2", FAILS)):
        for path, content in (
            ("bin/systemd-run", SHIM),
            ("current/environment/bin/python", program),
        ):
            file = roots[name] / path
            file.parent.mkdir(parents=True)
            file.write_text(content)
            file.chmod(0o755)
    made = enrolled(tmp_path / "node", generation_num_generations=4, node_max_rounds=2)
    node = make_node(made)
    node.train()
    node.close()
    (tmp_path / "h1/hivewright").mkdir()
    given = made.model_dump(mode="json")
    (tmp_path / "h1/hivewright/worker-0.yaml").write_text(yaml.safe_dump(given))
    return Hosts(roots)


def add_noise(offer: Offer, folder: Path) -> Offer:
    """Return the offer of a worker whose weights are noise, and earn nothing."""
    folder.mkdir()
    with tarfile.open(offer.file) as tar:
        tar.extractall(folder, filter="data")
    file = folder / "weights/model.safetensors"
    noise = {k: w + 3 * w.std() * torch.randn(w.shape) for k, w in load_file(file).items()}
    save_file(noise, file)
    with tarfile.open(folder / "noise.tar", "w") as tar:
        tar.add(folder / "weights", "weights")
    rewards = {one: [0.0] * len(each) for one, each in offer.rewards.items()}
    slot = Slot("h3", 0)
    return dataclasses.replace(offer, slot=slot, file=folder / "noise.tar", rewards=rewards)


def test_best_model_comes_home(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    folder, output = tmp_path / ".harvest-test", tmp_path / "model"
    folder.mkdir()
    options = argparse.Namespace(tasks=4, seed=0, seconds=60)
    harvesting = harvest_command.Harvesting(hosts, folder, options, {"gcd": 1})  # type: ignore[arg-type]
    offers, failed = harvesting.collect([Slot("h1", 0), Slot("h2", 0)])
    assert failed == {"h2/0": "TrainingError (exit 8): x: no checkpoint yet"}
    assert set(offers[0].rewards) == {("gcd", 0), ("gcd", 1), ("basic_arithmetic", 0)}
    ranked = harvest_command.rank([*offers, add_noise(offers[0], tmp_path / "noise")])
    assert [str(offer.slot) for offer in ranked] == ["h1/0", "h3/0"]
    result = harvesting.bring(ranked, output)
    assert result["average"] is not None
    assert "## Harvest" in (output / "README.md").read_text()
    if result["chosen"] == "best":
        model = AutoModelForCausalLM.from_pretrained(output)
        checkpoints = tmp_path / "node/checkpoints"
        weights = load_file(max(checkpoints.iterdir()) / "model.safetensors")
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not list(tmp_path.glob("h?/hivewright-harvest-*"))


@pytest.mark.parametrize("name", ["../escaped", "/tmp/hivewright-escaped", "model/../../escaped"])
def test_hostile_host_writes_nothing_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    class Hostile:
        def operation(self, host: str, _: str, log: Path, *arguments: str, timeout: float) -> Ran:
            given = dict(argument.split("=", 1) for argument in arguments)
            with tarfile.open(given["file"], "w") as tar:
                entry = tarfile.TarInfo(name)
                tar.addfile(entry, io.BytesIO(b""))
            return Ran("done")

    folder = tmp_path / "work"
    (folder / "weights").mkdir(parents=True)
    for file in ("model.safetensors", "state.json"):
        (folder / "weights" / file).touch()
    with tarfile.open(folder / "offer.tar", "w") as tar:
        tar.add(folder / "weights", "weights")
    offer = make_offer("h1", [0.5], file=folder / "offer.tar")
    options = argparse.Namespace(tasks=4, seed=0, seconds=60)
    harvesting = harvest_command.Harvesting(Hostile(), folder, options, {})  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match=r"h1/0: unusable answer: .*; nothing was written"):
        harvesting.bring([offer], tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    assert not Path("/tmp/hivewright-escaped").exists()


def test_pieces_arrive_whole(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    script = harvest_part.piece_script(str(tmp_path / "file"), 0)
    said = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    assert base64.b64decode(said) == content
