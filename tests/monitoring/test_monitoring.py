"""The files of monitoring/ in the real Prometheus, and the endpoint that it scrapes."""

import json
import os
import re
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.monitoring import prometheus_server
from worker import metrics_endpoint, settings
from worker.chain.keeper_status import Status
from worker.chain.queue_status import QueuesStatus, QueueState
from worker.errors import ResourceError
from worker.telemetry.status import NodeStatus

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "monitoring"
_METRIC = re.compile(r"\bhivewright_[a-z0-9_]+")


@pytest.fixture(scope="module")
def _prometheus():
    reason = prometheus_server.why_no_prometheus()
    if reason is not None:
        pytest.skip(reason)


def fleet(tmp_path, **fields):
    (tmp_path / "keeper").mkdir(exist_ok=True)
    flat = {
        "node_state_dir": str(tmp_path),
        "keeper_state_dir": str(tmp_path / "keeper"),
        "metrics_port": 0,
        **fields,
    }
    return settings.from_flat(flat, "test")


def scrape(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        return answer.read().decode()


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def serve(role, of, caplog):
    caplog.set_level("INFO", "worker.metrics_endpoint")
    serving = metrics_endpoint.serving(role, of)
    serving.__enter__()
    return serving, re.findall(r"http://[0-9.:]+", caplog.text)[-1]


def test_worker_serves_its_status_and_its_process(tmp_path, caplog):
    node = NodeStatus("a", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", round=7)
    node.write(tmp_path)
    serving, url = serve("worker", fleet(tmp_path), caplog)
    try:
        found = samples(scrape(url))
        node.round = 8
        node.write(tmp_path)
        later = samples(scrape(url))
    finally:
        serving.__exit__(None, None, None)
    assert found["hivewright_round", ("node", "a")] == 7
    assert later["hivewright_round", ("node", "a")] == 8
    assert found["hivewright_status_readable",] == 1
    assert found["process_resident_memory_bytes",] > 1e6
    with pytest.raises(OSError, match="refused"):
        scrape(url)


def test_keeper_serves_its_round_and_its_state(tmp_path, caplog):
    of = fleet(tmp_path)
    now = Status("round-open", 4, 2, 3, 1e9)
    (tmp_path / "keeper/status.json").write_text(json.dumps(asdict(now)))
    serving, url = serve("keeper", of, caplog)
    try:
        found = samples(scrape(url))
    finally:
        serving.__exit__(None, None, None)
    assert found["hivewright_keeper_state", ("state", "round-open")] == 1
    assert found["hivewright_keeper_state", ("state", "stopped")] == 0
    assert found["hivewright_keeper_round",] == 4
    assert found["hivewright_keeper_round_began_time_seconds",] == 1e9


def test_account_service_serves_its_queues(tmp_path, caplog):
    state = QueueState(2, 1, 1e9, 3, "submitReward: refused", 2e9)
    (tmp_path / "queues.json").write_text(json.dumps(asdict(QueuesStatus(3e9, state))))
    serving, url = serve("account", fleet(tmp_path, account_state_dir=str(tmp_path)), caplog)
    try:
        found = samples(scrape(url))
        (tmp_path / "queues.json").write_text("{}")
        damaged = samples(scrape(url))
    finally:
        serving.__exit__(None, None, None)
    assert found["hivewright_queue_transactions", ("state", "waiting")] == 2
    assert found["hivewright_queue_transactions", ("state", "sent")] == 1
    assert found["hivewright_queue_failed_total",] == 3
    assert found["hivewright_queue_time_seconds",] == 3e9
    assert found["hivewright_queue_oldest_time_seconds",] == 1e9
    assert found["hivewright_queue_error_time_seconds", ("error", "submitReward: refused")] == 2e9
    assert damaged["hivewright_status_readable",] == 0
    assert not any("queue" in name for name, *_ in damaged)


def test_rollback_of_the_host_is_a_figure_of_each_service(tmp_path, caplog, monkeypatch):
    release = tmp_path / "releases" / ("a" * 40)
    release.mkdir(parents=True)
    note = tmp_path / "rolled-back.json"
    note.write_text(json.dumps({"release": "b" * 40, "reason": "gpu-1: \x1bslow"}))
    os.utime(note, (7, 7))
    monkeypatch.chdir(release)
    NodeStatus("a", "Qm", "otter", "hivewright/tiny", "0.1.0", round=7).write(tmp_path)
    serving, url = serve("worker", fleet(tmp_path), caplog)
    try:
        found = samples(scrape(url))
        note.write_text("{")
        damaged = samples(scrape(url))
    finally:
        serving.__exit__(None, None, None)
    labels = ("reason", r"gpu-1: \x1bslow"), ("release", "b" * 12)
    assert found["hivewright_rolled_back_time_seconds", *labels] == 7
    # The node's own figures are still there.
    assert damaged["hivewright_status_readable",] == 0
    assert damaged["hivewright_round", ("node", "a")] == 7


def test_damaged_status_is_a_figure_and_not_an_error(tmp_path, caplog):
    (tmp_path / "status.json").write_text("{")
    serving, url = serve("worker", fleet(tmp_path), caplog)
    try:
        assert samples(scrape(url))["hivewright_status_readable",] == 0
    finally:
        serving.__exit__(None, None, None)


def test_expiry_of_the_tailscale_key_is_a_figure(tmp_path, caplog, monkeypatch):
    program = tmp_path / "tailscale"
    program.write_text('#!/bin/sh\necho \'{"Self": {"KeyExpiry": "2027-01-01T00:00:00Z"}}\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    serving, url = serve("bootnode", fleet(tmp_path), caplog)
    try:
        found = samples(scrape(url))
    finally:
        serving.__exit__(None, None, None)
    assert found["hivewright_tailscale_key_expires_time_seconds",] == 1798761600
    assert found["hivewright_build_info", ("role", "bootnode"), ("version", "0.1.0")] == 1


def test_port_that_is_taken_is_named(tmp_path, caplog):
    serving, url = serve("bootnode", fleet(tmp_path), caplog)
    try:
        taken = fleet(tmp_path, metrics_port=int(url.rpartition(":")[2]))
        with (
            pytest.raises(ResourceError, match=r"\(metrics.port\): already in use"),
            metrics_endpoint.serving("bootnode", taken),
        ):
            pass
    finally:
        serving.__exit__(None, None, None)


@pytest.mark.usefixtures("_prometheus")
def test_rules_and_configuration_are_valid_and_each_alert_fires(tmp_path):
    prometheus_server.promtool("check", "config", "--syntax-only", FILES / "prometheus.yml")
    assert "SUCCESS" in prometheus_server.promtool("check", "rules", FILES / "alerts.yml")
    tests = (Path(__file__).parent / "alerts_test.yml").read_text()
    (tmp_path / "tests.yml").write_text(tests.replace("RULES", str(FILES / "alerts.yml")))
    prometheus_server.promtool("test", "rules", tmp_path / "tests.yml")
    rules = yaml.safe_load((FILES / "alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules if rule["alert"] not in tests] == []
    assert all(set(rule["annotations"]) == {"summary", "action"} for rule in rules)


@pytest.mark.usefixtures("_prometheus")
def test_prometheus_scrapes_the_targets_and_loads_the_rules(tmp_path, caplog):
    NodeStatus("a", "Qm", "quick brown otter", "hivewright/tiny", "0.1.0", round=7).write(tmp_path)
    serving, url = serve("worker", fleet(tmp_path), caplog)
    try:
        config = yaml.safe_load((FILES / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FILES / "alerts.yml")]
        targets = tmp_path / "targets.json"
        labels = {"host": "gpu-1", "service": "worker", "slot": "0"}
        groups = [{"targets": [url.removeprefix("http://")], "labels": labels}]
        targets.write_text(json.dumps(groups))
        config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(targets)]
        file = tmp_path / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        with prometheus_server.serving(file, tmp_path / "data") as server:
            deadline = time.monotonic() + prometheus_server.PATIENCE_SECONDS
            query = f"{server}/api/v1/query?query=hivewright_round"
            while not (found := prometheus_server.ask(query)["result"]):
                assert time.monotonic() < deadline, "nothing was scraped"
                time.sleep(0.2)
            rules = prometheus_server.ask(f"{server}/api/v1/rules")["groups"][0]["rules"]
    finally:
        serving.__exit__(None, None, None)
    assert found[0]["value"][1] == "7"
    assert labels.items() <= found[0]["metric"].items()
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert len(rules) == 16


def test_rules_and_dashboard_name_figures_that_exist():
    page = (ROOT / "docs/operations/monitoring.md").read_text()
    documented = set(_METRIC.findall(page))
    for file in ("alerts.yml", "grafana-dashboard.json"):
        used = set(_METRIC.findall((FILES / file).read_text()))
        assert used - documented == set(), (
            f"{file}: docs/operations/monitoring.md has no such figure"
        )
    dashboard = json.loads((FILES / "grafana-dashboard.json").read_text())
    shown = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    assert len(shown) >= 18
    assert all(panel["targets"] for panel in shown)
