"""What is on record of a job: outcomes of its commands, and of a pull what the service itself says.

Of a pull the hosts' outcomes only tell what they have. What came of it at each host is put on record by whoever fetched
it, under the number of the Offer, which is the pull's; its other commands (Send) are about links and no outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from protocol import ranks
from protocol.outcomes import Exited, Fold, Lost

if TYPE_CHECKING:
    from controller.state import Record, State

#: What became of what hosts had, once nobody fetches it any more.
NOT_PULLED = Lost("the service ended before it was here: pull it again")
#: How a pull's `what` begins.
_PULL = '["pull",'


def is_pull(record: Record) -> bool:
    """Whether a command is part of a pull."""
    return record.what.startswith(_PULL)


def telling(records: Sequence[Record]) -> Sequence[Record]:
    """Those of a job's commands whose outcomes are the job's."""
    return records[:1] if records and is_pull(records[0]) else records


def outcomes_of(state: State, record: Record, *, goes_on: bool) -> Iterator[Fold]:
    """What is on record of one of them. `goes_on` says whether what hosts have is still fetched."""
    if not is_pull(record):
        yield from state.outcomes_of(record.id)
        return
    told = ranks.NONE
    for fold in state.pulled(record.id):
        told |= ranks.unpack(fold.ranks)
        yield fold
    for fold in state.outcomes_of(record.id):
        if not isinstance(fold.outcome, Exited):
            yield fold
        elif not goes_on and (rest := ranks.unpack(fold.ranks) & ~told):
            yield Fold(ranks.pack(rest), NOT_PULLED)
