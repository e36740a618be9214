"""An agent's own share of the work: each command is begun at most once, and answered as often as it is asked for.

delivered --(clock known, guard content)--> running --Finished--> held --Settled--> forgotten
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.commands import Body, Cancel, Command, Leave, Settled
from protocol.events import Depart, Effect, Finished, Forget, Start, Stop, Warn
from protocol.limits import MAX_WAITING_FOR_CLOCK
from protocol.messages import Deliver
from protocol.outcomes import (
    NO_OUTPUT,
    Cancelled,
    Exited,
    Killed,
    Outcome,
    Output,
    Refused,
    TimedOut,
)
from protocol.trust import Guard, Untrusted

#: Between the polite signal and the certain one.
KILL_AFTER = 2.0
#: How long a departing relay waits for its children to depart before it.
DEPART_AFTER = 5.0


@dataclass
class _Task:
    """One command here. `outcome` is None as long as it runs."""

    body: Body
    deadline: float | None
    outcome: Outcome | None = None
    output: Output = NO_OUTPUT
    #: Why it is being ended: the outcome that it will have, if it was ended by that.
    ending: Outcome | None = None
    kill_at: float | None = None


class Duty:
    """What this agent runs, has run, and must not run again."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._tasks: dict[int, _Task] = {}
        #: Commands that are settled, until the moment (root's time, s) from which the guard would refuse them anyway.
        self._seen: dict[int, float] = {}
        self._early: list[Deliver] = []
        self._leave: tuple[int, Leave] | None = None
        self._depart_by: float | None = None

    def deliver(self, delivery: Deliver, now: float) -> tuple[list[Effect], tuple[Outcome, Output] | None]:
        """A command for this host came in. Returns what to do, and its outcome where there is one already."""
        task = self._tasks.get(delivery.id)
        if task is not None:
            return [], None if task.outcome is None else (task.outcome, task.output)
        if delivery.id in self._seen:
            return [], (Refused("it was done and settled before", trust=True), NO_OUTPUT)
        return self._admit(delivery, now)

    def _admit(self, delivery: Deliver, now: float) -> tuple[list[Effect], tuple[Outcome, Output] | None]:
        try:
            command = self._guard.check(delivery, now)
        except Untrusted as error:
            return [Warn(f"command {delivery.id} refused: {error}")], (Refused(str(error), trust=True), NO_OUTPUT)
        ttl = None if delivery.ttl_ms is None else delivery.ttl_ms / 1000
        task = _Task(command.body, None if ttl is None else now + ttl)
        self._tasks[delivery.id] = task
        self._seen[delivery.id] = command.expires_ms / 1000
        self._prune_seen(now)
        if isinstance(command.body, Leave):
            self._leave = (delivery.id, command.body)
            task.outcome = Exited(0)
            return [], (task.outcome, NO_OUTPUT)
        return [Start(delivery.id, command.body, ttl)], None

    @property
    def clock_known(self) -> bool:
        """Whether the root's time is known, without which no work is begun."""
        return self._guard.time.known

    def postpone(self, delivery: Deliver) -> Outcome | None:
        """Keep a command until the root's time is known; an outcome where there is no room."""
        if len(self._early) >= MAX_WAITING_FOR_CLOCK:
            return Refused("too many commands before the root told its time")
        self._early.append(delivery)
        return None

    def take_postponed(self) -> list[Deliver]:
        """The commands that were kept."""
        early, self._early = self._early, []
        return early

    def quiet(self, delivery: Deliver, now: float) -> tuple[list[Effect], list[tuple[int, Outcome]]]:
        """A command about other commands. Returns what to do, and outcomes that it brought about."""
        try:
            command: Command = self._guard.check(delivery, now)
        except Untrusted as error:
            return [Warn(f"command {delivery.id} refused: {error}")], []
        match command.body:
            case Cancel(of=of):
                return self._cancel(of, now)
            case Settled(ids=ids):
                return self._forget(ids, now), []
            case _:
                return [Warn(f"command {delivery.id} is not quiet")], []

    def _cancel(self, of: int, now: float) -> tuple[list[Effect], list[tuple[int, Outcome]]]:
        task = self._tasks.get(of)
        if task is None:
            if of in self._seen:
                return [], []
            # It has not come yet: it must not begin when it does.
            outcome = Cancelled(ran=False)
            self._tasks[of] = _Task(Cancel(of=of), None, outcome)
            return [], [(of, outcome)]
        if task.outcome is not None:
            return [], [(of, task.outcome)]
        return self._end(of, task, Cancelled(ran=True), now), []

    def _end(self, id_: int, task: _Task, ending: Outcome, now: float) -> list[Effect]:
        if task.ending is not None:
            return []
        task.ending = ending
        task.kill_at = now + KILL_AFTER
        return [Stop(id_, hard=False)]

    def _forget(self, ids: tuple[int, ...], now: float) -> list[Effect]:
        gone = tuple(id_ for id_ in ids if id_ in self._tasks and self._tasks[id_].outcome is not None)
        for id_ in gone:
            del self._tasks[id_]
            if self._leave is not None and self._leave[0] == id_:
                self._depart_by = now + DEPART_AFTER
        return [Forget(gone)] if gone else []

    def finished(self, event: Finished, now: float) -> tuple[Outcome, Output] | None:
        """Local work has ended: its outcome, or None where it had one already."""
        task = self._tasks.get(event.id)
        if task is None or task.outcome is not None:
            return None
        outcome = event.outcome
        if task.ending is not None and isinstance(outcome, Exited | Killed):
            outcome = task.ending
        task.outcome, task.output, task.kill_at = outcome, event.output, None
        return outcome, event.output

    def advance(self, now: float, *, childless: bool) -> list[Effect]:
        """What time alone brings: deadlines, the certain signal after the polite one, and departing."""
        effects: list[Effect] = []
        for id_, task in self._tasks.items():
            if task.outcome is not None:
                continue
            if task.deadline is not None and now >= task.deadline:
                effects += self._end(id_, task, TimedOut(), now)
            if task.kill_at is not None and now >= task.kill_at:
                task.kill_at = None
                effects.append(Stop(id_, hard=True))
        if self._depart_by is not None and self._leave is not None and (childless or now >= self._depart_by):
            self._depart_by = None
            effects.append(Depart(self._leave[1]))
        return effects

    def wakeup(self) -> float | None:
        """When `advance` will have something to do."""
        times = [self._depart_by] if self._depart_by is not None else []
        for task in self._tasks.values():
            if task.outcome is None:
                if task.ending is None and task.deadline is not None:
                    times.append(task.deadline)
                if task.kill_at is not None:
                    times.append(task.kill_at)
        return min(times, default=None)

    def _prune_seen(self, now: float) -> None:
        root_now = self._guard.time.at(now) if self._guard.time.known else None
        if root_now is None or len(self._seen) < 1_000:
            return
        self._seen = {id_: until for id_, until in self._seen.items() if until >= root_now or id_ in self._tasks}

    def __len__(self) -> int:
        return len(self._tasks)
