"""Weights of peers: over real libp2p daemons on loopback, tried on held-out tasks, seldom taken."""

import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.groups import scored_group
from tests.swarm.swarm_lab import Lab, wait_until
from worker import adoption, environments, settings, trial
from worker.adoption import Adoption
from worker.environments.presets import DEMO_FAMILIES
from worker.evaluation import Asked
from worker.policy.policy import Policy, load
from worker.records import Task
from worker.swarm.exchange import weights as weight_exchange
from worker.swarm.protocol import messages, weight_messages
from worker.swarm.protocol.messages import Kind
from worker.swarm.protocol.weight_messages import Offer, WeightRequest
from worker.swarm.swarm import Swarm
from worker.swarm.transport.streams import Stream
from worker.trainer import checkpoint, weight_differences, weight_sets
from worker.trainer.trainer import Trainer

GENERATION = settings.Generation(num_generations=4, max_completion_length=8, max_prompt_length=128)
GYM = environments.load(settings.Environment(families=DEMO_FAMILIES))


class Trainers:
    """Makes trainers of the small model."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pristine = load(settings.Model(device="cpu"))

    def make(
        self,
        noise: float = 0.0,
        has_base: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Trainer:
        """Return one whose weights are `noise` standard deviations away from the small model's.

        `has_base`: it knows where the untouched model is, so differences are exchanged.
        """
        model = copy.deepcopy(self.pristine.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter += noise * parameter.std() * drawn
        folder = self.pristine.folder if has_base else None
        policy = Policy(model.to(dtype), self.pristine.tokenizer, self.pristine.name, folder)
        return Trainer(policy, settings.Trainer(), GENERATION)


@pytest.fixture(scope="module")
def trainers() -> Trainers:
    return Trainers()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def name_of(swarm: Swarm) -> str:
    return swarm.status().peer_id


def make_node(lab: Lab, name: str, trainer: Trainer, **settings_of_swarm: object) -> Adoption:
    swarm = lab.peer(name, weights="on", **settings_of_swarm)
    node = Adoption(swarm, trainer, GYM, GENERATION, lab.folder(name))
    node._rng = random.Random(1)  # type: ignore[assignment]  # the same tasks in each run
    return node


def group(reward: float, peer_id: str | None = None):
    rewards = (reward, reward)
    made = scored_group(Task("gcd", "x", 1, 1), "?", ("a", "b"), rewards)
    return type(made)(made.task, made.question, made.rollouts, peer_id)


def offer(node: Adoption, folder: Path, rounds: int = 10) -> None:
    """Offer the node's present weights, as after a checkpoint."""
    saved = checkpoint.save(folder / "checkpoints", node.trainer, {}, keep=1)
    node.offer(saved / "model.safetensors", rounds)


def run_round(node: Adoption, own: Sequence, external: Sequence) -> bool:
    """Return whether weights were taken."""
    node.before_step(own, external)
    return node.after_step()


def run_until_tried(node: Adoption, peer_ids: list[str]) -> bool:
    """Let the node see that these peers earn more, until what they have was tried."""
    for _ in range(adoption.MIN_GROUPS):
        node.before_step([group(0.1)], [group(0.9, peer) for peer in peer_ids])
    assert node._is_fetching
    wait_until(lambda: not node.swarm.is_fetching_weights, 30, "the transfer has ended")
    return try_all(node)


def try_all(node: Adoption) -> bool:
    """Go on for as many rounds as the trial takes; return whether weights were taken."""
    while node._is_fetching or node._trial is not None:
        if run_round(node, [group(0.1)], []):
            return True
    return False


