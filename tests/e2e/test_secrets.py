"""No process gives a secret away: in its log, files, arguments, figures, pages or errors.

A whole swarm runs with planted and generated secrets, and with servers that quote what they were
sent. Afterwards everything that it showed is searched for each secret. Its logs are JSON, by the
setting.
"""

import base64
import http.server
import json
import re
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from tests.account.visitor import Visitor
from tests.e2e.test_registered import wait_until
from worker.commands.demo import Demo
from worker.commands.demo_processes import Children
from worker.runtime.state_dir import StateDir
from worker.telemetry import status

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(420)]

PATIENCE_SECONDS = 150.0
PLANTED = {
    "smtp": "planted-smtp-password-3f9c",
    "oidc": "planted-oidc-client-secret-77aa",
    "hub": "hf_plantedTokenOfTheHub0123456789",
    "wandb": "planted-key-of-weights-and-biases-40",
    "address": "planted-address-password-51",
}
# The provider's public key: that of the private key 1.
KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY",
    "y": "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU",
}
KINDS = {"chain", "account", "bootnode", "keeper", "dashboard", "judge", "worker-0"}


class SecretDemo(Demo):
    """A demo whose processes have every secret that settings can name."""

    echo_port = smtp_port = 0

    def _settings(self, flat: dict[str, Any]) -> Any:
        return super()._settings({"log_format": "json", "log_level": "DEBUG", **flat})

    def _write(self, role: str, flat: dict[str, Any]) -> Path:
        echo = f"http://someone:{PLANTED['address']}@127.0.0.1:{self.echo_port}"
        own: dict[str, Any] = {
            "account": {
                "account_smtp_host": "127.0.0.1",
                "account_smtp_port": self.smtp_port,
                "account_smtp_security": "none",
                "account_smtp_user": "someone",
                "account_smtp_password_file": str(self.secret("smtp")),
                "account_oidc_issuer": f"http://127.0.0.1:{self.echo_port}",
                "account_oidc_client_id": "hivewright",
                "account_oidc_client_secret_file": str(self.secret("oidc")),
            },
            "worker-0": {
                "hub_repo": "someone/model",
                "hub_token_file": str(self.secret("hub")),
                "hub_endpoint": echo,
                "hub_every_rounds": 1,
                "tracking_wandb_key_file": str(self.secret("wandb")),
            },
        }
        return super()._write(role, {**flat, **own.get(role, {})})

    def secret(self, name: str) -> Path:
        file = self.output / f"{name}.secret"
        file.write_text(PLANTED[name] + "\n")
        file.chmod(0o600)
        return file


def secrets_of(output: Path) -> dict[str, str]:
    """Return the planted secrets, and those that the processes made, by where they are from."""
    found = dict(PLANTED)
    files = [output / "enrolment.token", output / "account.passphrase"]
    for pattern in ("**/*.key", "**/*.token", "**/wallet/*", "**/token.secret", "**/*.pem"):
        files += output.glob(pattern)
    for file in files:
        # A key in PEM has several lines; each is as secret as all.
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            if len(line) >= 16 and not line.startswith("-----"):
                found[f"{file.relative_to(output)}: {line[:4]}"] = line.removeprefix("0x")
    return found


def ask(url: str, body: bytes | None = None) -> str:
    """Return an answer with its headers, whatever its status is."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return f"{answer.headers}\n{answer.read().decode(errors='replace')}"
    except urllib.error.HTTPError as error:
        return f"{error.headers}\n{error.read().decode(errors='replace')}"


def pages(output: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of pages, of errors, and of figures that the processes serve."""
    for role in ("account", "dashboard", "judge"):
        url = (output / role / "address").read_text().strip()
        for path in ("/", "/no-such-page", "/%2e%2e/etc", "/api/swarm", "/api/fleet", "/sign-in"):
            yield f"{role}{path}", ask(url + path)
        for path in ("/rpc", "/api/enrol", "/sign-in/email", "/request-question/"):
            yield f"{role} POST {path}", ask(url + path, b'{"email": "ada@example.org", "x": [')
    yield from sign_ins((output / "account/address").read_text().strip())
    for group in json.loads((output / "targets.json").read_text()):
        (address,) = group["targets"]
        yield f"metrics of {group['labels']['service']}", ask(f"http://{address}/metrics")


def sign_ins(url: str) -> Iterator[tuple[str, str]]:
    """Yield the pages of a person whose code can't be sent, and whom the provider refuses."""
    visitor = Visitor(url)
    yield "a code by mail", visitor.begin("ada@example.org").text
    place = visitor.to_provider()
    (state,) = parse_qs(urlsplit(place).query)["state"]
    back = visitor.get(f"/sign-in/openid/callback?code=x&state={state}")
    assert "refused" in back.text
    yield "an answer of the provider", back.text


