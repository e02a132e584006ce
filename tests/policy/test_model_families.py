"""Tests with models of many families, loaded by path, without special cases in the code."""

import copy

import pytest
import torch
from small_models import FAMILIES, save_model

from tests.groups import scored_group
from worker import settings
from worker.errors import ModelError
from worker.policy import lora as lora_module
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Ending
from worker.policy.engines.hf_decoder import CachedDecoder
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.policy import INSTRUCTION, Policy, load
from worker.records import Task
from worker.trainer import checkpoint
from worker.trainer.trainer import Trainer

torch.set_num_threads(1)  # cores are shared; such models gain nothing from more

GENERATION = settings.Generation(
    num_generations=4, max_prompt_length=400, max_completion_length=24, dtype="float32"
)
QUESTIONS = ["Calculate 12 + 34.", "What is the greatest common divisor of 678 and 90?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def policy(folders, name):
    return load(settings.Model(name=str(folders[name]), device="cpu"))


def test_weights_embeddings_and_ends_are_those_of_the_folder(policy, name):
    family, model = FAMILIES[name], policy.model
    assert (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ) == family.is_tied
    ends = [policy.tokenizer.convert_tokens_to_ids(token) for token in (family.eos, *family.ends)]
    assert policy.end_ids == tuple(ends)
    assert (policy.tokenizer.pad_token is None) == (family.pad is None)
    assert policy.num_tokens == policy.model.config.vocab_size
    assert type(policy.tokenizer).__name__ == (family.tokenizer or "TokenizersBackend")


def test_question_is_asked_in_the_family_s_own_way(policy, name):
    family = FAMILIES[name]
    ids = policy.prompt_ids(QUESTIONS[0])
    text = policy.tokenizer.decode(ids)
    assert text.count(INSTRUCTION) == 1
    assert text.index(INSTRUCTION) < text.index(QUESTIONS[0])
    if family.bos is not None and (family.template is None or "bos_token" in family.template):
        assert ids.count(policy.tokenizer.bos_token_id) == 1
        assert ids[0] == policy.tokenizer.bos_token_id
    if family.template is None:
        assert text.endswith(f"{INSTRUCTION}\n\n{QUESTIONS[0]}\n")
    else:
        assert not text.rstrip().endswith(QUESTIONS[0])  # what follows asks for the answer


@pytest.mark.parametrize(
    "text",
    ["7", " 7", "\n7", "  7", "", " <answer>42</answer>", "42 is it.\n\n<answer>42</answer>"],
)
def test_text_of_an_answer_stands_for_the_tokens_behind_its_prompt(policy, text):
    """Tokenise an answer's text as peers do: a leading space is part of it and adds no token."""
    ids, _ = policy.completion_ids(text, 100)
    ids = [i for i in ids if i not in policy.end_ids]
    assert policy._decode(ids) == text
    prompt = policy.prompt_ids(QUESTIONS[0])
    assert policy.tokenizer.decode([*prompt, *ids]) == policy.tokenizer.decode(prompt) + text


def test_greedy_answers_and_log_probabilities_are_those_of_transformers(policy, name, caplog):
    with caplog.at_level("INFO"):
        engine = policy._load_engine(GENERATION)
    expected = LeanDecoder if FAMILIES[name].decoder == "lean" else CachedDecoder
    assert type(engine.decoder) is expected
    if expected is CachedDecoder:
        assert (
            f"lean decoder not used reason=family {policy.model.config.model_type}" in caplog.text
        )
        assert "generation engine=torch, transformers' forward" in caplog.text
    prompts = [policy.prompt_ids(question) for question in QUESTIONS]
    greedy = GENERATION.model_copy(update={"top_k": 1, "num_generations": 2})
    ending = Ending(frozenset(policy.end_ids), lambda tokens: False, [False] * policy.num_tokens)
    ours = engine.generate(prompts, greedy, 0, ending)
    theirs = ReferenceEngine(policy.model).generate(prompts, greedy, 0, ending)
    for prompt, group, reference in zip(prompts, ours, theirs, strict=True):
        assert [row.token_ids for row in group] == [row.token_ids for row in reference]
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *group[0].token_ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(group[0].token_ids)[:, None])[:, 0]
        assert group[0].logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def score(policy, groups):
    return [
        scored_group(
            Task("basic_arithmetic", "0" * 12, 0, i),
            question,
            tuple(c.text for c in completions),
            (1.0, 0.0, 0.25, 0.0),
            token_ids=tuple(c.token_ids for c in completions),
            truncated=tuple(c.truncated for c in completions),
        )
        for i, (question, completions) in enumerate(zip(QUESTIONS, groups, strict=True))
    ]


