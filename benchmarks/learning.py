"""Measure whether the swarm learns: mean reward of the last ten demo rounds against the first ten.

    python -m benchmarks.learning [--workers 3] [--rounds 60] [--seeds 0 1 2] [--plot FILE]
                                  [--json FILE]

Runs 60 rounds on each of three seeds, with the real environment, model, generation, sampler and
trainer under the demo's settings. Only the network is left out: nodes pass their groups to each
other within the process, and the receiver regenerates the questions and scores the answers again,
as in the real exchange. Exits 1 if a seed gains less than 0.1.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib

from benchmarks.nodes import GAIN_HEADER, mean_curve, print_gain, run
from worker import settings
from worker.environments.presets import DEMO_SETTINGS

WINDOW = 10
WANTED_GAIN = 0.1


def draw(curves: dict[int, list[float]], file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for seed, curve in curves.items():
        smooth = [statistics.fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        (line,) = axes.plot(smooth, label=f"seed {seed}")
        axes.plot(curve, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="round", ylabel="mean reward of all workers (5-round mean)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="such as docs/images/learning.png")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 2 * WINDOW:
        parser.error(f"--rounds {arguments.rounds}: expected at least {2 * WINDOW}")
    config = settings.from_flat(DEMO_SETTINGS, "the demo's settings")

    curves: dict[int, list[float]] = {}
    gains: dict[int, float] = {}
    results = []
    print(
        f"{arguments.workers} workers, {arguments.rounds} rounds; mean reward of the first and the"
        f" last {WINDOW}"
    )
    print(GAIN_HEADER)
    for seed in arguments.seeds:
        started = time.monotonic()
        curve = curves[seed] = mean_curve(run(seed, arguments.workers, arguments.rounds, config))
        gains[seed], claim = print_gain(
            "the demo's mix", seed, curve, WINDOW, time.monotonic() - started
        )
        results.append(claim)
    if arguments.plot:
        draw(curves, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if short := [seed for seed, gain in gains.items() if gain < WANTED_GAIN]:
        raise SystemExit(f"seeds {short}: gain under {WANTED_GAIN}")


if __name__ == "__main__":
    main()
