"""`python -m tests.sim`: play seeded schedules of faults, each on a tree of its own, until one fails or all passed.

Exit code 1 where one fails; its seed, the least schedule that fails too, and the last of its story are printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from functools import partial

from tests.sim.schedule import Performance, Schedule, drawn, failure, shrink
from tests.sim.words import Story

#: Of the failing schedule's story, so many lines are printed: what led to it, and no novel.
_LINES = 80


def _try(seed: int, most: int | None) -> tuple[int, int, str | None]:
    schedule = drawn(seed, most)
    return seed, schedule.hosts, failure(schedule)


def _explain(schedule: Schedule) -> None:
    print(f"\nThe least schedule found that fails too (python -m tests.sim --first {schedule.seed} --schedules 1):")
    print(schedule)
    performance = Performance(schedule)
    story = Story(performance.tree)
    try:
        performance.play()
    except Exception:
        print(f"\nThe last {_LINES} lines of its story:")
        print("\n".join(story.lines[-_LINES:]))
        print()
        traceback.print_exc(file=sys.stdout)


def main() -> int:
    """Play; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many, one a seed")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--most", type=int, default=None, help="no trees with more hosts than this")
    parser.add_argument("--no-shrink", action="store_true", help="print the failing seed alone")
    options = parser.parse_args()
    began = time.monotonic()
    hosts: Counter[int] = Counter()
    seeds = range(options.first, options.first + options.schedules)
    # The long ones first, so that no process is left alone with one at the end.
    order = sorted(seeds, key=lambda seed: -drawn(seed, options.most).hosts)
    with multiprocessing.Pool(options.jobs) as pool:
        for seed, size, why in pool.imap_unordered(partial(_try, most=options.most), order, chunksize=4):
            if why is not None:
                pool.terminate()
                print(f"FAILED seed {seed}: {why}", flush=True)
                if not options.no_shrink:
                    _explain(shrink(drawn(seed, options.most)))
                return 1
            hosts[size] += 1
            if sys.stderr.isatty():
                print(f"\r{hosts.total()} of {len(seeds)}", end="", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    print(f"{hosts.total()} schedules of {min(hosts)} to {max(hosts)} hosts, none failed ({took:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
