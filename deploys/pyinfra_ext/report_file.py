"""The report of a run of pyinfra for the program that started it: a JSON file.

Independent of pyinfra. The program names the file in an environment variable; run_report.py writes
it when an operation begins and when the run ends, so it exists even if pyinfra is killed.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from worker.runtime.files import write_whole

REPORT_VARIABLE = "HIVEWRIGHT_RUN_REPORT"
# Environment variable that names a folder with plans of hosts: a run that has checked the whole
# inventory writes them for the runs that follow.
PLANS_VARIABLE = "HIVEWRIGHT_PLANS"

State = Literal["running", "done", "failed", "unreachable"]


@dataclass(slots=True)
class HostRun:
    """The run on one host.

    `operation`: the operation that is running or failed; empty while connecting or reading facts.
    `output`: the line of the host's output that best explains a failure. `lacking`: what the
    deployed host lacks.
    """

    state: State = "running"
    operation: str = ""
    output: str = ""
    lacking: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The reason why the run on this host failed, in a line."""
        return ": ".join(part for part in (self.operation, self.output) if part)


@dataclass(slots=True)
class RunReport:
    """A run of pyinfra.

    `refused`: the mistakes in the inventory; nothing was done on any host then. `stopped`: why
    nothing was done after all hosts were connected. `warnings`: possible mistakes in the inventory
    that did not stop this run.
    """

    hosts: dict[str, HostRun] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    stopped: str = ""
    warnings: list[str] = field(default_factory=list)

    def write(self, file: Path) -> None:
        write_whole(file, json.dumps(asdict(self)), durable=False)


def read(file: Path) -> RunReport:
    """Return the report of a run; an empty one if pyinfra ended before it wrote any."""
    if not file.exists():
        return RunReport()
    found = json.loads(file.read_text())
    hosts = {name: HostRun(**host) for name, host in found.pop("hosts").items()}
    return RunReport(hosts=hosts, **found)
