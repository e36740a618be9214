"""`python -m tests.sim.golden`: the stories of situations that a newcomer must understand. `--write` writes them anew.

They stand in `golden/`, one a file, and are reviewed as diffs: a change of the protocol shows in them as what it does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from protocol import events, ranks
from protocol.commands import Run
from protocol.limits import KEEP_AFTER, LOST_AFTER, SILENT_AFTER
from protocol.outcomes import NO_OUTPUT, Exited
from tests.sim.bulk import Bulk
from tests.sim.tree import Tree
from tests.sim.words import Story

DIRECTORY = Path(__file__).parent / "golden"

#: Two relays below the root, two hosts below each.
_TWO_LEVELS = {0: None, 1: None, 2: 0, 3: 0, 4: 1, 5: 1}
#: One relay, two hosts below it.
_RELAY = {0: None, 1: 0, 2: 0}
#: As long as work takes here, in seconds, where it takes long.
_LONG = 3.0
#: Until what is settled is forgotten everywhere, in seconds.
_FORGOTTEN = 1.5


def _tree(parents: dict[int, int | None], takes: float = 0.01) -> Tree:
    """A tree that stands, and whose work takes so many seconds."""
    tree = Tree(len(parents), parents=parents, seed=1)
    tree.work = lambda _rank, _id, _body: (takes, Exited(0), NO_OUTPUT)
    tree.form()
    tree.run_for(1.0)
    return tree


def broadcast_through_two_levels() -> Story:
    """A command reaches every host once. Relays split it on the way down, and fold the outcomes on the way up;
    the root settles each target, and a second later lets everybody forget it."""
    tree = _tree(_TWO_LEVELS)
    story = Story(tree)
    tree.settle(tree.broadcast())
    tree.run_for(_FORGOTTEN)
    return story


def leaf_lost_in_mid_command() -> Story:
    """A host dies while it works. Its parent says so at once; the root waits LOST_AFTER for it to come back,
    and settles it as lost, with the link and the reason. The others are not held up."""
    tree = _tree(_RELAY, _LONG)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.kill(2)
    tree.settle(command)
    return story


def relay_lost_and_its_orphans_attached_again() -> Story:
    """A relay dies while all work. Its children attach to the next ancestor, each after a pause of its own, and
    are asked again for what they owe. They answer from memory: nothing is begun twice. Only the relay's own
    outcome is lost."""
    tree = _tree(_RELAY, _LONG)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.kill(0)
    tree.settle(command)
    return story


def cancel_before_delivery() -> Story:
    """A host is cut off when the command is given, and the command is cancelled meanwhile. When the host is
    back it is asked again with the cancel alone, and answers that it did not begin. Would the command still
    come, it would not begin."""
    tree = _tree(_RELAY, 60.0)
    story = Story(tree)
    tree.cut(2)
    command = tree.broadcast([1, 2])
    tree.run_for(0.5)
    tree.cancel(command)
    tree.run_for(SILENT_AFTER + 1)
    tree.heal(2)
    tree.settle(command)
    return story


def deadline_with_a_frozen_host() -> Story:
    """Two hosts work longer than the deadline allows. One ends its work and says so. The other is frozen and
    says nothing: DEADLINE_SLACK after the deadline the root says that."""
    tree = _tree(_RELAY, 60.0)
    story = Story(tree)
    command = tree.broadcast([1, 2], ttl=1.0)
    tree.run_for(0.2)
    tree.freeze(2)
    tree.settle(command)
    return story


def host_not_in_the_tree() -> Story:
    """A host has been gone for longer than LOST_AFTER when a command is given: it is lost at once, and nobody
    waits."""
    tree = _tree(_RELAY)
    tree.kill(2)
    tree.run_for(LOST_AFTER + 1)
    story = Story(tree)
    tree.settle(tree.broadcast())
    return story


def agent_restarted_in_mid_command() -> Story:
    """An agent dies while it works, and is started again. It attaches with a higher incarnation: what its
    predecessor was given is not given to it again. It is asked what became of it, knows nothing, and that is lost."""
    tree = _tree(_RELAY, _LONG)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.restart(2)
    tree.settle(command)
    return story


def agent_restarted_with_an_outcome_on_disk() -> Story:
    """An agent is cut off while it works. Nobody takes its outcome, so that it writes it to disk after KEEP_AFTER.
    Then it dies, and is started again and reached again: asked what became of the command, its successor reads it."""
    tree = _tree(_RELAY, 0.5)
    story = Story(tree)
    command = tree.broadcast([2])
    tree.run_for(0.2)
    tree.cut(2)
    tree.run_for(KEEP_AFTER + 1)
    tree.restart(2)
    tree.heal(2)
    tree.settle(command)
    tree.run_for(_FORGOTTEN)
    return story


def answer_after_it_was_lost() -> Story:
    """An agent is cut off while it works, for longer than it is waited for: its outcome is settled as lost. When it
    is back it is asked what became of the command. That changes nothing, and is told beside it."""
    tree = _tree(_RELAY, 0.5)
    story = Story(tree)
    command = tree.broadcast([2])
    tree.run_for(0.2)
    tree.cut(2)
    tree.settle(command)
    tree.heal(2)
    tree.run_until(lambda: tree.late)
    return story


def service_restarted_in_mid_command() -> Story:
    """The service dies while all work, and is started again a second later. Agents keep their outcomes, find it
    by themselves and are asked again for what it has not on record."""
    tree = _tree(_RELAY, 0.5)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.2)
    tree.kill(None)
    tree.run_for(1.0)
    tree.restart_root()
    tree.settle(command)
    return story


def replan_in_mid_command() -> Story:
    """The plan changes while all work: h2 moves from h0 to h1. It leaves, attaches there, and is asked
    again."""
    tree = _tree({0: None, 1: None, 2: 0}, _LONG)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.replan({0: None, 1: None, 2: 1})
    tree.settle(command)
    return story


def forged_command() -> Story:
    """A relay in an enemy's hands gives those below it a command of its own making, and one that the fleet
    signed for another host. Both are refused; the refusals go up, where nobody asked for them."""
    tree = _tree(_RELAY)
    story = Story(tree)
    tree.note("h0 forges a command for h1")
    forged = tree.sign(Run(argv=("evil",), output_limit=0), ranks.only(1))
    signature = bytes([forged.signature[0] ^ 1]) + forged.signature[1:]
    tree.feed(1, events.FromParent(msgspec.structs.replace(forged, signature=signature)))
    tree.note("h0 gives h1 what the fleet signed for h2")
    other = tree.sign(Run(argv=("true",), output_limit=0), ranks.only(2))
    tree.feed(1, events.FromParent(msgspec.structs.replace(other, targets=ranks.pack(ranks.only(1)))))
    tree.run_for(1.0)
    return story


def push_of_three_chunks_from_host_to_host() -> Story:
    """A file for h1 and h2, below h0, which is no target and gets no chunk: h1 asks the root, and h2 asks h1, which
    gives each chunk on once it has matched its digest in the signed command."""
    tree = _tree(_RELAY)
    bulk = Bulk(tree)
    story = Story(tree)
    data = bytes(range(256)) * 10
    command = bulk.push(data, 1_000, [1, 2])
    tree.settle(command)
    tree.run_for(_FORGOTTEN)
    assert all(b"".join(chunk for _, chunk in sorted(bulk.stored[rank, command].items())) == data for rank in (1, 2))
    return story


def host_joins_a_live_fleet() -> Story:
    """A new host is planned below h1 and comes before word of that: it is not admitted yet. Those above it get their
    new parts of the plan, the host tries again, is attached, and gets the next command."""
    tree = _tree(_RELAY)
    story = Story(tree)
    rank = tree.join(fanout=1)
    tree.form()
    tree.settle(tree.broadcast([rank]))
    return story


def relay_cut_off_from_the_root_alone() -> Story:
    """The way between h0 and the root is gone, while those below could reach both. h0 lets one child go, which
    finds the root and stays there; so the other is sent after it."""
    tree = _tree(_RELAY)
    story = Story(tree)
    tree.cut(0, None)
    tree.run_until(lambda: ranks.count(tree.root.reachable) == 2 and not ranks.holds(tree.root.reachable, 0), within=90)
    return story


def paused_relay_keeps_its_children() -> Story:
    """A relay is not run for a while, shorter than SILENT_AFTER for those around it. It doubts itself first,
    and reads what waits, before it takes anybody for silent: nobody is lost."""
    tree = _tree(_RELAY, _LONG)
    story = Story(tree)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.freeze(0)
    tree.run_for(SILENT_AFTER - 2)
    tree.thaw(0)
    tree.settle(command)
    return story


STORIES: tuple[Callable[[], Story], ...] = (
    broadcast_through_two_levels,
    leaf_lost_in_mid_command,
    relay_lost_and_its_orphans_attached_again,
    cancel_before_delivery,
    deadline_with_a_frozen_host,
    host_not_in_the_tree,
    agent_restarted_in_mid_command,
    agent_restarted_with_an_outcome_on_disk,
    answer_after_it_was_lost,
    service_restarted_in_mid_command,
    replan_in_mid_command,
    forged_command,
    push_of_three_chunks_from_host_to_host,
    host_joins_a_live_fleet,
    relay_cut_off_from_the_root_alone,
    paused_relay_keeps_its_children,
)


def text(tell: Callable[[], Story]) -> str:
    """The file of a story: what it is about, and what happens."""
    about = " ".join((tell.__doc__ or "").split())
    return "\n".join((*_wrapped(about), "", *tell().lines, ""))


def _wrapped(about: str) -> list[str]:
    import textwrap

    return textwrap.wrap(about, 110)


def path(tell: Callable[[], Story]) -> Path:
    """Where it stands."""
    return DIRECTORY / f"{tell.__name__}.txt"


def main() -> int:
    """Compare, or write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them anew")
    options = parser.parse_args()
    differ = 0
    for tell in STORIES:
        file, now = path(tell), text(tell)
        if options.write:
            file.write_text(now, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != now:
            differ += 1
            print(f"{file.relative_to(Path.cwd())} is not what happens now: look at the diff after --write")
    return min(1, differ)


if __name__ == "__main__":
    sys.exit(main())
