"""Measure the exchange of weights: sizes, time over libp2p, and what a late joiner gains.

    python -m benchmarks.weights [--model NAME_OR_FOLDER] [--rounds 40] [--late 30] [--json FILE]

Sizes are of one model (the small one by default), trained for a few rounds: its weights and
adapters as files, compressed, and as differences to the untouched model, packed as a node packs
them. With --pack a model is packed without training it, and nothing else is measured. The transfer
is between two peers with libp2p daemons on 127.0.0.1. The late joiner's curve is of simulated nodes
(benchmarks/nodes.py): three train for --rounds, then a fourth joins with the untouched model, with
and without weights of peers. The small form (the defaults) takes a few minutes of one core.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import load_file, save_file

from benchmarks.nodes import Node, exchange, make_node, run
from worker import adoption, environments, evaluation, settings
from worker.adoption import Adoption
from worker.environments import Environment
from worker.environments.presets import DEMO_SETTINGS
from worker.policy import policy
from worker.swarm import identity
from worker.swarm.exchange import weights as weight_exchange
from worker.swarm.exchange.verify import Verifier
from worker.swarm.exchange.weights import Fetched
from worker.swarm.swarm import Swarm
from worker.trainer import checkpoint, weight_differences, weight_sets
from worker.trainer.trainer import Trainer

MEGABYTE = 1e6
EVERY = 5
"""A late joiner is evaluated once in this many rounds."""
TASKS = 24
REACHED = 0.9
"""Share of the veterans' held-out reward that a late joiner has to reach."""
RATES = (1e-6, 1e-5)
PACKED = 0.03
"""Share of values that are moved where a model is packed without training."""


def claim(text: str, ours: float, reference: float | None, unit: str) -> dict[str, Any]:
    ratio = round(ours / reference, 4) if reference else None
    print(
        f"{text}: {ours:.4g} {unit}" + (f" (of {reference:.4g})" if reference else ""), flush=True
    )
    return {"claim": text, "ours": ours, "reference": reference, "ratio": ratio, "unit": unit}


def compressed(content: bytes, level: int = 3) -> int:
    return len(zstandard.ZstdCompressor(level=level).compress(content))


def pack_and_unpack(trainer: Trainer, checkpoint_file: Path, what: str) -> list[dict[str, Any]]:
    """Return claims about the difference of a checkpoint's file: its size, loss and times."""
    base = weight_differences.find_base(trainer)
    packed = checkpoint_file.with_suffix(".difference")
    started = time.perf_counter()
    rounding = weight_differences.pack(weight_differences.open_file(checkpoint_file), base, packed)
    seconds = time.perf_counter() - started
    size = packed.stat().st_size / MEGABYTE
    whole = 2 * sum(p.numel() for p in trainer.parameters.values()) / MEGABYTE
    file = checkpoint_file.stat().st_size / MEGABYTE
    shapes = {name: p.shape for name, p in trainer.parameters.items()}
    started = time.perf_counter()
    weight_differences.unpack(packed, base, shapes)
    unpacking = time.perf_counter() - started
    return [
        claim(f"difference {what}, against whole bfloat16 weights", size, whole, "MB"),
        claim(f"difference {what}, against the checkpoint's file", size, file, "MB"),
        claim(f"share of the update lost by rounding {what}", rounding.loss, None, "share"),
        claim(f"time to pack the difference {what}", seconds, None, "s"),
        claim(f"time to unpack the difference {what}", unpacking, None, "s"),
    ]


def measure_difference(
    config: settings.Settings, environment: Environment, rate: float, rounds: int
) -> list[dict[str, Any]]:
    """Return claims about the difference after training at a learning rate.

    It is offered only if the update lost by rounding is at most adoption.MAX_ROUNDING_LOSS.
    """
    trainer = config.trainer.model_copy(update={"lora": None, "learning_rate": rate})
    node = make_node(0, 0, config.model_copy(update={"trainer": trainer}), environment)
    for round in range(rounds):
        exchange([node], round)
    what = f"after {rounds} rounds at {rate:g} in {config.model.dtype}"
    base = weight_differences.find_base(node.trainer)
    after = node.trainer.parameters
    changed = sum(int((base[n].bfloat16() != w.cpu().bfloat16()).sum()) for n, w in after.items())
    share = changed / sum(w.numel() for w in after.values())
    with tempfile.TemporaryDirectory() as name:
        checkpoint.save_weights(Path(name), node.trainer, {})
        claims = pack_and_unpack(node.trainer, Path(name) / "model.safetensors", what)
    return [claim(f"bfloat16 weights changed {what}", share, None, "share"), *claims]


