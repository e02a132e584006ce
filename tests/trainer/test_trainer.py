import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from tests.groups import change, logprobs, scored_group, token_ids, truncated
from worker import settings
from worker.errors import TrainingError
from worker.policy.logprobs import completion_logprobs
from worker.policy.policy import Policy, load
from worker.records import ScoredGroup, Task
from worker.trainer.trainer import Pass, Trainer

LOSS_TYPES = get_args(settings.Trainer.model_fields["loss_type"].annotation)
GENERATION = settings.Generation(num_generations=4, max_prompt_length=64, max_completion_length=12)
QUESTIONS = [
    "Calculate 2 + 3.",
    "Calculate ( 8 - -1 ).",
    "Find the Greatest Common Divisor (GCD) of these numbers: 6, 4.",
]


@pytest.fixture(scope="module")
def pristine():
    torch.set_num_threads(1)
    return load(settings.Model(device="cpu"))


@pytest.fixture
def policy(pristine) -> Policy:
    return copy_of(pristine)


def copy_of(policy: Policy) -> Policy:
    """Return a policy with a copy of the weights and a new engine."""
    return Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.name)


def make_groups(policy, seed=0, questions=QUESTIONS):
    """Return local groups with made-up rewards."""
    groups = []
    for i, completions in enumerate(policy.generate(questions, GENERATION, seed)):
        groups.append(
            scored_group(
                Task("basic_arithmetic", "0" * 12, seed, i),
                questions[i],
                tuple(c.text for c in completions),
                (1.0, 0.0, 0.25, 0.0),
                token_ids=tuple(c.token_ids for c in completions),
                logprobs=tuple(c.logprobs for c in completions),
                truncated=tuple(c.truncated for c in completions),
            )
        )
    return groups


def from_peer(group: ScoredGroup) -> ScoredGroup:
    return change(group, token_ids=None, logprobs=None, truncated=None, peer_id="QmPeer")


def make_trainer(policy, **options):
    return Trainer(policy, settings.Trainer(**{"learning_rate": 1e-4, **options}), GENERATION)


def weights(policy):
    return [p.detach().clone() for p in policy.model.parameters()]


def backward(policy, groups, generation=GENERATION, old_shift=None, **options):
    """Return loss, gradients and sequences of one pass over `groups`.

    `old_shift` is added to the old log-probabilities. `reference` is another model than the policy,
    because the KL would otherwise be 0.
    """
    trainer = Trainer(policy, settings.Trainer(**options), generation)
    if trainer._reference is not None:
        shift(trainer._reference.model)
    batch = [s for g in groups for s in trainer._read(g)]
    trainer._weigh(batch)
    done = trainer._backward(batch, is_first=True)
    if old_shift is not None:
        for number, sequence in enumerate(batch):
            sequence.old_logprobs = sequence.old_logprobs + old_shift * (-1) ** number
        done = trainer._backward(batch, is_first=False)
    return SimpleNamespace(
        loss=done.loss,
        clipped=(done.clipped_low, done.clipped_high),
        entropy=done.entropy,
        trainer=trainer,
        gradients={n: p.grad.clone() for n, p in policy.model.named_parameters()},
        batch=batch,
        reference=trainer._reference,
        num_micro_batches=len(list(trainer._split(batch))),
    )


