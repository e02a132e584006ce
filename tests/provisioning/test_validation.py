"""Validation of inventories: each mistake with its exact message, and resulting plans."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deploys import paths
from deploys.inventory import derived_settings, validation
from deploys.inventory.host_plan import HostEntry, HostPlan
from deploys.inventory.schema import Deployment
from deploys.services import COORDINATOR_ROLES
from worker import environments, settings
from worker.errors import SettingsError
from worker.settings import Environment
from worker.swarm import identity

MAY_BE = "auto, a count of at least 1, or a list with a dict of settings for each"
NOT_THERE = (
    "/nowhere/token: No such file or directory; expected a file on this side with one word, a"
    " Hugging Face"
)
NO_MODEL = (
    "neither a folder nor a Hugging Face name (owner/model); expected such a name, a folder's whole"
    " path, hivewright/tiny or auto"
)
PYINFRA_KEYS = ("ssh_hostname", "ssh_port", "ssh_user", "_sudo", "_timeout")


def entry(name: str, groups: tuple[str, ...] = ("workers",), /, **data: Any) -> HostEntry:
    return HostEntry(name, groups, data, PYINFRA_KEYS)


def worker(name: str = "gpu-3", /, **data: Any) -> HostEntry:
    """Return a worker that may be the only host of an inventory."""
    return entry(name, **({"slots": 1, "swarm_enabled": False} | data))


def hub(name: str = "hub", /, **data: Any) -> HostEntry:
    return entry(name, ("coordinators",), **({"account_host": "192.0.2.10"} | data))


def plan_of(name: str, *entries: HostEntry) -> HostPlan:
    return validation.check(entries)[name]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [worker(trainer_groupsize=4)],
            (
                "inventory data of gpu-3: trainer_groupsize: not a known key; docs/configuration.md"
                " lists all keys"
            ),
        ),
        (
            [worker(trainer_learningrate=4)],
            (
                "inventory data of gpu-3: trainer_learningrate: not a known key; did you mean"
                " trainer_learning_rate?"
            ),
        ),
        ([worker(slot=2)], "inventory data of gpu-3: slot: not a known key; did you mean slots?"),
        (
            [worker(ssh_usr="root")],
            "inventory data of gpu-3: ssh_usr: not a known key; did you mean ssh_user?",
        ),
        (
            [worker(relase_ref="v1")],
            "inventory data of gpu-3: relase_ref: not a known key; did you mean release_ref?",
        ),
        (
            [worker(trainer_learning_rate="1e-5")],
            (
                "inventory data of gpu-3: trainer_learning_rate: got '1e-5'; expected a number;"
                " write it without quotes"
            ),
        ),
        (
            [worker(keeper_min_pers=2)],
            (
                "inventory data of gpu-3: keeper_min_pers: not a known key; did you mean"
                " keeper_min_peers?"
            ),
        ),
        (
            [worker(release_source="wheelhose")],
            (
                "inventory data of gpu-3: release_source: got 'wheelhose'; expected 'repository' or"
                " 'wheelhouse'"
            ),
        ),
        (
            [worker(release_repository="https://me:hunter2@git.example.org/x.git")],
            (
                "inventory data of gpu-3: release_repository: has a name or password in its URL,"
                " which every user of a host could see; take it out, give it to git's credential"
                " helper here, and set release_source to wheelhouse"
            ),
        ),
        (
            [worker(torch_index="https://token@pypi.example.org/simple")],
            (
                "inventory data of gpu-3: torch_index: has a name or password in its URL, which"
                " every user of a host could see; take it out, and name the index in pip's own"
                " configuration, with torch_index: pip"
            ),
        ),
        (
            [worker(hub_repo="me", hub_token_file="/nowhere/token")],
            f"inventory data of gpu-3: hub_token_file: {NOT_THERE} token that may write",
        ),
        (
            [worker(model_name="me/x", model_token_file="/nowhere/token")],
            f"inventory data of gpu-3: model_token_file: {NOT_THERE} token that may read the model",
        ),
        (
            [worker(model_token_file=5)],
            "inventory data of gpu-3: model_token_file: got 5; expected text; put it in quotes",
        ),
        (
            [worker(slots=[{}, {"hub_repo": "me", "hub_token_file": "/nowhere/token"}])],
            f"inventory data of gpu-3: slot 1: hub_token_file: {NOT_THERE} token that may write",
        ),
        (
            [worker(slots=[{}] * 300)],
            "inventory data of gpu-3: slots: got 300; expected at most 256 on one host",
        ),
        (
            [worker(slots=[{"node_name": "x"}, 7])],
            f"inventory data of gpu-3: slots: got 7; expected {MAY_BE}",
        ),
        (
            [worker(slots=10**6)],
            "inventory data of gpu-3: slots: got 1000000; expected at most 256 on one host",
        ),
        (
            [worker(torch_index="cpu")],
            (
                "inventory data of gpu-3: torch_index: got 'cpu'; expected pip, or a URL of an"
                " index (https://, http:// or file://)"
            ),
        ),
        (
            [worker(secrets_dir="")],
            (
                "inventory data of gpu-3: secrets_dir: got ''; expected String should have at least"
                " 1 character"
            ),
        ),
        (
            [worker(slot_memory_gb=float("inf"))],
            "inventory data of gpu-3: slot_memory_gb: got inf; expected a finite number",
        ),
        (
            [
                worker(
                    slot_memory_gb=1e-12,
                    watchdog_seconds=10**30,
                    slots=[{"slot_memory_gb": 1e300, "slot_cpus": 1e300}],
                )
            ],
            (
                "inventory data of gpu-3: slot_memory_gb: got 1e-12; expected greater than or"
                f" equal to 0.1\ninventory data of gpu-3: watchdog_seconds: got {10**30}; expected"
                " less than or equal to 2592000\ninventory data of gpu-3: slot 0: slot_memory_gb:"
                " got 1e+300; expected less than or equal to 1000000\ninventory data of gpu-3:"
                " slot 0: slot_cpus: got 1e+300; expected less than or equal to 10000"
            ),
        ),
        (
            [HostEntry("gpu-3", ("workers",), {1: 2, "slots": [{}, {None: 1}]}, ())],  # type: ignore[dict-item]
            (
                "inventory data of gpu-3: 1: not text; expected the name of a key\n"
                "inventory data of gpu-3: slot 1: None: not text; expected the name of a key"
            ),
        ),
        (
            [
                worker(release_ref="a\0b", slots=[{"identity": "/x\0y"}]),
                worker("gpu-4", hub_token_file="\0", environment_families=[{"name": "\ud800"}]),
            ],
            (
                "inventory data of gpu-3: slot 0: identity: has a zero byte, or half a character;"
                " expected text\ninventory data of gpu-3: release_ref: has a zero byte, or half a"
                " character; expected text\ninventory data of gpu-4: hub_token_file: has a zero"
                " byte, or half a character; expected text\ninventory data of gpu-4:"
                " environment_families: name: has a zero byte, or half a character; expected text"
            ),
        ),
        (
            [worker(torch_index="https://[x")],
            (
                "inventory data of gpu-3: torch_index: not a URL; expected one such as"
                " https://git.example.org/hivewright.git"
            ),
        ),
        ([worker(release_ref=1.1)], "inventory data of gpu-3: release_ref: got 1.1; expected text"),
        (
            [worker(watchdog_seconds=0)],
            "inventory data of gpu-3: watchdog_seconds: got 0; expected greater than 0",
        ),
        (
            [entry("gpu-3")],
            f"inventory data of gpu-3: slots: none; expected {MAY_BE}, for a host in workers",
        ),
        (
            [worker(slots=0)],
            f"inventory data of gpu-3: slots: got 0; expected {MAY_BE}",
        ),
        (
            [worker(slots="two")],
            f"inventory data of gpu-3: slots: got 'two'; expected {MAY_BE}",
        ),
        (
            [worker(slots=True)],
            f"inventory data of gpu-3: slots: got True; expected {MAY_BE}",
        ),
        (
            [hub(slots=2)],
            (
                "inventory data of hub: slots: got 2, but not in workers; put the host there, or"
                " leave slots out"
            ),
        ),
        (
            [entry("gpu-3", ("wokers",), slots=1)],
            (
                "inventory data of gpu-3: in no group that gets anything; put the host into workers"
                " or coordinators\ninventory data of gpu-3: slots: got 1, but not in workers; put"
                " the host there, or leave slots out"
            ),
        ),
        (
            [worker(slots=[{}, {"model_devise": "cuda:1"}])],
            (
                "inventory data of gpu-3: slot 1: model_devise: not a known key; did you mean"
                " model_device?"
            ),
        ),
        (
            [worker(slots=[{"node_state_dir": "/data"}])],
            (
                "inventory data of gpu-3: slot 0: node_state_dir: set by the deploy for each role"
                " and slot; leave it out"
            ),
        ),
        (
            [worker(node_state_dir="/data")],
            (
                "inventory data of gpu-3: node_state_dir: set by the deploy for each role and slot;"
                " leave it out"
            ),
        ),
        (
            [worker(slots=[{}, {"swarm_port": 38000}], swarm_port=38000)],
            (
                "inventory data of gpu-3: slot 1: swarm_port: 38000 is that of slot 0 too; give"
                " each its own, or 0"
            ),
        ),
        (
            [worker(slots=2, swarm_port=65535)],
            (
                "inventory data of gpu-3: slot 1: swarm_port: got 65536; expected less than or"
                " equal to 65535"
            ),
        ),
        (
            [worker(slots=[{"gpu": -1}, {"gpu": 0, "model_device": "cpu"}, {"slot_cpus": 0}])],
            (
                "inventory data of gpu-3: slot 0: gpu: got -1; expected the number of a GPU, such"
                " as 1, or of a MIG slice, such as '1:0'\ninventory data of gpu-3: slot 1: gpu: got"
                " 0, and model_device 'cpu'; expected one of them\ninventory data of gpu-3: slot 2:"
                " slot_cpus: got 0; expected greater than or equal to 0.01"
            ),
        ),
        (
            [worker(slot_memory_gb="8", slots=[{}, {"slot_cpus": 2.0}])],
            "inventory data of gpu-3: slot_memory_gb: got '8'; expected a number",
        ),
        (
            [worker(slots=[{"identity": "/nowhere/swarm.pem"}])],
            (
                "inventory data of gpu-3: slot 0: identity: /nowhere/swarm.pem: No such file or"
                " directory; expected the path of a swarm.pem"
            ),
        ),
        (
            [worker(slots=[{"identity": 7}])],
            "inventory data of gpu-3: slot 0: identity: got 7; expected the path of a swarm.pem",
        ),
        (
            [worker(slots=[{"identity": "README.md"}])],
            (
                "inventory data of gpu-3: slot 0: identity: README.md: no libp2p RSA key; expected"
                " the path of a swarm.pem"
            ),
        ),
        (
            [
                worker(
                    trainer_epsilon="a",
                    model_nam="x",
                    slots=[{"model_dvice": "cpu"}, {"trainer_epsilon": 0}],
                )
            ],
            (
                "inventory data of gpu-3: model_nam: not a known key; did you mean"
                " model_name?\ninventory data of gpu-3: trainer_epsilon: got 'a'; expected a"
                " number\ninventory data of gpu-3: slot 0: model_dvice: not a known key; did you"
                " mean model_device?\ninventory data of gpu-3: slot 1: trainer_epsilon: got 0;"
                " expected greater than 0"
            ),
        ),
        (
            [worker("gpu-1", swarm_enabled=True), worker("gpu-2", swarm_enabled=True, slots=2)],
            (
                "inventory data of gpu-1, gpu-2: no swarm to join; put a host into coordinators, or"
                " set chain_account_url to a swarm's account service, or swarm_bootnodes to peers"
                " of one (swarm_enabled False: train alone, on purpose)"
            ),
        ),
        (
            [
                worker("gpu-1", ssh_hostname="192.0.2.1"),
                worker("gpu-2", ssh_hostname="192.0.2.1"),
                worker("192.0.2.1"),
            ],
            (
                "inventory data of gpu-2, 192.0.2.1: ssh_hostname: 192.0.2.1, port 22, is that of"
                " gpu-1 too; expected another for each host"
            ),
        ),
        (
            [worker("gpu-1", secrets_dir="a"), worker("gpu-2", secrets_dir="b")],
            (
                "inventory data of gpu-1, gpu-2: secrets_dir: got 'a', 'b' on different hosts;"
                " expected one for all"
            ),
        ),
        (
            [worker("gpu-1", secrets_dir="a", release_ref=1), worker("gpu-2", secrets_dir="a")],
            "inventory data of gpu-1: release_ref: got 1; expected text",
        ),
        (
            [worker("gpu-1", tailscale_hostname="gpu"), worker("gpu-2", tailscale_hostname="gpu")],
            (
                "inventory data of gpu-2: tailscale_hostname: gpu is that of gpu-1 too; expected"
                " another for each host"
            ),
        ),
        (
            [
                worker(name, wireguard=True, wireguard_endpoint="vpn.example.org")
                for name in ("gpu-1", "gpu-2")
            ],
            (
                "inventory data of gpu-2: wireguard_endpoint: vpn.example.org:51820 is that of"
                " gpu-1 too; expected another for each host"
            ),
        ),
        (
            [
                entry(
                    "hub",
                    ("coordinators", "workers"),
                    account_host="192.0.2.10",
                    slots=2,
                    swarm_port=38330,
                )
            ],
            (
                "inventory data of hub: slot 1: swarm_port: 38331 is that of bootnode_port too;"
                " give each its own, or 0"
            ),
        ),
        (
            [hub(account_port=8545, bootnode_port=8545)],
            (
                "inventory data of hub: bootnode_port: 8545 is that of anvil_port too; give each"
                " its own, or 0\ninventory data of hub: account_port: 8545 is that of anvil_port"
                " too; give each its own, or 0"
            ),
        ),
        (
            [worker(slots=2, swarm_announce=["/ip4/192.0.2.1/tcp/1"], swarm_port=1)],
            (
                "inventory data of gpu-3: slot 1: swarm_announce: /ip4/192.0.2.1/tcp/1 is that of"
                " slot 0 too; give each its own in a list of slots, or set swarm_announce_interface"
            ),
        ),
        (
            [worker(slots="auto", model_device="cuda:0")],
            (
                "inventory data of gpu-3: model_device: got 'cuda:0', and slots auto, which is a"
                " worker for each GPU; expected auto, cuda or cpu"
            ),
        ),
        (
            [worker(slots=[{"keeper_min_peers": 2}])],
            (
                "inventory data of gpu-3: slot 0: keeper_min_peers: no worker reads it; put it into"
                " the data of the coordinators host"
            ),
        ),
        (
            [hub(account_host="http://192.0.2.10"), worker(slots=[{"model_name": ""}])],
            (
                "inventory data of hub: account_host: got 'http://192.0.2.10'; expected a name or"
                " an address, without http:// and port\ninventory data of gpu-3: slot 0:"
                f" model_name: got '', {NO_MODEL}"
            ),
        ),
        (
            [worker(model_name="models/foo/bar/baz"), hub(), worker("gpu-4", model_name="a--b/c")],
            (
                f"inventory data of gpu-3: model_name: got 'models/foo/bar/baz', {NO_MODEL}\n"
                f"inventory data of gpu-4: model_name: got 'a--b/c', {NO_MODEL}"
            ),
        ),
        (
            [hub("hub-1"), hub("hub-2")],
            "inventory data of hub-1, hub-2: coordinators: 2 hosts in this group; expected one",
        ),
        (
            [hub(account_host="127.0.0.1"), worker()],
            (
                "inventory data of hub: account_host: got '127.0.0.1', which workers on other hosts"
                " cannot reach; use this host's LAN or VPN address"
            ),
        ),
    ],
)
def test_wrong_inventory_is_refused_with_the_exact_message(
    entries: list[HostEntry], message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        validation.check(entries)
    assert str(refused.value) == message


def test_all_mistakes_of_all_hosts_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        validation.check(
            [worker("gpu-1", slots=0), worker("gpu-2", modle_name="x"), worker("gpu-3")]
        )
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "inventory data of gpu-1",
        "inventory data of gpu-2",
    ]


def test_hosts_with_the_same_mistake_share_a_line() -> None:
    with pytest.raises(SettingsError) as refused:
        validation.check([worker(f"gpu-{i}", model_nam="x") for i in range(3)])
    assert (
        str(refused.value)
        == "inventory data of gpu-0, gpu-1, gpu-2: model_nam: not a known key; did you mean"
        " model_name?"
    )


def test_two_slots_with_one_key_are_refused(tmp_path: Path) -> None:
    identity.create(tmp_path / "a.pem")
    (tmp_path / "copy-of-a.pem").write_bytes((tmp_path / "a.pem").read_bytes())
    with pytest.raises(SettingsError) as refused:
        validation.check(
            [
                worker("gpu-1", slots=[{"identity": str(tmp_path / "a.pem")}]),
                worker(
                    "gpu-2",
                    slots=[{}, {"identity": str(tmp_path / "copy-of-a.pem")}],
                    trainer_epsilon="a",
                ),
            ]
        )
    assert (
        str(refused.value)
        == "inventory data of gpu-2: trainer_epsilon: got 'a'; expected a number\ninventory data"
        f" of gpu-2: slot 1: identity: {tmp_path}/copy-of-a.pem is the key of slot 0 of gpu-1"
        " too; two workers can't be one node"
    )


@pytest.mark.parametrize(
    "way",
    [
        {"chain_account_url": "http://other:3000"},
        {"chain_rpc_url": "http://other:8545"},
        {
            "swarm_bootnodes": [
                "/ip4/192.0.2.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
            ]
        },
        {"swarm_enabled": False},
    ],
)
def test_workers_without_coordinator_need_a_way_to_others(way: dict[str, Any]) -> None:
    assert plan_of("gpu-3", entry("gpu-3", slots=1, **way)).slots


def test_workers_find_the_account_service_of_their_inventory() -> None:
    slot = plan_of("gpu-3", hub(account_port=3100), worker()).slots[0]
    assert slot.settings.chain.account_url == "http://192.0.2.10:3100"
    assert str(slot.settings.chain.enrolment_token_file) == paths.credential("enrol@0")


def test_workers_of_another_swarm_keep_their_own_address() -> None:
    slot = plan_of("gpu-3", hub(), worker(chain_account_url="http://other:3000")).slots[0]
    assert slot.settings.chain.account_url == "http://other:3000"


def test_workers_without_any_swarm_have_no_chain() -> None:
    slot = plan_of("gpu-3", worker()).slots[0]
    assert slot.settings.chain.account_url is None
    assert slot.settings.chain.enrolment_token_file is None


def test_slots_differ_in_what_they_say_and_in_their_places() -> None:
    slots = plan_of(
        "gpu-3",
        worker(slots=[{"model_device": "cuda:0"}, {"model_device": "cuda:1"}], log_level="DEBUG"),
    ).slots
    assert [slot.unit for slot in slots] == [
        "hivewright-worker@0.service",
        "hivewright-worker@1.service",
    ]
    assert [slot.settings.model.device for slot in slots] == ["cuda:0", "cuda:1"]
    assert [slot.settings.node.name for slot in slots] == ["gpu-3", "gpu-3-1"]
    assert [str(slot.settings.node.state_dir) for slot in slots] == [
        "/var/lib/hivewright/worker-0",
        "/var/lib/hivewright/worker-1",
    ]
    assert {slot.settings.log.level for slot in slots} == {"DEBUG"}


def test_a_role_only_has_the_settings_that_it_reads() -> None:
    services = plan_of("hub", hub(trainer_learning_rate=0.5, keeper_min_peers=3)).services
    assert services["keeper"].keeper.min_peers == 3
    assert services["chain"].keeper.min_peers == 1
    assert all(settings.trainer.learning_rate != 0.5 for settings in services.values())


def test_the_keeper_can_judge_the_tasks_of_every_worker_of_the_inventory() -> None:
    sums = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 3}, "weight": 3.0}
    easy, hard = {"name": "gcd", "level": 0, "rise_at": 0.8}, {"name": "gcd", "level": 2}
    own = {"name": "products", "weight": 2.0}
    hosts_of = [
        hub(environment_families=[own]),
        entry("gpu-1", environment_families=[sums, easy], slots=1),
        entry(
            "gpu-2", environment_families=[easy], slots=[{}, {"environment_families": [hard, own]}]
        ),
    ]
    families = plan_of("hub", *hosts_of).services["keeper"].environment.families
    assert [family.model_dump(exclude_defaults=True) for family in families] == [
        own,
        {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 3}},
        {"name": "gcd"},
    ]
    known = environments.load(Environment(families=families))
    for slot in plan_of("gpu-2", *hosts_of).slots:
        for task in environments.load(slot.settings.environment).sample(7, 16):
            assert known.question(task)


def test_a_keeper_without_workers_in_its_inventory_has_its_own_families() -> None:
    assert plan_of("hub", hub()).services["keeper"].environment == Environment()
    named = (
        plan_of("hub", hub(environment_families=[{"name": "gcd"}]))
        .services["keeper"]
        .environment.families
    )
    assert [family.name for family in named] == ["gcd"]


def test_only_the_keeper_is_told_of_families() -> None:
    services = plan_of(
        "hub", hub(), entry("gpu-1", environment_families=[{"name": "gcd"}], slots=1)
    ).services
    told = {role for role, of in services.items() if of.environment != Environment()}
    assert told == {"keeper"}


@pytest.mark.parametrize(
    ("data", "announced"),
    [
        ({}, ["/ip4/192.0.2.10/tcp/38331"]),
        ({"account_host": "hub.example.org"}, ["/dns/hub.example.org/tcp/38331"]),
        ({"account_host": "0.0.0.0"}, []),
        ({"bootnode_port": 0}, []),
        ({"bootnode_announce": ["/ip4/198.51.100.7/tcp/1"]}, ["/ip4/198.51.100.7/tcp/1"]),
    ],
)
def test_the_bootnode_is_announced_where_the_account_service_is(
    data: dict[str, Any], announced: list[str]
) -> None:
    assert list(plan_of("hub", hub(**data)).services["bootnode"].bootnode.announce) == announced


def test_one_machine_can_be_everything() -> None:
    plan = plan_of("@local", entry("@local", ("workers", "coordinators"), slots=1))
    assert plan.slots[0].settings.chain.account_url == "http://127.0.0.1:3000"
    assert plan.slots[0].settings.node.name == "local"
    assert list(plan.services) == list(COORDINATOR_ROLES)


@pytest.mark.parametrize(
    "host", ["192.0.2.10", "fd00::1", "hub", "hub.example.org", "gpu_1.local", "0.0.0.0"]
)
def test_where_the_account_service_is_may_be_a_name_or_an_address(host: str) -> None:
    assert plan_of("hub", hub(account_host=host)).services["account"].account.host == host


@pytest.mark.parametrize(
    "host", ["192.0.2.10:3000", "[fd00::1]", "hub:3000", "https://hub", "hub/x", "a..b", "", "a b"]
)
def test_where_the_account_service_is_is_no_url(host: str) -> None:
    for role in ("account", "dashboard"):
        with pytest.raises(SettingsError, match=f"{role}_host: got"):
            validation.check([hub(**{f"{role}_host": host})])


def test_hosts_behind_one_address_or_without_any_are_not_taken_for_one() -> None:
    ports = [worker(f"gpu-{port}", ssh_hostname="192.0.2.1", ssh_port=port) for port in (22, 2222)]
    hidden = [worker(f"gpu-{n}", wireguard=True, wireguard_endpoint="none") for n in (1, 2)]
    seen = [
        worker(f"hub-{n}", wireguard=True, wireguard_hub=True, ssh_hostname=f"192.0.2.{n}")
        for n in (2, 3)
    ]
    assert len(validation.check([*ports, *hidden, *seen])) == 6


def test_workers_look_at_the_chain_less_often_and_a_coordinator_beside_one_as_before() -> None:
    own = {"account_host": "192.0.2.1"}
    plans = [
        validation.check([HostEntry("hub", groups, own | more)])["hub"]
        for groups, more in (
            (("coordinators",), {}),
            (("coordinators", "workers"), {"slots": 1}),
        )
    ]
    polls = [{role: of.chain.poll_seconds for role, of in plan.services.items()} for plan in plans]
    assert polls[0] == polls[1]
    assert plans[1].slots[0].settings.chain.poll_seconds == derived_settings.WORKER_POLL_SECONDS


def test_key_of_a_slot_that_is_misspelt_gets_a_suggestion() -> None:
    with pytest.raises(
        SettingsError, match=r"slot 0: gpus: not a known key of a slot; did you mean gpu\?"
    ):
        validation.check(
            [HostEntry("gpu-1", ("workers",), {"slots": [{"gpus": 1}], "swarm_enabled": False})]
        )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"tailscale": True, "tailscale_serve": {443: 3000}}, True),
        ({"tailscale": True, "tailscale_serve_http": {80: 3100}, "account_port": 3100}, True),
        ({"tailscale": True, "tailscale_serve": {443: 3000}, "account_behind_proxy": False}, False),
        ({"tailscale": True, "tailscale_serve": {443: 3001}}, False),  # the dashboard
        ({"tailscale_serve": {443: 3000}}, False),
        ({"account_behind_proxy": True}, True),
    ],
)
def test_account_service_knows_that_tailscale_shows_its_port(
    data: dict[str, Any], expected: bool
) -> None:
    assert plan_of("hub", hub(**data)).services["account"].account.behind_proxy is expected


@pytest.mark.parametrize(
    ("data", "told", "own"),
    [
        ({}, "http://192.0.2.10:3002", "http://127.0.0.1:3002"),
        ({"account_host": "hub.lan"}, "http://hub.lan:3002", "http://127.0.0.1:3002"),
        (
            {"judge_host": "2001:db8::1", "judge_port": 81},
            "http://[2001:db8::1]:81",
            "http://127.0.0.1:81",
        ),
        ({"account_host": "0.0.0.0"}, None, "http://127.0.0.1:3002"),
        ({"judge_host": "::"}, None, "http://127.0.0.1:3002"),
        (
            {"account_host": "127.0.0.1", "tailscale": True, "tailscale_serve": {443: 3000}},
            None,
            "http://127.0.0.1:3002",
        ),
        ({"account_host": "0.0.0.0", "market_judge_url": "http://j"}, "http://j", "http://j"),
        ({"market_enabled": False}, None, None),
    ],
)
def test_nodes_are_told_of_a_judge_that_they_can_reach(
    data: dict[str, Any], told: str | None, own: str | None
) -> None:
    services = plan_of("hub", hub(**data)).services
    assert services["account"].market.judge_url == told
    assert services["dashboard"].market.judge_url == own


def test_slots_of_the_coordinator_reach_its_judge_whatever_others_are_told() -> None:
    groups = ("workers", "coordinators")
    local = plan_of("@local", entry("@local", groups, slots=1, judge_port=81))
    assert local.slots[0].settings.market.judge_url == "http://127.0.0.1:81"
    own = entry("@local", groups, slots=[{"market_judge_url": "http://j"}])
    assert plan_of("@local", own).slots[0].settings.market.judge_url == "http://j"
    assert plan_of("gpu-3", hub(), worker()).slots[0].settings.market.judge_url is None


@pytest.mark.parametrize("enabled", [None, True, False])
def test_swarm_without_a_market_has_no_judge(enabled: bool | None) -> None:
    services = plan_of("hub", hub(market_enabled=enabled)).services
    assert ("judge" in services) == (enabled is not False)
    others = [role for role in COORDINATOR_ROLES if role != "judge"]
    assert [role for role in services if role != "judge"] == others


_PEOPLE = {"account_passphrase_file": "pass", "dashboard_host": "192.0.2.10"}
_SERVED = {"tailscale": True, "tailscale_serve": {443: 3000, 8443: 3001}}
_NAMED = {"account_public_url": "https://hub.tail0.ts.net"}


@pytest.mark.parametrize(
    ("data", "accounts_url", "dashboard_url"),
    [
        (_PEOPLE, "http://192.0.2.10:3000", "http://192.0.2.10:3001"),
        (
            _PEOPLE | {"account_port": 80, "dashboard_host": "2001:db8::1", "dashboard_port": 81},
            "http://192.0.2.10:80",
            "http://[2001:db8::1]:81",
        ),
        (_PEOPLE | {"dashboard_host": "127.0.0.1"}, "http://192.0.2.10:3000", None),
        (_PEOPLE | _NAMED | _SERVED, _NAMED["account_public_url"], "https://hub.tail0.ts.net:8443"),
        (_PEOPLE | _NAMED, _NAMED["account_public_url"], "http://192.0.2.10:3001"),
        (
            _PEOPLE | {"account_dashboard_url": "http://a", "dashboard_accounts_url": "http://b"},
            "http://b",
            "http://a",
        ),
        ({"dashboard_host": "192.0.2.10"}, None, None),  # no accounts of people
    ],
)
def test_pages_of_a_coordinator_link_to_each_other(
    data: dict[str, Any],
    accounts_url: str | None,
    dashboard_url: str | None,
    tmp_path: Path,
) -> None:
    passphrase = tmp_path / "pass"
    passphrase.write_text("correct horse battery staple\n")
    if "account_passphrase_file" in data:
        data = data | {"account_passphrase_file": str(passphrase)}
    services = plan_of("hub", hub(**data)).services
    assert services["dashboard"].dashboard.accounts_url == accounts_url
    assert services["account"].account.dashboard_url == dashboard_url


NUM_ROLES = len(COORDINATOR_ROLES)


@pytest.mark.parametrize(
    ("metrics_port", "is_right"),
    [(1, False), (NUM_ROLES, False), (NUM_ROLES + 1, True), (65535, True), (0, True)],
)
def test_services_of_a_coordinator_have_the_ports_below_that_of_slots(
    metrics_port: int, is_right: bool
) -> None:
    of_hub = hub(metrics_port=metrics_port)
    if not is_right:
        with pytest.raises(SettingsError) as refused:
            validation.check([of_hub])
        assert str(refused.value) == (
            f"inventory data of hub: metrics_port: got {metrics_port}; expected more than"
            f" {NUM_ROLES}, since each of the {NUM_ROLES} services of a coordinator has one of the"
            " ports below it"
        )
        return
    ports = [own.metrics.port for own in plan_of("hub", of_hub).services.values()]
    assert ports == [metrics_port - 1 - n if metrics_port else 0 for n in range(NUM_ROLES)]


def test_low_port_of_a_worker_is_its_own_affair() -> None:
    (slot,) = plan_of("gpu-3", worker(metrics_port=3)).slots
    assert slot.settings.metrics.port == 3


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**400), {"gpu": 10**5000}, [[10**5000]]],
    ids=["huge", "negative", "in a dict", "in lists"],
)
@pytest.mark.parametrize("key", ["slots", "watchdog_seconds", "trainer_max_steps", "ssh_port"])
def test_number_that_python_can_not_print_is_a_mistake_like_another(key: str, value: Any) -> None:
    with pytest.raises(SettingsError) as refused:
        validation.check([worker(**{key: value})])
    assert f"{key}: " in str(refused.value) or "slot 0" in str(refused.value)
    assert "a number of more than 300 digits; expected a smaller one" in str(refused.value)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70_000),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(
        [
            *("auto", "none", "localhost", "::1", "http://[", "http://a:b@c", "cuda:1"),
            *("10.86.0.0/16", "0.0.0.0/0", "::/0", "tag:a", "/nowhere", "a/b", "cuda:99999"),
            *("\0", "\ud800", "a\nb"),
        ]
    ),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 70_000), inner, max_size=2)
    ),
    max_leaves=4,
)
_KEYS = st.sampled_from(
    sorted({*Deployment.model_fields, *settings.flat_keys(), *PYINFRA_KEYS, "identity", "gpu", "x"})
)
_DATA = st.dictionaries(_KEYS, _VALUES, max_size=3)


@st.composite
def _entries(draw: st.DrawFn) -> list[HostEntry]:
    found = []
    for name in draw(st.sampled_from([["a"], ["a", "b"]])):
        groups = draw(
            st.sampled_from([("workers",), ("coordinators",), ("workers", "coordinators"), ("x",)])
        )
        slots = draw(st.sampled_from([{}, {"slots": 1}, {"slots": [draw(_DATA)]}]))
        found.append(HostEntry(name, groups, slots | draw(_DATA), PYINFRA_KEYS))
    return found


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(entries=_entries())
def test_data_of_any_type_are_plans_or_lines_that_name_the_hosts(entries: list[HostEntry]) -> None:
    try:
        plans = validation.check(entries)
    except SettingsError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        assert set(plans) == {entry.name for entry in entries}
        validation.warnings(plans.values())
    assert [line for line in lines if not line.startswith("inventory data of ")] == []
