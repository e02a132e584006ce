"""Tests that `hivewright check --model` agrees with the code and with docs/models.md."""

import argparse
from pathlib import Path

import pytest
import torch
import transformers
from small_models import FAMILIES, save_model

from worker import settings
from worker.commands import reports
from worker.errors import ModelError
from worker.policy import engine_forecast, logprobs
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.policy import load

torch.set_num_threads(1)

DOCS = Path(__file__).parents[2] / "docs/models.md"
GENERATION = settings.Generation(num_generations=2, max_completion_length=4, dtype="float32")
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_tells_which_way_the_model_goes(folders, name):
    said = engine_forecast.read(settings.Model(name=str(folders[name])))
    policy = load(settings.Model(name=str(folders[name]), device="cpu"))
    decoder = policy._load_engine(GENERATION).decoder
    assert (
        said.way
        == {LeanDecoder: engine_forecast.LEAN, CachedDecoder: engine_forecast.FORWARD}[
            type(decoder)
        ]
    )
    assert (said.reason is None) == (said.way == engine_forecast.LEAN)
    assert logprobs.Scorer(policy.model).is_packed == (said.packing is None)
    assert said.targets


def test_table_in_the_docs_is_what_the_code_says(folders):
    rows = []
    for name in FAMILIES:
        said = engine_forecast.read(settings.Model(name=str(folders[name])))
        packing = said.packing or "packed"
        rows.append(
            f"| {name} | `{said.model_type}` | {said.way} | {packing} | {', '.join(said.targets)} |"
        )
    missing = [row for row in rows if row not in DOCS.read_text().splitlines()]
    assert not missing, "docs/models.md lacks these rows:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MambaConfig(hidden_size=32, num_hidden_layers=1),
            "it has a cache of its own",
        ),
        (transformers.ViTConfig(), "has no causal language model of this type"),
    ],
)
def test_model_that_can_not_be_trained_here_is_refused_with_its_reason(
    config, reason, tmp_path, capsys
):
    config.save_pretrained(tmp_path)
    reports.print_settings(settings.Settings(), argparse.Namespace(model=str(tmp_path)))
    assert f"generation: refused: {reason}" in capsys.readouterr().out.replace(
        "transformers 5.23.0 ", ""
    )


def test_model_that_is_nowhere_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json there"):
        reports.print_settings(settings.Settings(), argparse.Namespace(model=str(tmp_path)))


def test_text_part_of_a_model_that_sees_is_loaded_and_saved_by_itself(tmp_path):
    text_folder = save_model("gemma3", tmp_path / "text")
    text = transformers.AutoModelForCausalLM.from_pretrained(text_folder)
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    model.save_pretrained(tmp_path / "both")
    transformers.AutoTokenizer.from_pretrained(text_folder).save_pretrained(tmp_path / "both")
    said = engine_forecast.read(settings.Model(name=str(tmp_path / "both")))
    assert (said.model_type, said.way) == ("gemma3", engine_forecast.LEAN)
    alone, taken = (
        load(settings.Model(name=str(f), device="cpu")) for f in (text_folder, tmp_path / "both")
    )
    assert type(taken.model) is type(alone.model)
    assert taken.end_ids == alone.end_ids
    answers = [p.generate(["Calculate 2 + 3."], GENERATION, seed=0) for p in (alone, taken)]
    assert answers[0] == answers[1]
    taken.model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(saved(ids).logits, alone.model(ids).logits)