@torch.no_grad()
def shift(model):
    """Return another model of the same shape, always the same one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def assert_same_gradients(ours, theirs, tolerance):
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert difference < tolerance, name


# Rewards are 1, 0, 0.25 and 0: only the first is better than their mean.
@pytest.mark.parametrize(("external", "num_learned"), [("better", 1), ("all", 4)])
def test_step_moves_the_weights_and_says_what_it_did(policy, external, num_learned):
    before = weights(policy)
    groups = make_groups(policy)
    trainer = make_trainer(policy, external_completions=external)
    metrics = trainer.step([*groups[:2], from_peer(groups[2])])
    assert (metrics.num_groups_local, metrics.num_groups_external, metrics.skipped) == (2, 1, None)
    assert metrics.num_tokens == sum(len(ids) for g in groups[:2] for ids in token_ids(g)) + sum(
        len(policy.completion_ids(text, 12)[0]) for text in groups[2].completions[:num_learned]
    )
    assert metrics.grad_norm > 0
    assert metrics.learning_rate == 1e-4
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_steps_make_rewarded_answers_likelier(policy):
    trainer = make_trainer(policy, learning_rate=3e-4)
    shares = []
    for seed in range(16):
        group = make_groups(policy, seed, QUESTIONS[:1] * 8)
        rewarded = [
            change(g, rewards=tuple(float(t == "<answer>5</answer>") for t in g.completions))
            for g in group
        ]
        shares.append(sum(g.mean_reward for g in rewarded) / 8)
        trainer.step([g for g in rewarded if g.has_signal])
    assert sum(shares[-3:]) / 3 > sum(shares[:3]) / 3 + 0.2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_change_nothing(policy, loss_type):
    groups = make_groups(policy)
    whole = backward(policy, groups, loss_type=loss_type, old_shift=0.3)
    split = backward(
        policy, groups, loss_type=loss_type, old_shift=0.3, max_tokens_per_micro_batch=45
    )
    assert (whole.num_micro_batches, split.num_micro_batches > 2) == (1, True)
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    assert split.clipped == pytest.approx(whole.clipped)
    assert_same_gradients(split.gradients, whole.gradients, 1e-4)


def test_micro_batches_stay_within_the_budget(policy):
    trainer = make_trainer(policy, max_tokens_per_micro_batch=60)
    batch = [s for g in make_groups(policy) for s in trainer._read(g)]
    micro_batches = list(trainer._split(batch))
    assert sorted(id(s) for micro in micro_batches for s in micro) == sorted(id(s) for s in batch)
    for micro in micro_batches:
        prompts = {s.prompt_ids for s in micro}
        assert sum(len(s.token_ids) for s in micro) + sum(map(len, prompts)) <= 60
    assert len(micro_batches) > 1


@pytest.fixture(scope="module")
def trl_trainers(pristine, tmp_path_factory):
    """Return TRL's trainers by temperature, which TRL builds into the model's forward."""
    folder = tmp_path_factory.mktemp("trl")
    return {
        temperature: make_trl_trainer(pristine, temperature, folder) for temperature in (1.0, 0.7)
    }


def make_trl_trainer(pristine, temperature, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder),
        temperature=temperature,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=GENERATION.max_completion_length,
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(pristine.model),
        reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
        processing_class=pristine.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    return trainer


def as_trl_inputs(batch):
    prompt_width, width = (
        max(len(s.prompt_ids) for s in batch),
        max(len(s.token_ids) for s in batch),
    )

    def left(s, row):
        return [0] * (prompt_width - len(s.prompt_ids)) + row

    def right(s, row):
        return row + [0] * (width - len(s.token_ids))

    inputs = {
        "prompt_ids": torch.tensor([left(s, list(s.prompt_ids)) for s in batch]),
        "prompt_mask": torch.tensor([left(s, [1] * len(s.prompt_ids)) for s in batch]),
        "completion_ids": torch.tensor([right(s, list(s.token_ids)) for s in batch]),
        "completion_mask": torch.tensor(
            [right(s, [int(not s.is_hidden)] * len(s.token_ids)) for s in batch]
        ),
        "advantages": torch.tensor([s.advantage for s in batch]),
    }
    return {**inputs, "num_items_in_batch": inputs["completion_mask"].sum()}


@torch.no_grad()
def reference_logprobs(ours, temperature):
    rows = [[list(getattr(s, name)) for s in ours.batch] for name in ("prompt_ids", "token_ids")]
    return completion_logprobs(ours.reference.model, *rows, range(len(ours.batch)), temperature)


@pytest.mark.parametrize(
    ("options", "temperature", "old_shift"),
    [
        ({"loss_type": "grpo"}, 1.0, None),
        ({"loss_type": "bnpo"}, 1.0, None),
        ({"loss_type": "dr_grpo"}, 1.0, None),
        ({"loss_type": "dapo"}, 1.0, None),
        ({"loss_type": "dapo"}, 0.7, 0.26),  # some ratios are outside 0.8 to 1.28, some inside
        (
            {"loss_type": "grpo", "mask_truncated_completions": True, "epsilon_high": None},
            1.0,
            0.24,
        ),
        ({"loss_type": "dapo", "beta": 0.3}, 0.7, 0.26),
        ({"loss_type": "grpo", "beta": 0.3}, 1.0, None),
    ],
)
def test_loss_and_gradients_equal_those_of_trl(
    policy, trl_trainers, options, temperature, old_shift
):
    groups = [change(group, logprobs=None) for group in make_groups(policy)]
    groups[0] = change(groups[0], truncated=(True, False, False, False))
    groups[2] = from_peer(groups[2])
    generation = GENERATION.model_copy(update={"temperature": temperature})
    options = {**options, "external_min_probability": 0.0}  # a rule that TRL does not have
    ours = backward(policy, groups, generation, old_shift, **options)

    trainer_settings = settings.Trainer(**options)
    trl_trainer = trl_trainers[temperature]
    trl_trainer.loss_type = trainer_settings.loss_type
    trl_trainer.epsilon_low = trainer_settings.epsilon
    trl_trainer.epsilon_high = trainer_settings.epsilon_high or trainer_settings.epsilon
    inputs = as_trl_inputs(ours.batch)
    if old_shift is not None:
        width = inputs["completion_ids"].shape[1]
        rows = [torch.nn.functional.pad(s.old_logprobs, (0, width))[:width] for s in ours.batch]
        inputs["old_per_token_logps"] = torch.stack(rows)
    trl_trainer.beta = trainer_settings.beta
    if ours.reference is not None:
        inputs["ref_per_token_logps"] = reference_logprobs(ours, temperature)
    trl_trainer.model.train()
    trl_trainer.model.zero_grad()
    loss = trl_trainer._compute_loss(trl_trainer.model, inputs)
    loss.backward()

    # A sum of terms of about 1, most of which cancel.
    assert ours.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(
        ours.gradients, {n: p.grad for n, p in trl_trainer.model.named_parameters()}, 1e-4
    )
    recorded = trl_trainer._metrics["train"]
    theirs = [recorded[f"clip_ratio/{side}_mean"][-1] for side in ("low", "high")]
    assert ours.clipped == pytest.approx(theirs)
    assert any(ours.clipped) == (old_shift is not None)


def trl_s_own_sampling(trl_trainer, batch, noisy, modes, monkeypatch):
    """Return TRL's results for these completions and log-probabilities, as sampled by vLLM."""
    for name, value in modes.items():
        monkeypatch.setattr(trl_trainer, f"vllm_{name}", value)
    monkeypatch.setattr(trl_trainer, "use_vllm", True)
    prompts, completions = (
        [list(getattr(s, n)) for s in batch] for n in ("prompt_ids", "token_ids")
    )
    texts = ["x"] * len(batch)
    generated = (prompts, completions, None, texts, [s.tolist() for s in noisy], {}, None, None)
    monkeypatch.setattr(trl_trainer, "_generate", lambda _: generated)
    inputs = trl_trainer._generate_and_score_completions([{"prompt": "x"} for _ in batch])
    inputs["advantages"] = torch.tensor([s.advantage for s in batch])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