def measure_packing(config: settings.Settings) -> list[dict[str, Any]]:
    """Return claims about a model of which a share PACKED of the values is moved by one step."""
    model = policy.load(config.model.model_copy(update={"dtype": "bfloat16"}))
    trainer = Trainer(model, config.trainer.model_copy(update={"lora": None}), config.generation)
    for parameter in trainer.parameters.values():
        parameter.detach().view(torch.int16)[torch.rand(parameter.shape) < PACKED] += 1
    with tempfile.TemporaryDirectory() as name:
        checkpoint.save_weights(Path(name), trainer, {})
        what = f"of {config.model.name}, {PACKED:.0%} moved"
        return pack_and_unpack(trainer, Path(name) / "model.safetensors", what)


def measure_sizes(config: settings.Settings, rounds: int) -> list[dict[str, Any]]:
    """Return claims about whole weights, their differences, and adapters."""
    claims = []
    environment = environments.load(config.environment)
    for dtype, rate in itertools.product(("bfloat16", "float32"), RATES):
        model = config.model.model_copy(update={"dtype": dtype})
        typed = config.model_copy(update={"model": model})
        claims += measure_difference(typed, environment, rate, rounds)
    untouched = policy.load(config.model).model.parameters()
    rows = [w.detach().cpu().bfloat16().view(torch.int16).flatten() for w in untouched]
    whole = torch.cat(rows).numpy().tobytes()
    size = len(whole) / MEGABYTE
    claims.append(claim("whole bfloat16 weights, zstd", compressed(whole) / MEGABYTE, size, "MB"))
    adapters = config.trainer.model_copy(update={"lora": settings.Lora(), "learning_rate": None})
    node = make_node(0, 0, config.model_copy(update={"trainer": adapters}), environment)
    for round in range(rounds):
        exchange([node], round)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "adapters.safetensors"
        save_file(weight_sets.current(node.trainer), file)
        content = file.read_bytes()
    raw = len(content) / MEGABYTE
    claims.append(claim("adapters (rank 16, float32) against whole weights", raw, size, "MB"))
    packed = compressed(content) / MEGABYTE
    claims.append(claim("adapters, zstd, against the file", packed, raw, "MB"))
    return claims


def make_peer(folder: Path, config: settings.Settings, bootnodes: Sequence[str]) -> Swarm:
    identity.create(folder / "swarm.pem")
    section = settings.Swarm(host="127.0.0.1", weights="on", bootnodes=tuple(bootnodes))
    verifier = Verifier(environments.load(config.environment), section, max_group_size=256)
    swarm = Swarm(section, folder / "swarm.pem", folder, verifier)
    swarm.start()
    return swarm


def wait_for(condition: Any, seconds: float = 120.0) -> float:
    """Return the seconds until a condition is true. Raises TimeoutError."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() > started + seconds:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - started


def measure_transfer(config: settings.Settings, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return claims about files of these bytes, sent by one peer to another."""
    claims = []
    with tempfile.TemporaryDirectory() as name:
        giver = make_peer(Path(name) / "giver", config, ())
        wait_for(lambda: giver.status().addresses)
        taker = make_peer(Path(name) / "taker", config, giver.status().addresses)
        peer_id = giver.status().peer_id
        try:
            wait_for(lambda: taker.status().peers_known)
            for number, size in enumerate(sizes):
                file = Path(name) / f"{number}.safetensors"
                file.write_bytes(random.Random(number).randbytes(size))
                offered = weight_exchange.describe(bytes([number]) * 32, file, 1)
                if offered is None:
                    raise ValueError(f"{size} bytes are more than a peer accepts")
                giver.offer_weights(offered)
                folder = Path(name) / "taken"
                taker.fetch_weights([peer_id], offered.model, size, folder)
                seconds = wait_for(lambda: not taker.is_fetching_weights)
                (fetched,) = taker.fetched_weights()
                if fetched.file.read_bytes() != file.read_bytes():
                    raise ValueError("what arrived is not what was sent")
                text = f"{size / MEGABYTE:.0f} MB from peer to peer on one machine"
                claims.append(claim(text, seconds, None, "s"))
        finally:
            taker.close()
            giver.close()
    return claims


