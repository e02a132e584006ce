"""What a compromised worker on the coordinator's host can reach, and what it cannot.

The units are those of a deploy; chain and contract are real, from the checkout. Instead of the
worker a program runs that tries, as its user and with its confinement.
"""

import re
import shutil
from collections.abc import Iterator

import pytest

from deploys import units
from deploys.paths import CURRENT
from deploys.services import WORKER_UNIT
from lab.lab import Lab
from lab.lab_host import CHECKOUT, Host
from lab.process import wait_until
from worker import settings

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]

STATE = "/var/lib/hivewright"
ASK = """import http.client, json, socket, sys
socket.setdefaulttimeout(3)
def post(connection, method, params):
    call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    connection.request("POST", "/", json.dumps(call), {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())
class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/var/lib/hivewright/chain/rpc/chain.sock")
zero = "0x" + "00" * 20
answers = 0
for port in range(1, 65536):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
                found = post(connection, "web3_clientVersion", [])
            except (OSError, ValueError, http.client.HTTPException):
                continue
            answers += "anvil" in str(found)
print("probe: anvils at a port", answers, flush=True)
for method, params in (("eth_chainId", []), ("anvil_impersonateAccount", [zero])):
    try:
        answer = list(post(Unix("localhost"), method, params))
        print("probe:", method, "through the socket", answer, flush=True)
    except OSError as error:
        print("probe:", method, "through the socket", type(error).__name__, flush=True)
for address in ("169.254.169.254", "fd00:ec2::254"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.settimeout(2)
        answers = probe.connect_ex((address, 80)) == 0
        print("probe: metadata", address, "answers", answers, flush=True)
print("probe: done", flush=True)
"""


METADATA = ("169.254.169.254/32", "fd00:ec2::254/128")
CHAIN = {
    "chain": {
        "anvil": {"state_file": f"{STATE}/chain/state.json", "binary": f"{CURRENT}/anvil/anvil"}
    },
    "keeper": {
        "keeper": {"state_dir": f"{STATE}/keeper"},
        "anvil": {"state_file": f"{STATE}/chain/state.json"},
        "chain": {"deployment_file": f"{STATE}/keeper/deployment.json"},
    },
    "account": {
        "account": {"state_dir": f"{STATE}/account"},
        "chain": {"deployment_file": f"{STATE}/keeper/deployment.json"},
    },
}


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """A host with chain, contract and account service in the deploy's units."""
    host = lab.host(4)
    current = host.root / str(CURRENT).lstrip("/")
    host.ssh(
        "id hivewright >/dev/null 2>&1 || useradd --system --no-create-home hivewright;"
        f" rm -rf {CURRENT}; mkdir -p"  # a deploy of another test made it a link
        f" {CURRENT} /etc/hivewright {STATE} /var/cache/hivewright /var/log/hivewright; touch"
        " /etc/hivewright/enrolment.token; ln -sfn /opt/hivewright/environments/*"
        f" {CURRENT}/environment; ln -sfn /opt/hivewright/anvil/* {CURRENT}/anvil; for address in"
        f" {' '.join(METADATA)}; do ip address add $address dev lo 2>/dev/null; done; systemd-run"
        " --quiet --unit=metadata4 python3 -m http.server 80 --bind 169.254.169.254; systemd-run"
        " --quiet --unit=metadata6 python3 -m http.server 80 --bind fd00:ec2::254"
    )
    for name in ("worker", "deploys"):
        shutil.copytree(
            CHECKOUT / name, current / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for role, raw in CHAIN.items():
        text = settings.dump(settings.parse(raw, "test"))
        (host.root / f"etc/hivewright/{role}.yaml").write_text(text)
    (host.root / "opt/ask.py").write_text(ASK)
    yield host
    host.ssh(
        "systemctl stop 'wall-*' metadata4 metadata6; rm -f /etc/systemd/system/wall-*",
        check=False,
        timeout=120,
    )
    host.ssh(
        f"systemctl daemon-reload; rm -rf {STATE} {CURRENT}; ip address flush dev lo scope link",
        check=False,
    )


def installed(host: Host, unit: str, **changes: str) -> str:
    """Install the deploy's unit under another name; return it. `changes`: other values of keys."""
    version = int(host.ssh("systemctl --version").stdout.split()[1])
    text = units.render(unit, version, 900).replace("hivewright-", "wall-")
    for key, value in changes.items():
        text = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", text)
    name = unit.replace("hivewright-", "wall-")
    (host.root / "etc/systemd/system" / name).write_text(text)
    host.ssh("systemctl daemon-reload")
    return name.replace("@.", "@0.")


def probed(host: Host, unit: str, **changes: str) -> list[str]:
    """Return the output of ASK in place of the service of `unit`."""
    name = installed(
        host, unit, ExecStart="/usr/bin/python3 /opt/ask.py", Type="exec", Restart="no", **changes
    )
    host.ssh(f"journalctl --rotate --vacuum-time=1s; systemctl restart {name}", timeout=100)

    def said() -> list[str]:
        shown = host.ssh(
            f"journalctl --no-pager --output=cat --unit={name} | grep '^probe:'", check=False
        )
        return shown.stdout.splitlines()

    wait_until(lambda: "probe: done" in said(), 120, "the probe is done")
    return said()


def start_chain(host: Host, **changes: str) -> None:
    for unit in ("hivewright-chain.service", "hivewright-contract.service"):
        name = installed(host, unit, **(changes if "chain" in unit else {}))
        host.ssh(
            f"systemctl restart {name} || {{ journalctl -n 30 -u {name} >&2; exit 1; }}",
            timeout=200,
        )


def test_worker_that_was_taken_over_does_not_reach_the_chain_nor_metadata(host: Host) -> None:
    start_chain(host)
    assert probed(host, WORKER_UNIT) == [
        "probe: anvils at a port 0",
        "probe: eth_chainId through the socket FileNotFoundError",
        "probe: anvil_impersonateAccount through the socket FileNotFoundError",
        "probe: metadata 169.254.169.254 answers False",
        "probe: metadata fd00:ec2::254 answers False",
        "probe: done",
    ]


@pytest.mark.nightly
def test_without_the_walls_it_would(host: Host) -> None:
    """Without these settings the worker reaches the chain, so they are what protects it."""
    start_chain(host, PrivateNetwork="no")
    said = probed(host, WORKER_UNIT, IPAddressDeny="")
    assert said[0] == "probe: anvils at a port 2"  # anvil's own, and the door's
    assert said[3:5] == [
        f"probe: metadata {each.partition('/')[0]} answers True" for each in METADATA
    ]


@pytest.mark.nightly
def test_account_service_reaches_the_chain_and_no_method_that_controls_it(host: Host) -> None:
    start_chain(host)
    said = probed(host, "hivewright-account.service")
    assert said[:3] == [
        "probe: anvils at a port 0",
        "probe: eth_chainId through the socket ['jsonrpc', 'id', 'result']",
        "probe: anvil_impersonateAccount through the socket ['jsonrpc', 'id', 'error']",
    ]
    name = installed(host, "hivewright-account.service")
    host.ssh(f"systemctl restart {name}", timeout=100)
    read = (
        "import urllib.request as r; print(r.urlopen('http://127.0.0.1:3000/api/swarm',"
        " timeout=10).read().decode())"
    )
    answer = host.ssh(f'python3 -c "{read}"').stdout
    assert '"chain_id": 31337' in answer