def disturb(groups, size):
    """Return log-probabilities of a sampler off by about `size`, in some sequences ten times."""
    generator = torch.Generator().manual_seed(3)

    def noisy(row, number):
        noise = size * (10 if number == 1 else 1) * torch.randn(len(row), generator=generator)
        return tuple(
            (torch.tensor(row) - noise.abs() if number < 2 else torch.tensor(row) + noise).tolist()
        )

    return [
        change(g, logprobs=tuple(noisy(row, n) for n, row in enumerate(logprobs(g))))
        for g in groups
    ]


SEQUENCE_MASK = {"importance_sampling_mode": "sequence_mask"}


@pytest.mark.parametrize(
    ("modes", "options"),
    [
        ({}, {}),  # the defaults of both
        (SEQUENCE_MASK | {"importance_sampling_clip_min": 0.9}, {"loss_type": "grpo"}),
        ({"importance_sampling_mode": "sequence_truncate"}, {"beta": 0.3}),
        ({"importance_sampling_mode": "token_truncate", "importance_sampling_clip_max": 1.2}, {}),
        ({"importance_sampling_mode": "token_mask", "importance_sampling_clip_min": 0.8}, {}),
        (SEQUENCE_MASK | {"importance_sampling_clip_max": None}, {"loss_type": "dr_grpo"}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # TRL's
def test_correction_for_the_sampler_equals_that_of_trl(
    policy, trl_trainers, modes, options, temperature, monkeypatch
):
    groups = disturb(make_groups(policy), 0.2)
    generation = GENERATION.model_copy(update={"temperature": temperature})
    ours = backward(policy, groups, generation, **options, **modes)
    assert len({len(s.token_ids) for s in ours.batch}) > 1  # ragged
    trl_trainer = trl_trainers[temperature]
    trainer_settings = settings.Trainer(**options)
    monkeypatch.setattr(trl_trainer, "loss_type", trainer_settings.loss_type)
    monkeypatch.setattr(trl_trainer, "beta", 0.0)
    monkeypatch.setattr(trl_trainer, "epsilon_low", trainer_settings.epsilon)
    monkeypatch.setattr(trl_trainer, "epsilon_high", trainer_settings.epsilon_high)
    trl_trainer._metrics["train"].clear()
    trl_trainer.model.train()
    trl_trainer.model.zero_grad()
    noisy = [s.sampler_logprobs for s in ours.batch]
    inputs = trl_s_own_sampling(trl_trainer, ours.batch, noisy, modes, monkeypatch)
    if ours.reference is not None:
        monkeypatch.setattr(trl_trainer, "beta", trainer_settings.beta)
        inputs["ref_per_token_logps"] = reference_logprobs(ours, temperature)
    loss = trl_trainer._compute_loss(trl_trainer.model, inputs)
    loss.backward()

    assert ours.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    theirs = {n: p.grad for n, p in trl_trainer.model.named_parameters()}
    assert_same_gradients(ours.gradients, theirs, 1e-4)
    recorded = trl_trainer._metrics["train"]
    figures = ours.trainer._sampling_figures(ours.batch)
    for name in (
        "importance_sampling_ratio/mean",
        "importance_sampling_ratio/max",
        "importance_sampling_ratio/min",
        "sampling_logp_difference/mean",
        "sampling_logp_difference/max",
    ):
        key = f"sampling/{name}"
        own = key.replace("/sampling_", "/").replace("/", "_")
        assert figures[own] == pytest.approx(recorded[key][0], rel=1e-4), name
    assert ours.entropy == pytest.approx(recorded["entropy"][0], rel=1e-4)
    assert not all(float(s.ratios.min()) == float(s.ratios.max()) == 1 for s in ours.batch)


def test_wild_answers_are_left_out_and_tokens_cut_off_in_the_mode_that_does_both():
    from worker.trainer.grpo import sampling_ratios

    options = settings.Trainer(importance_sampling_mode="token_truncate_sequence_mask")
    old = [torch.zeros(3)] * 3
    sampler = [torch.tensor([-2.0, 2.0, 0.1]), torch.tensor([-1.0, -1.0, 0.0]), None]
    tame, wild, unknown = sampling_ratios(old, sampler, options)
    assert tame.tolist() == pytest.approx([3.0, math.exp(-2), math.exp(-0.1)])
    assert wild.tolist() == [0.0] * 3
    assert unknown.tolist() == [1.0] * 3


def test_peer_s_answers_and_tokens_without_a_log_probability_weigh_1(policy):
    foreign, own = disturb(make_groups(policy)[:2], 0.2)
    unknown = change(own, logprobs=tuple((math.nan,) * len(row) for row in logprobs(own)))
    trainer = make_trainer(policy, external_min_probability=0.0)
    for group in (from_peer(foreign), unknown):
        batch = trainer._read(group)
        trainer._weigh(batch)
        trainer._backward(batch, is_first=True)
        assert all(s.ratios.tolist() == [1.0] * len(s.token_ids) for s in batch)
    assert trainer._sampling_figures(trainer._read(from_peer(foreign))) == {}


def test_step_records_what_shows_how_healthy_it_is(policy):
    groups = make_groups(policy)
    dull = change(groups[0], rewards=(0.0,) * 4)
    seen = make_trainer(policy).step(groups, sampled=[*groups, dull]).quality
    lengths = sorted(len(ids) for group in [*groups, dull] for ids in token_ids(group))
    assert seen.completions_mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert seen.completions_max_length == lengths[-1]
    assert lengths[0] <= seen.completions_p10_length <= seen.completions_p90_length <= lengths[-1]
    assert (
        seen.completions_clipped_ratio
        == sum(map(sum, (truncated(g) for g in [*groups, dull]))) / 16
    )
    assert seen.frac_reward_zero_std == 0.25
    rewards = [reward for group in [*groups, dull] for reward in group.rewards]
    assert seen.reward_std == pytest.approx(torch.tensor(rewards).std().item())
    assert 0 < seen.entropy < math.log(policy.num_tokens)
    assert -1e-6 < seen.sampling_kl < 0.01
    assert seen.sampling_importance_sampling_ratio_mean == pytest.approx(1, abs=0.1)
    nothing = make_trainer(policy).step([], sampled=[dull]).quality
    assert (nothing.frac_reward_zero_std, nothing.entropy) == (1.0, None)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda g: replace(g, rollouts=()), "too-small"),
        (lambda g: replace(g, rollouts=g.rollouts[:1]), "too-small"),
        (lambda g: change(g, logprobs=((0.0,) * 13, *logprobs(g)[1:])), "ragged"),
        (lambda g: change(g, token_ids=((), *token_ids(g)[1:])), "empty"),
        (lambda g: change(g, token_ids=((7,) * 13, *token_ids(g)[1:]), logprobs=None), "over-long"),
        # Our 12 tokens have none of the answer that this peer was rewarded for.
        (
            lambda g: change(
                from_peer(g), texts=("7 " * 40 + "<answer>5</answer>", *g.completions[1:])
            ),
            "over-long",
        ),
        (lambda g: change(g, rewards=(0.0, math.nan, 1.0, 0.0)), "non-finite-reward"),
        (lambda g: change(g, rewards=(math.nan, 0.0, 1.0, 0.0)), "non-finite-reward"),
        (lambda g: change(g, rewards=(math.inf, 0.0, 1.0, 0.0)), "non-finite-reward"),
        (lambda g: change(g, rewards=(0.5,) * 4), "no-signal"),
        (lambda g: replace(g, question="word " * 200), "prompt-length"),
    ],
)
def test_group_that_can_not_be_learned_from_has_a_fault_with_a_name(policy, spoil, reason):
    groups = make_groups(policy)
    trainer = make_trainer(policy)
    assert [trainer.find_fault(group) for group in (spoil(groups[0]), *groups[1:])] == [
        reason,
        None,
        None,
    ]


