"""The lab's network: one namespace per host, a bridge in a namespace that the operator shares, no way out.

In the machine's own namespace a 10.88.x.x packet without a route would leave the machine; here it can't.
"""

from pathlib import Path

from tests.lab.process import LabError, run

OPERATOR_ADDRESS = "10.88.0.1"


def host_address(number: int) -> str:
    return f"10.88.0.{10 + number}"


class Network:
    """The namespaces of the lab `name`: NAME-op with bridge and operator, NAME-h1, NAME-h2 ... with one host each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.operator = f"{name}-op"

    def host(self, number: int) -> str:
        return f"{self.name}-h{number}"

    def make(self) -> None:
        run("ip", "netns", "add", self.operator)
        self._ip(self.operator, "link set lo up")
        self._ip(self.operator, "link add br0 type bridge")
        self._ip(self.operator, f"addr add {OPERATOR_ADDRESS}/24 dev br0")
        self._ip(self.operator, "link set br0 up")

    def add_host(self, number: int) -> None:
        namespace, link = self.host(number), f"vh{number}"
        run("ip", "netns", "add", namespace)
        self._ip(namespace, "link set lo up")
        self._ip(self.operator, f"link add {link} type veth peer name eth0 netns {namespace}")
        self._ip(self.operator, f"link set {link} master br0 up")
        self._ip(namespace, f"addr add {host_address(number)}/24 dev eth0")
        self._ip(namespace, "link set eth0 up")

    def set_link(self, number: int, up: bool) -> None:
        """Plug a host's cable in, or out."""
        self._ip(self.operator, f"link set vh{number} {'up' if up else 'down'}")

    def remove(self) -> None:
        """Remove what is there of this lab's namespaces, also after a crash; veth pairs and bridge go with them."""
        for file in Path("/run/netns").glob(f"{self.name}-*"):
            if file.name == self.operator or file.name.removeprefix(f"{self.name}-h").isdecimal():
                run("ip", "netns", "del", file.name)

    def inside(self, *argv: str | Path) -> list[str]:
        """`argv` as a command that runs in the operator's namespace."""
        return ["ip", "netns", "exec", self.operator, *map(str, argv)]

    def _ip(self, namespace: str, command: str) -> None:
        run("ip", "-n", namespace, *command.split())


def current_lab() -> str:
    """Name of the lab whose operator this process is. Raises LabError with what to do if it is nobody's."""
    namespace = run("ip", "netns", "identify").stdout.strip()
    if not namespace.endswith("-op"):
        raise LabError("not in the lab's network; put `ip netns exec lab-op` before the command, or use `make fleet`")
    return namespace.removesuffix("-op")
