"""Rules between the settings of a section, and the limits of single ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from worker import settings
from worker.errors import SettingsError

URL = "http://192.0.2.1:8545"
ADDRESS = "0x" + "1" * 40
PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
WALLET = {"wallet_dir": "/w", "wallet_password_file": "/p", "rpc_url": URL}
LOGIN_SERVER = {
    "account_api": "rl-swarm",
    "account_url": URL,
    "org_id": "me",
    "rpc_url": URL,
    "contract": ADDRESS,
}
OF_LOGIN_SERVER = "expected it, because a login server of RL Swarm does not tell it"


def without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def section(name: str, values: Mapping[str, Any]) -> Any:
    return getattr(settings.parse({name: dict(values)}, "test"), name)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "chain",
            {"submit_every_rounds": None},
            (
                "submit_every_rounds and submit_every_minutes are both None: nothing would ever be"
                " sent"
            ),
        ),
        (
            "chain",
            WALLET | {"account_url": URL},
            "account_url and wallet_dir are both set; expected only one of them, the signer",
        ),
        (
            "chain",
            without(WALLET, "wallet_password_file"),
            (
                "wallet_dir is set and wallet_password_file is not; expected a file with its"
                " password"
            ),
        ),
        (
            "chain",
            without(WALLET, "rpc_url"),
            (
                "wallet_dir is set, rpc_url and deployment_file are not; expected the chain of the"
                " wallet in one of them"
            ),
        ),
        *(
            (
                "chain",
                without(LOGIN_SERVER, key),
                f"account_api is rl-swarm and {key} is not set; {OF_LOGIN_SERVER}",
            )
            for key in ("account_url", "org_id", "rpc_url", "contract")
        ),
        (
            "account",
            {"oidc_issuer": URL},
            (
                "oidc_issuer is set and oidc_client_id is not; expected the client id that the"
                " provider gave"
            ),
        ),
        (
            "account",
            {"smtp_user": "me"},
            "smtp_user is set and smtp_password_file is not; expected a file with its password",
        ),
        (
            "dashboard",
            {"count_unaudited": False},
            "count_unaudited is false and audit_file is not set; expected the report of an audit",
        ),
        (
            "dashboard",
            {"show_fleet": True},
            "show_fleet is true and targets_file is not set; expected a file",
        ),
        (
            "hub",
            {"token_file": "/t"},
            "token_file is set and repo is not; expected repo: OWNER/NAME, or OWNER",
        ),
        (
            "tracking",
            {"wandb": "online"},
            "wandb is online and wandb_key_file is not set; expected a file",
        ),
        (
            "swarm",
            {"announce_interface": "wg0"},
            "announce_interface is set and port is 0; expected a port to announce",
        ),
        (
            "swarm",
            {"relay_others": True, "reachability": "private"},
            (
                "relay_others is set and reachability is private; expected reachability public,"
                " since a relay must be reachable"
            ),
        ),
        ("trainer", {"lr_scheduler_type": "linear"}, "lr_scheduler_type linear needs max_steps"),
        ("trainer", {"lr_scheduler_type": "cosine"}, "lr_scheduler_type cosine needs max_steps"),
        (
            "trainer",
            {"importance_sampling_clip_min": 3.0},
            (
                "importance_sampling_clip_min is 3; expected less than"
                " importance_sampling_clip_max, 3"
            ),
        ),
        *(
            (
                "trainer",
                {"importance_sampling_mode": mode, "importance_sampling_clip_max": None},
                (
                    f"importance_sampling_mode {mode} needs importance_sampling_clip_max or"
                    " importance_sampling_clip_min"
                ),
            )
            for mode in ("token_truncate", "sequence_truncate")
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    name: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        section(name, values)
    assert str(refused.value) == f"test: {name}: {message}"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("chain", {"submit_every_rounds": None, "submit_every_minutes": 0.5}),
        ("chain", WALLET),
        ("chain", without(WALLET, "rpc_url") | {"deployment_file": "/d"}),
        ("chain", LOGIN_SERVER),
        ("account", {"oidc_issuer": URL, "oidc_client_id": "me"}),
        ("account", {"smtp_user": "me", "smtp_password_file": "/p"}),
        ("account", {"smtp_password_file": "/p"}),
        ("dashboard", {"count_unaudited": False, "audit_file": "/a"}),
        ("dashboard", {"show_fleet": True, "targets_file": "/t"}),
        ("hub", {"token_file": "/t", "repo": "owner"}),
        ("tracking", {"wandb": "online", "wandb_key_file": "/k"}),
        ("tracking", {"wandb": "offline"}),
        ("swarm", {"announce_interface": "wg0", "port": 1}),
        ("swarm", {"relay_others": True, "reachability": "public"}),
        ("trainer", {"lr_scheduler_type": "cosine", "max_steps": 1}),
        ("trainer", {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}),
        ("trainer", {"importance_sampling_clip_min": 2.9}),
        ("trainer", {"local_groups": 0, "external_groups": 1}),
        (
            "trainer",
            {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": None},
        ),
        ("environment", {"families": [{"name": "bf", "level": 0, "rise_at": 1.0}]}),
    ],
)
def test_settings_that_go_together_are_accepted(name: str, values: dict[str, Any]) -> None:
    found = section(name, values).model_dump(mode="json")
    for key, value in values.items():
        if key not in ("families", "rpc_url"):
            assert found[key] == value


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("node_seed", (0, 2**63 - 1), (-1, 2**63)),
        ("node_max_rounds", (1, None), (0,)),
        ("node_max_parts_per_round", (1, 256), (0, 257)),
        ("node_answers_rounds", (0,), (-1,)),
        ("model_threads", (1, 1024, None), (0, 1025)),
        ("model_device", ("auto", "cpu", "cuda", "cuda:12"), ("cuda:", "gpu", "cuda:-1", "CPU")),
        ("generation_num_generations", (2, 256), (1, 257)),
        ("generation_temperature", (1e-6,), (9e-7, 0.0)),
        ("generation_top_p", (1e-6, 1.0), (0.0, 1.0001)),
        ("generation_vllm_memory", (0.01, 0.99), (0.0, 1.0)),
        ("trainer_external_min_probability", (0.0, 0.99), (-0.01, 1.0)),
        ("trainer_adam_beta1", (0.0, 0.999), (1.0, -0.1)),
        ("trainer_max_completions", (2,), (1,)),
        ("trainer_lora", ("auto", None, {"rank": 1024}), ({"rank": 0}, {"rank": 1025}, "on")),
        ("swarm_peers_per_round", (0, 64), (-1, 65)),
        ("swarm_max_askers", (1, 48), (0, 49)),
        ("swarm_audit_rounds", (1, 100_000), (0, 100_001)),
        ("swarm_announce_every_seconds", (1.0, 900.0), (0.99, 900.1)),
        ("swarm_max_completion_bytes", (1, 500_000), (0, 500_001)),
        ("swarm_only_peers", ([], [PEER]), (["Qm"], [PEER + "0"], PEER)),
        ("chain_id", (1,), (0,)),
        ("chain_contract", (ADDRESS, None), (ADDRESS[:-1], ADDRESS + "1", "0x" + "g" * 40)),
        ("chain_org_id", ("a", "a" * 256), ("", "a" * 257)),
        ("anvil_block_seconds", (3,), (2,)),
        ("anvil_history_blocks", (64,), (63,)),
        ("judge_rounds", (1, 64), (0, 65)),
        ("judge_choices", (2, 64), (1, 65)),
        ("keeper_ready_fraction", (0.01, 1.0), (0.0, 1.01)),
        ("audit_every_rounds", (0,), (-1,)),
        ("market_kelly_fraction", (0.01, 1.0), (0.0, 1.01)),
        ("hub_repo", ("me", "me/x.y"), ("me/", "/x", "me/x/y", ".me")),
        ("metrics_port", (0, 65535, None), (-1, 65536)),
        ("account_trusted_networks", (["10.0.0.0/8"], []), (["10.0.0.1/8"], "10.0.0.0/8")),
    ],
)
def test_limits_are_part_of_what_is_accepted(
    key: str, inside: tuple[Any, ...], outside: tuple[Any, ...]
) -> None:
    for value in inside:
        assert settings.flat_mistakes({key: value}) == []
    for value in outside:
        mistakes = settings.flat_mistakes({key: value})
        assert mistakes, value
        assert all(mistake.startswith(key) for mistake in mistakes)


def test_token_of_the_account_service_is_in_the_state_folder_unless_it_is_named() -> None:
    state = Path("/state")
    with_service = settings.Chain(account_url=URL)
    assert settings.chain_of_node(with_service, state).account_token_file == state / "account.token"
    named = settings.Chain(account_url=URL, account_token_file=Path("/t"))
    assert settings.chain_of_node(named, state) is named
    alone = settings.Chain(rpc_url=(URL,))
    assert settings.chain_of_node(alone, state) is alone


@pytest.mark.parametrize(
    ("weights", "only_peers", "shares"),
    [
        ("on", (), True),
        ("on", (PEER,), True),
        ("auto", (), False),
        ("auto", (PEER,), True),
        ("off", (PEER,), False),
    ],
)
def test_weights_are_shared_with_named_peers_or_on_request(
    weights: str, only_peers: tuple[str, ...], shares: bool
) -> None:
    found = section("swarm", {"weights": weights, "only_peers": list(only_peers)})
    assert found.shares_weights is shares


@pytest.mark.parametrize(
    ("values", "is_on"),
    [
        ({}, False),
        ({"wandb": "off"}, False),
        ({"wandb": "offline"}, True),
        ({"trackio": True}, True),
        ({"tensorboard": True}, True),
    ],
)
def test_tracking_is_on_with_any_tracker(values: dict[str, Any], is_on: bool) -> None:
    assert section("tracking", values).is_on is is_on


@pytest.mark.parametrize(
    ("parameters", "has_adapters"), [(49_999_999, False), (50_000_000, True), (0, False)]
)
def test_adapters_begin_at_fifty_million_parameters(parameters: int, has_adapters: bool) -> None:
    assert (settings.Trainer().lora_for(parameters) is not None) is has_adapters
    assert settings.Trainer(lora=None).lora_for(parameters) is None
    own = settings.Lora(rank=3)
    assert settings.Trainer(lora=own).lora_for(parameters) is own


@pytest.mark.parametrize(
    ("name", "source", "rest"),
    [
        ("bf", "reasoning-gym", "bf"),
        ("code/lists", "code", "lists"),
        ("code/a/b", "code", "a/b"),
        ("code/", "code", ""),
        ("/lists", "", "lists"),
        ("", "reasoning-gym", ""),
    ],
)
def test_family_belongs_to_the_environment_before_its_first_slash(
    name: str, source: str, rest: str
) -> None:
    assert settings.split_family(name) == (source, rest)


def test_family_that_rises_needs_a_level_to_rise_from() -> None:
    with pytest.raises(SettingsError, match="rise_at needs a level to rise from"):
        section("environment", {"families": [{"name": "bf", "rise_at": 0.5}]})
