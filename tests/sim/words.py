"""A tree's story in words: when, who, what happened and what came of it. For people; names instead of ranks.

Heartbeats, pieces of bookkeeping and what has no consequence are left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol import events, ranks
from protocol.commands import Body
from protocol.messages import (
    Ask,
    Attach,
    Attached,
    Beat,
    Chunk,
    ClockAsk,
    ClockTell,
    Deliver,
    Link,
    Links,
    Manner,
    NoChunk,
    Outcomes,
    Rejected,
)
from protocol.outcomes import Fold, describe
from tests.sim.tree import Node, Tree, codec_command


class Story:
    """Writes down what happens in a tree from now on."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.lines: list[str] = []
        tree.watch = self._watch
        tree.note = self._note
        tree.say = lambda rank, text: self._line(_name(rank), text)

    def _note(self, text: str) -> None:
        self._line("", f"*** {text}")

    def _line(self, who: str, text: str) -> None:
        self.lines.append(f"{self._tree.now:8.3f}  {who:<5}{text}".rstrip())

    def _watch(self, node: Node, event: events.Event, effects: list[events.Effect]) -> None:
        happened = self._event(event)
        done = [text for effect in effects if (text := self._effect(effect))]
        if happened is None and not done:
            return
        name = _name(node.rank)
        self._line(name, happened or "time passes")
        for text in done:
            self._line("", f"    -> {text}")

    # --- events -------------------------------------------------------------------------------------------------------

    def _event(self, event: events.Event) -> str | None:
        match event:
            case events.FromParent(message):
                what = self._message(message)
                return what and f"hears from above: {what}"
            case events.FromChild(rank, message):
                what = self._message(message)
                return what and f"hears from {_name(rank)}: {what}"
            case events.ParentLost(why):
                return f"loses its parent: {why}"
            case events.ChildLost(rank, why):
                return f"loses {_name(rank)}: {why}"
            case events.Finished(id_, outcome):
                return f"has done command {id_}: {describe(outcome)}"
            case events.Kept(id_, well):
                return f"has {'' if well else 'no room for '}the outcome of command {id_} on disk"
            case events.Loaded(id_, found):
                return f"has read command {id_}: {'nothing' if found is None else describe(found[0])}"
            case events.Submit(delivery, body, missing):
                again = "" if missing is None else f", taken up again for {_set(missing)}"
                ttl = "" if delivery.ttl_ms is None else f", {delivery.ttl_ms / 1000:g} s"
                return f"is given command {delivery.id}: {_body(body)} for {_set(_targets(delivery))}{ttl}{again}"
            case events.Replan(plan):
                return f"has a new plan, version {plan.version}"
            case events.Begin():
                return "begins"
            case _:
                return None

    # --- effects ------------------------------------------------------------------------------------------------------

    def _effect(self, effect: events.Effect) -> str | None:
        simple = self._local(effect)
        if simple is not None:
            return simple
        match effect:
            case events.ToParent(message):
                what = self._message(message)
                return what and f"up: {what}"
            case events.ToChild(rank, message):
                what = self._message(message)
                return what and f"to {_name(rank)}: {what}"
            case events.Connect(member):
                return f"connects to {member.name}"
            case events.DropChild(rank, why):
                return f"cuts {_name(rank)} off: {why}"
            case events.Tell(id_, folds):
                return f"settled in command {id_}: {_folds(folds)}"
            case events.TellLate(id_, folds):
                return f"after it was settled in command {id_}: {_folds(folds)}"
            case events.TellSettled(id_):
                return f"command {id_} is settled"
            case _:
                return None

    @staticmethod
    def _local(effect: events.Effect) -> str | None:
        """What an agent does at its own host."""
        match effect:
            case events.Start(id_):
                return f"begins the work of command {id_}"
            case events.Stop(id_, hard):
                return f"ends the work of command {id_} {'for certain' if hard else 'politely'}"
            case events.Keep(id_):
                return f"keeps the outcome of command {id_} on disk"
            case events.Load(id_):
                return f"reads what it kept of command {id_}"
            case events.Forget(ids):
                return f"forgets {_commands(ids)}"
            case events.SavePlan():
                return "keeps the plan"
            case events.Depart():
                return "departs"
            case events.Warn(text):
                return f"warns: {text}"
            case _:
                return None

    # --- messages -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _message(message: object) -> str | None:
        match message:
            case Beat() | ClockAsk() | ClockTell():
                return None
            case Attach(links=links):
                others = ranks.union(link.rank for link in links[1:])
                return f"attach, epoch {links[0].epoch}" + (f", with {_set(others)}" if others else "")
            case Attached(epoch=epoch):
                return f"attached, epoch {epoch}"
            case Rejected(why=why):
                return f"rejected: {why}"
            case Links(links=links):
                return "; ".join(_link(link) for link in links)
            case Deliver():
                return f"{_delivery(message)} for {_set(_targets(message))}"
            case Outcomes(id=id_, folds=folds):
                return f"command {id_}: {_folds(folds)}"
            case Ask(id=id_, indices=indices):
                return f"asks for chunk {', '.join(map(str, indices))} of push {id_}"
            case Chunk(id=id_, index=index):
                return f"chunk {index} of push {id_}"
            case NoChunk(id=id_, index=index, why=why):
                return f"no chunk {index} of push {id_}: {why}"
            case _:
                return type(message).__name__.lower()


def _name(rank: int | None) -> str:
    return "root" if rank is None else f"h{rank}"


def _set(mask: int) -> str:
    found = list(ranks.each(mask))
    parts = []
    while found:
        last = next((at for at in range(len(found)) if found[at] != found[0] + at), len(found)) - 1
        parts.append(f"h{found[0]}" if last == 0 else f"h{found[0]}-{found[last]}")
        found = found[last + 1 :]
    return ",".join(parts) or "nobody"


def _targets(delivery: Deliver) -> int:
    return ranks.unpack(delivery.targets)


def _delivery(delivery: Deliver) -> str:
    """What a command is, as far as its payload can be read; whether it is signed is not looked at."""
    try:
        body = codec_command(delivery).body
    except ValueError:
        return f"command {delivery.id}"
    recalled = "what became of " if delivery.manner is Manner.RECALL else ""
    return f"{recalled}command {delivery.id} ({_body(body)})"


def _body(body: Body) -> str:
    tag = str(body.__struct_config__.tag)
    of = getattr(body, "of", None)
    if of is not None:
        return f"{tag} {of}"
    ids = getattr(body, "ids", None)
    return tag if ids is None else f"{tag} {', '.join(map(str, ids))}"


def _commands(ids: Iterable[int]) -> str:
    return "command " + ", ".join(map(str, ids))


def _folds(folds: Iterable[Fold]) -> str:
    return "; ".join(f"{_set(ranks.unpack(fold.ranks))} {describe(fold.outcome)}" for fold in folds)


def _link(link: Link) -> str:
    state = "hangs below" if link.up else "no longer hangs below"
    why = f" ({link.why})" if link.why else ""
    return f"{_name(link.rank)} {state} {_name(link.parent)}{why}"
