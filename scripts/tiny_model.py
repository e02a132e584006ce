# ruff: noqa: N806, S106 - tensors are named with their axes
"""Make `hivewright/tiny`, the small model that comes with the package (`make tiny-model`).

A Qwen2-architecture model of 0.95 M parameters with its own tokenizer, pre-trained on questions and
answers of the demo mix until 0.8 of its best and about 0.4 of its sampled answers are right, so
that GRPO has a learning signal and room to improve. The same seed and number of threads make the
same files on the same kind of processor.
"""

# N sequences, T tokens

import argparse
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from worker import settings
from worker.environments.mixture import Mix
from worker.environments.presets import DEMO_FAMILIES
from worker.environments.reasoning_gym import ReasoningGym
from worker.policy.policy import Policy

log = logging.getLogger("tiny_model")

TARGET_REWARD = 0.80
"""Mean reward of its best (greedy) answers at which training stops."""
LABEL_SMOOTHING = 0.3
"""Keeps sampled answers worse than the best ones, so that GRPO can improve them.

Without it the rounds would have to teach what supervised training has not (measured: +0.07).
"""
MAX_STEPS = 1500
EVALUATE_EVERY = 25
BATCH = 128
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 50
VOCABULARY = 512
SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
# The instruction is left out: a model of this size would spend more tokens on it than on the
# question.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Pair = tuple[str, str]


def _mix(**environment: Any) -> Mix:
    return Mix(settings.Environment(**environment), {"reasoning-gym": ReasoningGym()})


def make_tokenizer(gym: Mix) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with single digits and one token for each answer tag."""
    default = _mix()
    texts = [
        g.question(task)
        for g, count in ((gym, 4000), (default, 900))
        for task in g.sample(0, count)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken("<answer>", normalized=False), AddedToken("</answer>", normalized=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def stream_pairs(gym: Mix, seed: int) -> Iterator[Pair]:
    """Yield questions with their answers, without end."""
    while True:
        seed += 1
        for task in gym.sample(seed, 1000):
            yield gym.question(task), f"<answer>{gym.answer(task)}</answer>"


def train_step(policy: Policy, optimizer: torch.optim.Optimizer, pairs: list[Pair]) -> float:
    """Take one step of supervised training on the answers; return the mean loss per token."""
    rows = []
    for question, answer in pairs:
        prompt = policy.prompt_ids(question)
        completion = [*policy.tokenizer.encode(answer, add_special_tokens=False), policy.end_ids[0]]
        rows.append((prompt, completion))
    rows.sort(key=lambda row: len(row[0]))
    num_tokens = sum(len(completion) for _, completion in rows)
    total = 0.0
    for start in range(0, len(rows), 32):  # sorted slices: less padding
        part = rows[start : start + 32]
        width = max(len(p) + len(c) for p, c in part)
        ids_NT = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in part])
        labels_NT = torch.tensor(
            [[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in part]
        )
        logits_NTV = policy.model(input_ids=ids_NT).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits_NTV.transpose(1, 2),
            labels_NT[:, 1:],
            reduction="sum",
            label_smoothing=LABEL_SMOOTHING,
        )
        loss = loss / num_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def mean_reward(policy: Policy, gym: Mix, seed: int, top_k: int) -> float:
    """Return the mean reward over 600 tasks: greedy with `top_k` 1, sampled as in GRPO with 0."""
    tasks = gym.sample(seed, 600)
    generation = settings.Generation(num_generations=2, max_completion_length=12, top_k=top_k)
    groups = policy.generate([gym.question(task) for task in tasks], generation, seed)
    rewards = [
        reward
        for task, group in zip(tasks, groups, strict=True)
        for reward in gym.score(task, [c.text for c in group or ()])
    ]
    return sum(rewards) / len(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("worker/policy/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()

    gym = _mix(families=DEMO_FAMILIES)
    tokenizer = make_tokenizer(gym)
    policy = Policy(make_model(tokenizer), tokenizer, "hivewright/tiny")
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    pairs = stream_pairs(gym, arguments.seed << 20)
    for step in range(1, MAX_STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        loss = train_step(policy, optimizer, list(islice(pairs, BATCH)))
        if step % EVALUATE_EVERY == 0:
            best = mean_reward(policy, gym, -step, top_k=1)
            log.info(
                "step %4d  loss %.3f  best answers %.3f  %4.0f s",
                step,
                loss,
                best,
                time.monotonic() - started,
            )
            if best >= TARGET_REWARD:
                break
    else:
        raise SystemExit(
            f"mean reward {best:.3f} after {MAX_STEPS} steps; expected {TARGET_REWARD}"
        )

    policy.model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    num_bytes = sum(file.stat().st_size for file in arguments.output.iterdir())
    sampled = mean_reward(policy, gym, -1, top_k=0)
    log.info(
        "%d steps, %d bytes, %.0f s; sampled answers %.3f",
        step,
        num_bytes,
        time.monotonic() - started,
        sampled,
    )


if __name__ == "__main__":
    main()
