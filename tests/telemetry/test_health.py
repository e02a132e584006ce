"""Nothing degrades silently: each health check is triggered with the real part that it watches."""

import argparse
import dataclasses
import http.server
import logging
import math
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.unit.test_node import enrolled, half_are_right, make_node
from worker import condition, settings
from worker.chain.account_client import AccountClient
from worker.chain.ledger import Ledger
from worker.chain.settlement import Settlement
from worker.commands.reports import print_status
from worker.environments.mixture import Mix
from worker.policy import model_sizing
from worker.policy.engines import native
from worker.policy.policy import Policy
from worker.runtime.gpu_health import Card, Problem
from worker.swarm.status import SwarmStatus
from worker.telemetry import health, metrics, status
from worker.telemetry.status import NodeStatus, Recent

ROOT = Path(__file__).parents[2]


def blank(**changes) -> NodeStatus:
    return NodeStatus("gpu-1", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", **changes)


def found(node: NodeStatus) -> dict[str, str]:
    return {finding.check: finding.severity for finding in node.warnings}


def train(node, rounds: int):
    for _ in range(rounds):
        node._train_part(node._next_round())
    node.close()
    return status.read(node.folder)


def test_the_operators_table_is_that_of_the_code():
    text = (ROOT / "docs/operations/watch.md").read_text()
    assert health.table() in text, "docs/operations/watch.md: run `make docs`"


def test_what_is_not_known_is_no_warning_and_has_no_figure():
    node = blank()
    assert health.find(node) == ()
    assert all(check.measure(node) is None for check in health.CHECKS)
    assert all(check.show(node) for check in health.CHECKS)


COOL = Problem("warning", "throttled: HW Thermal Slowdown", "cool it")
PAST = {
    "gpu": lambda node: setattr(node.condition, "gpu", Card("0000:01:00.0", problems=(COOL,))),
    "device": lambda node: setattr(node.condition, "unused_gpus", 2),
    "precision": lambda node: node.condition.setbacks.update(precision=("a",)),
    "engine": lambda node: node.condition.setbacks.update(engine=("a", "b")),
    "truncated": lambda node: setattr(node.condition.recent, "truncated", 0.6),
    "no-signal": lambda node: setattr(node.condition.recent, "no_signal", 0.95),
    "reward": lambda node: setattr(node.condition.recent, "reward", 0.2),
    "peers": lambda node: setattr(node.condition.recent, "alone", 1.0),
    "quarantine": lambda node: setattr(
        node, "swarm", SwarmStatus("connected", "Qm", reach="relay", quarantined=("QmLiar",))
    ),
    "chain": lambda node: setattr(node, "chain", "unreachable"),
    "reachability": lambda node: setattr(
        node, "swarm", SwarmStatus("starting", "Qm", reach="none")
    ),
    "bootnodes": lambda node: setattr(
        node, "swarm", SwarmStatus("starting", "Qm", foreign_bootnodes=("QmB\x1b",))
    ),
    "clock": lambda node: setattr(node.condition, "clock_offset", -7.0),
    "sampler": lambda node: setattr(node.condition.recent, "sampling_gap", 0.2),
    "rewards": lambda node: node.ledger.update(earned=20),
    "disk": lambda node: setattr(node.condition, "disk_spare_mb", 500),
    "ram": lambda node: setattr(node.condition, "ram_available_mb", 999),
    "pressure": lambda node: setattr(node.condition, "memory_stalled", 0.6),
    "answers": lambda node: setattr(node.condition, "answers_share", 0.25),
    "training": lambda node: setattr(node.condition, "training_share", 0.5),
    "form": lambda node: setattr(node.condition.recent, "closed", 0.3),
}


def well() -> NodeStatus:
    node = blank(device="cpu", form="system", ledger={"earned": 5, "confirmed": 5})
    node.swarm, node.chain = SwarmStatus("connected", "Qm", reach="relay"), "ok"
    node.condition = status.Condition(
        precision="float32",
        engine="torch, lean decoder",
        template="its own chat template",
        clock_offset=0.2,
        disk_spare_mb=50_000,
        ram_available_mb=64_000,
        memory_stalled=0.0,
        answers_share=1.0,
        training_tokens=8192,
        training_share=1.0,
        recent=Recent(
            8,
            truncated=0.1,
            closed=0.9,
            no_signal=0.3,
            sampling_gap=0.001,
            alone=0.25,
            reward=0.5,
            reward_before=0.5,
        ),
    )
    return node


def test_each_check_is_made_to_happen_below():
    assert set(PAST) == set(health.BY_NAME)


@pytest.mark.parametrize("name", PAST)
def test_warning_is_logged_once_shown_everywhere_and_logged_once_when_it_is_over(
    name, tmp_path, caplog, capsys
):
    caplog.set_level(logging.INFO)
    node, check = well(), health.BY_NAME[name]
    health.watch(node)
    assert (node.warnings, caplog.records) == ((), [])
    PAST[name](node)
    for _ in range(3):
        health.watch(node)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name}: ")
    assert check.advice in record.getMessage()
    assert "\x1b" not in record.getMessage()
    (finding,) = node.warnings
    node.write(tmp_path)
    print_status(
        settings.from_flat({"node_state_dir": str(tmp_path)}, "test"),
        argparse.Namespace(json=False, metrics=False),
    )
    shown = capsys.readouterr().out
    assert f"  {finding.severity}: " in shown
    assert check.advice in shown
    samples = metrics.render(node)
    assert (
        f'hivewright_warning{{check="{name}",node="gpu-1",severity="{finding.severity}"}} 1.0'
        in samples
    )
    value = re.search(rf'^hivewright_{check.metric}{{node="gpu-1"}} (.*)$', samples, re.MULTILINE)
    assert value is not None
    assert float(value[1]) == check.measure(node)
    again = dataclasses.replace(well(), warnings=node.warnings)
    for _ in range(2):
        health.watch(again)
    assert again.warnings == ()
    assert [r.getMessage().startswith(f"good again: {name}: ") for r in caplog.records] == [
        False,
        True,
    ]


