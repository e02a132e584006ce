"""An outage is logged when it begins and when it ends."""

import logging

from worker.runtime.outage import Outage

log = logging.getLogger(__name__)


def test_first_failure_and_first_success_are_logged(caplog):
    caplog.set_level(logging.INFO)
    outage = Outage(log)
    outage.end("back before it was away")
    for number in range(3):
        outage.begin("away error=%d", number)
        assert outage.is_on
    for number in range(2):
        outage.end("back error=%d", number)
        assert not outage.is_on
    outage.begin("away error=%d", 7)
    logged = [(record.levelname, record.getMessage(), record.filename) for record in caplog.records]
    place = "test_outage.py"
    assert logged == [
        ("WARNING", "away error=0", place),
        ("INFO", "back error=0", place),
        ("WARNING", "away error=7", place),
    ]
