"""Plot the mean reward per round, for the demo and benchmarks."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")


def plot_rewards(
    rewards: Mapping[str, Mapping[str, float]],
    file: Path,
    title: str = "Mean reward per round",
) -> None:
    """Write a PNG of mean rewards in [0, 1], by worker and round (as text)."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    by_round: dict[int, list[float]] = {}
    for name, curve in rewards.items():
        rounds, values = [int(round) for round in curve], list(curve.values())
        axes.plot(rounds, values, linewidth=1, alpha=0.5, marker=".", label=name)
        for round, reward in zip(rounds, values, strict=True):
            by_round.setdefault(round, []).append(reward)
    rounds = sorted(by_round)
    means = [fmean(by_round[round]) for round in rounds]
    axes.plot(rounds, means, color="black", linewidth=2, label="mean")
    axes.set(xlabel="round", ylabel="mean reward", ylim=(0, 1), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(file)