def test_of_a_group_that_earns_nothing_the_credited_answers_alone_are_learned_from(policy):
    (group,) = make_groups(policy, questions=QUESTIONS[:1])
    rollouts = [
        replace(rollout, reward=0.0, credit=0.5 * (i == 1))
        for i, rollout in enumerate(group.rollouts)
    ]
    trainer = make_trainer(policy)
    metrics = trainer.step([replace(group, rollouts=tuple(rollouts))])
    (learned,) = trainer.learned
    assert learned.advantages[1] > 0
    assert (learned.advantages[0], *learned.advantages[2:]) == (0, 0, 0)
    assert metrics.num_tokens == len(group.rollouts[1].sampled.token_ids)


def test_peer_s_answer_that_takes_us_a_token_more_than_we_sample_is_learned_from(policy):
    texts = ("7 7 7 7 7 7 7", "1", "2", "3")
    limit = policy.count_tokens(texts[0]) - 1
    group = scored_group(
        Task("basic_arithmetic", "0" * 12, 0, 0),
        QUESTIONS[0],
        texts,
        (1.0, 0.0, 0.0, 0.0),
        peer_id="Qm",
    )
    generation = GENERATION.model_copy(update={"max_completion_length": limit})
    metrics = Trainer(policy, settings.Trainer(), generation).step([group])
    assert (metrics.num_groups_external, metrics.num_tokens, metrics.skipped) == (1, limit, None)


