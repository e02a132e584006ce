"""`hivewright fleet harvest`: fetch the best model of a fleet, or the average of its nodes.

Every worker's newest checkpoint is evaluated on its own host, on the same held-out tasks. The
weights of all nodes with the same model as the best one are then sent to the best one's host. That
host also evaluates their average, and makes the model folder that is downloaded to this machine.
"""

import argparse
import json
import shlex
import statistics
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from deploys import harvest_part, progress
from deploys.fleet import commands, queries
from deploys.fleet.pyinfra_process import Pyinfra, Ran, heed_signals
from worker.errors import SettingsError, WorkerError
from worker.log import printable
from worker.runtime.archives import unpack

_OFFER, _WEIGHTS, _MODEL, _RESULT = "offer.json", "weights", "model", "result.json"
_MAX_HEADER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """A worker of a host."""

    host: str
    number: int

    def __str__(self) -> str:
        return f"{self.host}/{self.number}"


@dataclass(frozen=True, slots=True)
class Offer:
    """A worker's rewards on held-out tasks, and its weights in `file`.

    `tasks`: digest of the tasks; `rewards`: one per task, by family and level; `shapes`: shapes of
    the weights, by name.
    """

    slot: Slot
    file: Path
    tasks: str
    rewards: Mapping[tuple[str, int | None], Sequence[float]]
    round: int | None
    rounds_trained: int
    origin: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]

    @property
    def num_answered(self) -> int:
        return sum(map(len, self.rewards.values()))


_Reward = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass
class _Said:
    """The statement in an offer; untrusted."""

    tasks: str
    rewards: list[tuple[str, int | None, list[_Reward]]]
    round: int | None
    rounds_trained: int
    origin: dict[str, str | int]


@dataclass
class _Tensor:
    """An entry in the header of a safetensors file; the entry of metadata has no shape."""

    shape: list[int] = field(default_factory=list)


_SAID, _HEADER = TypeAdapter(_Said), TypeAdapter(dict[str, _Tensor])
T = TypeVar("T")


def run(options: argparse.Namespace) -> None:
    """Evaluate all workers, and write the best model or the average to a new folder."""
    output: Path = options.output or Path(f"harvest-{Path(options.inventory).stem}")
    _require_new(output)
    pyinfra = commands.pyinfra_of(options)
    names = commands.chosen(pyinfra, options.limit)
    with progress.waiting(f"asking {len(names)} host{'s' * (len(names) > 1)}"):
        looked = queries.look(pyinfra, names)
    slots, levels = find_slots(looked.reports)
    if not slots:
        raise WorkerError(f"no worker on {', '.join(names)}; {_reasons(looked.reasons)}")
    heed_signals()
    with tempfile.TemporaryDirectory(prefix=".harvest-", dir=output.parent) as name:
        harvesting = Harvesting(pyinfra, Path(name), options, levels)
        offers, failed = harvesting.collect(slots)
        failed = {**looked.reasons, **failed}
        for slot, reason in failed.items():
            print(f"{slot}: {printable(reason)}", flush=True)
        if not offers:
            raise WorkerError("no worker has a checkpoint that could be evaluated; see above")
        ranked = rank(offers)
        result = harvesting.bring(ranked if options.average else ranked[:1], output)
    print(_describe(result, ranked, output))
    if failed:
        raise WorkerError(f"not considered: {', '.join(failed)}; see above")


def find_slots(
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[Slot], dict[str, int]]:
    """Return the workers of all hosts, and the highest level of a worker in each family."""
    slots, levels = [], Counter[str]()
    for host, services in reports.items():
        for service in services:
            unit = str(service["unit"])
            if not unit.startswith("hivewright-worker@"):
                continue
            slots.append(Slot(host, int(unit.partition("@")[2].removesuffix(".service"))))
            for family, level in ((service["status"] or {}).get("levels") or {}).items():
                levels[family] = max(levels[family], level)
    return slots, dict(levels)


