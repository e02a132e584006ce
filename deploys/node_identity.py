"""Install identities: the fleet's enrolment token, and a key per slot, made once on the host."""

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pyinfra import host
from pyinfra.api import StringCommand, operation

from deploys import host_files, locks, operator
from deploys.facts import ChosenModels, FileContent, Identities
from deploys.inventory.host_plan import Planned
from deploys.inventory.slots import Slot
from deploys.paths import CONFIGURATION, DEPLOYED, ENROLMENT_TOKEN, KEY_FILE, USER
from deploys.services import enrol_unit

ENROL_SECONDS = 180


def install_enrolment_token(plan: Planned) -> str:
    """Write the enrolment token to the host, if the fleet has one, and return its fingerprint.

    Only root can read it; systemd gives running services that need it a copy.
    """
    if plan.token is None:
        return ""
    text = f"{plan.token}\n".encode()
    host_files.file(
        name="Write the enrolment token", path=ENROLMENT_TOKEN, content=text, mode="600"
    )
    return operator.fingerprint(plan.token)


def with_token(digest: str, fingerprint: str) -> str:
    """Append the token's fingerprint to a service's digest; `replace_token` updates it there."""
    return f"{digest}-{fingerprint[:16]}" if fingerprint else digest


@operation()
def replace_token() -> Iterator[StringCommand]:
    """Replace the enrolment token by the one on standard input, and restart the account service."""
    account = "hivewright-account.service"
    script = f"""set -e
umask 077
[ -d {CONFIGURATION} ] || {{ echo 'nothing is deployed on this host' >&2; exit 1; }}
cat > {ENROLMENT_TOKEN}.new
[ -s {ENROLMENT_TOKEN}.new ] || {{ rm -f {ENROLMENT_TOKEN}.new; echo 'no token came' >&2; exit 1; }}
mv -T {ENROLMENT_TOKEN}.new {ENROLMENT_TOKEN}
[ -e {DEPLOYED}/{account} ] || exit 0
systemctl restart {account}
mark=$(sha256sum < {ENROLMENT_TOKEN} | cut -c 1-16)
sed "s/-.*//; s/$/-$mark/" {DEPLOYED}/{account} > {DEPLOYED}/.account.new
mv -T {DEPLOYED}/.account.new {DEPLOYED}/{account}
"""
    yield StringCommand(locks.held(script), _stdin=[standard_input()])


@cache
def standard_input() -> str:
    """Return pyinfra's standard input; cached, since pyinfra runs each operation twice."""
    return sys.stdin.read()


def restore_key(slot: Slot) -> None:
    """Restore the slot's key from the operator's file, if the inventory names one.

    Another key on the host is never overwritten.
    """
    if slot.identity is None:
        return
    path, key = slot.settings.node.state_dir / KEY_FILE, slot.identity.read_bytes()
    refuse_another_key(name=f"Look for another key of slot {slot.number}", path=path, key=key)
    host_files.file(
        name=f"Restore the key of slot {slot.number}",
        path=path,
        content=key,
        user=USER,
        group=USER,
        mode="600",
    )


@operation()
def refuse_another_key(
    path: Path,
    key: bytes,
) -> Iterator[str]:
    """Fail if the host has another key than this one."""
    found = host.get_fact(FileContent, path=str(path))
    if found is None or found.sha256 == hashlib.sha256(key).hexdigest():
        return
    yield (
        f"echo '{path} has another key than the inventory names (identity); move it away, or take"
        " identity out of the inventory' >&2; exit 1"
    )


@operation()
def enrol(slot: Slot) -> Iterator[str]:
    """Enrol the slot if it is not enrolled: make its key, if needed, and register it.

    A slot is enrolled again if the inventory named its model before and now sets `auto`.
    """
    lacks_model = slot.settings.model.name == "auto" and slot.number not in host.get_fact(
        ChosenModels
    )
    if slot.number in host.get_fact(Identities) and not lacks_model:
        host.noop(f"slot {slot.number} is enrolled")
        return
    unit = enrol_unit(slot.number)
    words = f"journalctl --no-pager --quiet --output=cat --lines=15 --unit={unit} >&2"
    yield f"systemctl daemon-reload && systemctl start {unit} || {{ {words}; exit 1; }}"
