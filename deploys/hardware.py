"""Facts about the machine: its GPUs, its distribution, and its pip configuration."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pyinfra.api import operation

from deploys import gpus
from deploys.facts import OwnFact
from deploys.gpus import Gpus
from worker.log import printable

_LONGEST_ERRORS = 300
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"


@operation()
def refuse_unfit(reason: str | None) -> Iterator[str]:
    """Fail before any change to the host if its facts contradict the inventory."""
    if reason is not None:
        yield f"echo {shlex.quote(reason)} >&2; exit 1"


class HostGpus(OwnFact[Gpus]):
    """The NVIDIA GPUs of the host."""

    def command(self) -> str:
        version = "s/.*CUDA[A-Z ]* Version *: *\\([0-9][0-9.]*\\).*/cuda \\1/p"
        smi, csv = "timeout 60 nvidia-smi", "--format=csv,noheader,nounits"
        # For cards that may be partitioned: the slices and the mode, unknown to drivers before MIG.
        rest = (
            f"{smi} -L 2>/dev/null | sed 's/^/list /'; {smi} --query-gpu=index,mig.mode.current"
            f" {csv} 2>/dev/null | sed -n 's/^[0-9]*, [A-Z].*/mig &/p'; sed -n \"s/^MemTotal:"
            f" *\\([0-9]*\\) kB/ram \\1/p\" /proc/meminfo; {smi} 2>/dev/null | sed -n '{version}' |"
            " head -n 1"
        )
        return (
            f"{gpus.FIND_TOOLS} [ ! -e /dev/dxg ] || echo dxg;"
            " if command -v nvidia-smi >/dev/null; then"
            f" if found=$({smi} --query-gpu={gpus.QUERY} {csv} 2>&1);"
            ' then echo "$found" | sed "s/^/gpu /";'
            ' else echo "$found" | sed "s/^[0-9][0-9]*, /gpu &/;t;s/^/problem /"; fi;'
            f" {rest};"
            " else for vendor in /sys/bus/pci/devices/*/vendor; do"
            f' [ "$(cat "$vendor" 2>/dev/null)" != {_NVIDIA} ]'
            f' || case "$(cat "${{vendor%vendor}}class")" in {_DISPLAY_CLASS}*) echo card;; esac;'
            " done; fi; true"
        )

    default = staticmethod(Gpus)

    def read(self, output: list[str]) -> Gpus:
        return gpus.parse(output)


class MissingParts(OwnFact[str | None]):
    """The reason why the host cannot run the services: no systemd, or no apt. None: it can."""

    def command(self) -> str:
        return (
            "[ -d /run/systemd/system ] || {"
            ' echo "systemd $(cat /proc/1/comm 2>/dev/null)"; uname -r | sed "s/^/kernel /";'
            " { [ ! -e /.dockerenv ] || echo docker; [ ! -e /run/.containerenv ] || echo podman;"
            " tr '\\0' '\\n' < /proc/1/environ | sed -n 's/^container=//p'; } 2>/dev/null"
            ' | head -n 1 | sed "s/^/container /"; };'
            " command -v apt-get >/dev/null || echo apt"
        )

    def read(
        self,
        output: list[str],
    ) -> str | None:
        found = dict(line.partition(" ")[::2] for line in output if line)
        reasons = [_without_systemd(found)] if "systemd" in found else []
        if "apt" in found:
            reasons.append(
                "there is no apt-get; expected a Debian or Ubuntu: make another host of this one"
            )
        return "; ".join(reasons) or None


def _without_systemd(found: Mapping[str, str]) -> str:
    """Return the refusal of a host without systemd; `found` is the output of `MissingParts`."""
    init = f"its first process is {found['systemd'] or 'unknown'}"
    if "microsoft" in found.get("kernel", "").lower():
        advice = (
            "it is WSL2: write [boot] and systemd=true into /etc/wsl.conf there, run `wsl"
            " --shutdown` in Windows, and start it again"
        )
    elif kind := found.get("container"):
        advice = (
            f"it is a container ({kind}): name the machine that runs it in the inventory instead,"
            " or a container that boots systemd (LXC, Incus, systemd-nspawn)"
        )
    else:
        advice = (
            "boot it with systemd, or, if it is a container or a chroot, name the machine itself"
        )
    return (
        f"systemd does not run there ({init}), and hivewright's services are systemd units;"
        f" {advice}"
    )


class CloudInitErrors(OwnFact[str | None]):
    """Errors of cloud-init in the host's first boot; None: no errors, or no cloud-init."""

    def command(self) -> str:
        return "cat /run/cloud-init/result.json 2>/dev/null || true"

    def read(
        self,
        output: list[str],
    ) -> str | None:
        errors = json.loads("\n".join(output))["v1"]["errors"]
        text = printable("; ".join(map(str, errors)))
        return text[:_LONGEST_ERRORS] or None


class OwnPipSources(OwnFact[bool]):
    """True if the host's pip has an index or wheels of its own, which take precedence."""

    def command(self) -> str:
        files = "/etc/pip.conf /etc/xdg/pip/pip.conf /root/.config/pip/pip.conf /root/.pip/pip.conf"
        return f"cat {files} 2>/dev/null | grep -E '^ *(find-links|index-url) *=' || true"

    default = staticmethod(bool)

    def read(self, output: list[str]) -> bool:
        return any(line.strip() for line in output)


class System(NamedTuple):
    """Distribution, release and machine, such as debian, bookworm, x86_64; empty if unknown."""

    name: str = ""
    codename: str = ""
    machine: str = ""


class Distribution(OwnFact[System]):
    """The distribution and machine of the host."""

    def command(self) -> str:
        return (
            "[ ! -e /etc/os-release ] || . /etc/os-release; echo $ID,$VERSION_CODENAME,$(uname -m)"
        )

    default = staticmethod(System)

    def read(self, output: list[str]) -> System:
        return System(*output[0].split(","))