@dataclass
class Harvesting:
    """One harvest; its files are in `folder`."""

    pyinfra: Pyinfra
    folder: Path
    options: argparse.Namespace
    levels: Mapping[str, int]

    def collect(
        self,
        slots: Sequence[Slot],
    ) -> tuple[list[Offer], dict[str, str]]:
        """Return the workers' offers, and by name why others have none; one at a time per host."""
        by_host: dict[str, list[Slot]] = {}
        for slot in slots:
            by_host.setdefault(slot.host, []).append(slot)
        offers: list[Offer] = []
        failed: dict[str, str] = {}

        def collect_host(own: Sequence[Slot]) -> None:
            for slot in own:
                found = self._offer(slot, slots.index(slot))
                if isinstance(found, Offer):
                    offers.append(found)
                else:
                    failed[str(slot)] = found

        with (
            progress.waiting(f"evaluating {len(slots)} workers on their hosts"),
            ThreadPoolExecutor(commands.NUM_PARALLEL) as pool,
        ):
            futures = [pool.submit(collect_host, own) for own in by_host.values()]
            self._finish(futures)
        return offers, failed

    def bring(
        self,
        offers: Sequence[Offer],
        output: Path,
    ) -> dict[str, Any]:
        """Let the host of the first offer make the model of all offers; move it to `output`."""
        best = offers[0]
        sent, made = self.folder / "weights.tar", self.folder / "made.tar"
        pack(offers, sent)
        nodes = ["--nodes", *(str(offer.slot) for offer in offers)]
        with progress.waiting(f"making the model on {best.slot.host}"):
            ran = self._run(best.slot, "choose", made, [*self._tasks(), *nodes], sent)
        if ran.outcome != "done":
            raise WorkerError(f"{best.slot}: {printable(ran.reason)}; nothing was written")
        unpacked = self.folder / "unpacked"
        try:
            with tarfile.open(made) as tar:
                unpack(tar, unpacked)
            result: dict[str, Any] = json.loads((unpacked / _RESULT).read_text())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise WorkerError(
                f"{best.slot}: unusable answer: {error}; nothing was written"
            ) from None
        (unpacked / _MODEL).rename(output)
        return result

    def _offer(
        self,
        slot: Slot,
        number: int,
    ) -> Offer | str:
        """Return a worker's offer, or the reason for its absence."""
        file = self.folder / f"{number}.tar"
        ran = self._run(slot, "offer", file, self._tasks())
        if ran.outcome != "done":
            return short(ran.reason)
        try:
            return read_offer(slot, file)
        except (tarfile.TarError, OSError, ValueError, KeyError) as error:
            return f"unusable answer: {type(error).__name__}: {error}"

    def _run(
        self, slot: Slot, part: str, file: Path, arguments: Sequence[str], sent: Path | None = None
    ) -> Ran:
        seconds = 2 * int(self.options.seconds)
        return self.pyinfra.operation(
            slot.host,
            "deploys.harvest_part.run",
            file.with_suffix(".log"),
            f"slot={slot.number}",
            f"part={part}",
            f"options={shlex.join(arguments)}",
            f"seconds={seconds}",
            f"file={file}",
            *([f"sent={sent}"] if sent else []),
            # Files are sent and fetched in pieces, whose time depends on the connection.
            timeout=seconds + harvest_part.LOAD_SECONDS + commands.SERVICE_SECONDS,
        )

    def _tasks(self) -> list[str]:
        """Return the options that make all workers ask the same tasks."""
        chosen = [f"--tasks={self.options.tasks}", f"--seed={self.options.seed}"]
        levels = [f"--level={family}={level}" for family, level in sorted(self.levels.items())]
        return [*chosen, f"--seconds={self.options.seconds}", *levels]

    def _finish(self, futures: Sequence[Any]) -> None:
        try:
            for future in futures:
                future.result()
        except BaseException:
            self.pyinfra.stop()
            raise


def read_offer(slot: Slot, file: Path) -> Offer:
    """Read what a host has sent. Raises ValueError, KeyError or TarError if it is invalid."""
    with tarfile.open(file, "r:") as tar:  # never compressed
        said = _decode(_SAID, _OFFER, _member(tar, _OFFER))
        weights = tar.extractfile(f"{_WEIGHTS}/model.safetensors")
        if weights is None:
            raise ValueError("no weights")
        size = int.from_bytes(weights.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"header of the weights: {size} bytes; at most {_MAX_HEADER_BYTES}")
        header = _decode(_HEADER, "header of the weights", weights.read(size))
    return Offer(
        slot=slot,
        file=file,
        tasks=said.tasks,
        rewards={(family, level): rewards for family, level, rewards in said.rewards},
        round=said.round,
        rounds_trained=said.rounds_trained,
        origin=said.origin,
        shapes={name: tensor.shape for name, tensor in header.items() if name != "__metadata__"},
    )


