"""Wait for the account service, which must answer before workers can be enrolled."""

from collections.abc import Iterator

from pyinfra import host
from pyinfra.api import deploy, operation

from deploys.facts import Identities
from deploys.inventory.host_plan import Planned

ANSWER_SECONDS = 120


@deploy("Account")
def await_account(plan: Planned) -> None:
    """Wait on every host, before any slot is enrolled, until the account service answers.

    pyinfra keeps the order of operations only within a host. This operation is the same on all
    hosts, so on the whole fleet everything before it is done before everything after it.
    """
    urls = {slot.number: slot.settings.chain.account_url for slot in plan.host.slots}
    numbers = [number for number, url in urls.items() if url]
    answers(
        name="Wait until it answers",
        url=urls[numbers[0]] if numbers else None,
        numbers=numbers,
        _timeout=ANSWER_SECONDS + 30,
    )


@operation()
def answers(
    url: str | None,
    numbers: list[int],
) -> Iterator[str]:
    """Wait until the account service answers, unless all slots in `numbers` are enrolled."""
    enrolled = host.get_fact(Identities) if numbers else {}
    if url is None or all(number in enrolled for number in numbers):
        host.noop("nothing is to be enrolled")
        return
    ask = (
        f"until curl --silent --fail --output /dev/null --max-time 5 {url}/api/swarm; do sleep 1;"
        " done"
    )
    yield (
        f"timeout {ANSWER_SECONDS} sh -c '{ask}' && exit 0; echo 'no answer from {url}/api/swarm"
        f" within {ANSWER_SECONDS} s; is hivewright-account.service up on the coordinator, and"
        " reachable from here?' >&2; exit 1"
    )