def digest(trainer: Trainer) -> str:
    state = hashlib.sha256()
    for tensor in weight_sets.current(trainer).values():
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def test_late_joiner_takes_a_better_peers_weights(
    trainers: Trainers, lab: Lab, tmp_path: Path
) -> None:
    lab.bootnode()
    better = make_node(lab, "better", trainers.make())
    late = make_node(lab, "late", trainers.make(noise=3.0))
    offer(better, tmp_path)
    wait_until(lambda: late.swarm.status().peers_known == 1, 20, "the peer is known")
    assert run_until_tried(late, [name_of(better.swarm)])
    assert late.counts == {"fetched": 1, "taken": 1}
    assert better.counts == {"offered": 1}
    assert digest(late.trainer) == digest(better.trainer)
    assert not list((lab.folder("late") / "weights").glob("*.part"))
    # If the peer is far ahead again, the next trial need not wait.
    late.before_step(
        [group(0.1)] * adoption.MIN_GROUPS,
        [group(0.9, name_of(better.swarm))] * adoption.MIN_GROUPS,
    )
    assert late._is_fetching
    # The checkpoint after it can be restored: no moments of other weights remain.
    saved = checkpoint.save(tmp_path / "late", late.trainer, {"round": 3}, keep=1)
    again = trainers.make()
    assert checkpoint.restore(saved.parent, again) == {"round": 3}
    assert digest(again) == digest(better.trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_better_weights_come_as_a_difference(
    trainers: Trainers, lab: Lab, tmp_path: Path, dtype: torch.dtype
) -> None:
    lab.bootnode()
    better = make_node(lab, "better", trainers.make(noise=0.05, has_base=True, dtype=dtype))
    late = make_node(lab, "late", trainers.make(noise=3.0, has_base=True))
    offer(better, tmp_path)
    (kept,) = (lab.folder("better") / "weights").iterdir()
    assert weight_differences.is_difference(kept)
    (checkpoint_file,) = (tmp_path / "checkpoints").glob("*/model.safetensors")
    assert kept.stat().st_size < adoption.SMALL_DIFFERENCE * checkpoint_file.stat().st_size
    wait_until(lambda: late.swarm.status().peers_known == 1, 20, "the peer is known")
    assert run_until_tried(late, [name_of(better.swarm)])
    assert late.counts == {"fetched": 1, "taken": 1}
    assert late.swarm.status().bytes_in < 2 * kept.stat().st_size
    for name, master in weight_sets.current(late.trainer).items():
        assert torch.equal(master, better.trainer.parameters[name].bfloat16().float())
    assert not list((lab.folder("late") / "weights").iterdir())


def kept_by(node: Adoption, folder: Path) -> Path:
    """Return the file that a node keeps of its weights to offer it."""
    saved = checkpoint.save(folder / "checkpoints", node.trainer, {}, keep=1)
    offered = node._keep(saved / "model.safetensors", 10)
    assert offered is not None
    assert offered.model == node.model
    assert list(offered.file.parent.iterdir()) == [offered.file]
    return offered.file


def make_alone(folder: Path, trainer: Trainer) -> Adoption:
    return Adoption(_NoSwarm(), trainer, GYM, GENERATION, folder)  # type: ignore[arg-type]


def test_file_is_offered_if_the_difference_is_not_much_smaller(
    trainers: Trainers, tmp_path: Path
) -> None:
    node = make_alone(tmp_path, trainers.make(noise=3.0, has_base=True, dtype=torch.bfloat16))
    assert not weight_differences.is_difference(kept_by(node, tmp_path))


def test_file_is_offered_if_rounding_would_lose_what_was_learned(
    trainers: Trainers, tmp_path: Path
) -> None:
    """At small learning rates, float32 weights differ by less than a step of bfloat16."""
    node = make_alone(tmp_path, trainers.make(noise=1e-4, has_base=True))
    assert not weight_differences.is_difference(kept_by(node, tmp_path))


def test_file_is_offered_if_the_difference_cannot_be_written(
    trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_alone(tmp_path, trainers.make(noise=0.05, has_base=True))
    real = weight_differences.write_to

    def fill_disk(*arguments) -> None:
        real(*arguments)
        raise OSError("No space left on device")

    monkeypatch.setattr(weight_differences, "write_to", fill_disk)
    assert not weight_differences.is_difference(kept_by(node, tmp_path))


def test_offer_replaces_what_an_interrupted_one_left(trainers: Trainers, tmp_path: Path) -> None:
    node = make_alone(tmp_path, trainers.make(noise=0.05, has_base=True))
    node._folder.mkdir()
    for name in ("own-00000001.unfinished", "own-00000002.difference", "own-00000003.safetensors"):
        (node._folder / name).write_bytes(b"half")
    assert weight_differences.is_difference(kept_by(node, tmp_path))


def test_only_nodes_with_the_same_untouched_model_exchange_weights(
    trainers: Trainers, tmp_path: Path
) -> None:
    assert trainers.pristine.folder is not None
    other = trainers.make(has_base=True)
    other.policy.folder = tmp_path
    weights = load_file(trainers.pristine.folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[5] += 1
    save_file(weights, tmp_path / "model.safetensors")
    same, again = (make_alone(tmp_path, trainers.make(has_base=True)).model for _ in range(2))
    assert same == again
    assert len({same, make_alone(tmp_path, other).model, model_of_old_release(trainers)}) == 3


def model_of_old_release(trainers: Trainers) -> bytes:
    return adoption.model_digest(trainers.make(has_base=True))


@pytest.mark.parametrize("is_ours", [False, True])
def test_damaged_difference_is_blamed_on_the_peer_and_a_missing_base_is_not(
    trainers: Trainers, tmp_path: Path, is_ours: bool
) -> None:
    trainer = trainers.make(noise=0.05, has_base=True)
    folder = tmp_path / "model"
    folder.mkdir()
    assert trainer.policy.folder is not None
    base = folder / "model.safetensors"
    base.write_bytes((trainer.policy.folder / "model.safetensors").read_bytes())
    trainer.policy.folder = folder
    node = make_alone(tmp_path, trainer)
    came = tmp_path / "weights" / "1.part"
    kept_by(node, tmp_path).rename(came)
    if is_ours:
        base.unlink()
    else:
        came.write_bytes(came.read_bytes()[:-100])
    before = digest(trainer)
    node.swarm.fetched = [weight_exchange.Fetched("Qm1", came, 10, 1.0, 1)]  # type: ignore[attr-defined]
    node._is_fetching = True
    assert not run_round(node, [group(0.1)], [])
    assert node.swarm.distrusted == ([] if is_ours else ["Qm1"])  # type: ignore[attr-defined]
    assert node.counts["unusable"] == (0 if is_ours else 1)
    assert digest(trainer) == before
    assert not list(came.parent.iterdir())


def test_worse_and_equal_weights_change_nothing(
    trainers: Trainers, lab: Lab, tmp_path: Path
) -> None:
    lab.bootnode()
    worse = make_node(lab, "worse", trainers.make(noise=3.0))
    equal = make_node(lab, "equal", trainers.make(noise=1e-4))
    node = make_node(lab, "node", trainers.make())
    for number, each in enumerate((worse, equal)):
        offer(each, tmp_path / str(number))
    wait_until(lambda: node.swarm.status().peers_known == 2, 20, "the peers are known")
    before = digest(node.trainer)
    assert not run_until_tried(node, [name_of(worse.swarm), name_of(equal.swarm)])
    assert digest(node.trainer) == before
    assert node.counts == {"fetched": 2, "worse": 2}
    # They are not asked again at once, although they still seem to earn more.
    for _ in range(adoption.PAUSE_ROUNDS):
        assert not node._is_fetching
        better = [group(0.9, name_of(worse.swarm))] * adoption.MIN_GROUPS
        node.before_step([group(0.1)], better)
    assert node._is_fetching


def edited(trainer: Trainer, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = weight_sets.current(trainer)
    edit(weights)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def put_nan(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values())).view(-1)[3] = math.nan


def put_huge(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values())).view(-1)[3] = 1e30


def reshape(weights: dict[str, torch.Tensor]) -> None:
    name = next(iter(weights))
    weights[name] = weights[name].T.contiguous()


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["other"] = weights.pop(next(iter(weights)))


def make_integers(weights: dict[str, torch.Tensor]) -> None:
    name = next(iter(weights))
    weights[name] = weights[name].int()


@pytest.mark.parametrize("edit", [put_nan, put_huge, reshape, rename, make_integers, None])
def test_unusable_weights_are_counted_and_change_nothing(
    trainers: Trainers,
    tmp_path: Path,
    edit: Callable[[dict[str, torch.Tensor]], None] | None,
) -> None:
    """They arrive whole: only the taker can see what is wrong with them."""
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    file = tmp_path / "garbage"
    file.write_bytes(random.Random(1).randbytes(1 << 16))
    if edit is not None:
        file = edited(node.trainer, tmp_path / "edited", edit)
    before = digest(node.trainer)
    node.swarm.fetched = [weight_exchange.Fetched("Qm1", file, 10, 1.0, 1)]  # type: ignore[attr-defined]
    node._is_fetching = True
    assert not run_round(node, [group(0.1)], [])
    assert node.counts == {"fetched": 1, "unusable": 1}
    assert node.swarm.distrusted == ["Qm1"]  # type: ignore[attr-defined]
    assert digest(node.trainer) == before
    assert not file.exists()


class _NoSwarm:
    """The weights of a swarm, without a network."""

    is_fetching_weights = False

    def __init__(self) -> None:
        self.fetched: list[weight_exchange.Fetched] = []
        self.distrusted: list[str] = []

    def fetched_weights(self) -> list[weight_exchange.Fetched]:
        return self.fetched

    def distrust_weights(self, peer_id: str) -> None:
        self.distrusted.append(peer_id)


def test_weights_that_make_outputs_not_finite_are_unusable(
    trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    before = digest(node.trainer)
    monkeypatch.setattr(node.trainer, "is_sound", lambda: False)
    file = edited(node.trainer, tmp_path / "edited", lambda weights: None)
    node.swarm.fetched = [weight_exchange.Fetched("Qm1", file, 10, 1.0, 1)]  # type: ignore[attr-defined]
    node._is_fetching = True
    assert not run_round(node, [group(0.1)], [])
    assert node.counts["taken"] == 0
    assert node.counts["unusable"] >= 1
    assert digest(node.trainer) == before


class Scripted:
    """A node that tries the weights of two peers, which earn these gains over its own."""

    def __init__(self, folder: Path, trainer: Trainer, gains: Sequence[float]) -> None:
        self.node = Adoption(_NoSwarm(), trainer, GYM, GENERATION, folder)  # type: ignore[arg-type]
        self.gains = iter(gains)
        self.num_answered: list[int] = []
        self.node._rewards = self.rewards  # type: ignore[method-assign]
        for number in (1, 2):
            file = edited(trainer, folder / str(number), lambda weights: None)
            came = weight_exchange.Fetched(f"Qm{number}", file, 10, 1.0, 1)
            self.node.swarm.fetched.append(came)  # type: ignore[attr-defined]
        self.node._is_fetching = True

    def rewards(self, asked: Sequence[Asked], seed: int) -> trial.Rewards:
        each = math.ceil(adoption.BLOCK_TASKS / len(asked))
        is_theirs = len(self.num_answered) % 2
        self.num_answered.append(each * len(asked))
        # Tasks of one block differ by more than the candidates.
        noise = [0.2 * (i % 2) for i in range(each)]
        gain = next(self.gains) if is_theirs else 0.0
        return {one: [0.3 + gain + n * is_theirs for n in noise] for one in asked}

    def rounds(self) -> list[bool]:
        """Return for each round of the trial whether weights were taken in it."""
        taken = []
        while self.node._is_fetching or self.node._trial is not None:
            before = len(self.num_answered)
            taken.append(run_round(self.node, [group(0.1)], []))
            assert len(self.num_answered) - before in (0, 2)
        return taken


def test_trial_takes_a_few_tasks_a_round_and_ends_as_soon_as_it_is_clear(
    trainers: Trainers, tmp_path: Path
) -> None:
    script = Scripted(tmp_path, trainers.make(), [0.3] * 99)
    rounds = script.rounds()
    block = script.num_answered[0]
    assert adoption.BLOCK_TASKS <= block < 2 * adoption.BLOCK_TASKS
    assert set(script.num_answered) == {block}
    assert rounds == [False] * (math.ceil(trial.MIN_TASKS / block) - 1) + [True]
    assert script.node.counts == {"fetched": 2, "taken": 1}
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_tasks_of_a_trial_get_few_answers_each(
    trainers: Trainers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    sizes = []

    def evaluate(policy, environment, generation, asked, tasks_each, *_, **__):
        sizes.append((generation.num_generations, tasks_each * len(asked)))
        return []

    monkeypatch.setattr(adoption.evaluation, "evaluate", evaluate)
    node._rewards([("a", None), ("b", None)], 1)
    assert sizes == [(adoption.TASK_ANSWERS, adoption.BLOCK_TASKS)]
    assert GENERATION.num_generations > adoption.TASK_ANSWERS


def test_candidate_that_is_never_clearly_better_is_given_up_for_the_next(
    trainers: Trainers, tmp_path: Path
) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    swinging = [-0.07, -0.14] * 99  # a task's noise is 0.1 on average
    script = Scripted(folder, trainers.make(), swinging)
    assert not any(script.rounds())
    assert script.node.counts == {"fetched": 2, "worse": 2}
    most = 4 * math.ceil(adoption.TRIAL_TASKS / script.num_answered[0])
    assert len(script.num_answered) / 2 <= most


@pytest.mark.parametrize(
    ("own", "theirs", "is_better"),
    [(0, 0, True), (0, 2, True), (2, 0, False), (2, 2, True)],
)
def test_rewards_are_compared_at_the_same_or_harder_levels(
    trainers: Trainers, tmp_path: Path, own: int, theirs: int, is_better: bool
) -> None:
    mix = environments.load(settings.Environment())  # with levels
    node = Adoption(_NoSwarm(), trainers.make(), mix, GENERATION, tmp_path)  # type: ignore[arg-type]
    family = next(iter(mix.levels))
    tasks = [mix.tasks_of(family, level, 1, 1)[0] for level in (own, theirs)]
    ours, better = (
        scored_group(task, "?", ("a", "b"), (reward, reward), peer_id=peer_id)
        for task, reward, peer_id in zip(tasks, (0.2, 0.9), (None, "Qm1"), strict=True)
    )
    node._see([ours] * adoption.MIN_GROUPS, [better] * (adoption.MIN_GROUPS - 1))
    assert node._find_better() == []
    node._see([], [better])
    assert node._find_better() == (["Qm1"] if is_better else [])
    # Other families that only the peer has answered say nothing.
    other = scored_group(Task("other", "x", 1, 1), "?", ("a", "b"), (1, 1), peer_id="Qm2")
    node._see([], [other] * adoption.MIN_GROUPS)
    assert "Qm2" not in node._find_better()


def test_few_groups_of_many_peers_show_that_they_are_ahead(
    trainers: Trainers, tmp_path: Path
) -> None:
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    peers = [f"Qm{number}" for number in range(9)]
    node._see([group(0.2)] * adoption.MIN_GROUPS, [group(0.5, peer) for peer in peers[:-1]])
    assert node._find_better() == []
    node._see([], [group(0.6, peers[-1])])
    assert node._find_better()[0] == peers[-1]
    # One lucky group does not show that a peer is ahead of all others.
    assert node._find_better()[1:] == peers[: adoption.MAX_SOURCES - 1]
    node._see([group(0.5)] * adoption.OWN_GROUPS, [group(0.9, peers[0])])
    assert node._find_better() == []


def test_weights_of_several_peers_are_tried_if_the_best_is_far_ahead(
    trainers: Trainers, tmp_path: Path
) -> None:
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    rewards = {"best": 0.74, "good": 0.6, "worse": 0.3}
    heard = [group(reward, peer) for peer, reward in rewards.items() for _ in range(9)]
    node._see([group(0.5)] * adoption.MIN_GROUPS, heard)
    assert node._find_better() == ["best", "good"]
    node._see([group(0.7)] * adoption.OWN_GROUPS, [])
    assert node._find_better() == []


def test_groups_of_long_ago_are_not_compared(trainers: Trainers, tmp_path: Path) -> None:
    node = Adoption(_NoSwarm(), trainers.make(), GYM, GENERATION, tmp_path)  # type: ignore[arg-type]
    node._see([group(0.5)] * adoption.MIN_GROUPS, [group(0.1, "Qm1")] * adoption.PEERS_GROUPS)
    node._see([], [group(0.7, "Qm1")] * (adoption.PEERS_GROUPS // 2))
    assert node._find_better() == []
    node._see([], [group(0.7, "Qm1")] * (adoption.PEERS_GROUPS // 2))
    assert node._find_better() == ["Qm1"]


LIES = ["digest", "too-large", "trickle", "never", "other-kind", "offer"]


@pytest.mark.parametrize("lie", LIES)
def test_lying_sender_brings_nothing(
    lab: Lab, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_exchange, "PIECE_SECONDS", 1.0)
    monkeypatch.setattr(weight_exchange, "MAX_ATTEMPTS", 1)
    content = bytes(100_000)
    true = Offer(len(content), 10, weight_messages.digests_of([content]))

    async def answer(peer_id: str, request: WeightRequest, stream: Stream) -> None:
        if request.offer is None:
            huge = Offer(1 << 30, 10, weight_messages.digests_of([b""] * 1024))
            frame = weight_messages.encode_offer(huge if lie == "too-large" else true)
            if lie == "offer":
                frame = messages.encode_frame(Kind.OFFER, b"\xc1" * 100)
            await stream.send(frame)
        elif lie == "digest":
            await stream.send(messages.encode_frame(Kind.PIECE, content[1:] + b"x"))
        elif lie == "other-kind":
            await stream.send(messages.encode_frame(Kind.WAIT, b""))
        elif lie == "trickle":
            await stream.send(messages.encode_frame(Kind.PIECE, content)[:50])
            await stream.wait_closed()
        else:
            await stream.wait_closed()

    lab.bootnode()
    liar = lab.network("liar", environments=("sums 1",))
    liar._requests._on_weights = answer
    node = lab.peer("node", weights="on")
    wait_until(lambda: node.status().peers_known == 1, 20, "the liar is known")
    name = liar.context.identity.peer_id
    node.fetch_weights([name], bytes(32), 200_000, tmp_path / "weights")
    wait_until(lambda: not node.is_fetching_weights, 20, "it is given up")
    assert node.fetched_weights() == []
    is_proven = lie in ("digest", "too-large", "other-kind", "offer")
    assert node.status().rejected_by_peer == ({name: 1} if is_proven else {})


def test_transfer_that_broke_off_goes_on_with_the_next_piece(lab: Lab, tmp_path: Path) -> None:
    pieces = [random.Random(n).randbytes(messages.PIECE_BYTES) for n in range(3)]
    file = tmp_path / "own.safetensors"
    file.write_bytes(b"".join(pieces) + b"end")
    offered = weight_exchange.describe(bytes(32), file, 10)
    assert offered is not None
    folder = tmp_path / "weights"
    folder.mkdir()
    part = folder / f"{offered.offer.digest.hex()[:32]}.part"
    part.write_bytes(b"".join(pieces[:2]) + pieces[2][:1000])
    lab.bootnode()
    giver, taker = lab.peer("giver", weights="on"), lab.peer("taker", weights="on")
    giver.offer_weights(offered)
    wait_until(lambda: taker.status().peers_known == 1, 20, "the giver is known")
    before = taker.status().bytes_in
    taker.fetch_weights([name_of(giver)], bytes(32), 1 << 24, folder)
    wait_until(lambda: not taker.is_fetching_weights, 20, "the transfer has ended")
    (fetched,) = taker.fetched_weights()
    assert fetched.file.read_bytes() == file.read_bytes()
    assert taker.status().bytes_in - before < 1.5 * messages.PIECE_BYTES


@pytest.mark.parametrize("why", ["off", "other-model", "not-allowed"])
def test_weights_are_refused(lab: Lab, tmp_path: Path, why: str) -> None:
    file = tmp_path / "own.safetensors"
    file.write_bytes(b"weights")
    outsider = "QmTzQ1JRkWErjk39mryYw2WVaphAZNAREyMchXzYQ7c15n"
    only = {"only_peers": (outsider,)} if why == "not-allowed" else {}
    lab.bootnode()
    giver = lab.peer("giver", weights="off" if why == "off" else "on", **only)
    taker = lab.peer("taker", weights="on")
    offered = weight_exchange.describe(bytes(32), file, 1)
    assert offered is not None
    giver.offer_weights(offered)
    wait_until(lambda: taker.status().peers_known == 1, 20, "the giver is known")
    model = bytes([1]) * 32 if why == "other-model" else bytes(32)
    taker.fetch_weights([name_of(giver)], model, 1 << 20, tmp_path / "weights")
    wait_until(lambda: not taker.is_fetching_weights, 20, "it is refused")
    assert taker.fetched_weights() == []
    assert taker.status().rejected_by_peer == {}


def test_same_weights_are_sent_to_the_same_peer_a_few_times(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.write_bytes(b"weights")
    offered = weight_exchange.describe(bytes(32), file, 1)
    assert offered is not None
    lab.bootnode()
    giver, taker = lab.peer("giver", weights="on"), lab.peer("taker", weights="on")
    giver.offer_weights(offered)
    wait_until(lambda: taker.status().peers_known == 1, 20, "the giver is known")
    arrived = []
    for number in range(weight_exchange.MAX_TIMES_SERVED + 1):
        folder = tmp_path / str(number)
        taker.fetch_weights([name_of(giver)], bytes(32), 1 << 20, folder)
        wait_until(lambda: not taker.is_fetching_weights, 20, "it has an answer")
        arrived.append(len(taker.fetched_weights()))
    assert arrived == [1, 1, 1, 0]
    assert giver.status().requests_refused == {"flood": 1}


def test_exchange_is_off_for_outsiders_and_on_in_a_fleet() -> None:
    peer = "QmTzQ1JRkWErjk39mryYw2WVaphAZNAREyMchXzYQ7c15n"
    assert not settings.Swarm().shares_weights
    assert settings.Swarm(only_peers=(peer,)).shares_weights
    assert settings.Swarm(weights="on").shares_weights
    assert not settings.Swarm(only_peers=(peer,), weights="off").shares_weights
