"""Progress of long operations: silent at first, then told now and then, and over at the end."""

import re
import threading
import time

import pytest

from deploys import progress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.02)


def reporters() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if "report" in each.name]


def test_short_operation_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.waiting("asking"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("quick")
def test_long_operation_tells_what_it_does_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = ""
    with progress.waiting("asking 3 hosts"):
        while shown.count("\n") < 2:
            time.sleep(0.01)
            out, err = capsys.readouterr()
            assert out == ""
            shown += err
    assert all(re.fullmatch(r"asking 3 hosts \(\d+ s\)", line) for line in shown.splitlines())
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_operation_that_fails_ends_its_messages(capsys: pytest.CaptureFixture[str]) -> None:
    before = reporters()
    with pytest.raises(ValueError, match="no answer"), progress.waiting("asking"):
        raise ValueError("no answer")
    assert reporters() == before
