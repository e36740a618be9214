"""Who sees all that really happens, and compares what the root says with it, as it says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.commands import Body, Run
from protocol.outcomes import RESTARTED, Cancelled, Exited, Killed, Lost, Outcome, Output, Refused, TimedOut
from protocol.topology import ancestors

Key = tuple[int, int]


@dataclass
class _Given:
    """A command. `formed` says whether the whole tree had stood before it was given."""

    body: Body
    has_deadline: bool
    formed: bool
    cancelled: bool = False


@dataclass
class Witness:
    """What was really done where, by (rank, command)."""

    _given: dict[int, _Given] = field(default_factory=dict)
    _began: set[Key] = field(default_factory=set)
    _ended: dict[Key, tuple[Outcome, Output]] = field(default_factory=dict)
    _stopped: set[Key] = field(default_factory=set)
    _told: dict[Key, Outcome] = field(default_factory=dict)
    #: What is on a host's disk of its outcomes.
    _kept: set[Key] = field(default_factory=set)
    #: Whom any fault has struck; None is the root, and strikes all.
    _harmed: set[int | None] = field(default_factory=set)
    #: By rank, all who were ever planned above it.
    _above: dict[int, set[int | None]] = field(default_factory=dict)

    def planned(self, parents: Mapping[int, int | None]) -> None:
        """This is the tree from now on."""
        for rank in parents:
            self._above.setdefault(rank, set()).update(ancestors(parents, rank))

    def given(self, id_: int, body: Body, *, has_deadline: bool, formed: bool) -> None:
        """The root gives a command."""
        self._given[id_] = _Given(body, has_deadline, formed)

    def cancelled(self, id_: int) -> None:
        """Somebody cancels it."""
        self._given[id_].cancelled = True

    def harmed(self, rank: int | None) -> None:
        """A fault strikes this host, or its way to another."""
        self._harmed.add(rank)

    def began(self, rank: int, id_: int) -> None:
        """Its work begins there."""
        assert (rank, id_) not in self._began, f"h{rank} began command {id_} twice"
        told = self._told.get((rank, id_))
        # Whoever is lost may begin it all the same; that is what lost means.
        assert told is None or isinstance(told, Lost), f"h{rank} began command {id_} after it was told as {told}"
        self._began.add((rank, id_))

    def stopped(self, rank: int | None, id_: int) -> None:
        """Its agent ends it."""
        assert rank is not None
        self._stopped.add((rank, id_))

    def ended(self, rank: int | None, id_: int, outcome: Outcome, output: Output) -> None:
        """Its work has ended there."""
        assert rank is not None
        self._ended[rank, id_] = (outcome, output)

    def kept(self, rank: int | None, id_: int) -> None:
        """Its outcome is on disk there."""
        assert rank is not None
        self._kept.add((rank, id_))

    def wiped(self, rank: int) -> None:
        """What was on disk there is of no use any more."""
        self._kept = {key for key in self._kept if key[0] != rank}

    def told(self, rank: int, id_: int, outcome: Outcome, output: Output) -> None:
        """The root says that this is what became of it. Raises AssertionError where that is not so."""
        key = (rank, id_)
        assert key not in self._told, f"two outcomes of h{rank} for command {id_}"
        self._told[key] = outcome
        given = self._given[id_]
        if isinstance(outcome, Lost):
            self._may_be_lost(rank, id_, given, outcome)
            return
        self._is_true(rank, id_, given, outcome, output)

    def late(self, rank: int, id_: int, outcome: Outcome, output: Output) -> None:
        """The root says that this is what became of it, after it was lost. Raises AssertionError as `told` does."""
        assert isinstance(self._told[rank, id_], Lost), f"h{rank} was not lost for command {id_}"
        assert not isinstance(outcome, Lost), f"h{rank} is lost for command {id_}, and that late"
        self._is_true(rank, id_, self._given[id_], outcome, output)

    def _is_true(self, rank: int, id_: int, given: _Given, outcome: Outcome, output: Output) -> None:
        key = (rank, id_)
        if not isinstance(given.body, Run):
            return
        what = f"h{rank}, command {id_}: {outcome}"
        match outcome:
            case Exited() | Killed():
                assert self._ended.get(key) == (outcome, output), f"{what}, but it was {self._ended.get(key)}"
            case TimedOut():
                assert given.has_deadline, f"{what}, but it has no deadline"
                assert key not in self._began or key in self._stopped, f"{what}, but nobody ended it"
            case Cancelled(ran):
                assert given.cancelled, f"{what}, but nobody cancelled it"
                assert ran == (key in self._began), f"{what}, but it did {'not ' * ran}run"
            case Refused():
                assert key not in self._began, f"{what}, but it ran"
            case _:
                raise AssertionError(f"{what}, which nothing here ends in")

    def _may_be_lost(self, rank: int, id_: int, given: _Given, outcome: Lost) -> None:
        """Who was never struck, and never had anybody above it who was, has a way to the root, and is not lost."""
        why = f"h{rank} has the outcome of command {id_} on disk, and it is told as {outcome}"
        assert outcome.why != RESTARTED or (rank, id_) not in self._kept, why
        if given.formed:
            assert ({rank} | self._above[rank]) & self._harmed, f"h{rank} is lost for {id_} without a fault: {outcome}"