def test_number_that_wavers_about_its_threshold_is_one_warning(caplog):
    node = well()
    for truncated in (0.51, 0.49, 0.51, 0.47, 0.51):
        node.condition.recent.truncated = truncated
        health.watch(node)
    assert len(caplog.records) == 1
    node.condition.recent.truncated = 0.99
    health.watch(node)
    assert [r.levelname for r in caplog.records] == ["WARNING", "ERROR"]


def test_a_single_bad_round_is_no_warning():
    node = well()
    node.condition.recent = health.recent(
        [{"closed": 0.0, "quality": {"completions_clipped_ratio": 1.0}}]
    )
    assert health.find(node) == ()
    assert (
        health.BY_NAME["truncated"].show(node)
        == "100% of the answers were cut off, in the last round"
    )


def test_reward_is_compared_with_rounds_before_if_they_are_enough():
    def means(*rewards: float) -> Recent:
        return health.recent({"reward_mean": r, "peers_heard": ["Qm"]} for r in rewards)

    few = means(*[0.8] * 15, *[0.1] * 8)
    assert (few.reward, few.reward_before) == (pytest.approx(0.1), None)
    node = blank()
    node.condition.recent = means(*[0.0] * 9, *[0.8] * 64, *[0.06] * 8)
    assert node.condition.recent.reward_before == pytest.approx(0.8)
    health.watch(node)
    assert found(node) == {"reward": "severe"}
    assert "mean 0.060, over the last 8 rounds; before these 0.800" in node.warnings[0].text
    node.condition.recent = means(*[0.04] * 20, *[0.0] * 8)  # it never earned enough to collapse
    health.watch(node)
    assert found(node) == {}


def test_node_is_alone_if_no_peer_answered_in_any_of_its_last_rounds():
    def heard(*counts: int) -> Recent:
        return health.recent({"peers_heard": ["Qm"] * n, "reward_mean": 0.5} for n in counts)

    node = blank()
    node.condition.recent = heard(*[0] * 8)
    assert health.find(node) == ()  # it has no swarm
    node.swarm = SwarmStatus("training-alone", "Qm")
    health.watch(node)
    assert found(node) == {"peers": "warning"}
    node.condition.recent = heard(*[0] * 7, 1)
    health.watch(node)
    assert found(node) == {}
    node.condition.recent = health.recent([{"closed": 0.5}] * 8)  # practice
    assert node.condition.recent.alone is None


# ---- each with the part that it watches


def test_answers_that_have_no_room_are_cut_close_nothing_and_teach_nothing(tmp_path):
    told = train(make_node(enrolled(tmp_path, generation_max_completion_length=1)), 4)
    assert found(told) == {"truncated": "severe", "no-signal": "severe", "form": "severe"}
    assert told.condition.recent.rounds == 4
    again = make_node(
        enrolled(tmp_path, generation_max_completion_length=1)
    )  # a restart forgets nothing
    again.close()
    assert set(found(status.read(tmp_path))) == {"truncated", "no-signal", "form"}


def test_practice_without_a_chain_is_judged_too(tmp_path):
    node = make_node(enrolled(tmp_path, generation_max_completion_length=1))
    for _ in range(4):
        node._practise()
    node.close()
    assert set(found(node.status)) == {"truncated", "no-signal", "form"}