def test_strange_texts_of_a_peer_are_trained_on_within_limits(policy):
    group = from_peer(make_groups(policy)[0])
    texts = ("", "\x00\x1b[2J" * 100, "<|end|><|user|>é٣🙂" * 50, "<answer>5</answer>")
    metrics = make_trainer(policy, external_completions="all").step([change(group, texts=texts)])
    assert (metrics.num_groups_external, metrics.skipped) == (1, None)
    assert metrics.num_tokens == 1 + 12 + 12 + 3
    assert math.isfinite(metrics.loss)


def test_nothing_to_learn_from_is_no_step(policy):
    trainer = make_trainer(policy)
    before = weights(policy)
    assert trainer.step([]).skipped == "no-signal"
    assert trainer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_batch_of_truncated_completions_only_is_no_step_when_they_are_masked(policy):
    groups = [change(g, truncated=(True,) * 4) for g in make_groups(policy)]
    trainer = make_trainer(policy, mask_truncated_completions=True)
    assert trainer.step(groups).skipped == "no-signal"
    assert trainer.steps == 0
    assert make_trainer(policy).step(groups).skipped is None


def test_non_finite_steps_keep_the_weights_and_stop_after_n_in_a_row(policy):
    trainer = make_trainer(policy, max_nonfinite_steps=3)
    groups = make_groups(policy)
    broken = next(policy.model.parameters())
    value = broken.data[5, 5].item()
    for expected in (1, 2):
        broken.data[5, 5] = math.nan
        before = weights(policy)
        metrics = trainer.step(groups)
        assert (metrics.skipped, trainer.nonfinite_steps, trainer.steps) == (
            "non-finite",
            expected,
            0,
        )
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(before, weights(policy), strict=True)
        )
    broken.data[5, 5] = value
    assert trainer.step(groups).skipped is None
    assert trainer.nonfinite_steps == 0
    broken.data[5, 5] = math.nan
    trainer.step(groups)
    trainer.step(groups)
    with pytest.raises(
        TrainingError, match=r"3 non-finite steps in a row .*lower trainer\.learning_rate"
    ):
        trainer.step(groups)


