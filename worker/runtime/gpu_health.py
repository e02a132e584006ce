"""Health of NVIDIA GPUs, from `nvidia-smi -q` and from the Xid lines of the kernel's log.

Hosts, the doctor and the fleet's status use the same table of problems, each with what to do.
"""

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

QUERY_SECONDS = 20.0
_HEADER = re.compile(r"GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9])")
_LOST = re.compile(
    r"Unable to determine the device handle|GPU is lost|fallen off the bus|No devices were found",
    re.I,
)
_BROKEN = re.compile(r"ERR!|Unknown Error|requires reset", re.I)
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),? ?(.*)")

Severity = Literal["warning", "severe"]

COOL = "cool it: clean fans and filters, lower the room's temperature or the power limit"
POWER = "check power supply and cables of the card"
RESET = "reset it (`nvidia-smi -r -i N` without programs on it), or reboot the host"
REPLACE = "reboot the host; if it happens again, replace the card (RMA)"
SEAT = "reseat the card or its riser; then replace it (RMA)"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a card. `severe`: it must not train; `action`: what to do."""

    severity: Severity
    text: str
    action: str

    def __str__(self) -> str:
        return f"{self.text}; {self.action}"


@dataclass(frozen=True, slots=True)
class Card:
    """The state of a card as nvidia-smi reports it. None: not reported.

    Temperature in °C, power in W, clocks in MHz. `throttled_by`: active reasons, except idleness
    and limits that are set on purpose. `ecc_uncorrected`: errors since the driver's start.
    """

    bus_id: str
    uuid: str | None = None
    name: str | None = None
    temperature: float | None = None
    power: float | None = None
    power_limit: float | None = None
    clock: float | None = None
    max_clock: float | None = None
    pcie_width: float | None = None
    pcie_max_width: float | None = None
    throttled_by: tuple[str, ...] = ()
    ecc_uncorrected: float | None = None
    remapped_rows: float | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def is_ill(self) -> bool:
        """Return whether the card must not train."""
        return any(problem.severity == "severe" for problem in self.problems)


_THROTTLING: Mapping[str, tuple[Severity, str]] = {
    "HW Thermal Slowdown": ("warning", COOL),
    "SW Thermal Slowdown": ("warning", COOL),
    "HW Power Brake Slowdown": ("warning", POWER),
    "HW Slowdown": ("warning", f"{COOL}; {POWER}"),
}

# Xids whose cause is the card, the driver or the board. Others (13, 31, 43, 45) have a program as
# their cause.
_XIDS: Mapping[int, tuple[Severity, str, str]] = {
    48: ("severe", "an uncorrectable memory error (double bit)", RESET),
    63: ("warning", "a memory row is to be remapped at the next reset", RESET),
    64: ("severe", "remapping a memory row failed", REPLACE),
    74: ("warning", "an NVLink error", SEAT),
    79: ("severe", "it has fallen off the bus", REPLACE),
    92: ("warning", "many correctable memory errors", REPLACE),
    94: ("warning", "a contained memory error", RESET),
    95: ("severe", "an uncontained memory error", RESET),
    119: ("severe", "its system processor (GSP) does not answer", RESET),
    120: ("severe", "an error of its system processor (GSP)", RESET),
    154: ("severe", "the driver asks for a reset", RESET),
}


def query() -> str:
    """Return the output of `nvidia-smi -q`, including errors; empty without nvidia-smi."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "-q"],
            capture_output=True,
            text=True,
            errors="replace",  # a failing driver may print any bytes
            timeout=QUERY_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        return f"Unknown Error: nvidia-smi did not answer within {QUERY_SECONDS:.0f} s"
    return said.stdout + said.stderr


def parse(text: str) -> list[Card]:
    """Return the cards in the output of `nvidia-smi -q`, with their problems.

    For a message about a lost card, the card has no figures.
    """
    blocks: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            blocks.append((header[1], []))
        elif blocks:
            blocks[-1][1].append(line)
    cards = [_card(bus_id, lines) for bus_id, lines in blocks]
    return [*cards, *_lost(text)]


def _lost(text: str) -> Iterator[Card]:
    for line in text.splitlines():
        if ":" in line and line.startswith(" "):
            continue  # a figure of a card
        if _LOST.search(line) or _BROKEN.search(line):
            found = re.search(r"([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9])", line)
            problem = Problem("severe", f"nvidia-smi says: {line.strip()}", REPLACE)
            yield Card(found[1] if found else "unknown", problems=(problem,))


