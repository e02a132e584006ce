"""Watch the GPU of a worker: a thread runs nvidia-smi, the round loop reads its last result."""

import logging
import threading
from collections.abc import Sequence

from worker.errors import DeviceIll
from worker.runtime import gpu_health
from worker.runtime.gpu_health import Card

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0


class GpuWatch:
    """The health of one GPU. `card`: its last state; None: unknown, or no GPU."""

    def __init__(
        self,
        uuid: str | None,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """Begin to watch the GPU with this UUID, as nvidia-smi lists it; None: watch nothing."""
        self._uuid = uuid
        self._every_seconds = every_seconds
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.card: Card | None = None
        if uuid is not None:
            self.look()
            self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Run nvidia-smi now."""
        if self._uuid is not None:
            self.card = choose(gpu_health.parse(gpu_health.query()), self._uuid)

    def require_healthy(self) -> None:
        """Raise DeviceIll if the card must not train.

        nvidia-smi runs again first, because on a busy machine one output may be late or truncated.
        """
        if self.card is not None and self.card.is_ill:
            self.look()
        if self.card is not None and self.card.is_ill:
            raise DeviceIll(f"{describe(self.card)}; then start this worker again")

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(gpu_health.QUERY_SECONDS)

    def _run(self) -> None:
        while not self._end.wait(self._every_seconds):
            self.look()


def choose(
    cards: Sequence[Card],
    uuid: str,
) -> Card | None:
    """Return the card with this UUID, or else a lost card; None if there is neither."""
    for card in cards:
        if card.uuid == uuid:
            return card
    return next((card for card in cards if card.uuid is None), None)


def describe(card: Card) -> str:
    """Return the card's problems in one line."""
    name = card.name or "GPU"
    return f"{name} at {card.bus_id}: " + "; ".join(map(str, card.problems))
