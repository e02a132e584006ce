"""`hivewright fleet fetch-token` and `rotate-token`: the fleet's enrolment token."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nacl.public import PrivateKey

from deploys import operator
from deploys.backup_pack import KEY_PREFIX
from deploys.fleet import commands, queries
from deploys.fleet.pyinfra_process import CHECKOUT, Pyinfra
from deploys.inventory.host_plan import COORDINATORS
from deploys.inventory.schema import Deployment
from deploys.paths import ENROLMENT_TOKEN
from worker.errors import SettingsError, WorkerError


def fetch(options: argparse.Namespace) -> None:
    """Fetch the fleet's token from its hosts to the folder where a deploy looks for it."""
    pyinfra = Pyinfra.of_operator(options.inventory)
    hosts = pyinfra.hosts(timeout=commands.ASK_SECONDS)
    file = _folder(hosts) / operator.TOKEN_FILE
    names = [host["name"] for host in _coordinators_first(hosts)]
    key = PrivateKey.generate()
    fact = ["deploys.fleet_facts.SealedToken", f"key={KEY_PREFIX}{bytes(key.public_key).hex()}"]
    answers = queries.ask(pyinfra, fact, names, queries.FACT_SECONDS)
    (found,) = answers.values
    tokens = {
        name: _one_word(name, commands.opened(name, found[name], key))
        for name in names
        if found.get(name)
    }
    if not tokens:
        silent = f"; no answer from {', '.join(answers.reasons)}" if answers.reasons else ""
        raise WorkerError(
            f"none of {', '.join(names)} has an enrolment token{silent}; nothing was written"
        )
    source = next(iter(tokens))
    others = [name for name, token in tokens.items() if token != tokens[source]]
    if operator.enrolment_token(file.parent) == tokens[source]:
        print(f"{file}: is the token of {source} already")
    else:
        aside = operator.keep_token(file.parent, tokens[source])
        print(
            f"{file}: the enrolment token of"
            f" {source}{f'; the one before is in {aside}' if aside else ''}"
        )
    if others:
        raise WorkerError(
            f"{', '.join(others)}: another enrolment token than {source}; `hivewright fleet"
            f" rotate-token {pyinfra.inventory}` gives all hosts the same new one"
        )


def rotate(options: argparse.Namespace) -> None:
    """Make a new token and send it to all hosts, the coordinator first.

    Only the account service restarts.
    """
    pyinfra = Pyinfra.of_operator(options.inventory)
    pyinfra.breaks_locks = options.break_lock
    hosts = pyinfra.hosts(timeout=commands.ASK_SECONDS)
    folder = _folder(hosts)
    hubs = [host["name"] for host in hosts if COORDINATORS in host["groups"]]
    if not hubs:
        raise SettingsError(
            f"{pyinfra.inventory}: no coordinator; expected one, because only a fleet with its own"
            " coordinator can replace its token"
        )
    token = operator.rotate_token(folder)
    print(
        f"{folder / operator.TOKEN_FILE}: a new enrolment token; nodes that are enrolled keep"
        " theirs",
        flush=True,
    )
    others = [host["name"] for host in hosts if host["name"] not in hubs]
    try:
        for names in (hubs, others):
            commands.run_on_all(
                pyinfra, names, "deploys.node_identity.replace_token", stdin=f"{token}\n"
            )
    except WorkerError as error:
        raise WorkerError(f"{error}; a deploy gives these hosts the new token") from None


def _folder(hosts: Sequence[Mapping[str, Any]]) -> Path:
    default = Deployment.model_fields["secrets_dir"].default
    folders = {str(host["data"].get("secrets_dir", default)) for host in hosts}
    if len(folders) > 1:
        said = ", ".join(map(repr, sorted(folders)))
        raise SettingsError(f"secrets_dir: got {said} on different hosts; expected one for all")
    return CHECKOUT / folders.pop()


def _coordinators_first(hosts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(hosts, key=lambda host: COORDINATORS not in host["groups"])


def _one_word(name: str, content: bytes) -> str:
    words = content.decode(errors="replace").split()
    if len(words) != 1:
        raise WorkerError(f"{name}: {ENROLMENT_TOKEN} has {len(words)} words; expected one")
    return words[0]
