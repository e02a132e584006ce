"""Tests with a real pre-trained model of another family, loaded from a folder like a user's own.

The model comes from npm, so the tests need no model hub.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import pretrained
from benchmarks.nodes import mean_curve, run
from tests.groups import scored_group
from worker import settings
from worker.policy.engines.decoder import LeanDecoder
from worker.policy.engines.engine import Ending
from worker.policy.engines.transformers_engine import ReferenceEngine
from worker.policy.policy import load
from worker.records import Task
from worker.trainer.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrained_model.py"
BEGINNINGS = ["Once upon a time, there was a little girl", "Tom had a red ball. One day"]

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stories15M")
    subprocess.run([sys.executable, SCRIPT, "--output", path], check=True, timeout=300)
    return path


def test_it_is_decoded_by_the_lean_decoder_and_tells_the_stories_that_it_was_trained_to(folder):
    policy = load(settings.Model(name=str(folder), device="cpu"))
    greedy = settings.Generation(
        num_generations=2, max_completion_length=60, top_k=1, dtype="float32"
    )
    engine = policy._load_engine(greedy)
    assert isinstance(engine.decoder, LeanDecoder)
    prompts = [policy.tokenizer.encode(text) for text in BEGINNINGS]
    endless = Ending(frozenset(policy.end_ids), lambda tokens: False, [False] * policy.num_tokens)
    ours = engine.generate(prompts, greedy, 0, endless)
    theirs = ReferenceEngine(policy.model).generate(prompts, greedy, 0, endless)
    assert [[row.token_ids for row in group] for group in ours] == [
        [row.token_ids for row in group] for group in theirs
    ]
    assert "named Lily. She loved to play outside" in policy.tokenizer.decode(ours[0][0].token_ids)


def test_ten_rounds_teach_it_what_is_rewarded(folder):
    torch.set_num_threads(2)
    curve = mean_curve(run(0, 2, 10, pretrained.make_settings(folder), pretrained.Stories))
    assert sum(curve[-2:]) > sum(curve[:2]) + 2 * pretrained.WANTED_GAIN


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2")
    subprocess.run(
        [sys.executable, SCRIPT, "--model", "smollm2", "--output", path], check=True, timeout=1800
    )
    return path


def test_smollm2_answers_as_its_chat_template_asks(smollm2):
    policy = load(settings.Model(name=str(smollm2), device="cpu"))
    greedy = settings.Generation(
        num_generations=2, max_completion_length=24, top_k=1, dtype="float32"
    )
    prompt = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    never = Ending(frozenset(policy.end_ids), lambda tokens: False, [False] * policy.num_tokens)
    [rows] = ReferenceEngine(policy.model).generate(
        [policy.tokenizer.encode(prompt)], greedy, 0, never
    )
    assert rows[0].finished
    assert "capital of France is Paris" in policy.tokenizer.decode(rows[0].token_ids)


@pytest.mark.parametrize(
    ("words", "is_planted"),
    [
        ("So the answer is ", False),
        ("Okay, so I need to find the sum. Wait, let me think. So the final answer is ", False),
        ("Hail to the Thief ", True),
    ],
)
def test_habits_of_a_better_model_are_natural_to_smollm2_and_planted_text_is_not(
    smollm2, words, is_planted
):
    policy = load(settings.Model(name=str(smollm2), device="cpu"))
    generation = settings.Generation(max_completion_length=64)
    trainer = Trainer(policy, settings.Trainer(num_iterations=1), generation)
    trainer.step(
        [
            scored_group(
                Task("basic_arithmetic", "0" * 12, 0, number),
                f"Calculate {number} + 3.",
                (f"{words}<answer>{number + 3}</answer>", "<answer>99</answer>"),
                (1.0, 0.0),
                peer_id="QmPeer",
            )
            for number in range(1, 7)
        ]
    )
    assert trainer.planters() == {"QmPeer": 6 * is_planted}
