"""A discrete-event simulation of the exchange and RL Swarm's way, for 8 to 10,000 nodes.

    python -m benchmarks.swarm --json COSTS
    python -m benchmarks.swarm_sim COSTS [--plot FILE] [--json FILE]

Every cost (bytes and processor time of a fetch, of a new connection, of an idle minute, of a
megabyte through a DHT key) was measured by benchmarks/swarm.py among 8 real nodes. With them the
model first predicts that benchmark's runs with 16 and 32 nodes on one machine, and prints both:
processor time and bytes, since wall time depends on other load. Then each node gets its own machine
and link, and nodes come and go.

Simulated: links (queues with a rate each way), distances, cores, churn, stale views, time-outs,
draws and hedging as in worker/swarm/swarm.py. Not simulated: packet loss, NAT, the routing inside
the DHT, and scoring. The model favours RL Swarm's way: its replicas never fail, and its reads
never time out before the round does.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.swarm import BYTES, CPU, IDLE_BYTES, NEW_BYTES, NEW_CPU, SECONDS
from benchmarks.swarm_model import (
    NUM_FETCHES,
    ROUNDS,
    Costs,
    OneKey,
    Ours,
    Result,
    foretell,
    simulate,
)

matplotlib.use("Agg")

FED_WITH = 8
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)
Measured = dict[tuple[int, str], dict[str, float]]


def load_measured(file: Path) -> Measured:
    """Read the results of benchmarks/swarm.py: (nodes, what) -> "ours" and "reference"."""
    measured = {}
    for row in json.loads(file.read_text()):
        if match := re.fullmatch(r"(\d+) nodes: (.*)", row["claim"]):
            measured[int(match[1]), match[2]] = row
    return measured


def costs_of(measured: Measured) -> Costs:
    """Return a figure. Raises SystemExit if it is missing."""

    def figure(what: str, way: str = "ours") -> float:
        try:
            return measured[FED_WITH, what][way]
        except KeyError:
            raise SystemExit(
                f"no figure for {FED_WITH} nodes: {what}; run benchmarks.swarm --idle 60 --json"
            ) from None

    key_bytes, key_seconds = figure(BYTES, "reference"), figure(CPU, "reference")
    return Costs(
        fetch_bytes=figure(BYTES) / NUM_FETCHES,
        fetch_seconds=figure(CPU) / NUM_FETCHES,
        connection_bytes=max(0.0, figure(NEW_BYTES) - figure(BYTES)) / NUM_FETCHES,
        connection_seconds=max(0.0, figure(NEW_CPU) - figure(CPU)) / NUM_FETCHES,
        idle_bytes_per_minute=figure(IDLE_BYTES),
        key_seconds_per_byte=key_seconds / key_bytes,
    )


def check(measured: Measured, costs: Costs) -> list[dict[str, object]]:
    """Print the model's predictions next to the measured runs."""
    rows: list[dict[str, object]] = []
    print(
        "one machine       CPU ms a node: model measured  KB a node: model measured  seconds: model"
        " (idle) measured"
    )
    for num_nodes in sorted({n for n, what in measured if what == SECONDS and n >= FED_WITH}):
        for name, way, key in (("ours", Ours, "ours"), ("one key", OneKey, "reference")):
            model = dict(zip((SECONDS, CPU, BYTES), foretell(way, num_nodes, costs), strict=True))
            real = {what: measured[num_nodes, what][key] for what in model}
            print(
                f"{num_nodes:6d} {name:8s} {1e3 * model[CPU]:20.1f} {1e3 * real[CPU]:8.1f}"
                f" {model[BYTES] / 1e3:18.1f} {real[BYTES] / 1e3:8.1f} {model[SECONDS]:27.3f}"
                f" {real[SECONDS]:9.3f}"
            )
            for what, unit in ((CPU, "s"), (BYTES, "bytes")):
                rows.append(
                    {
                        "claim": f"model against measured, {num_nodes} nodes, {name}: {what}",
                        "ours": round(model[what], 4),
                        "reference": round(real[what], 4),
                        "ratio": round(model[what] / real[what], 2),
                        "unit": unit,
                    }
                )
    return rows


def draw(results: dict[str, list[Result]], measured: Measured, file: Path) -> None:
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    times, sizes, alone = figure.subplots(1, 3)
    for (name, points), colour in zip(results.items(), ("tab:blue", "tab:red"), strict=True):
        nodes = [p.num_nodes for p in points]
        for what, style in (("median_seconds", "-"), ("late_seconds", ":")):
            label = name if style == "-" else f"{name}, slowest 5 %"
            values = [getattr(p, what) for p in points]
            times.plot(
                nodes,
                [float("nan") if v is None else v for v in values],
                style,
                color=colour,
                label=label,
            )
        sizes.plot(nodes, [p.bytes_a_node / 1e6 for p in points], color=colour, label=name)
        alone.plot(nodes, [100 * p.alone for p in points], color=colour, label=name)
    for key, colour in (("ours", "tab:blue"), ("reference", "tab:red")):
        real = sorted((n, row[key] / 1e6) for (n, what), row in measured.items() if what == BYTES)
        sizes.plot(
            *zip(*real, strict=True),
            "x",
            color=colour,
            label=f"{key}, measured, without idle traffic",
        )
    times.set(
        title="Until a node has its groups", ylabel="seconds after its own are ready", yscale="log"
    )
    sizes.set(title="Bytes a node and round", ylabel="MB", yscale="log")
    alone.set(title="Rounds without any group of others", ylabel="%", ylim=(-3, 103))
    for axes in (times, sizes, alone):
        axes.set(xlabel="nodes", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(file)


def show(name: str, point: Result) -> None:
    def seconds(value: float | None) -> str:
        return "   never" if value is None else f"{value:8.2f}"

    print(
        f"{point.num_nodes:6d}  {name:8s} {seconds(point.median_seconds)}"
        f" {seconds(point.late_seconds)} {point.bytes_a_node / 1e3:12.0f} {100 * point.alone:8.2f}"
        f" {100 * point.short:8.2f}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("costs", type=Path, help="what benchmarks.swarm --idle 60 --json wrote")
    parser.add_argument("--nodes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)

    measured = load_measured(arguments.costs)
    costs = costs_of(measured)
    print(json.dumps(asdict(costs), indent=1))
    rows = check(measured, costs)
    print(
        "\nall over the world, simulated: seconds after the own groups are ready; shares of all"
        " nodes' rounds"
    )
    print(" nodes  way        median  95 of 100   KB a node   alone %  short %")
    results: dict[str, list[Result]] = {"ours": [], "one key": []}
    for num_nodes in arguments.nodes:
        for name, way in (("ours", Ours), ("one key", OneKey)):
            results[name].append(simulate(way, num_nodes, costs, arguments.rounds))
            show(name, results[name][-1])
    for mine, theirs in zip(results["ours"], results["one key"], strict=True):
        for what, unit in (
            ("median_seconds", "s"),
            ("bytes_a_node", "bytes"),
            ("alone", "of the rounds"),
        ):
            a, b = getattr(mine, what), getattr(theirs, what)
            ratio = round(b / a, 2) if a and b is not None else None
            claim = f"simulated, {mine.num_nodes} nodes: {what.replace('_', ' ')}"
            rows.append({"claim": claim, "ours": a, "reference": b, "ratio": ratio, "unit": unit})
    if arguments.plot:
        draw(results, measured, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