@pytest.mark.parametrize("lora", [None, settings.Lora(rank=4)], ids=["whole", "lora"])
def test_rounds_of_training_teach_it_what_is_rewarded(policy, name, lora, tmp_path):
    trainer = Trainer(policy, settings.Trainer(learning_rate=3e-3, lora=lora), GENERATION)
    first = policy.generate(QUESTIONS, GENERATION, seed=0)
    groups = score(policy, first)
    rewarded = [(tuple(policy.prompt_ids(g.question)), g.sampled[0].token_ids) for g in groups]
    before = [likelihood(policy, *pair) for pair in rewarded]
    for _ in range(4):
        metrics = trainer.step(groups)
        assert metrics.skipped is None
        assert metrics.grad_norm > 0
    assert all(b < likelihood(policy, *pair) for b, pair in zip(before, rewarded, strict=True))
    # The engine has followed the weights.
    second = policy.generate(QUESTIONS, GENERATION, seed=0)
    assert second != first
    for question, completions in zip(QUESTIONS, second, strict=True):
        for completion in completions:
            expected = likelihood(policy, tuple(policy.prompt_ids(question)), completion.token_ids)
            assert sum(completion.logprobs) == pytest.approx(expected, abs=1e-3)
    # A peer's text is also learned from.
    texts = ("<answer>42</answer>", *groups[0].completions[1:])
    outsiders = [scored_group(g.task, g.question, texts, g.rewards) for g in groups]
    assert trainer.step(outsiders).skipped is None
    checkpoint.save(tmp_path, trainer, {}, keep=1)
    lora_module.save_merged(policy.model, tmp_path / "model.safetensors")
    lora_module.save_config(policy.model, tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    copied = load(settings.Model(name=str(tmp_path), device="cpu"))
    assert likelihood(copied, *rewarded[0]) == pytest.approx(
        likelihood(policy, *rewarded[0]), abs=1e-3
    )


@torch.no_grad()
def likelihood(policy, prompt, completion):
    logits = policy.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())


REFUSED = {
    "rotation longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            }
        },
    ),
    "rotation dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "rotation default": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_shape_that_the_lean_decoder_does_not_compute_is_generated_by_transformers(
    tmp_path, caplog, reason
):
    name, departures = REFUSED[reason]
    with caplog.at_level("INFO"):
        policy = load(
            settings.Model(name=str(save_model(name, tmp_path, **departures)), device="cpu")
        )
        engine = policy._load_engine(GENERATION)
    assert isinstance(engine.decoder, CachedDecoder)
    assert f"lean decoder not used reason={reason}" in caplog.text


def test_model_that_reads_in_both_directions_is_refused(tmp_path):
    folder = save_model("gemma3", tmp_path, use_bidirectional_attention=True)
    policy = load(settings.Model(name=str(folder), device="cpu"))
    with pytest.raises(
        ModelError,
        match=r"model of type gemma3_text: attention in both directions: .*can't be sampled",
    ):
        policy._load_engine(GENERATION)


@pytest.mark.parametrize(
    ("name", "departures"),
    [
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("mistral", {"sliding_window": None}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}},
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
        ),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    ],
)
def test_shape_that_the_lean_decoder_computes_is_computed_exactly(tmp_path, name, departures):
    policy = load(settings.Model(name=str(save_model(name, tmp_path, **departures)), device="cpu"))
    engine = policy._load_engine(GENERATION)
    assert isinstance(engine.decoder, LeanDecoder)
    ours = policy.generate(QUESTIONS, GENERATION, seed=3)
    reference = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.name)
    reference._load_engine(GENERATION).decoder = CachedDecoder(reference.model)
    theirs = reference.generate(QUESTIONS, GENERATION, seed=3)
    for mine, other in zip(
        (c for g in ours for c in g), (c for g in theirs for c in g), strict=True
    ):
        assert mine.token_ids == other.token_ids
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
