"""An agent's way up: which ancestor it is attached to, and what it does when that one goes.

resting --due--> attaching --Attached--> attached
   ^                |                       |
   +-- lost, silent or rejected: the next ancestor, or the first again after a pause --+
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from protocol.commands import Member
from protocol.events import Connect, Disconnect, Effect
from protocol.limits import ATTACH_JITTER, ATTACH_WITHIN, PARENT_TRIES, RETRY_FIRST, RETRY_MOST, SILENT_AFTER
from protocol.outcomes import sentence


class Phase(Enum):
    """Where an agent stands with its parent."""

    RESTING = "resting"
    ATTACHING = "attaching"
    ATTACHED = "attached"


class Uplink:
    """The agent's attachment. `draw` gives numbers in [0, 1) for jitter."""

    def __init__(self, ancestors: tuple[Member, ...], draw: Callable[[], float]) -> None:
        self._ancestors = ancestors
        self._draw = draw
        self._index = 0
        self._tried = 0
        self._pause = RETRY_FIRST
        self._patience = PARENT_TRIES
        self._until = 0.0
        self.heard = 0.0
        self.phase = Phase.RESTING
        #: Counts attachments since the agent began; each try has its own number.
        self.epoch = 0
        #: Why the last parent was left, for the people who ask why a host is not where it was planned.
        self.why = ""

    @property
    def parent(self) -> Member:
        """The ancestor that is tried or attached to."""
        return self._ancestors[self._index]

    @property
    def attached(self) -> bool:
        """Whether the parent has said that we are in."""
        return self.phase is Phase.ATTACHED

    def begin(self, now: float) -> None:
        """Attach to the first ancestor at once."""
        self.phase, self._until = Phase.RESTING, now

    def replan(self, ancestors: tuple[Member, ...], now: float) -> None:
        """New ancestors. The agent stays where it is if that is the planned parent now, else it moves there."""
        same = self._ancestors[self._index] == ancestors[0]
        self._ancestors, self._index, self._tried = ancestors, 0, 0
        self._patience = PARENT_TRIES
        if not same or self.phase is not Phase.ATTACHED:
            self.why = "the plan changed"
            self.phase, self._until = Phase.RESTING, now + ATTACH_JITTER * self._draw()

    def accepted(self, epoch: int, now: float) -> bool:
        """The parent answered the attachment with this epoch; false where that is not the present one."""
        if self.phase is not Phase.ATTACHING or epoch != self.epoch:
            return False
        self.phase, self.heard = Phase.ATTACHED, now
        self._tried, self._pause, self._patience = 0, RETRY_FIRST, 0
        return True

    def lost(self, why: str, now: float) -> list[Effect]:
        """The parent is gone, or would not have us: on to the next ancestor."""
        if self.phase is Phase.RESTING:
            return []
        was_attached = self.phase is Phase.ATTACHED
        self.why = sentence(f"{self.parent.name}: {why}")
        if self._patience and not self._index and not was_attached:
            self._patience -= 1
            self.phase = Phase.RESTING
            self._until = now + RETRY_FIRST * (PARENT_TRIES - self._patience) * (0.5 + self._draw())
            return [Disconnect()]
        self._tried = 1 if was_attached else self._tried + 1
        self._index = (self._index + 1) % len(self._ancestors)
        self.phase = Phase.RESTING
        if self._tried < len(self._ancestors):
            self._until = now + ATTACH_JITTER * self._draw()
        else:
            self._until = now + self._pause * (0.5 + self._draw())
            self._pause = min(self._pause * 2, RETRY_MOST)
        return [Disconnect()]

    def doubt(self, now: float) -> None:
        """This process was not run for a while: whoever seems silent or slow may be waiting to be heard."""
        self.heard = now
        if self.phase is Phase.ATTACHING:
            self._until = now + ATTACH_WITHIN

    def advance(self, now: float) -> list[Effect]:
        """What time alone brings. A `Connect` among the effects asks the caller to send its Attach behind it."""
        if self.phase is Phase.RESTING and now >= self._until:
            self.epoch += 1
            self.phase, self._until = Phase.ATTACHING, now + ATTACH_WITHIN
            return [Connect(self.parent)]
        if self.phase is Phase.ATTACHING and now >= self._until:
            self._patience = 0
            return self.lost(f"no answer within {ATTACH_WITHIN:g} s", now)
        if self.phase is Phase.ATTACHED and now >= self.heard + SILENT_AFTER:
            return self.lost(f"silent for {SILENT_AFTER:g} s", now)
        return []

    def wakeup(self) -> float:
        """When `advance` will have something to do."""
        return self.heard + SILENT_AFTER if self.phase is Phase.ATTACHED else self._until
