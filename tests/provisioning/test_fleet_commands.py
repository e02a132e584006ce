"""Commands for the whole fleet: the hosts that they take, and hosts that do not answer."""

import argparse
import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nacl.public import PrivateKey

from deploys import backup_pack, operator
from deploys.fleet import commands, queries, tokens
from deploys.fleet.pyinfra_process import Answers, Pyinfra, Ran
from worker.errors import SettingsError, WorkerError

HOSTS = {"hub": ("coordinators",), "gpu-1": ("workers", "rack-a"), "gpu-2": ("workers",)}


class Fleet:
    """Stands in for pyinfra: hosts with groups and data, and what each answers."""

    inventory = "fleet.py"

    def __init__(self, secrets: Path | None = None) -> None:
        self.data: dict[str, dict[str, Any]] = {name: {} for name in HOSTS}
        if secrets is not None:
            self.data = {name: {"secrets_dir": str(secrets)} for name in HOSTS}
        self.outcomes: dict[str, Ran] = {}
        self.ran: list[tuple[str, str, tuple[str, ...], str | None]] = []
        self.is_stopped = False
        self.breaks_locks = False
        self._lock = threading.Lock()

    def hosts(self, *, timeout: float) -> list[dict[str, Any]]:
        return [
            {"name": name, "groups": list(groups), "data": self.data[name]}
            for name, groups in HOSTS.items()
        ]

    def operation(
        self,
        host: str,
        name: str,
        log: Path,
        *arguments: str,
        timeout: float,
        stdin: str | None = None,
    ) -> Ran:
        with self._lock:
            self.ran.append((host, name, arguments, stdin))
        return self.outcomes.get(host, Ran("done"))

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    found = Fleet(tmp_path / "secrets")
    monkeypatch.setattr(Pyinfra, "of_operator", lambda inventory: found)
    monkeypatch.setattr(commands, "heed_signals", lambda: None)
    return found


