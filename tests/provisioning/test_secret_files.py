"""Secrets in public places are refused, with advice, and without being shown."""

from typing import Any

import pytest

from deploys import operator
from deploys.inventory import commits, planning, secret_files, validation
from deploys.inventory.host_plan import HostEntry
from worker.errors import SettingsError

PASSWORD = "hunter2hunter2"
IN_URL = f"https://bot:{PASSWORD}@example.org/x"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{PASSWORD}\n-----END RSA PRIVATE KEY-----\n"


def entry(**data: Any) -> HostEntry:
    return HostEntry("gpu-3", ("workers",), {"slots": 1, "swarm_enabled": False, **data})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"release_repository": IN_URL}, "release_repository: has a name or password in its URL"),
        (
            {"release_repository": IN_URL.upper()},
            "release_repository: has a name or password in its URL",
        ),
        ({"torch_index": IN_URL}, "torch_index: has a name or password in its URL"),
        ({"chain_account_url": IN_URL}, "chain_account_url: has a name or password in its URL"),
        (
            {"tailscale": True, "tailscale_login_server": IN_URL},
            "tailscale_login_server: has a name or password in its",
        ),
        (
            {"tailscale": True, "tailscale_auth_key_file": f"tskey-auth-{PASSWORD}"},
            (
                "tailscale_auth_key_file: is a secret itself, not shown here; put it into a file"
                " that only you can read"
            ),
        ),
        (
            {"hub_repo": "me", "hub_token_file": f"hf_{PASSWORD}"},
            "hub_token_file: is a secret itself, not shown here",
        ),
        (
            {"hub_repo": "me", "slots": [{"hub_token_file": f"hf_{PASSWORD}"}]},
            "slot 0: hub_token_file: is a secret itself, not shown here",
        ),
        (
            {"model_name": "me/x", "model_token_file": f"hf_{PASSWORD}"},
            "model_token_file: is a secret itself, not shown here",
        ),
        (
            {"model_name": "me/x", "slots": [{"model_token_file": f"hf_{PASSWORD}"}]},
            "slot 0: model_token_file: is a secret itself, not shown here",
        ),
        (
            {"tracking_wandb": "online", "tracking_wandb_key_file": "0123456789" * 4},
            "tracking_wandb_key_file: is a secret itself, not shown here",
        ),
        (
            {"tracking_wandb": "online", "tracking_wandb_key_file": f"wandb_v1_{PASSWORD}"},
            "tracking_wandb_key_file: is a secret itself, not shown here",
        ),
        ({"slots": [{"identity": PEM}]}, "slot 0: identity: is a secret itself, not shown here"),
    ],
)
def test_secret_in_an_inventory_is_refused_and_not_shown(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        validation.check([entry(**data)])
    said = str(refused.value)
    assert said.startswith(f"inventory data of gpu-3: {message}")
    assert PASSWORD not in said.lower()
    assert "0123456789" not in said


def test_password_in_the_address_of_a_slots_own_account_service_is_refused_and_not_shown() -> None:
    plans = validation.check([entry(slots=[{}, {"chain_account_url": IN_URL}])])
    (line,) = planning._shown_passwords(plans)
    assert line.startswith(
        "inventory data of gpu-3: slot 1: chain_account_url: has a name or password in its URL"
    )
    assert PASSWORD not in line


def test_password_in_origin_is_refused_before_it_gets_to_a_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A release comes from `origin` if the inventory names no repository."""
    monkeypatch.setattr(operator, "origin", lambda checkout, source: IN_URL)
    with pytest.raises(SettingsError) as refused:
        commits.look_up([entry(release_ref="0" * 40)], 5)
    assert "release_repository: not set, and origin of" in str(refused.value)
    assert "set release_source to wheelhouse" in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_names_of_files_and_addresses_without_secrets_are_none() -> None:
    for name in (
        "secrets/hub.token",
        "hf_token.txt",
        "hf_my_own_token",
        "/root/tskey",
        "keys/swarm.pem",
    ):
        assert not secret_files.is_secret(name)
    for url in (
        "https://example.org/a@b",
        "git@example.org:x.git",
        "/srv/a@b",
        "http://10.0.0.1:3000",
        None,
    ):
        assert not secret_files.shows_password(url)
