"""Facts about the machine that a host is: its GPUs, its distribution, where its pip gets packages from."""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from pyinfra.api import operation

from deploys import gpus
from deploys.facts import OwnFact
from deploys.gpus import Gpus

_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"


@operation()
def refuse_unfit(reason: str | None) -> Iterator[str]:
    """Fail, before anything is done on the host, if its facts don't go with the inventory."""
    if reason is not None:
        yield f"echo {shlex.quote(reason)} >&2; exit 1"


class HostGpus(OwnFact[Gpus]):
    """The NVIDIA GPUs of the host."""

    def command(self) -> str:
        version = "s/.*CUDA[A-Z ]* Version *: *\\([0-9][0-9.]*\\).*/cuda \\1/p"
        return (
            "if command -v nvidia-smi >/dev/null; then"
            f" if found=$(timeout 60 nvidia-smi --query-gpu={gpus.QUERY} --format=csv,noheader,nounits 2>&1); then"
            ' echo "$found" | sed "s/^/gpu /"; sed -n "s/^MemTotal: *\\([0-9]*\\) kB/ram \\1/p" /proc/meminfo;'
            f" timeout 60 nvidia-smi 2>/dev/null | sed -n '{version}' | head -n 1;"
            ' else echo "$found" | sed "s/^[0-9][0-9]*, /gpu &/;t;s/^/problem /";'
            f" timeout 60 nvidia-smi 2>/dev/null | sed -n '{version}' | head -n 1; fi;"
            ""
            " else for vendor in /sys/bus/pci/devices/*/vendor; do"
            f' [ "$(cat "$vendor" 2>/dev/null)" != {_NVIDIA} ]'
            f' || case "$(cat "${{vendor%vendor}}class")" in {_DISPLAY_CLASS}*) echo card;; esac;'
            " done; fi; true"
        )

    @staticmethod
    def default() -> Gpus:
        return Gpus()

    def read(self, output: list[str]) -> Gpus:
        return gpus.parse(output)


class OwnPipSources(OwnFact[bool]):
    """Whether pip on the host has been given an index, or wheels, of its own: these then decide."""

    def command(self) -> str:
        files = "/etc/pip.conf /etc/xdg/pip/pip.conf /root/.config/pip/pip.conf /root/.pip/pip.conf"
        return f"cat {files} 2>/dev/null | grep -E '^ *(find-links|index-url) *=' || true"

    @staticmethod
    def default() -> bool:
        return False

    def read(self, output: list[str]) -> bool:
        return any(line.strip() for line in output)


class System(NamedTuple):
    """A distribution, the name of its release, and the machine as `uname -m` says it: debian, bookworm, x86_64.

    Empty: it does not say.
    """

    name: str = ""
    codename: str = ""
    machine: str = ""


class Distribution(OwnFact[System]):
    """The distribution and machine of the host."""

    def command(self) -> str:
        return "[ ! -e /etc/os-release ] || . /etc/os-release; echo $ID,$VERSION_CODENAME,$(uname -m)"

    @staticmethod
    def default() -> System:
        return System()

    def read(self, output: list[str]) -> System:
        return System(*output[0].split(","))
