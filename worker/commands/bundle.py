"""The support bundle of `hivewright doctor`: one file that is safe to share.

It contains settings, findings, state and the end of the log, without credentials (tokens, passwords
in URLs, private keys). Addresses, peer ids and numbers are not removed.
"""

import importlib.metadata
import io
import json
import platform
import re
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worker import settings
from worker.errors import ResourceError
from worker.log import HIDDEN, discreet
from worker.runtime.state_dir import StateDir
from worker.settings import Settings

STATE_FILES = (StateDir.status, StateDir.budget, StateDir.model_choice, StateDir.enrolment)
NUM_ROUNDS = 200
NUM_LOG_BYTES = 500_000
MIN_SECRET_CHARACTERS = 8
"""Shorter secrets are not redacted, because that would hide ordinary words too."""
LOGS = Path("/var/log/hivewright")
PACKAGES = ("torch", "transformers", "hivemind", "reasoning-gym", "web3", "pyinfra")

_SECRETS = (
    # Prefixes of tokens of Hugging Face, Tailscale, GitHub and GitLab, and HTTP headers.
    (
        re.compile(
            r"\b(hf_|tskey-[a-z]+-|gh[a-z]_|github_pat_|glpat-|sk-|Bearer\s+|Basic\s+)"
            r"[A-Za-z0-9._~+/-]{8,}=*"
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        HIDDEN,
    ),
    # A private key of the chain. The hash of a transaction has the same form and is hidden too.
    (re.compile(r"\b(0x)?[0-9a-fA-F]{64}\b"), HIDDEN),
)


def write(
    file: Path,
    node_settings: Settings,
    findings: Sequence[Mapping[str, Any]],
) -> None:
    """Write the bundle, a .tar.gz. Raises ResourceError if that fails."""
    known = _known_secrets(node_settings)
    rounds = _read(StateDir(node_settings.node.state_dir).rounds).splitlines(keepends=True)
    texts = {
        "findings.json": json.dumps(findings, indent=2),
        "settings.yaml": settings.dump(node_settings),
        "versions.json": json.dumps(_versions(), indent=2),
        "nvidia-smi.txt": _nvidia_smi(),
        StateDir.rounds: "".join(rounds[-NUM_ROUNDS:]),
        "log.txt": _log_tail(node_settings, known),
    }
    texts |= {name: _read(node_settings.node.state_dir / name) for name in STATE_FILES}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, text in texts.items():
            content = redact(text, known).encode()
            entry = tarfile.TarInfo(f"hivewright-support/{name}")
            entry.size, entry.mtime = len(content), int(time.time())
            tar.addfile(entry, io.BytesIO(content))
    try:
        file.write_bytes(stream.getvalue())
    except OSError as error:
        raise ResourceError(
            f"{file}: can't be written: {error.strerror}; name another place with --bundle"
        ) from None


def redact(
    text: str,
    known: Sequence[str] = (),
) -> str:
    """Return `text` without secrets: the `known` ones, and text that looks like one."""
    # The longest first: if a part of a secret were replaced before it, the rest would be shown.
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = discreet(text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _known_secrets(node_settings: Settings) -> list[str]:
    """Return the node's tokens, as far as this user may read them."""
    token = (
        node_settings.chain.account_token_file
        or StateDir(node_settings.node.state_dir).account_token
    )
    files = [
        token,
        node_settings.chain.enrolment_token_file,
        node_settings.hub.token_file,
        node_settings.tracking.wandb_key_file,
    ]
    secrets = [_read(file).strip() for file in files if file is not None]
    return [secret for secret in secrets if len(secret) >= MIN_SECRET_CHARACTERS]


def _versions() -> dict[str, str]:
    versions = {"system": platform.platform(), "python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()  # None: it is damaged
        if name in PACKAGES:
            versions[name] = distribution.version
    return versions


def _nvidia_smi() -> str:
    try:
        process = subprocess.run(
            ["nvidia-smi"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
        return process.stdout
    except FileNotFoundError:
        return "no nvidia-smi\n"
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer within 20 s\n"


def _log_tail(node_settings: Settings, known: Sequence[str]) -> str:
    """Return the end of the slot's log file, if the deploy's units write one.

    It is redacted before it is cut, because the cut may be inside a secret.
    """
    slot = node_settings.node.state_dir.name
    file = LOGS / slot / f"hivewright-{slot.replace('-', '@')}.log"
    text = redact(_read(file), known)
    return text[-NUM_LOG_BYTES:] if text else f"no {file}\n"


def _read(file: Path) -> str:
    """Return the text; empty if the file is missing or not readable."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
