"""An agent's own share of the work: each command is begun at most once, and answered as often as it is asked for.

delivered --(clock known, guard content)--> running --Finished--> held --Settled--> forgotten
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TypeAlias

from msgspec.structs import replace

from protocol.commands import Body, Cancel, Command, Leave, Settled
from protocol.events import Depart, Effect, Finished, Forget, Start, Stop, Warn
from protocol.limits import KILL_AFTER, MAX_WAITING_FOR_CLOCK
from protocol.messages import Deliver
from protocol.outcomes import (
    NO_OUTPUT,
    RESTARTED,
    Cancelled,
    Exited,
    Killed,
    Lost,
    Outcome,
    Output,
    Refused,
    TimedOut,
    fitting,
)
from protocol.trust import FromBefore, Guard, Untrusted

#: How long a departing relay waits for its children to depart before it.
DEPART_AFTER = 5.0
#: Below so many, forgetting old commands' numbers is not worth the walk.
_PRUNE_FROM = 1_000

Answer: TypeAlias = tuple[Outcome, Output]


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
    #: Whether the root wants to hear no more of it.
    settled: bool = False


class Duty:
    """What this agent runs, has run, and must not run again."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._tasks: dict[int, _Task] = {}
        #: Those of them without an outcome.
        self._running: dict[int, _Task] = {}
        #: Commands that are settled, until the moment (root's time, s) from which the guard would refuse them anyway.
        self._seen: dict[int, float] = {}
        self._prune_at = _PRUNE_FROM
        #: Commands that wait for the root's time, and when each came.
        self._early: list[tuple[Deliver, float]] = []
        self._leave: tuple[int, Leave] | None = None
        self._depart_by: float | None = None

    def known(self, id_: int) -> tuple[bool, Answer | None]:
        """Whether this command was taken before, and its outcome where there is one already."""
        task = self._tasks.get(id_)
        if task is not None:
            return True, None if task.outcome is None else (task.outcome, task.output)
        if id_ in self._seen:
            return True, (Refused("it was settled or refused here before", trust=True), NO_OUTPUT)
        return False, None

    def deliver(self, command: Command, ttl: float | None, now: float) -> tuple[list[Effect], Answer | None]:
        """A command for this host, opened and not known yet, with `ttl` seconds to its deadline.

        Returns what to do, and its outcome where there is one already.
        """
        task = _Task(command.body, None if ttl is None else now + ttl)
        try:
            self._guard.check_time(command, now)
        except Untrusted as error:
            # Only its number is kept, for whoever replays old commands would have them all kept else.
            self._see(command, now)
            # Only the root can give what is from before this agent again, and then it is lost; a replay tells nobody.
            outcome = Lost(RESTARTED) if isinstance(error, FromBefore) else Refused(str(error), trust=True)
            return [Warn(f"command {command.id} refused: {error}")], (outcome, NO_OUTPUT)
        if isinstance(command.body, Leave):
            self._leave = (command.id, command.body)
            return [], self._take(command, task, Exited(0))
        if ttl is not None and ttl <= 0:
            return [], self._take(command, task, TimedOut())
        self._take(command, task, None)
        self._see(command, now)
        return [Start(command.id, command.body, ttl)], None

    def _take(self, command: Command, task: _Task, outcome: Outcome | None) -> Answer | None:
        """From here on the command is known, so that it is neither begun again nor answered otherwise."""
        self._tasks[command.id] = task
        self._seen[command.id] = command.expires_ms / 1000
        task.outcome = outcome
        if outcome is None:
            self._running[command.id] = task
            return None
        return outcome, NO_OUTPUT

    @property
    def clock_known(self) -> bool:
        """Whether the root's time is known, without which no work is begun."""
        return self._guard.time.known

    def postpone(self, delivery: Deliver, command: Command, now: float) -> Answer | None:
        """Keep a command until the root's time is known; an outcome where there is no room."""
        if any(early.id == delivery.id for early, _ in self._early):
            return None
        if len(self._early) >= MAX_WAITING_FOR_CLOCK:
            refused = Refused("too many commands before the root told its time")
            return self._take(command, _Task(command.body, None), refused)
        self._early.append((delivery, now))
        return None

    def take_postponed(self, now: float) -> list[Deliver]:
        """The commands that were kept, each with the time that remains to it now."""
        early, self._early = self._early, []
        return [
            delivery
            if delivery.ttl_ms is None
            else replace(delivery, ttl_ms=max(0, delivery.ttl_ms - round((now - since) * 1000)))
            for delivery, since in early
        ]

    def quiet(self, command: Command, now: float) -> tuple[list[Effect], list[tuple[int, Answer]]]:
        """A command about other commands. Returns what to do, and outcomes that it brought about."""
        match command.body:
            case Cancel(of=of):
                return self._cancel(of, now)
            case Settled(ids=ids):
                return self._forget(ids, command.expires_ms / 1000, now), []
            case _:
                return [Warn(f"command {command.id} is not quiet")], []

    def _cancel(self, of: int, now: float) -> tuple[list[Effect], list[tuple[int, Answer]]]:
        task = self._tasks.get(of)
        if task is None:
            if of in self._seen:
                return [], []
            # It has not come yet: it must not begin when it does, however late. Until when the guard would admit it,
            # only it says itself, hence for ever.
            outcome = Cancelled(ran=False)
            self._tasks[of] = _Task(Cancel(of=of), None, outcome)
            self._seen[of] = inf
            return [], [(of, (outcome, NO_OUTPUT))]
        if task.outcome is not None:
            return [], [(of, (task.outcome, task.output))]
        return self._end(of, task, Cancelled(ran=True), now), []

    def _end(self, id_: int, task: _Task, ending: Outcome, now: float) -> list[Effect]:
        if task.ending is not None:
            return []
        task.ending = ending
        task.kill_at = now + KILL_AFTER
        return [Stop(id_, hard=False)]

    def _forget(self, ids: tuple[int, ...], until: float, now: float) -> list[Effect]:
        gone = []
        for id_ in ids:
            task = self._tasks.get(id_)
            if task is None:
                # It was given up before it came here, and must not begin if it still comes. It was issued before this
                # message was, and so expires before it.
                self._seen.setdefault(id_, until)
                gone.append(id_)  # it may have been carried to others here
                continue
            if task.outcome is None:
                task.settled = True  # the root gave it up; nobody will ask for what it comes to
                continue
            del self._tasks[id_]
            gone.append(id_)
            if self._leave is not None and self._leave[0] == id_:
                self._depart_by = now + DEPART_AFTER
        self._early = [(early, since) for early, since in self._early if early.id not in ids]
        return [Forget(tuple(gone))] if gone else []

    def finished(self, event: Finished) -> tuple[list[Effect], Answer | None]:
        """Local work has ended. Returns what to do, and its outcome, or None where it had one already."""
        task = self._running.pop(event.id, None)
        if task is None:
            return [], None
        outcome, output = fitting(event.outcome, event.output)
        if task.ending is not None and isinstance(outcome, Exited | Killed):
            outcome = task.ending
        task.outcome, task.output, task.kill_at = outcome, output, None
        if task.settled:
            del self._tasks[event.id]
            return [Forget((event.id,))], (outcome, output)
        return [], (outcome, output)

    def advance(self, now: float, *, childless: bool) -> list[Effect]:
        """What time alone brings: deadlines, the certain signal after the polite one, and departing."""
        effects: list[Effect] = []
        for id_, task in self._running.items():
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
        for task in self._running.values():
            if task.ending is None and task.deadline is not None:
                times.append(task.deadline)
            if task.kill_at is not None:
                times.append(task.kill_at)
        return min(times, default=None)

    def _see(self, command: Command, now: float) -> None:
        self._seen[command.id] = command.expires_ms / 1000
        if len(self._seen) < self._prune_at or not self._guard.time.known:
            return
        # By the least that the root's time can be, so that no later and better notion of it lets a forgotten one in
        # again.
        past = self._guard.time.at_least(now)
        self._seen = {id_: until for id_, until in self._seen.items() if until >= past or id_ in self._tasks}
        self._prune_at = max(_PRUNE_FROM, 2 * len(self._seen))

    def __len__(self) -> int:
        return len(self._tasks) + len(self._early)
