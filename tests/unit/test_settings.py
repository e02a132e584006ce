"""Settings: messages about mistakes, and the round trip of valid settings."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from worker import settings
from worker.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"trainer_learningrate": 1e-4},
            (
                "inventory data of gpu-3: trainer_learningrate: not a known key; did you mean"
                " trainer_learning_rate?"
            ),
        ),
        (
            {"trianer_learning_rate": 1e-4},
            (
                "inventory data of gpu-3: trianer_learning_rate: not a known key; did you mean"
                " trainer_learning_rate?"
            ),
        ),
        (
            {"trainer_learning_rate": "fast"},
            "inventory data of gpu-3: trainer_learning_rate: got 'fast'; expected a number",
        ),
        (
            {"swarm_port": 99999, "generation_num_generations": 1},
            (
                "inventory data of gpu-3: generation_num_generations: got 1; expected greater than"
                " or equal to 2; swarm_port: got 99999; expected less than or equal to 65535"
            ),
        ),
        (
            {
                "swarm_announce": ["/ip4/999.1.1.1/tcp/1", "/dns/x/tcp/70000", "/ip4/192.0.2.1/xx"],
                "swarm_bootnodes": [
                    "/ip4/192.0.2.1/tcp/1/p2p/Qmtypo",
                    "/dns/x/tcp/1/p2p/QmQmQmQmQmQmQmQm ",
                ],
                "swarm_relays": ["/ip4/192.0.2.1/tcp/1"],
            },
            (
                "inventory data of gpu-3: swarm_announce/0: got '/ip4/999.1.1.1/tcp/1'; expected an"
                " address such as /ip4/192.0.2.1/tcp/38000; swarm_announce/1: got"
                " '/dns/x/tcp/70000'; expected an address such as /ip4/192.0.2.1/tcp/38000;"
                " swarm_announce/2: got '/ip4/192.0.2.1/xx'; expected an address such as"
                " /ip4/192.0.2.1/tcp/38000; swarm_relays/0: got '/ip4/192.0.2.1/tcp/1'; expected"
                " /p2p/ and the peer id at its end; swarm_bootnodes/0: got"
                " '/ip4/192.0.2.1/tcp/1/p2p/Qmtypo'; Qmtypo is not a peer id; swarm_bootnodes/1:"
                " got '/dns/x/tcp/1/p2p/QmQmQmQmQmQmQmQm '; expected an address such as"
                " /ip4/192.0.2.1/tcp/38000"
            ),
        ),
        (
            {
                "swarm_announce_every_seconds": 1e9,
                "swarm_max_askers": 64,
                "swarm_max_groups_per_peer": 10**12,
                "swarm_startup_timeout_seconds": 1e-9,
            },
            (
                "inventory data of gpu-3: swarm_startup_timeout_seconds: got 1e-09; expected"
                " greater than or equal to 1; swarm_max_askers: got 64; expected less than or equal"
                " to 48; swarm_announce_every_seconds: got 1000000000.0; expected less than or"
                " equal to 900; swarm_max_groups_per_peer: got 1000000000000; expected less than or"
                " equal to 256"
            ),
        ),
        (
            {"node_max_rounds": True},
            "inventory data of gpu-3: node_max_rounds: got True; expected a whole number",
        ),
        (
            {"trainer_local_groups": 0, "trainer_external_groups": 0},
            (
                "inventory data of gpu-3: trainer: local_groups and external_groups are both 0: "
                "there would be nothing to train on"
            ),
        ),
        (
            {"trainer_adam_beta2": 1.0, "generation_temperature": 1e-38, "generation_top_p": 1e-46},
            (
                "inventory data of gpu-3: generation_temperature: got 1e-38; expected greater than"
                " or equal to 0.000001; generation_top_p: got 1e-46; expected greater than or equal"
                " to 0.000001; trainer_adam_beta2: got 1.0; expected less than 1"
            ),
        ),
        (
            {"trainer_warmup_steps": 10},
            (
                "inventory data of gpu-3: trainer: warmup_steps is 10 and lr_scheduler_type"
                " constant, which has none; expected lr_scheduler_type constant_with_warmup"
            ),
        ),
        (
            {"chain_contract": 0xABC},
            "inventory data of gpu-3: chain_contract: got 2748; expected text; put it in quotes",
        ),
        (
            {"swarm_relay_others": True},
            (
                "inventory data of gpu-3: swarm: relay_others is set and reachability is auto;"
                " expected reachability public, since a relay must be reachable"
            ),
        ),
        (
            {"swarm_only_registered": True},
            (
                "inventory data of gpu-3: settings: swarm.only_registered needs a chain; "
                "expected chain.account_url or chain.rpc_url"
            ),
        ),
        (
            {"trainer_learning_rate": float("nan")},
            "inventory data of gpu-3: trainer_learning_rate: got nan; expected a finite number",
        ),
    ],
)
def test_wrong_inventory_key_is_named_with_value_and_expectation(flat, message):
    with pytest.raises(SettingsError) as caught:
        settings.from_flat(flat, "inventory data of gpu-3")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected sections such as `node:` (docs/configuration.md lists them)"),
        ("node: [", "not YAML at line 1: expected the node content, but found '<stream end>'"),
        ("- a\n- b\n", "got a list; expected sections such as `node:`"),
        (
            "version: 99\n",
            (
                "version: 99 is newer than 1, the newest that this hivewright reads; "
                "upgrade hivewright, or write the file with this one"
            ),
        ),
        (
            "node: {seed: 1}\nlog: {}\nnode: {seed: 2}\n",
            "not YAML at line 3: the key 'node' occurs twice",
        ),
        (
            "chain: {rpc_url: 'localhost:1'}\n",
            "chain.rpc_url/0: got 'localhost:1'; expected http:// or https:// and an address",
        ),
        (
            "dashboard: {host: 'http://x'}\n",
            (
                "dashboard.host: got 'http://x'; expected a name or an address, without http:// and"
                " port"
            ),
        ),
        (
            "environment: {families: []}\n",
            "environment.families: got []; expected at least 1 of them",
        ),
        ("node: 5\n", "node: got 5; expected a mapping"),
        (
            "trainer: {learning_rate: 1e-06}\n",
            (
                "trainer.learning_rate: got '1e-06'; expected a number; YAML reads it as text:"
                " write it with a point and without quotes, such as 1.0e-5"
            ),
        ),
        (
            "environment: {families: [chain_sum]}\n",
            "environment.families/0: got 'chain_sum'; expected a mapping",
        ),
    ],
)
def test_wrong_settings_file_is_explained_in_one_line(tmp_path, text, message):
    file = tmp_path / "worker.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        settings.load(file)
    assert str(caught.value) == f"settings file {file}: {message}"


def test_file_that_is_missing_or_binary_is_explained(tmp_path):
    with pytest.raises(
        SettingsError, match="can't be read: No such file or directory; expected a YAML file"
    ):
        settings.load(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="can't be read: not UTF-8 text; expected a YAML file"):
        settings.load(tmp_path / "binary.yaml")


def test_file_that_no_person_wrote_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(
            SettingsError,
            match=f"settings file {file}: is a device or a pipe; expected a YAML file",
        ):
            settings.load(file)
    (tmp_path / "huge.yaml").write_bytes(b"a" * (2 << 20))
    with pytest.raises(SettingsError, match="has 2,097,152 bytes; expected at most 1,048,576"):
        settings.load(tmp_path / "huge.yaml")


@pytest.mark.usefixtures("usual_recursion_limit")
def test_file_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 20_000 + "]" * 20_000)
    with pytest.raises(SettingsError, match="is nested too deep"):
        settings.load(tmp_path / "deep.yaml")


def test_dump_and_load_give_the_same_settings(tmp_path):
    before = settings.from_flat(
        {
            "node_state_dir": "/srv/state",
            "trainer_learning_rate": 1e-06,
            "chain_contract": "0x" + "1" * 40,
            "swarm_announce": ["/ip4/100.64.0.7/tcp/38000"],
            "environment_families": [
                {"name": "bf", "weight": 2.0, "config": {"difficulty": 1, "flag": True}}
            ],
            "node_max_rounds": 7,
        },
        "test",
    )
    file = tmp_path / "settings.yaml"
    file.write_text(settings.dump(before))
    assert settings.load(file) == before


def test_settings_load_fast_and_pull_in_nothing_heavy():
    code = (
        "import sys, worker.settings; heavy = {'torch', 'transformers', 'trl', 'hivemind', 'web3',"
        " 'reasoning_gym', 'aiohttp'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy"
        " else 0)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode
        == 0
    )


def test_patterns_name_their_characters():
    r"""In pydantic `\w` and `\d` have letters of all scripts; `\w{0,62}` takes 4 MB of memory."""
    sections = settings.Settings.model_json_schema()["$defs"].values()
    fields = [field for section in sections for field in section["properties"].values()]
    patterns = [
        kind["pattern"] for f in fields for kind in [f, *f.get("anyOf", [])] if "pattern" in kind
    ]
    assert len(patterns) > 10
    assert not [pattern for pattern in patterns if re.search(r"\\[wdWD]", pattern)]


def test_configuration_page_is_what_the_settings_say():
    page = runpy.run_path(str(ROOT / "scripts/configuration"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text() == page, "run `make docs`"


def test_all_mistakes_of_flat_keys_are_named_by_these_keys():
    here = object()
    assert settings.flat_mistakes(
        {
            "trainer_learning_rat": 1e-4,
            "chain_rpc_url": here,
            "foo": 1,
            "environment_families": [{"name": "bf", "weight": "x"}],
        }
    ) == [
        f"chain_rpc_url: got {here!r}; expected plain text, numbers, lists and dicts",
        "foo: not a known key; docs/configuration.md lists all keys",
        "environment_families/0/weight: got 'x'; expected a number",
        "trainer_learning_rat: not a known key; did you mean trainer_learning_rate?",
    ]


@pytest.mark.parametrize(
    ("parameters", "given", "has_adapters", "rate", "iterations"),
    [
        (1_000_000, {}, False, 5e-5, 1),
        (135_000_000, {}, True, 5e-4, 2),
        (500_000_000, {}, True, 2e-4, 2),
        (3_000_000_000, {}, True, 1e-4, 2),
        (135_000_000, {"lora": None}, False, 1e-5, 1),
        (500_000_000, {"lora": None}, False, 1e-6, 1),
        (1_000_000, {"lora": {"rank": 4}}, True, 5e-4, 2),
        (135_000_000, {"learning_rate": 3e-5, "num_iterations": 1}, True, 3e-5, 1),
    ],
)
def test_what_is_not_named_follows_from_the_model_s_size(
    parameters, given, has_adapters, rate, iterations
):
    trainer = settings.parse({"trainer": given}, "test").trainer.settle(parameters)
    assert (trainer.lora is not None, trainer.learning_rate, trainer.num_iterations) == (
        has_adapters,
        rate,
        iterations,
    )
    assert trainer.settle(7) == trainer
