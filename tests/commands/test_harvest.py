"""`hivewright export` and the host's parts of a harvest, with checkpoints of the small model."""

import argparse
import io
import json
import math
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.test_node import enrolled, make_node
from worker import settings
from worker.cli import _parser
from worker.commands import harvest
from worker.errors import ModelError, SettingsError, TrainingError

TASKS = ("--tasks", "8", "--seconds", "60")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> settings.Settings:
    """Train a node for a few rounds."""
    torch.set_num_threads(1)
    made = enrolled(tmp_path_factory.mktemp("harvest") / "node")
    node = make_node(made)
    node.train()
    node.close()
    return made


def options(name: str, *words: str) -> argparse.Namespace:
    return _parser().parse_args([*name.split(), "--settings", "x", *words])


def copied(trained: settings.Settings, folder: Path, shift: float = 0.0) -> settings.Settings:
    """Return the settings of another node, whose newest weights are `shift` away."""
    shutil.copytree(trained.node.state_dir, folder)
    made = trained.model_copy(
        update={"node": trained.node.model_copy(update={"state_dir": folder})}
    )
    file = newest(made) / "model.safetensors"
    weights = {
        name: weight + shift * weight.std() * torch.randn(weight.shape)
        for name, weight in load_file(file).items()
    }
    save_file(weights, file)
    return made


def newest(made: settings.Settings) -> Path:
    return max((made.node.state_dir / "checkpoints").iterdir())


def offered(
    made: settings.Settings, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tuple[dict, Path]:
    """Return what a node's offer says, and the folder with its weights."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    harvest.offer(made, options("harvest offer", *TASKS))
    monkeypatch.undo()
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        tar.extractall(folder, filter="data")
    return json.loads((folder / "offer.json").read_text()), folder / "weights"


def chosen(
    made: settings.Settings,
    sets: Sequence[Path],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> dict:
    """Return the result of a choice between weights; the model is in `folder`."""
    sent, out = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=sent, mode="w") as tar:
        for number, each in enumerate(sets):
            tar.add(each, arcname=f"{number:03d}")
    sent.seek(0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=sent))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    harvest.choose(made, options("harvest choose", *TASKS, "--nodes", "h1/0", "h2/0"))
    monkeypatch.undo()
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        tar.extractall(folder, filter="data")
    return json.loads((folder / "result.json").read_text())


def test_export_is_a_folder_that_transformers_loads(trained, tmp_path, capsys):
    output = tmp_path / "model"
    harvest.export(trained, options("export", "--output", str(output)))
    model = AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    weights = load_file(newest(trained) / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert "rounds trained | 6" in (output / "README.md").read_text()
    assert "after 6 rounds" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="exists already"):
        harvest.export(trained, options("export", "--output", str(output)))


def test_nothing_remains_of_an_export_that_fails(trained, tmp_path):
    missing = ("--checkpoint", str(tmp_path / "none"))
    asked = options("export", "--output", str(tmp_path / "a"), *missing)
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        harvest.export(trained, asked)
    broken = newest(copied(trained, tmp_path / "broken", math.inf))
    asked = options("export", "--output", str(tmp_path / "b"), "--checkpoint", str(broken))
    with pytest.raises(TrainingError, match="can be read"):
        harvest.export(trained, asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_offers_of_two_nodes_are_of_the_same_tasks(trained, tmp_path, monkeypatch):
    other = copied(trained, tmp_path / "other", 3.0)
    first, weights = offered(trained, monkeypatch, tmp_path / "1")
    second, _ = offered(other, monkeypatch, tmp_path / "2")
    assert first["tasks"] == second["tasks"]
    assert first["rounds_trained"] == 6
    assert {(family, level) for family, level, _ in first["rewards"]} >= {
        ("gcd", 0),
        ("basic_arithmetic", 0),
    }
    own = load_file(newest(trained) / "model.safetensors")
    sent = load_file(weights / "model.safetensors")
    assert all(torch.equal(own[name], sent[name]) for name in own)
    # Noise three times as large as the weights leaves nothing of what was learned.
    assert sum(map(sum, (row[2] for row in first["rewards"]))) > sum(
        map(sum, (row[2] for row in second["rewards"]))
    )
    assert not list(trained.node.state_dir.glob(".harvest-*"))


def test_average_is_taken_only_if_it_earns_more(trained, tmp_path, monkeypatch):
    _, best = offered(trained, monkeypatch, tmp_path / "1")
    broken = tmp_path / "broken"
    shutil.copytree(best, broken)
    weights = load_file(best / "model.safetensors")
    save_file({k: -w for k, w in weights.items()}, broken / "model.safetensors")
    result = chosen(trained, [best, broken], monkeypatch, tmp_path / "made")  # a mean of zeros
    assert result["chosen"] == "best"
    assert result["average"] < result["best"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made/model")
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert (
        f"| best node | {result['best']:.3f} |" in (tmp_path / "made/model/README.md").read_text()
    )


def test_average_of_nodes_that_miss_to_opposite_sides_is_brought(trained, tmp_path, monkeypatch):
    _, good = offered(trained, monkeypatch, tmp_path / "1")
    weights = load_file(good / "model.safetensors")
    noise = {name: 2 * w.std() * torch.randn(w.shape) for name, w in weights.items()}
    for sign, name in ((1, "plus"), (-1, "minus")):
        shutil.copytree(good, tmp_path / name)
        shifted = {k: w + sign * noise[k] for k, w in weights.items()}
        save_file(shifted, tmp_path / name / "model.safetensors")
    sets = [tmp_path / "plus", tmp_path / "minus"]
    result = chosen(trained, sets, monkeypatch, tmp_path / "made")
    assert result["chosen"] == "average"
    assert result["average"] > result["best"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made/model")
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, weights[name], atol=1e-4), name
    card = (tmp_path / "made/model/README.md").read_text()
    assert "h1/0, h2/0" in card
    assert "| average of 2 nodes |" in card


@pytest.mark.parametrize("fault", ["shape", "names", "non-finite", "garbage"])
def test_weights_of_another_model_are_one_clear_line(trained, fault, tmp_path, monkeypatch):
    _, best = offered(trained, monkeypatch, tmp_path / "1")
    odd = tmp_path / "odd"
    shutil.copytree(best, odd)
    weights = load_file(best / "model.safetensors")
    name = next(iter(weights))
    if fault == "shape":
        weights[name] = weights[name].flatten()
    elif fault == "names":
        weights["other"] = weights.pop(name)
    elif fault == "non-finite":
        weights[name].view(-1)[0] = math.nan
    save_file(weights, odd / "model.safetensors")
    if fault == "garbage":
        (odd / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="001: weights") as caught:
        chosen(trained, [best, odd], monkeypatch, tmp_path / "made")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()
