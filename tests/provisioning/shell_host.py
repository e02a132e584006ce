"""A host of pyinfra's whose facts and commands are run by this machine's shell, without network
where root can do that.

Stands in for pyinfra's connection alone: facts, operations, and what they do to files are the real
ones.
"""

import os
import subprocess
from collections.abc import Iterable
from typing import Any

from pyinfra.api import StringCommand

NO_NETWORK = ["unshare", "--net"] if os.geteuid() == 0 else []


class ShellHost:
    """`sent`: bytes of standard input of each command that was run, in order. `noops`: reasons of
    doing nothing."""

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
        """Run an operation's commands, each before the next one is asked for. Raises AssertionError
        with its words."""
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