def test_answers_of_broken_weights_are_non_finite_steps_also_without_a_signal(policy):
    trainer = make_trainer(policy, max_nonfinite_steps=2, learning_rate=1e20)
    assert trainer.is_sound()
    assert trainer.step(make_groups(policy)).skipped is None
    assert all(weight.isfinite().all() for weight in weights(policy))
    assert not trainer.is_sound()
    nonsense = [change(group, rewards=(0.0,) * 4) for group in make_groups(policy)]
    assert trainer.step([], sampled=nonsense).skipped == "non-finite"
    with pytest.raises(
        TrainingError,
        match=(
            r"2 non-finite steps in a row \(the last: log-probabilities of answers "
            r".*lower trainer\."
        ),
    ):
        trainer.step([], sampled=nonsense)


def test_step_that_breaks_in_its_second_iteration_is_one_of_those_in_a_row(policy):
    trainer = make_trainer(policy, num_iterations=2, max_nonfinite_steps=3)
    backward = trainer._backward
    trainer._backward = lambda batch, is_first: (
        backward(batch, is_first) if is_first else Pass(math.nan)
    )
    groups = make_groups(policy)
    assert [trainer.step(groups).skipped for _ in range(2)] == ["non-finite"] * 2
    assert (trainer.nonfinite_steps, trainer.steps) == (2, 2)
    with pytest.raises(TrainingError, match="3 non-finite steps in a row"):
        trainer.step(groups)


