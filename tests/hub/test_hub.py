"""The push to the Hub runs in the background, from a finished checkpoint, and never stops training.

Against a stand-in of the Hub (stand_in.py), through the real huggingface_hub client in its own
process.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stand_in import TOKEN, HubStandIn

from tests import preloaded
from worker import settings
from worker.errors import SettingsError
from worker.hub.hub import Hub, HubStatus
from worker.telemetry.model_card import model_card
from worker.telemetry.status import NodeStatus

REPO = "hive/model"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    stand_in = HubStandIn()
    yield stand_in
    stand_in.close()


class Pusher:
    """A Hub part with a checkpoint to push."""

    def __init__(self, folder: Path, endpoint: str, **departures: object) -> None:
        self.folder, self.token = folder, folder / "token"
        self.token.write_text(TOKEN + "\n")
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint/model.safetensors").write_bytes(b"weights of round 7")
        section = {
            "repo": REPO,
            "token_file": str(self.token),
            "endpoint": endpoint,
            "every_rounds": 10,
            **departures,
        }
        self.hub = Hub(
            settings.parse({"hub": section}, "test").hub, folder, "tiny-hivewright-brown-otter", 0
        )

    def push(self, round: int = 7, describe: Callable[[Path], None] | None = None) -> None:
        weights = self.folder / "checkpoint/model.safetensors"
        self.hub.push(10, round, weights, describe or self._describe)

    def end(self) -> HubStatus:
        self.hub.flush(60)
        return self.hub.status()

    def pid(self) -> int:
        assert self.hub._process is not None
        return self.hub._process.pid

    @staticmethod
    def _describe(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("---\ntags: [x]\n---\n# card\n")


@pytest.fixture
def pusher(tmp_path: Path, stand_in: HubStandIn) -> Iterator[Pusher]:
    pusher = Pusher(tmp_path, stand_in.endpoint)
    yield pusher
    pusher.hub.close()


def test_push_brings_weights_description_and_card(pusher: Pusher, stand_in: HubStandIn) -> None:
    started = time.monotonic()
    pusher.push()
    assert time.monotonic() - started < 1.0
    assert pusher.hub.status().state == "uploading"
    (pusher.folder / "checkpoint/model.safetensors").unlink()  # the next checkpoints push it out
    assert pusher.end() == HubStatus(REPO, "pushed", round=7, pushed_round=7)
    assert stand_in.repos[REPO] == [
        {
            "model.safetensors": b"weights of round 7",
            "config.json": b"{}",
            "README.md": b"---\ntags: [x]\n---\n# card\n",
        }
    ]
    assert stand_in.messages == ["round 7"]
    assert stand_in.private[REPO] is False


def test_second_push_goes_into_the_same_repository(pusher: Pusher, stand_in: HubStandIn) -> None:
    pusher.push()
    pusher.end()
    (pusher.folder / "checkpoint/model.safetensors").unlink()
    (pusher.folder / "checkpoint/model.safetensors").write_bytes(b"weights of round 17")
    pusher.push(17)
    assert pusher.end().pushed_round == 17
    assert [files["model.safetensors"] for files in stand_in.repos[REPO]] == [
        b"weights of round 7",
        b"weights of round 17",
    ]


def test_namespace_alone_gets_a_repository_of_the_node(
    tmp_path: Path, stand_in: HubStandIn
) -> None:
    pusher = Pusher(tmp_path, stand_in.endpoint, repo="hive", private=True)
    pusher.push()
    assert pusher.end().state == "pushed"
    assert list(stand_in.repos) == ["hive/tiny-hivewright-brown-otter"]
    assert stand_in.private["hive/tiny-hivewright-brown-otter"] is True


def test_refused_token_is_a_failure_that_is_said_and_tried_again(
    pusher: Pusher, stand_in: HubStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    pusher.token.write_text("wrong")
    pusher.push()
    status = pusher.end()
    assert (status.state, status.failures, status.pushed_round) == ("failed", 1, None)
    assert status.error is not None
    assert f"{stand_in.endpoint} says 401: Invalid credentials" in status.error
    assert "push to the hub failed, trying again in 10 rounds round=7" in caplog.text
    assert TOKEN not in caplog.text
    pusher.token.write_text(TOKEN)
    pusher.push(17)
    assert pusher.end() == HubStatus(REPO, "pushed", round=17, pushed_round=17, failures=1)


def test_hub_that_is_not_there_is_a_failure(tmp_path: Path, stand_in: HubStandIn) -> None:
    stand_in.close()
    pusher = Pusher(tmp_path, stand_in.endpoint)
    pusher.push()
    assert pusher.end().state == "failed"


def test_hub_that_never_answers_is_given_up_in_time(tmp_path: Path, stand_in: HubStandIn) -> None:
    stand_in.trouble = "hang"
    pusher = Pusher(tmp_path, stand_in.endpoint, timeout_seconds=3.0)
    pusher.push()
    pid = pusher.pid()
    status = pusher.end()
    assert status.error == "not done after 3 s (hub.timeout_seconds)"
    assert not Path(f"/proc/{pid}").exists()


def test_push_is_left_out_while_one_is_going_on(
    pusher: Pusher, stand_in: HubStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.trouble = "hang"
    pusher.push()
    pid = pusher.pid()
    pusher.push(17)
    assert pusher.pid() == pid
    assert "push skipped, the last one is still running round=17 uploading=7" in caplog.text


def test_close_ends_the_upload(pusher: Pusher, stand_in: HubStandIn) -> None:
    stand_in.trouble = "hang"
    pusher.push()
    pid = pusher.pid()
    pusher.hub.close()
    assert not Path(f"/proc/{pid}").exists()
    assert pusher.hub.status().error == "the worker stopped before it was done"


def test_upload_dies_with_a_killed_worker(tmp_path: Path, stand_in: HubStandIn) -> None:
    stand_in.trouble = "hang"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from test_hub"
        " import Pusher\npusher = Pusher(Path(sys.argv[2]), sys.argv[3]); pusher.push();"
        " print(pusher.pid(), flush=True)\nimport time; time.sleep(60)"
    )
    worker = preloaded.Popen(
        [sys.executable, "-c", code, Path(__file__).parent, tmp_path, stand_in.endpoint],
        "worker.node",
        stdout=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        deadline = time.monotonic() + 30
        while not stand_in.num_requests and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stand_in.num_requests
    finally:
        worker.kill()
        worker.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the upload lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("generation config is inconsistent"),
        TypeError("not serializable"),
        KeyError("groups_local"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_model_that_can_not_be_described_is_a_failure_whatever_is_wrong(
    pusher: Pusher, error: Exception
) -> None:
    def refuse(folder: Path) -> None:
        raise error

    pusher.push(describe=refuse)
    assert pusher.hub.status().state == "failed"
    assert pusher.hub.status().error == f"{type(error).__name__}: {error}"


def test_checkpoint_that_is_gone_is_a_failure(pusher: Pusher) -> None:
    (pusher.folder / "checkpoint/model.safetensors").unlink()
    pusher.push()
    assert "No such file" in str(pusher.end().error)


def test_push_is_due_every_so_many_rounds_whatever_came_of_the_last(
    pusher: Pusher, stand_in: HubStandIn
) -> None:
    assert [r for r in range(25) if pusher.hub.is_due(r)] == list(range(10, 25))
    stand_in.trouble = 500
    pusher.hub.push(12, 12, pusher.folder / "nowhere", pusher._describe)
    assert [r for r in range(12, 25) if pusher.hub.is_due(r)] == list(range(20, 25))


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "No such file"), ("", "is empty"), ("\n", "is empty")]
)
def test_token_file_that_holds_none_is_a_settings_error(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=rf"token \(hub.token_file\): {reason}"):
        Hub(settings.Hub(repo=REPO, token_file=file), tmp_path, "x", 0)


def test_token_without_a_repository_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="token_file is set and repo is not"):
        settings.parse({"hub": {"token_file": "/t"}}, "test")


def test_card_says_what_where_and_how_well() -> None:
    node = NodeStatus("gpu", "QmPeer", "quick brown otter", "Qwen/Qwen2.5-0.5B-Instruct", "0.1.0")
    node.round, node.rounds_trained, node.environments = 41, 40, ("reasoning-gym 0.1.25",)
    node.levels = {"gcd": 2}
    rounds = [
        {
            "reward_mean": 0.2 + i / 100,
            "peers_heard": ["a", "b"] if i else ["c"],
            "groups_local": 5,
            "groups_external": 4,
        }
        for i in range(40)
    ]
    families = [
        {"name": "gcd", "level": 0},
        {"name": "lcm", "weight": 3.0, "config": {"max_value": 9}},
    ]
    card = model_card(settings.parse({"environment": {"families": families}}, "test"), node, rounds)
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert metadata["library_name"] == "transformers"
    for words in (
        "# quick brown otter, round 41",
        "| peers that it heard | 3 |",
        "| rounds trained | 40 |",
        "`QmPeer`",
        "200 of its own, 160 of its peers",
        "| mean reward | 0.495 (last 20 rounds), 0.295 in its first |",
        "| sum of rewards | 15.80 |",
        "Tasks of reasoning-gym 0.1.25",
        "| gcd | 25% | `default` | 2 |",
        "| lcm | 75% | `{'max_value': 9}` | - |",
        "hivewright",
    ):
        assert words in card, words
    assert "base_model" not in model_card(
        settings.Settings(), NodeStatus("a", "Qm", "b", "hivewright/tiny", "1"), []
    )


WORKER = {
    "model": {"name": "hivewright/tiny", "device": "cpu", "threads": 1},
    "environment": {"families": [{"name": "gcd", "level": 0}], "tasks_per_round": 4},
    "generation": {"num_generations": 8, "max_prompt_length": 128, "max_completion_length": 16},
    "swarm": {"enabled": False},
}


@pytest.mark.parametrize(
    "trainer", [{}, {"lora": {"rank": 2}, "learning_rate": 0.01}], ids=["whole", "lora"]
)
def test_worker_pushes_a_model_that_transformers_loads(
    tmp_path: Path, stand_in: HubStandIn, trainer: dict[str, object]
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    hub = {
        "repo": "hive",
        "token_file": str(tmp_path / "token"),
        "endpoint": stand_in.endpoint,
        "every_rounds": 2,
    }
    node = {"state_dir": str(tmp_path / "state"), "min_free_disk_mb": 1, "max_rounds": 3}
    file = tmp_path / "worker.yaml"
    file.write_text(yaml.safe_dump({**WORKER, "node": node, "hub": hub, "trainer": trainer}))
    for command in ("enrol", "worker"):
        done = preloaded.run(
            [sys.executable, "-m", "worker", command, "--settings", file],
            "worker.node",
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "state/status.json").read_text())
    assert (status["hub"]["state"], status["hub"]["failures"]) == ("pushed", 0), status["hub"]
    (repo,) = stand_in.repos
    assert repo.startswith("hive/tiny-hivewright-")
    (files,) = stand_in.repos[repo]
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert "| rounds trained | 2 |" in (folder / "README.md").read_text()

    from worker.policy.policy import load

    weights = load_file(folder / "model.safetensors")
    before = load(settings.Model(device="cpu")).model
    assert weights.keys() == dict(before.named_parameters()).keys()
    assert any(
        not torch.equal(weights[name], parameter) for name, parameter in before.named_parameters()
    )
    policy = load(settings.Model(name=str(folder), device="cpu"))
    answers = policy.generate(
        ["1 + 1"], settings.Generation(num_generations=2, max_completion_length=4), seed=1
    )
    assert answers[0] is not None
