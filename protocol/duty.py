"""An agent's own share of the work: each command is begun at most once, and answered as often as it is asked for.

delivered --(clock known, guard content)--> running --Finished--> held (keeping) --Settled--> forgotten
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from msgspec.structs import replace

from protocol.commands import Body, Cancel, Command, Feed, Input, Leave, Run, Settled
from protocol.events import Depart, Effect, Finished, Forget, Kept, Loaded, Pour, Start, Stop, Type, Warn
from protocol.keeping import Answer, Keeping
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
    Refused,
    TimedOut,
    fitting,
)
from protocol.trust import FromBefore, Guard, Untrusted

#: How long a departing relay waits for its children to depart before it.
DEPART_AFTER = 5.0
#: Below so many, forgetting old commands' numbers is not worth the walk.
_PRUNE_FROM = 1_000


def kill_after(body: Body) -> float:
    """How long work that is ended has between the polite signal and the certain one, in seconds."""
    return body.kill_after if isinstance(body, Run) and body.kill_after is not None else KILL_AFTER


@dataclass
class _Task:
    """One command here. `over` says that it has its outcome; `signature` is the command's, None where it never came."""

    body: Body
    deadline: float | None
    signature: bytes | None = None
    over: bool = False
    #: Why it is being ended: the outcome that it will have, if it was ended by that.
    ending: Outcome | None = None
    kill_at: float | None = None
    #: Whether the root wants to hear no more of it.
    settled: bool = False


