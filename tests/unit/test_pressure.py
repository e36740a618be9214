"""Whether the processor is the limit: by what the kernel counts."""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest

from agent.pressure import Pressure


class Kernel:
    """What the kernel would say: seconds of this thread, and of all processors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran = self.idle = self.total = 0.0
        monkeypatch.setattr(time, "thread_time", lambda: self.ran)
        monkeypatch.setattr(psutil, "cpu_times", self._times)

    def _times(self) -> Any:
        class Times(tuple[float, ...]):
            idle, iowait, guest, guest_nice = self.idle, 0.0, 0.0, 0.0

        return Times((self.total - self.idle, self.idle))


@pytest.mark.parametrize(
    ("ran", "idle", "pressed"),
    [(0.0, 2.0, False), (0.4, 1.0, False), (0.6, 1.4, True), (0.1, 0.1, True), (0.1, 0.3, False)],
)
def test_a_busy_loop_or_busy_processors_are_the_limit(
    monkeypatch: pytest.MonkeyPatch, ran: float, idle: float, pressed: bool
) -> None:
    kernel = Kernel(monkeypatch)
    pressure = Pressure(100.0)
    pressure.look(101.0)  # from here on all processors' seconds are known
    kernel.ran, kernel.idle, kernel.total = ran, idle, 2.0
    assert pressure.look(102.0) is pressed


def test_what_was_found_holds_until_it_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    pressure = Pressure(100.0)
    kernel.ran = 1.0
    assert pressure.look(101.0)
    kernel.total = kernel.idle = 2.0
    assert pressure.look(101.1)
    assert not pressure.look(102.0)