def test_gpu_that_torch_does_not_see_is_not_replaced_silently(tmp_path, monkeypatch):
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(model_sizing, "_DRIVERS_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    auto = settings.Model(device="auto")
    assert model_sizing.count_unused_gpus(auto, "cpu") == 1
    assert model_sizing.count_unused_gpus(auto, "cuda:0") == 0
    assert model_sizing.count_unused_gpus(settings.Model(device="cpu"), "cpu") == 0
    node = make_node(enrolled(tmp_path / "node", model_device="auto"))
    node.close()
    assert found(node.status) == {"device": "severe"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert model_sizing.count_unused_gpus(auto, "cpu") == 0


def test_precision_that_an_engine_does_not_follow_is_a_warning(tmp_path):
    node = make_node(
        enrolled(tmp_path, generation_engine="transformers", generation_dtype="bfloat16")
    )
    node.close()
    assert found(node.status) == {"precision": "warning"}
    assert (
        "torch.bfloat16 is wanted (generation.dtype), transformers' generate computes in"
        " torch.float32" in node.status.warnings[0].text
    )


def test_engine_without_a_compiler_names_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.delenv("HIVEWRIGHT_NATIVE", raising=False)
    native._load.cache_clear()
    try:
        node = make_node(enrolled(tmp_path))
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
    node.close()
    assert found(node.status) == {"engine": "warning"}
    assert "native operations not used: no C compiler (cc)" in node.status.warnings[0].text


def test_sampler_that_says_other_log_probabilities_than_the_trainer_is_a_warning(
    tmp_path, monkeypatch
):
    """A broken engine is simulated by one that is 0.3 nats off: ours are checked when loaded."""
    monkeypatch.setattr(Mix, "score", half_are_right)
    generate = Policy.generate

    def off(policy, *arguments):
        return [
            [
                dataclasses.replace(one, logprobs=tuple(p - 0.3 for p in one.logprobs))
                for one in group
            ]
            for group in generate(policy, *arguments)
        ]

    node = make_node(enrolled(tmp_path, generation_max_completion_length=24))
    monkeypatch.setattr(Policy, "generate", off)
    told = train(node, 4)
    assert found(told)["sampler"] == "warning"
    assert 0.25 < told.condition.recent.sampling_gap < 0.35


def test_pieces_that_memory_cuts_are_warnings(tmp_path):
    checked = enrolled(tmp_path)
    make_node(checked).close()
    (tmp_path / "memory-killed").touch()
    node = make_node(checked)
    node.policy._rows.limit = 4
    told = train(node, 1)
    assert found(told) == {"answers": "warning", "training": "warning"}
    assert told.condition.answers_share == 4 / (4 * checked.generation.num_generations)
    assert told.condition.training_share == 0.5


def test_disk_that_would_refuse_the_next_start_is_severe(tmp_path):
    free_mb = shutil.disk_usage(tmp_path).free // 10**6
    checked = enrolled(tmp_path)
    demanding = checked.node.model_copy(update={"min_free_disk_mb": free_mb + 10_000})
    node = make_node(checked.model_copy(update={"node": demanding}))
    node.close()
    assert found(node.status) == {"disk": "severe"}
    assert condition.spare_mb(settings.Node(state_dir=tmp_path / "gone")) is None


class _Late(http.server.BaseHTTPRequestHandler):
    """An account service whose clock is 100 seconds behind."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() - 100)

    def log_message(self, *_: object) -> None:
        pass


def test_clock_is_compared_with_every_answer_of_the_account_service(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Late)
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = AccountClient(settings.Chain(account_url=url), tmp_path)
    assert client.clock_offset is None
    client._request("GET", "/api/swarm")
    client.close()
    server.server_close()
    node = blank()
    node.condition.clock_offset = client.clock_offset
    health.watch(node)
    assert found(node) == {"clock": "severe"}
    assert re.match(r"(99|100)\.\d s ahead of the account service's", node.warnings[0].text)


@pytest.mark.parametrize(("every", "expected"), [(1, {"rewards": "warning"}), (100, {})])
def test_rewards_that_wait_are_a_warning_unless_they_are_held_back_on_purpose(
    tmp_path, every, expected
):
    ledger = Ledger(tmp_path / "ledger.db")
    chain = settings.Chain(account_url="http://127.0.0.1:9", submit_every_rounds=every)
    settlement = Settlement(
        ledger, None, AccountClient(chain, tmp_path), chain
    )  # not started: nothing answers
    for round in range(11):
        ledger.record(round, 0, "Qm", 500, [], None)
    told = settlement.status()
    node = blank(
        ledger={"earned": told.earned, "held-back": told.held_back, "confirmed": 0, "rejected": 0}
    )
    health.watch(node)
    assert found(node) == expected
    ledger.close()


def test_figures_of_a_failed_step_do_not_hide_those_of_the_others():
    rounds = [{"quality": {"sampling_logp_difference_mean": value}} for value in (0.5, math.nan)]
    assert health.recent(rounds).sampling_gap == 0.5
    assert health.recent([*rounds, {"reward_mean": math.inf}]).reward is None
    assert health.recent([]) == Recent()