class Duty:
    """What this agent runs, has run, and must not run again."""

    def __init__(self, guard: Guard, found: Mapping[int, int] | None = None) -> None:
        """`found` are the commands whose outcomes this agent's predecessor left on disk, with the bytes of each."""
        self._guard = guard
        self._keeping = Keeping(found or {})
        self._tasks: dict[int, _Task] = {}
        #: Those of them without an outcome.
        self._running: dict[int, _Task] = {}
        #: Commands that are settled, until the moment (root's time, s) from which the guard would refuse them anyway.
        self._seen: dict[int, float] = {}
        #: Those of them that a predecessor may have begun: nobody here can say what became of them.
        self._before: set[int] = set()
        self._prune_at = _PRUNE_FROM
        #: Commands that wait for the root's time, and when each came.
        self._early: list[tuple[Deliver, float]] = []
        self._leave: tuple[int, Leave] | None = None
        self._depart_by: float | None = None

    def known(self, id_: int) -> tuple[bool, Answer | None]:
        """Whether this command was taken before, and its outcome where there is one already that need not be read."""
        if id_ in self._keeping:
            return True, self._keeping.answer(id_)
        if id_ in self._tasks:
            return True, None
        if id_ in self._before:
            return True, (Lost(RESTARTED), NO_OUTPUT)
        if id_ in self._seen:
            return True, (Refused("it was settled or refused here before", trust=True), NO_OUTPUT)
        return False, None

    def load(self, id_: int, signature: bytes) -> list[Effect]:
        """A known command, signed so, is asked for: read its outcome where it is on disk alone."""
        return self._keeping.load(id_, signature)

    def loaded(self, event: Loaded) -> Answer | None:
        """An outcome was read; None where nobody waits for it any more."""
        return self._keeping.loaded(event)

    def kept(self, event: Kept) -> list[Effect]:
        """An outcome was written, or could not be."""
        return self._keeping.kept(event)

    def recall(self, command: Command, now: float) -> Answer | None:
        """The root asks what became of a command, opened and not known here, that this agent or its predecessor may
        have begun. From now on it is not begun."""
        if any(early.id == command.id for early, _ in self._early):
            return None  # it did come to this agent, and is answered once the time is known
        self._see(command, now)
        self._before.add(command.id)
        return Lost(RESTARTED), NO_OUTPUT

    def deliver(
        self, command: Command, ttl: float | None, now: float, signature: bytes = b""
    ) -> tuple[list[Effect], Answer | None]:
        """A command for this host, opened and not known yet, with `ttl` seconds to its deadline.

        Returns what to do, and its outcome where there is one already.
        """
        task = _Task(command.body, None if ttl is None else now + ttl, signature)
        try:
            self._guard.check_time(command, now)
        except Untrusted as error:
            # Only its number is kept, for whoever replays old commands would have them all kept else.
            self._see(command, now)
            # Only the root can give what is from before this agent again, and then it is lost; a replay tells nobody.
            outcome: Outcome = Refused(str(error), trust=True)
            if isinstance(error, FromBefore):
                self._before.add(command.id)
                outcome = Lost(RESTARTED)
            return [Warn(f"command {command.id} refused: {error}")], (outcome, NO_OUTPUT)
        if isinstance(command.body, Leave):
            self._leave = (command.id, command.body)
            task.signature = None  # an agent that begins anew is to stay
            return self._take(command, task, Exited(0), now)
        if ttl is not None and ttl <= 0:
            return self._take(command, task, TimedOut(), now)
        self._tasks[command.id] = self._running[command.id] = task
        self._see(command, now)
        return [Start(command.id, command.body, ttl)], None

    def _take(self, command: Command, task: _Task, outcome: Outcome, now: float) -> tuple[list[Effect], Answer | None]:
        """A command that has its outcome without having begun: it is neither begun nor answered otherwise."""
        self._tasks[command.id] = task
        self._seen[command.id] = command.expires_ms / 1000
        task.over = True
        return self._keeping.add(command.id, task.signature, outcome, NO_OUTPUT, now), (outcome, NO_OUTPUT)

    @property
    def clock_known(self) -> bool:
        """Whether the root's time is known, without which no work is begun."""
        return self._guard.time.known

    def postpone(self, delivery: Deliver, command: Command, now: float) -> tuple[list[Effect], Answer | None]:
        """Keep a command until the root's time is known; an outcome where there is no room."""
        if any(early.id == delivery.id for early, _ in self._early):
            return [], None
        if len(self._early) >= MAX_WAITING_FOR_CLOCK:
            refused = Refused("too many commands before the root told its time")
            return self._take(command, _Task(command.body, None, delivery.signature), refused, now)
        self._early.append((delivery, now))
        return [], None

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
            case Input(of=of, offset=offset, data=data, last=last):
                # Of what does not run here, or no longer: a replay, or too late.
                return ([Pour(of, offset, data, last)] if of in self._running else []), []
            case Settled(ids=ids):
                # Those above wait for an answer to what waits here; it is over, and the root hears it no more.
                dropped = sorted({early.id for early, _ in self._early}.intersection(ids))
                answers: list[tuple[int, Answer]] = [(id_, (Cancelled(ran=False), NO_OUTPUT)) for id_ in dropped]
                return self._forget(ids, command.expires_ms / 1000, now), answers
            case Feed():
                return self._feed(command, command.body, now), []
            case _:
                return [Warn(f"command {command.id} is not quiet")], []

    def _feed(self, command: Command, feed: Feed, now: float) -> list[Effect]:
        """Its offset tells a replay within the console's life; the console's number and its expiry any other."""
        try:
            self._guard.check_time(command, now)
        except Untrusted as error:
            return [Warn(f"what was typed into console {feed.of} is refused: {error}")]
        return [Type(feed)] if feed.of in self._running else []

    def _cancel(self, of: int, now: float) -> tuple[list[Effect], list[tuple[int, Answer]]]:
        task = self._tasks.get(of)
        if task is None:
            if of in self._seen or of in self._keeping:
                return [], []
            # It has not come yet: it must not begin when it does, however late. Until when the guard would admit it,
            # only it says itself, hence for ever.
            outcome = Cancelled(ran=False)
            self._tasks[of] = _Task(Cancel(of=of), None, over=True)
            self._seen[of] = inf
            return self._keeping.add(of, None, outcome, NO_OUTPUT, now), [(of, (outcome, NO_OUTPUT))]
        if task.over:
            answer = self._keeping.answer(of)
            return (self._keeping.load(of, b""), []) if answer is None else ([], [(of, answer)])
        return self._end(of, task, Cancelled(ran=True), now), []

    def _end(self, id_: int, task: _Task, ending: Outcome, now: float) -> list[Effect]:
        if task.ending is not None:
            return []
        task.ending = ending
        task.kill_at = now + kill_after(task.body)
        return [Stop(id_, hard=False)]

    def _forget(self, ids: tuple[int, ...], until: float, now: float) -> list[Effect]:
        gone = []
        for id_ in ids:
            task = self._tasks.get(id_)
            if task is None or task.over:
                self._keeping.forget(id_)
            if task is None:
                # It was given up before it came here, and must not begin if it still comes. It was issued before this
                # message was, and so expires before it.
                self._seen.setdefault(id_, until)
                gone.append(id_)  # it may have been carried to others here
                continue
            if not task.over:
                task.settled = True  # the root gave it up; nobody will ask for what it comes to
                continue
            del self._tasks[id_]
            gone.append(id_)
            if self._leave is not None and self._leave[0] == id_:
                self._depart_by = now + DEPART_AFTER
        self._early = [(early, since) for early, since in self._early if early.id not in ids]
        return [Forget(tuple(gone))] if gone else []

    def finished(self, event: Finished, now: float) -> tuple[list[Effect], Answer | None]:
        """Local work has ended. Returns what to do, and its outcome, or None where it had one already."""
        task = self._running.pop(event.id, None)
        if task is None:
            return [], None
        outcome, output = fitting(event.outcome, event.output)
        if task.ending is not None and isinstance(outcome, Exited | Killed):
            outcome = task.ending
        task.over, task.kill_at = True, None
        if task.settled:
            del self._tasks[event.id]
            return [Forget((event.id,))], (outcome, output)
        return self._keeping.add(event.id, task.signature, outcome, output, now), (outcome, output)

    def advance(self, now: float, *, childless: bool) -> list[Effect]:
        """What time alone brings: deadlines, the certain signal after the polite one, writing, and departing."""
        effects = self._keeping.advance(now)
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
        times = [time for time in (self._depart_by, self._keeping.wakeup()) if time is not None]
        for task in self._running.values():
            if task.ending is None and task.deadline is not None:
                times.append(task.deadline)
            if task.kill_at is not None:
                times.append(task.kill_at)
        return min(times, default=None)

    def close(self) -> list[Effect]:
        """This agent ends: what the root has not acknowledged is for its successor."""
        return self._keeping.write_all()

    def _see(self, command: Command, now: float) -> None:
        self._seen[command.id] = command.expires_ms / 1000
        if len(self._seen) < self._prune_at or not self._guard.time.known:
            return
        # By the least that the root's time can be, so that no later and better notion of it lets a forgotten one in
        # again.
        past = self._guard.time.at_least(now)
        self._seen = {id_: until for id_, until in self._seen.items() if until >= past or id_ in self._tasks}
        self._before &= self._seen.keys()
        self._prune_at = max(_PRUNE_FROM, 2 * len(self._seen))

    def __len__(self) -> int:
        return len(self._running) + len(self._keeping) + len(self._early)
