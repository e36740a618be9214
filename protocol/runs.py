"""Runs: chunks that follow each other, in one message. Pure.

Where a host's processor is the limit and not its link, most of what a chunk costs is waking up for it. Four at a time
halve that; where the link is the limit each host behind would wait for four chunks instead of one before it can give
anything on, so a host makes runs only while it is told that its processor is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.commands import Stream
from protocol.limits import RUN
from protocol.stream import Blob, chunk_size, count_of
from protocol.transfer_effects import Effect, Give, GiveRun


def run_most(stream: Stream) -> int:
    """How many chunks of a stream go into one message at most."""
    return max(1, RUN // stream.chunk)


def in_runs(effects: Sequence[Effect], most: int) -> list[Effect]:
    """The same effects, with what the same host is given of chunks that follow each other as runs of up to `most`."""
    done: list[Effect] = []
    runs: dict[int, tuple[int, list[Give]]] = {}
    for effect in effects:
        if not isinstance(effect, Give) or effect.packed:
            done.append(effect)
            continue
        at, run = runs.get(effect.peer, (0, []))
        if run and len(run) < most and effect.index == run[-1].index + 1:
            run.append(effect)
            done[at] = GiveRun(effect.peer, effect.id, run[0].index, tuple(give.blob for give in run))
        else:
            runs[effect.peer] = len(done), [effect]
            done.append(effect)
    return done


def parts(stream: Stream, index: int, count: int, blob: Blob) -> list[tuple[int, Blob]]:
    """The chunks of a run, each with its index; none where `blob` is not just `count` chunks from `index` on."""
    if count > run_most(stream) or index + count > count_of(stream):
        return []
    view, chunk = memoryview(blob), stream.chunk
    if len(view) != (count - 1) * chunk + chunk_size(stream, index + count - 1):
        return []
    return [(index + i, view[i * chunk : (i + 1) * chunk]) for i in range(count)]