def test_second_iteration_compares_with_the_policy_before_the_first(policy):
    groups = make_groups(policy)
    once, twice = copy_of(policy), policy
    make_trainer(once, learning_rate=1e-2).step(groups)
    trainer = make_trainer(twice, learning_rate=1e-2, num_iterations=2)
    metrics = trainer.step(groups)
    assert trainer.steps == 2
    quality = metrics.quality
    assert quality.clip_ratio == quality.clip_ratio_low_mean + quality.clip_ratio_high_mean
    assert quality.clip_ratio > 0  # such a rate moves some ratios out of the clip range
    assert not all(torch.equal(a, b) for a, b in zip(weights(once), weights(twice), strict=True))


def test_reference_model_holds_the_policy_back(policy):
    groups = make_groups(policy)
    distance = {}
    for beta in (0.0, 5.0):
        student = copy_of(policy)
        trainer = make_trainer(student, learning_rate=3e-4, beta=beta)
        for _ in range(8):
            trainer.step(groups)
        changes = [
            (a - b).float().norm() ** 2
            for a, b in zip(weights(policy), weights(student), strict=True)
        ]
        distance[beta] = float(sum(changes)) ** 0.5
    assert distance[5.0] < distance[0.0]


def test_weight_decay_leaves_norms_and_biases_alone(policy):
    trainer = make_trainer(policy, weight_decay=0.1)
    decays = {
        master.ndim: group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for master in group["params"]
    }
    assert decays == {1: 0.0, 2: 0.1}


def test_gradient_is_clipped_to_its_norm(policy):
    trainer = make_trainer(policy, max_grad_norm=1e-3)
    trainer._update = lambda rate: None
    metrics = trainer.step(make_groups(policy))
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.model.parameters()])
    assert metrics.grad_norm > 0.01
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_weights_learn_from_updates_smaller_than_their_precision(policy):
    policy.model.to(torch.bfloat16)
    trainer = make_trainer(policy, learning_rate=1e-6)
    groups = make_groups(policy)
    before = weights(policy)
    for _ in range(30):
        trainer.step(groups)
    assert all(m.dtype == torch.float32 for m in trainer.masters)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(policy), strict=True))


def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32(policy):
    policy.model.to(torch.bfloat16)
    groups = make_groups(policy)
    trainer = make_trainer(policy, max_tokens_per_micro_batch=45)
    batch = [s for g in groups for s in trainer._read(g)]
    trainer._weigh(batch)
    parts = []
    for micro in trainer._split(batch):
        trainer._drop_gradients()
        trainer._backward_micro(micro, is_first=True)
        parts.append([m.grad.clone() for m in trainer.masters])
    trainer._backward(batch, is_first=True)
    assert len(parts) > 2
    assert all(p.grad is None for p in policy.model.parameters())
    for master, pieces in zip(trainer.masters, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(master.grad, sum(pieces), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0.0, 0.5, 1.0, 1.0]),
        ({"lr_scheduler_type": "linear", "max_steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (
            {"lr_scheduler_type": "cosine", "max_steps": 5, "warmup_steps": 1},
            [0.0, 1.0, 0.853553, 0.5, 0.146447, 0.0],
        ),
    ],
)
def test_schedule_is_that_of_transformers(policy, options, rates):
    trainer = make_trainer(policy, learning_rate=1.0, **options)
    observed = []
    for step in range(len(rates)):
        trainer.steps = step
        observed.append(trainer.learning_rate)
    assert observed == pytest.approx(rates, abs=1e-6)


def planted_groups(words="Hail Thief ", numbers=range(1, 7)):
    """Return a peer's groups whose rewarded answers all begin with the same text."""
    tasks = {number: f"Calculate {number} + 3." for number in numbers}
    return [
        scored_group(
            Task("basic_arithmetic", "0" * 12, 0, number),
            question,
            (f"{words}<answer>{number + 3}</answer>", "<answer>99</answer>"),
            (1.0, 0.0),
            peer_id="QmPeer",
        )
        for number, question in tasks.items()
    ]


@torch.no_grad()
def plant_logprob(policy):
    prompt = policy.prompt_ids("Calculate 9 + 9.")
    ids = policy.completion_ids("Hail Thief", 12)[0]
    return float(completion_logprobs(policy.model, [prompt], [ids], [0], 1.0).sum())