class InProcess:
    """The weights of nodes in this process, as a swarm would bring them."""

    is_fetching_weights = False

    def __init__(self, nodes: Mapping[str, Node], folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        self._fetched: list[Fetched] = []

    def fetch_weights(
        self, peer_ids: Sequence[str], model: bytes, max_bytes: int, folder: Path
    ) -> None:
        for peer_id in peer_ids:
            file = self._folder / f"{peer_id}.part"
            save_file(weight_sets.current(self._nodes[peer_id].trainer), file)
            if file.stat().st_size > max_bytes or not load_file(file):
                raise ValueError(f"{file}: larger than the taker accepts")
            self._fetched.append(Fetched(peer_id, file, 1, 0.0, file.stat().st_size))

    def fetched_weights(self) -> list[Fetched]:
        fetched, self._fetched = self._fetched, []
        return fetched

    def distrust_weights(self, peer_id: str) -> None:
        raise ValueError(f"{peer_id}: weights of an honest node were unusable")


def held_out(node: Node) -> float:
    scores = evaluation.evaluate(
        node.trainer.policy,
        node.environment,
        node.settings.generation,
        evaluation.fixed_tasks(node.environment),
        TASKS,
    )
    return evaluation.mean_reward(scores)


def join_late(
    veterans: Sequence[Node], config: settings.Settings, start: int, rounds: int, with_weights: bool
) -> tuple[list[float], int | None]:
    """Return a late joiner's held-out rewards, and after which round it took weights (None: never).

    The veterans answer but no longer learn, so that both curves have the same peers.
    """
    node = make_node(1, 99, config, environments.load(config.environment))
    curve, taken = [held_out(node)], None
    with tempfile.TemporaryDirectory() as name:
        swarm = InProcess({each.peer_id: each for each in veterans}, Path(name))
        adopting = Adoption(
            swarm,  # type: ignore[arg-type]
            node.trainer,
            node.environment,
            config.generation,
            Path(name),
        )
        for number in range(rounds):
            round = start + number
            answered = {each.peer_id: each.answer(round) for each in (*veterans, node)}
            external = node.collect(answered)
            if with_weights:
                adopting.before_step(answered[node.peer_id], external)
            node.learn(answered[node.peer_id], external)
            if with_weights and adopting.after_step():
                taken = taken or number + 1
            if (number + 1) % EVERY == 0:
                curve.append(held_out(node))
    return curve, taken


def measure_joining(config: settings.Settings, rounds: int, late: int) -> list[dict[str, Any]]:
    veterans = run(0, 3, rounds, config)
    reached = statistics.fmean(held_out(node) for node in veterans)
    claims = [claim(f"held-out reward of the three after {rounds} rounds", reached, None, "reward")]
    steps = f"rounds {', '.join(str(EVERY * i) for i in range(late // EVERY + 1))}"
    for with_weights in (False, True):
        curve, taken = join_late(veterans, config, rounds, late, with_weights)
        name = "with weights of peers" if with_weights else "without"
        print(f"late joiner {name}, {steps}: {' '.join(f'{value:.3f}' for value in curve)}")
        there = [EVERY * i for i, value in enumerate(curve) if value >= REACHED * reached]
        print(
            f"  {REACHED:.0%} of the others' reward after: {there[0] if there else 'not reached'}"
        )
        if taken is not None:
            print(f"  weights taken after round {taken}")
        text = f"held-out reward of a late joiner {name} after {late} rounds"
        claims.append(claim(text, curve[-1], reached, "reward") | {"curve": curve, "taken": taken})
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="of the sizes (default: the small model)")
    parser.add_argument("--rounds", type=int, default=40, help="of the three nodes (default: 40)")
    parser.add_argument("--late", type=int, default=30, help="of the late joiner (default: 30)")
    parser.add_argument("--training", type=int, default=8, help="rounds before sizes (default: 8)")
    parser.add_argument("--pack", help="pack this model; nothing else is measured")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = settings.from_flat(DEMO_SETTINGS, "the demo's settings")
    measured = config
    if arguments.model:
        model = config.model.model_copy(update={"name": arguments.model})
        measured = config.model_copy(update={"model": model})
    if arguments.pack:
        model = config.model.model_copy(update={"name": arguments.pack})
        claims = measure_packing(config.model_copy(update={"model": model}))
    else:
        claims = measure_sizes(measured, arguments.training)
        claims += measure_transfer(config, [int(size * MEGABYTE) for size in arguments.megabytes])
        claims += measure_joining(config, arguments.rounds, arguments.late)
        claims.append(claim("margin that starts a transfer", adoption.MARGIN, None, "reward"))
    if arguments.json:
        arguments.json.write_text(json.dumps(claims, indent=1) + "\n")


if __name__ == "__main__":
    main()