def _decode(adapter: TypeAdapter[T], what: str, content: bytes) -> T:
    """Parse and check a host's JSON. Raises ValueError, in one line, for other content."""
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{what}: {where or 'content'}: {first['msg']}") from None


def rank(offers: Sequence[Offer]) -> list[Offer]:
    """Print each offer's reward; return the best, followed by those whose weights fit its model.

    Rewards can be compared only over the same tasks, so offers with other tasks than most are left
    out, and so are those of workers that answered less than half as many as the median worker.
    """
    tasks = Counter(offer.tasks for offer in offers).most_common(1)[0][0]
    compared = [offer for offer in offers if offer.tasks == tasks]
    enough = statistics.median(offer.num_answered for offer in compared) / 2
    slow = [offer for offer in compared if offer.num_answered < enough]
    compared = [offer for offer in compared if offer.num_answered >= enough]
    means = dict(zip(map(id, compared), common_means(compared), strict=True))
    compared.sort(key=lambda offer: means[id(offer)], reverse=True)
    best = compared[0]
    fitting = []
    for offer in compared:
        print(
            f"{offer.slot}: held-out reward {means[id(offer)]:.3f} after"
            f" {offer.rounds_trained} rounds"
        )
        if (offer.origin, offer.shapes) == (best.origin, best.shapes):
            fitting.append(offer)
        else:
            print(
                f"{offer.slot}: not in the average: its weights are of {_model(offer)}, and the"
                f" best are of {_model(best)}"
            )
    for offer in slow:
        print(
            f"{offer.slot}: left out: it answered only {offer.num_answered} held-out tasks in time,"
            f" {best.slot} answered {best.num_answered}; raise --seconds to compare it"
        )
    for offer in offers:
        if offer.tasks != tasks:
            print(
                f"{offer.slot}: left out: its environment's settings make other held-out tasks"
                " than those of most workers"
            )
    return fitting


def common_means(offers: Sequence[Offer]) -> list[float]:
    """Return mean rewards over the tasks that all have answered, each family and level once."""
    asked = [one for one in offers[0].rewards if all(offer.rewards.get(one) for offer in offers)]
    if not asked:
        raise WorkerError("the workers have no held-out task in common; raise --seconds")
    means = []
    for offer in offers:
        shares = []
        for one in asked:
            count = min(len(each.rewards[one]) for each in offers)
            shares.append(sum(offer.rewards[one][:count]) / count)
        means.append(sum(shares) / len(shares))
    return means


def pack(
    offers: Sequence[Offer],
    file: Path,
) -> None:
    """Write one tar with the weights of all offers, in folders that sort like them."""
    with tarfile.open(file, "w") as out:
        for number, offer in enumerate(offers):
            with tarfile.open(offer.file) as tar:
                for name in ("model.safetensors", "state.json"):
                    member = tar.getmember(f"{_WEIGHTS}/{name}")
                    content = tar.extractfile(member)
                    entry = tarfile.TarInfo(f"{number:03d}/{name}")
                    entry.size = member.size
                    out.addfile(entry, content)


def short(reason: str) -> str:
    """Return the error of a command on a host without the command's name."""
    return reason.removeprefix("hivewright harvest offer: ") or "no reason given"


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(name)
    if content is None:
        raise ValueError(f"{name} is not a file")
    return content.read()


def _model(offer: Offer) -> str:
    model = str(offer.origin.get("model"))
    if "base_weights" in offer.origin:
        return f"adapters of {model} ({offer.origin['base_weights']})"
    return model


def _describe(
    result: Mapping[str, Any],
    ranked: Sequence[Offer],
    output: Path,
) -> str:
    best = f"best worker {ranked[0].slot}: {result['best']:.3f}"
    if result["average"] is None:
        return f"{output}: the model of the {best}"
    average = f"average of {len(ranked)}: {result['average']:.3f}"
    if result["chosen"] == "average":
        return f"{output}: the {average} ({best})"
    return f"{output}: the model of the {best} ({average})"


def _reasons(reasons: Mapping[str, str]) -> str:
    said = [f"{name}: {printable(reason)}" for name, reason in reasons.items()]
    return "; ".join(said) or "deploy them first"


def _require_new(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise SettingsError(f"--output {output}: exists already; expected the name of a new folder")
    if not output.parent.is_dir():
        raise SettingsError(
            f"--output {output}: {output.parent} is not a folder; expected an existing one"
        )
