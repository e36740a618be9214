"""Whom a host asks for the chunks of one push, and when it asks another: the asking half of `protocol.transfer`.

Every host knows the whole order of the push, so it needs nobody's advice: it asks the one before it, where that one is
lost the one before that, and so on to the root, which is always there as the last.

A source is left
- when the connection to it ends, at once;
- when it owes chunks and is silent for SILENT seconds: one that is merely waiting itself says so every HOLD_EVERY;
- when it does not know the push after UNKNOWN_MOST, can't read its own copy, or sends BAD_MOST wrong chunks. The root
  knows a push before anybody does: one that it does not know is over;
- when it is slow. Whether it is, only a trial can tell: the host asks the one behind its source how far that is, and
  where it is AHEAD bytes further, and gets half as much again in the same time or has all, asks it for a few of the
  chunks that come next anyway. If these come in less than a third of the time that as many take from the source, the
  host stays with the one that it tried; once that time is over, no more of them are asked for, since those behind have
  to wait for what they asked for meanwhile. How fast a source is tells what it gave in _SETTLED seconds; before its
  first chunk it had nothing to give. In a chain that is slow all along, or for a host that is itself the slow one, a
  trial gains nothing, so nobody moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from protocol.limits import AHEAD, ASK_AGAIN, ASK_WINDOW, BULK_SILENT, BULK_WINDOW
from protocol.transfer_effects import AskOf, Bypassed, Effect, Source

#: How often the asking half looks at the time, in seconds: a slow source is found within two such looks and a trial.
TICK = 0.25
#: Chunks that fail their digest before their source is left: somebody alters them, or its file changed.
BAD_MOST = 3
#: A source that does not know the push yet will in a moment: its command travels by the other socket. Not longer.
UNKNOWN_MOST = 2.0
#: A source that was lost is looked at again after this: it may be back.
BACK_AFTER = 5.0
#: After even the root was lost, all are tried anew after this.
ROUND_AFTER = 0.5
#: What may stand in a queue before a host's link, in seconds at the rate of that link; and how long, in seconds from a
#: push's first chunk on, it is half of that: connections begin then, and each round trip waits in that queue.
QUEUE, BEGINNING = 0.03, 1.0
#: A trial that took longer than this has failed, and those after it wait this long at first and at most.
TRIAL_MOST, TRIAL_FIRST, TRIAL_LATER = 1.0, 1.0, 16.0
#: A source that gave its first chunk is judged by what it gives in so many seconds at least.
_SETTLED = 2 * TICK
#: So many looks, of the first, ask others how far they are; after them every second does.
_EAGER = 4
#: Two hosts' progress is compared over at least and at most so many seconds.
_SEEN_LEAST, _SEEN_LONGEST = 0.2, 1.6
#: How much faster another must be: two chunks of a trial may come at once, where a link was idle and saves that up
#: (tc-tbf(8), burst), so half of the time says nothing.
_FASTER = 3
#: A look at the time that comes this much too late says nothing of others: this process did not run.
_PAUSED = 1.0


def window_of(chunk: int) -> int:
    """How many chunks of `chunk` bytes a host may have asked one source for."""
    return min(ASK_WINDOW, max(2, BULK_WINDOW // chunk))


@dataclass
class _Trial:
    source: Source
    count: int
    began: float
    #: Until when all of them have to be there.
    until: float
    #: How many are still to be asked for.
    left: int
    #: What is on its way.
    due: set[int] = field(default_factory=set)
    failed: bool = False


class Asking:
    """One push's sources, and what is asked of each."""

    def __init__(self, id_: int, candidates: tuple[Source, ...], chunk: int, now: float) -> None:
        """`candidates` are the sources, the one to ask first at the head; the last is the root (None)."""
        self._id = id_
        self._candidates = candidates
        self._window = window_of(chunk)
        self._trial_size = max(1, self._window // 8)
        #: What is on its way from a source that has all of it, where nothing is known of the link.
        self._least = max(2, self._window // 4)
        #: How far the source is beyond this host, in chunks, as last told.
        self._lead = 0
        self._ahead = max(1, AHEAD // chunk)
        self._at = 0
        #: Whom chunks are asked of now.
        self.source = candidates[0]
        #: What each source was asked for and has not answered, also after it was left: that is its credit.
        self._owed: dict[Source, set[int]] = {}
        #: What is on its way, and from whom.
        self._pending: dict[int, Source] = {}
        #: What was on its way from a source that is lost: asked for first.
        self.again: set[int] = set()
        self._heard: dict[Source, float] = {self.source: now}
        #: Until when a source is not used.
        self._out: dict[Source, float] = {}
        self._bad: dict[Source, int] = {}
        self._unknown_since: float | None = None
        self._retry_at: float | None = None
        self._looked_at, self._look_at = now, now + TICK
        #: How far the one behind the source was, and this host: time and both, lately.
        self._seen_of: Source | str = ""
        self._seen: list[tuple[float, int, int]] = []
        self._looks = 0
        #: The root was faster in the last trial.
        self._doubted = False
        self._trial: _Trial | None = None
        self._trial_at = now + TICK
        self._trial_pause = TRIAL_FIRST
        self._arrived = 0
        #: Whether the source has given a chunk, and since when any has.
        self._flows, self._begun = False, inf
        self._samples: list[tuple[float, int]] = [(now, 0)]
        self._back_at = inf
        self._looked_back: tuple[Source, ...] = ()
        self.bypassed: list[tuple[Source, str]] = []

    # --- what the transfer asks ---------------------------------------------------------------------------------------

    def in_use(self) -> set[Source]:
        """The sources whose connections are needed."""
        return {self.source, self._upstream(), *self._pending.values(), *self._looked_back}

    def room(self, now: float, *, pressed: bool = False) -> int:
        """How many chunks the source may be asked for now. While this host's processor is the limit (`pressed`) they
        are asked for by the half window: each question costs both hosts as much as a chunk."""
        if self._retry_at is not None and now < self._retry_at:
            return 0
        owed = len(self._owed.get(self.source, ()))
        most = self._window if pressed else self._most(now)
        handful = self._window // 2 if pressed else max(1, min(self._window // 8, most // 2))
        # By the handful: one message asks for several, and there is always one on its way.
        if self._pending and self._window - owed < handful:
            return 0
        room = most - owed
        return room if room >= handful or not self._pending else 0

    def _most(self, now: float) -> int:
        """How many chunks the source may owe.

        One that is level with this host owes what it has not got itself; one that is ahead sends at once whatever it
        is asked for. That stands in a queue before its link, and the questions and acknowledgements of others stand
        there too; where the queue is full, packets are lost. So of a source that is ahead by a quarter of the window no
        more is asked than comes in QUEUE seconds. In the BEGINNING a source is ahead, and half of that is enough: where
        chunks come as fast as they go, a queue of that time would stand to the end.
        """
        least, queue = self._least, QUEUE
        if now < self._begun + BEGINNING:
            least, queue = max(2, least // 2), queue / 2
        elif self.source is not None and self._lead < self._window // 4:
            return self._window
        return max(least, min(self._window, int(self._rate() * queue) + least // 2))

    def _rate(self) -> float:
        """Chunks that came from the source in a second, lately."""
        then, count = self._samples[0]
        return (self._arrived - count) / max(self._looked_at - then, TICK)

    def ask(self, indices: Iterable[int], now: float) -> list[Effect]:
        """Ask the source for chunks."""
        return self._ask(self.source, tuple(indices), now)

    def _ask(self, source: Source, indices: tuple[int, ...], now: float) -> list[Effect]:
        owed = self._owed.setdefault(source, set())
        if not owed:
            self._heard[source] = now
        owed.update(indices)
        for index in indices:
            self._pending[index] = source
            self.again.discard(index)
        return [AskOf(source, self._id, indices)]

    def is_due(self, index: int) -> bool:
        """Whether a chunk is on its way."""
        return index in self._pending

    # --- what sources say ---------------------------------------------------------------------------------------------

    def heard(self, source: Source, now: float) -> None:
        """A source said something."""
        self._heard[source] = now

    def arrived(self, source: Source, index: int, now: float) -> bool:
        """A chunk came; whether it was waited for."""
        self._heard[source] = now
        owed = self._owed.get(source)
        if owed:
            owed.discard(index)
        return index in self._pending or index in self.again

    def awaits(self, index: int) -> bool:
        """Whether a chunk was asked for and did not come."""
        return index in self._pending or index in self.again

    def took(self, source: Source, index: int, now: float) -> list[Effect]:
        """The chunk was right."""
        self._pending.pop(index, None)
        self.again.discard(index)
        trial = self._trial
        if trial is not None and index in trial.due:
            trial.due.discard(index)
            if not trial.due and not trial.left:
                return self._tried(trial, now)
        if source == self.source:
            self._unknown_since = None
            self._arrived += 1
            if not self._flows:
                # Until now it had nothing to give, which says nothing of how fast it gives.
                self._flows, self._begun = True, min(self._begun, now)
                self._samples, self._looked_at = [(now, self._arrived)], now
                self._trial_at = max(self._trial_at, now + _SETTLED)
        return []

    def was_wrong(self, source: Source, index: int, now: float) -> tuple[list[Effect], bool]:
        """The chunk was not right. What is to be done, and whether the push has failed: the root itself sends it so."""
        self._bad[source] = self._bad.get(source, 0) + 1
        self._again(index)
        if self._bad[source] < BAD_MOST:
            return [], False
        if source is None:
            return [], True
        return self._leave(source, "it sends chunks that do not match their digests", now, inf), False

    def declined(self, source: Source, index: int, why: str, final: bool, now: float) -> tuple[list[Effect], bool]:
        """A source will not give a chunk. What is to be done, and whether the push has failed."""
        self._heard[source] = now
        self._owed.get(source, set()).discard(index)
        if self._pending.get(index, self) == source:
            self._again(index)
        if final:
            return ([], True) if source is None else (self._leave(source, why, now, inf), False)
        self._retry_at = now + ASK_AGAIN
        if source == self.source:
            if self._unknown_since is None:
                self._unknown_since = now
            elif now >= self._unknown_since + UNKNOWN_MOST:
                if source is None:
                    return [], True
                return self._leave(source, "it does not know the push", now, BACK_AFTER), False
        return [], False

    def held(self, source: Source, front: int, mine: int, now: float, *, whole: bool) -> bool:
        """A source has the first `front` chunks, which is all of them where `whole`, this host the first `mine`.
        Whether a trial is worth its while."""
        self._heard[source] = now
        if source == self.source:
            self._unknown_since = None
            self._lead = front - mine
        elif source in self._candidates[: self._at]:
            if front > mine and self._out.get(source, 0.0) != inf:
                self._move(self._candidates.index(source), now)
        elif source == self._upstream():
            runs_away = self._runs_away(source, front, mine, now)
            if front - mine >= self._ahead and (whole or runs_away):
                return self._trial is None and now >= self._trial_at
        return False

    def _runs_away(self, source: Source, front: int, mine: int, now: float) -> bool:
        """Whether the one behind the source gets ahead by half of what this host gets, or more: all along a chain in
        which everybody is as fast as its link, hosts fall behind a bit, and trials take of what others wait for."""
        seen = [] if source != self._seen_of else [one for one in self._seen if now - one[0] < _SEEN_LONGEST]
        self._seen_of, self._seen = source, [*seen, (now, front, mine)]
        then, front_then, mine_then = self._seen[0]
        if now - then < _SEEN_LEAST:
            return False
        return (front - front_then) >= 1.5 * (mine - mine_then) and front > front_then

    def own_fault(self, now: float) -> None:
        """This host's own disk keeps it from asking: no trial would tell anything of others now."""
        self._trial_at = max(self._trial_at, now + TRIAL_FIRST)

    def closed(self, source: Source) -> None:
        """The connection to a source that is not needed was closed: it owes nothing any more."""
        self._owed.pop(source, None)

    def lost(self, source: Source, why: str, now: float) -> list[Effect]:
        """The connection to a source has ended."""
        self._owed.pop(source, None)
        if source == self.source:
            return self._leave(source, why, now, BACK_AFTER)
        self._disown(source)
        return []

    # --- trials -------------------------------------------------------------------------------------------------------

    def begin_trial(self, now: float) -> None:
        """See whether the one behind the source is the faster one (`trial_room`)."""
        upstream, rate = self._upstream(), self._rate()
        # The root always has all: of it so many that a link which was idle and saved that up (tc-tbf(8), burst) brings
        # no more than a quarter of them at once.
        count = self._trial_size if upstream is not None else 2 * self._trial_size
        self._trial = _Trial(upstream, count, now, now + count / (_FASTER * rate) if rate else inf, count)

    def trial_room(self, now: float) -> int:
        """How many chunks the trial may ask for now."""
        trial = self._trial
        if trial is None:
            return 0
        if now > trial.until:
            self._fail(trial, now)
        # A pair at a time: they stand before the link where the acknowledgements of those behind stand too.
        return max(0, min(trial.left, 2 - len(trial.due)))

    def ask_in_trial(self, indices: Iterable[int], now: float) -> list[Effect]:
        """Ask the one that is tried for these; where there are none, the trial says nothing."""
        trial = self._trial
        if trial is None:
            return []
        room = self._window - len(self._owed.get(trial.source, ()))
        chosen = tuple(indices)[:room]
        if not chosen:
            self._trial = None
            return []
        trial.left -= len(chosen)
        trial.due.update(chosen)
        return self._ask(trial.source, chosen, now)

    def _tried(self, trial: _Trial, now: float) -> list[Effect]:
        """All that was asked for in the trial is there."""
        self._trial = None
        if now < trial.until and not trial.failed and trial.source in self._candidates[self._at + 1 :]:
            if trial.source is None and not self._doubted:
                # The root always has all, so only trials tell anything: one may be luck.
                self._doubted, self._trial_at = True, now
                return []
            self._doubted = False
            self._trial_at, self._trial_pause = now + TRIAL_FIRST, TRIAL_FIRST
            return self._leave(self.source, "it is slow", now, inf)
        self._fail(trial, now)
        return []

    def _fail(self, trial: _Trial, now: float) -> None:
        """The trial has failed: what is on its way comes all the same."""
        trial.left = 0
        if not trial.due:
            self._trial = None
        if not trial.failed:
            trial.failed, self._doubted = True, False
            if trial.source is None:
                self._trial_pause = TRIAL_LATER  # it always has all: nothing says that the next would end otherwise
            self._trial_at = now + self._trial_pause
            self._trial_pause = min(4 * self._trial_pause, TRIAL_LATER)

    def _upstream(self) -> Source:
        """Whom to ask if not the source; the root also where that is the source."""
        return next((c for c in self._candidates[self._at + 1 :] if c not in self._out), None)

    # --- other sources ------------------------------------------------------------------------------------------------

    def _again(self, index: int) -> None:
        if self._pending.pop(index, self) is not self:
            self.again.add(index)

    def _disown(self, source: Source) -> None:
        """What was to come from this source is to be asked for again."""
        if self._trial is not None and self._trial.source == source:
            self._trial = None
        for index in [index for index, whose in self._pending.items() if whose == source]:
            self._again(index)

    def _leave(self, source: Source, why: str, now: float, out: float) -> list[Effect]:
        """Use another source from now on; this one not for `out` seconds."""
        self._disown(source)
        if source != self.source:
            return []
        self._out[source] = now + out
        self._unknown_since = None
        if source is None:
            # Nobody is left: begin with all who were not slow or wrong, in a moment.
            self._out = {left: until for left, until in self._out.items() if until == inf}
            self._move(next(i for i, c in enumerate(self._candidates) if c is None or c not in self._out), now)
            self._retry_at = now + ROUND_AFTER
            return []
        later = range(self._at + 1, len(self._candidates))
        self._move(next(i for i in later if self._candidates[i] is None or self._candidates[i] not in self._out), now)
        self._back_at = now + BACK_AFTER
        self.bypassed.append((source, why))
        return [Bypassed(self._id, source, why)]

    def _move(self, at: int, now: float) -> None:
        self._disown(self.source)
        self._at, self.source = at, self._candidates[at]
        self._heard[self.source] = now
        self._retry_at = None
        self._samples = [(now, self._arrived)]
        self._looked_at = now
        self._flows = False
        self._lead = 0

    # --- time ---------------------------------------------------------------------------------------------------------

    def wakeup(self) -> float:
        """When `advance` has something to do."""
        return self._look_at if self._retry_at is None else min(self._look_at, self._retry_at)

    def advance(self, now: float, *, pressed: bool = False) -> list[Effect]:
        """What time alone brings. Nobody is asked how far it is while this host's processor is the limit (`pressed`):
        no trial would tell anything then, and the questions of many hosts are a good part of what that has to do."""
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
        if now < self._look_at:
            return []
        if now - self._look_at > _PAUSED:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked_at, self._look_at = now, now + TICK
        self._samples = [*self._samples, (now, self._arrived)][-3:]
        if self._trial is not None and now - self._trial.began > TRIAL_MOST:
            trial = self._trial
            self._disown(trial.source)
            trial.due.clear()
            self._fail(trial, now)
        if self._owed.get(self.source) and now - self._heard[self.source] > BULK_SILENT:
            return self._leave(self.source, f"it was silent for {BULK_SILENT:.0f} s", now, BACK_AFTER)
        effects: list[Effect] = []
        self._looks += 1
        if (self._looks <= _EAGER or self._looks % 2) and not pressed:
            if self.source is not None:
                effects.append(AskOf(self.source, self._id, ()))
            if self._at + 1 < len(self._candidates):
                effects.append(AskOf(self._upstream(), self._id, ()))
        if self._at and now >= self._back_at:
            self._back_at = now + 1.0
            back = next((c for c in self._candidates[: self._at] if self._out.get(c, 0.0) <= now), self)
            self._looked_back = ()
            if not isinstance(back, Asking):
                self._out[back] = now + BACK_AFTER
                self._looked_back = (back,)
                effects.append(AskOf(back, self._id, ()))
        return effects