class _Echo(http.server.BaseHTTPRequestHandler):
    """A provider of OpenID Connect, and a Hub, whose errors quote all that they were sent."""

    def do_GET(self) -> None:
        own = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        configuration = {
            "issuer": own,
            "authorization_endpoint": f"{own}/authorize",
            "token_endpoint": f"{own}/token",
            "jwks_uri": f"{own}/keys",
        }
        known = {"/.well-known/openid-configuration": configuration, "/keys": {"keys": [KEY]}}
        self._answer(200 if self.path in known else 400, known.get(self.path) or self._quoted())

    def do_POST(self) -> None:
        self._answer(400, self._quoted())

    def _quoted(self) -> dict[str, str]:
        kind, _, word = self.headers.get("Authorization", "").partition(" ")
        said = base64.b64decode(word).decode() if kind == "Basic" else word
        return {"error": f"wrong secret: {said}", "message": said}

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Message", str(content)[:200])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _EchoMail(socketserver.StreamRequestHandler):
    """A mail server that refuses each password, and quotes it."""

    def handle(self) -> None:
        self.wfile.write(b"220 mail\r\n")
        while line := self.rfile.readline().decode().strip():
            verb, *words = line.split()
            verb = verb.upper()
            if verb == "EHLO":
                self.wfile.write(b"250-mail\r\n250 AUTH PLAIN\r\n")
            elif verb == "AUTH":
                said = base64.b64decode(words[1]).replace(b"\0", b" ")
                self.wfile.write(b"535 5.7.8 no such login:" + said + b"\r\n")
            else:
                self.wfile.write(b"221 bye\r\n")


@contextmanager
def echoing() -> Iterator[list[int]]:
    """Run both servers, which quote secrets, on loopback; yield their ports."""
    with ExitStack() as stack:
        ports = []
        for handler in (_Echo, _EchoMail):
            server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            server.server_port = server.server_address[1]  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            ports.append(int(server.server_address[1]))
        yield ports


def arguments_of(children: Children) -> Iterator[tuple[str, str]]:
    """Yield the command lines of all processes, and of those that they started."""
    for name, child in children.by_name.items():
        if child.is_running:
            pids = [child.process.pid, *descendants(child.process.pid)]
            for pid in pids:
                yield f"arguments of {name}", Path(f"/proc/{pid}/cmdline").read_text()


def descendants(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


def commands(output: Path) -> Iterator[tuple[str, str]]:
    """Yield what commands for people print about the node, and the files that they write."""
    file = output / "settings/worker-0.yaml"
    report, bundle = output / "node.html", output / "support.tar.gz"
    for words in (
        ["status"],
        ["status", "--json"],
        ["status", "--metrics"],
        ["ledger", "--json"],
        ["report", "--output", str(report)],
        ["doctor", "--bundle", str(bundle)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "worker", *words, "--settings", str(file)],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        yield f"hivewright {words}", done.stdout + done.stderr
    yield "report", report.read_text()
    unpacked = subprocess.run(
        ["tar", "--extract", "--to-stdout", "--file", bundle], capture_output=True, check=True
    )
    yield "bundle", unpacked.stdout.decode(errors="replace")


def files(output: Path) -> Iterator[tuple[str, str]]:
    """Yield the logs, and the files of state that others may read."""
    patterns = ("logs/*", "**/status.json", "**/rounds.jsonl", "settings/*", "targets.json")
    for pattern in patterns:
        for file in output.glob(pattern):
            yield str(file.relative_to(output)), file.read_text(errors="replace")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """Run a swarm until its worker has trained two rounds; return its folder and what it showed."""
    output = tmp_path_factory.mktemp("secrets") / "demo"
    demo = SecretDemo(output, 1, 10_000, 1, Console(quiet=True), has_market=True)
    output.mkdir()
    with echoing() as ports, Children(output / "logs") as children:
        demo.echo_port, demo.smtp_port = ports
        demo.start(children)
        history = StateDir(output / "worker-0").rounds

        def has_pushed() -> bool:
            children.require_healthy()
            found = status.read(output / "worker-0") if history.exists() else None
            return found is not None and found.hub is not None and found.hub.failures > 0

        wait_until(has_pushed, PATIENCE_SECONDS, "a round is trained, and a push was refused")
        assert children.by_name.keys() >= KINDS
        found = [*pages(output), *arguments_of(children)]
    return output, [*found, *commands(output), *files(output)]


def test_nothing_that_processes_show_has_a_secret_in_it(
    shown: tuple[Path, list[tuple[str, str]]],
) -> None:
    output, texts = shown
    secrets = secrets_of(output)
    assert len(secrets) > len(PLANTED) + 6, secrets.keys()
    for name, text in texts:
        for where, secret in secrets.items():
            # An address is written to settings as it is, and the files are for their role only.
            if not (name.startswith("settings/") and where == "address"):
                assert secret not in text, f"{name} shows the secret {where}"
    names = {name for name, _ in texts}
    assert {"report", "bundle", "metrics of keeper", "arguments of worker-0"} < names


def test_logs_are_json_by_the_setting(shown: tuple[Path, list[tuple[str, str]]]) -> None:
    output, _ = shown
    for name in KINDS:
        lines = (output / f"logs/{name}.log").read_text().splitlines()
        assert lines, name
        for line in lines:
            entry = json.loads(line)
            assert entry.keys() >= {"time", "level", "logger", "message"}, (name, line)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
