"""For test_fact_cache.py: record how often a fact was asked, before and after a change."""

from collections.abc import Iterator

from pyinfra import host
from pyinfra.api import FactBase, operation
from pyinfra.context import ctx_host

from deploys.pyinfra_ext import fact_cache


class Count(FactBase[int]):
    """The number of times that this was asked; the output does not end with a line break."""

    def command(self, file: str) -> str:
        return f"echo x >> {file}; printf %s $(wc -l < {file})"

    def process(self, output: list[str]) -> int:
        return int(output[0])


class Lines(FactBase[list[str]]):
    """An answer with empty lines, in the middle and at the end."""

    def command(self) -> str:
        return "printf 'one\\n\\nthree\\n\\n'"

    def process(self, output: list[str]) -> list[str]:
        return output


class Failing(FactBase[str]):
    """A fact whose command fails."""

    def command(self) -> str:
        return "echo nonsense; exit 3"


@operation()
def write(text: str, file: str) -> Iterator[str]:
    """Record how often `file` has been counted so far."""
    yield f"echo {text}={host.get_fact(Count, file=file)} >> {file}.said"


file = host.data.count_file
fact_cache.ask_ahead(ctx_host.get(), [(Count, {"file": file}), (Failing, {}), (Lines, {})])
assert host.get_fact(Lines) == ["one", "", "three", ""]
before = [host.get_fact(Count, file=file), host.get_fact(Count, file=file)]
write(name="First", text=f"{before}", file=file)
write(name="Second", text="second", file=file)