def answering(
    monkeypatch: pytest.MonkeyPatch, *answers: Answers
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Make hosts answer in turn; return what was asked: facts and hosts."""
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    left = list(answers)

    def ask(pyinfra: object, facts: Sequence[str], hosts: Sequence[str], seconds: int) -> Answers:
        asked.append((tuple(facts), tuple(hosts)))
        return left.pop(0)

    monkeypatch.setattr(queries, "ask", ask)
    return asked


def options(**values: Any) -> argparse.Namespace:
    usual = {"inventory": "fleet.py", "limit": None, "unit": "*", "follow": False, "lines": 50}
    return argparse.Namespace(**usual | {"break_lock": False} | values)


def failure(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(WorkerError) as failed:
        call(*arguments)
    return str(failed.value)


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (None, ["hub", "gpu-1", "gpu-2"]),
        ([], ["hub", "gpu-1", "gpu-2"]),
        (["gpu-2"], ["gpu-2"]),
        (["gpu-*"], ["gpu-1", "gpu-2"]),
        (["rack-a", "hub"], ["hub", "gpu-1"]),
        (["workers", "gpu-1"], ["gpu-1", "gpu-2"]),
        (["gpu-[2-9]"], ["gpu-2"]),
    ],
)
def test_limits_are_names_patterns_and_groups(
    fleet: Fleet, limits: list[str] | None, names: list[str]
) -> None:
    assert commands.chosen(fleet, limits) == names  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", [["gpu-9"], ["hub", "gpu-9"], [""], ["GPU-1"]])
def test_limit_that_matches_no_host_is_refused(fleet: Fleet, limits: list[str]) -> None:
    said = failure(commands.chosen, fleet, limits)
    assert said == f"--limit {limits[-1]}: no such host or group in fleet.py"


@pytest.mark.parametrize("action", ["stop", "start", "restart"])
def test_services_are_changed_on_the_chosen_hosts(
    fleet: Fleet, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(commands, action)(options(limit=["workers"], unit='worker@0"'))
    arguments = (f"action={action}", 'unit="worker@0\\""')
    assert sorted(fleet.ran) == [
        (name, "deploys.maintenance.services", arguments, None) for name in ("gpu-1", "gpu-2")
    ]
    assert sorted(capsys.readouterr().out.splitlines()) == ["gpu-1: done", "gpu-2: done"]


def test_hosts_that_fail_are_named_and_the_others_are_done(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.outcomes = {
        "gpu-1": Ran("unreachable", "can't be reached: timed out"),
        "hub": Ran("failed", "no space left"),
    }
    assert failure(commands.rollback, options()) == "not done on hub, gpu-1; see above"
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "gpu-1: unreachable, can't be reached: timed out",
        "gpu-2: done",
        "hub: failed, no space left",
    ]


def test_end_of_the_operator_stops_what_still_runs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_report_waiting", interrupt)
    with pytest.raises(KeyboardInterrupt):
        commands.rollback(options())
    assert fleet.is_stopped


@pytest.mark.parametrize("is_broken", [True, False])
def test_lock_is_broken_on_request_only(fleet: Fleet, is_broken: bool) -> None:
    commands.rollback(options(break_lock=is_broken))
    assert fleet.breaks_locks is is_broken


LOG = "2026-01-01T00:00:00+0000 hivewright-worker@0[7]: round done"


def test_log_has_host_and_service_and_hosts_that_are_silent_are_named(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers([{"gpu-1": [LOG, "-- No entries --"]}], {"gpu-2": "timed\x1b[2Jout"})
    asked = answering(monkeypatch, answers)
    said = failure(commands.logs, options(limit=["workers"], unit="worker@0"))
    assert said.startswith("no answer from gpu-2 (timed")
    assert "\x1b" not in said
    assert capsys.readouterr().out.splitlines() == [
        "gpu-1/worker@0 2026-01-01T00:00:00+0000 round done",
        "gpu-1 -- No entries --",
    ]
    ((facts, hosts),) = asked
    assert facts == ("deploys.fleet_facts.Logs", "lines=50", "unit=hivewright-worker@0.service")
    assert hosts == ("gpu-1", "gpu-2")


@pytest.mark.parametrize(
    ("unit", "hint"),
    [("workr@0", "did you mean worker@0?"), ("zzz", "these hosts have keeper, worker@0")],
)
def test_service_that_no_host_has_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, unit: str, hint: str
) -> None:
    units = [{"unit": "hivewright-worker@0.service"}, {"unit": "hivewright-keeper.service"}]
    answering(monkeypatch, Answers([{"hub": []}], {}), Answers([{"hub": units}], {}))
    said = failure(commands.logs, options(unit=unit))
    assert said == f"--unit {unit}: no such service on hub, gpu-1, gpu-2; {hint}"


def test_quiet_service_is_no_mistake(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [{"unit": "hivewright-worker@0.service"}]
    answering(monkeypatch, Answers([{"hub": []}], {}), Answers([{"hub": units}], {}))
    commands.logs(options(unit="worker@*"))


@hypothesis_settings(max_examples=80, deadline=None, database=None)
@given(
    log=st.lists(st.sampled_from("abc"), max_size=12),
    shown=st.integers(0, 12),
    window=st.integers(1, 6),
)
def test_lines_of_a_growing_log_are_each_shown_once_or_again_after_a_gap(
    log: list[str], shown: int, window: int
) -> None:
    """A host answers with its last lines, of which the operator has seen the first ones."""
    shown = min(shown, len(log))
    before, now = log[:shown][-window:], log[-window:]
    new = list(commands.new_lines(before, now))
    if len(set(log)) == len(log):
        assert new == log[max(shown, len(log) - window) :]
    known = now[: len(now) - len(new)]
    assert now == known + new
    assert before[len(before) - len(known) :] == known
    for size in range(len(known) + 1, len(now) + 1):
        assert before[-size:] != now[:size]  # more of it was known


def test_what_an_uninstall_would_remove_is_shown_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"hub": ["/opt/hivewright", "/var/lib/hivewright/keeper"], "gpu-1": []}
    answering(monkeypatch, Answers([found], {"gpu-2": "timed out"}))
    said = failure(commands.uninstall, options(identities=False, yes=True))
    assert said == "no answer from gpu-2 (timed out); the others are done"
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        "hub: /opt/hivewright",
        "hub: (stays) /var/lib/hivewright/keeper",
        "gpu-1: nothing",
    ]
    assert sorted(fleet.ran) == [
        (name, "deploys.maintenance.uninstall", ("identities=false",), None)
        for name in ("gpu-1", "hub")
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_uninstall_without_a_yes_removes_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    answering(monkeypatch, Answers([{"hub": ["/opt/hivewright"]}], {}))
    typed = io.StringIO("y\n")
    monkeypatch.setattr(typed, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdin", typed)
    said = failure(commands.uninstall, options(identities=True, yes=False))
    expected = "not confirmed; nothing was removed" if is_terminal else "put --yes to do it"
    assert said.endswith(expected)
    assert fleet.ran == []


def test_passphrase_is_one_line_of_a_file_or_typed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passphrase").write_text("correct horse\n")
    assert commands.passphrase(tmp_path / "passphrase", is_new=True) == "correct horse"
    (tmp_path / "passphrase").write_text("correct\nhorse\n")
    said = failure(commands.passphrase, tmp_path / "passphrase", True)
    assert "2 lines instead of one" in said
    assert "horse" not in said
    typed = io.StringIO()
    monkeypatch.setattr("sys.stdin", typed)
    assert "no terminal to ask for the passphrase at" in failure(commands.passphrase, None, True)
    monkeypatch.setattr(typed, "isatty", lambda: True)
    answers = ["one passphrase", "another", "the same", "the same", "once"]
    monkeypatch.setattr(commands.getpass, "getpass", lambda prompt: answers.pop(0))
    assert failure(commands.passphrase, None, True) == (
        "the two passphrases differ; nothing was done"
    )
    assert commands.passphrase(None, is_new=True) == "the same"
    assert commands.passphrase(None, is_new=False) == "once"


# ---- the fleet's enrolment token


def sealed_tokens(
    monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes], reasons: dict[str, str]
) -> None:
    """Make hosts answer with their tokens, sealed for whoever asks."""

    def ask(pyinfra: object, facts: Sequence[str], hosts: Sequence[str], seconds: int) -> Answers:
        key = facts[1].removeprefix("key=")
        values = {name: backup_pack.seal(content, key) for name, content in contents.items()}
        return Answers([values], reasons)

    monkeypatch.setattr(queries, "ask", ask)


def test_token_of_the_coordinator_is_fetched_for_the_operator_only(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sealed_tokens(monkeypatch, {"gpu-1": b"the-token\n", "hub": b"the-token\n"}, {})
    tokens.fetch(options())
    file = tmp_path / "secrets/enrolment.token"
    assert file.read_text() == "the-token\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == f"{file}: the enrolment token of hub\n"
    tokens.fetch(options())
    assert capsys.readouterr().out == f"{file}: is the token of hub already\n"


def test_hosts_with_another_token_are_named_and_the_coordinators_is_kept(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    operator.keep_token(tmp_path / "secrets", "the-one-before")
    sealed_tokens(monkeypatch, {"gpu-1": b"old\n", "hub": b"new\n", "gpu-2": b"new\n"}, {})
    said = failure(tokens.fetch, options())
    assert said.startswith(
        "gpu-1: another enrolment token than hub; `hivewright fleet rotate-token"
    )
    assert (tmp_path / "secrets/enrolment.token").read_text() == "new\n"
    shown = capsys.readouterr().out
    aside = Path(shown.strip().rpartition(" ")[2])
    assert aside.read_text() == "the-one-before\n"


@pytest.mark.parametrize(
    ("contents", "reasons", "message"),
    [
        ({}, {}, "none of hub, gpu-1, gpu-2 has an enrolment token; nothing was written"),
        ({}, {"hub": "x"}, "has an enrolment token; no answer from hub; nothing was written"),
        ({"hub": b"two words"}, {}, "hub: /etc/hivewright/enrolment.token has 2 words; expected"),
        ({"hub": b""}, {}, "hub: /etc/hivewright/enrolment.token has 0 words; expected one"),
        ({"hub": b"\xff \xfe"}, {}, "has 2 words; expected one"),
    ],
)
def test_token_that_can_t_be_fetched_changes_nothing(
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: dict[str, bytes],
    reasons: dict[str, str],
    message: str,
) -> None:
    sealed_tokens(monkeypatch, contents, reasons)
    assert message in failure(tokens.fetch, options())
    assert not (tmp_path / "secrets").exists()


@pytest.mark.parametrize("sealed", ["", "no base 64 é", "AAAA", "A" * 100])
def test_answer_that_is_not_sealed_for_us_is_refused(sealed: str) -> None:
    said = failure(commands.opened, "hub", sealed, PrivateKey.generate())
    assert said == "hub: what it sealed can't be opened; nothing was written"


def test_new_token_reaches_the_coordinator_first(fleet: Fleet, tmp_path: Path) -> None:
    operator.keep_token(tmp_path / "secrets", "old-token")
    tokens.rotate(options())
    new = operator.enrolment_token(tmp_path / "secrets")
    assert new not in (None, "old-token")
    assert fleet.ran[0][0] == "hub"
    assert {(name, stdin) for name, _, _, stdin in fleet.ran} == {
        (name, f"{new}\n") for name in HOSTS
    }
    assert operator.replaced_tokens(tmp_path / "secrets") == {operator.fingerprint("old-token")}


def test_coordinator_that_fails_keeps_the_token_from_the_workers(
    fleet: Fleet, tmp_path: Path
) -> None:
    operator.keep_token(tmp_path / "secrets", "old-token")
    fleet.outcomes = {"hub": Ran("unreachable", "can't be reached")}
    said = failure(tokens.rotate, options())
    assert said == "not done on hub; see above; a deploy gives these hosts the new token"
    assert [host for host, *_ in fleet.ran] == ["hub"]


def test_nothing_is_rotated_without_a_coordinator_or_a_token(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing to replace" in failure(tokens.rotate, options())
    monkeypatch.delitem(HOSTS, "hub")
    fleet.data.pop("hub")
    said = failure(tokens.rotate, options())
    assert said == (
        "fleet.py: no coordinator; expected one, because only a fleet with its own coordinator can"
        " replace its token"
    )
    assert fleet.ran == []


def test_hosts_with_different_folders_of_secrets_are_refused(fleet: Fleet) -> None:
    fleet.data["gpu-1"] = {"secrets_dir": "other"}
    for command in (tokens.fetch, tokens.rotate):
        with pytest.raises(SettingsError, match=r"secrets_dir: got .* on different hosts"):
            command(options())
