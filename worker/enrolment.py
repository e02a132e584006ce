"""Enrolment: create a node's key, get its token and account, and choose its model.

Running it again changes nothing. A worker that is not enrolled stops with a message; it never
creates a key itself.
"""

import argparse
import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from worker.errors import IdentityError, SettingsError
from worker.runtime import host
from worker.runtime.files import LINE, read_secret, write_whole
from worker.runtime.state_dir import StateDir
from worker.settings import Settings
from worker.swarm import identity


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The result of enrolment. `registered`: whether the node has an account on the chain."""

    peer_id: str
    registered: bool


def run(
    settings: Settings,
    options: argparse.Namespace | None = None,
) -> None:
    """Enrol the node of `settings`: create its key if missing, and register it on the chain.

    With `options.move` it is also moved from another account, such as that of the swarm's former
    account service. Raises IdentityError if another account registered the key, ChainUnreachable if
    the account service is silent, ModelError if the settings leave the model to the machine
    (`auto`) and none fits.
    """
    folder = settings.node.state_dir
    host.require_disk(folder, settings.node.min_free_disk_mb)
    key_file = StateDir(folder).identity
    registered = _has_chain(settings)
    node_identity = identity.load(key_file) if key_file.exists() else identity.create(key_file)
    model = _model(settings, node_identity.peer_id)
    if registered:
        from worker.chain import registration, wallet

        if settings.chain.wallet_dir is not None:
            print(f"wallet {wallet.create(settings.chain)} in {settings.chain.wallet_dir}")
        move = options is not None and options.move
        token = _enrolment_token(settings)
        registration.enrol(node_identity, token, settings.chain, folder, move)
    enrolment = Enrolment(node_identity.peer_id, registered)
    write_whole(StateDir(folder).enrolment, json.dumps(asdict(enrolment), indent=2) + "\n")
    print(
        f"enrolled {enrolment.peer_id} ({identity.animal_name(enrolment.peer_id)}) in {folder},"
        f" model {model}"
    )


def _model(settings: Settings, peer_id: str) -> str:
    if settings.model.name != "auto":
        return settings.model.name
    # This imports torch to measure the machine; it is not needed if the settings name a model.
    from worker.policy import model_sizing

    return model_sizing.decide(settings.model, settings.trainer, settings.node.state_dir, peer_id)


def _has_chain(settings: Settings) -> bool:
    """Return whether the node earns on a chain.

    Raises SettingsError for a chain without a signer for the node.
    """
    chain = settings.chain
    if chain.account_url is None and chain.wallet_dir is None and chain.rpc_url is not None:
        raise SettingsError(
            f"chain.rpc_url is {', '.join(chain.rpc_urls)}, but chain.account_url is not set;"
            " expected the address of the account service that signs for this node (or"
            " chain.wallet_dir, to sign itself), or neither for a node without a chain"
        )
    return chain.account_url is not None or chain.wallet_dir is not None


def load(settings: Settings) -> tuple[identity.Identity, Enrolment]:
    """Return the node's identity and enrolment, without creating anything.

    Raises IdentityError if they are missing or contradict each other, SettingsError for settings
    that a node enrolled like this can't follow.
    """
    folder = settings.node.state_dir
    node_identity = identity.load(StateDir(folder).identity)
    file = StateDir(folder).enrolment
    try:
        enrolment = TypeAdapter(Enrolment).validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        raise IdentityError(
            f"{file}: missing; this node's key was never enrolled; run `hivewright enrol`"
        ) from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise IdentityError(
            f"{file}: {reason}; expected what `hivewright enrol` writes; run it again"
        ) from None
    if enrolment.peer_id != node_identity.peer_id:
        raise IdentityError(
            f"{file}: enrolled {enrolment.peer_id}, but the key next to it is"
            f" {node_identity.peer_id}; put the key that was enrolled back, or remove this file and"
            " run `hivewright enrol`"
        )
    if enrolment.registered != _has_chain(settings):
        done = "with" if enrolment.registered else "without"
        chain = settings.chain
        wanted = f"chain.account_url is {chain.account_url or 'none'}"
        if chain.wallet_dir is not None:
            wanted = f"chain.wallet_dir is {chain.wallet_dir}"
        raise IdentityError(
            f"{file}: enrolled {done} an account service, but {wanted}; "
            "correct the settings, or run `hivewright enrol` with them"
        )
    if settings.swarm.only_registered and not enrolment.registered:
        raise SettingsError(
            "swarm.only_registered is set, but neither chain.account_url nor chain.wallet_dir is:"
            " without a chain this node would find nobody registered; set one and run `hivewright"
            " enrol`, or leave only_registered out"
        )
    return node_identity, enrolment


def _enrolment_token(settings: Settings) -> str | None:
    """Return the token; None if the settings name no file: a node with its own token needs none."""
    file = settings.chain.enrolment_token_file
    if file is None:
        return None
    expected = "the account service's enrolment token"
    return read_secret(file, expected, "chain.enrolment_token_file", LINE)