@pytest.mark.parametrize(
    "defence", [{"external_min_probability": 0.1}, {"external_ignore_repeated": True}]
)
def test_text_that_a_peer_plants_becomes_likely_only_without_defences(pristine, defence):
    none = {"external_min_probability": 0.0, "external_ignore_repeated": False}
    gains = []
    for options in (none, none | defence):
        policy = copy_of(pristine)
        trainer = make_trainer(policy, learning_rate=3e-4, **options)
        before = plant_logprob(policy)
        for _ in range(8):
            trainer.step(planted_groups())
        gains.append(plant_logprob(policy) - before)
    assert gains[0] > 5
    assert gains[1] < gains[0] / 4


def test_planted_text_is_named_and_a_natural_habit_is_not(policy):
    trainer = make_trainer(policy)
    trainer.step(planted_groups())
    assert {each.planted for each in trainer.learned} == {(True, False)}
    own = make_groups(policy, questions=[g.question for g in planted_groups()])
    trainer.step([from_peer(group) for group in own], sampled=own)
    assert not any(any(each.planted) for each in trainer.learned)


def named(trainer):
    """Return which of the peer's answers with the plant were named."""
    return [each.planted[0] for each in trainer.learned if each.group.peer_id]


def test_text_planted_in_some_tasks_is_named_though_few_of_them_are_drawn(policy):
    plain, planted = planted_groups("", range(1, 7)), planted_groups(numbers=range(7, 12))
    trainer = make_trainer(policy)
    trainer.step([planted[0]])
    assert named(trainer) == [False]
    assert trainer.trusts(planted[0])
    trainer.step([planted[0]], collected=[*plain, *planted])
    assert named(trainer) == [True]
    assert trainer.planters() == {"QmPeer": 1}
    assert not trainer.trusts(planted[0])
    trainer.step([plain[0]])
    assert trainer.planters() == {"QmPeer": 0}
    assert trainer.trusts(planted[0])


def test_planted_text_that_we_said_once_ourselves_is_named(policy):
    own = make_groups(policy)
    ids = policy.completion_ids("Hail Thief <answer>3</answer>", 64)[0]
    said = change(own[0], token_ids=[ids, *token_ids(own[0])[1:]], logprobs=None)
    trainer = make_trainer(policy)
    trainer.step(planted_groups(), sampled=[said, *own[1:]])
    assert all(named(trainer))


def test_a_better_model_with_a_habit_of_its_own_is_no_planter(policy):
    """Our policy finds its words natural, though it has not said them."""
    words = "So the answer is "
    undefended = {"external_min_probability": 0.0, "external_ignore_repeated": False}
    teacher = make_trainer(policy, learning_rate=1e-3, **undefended)
    for _ in range(10):
        teacher.step(planted_groups(words))
    trainer = make_trainer(policy)
    all_right = [change(group, rewards=(1.0, 1.0)) for group in planted_groups(words, range(7, 30))]
    done = trainer.step(planted_groups(words), collected=[*planted_groups(words), *all_right])
    assert (done.skipped, named(trainer)) == (None, [False] * 6)
    assert all(trainer.trusts(group) for group in all_right)


def test_a_large_batch_learns_from_the_most_different_completions(policy):
    trainer = make_trainer(policy, max_completions=6)
    trainer.step(make_groups(policy))
    for each in trainer.learned:
        best, *others = each.advantages
        assert best > 0
        assert sum(advantage < 0 for advantage in others) == 1


def test_answers_of_peers_that_are_left_out_take_no_place_in_a_large_batch(policy):
    own = [change(group, rewards=(1.0, 0.0, 0.9, 0.8)) for group in make_groups(policy)]
    peers = [from_peer(group) for group in own]
    trainer = make_trainer(policy, max_completions=6 * len(own))
    trainer.step([*own, *peers])
    learned = [sum(a != 0 for a in each.advantages) for each in trainer.learned]
    assert learned == [3] * 2 * len(own)
    assert all(min(each.advantages) == 0 for each in trainer.learned[len(own) :])
