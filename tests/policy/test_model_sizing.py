"""Tests of the choice of a model by memory: it is made once and never changes."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from worker import enrolment, settings
from worker.commands import reports
from worker.errors import ModelError
from worker.policy import memory, model_sizing, policy
from worker.policy.model_sizing import Machine, choose, judge, measure

GIB = 2**30
WHOLE = settings.Trainer(lora=None)
LARGE = {"Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-1.7B"}
SMALL = {"Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B"}


def gpu(total: float, free: float | None = None) -> Machine:
    return Machine("cuda:0", "bfloat16", total, total if free is None else free)


def cpu(free: float) -> Machine:
    return Machine("cpu", "float32", 0.0, free)


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        (gpu(80), LARGE),
        (gpu(40), LARGE),
        (gpu(39.9), SMALL),
        (gpu(24), SMALL),
        (gpu(12), {"Qwen/Qwen2.5-0.5B-Instruct"}),  # 10.7 and 12.6 GiB are needed
        (gpu(80, free=31), {"Qwen/Qwen2.5-1.5B-Instruct"}),
        (gpu(80, free=20), SMALL),
        (cpu(64), SMALL),
        (cpu(9), {"Qwen/Qwen2.5-0.5B-Instruct"}),
    ],
)
def test_machine_gets_a_model_of_the_best_pool_that_fits(machine, names):
    assert {choose(machine, WHOLE, f"peer{i}").name for i in range(40)} == names


def test_choice_of_a_peer_is_always_the_same():
    assert len({choose(gpu(80), WHOLE, "Qm1") for _ in range(20)}) == 1


def test_machine_without_room_is_a_model_error_with_the_numbers():
    with pytest.raises(
        ModelError,
        match=r"3\.0 GiB are free on cpu, the smallest, Qwen/Qwen2\.5-0\.5B-Instruct, needs 8\.9",
    ):
        choose(cpu(3), WHOLE, "Qm1")


def test_verdicts_say_why_a_model_does_not_fit():
    reasons = {verdict.name: verdict.reason for verdict in judge(cpu(9.5), WHOLE)}
    assert reasons["Qwen/Qwen3-1.7B"] == "for GPUs of 40 GiB and more; cpu has no GPU"
    assert reasons["Qwen/Qwen3-0.6B"] == "9.5 GiB are free on cpu"
    assert reasons["Qwen/Qwen2.5-0.5B-Instruct"] is None


def test_adapters_need_less_and_a_reference_model_more():
    name, machine = "Qwen/Qwen2.5-0.5B-Instruct", gpu(24)
    lora = settings.Lora(rank=16)
    needed = {
        how: model_sizing.needed_gib(
            settings.Model(name=name), machine, settings.Trainer(**{"lora": None, **options})
        )
        for how, options in {
            "whole": {},
            "reference": {"beta": 0.1},
            "lora": {"lora": lora},
            "both": {"lora": lora, "beta": 0.1},
        }.items()
    }
    assert needed["whole"] == pytest.approx(1.5 + 494032768 * 20 / GIB)
    assert needed["reference"] == pytest.approx(needed["whole"] + 494032768 * 2 / GIB)
    assert needed["lora"] == needed["both"] == pytest.approx(1.5 + 494032768 * 2.32 / GIB)
    assert choose(cpu(5), settings.Trainer(lora=lora), "Qm1").name in SMALL
    assert model_sizing.explain(settings.Model(name=name), WHOLE, Path("/"))[-1].startswith(
        f"this node: {name}, as model.name says: needs "
    )


def test_gpu_is_measured_where_the_model_will_live(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: ((30 + index) * GIB, (40 + index) * GIB)
    )
    assert measure(settings.Model()) == Machine("cuda:0", "bfloat16", 40.0, 30.0)
    assert measure(settings.Model(device="cuda:1")) == Machine("cuda:1", "bfloat16", 41.0, 31.0)
    assert measure(settings.Model(device="cpu")).gpu_gib == 0
    with pytest.raises(ModelError, match="cuda:2: torch sees 2 GPUs"):
        measure(settings.Model(device="cuda:2"))


@pytest.mark.parametrize(
    ("has_amx", "has_avx512_bf16", "dtype"),
    [(True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_large_models_are_trained_in_bfloat16_where_the_cpu_is_fast_at_it(
    monkeypatch, has_amx, has_avx512_bf16, dtype
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    assert measure(settings.Model(device="cpu")).dtype == dtype
    assert measure(settings.Model(device="cpu", dtype="float32")).dtype == "float32"
    assert (
        policy.load(settings.Model(device="cpu")).model.dtype == torch.float32
    )  # too small to gain by it
    monkeypatch.setattr(model_sizing, "_LARGE_ENOUGH_FOR_BFLOAT16", 1)
    loaded = policy.load(settings.Model(device="cpu")).model
    assert {str(parameter.dtype) for parameter in loaded.parameters()} == {f"torch.{dtype}"}
    assert {buffer.dtype for buffer in loaded.buffers() if buffer.is_floating_point()} == {
        torch.float32
    }


def test_ram_is_measured_and_a_control_group_limits_it(tmp_path):
    assert 0 < measure(settings.Model(device="cpu")).free_gib < 100_000
    inner = tmp_path / "worker.slice"
    inner.mkdir()
    for folder, limit, used in ((tmp_path, "max", 7), (inner, "1000", 400)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert memory.left_in(inner) == [600]


def machine_with(monkeypatch, machine):
    monkeypatch.setattr(model_sizing, "measure", lambda model: machine)


def settings_for(folder, **flat):
    return settings.from_flat(
        {
            "node_state_dir": str(folder),
            "node_min_free_disk_mb": 1,
            "model_name": "auto",
            "trainer_lora": None,
            **flat,
        },
        "test",
    )


def test_enrolment_decides_once_whatever_the_machine_becomes(tmp_path, monkeypatch, capsys):
    machine_with(monkeypatch, gpu(80))
    enrolment.run(settings_for(tmp_path))
    first = model_sizing.settle(settings_for(tmp_path).model, tmp_path)
    assert first.name in LARGE
    assert first.name in capsys.readouterr().out
    machine_with(monkeypatch, cpu(16))
    enrolment.run(settings_for(tmp_path))
    assert model_sizing.settle(settings_for(tmp_path).model, tmp_path) == first


def test_name_of_the_user_s_own_counts_before_the_choice(tmp_path, monkeypatch):
    machine_with(monkeypatch, gpu(80))
    enrolment.run(settings_for(tmp_path))
    model = settings_for(tmp_path, model_name="hivewright/tiny").model
    assert model_sizing.settle(model, tmp_path) == model


def test_node_with_a_name_enrols_without_a_choice(tmp_path, monkeypatch):
    machine_with(monkeypatch, cpu(0.1))  # where nothing fits
    enrolment.run(settings_for(tmp_path, model_name="hivewright/tiny"))
    assert not (tmp_path / "model.json").exists()
    with pytest.raises(
        ModelError, match=r"model.json: missing, and model.name is auto.*run `hivewright enrol`"
    ):
        model_sizing.settle(settings_for(tmp_path).model, tmp_path)


def test_machine_without_room_is_not_enrolled(tmp_path, monkeypatch):
    machine_with(monkeypatch, cpu(0.1))
    with pytest.raises(ModelError, match="no model fits"):
        enrolment.run(settings_for(tmp_path))
    assert not (tmp_path / "enrolment.json").exists()


@pytest.mark.parametrize("text", ["", "{}", json.dumps({"name": 3}), "[]"])
def test_choice_that_is_broken_is_explained(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(
        ModelError, match=r"model.json: .*expected the file that `hivewright enrol` writes"
    ):
        model_sizing.settle(settings_for(tmp_path).model, tmp_path)


def test_check_says_what_fits_and_stays_yaml(tmp_path, monkeypatch, capsys):
    machine_with(monkeypatch, gpu(24))
    checked = settings_for(tmp_path)
    reports.print_settings(checked, argparse.Namespace(model=None))
    out = capsys.readouterr().out
    assert settings.parse(yaml.safe_load(out), "check") == checked
    assert "# models for cuda:0 in bfloat16, 24.0 GiB free of 24.0:" in out
    assert (
        "large  Qwen/Qwen3-1.7B              needs 33.5 GiB: does not: for GPUs of 40 GiB and more"
        in out
    )
    assert "small  Qwen/Qwen3-0.6B              needs 12.6 GiB: fits" in out
    assert "# this node: model.name is auto; `hivewright enrol` chooses" in out
    enrolment.run(checked)
    capsys.readouterr()
    reports.print_settings(checked, argparse.Namespace(model=None))
    assert "chosen when it enrolled" in capsys.readouterr().out


def test_check_says_whether_a_model_of_the_user_s_own_fits(tmp_path, monkeypatch):
    machine_with(monkeypatch, cpu(16))
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1000, 250), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert model_sizing._count_parameters(tmp_path / "model.safetensors") == 250_007
    for name in (str(tmp_path), "hivewright/tiny"):
        assert model_sizing.explain(settings.Model(name=name), WHOLE, tmp_path)[-1].endswith(
            "says: needs 1.5 GiB: fits"
        )
    machine_with(monkeypatch, cpu(1))
    last = model_sizing.explain(settings.Model(name=str(tmp_path)), WHOLE, tmp_path)[-1]
    assert last.endswith("needs 1.5 GiB: does not fit: 1.0 GiB are free")
    assert (
        model_sizing.explain(settings.Model(name="owner/model"), WHOLE, tmp_path)[-1]
        == "this node: owner/model, as model.name says"
    )
    with pytest.raises(ModelError, match=r"model.name: /no/such/model: no config.json there"):
        reports.print_settings(
            settings_for(tmp_path, model_name="/no/such/model"), argparse.Namespace(model=None)
        )
    (tmp_path / "model.safetensors").write_text("nonsense")
    with pytest.raises(ModelError, match="expected a model's weights as safetensors"):
        model_sizing.explain(settings.Model(name=str(tmp_path)), WHOLE, tmp_path)


def test_context_is_read_from_the_files_that_are_here(tmp_path):
    long = settings.Generation(max_prompt_length=900, max_completion_length=200)
    (tmp_path / "config.json").write_text('{"n_positions": 1024}')
    with pytest.raises(ModelError, match=r"takes 1024 tokens, .* make 1100; lower them"):
        model_sizing.require_context(settings.Model(name=str(tmp_path)), long)
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 1100}}')
    model_sizing.require_context(settings.Model(name=str(tmp_path)), long)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"config.json: can't be read: .* get the file again"):
        model_sizing.require_context(settings.Model(name=str(tmp_path)), long)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "long"}')
    with pytest.raises(
        ModelError, match=r"max_position_embeddings: got 'long', expected a whole number"
    ):
        model_sizing.require_context(settings.Model(name=str(tmp_path)), long)
    model_sizing.require_context(settings.Model(name="Qwen/Qwen2.5-0.5B-Instruct"), long)
