"""A pyinfra host whose facts and commands run in this machine's shell.

Without network, where root can do that. Replaces pyinfra's connection only: facts, operations and
their effects on files are real.
"""

import os
import subprocess
from collections.abc import Iterable
from typing import Any

from pyinfra.api import StringCommand

NO_NETWORK = ["unshare", "--net"] if os.geteuid() == 0 else []


class ShellHost:
    """A host; `sent`: standard input of each command, in order; `noops`: reasons of no-ops."""

    def __init__(self) -> None:
        self.name = "shell"
        self.sent: list[int] = []
        self.noops: list[str] = []

    def get_fact(self, fact: Any, **arguments: Any) -> Any:
        command = fact().command(**arguments)
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True
        )
        lines = done.stdout.splitlines()
        return fact().process(lines) if lines else fact.default()

    def noop(self, reason: str) -> None:
        self.noops.append(reason)

    def run(self, commands: Iterable[StringCommand | str]) -> None:
        """Run an operation's commands, each before the next is requested.

        Raises AssertionError with the output of a command that fails.
        """
        for command in commands:
            script = command if isinstance(command, str) else command.get_raw_value()
            stdin = (
                ""
                if isinstance(command, str)
                else "".join(command.connector_arguments.get("_stdin", []))
            )
            self.sent.append(len(stdin))
            done = subprocess.run(
                [*NO_NETWORK, "sh", "-c", script],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stderr
