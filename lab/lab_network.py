"""The lab's network: one namespace per host, and a bridge in the operator's namespace.

There is no route out. In the machine's own namespace a packet to 10.88.x.x without a route would
leave the machine; here it cannot.
"""

from collections.abc import Sequence
from pathlib import Path

from lab.process import LabError, run

OPERATOR_ADDRESS = "10.88.0.1"


def host_address(number: int) -> str:
    return f"10.88.0.{10 + number}"


class Network:
    """The namespaces of the lab `name`.

    NAME-op contains the bridge and the operator; NAME-h1, NAME-h2 ... contain one host each.
    """

    def __init__(self, name: str, prefix: str = "10.88.0") -> None:
        """Describe a network; `prefix` is the first three numbers of all addresses (a /24)."""
        self.name = name
        self.operator = f"{name}-op"
        self._prefix = prefix

    def host(self, number: int) -> str:
        return f"{self.name}-h{number}"

    def make(self) -> None:
        run("ip", "netns", "add", self.operator)
        self._ip(self.operator, "link set lo up")
        self._ip(self.operator, "link add br0 type bridge")
        self._ip(self.operator, f"addr add {self._prefix}.1/24 dev br0")
        self._ip(self.operator, "link set br0 up")

    def add_host(self, number: int) -> None:
        namespace, link = self.host(number), f"vh{number}"
        run("ip", "netns", "add", namespace)
        self._ip(namespace, "link set lo up")
        self._ip(self.operator, f"link add {link} type veth peer name eth0 netns {namespace}")
        self._ip(self.operator, f"link set {link} master br0 up")
        self._ip(namespace, f"addr add {self.address(number)}/24 dev eth0")
        self._ip(namespace, "link set eth0 up")

    def address(self, number: int) -> str:
        return f"{self._prefix}.{10 + number}"

    def split(self, numbers: Sequence[int]) -> None:
        """Move these hosts to a second bridge that is not connected to the first."""
        if not run("ip", "-n", self.operator, "link", "show", "br1", check=False).stdout:
            self._ip(self.operator, "link add br1 type bridge")
            self._ip(self.operator, "link set br1 up")
        for number in numbers:
            self._ip(self.operator, f"link set vh{number} master br1")

    def heal(self, numbers: Sequence[int]) -> None:
        """Move hosts back to the first bridge."""
        for number in numbers:
            self._ip(self.operator, f"link set vh{number} master br0")

    def shield(
        self,
        number: int,
        banned: Sequence[int] = (),
    ) -> None:
        """Install a firewall that allows only outgoing connections, none with `banned` hosts."""
        drops = [
            f"ip saddr {self.address(n)} drop\nip daddr {self.address(n)} drop" for n in banned
        ]
        chains = {
            "input": [
                "policy drop",
                *drops,
                "ct state established,related accept",
                'iif "lo" accept',
            ],
            "output": ["policy accept", *drops],
        }
        bodies = (
            "\n".join([f"chain {hook} {{", f"type filter hook {hook} priority 0", *lines, "}"])
            for hook, lines in chains.items()
        )
        rules = "\n".join(["table inet shield {", *bodies, "}"])
        run("ip", "netns", "exec", self.host(number), "nft", "-f", "-", stdin=rules)

    def set_link(self, number: int, up: bool) -> None:
        """Connect or disconnect a host."""
        self._ip(self.operator, f"link set vh{number} {'up' if up else 'down'}")

    def remove(self) -> None:
        """Remove this lab's namespaces, also after a crash; veth pairs and bridge go with them."""
        for file in Path("/run/netns").glob(f"{self.name}-*"):
            if file.name == self.operator or file.name.removeprefix(f"{self.name}-h").isdecimal():
                run("ip", "netns", "del", file.name)

    def inside(self, *argv: str | Path) -> list[str]:
        """Return `argv` as a command that runs in the operator's namespace."""
        return ["ip", "netns", "exec", self.operator, *map(str, argv)]

    def _ip(self, namespace: str, command: str) -> None:
        run("ip", "-n", namespace, *command.split())


def current_lab() -> str:
    """Return the lab whose operator this process is. Raises LabError if there is none."""
    namespace = run("ip", "netns", "identify").stdout.strip()
    if not namespace.endswith("-op"):
        raise LabError(
            "not in the lab's network; put `ip netns exec lab-op` before the command, or use `make"
            " fleet`"
        )
    return namespace.removesuffix("-op")