def _card(bus_id: str, lines: Sequence[str]) -> Card:
    figures = _tree(lines)

    def number(*paths: str) -> float | None:
        for path in paths:
            found = re.match(r"-?\d+(\.\d+)?", figures.get(path, ""))
            if found:
                return float(found[0])
        return None

    throttled = tuple(
        name
        for path, value in figures.items()
        if path.startswith(("Clocks Event Reasons/", "Clocks Throttle Reasons/"))
        and value == "Active"
        and (name := path.rpartition("/")[2]) in _THROTTLING
    )
    uncorrected = [
        number(f"ECC Errors/Volatile/{name}")
        for name in ("SRAM Uncorrectable", "SRAM Uncorrectable Parity", "DRAM Uncorrectable")
    ]
    known = [value for value in uncorrected if value is not None]
    card = Card(
        bus_id=bus_id,
        uuid=figures.get("GPU UUID"),
        name=figures.get("Product Name"),
        temperature=number("Temperature/GPU Current Temp"),
        power=number(
            "GPU Power Readings/Average Power Draw",
            "GPU Power Readings/Instantaneous Power Draw",
            "GPU Power Readings/Power Draw",
            "Power Readings/Power Draw",
        ),
        power_limit=number("GPU Power Readings/Current Power Limit", "Power Readings/Power Limit"),
        clock=number("Clocks/SM"),
        max_clock=number("Max Clocks/SM"),
        pcie_width=number("PCI/GPU Link Info/Link Width/Current"),
        pcie_max_width=number("PCI/GPU Link Info/Link Width/Max"),
        throttled_by=throttled,
        ecc_uncorrected=sum(known) if known else None,
        remapped_rows=number("Remapped Rows/Uncorrectable Error"),
    )
    return _with_problems(card, figures)


def _tree(lines: Iterable[str]) -> dict[str, str]:
    """Return the values of nvidia-smi's indented lines by their path."""
    values: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in lines:
        name, colon, value = line.partition(" : ")
        depth = len(line) - len(line.lstrip())
        while path and path[-1][0] >= depth:
            path.pop()
        path.append((depth, name.strip()))
        if colon:
            values["/".join(part for _, part in path)] = value.strip()
    return values


def _with_problems(
    card: Card,
    figures: Mapping[str, str],
) -> Card:
    problems = [
        Problem(severity, f"throttled: {name}", action)
        for name, (severity, action) in _THROTTLING.items()
        if name in card.throttled_by
    ]
    if card.ecc_uncorrected:
        text = f"{card.ecc_uncorrected:.0f} uncorrectable memory errors since the driver's start"
        problems.append(Problem("severe", text, RESET))
    if figures.get("Remapped Rows/Remapping Failure Occurred") == "Yes":
        problems.append(Problem("severe", "remapping a memory row failed", REPLACE))
    if figures.get("Remapped Rows/Pending") == "Yes":
        problems.append(Problem("warning", "memory rows wait for a reset to be remapped", RESET))
    if figures.get("Retired Pages/Pending Page Blacklist") == "Yes":
        problems.append(Problem("warning", "memory pages wait for a reset to be retired", RESET))
    if figures.get("GPU Reset Status/Reset Required") == "Yes":
        problems.append(Problem("severe", "it must be reset", RESET))
    if card.pcie_width and card.pcie_max_width and card.pcie_width < card.pcie_max_width:
        text = f"PCIe has {card.pcie_width:.0f} of {card.pcie_max_width:.0f} lanes"
        problems.append(Problem("warning", text, SEAT))
    broken = sorted(path for path, value in figures.items() if _BROKEN.search(value))
    if broken:
        text = f"nvidia-smi can't read {broken[0]} and {len(broken) - 1} other figures"
        problems.append(Problem("severe", text, REPLACE))
    return replace(card, problems=tuple(problems))


def xid_problems(kernel_log: Iterable[str]) -> dict[str, tuple[Problem, ...]]:
    """Return the problems in the kernel's log by PCI address, each Xid once.

    Lines of drivers that report a lost card without an Xid count as Xid 79.
    """
    found: dict[str, dict[int, Problem]] = {}
    address = "unknown"
    for line in kernel_log:
        if lost := re.search(r"The NVIDIA GPU ([0-9a-fA-F:.]+)", line):
            address = lost[1]
        match = _XID.search(line)
        number = int(match[2]) if match else 79 if "fallen off the bus" in line else None
        if match:
            address = match[1]
        if number is not None and number in _XIDS:
            severity, text, action = _XIDS[number]
            problem = Problem(severity, f"the kernel says Xid {number}: {text}", action)
            found.setdefault(short_address(address), {})[number] = problem
    return {address: tuple(problems.values()) for address, problems in found.items()}


def short_address(bus_id: str) -> str:
    """Return a PCI address in one form: domain of 4 digits, no function, lower case."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest.partition('.')[0]}"
