"""Rolling work: who begins when."""

from __future__ import annotations

import asyncio

from controller.jobs import Job
from controller.rolling import Roll, Rolling
from protocol import ranks
from protocol.commands import Run
from protocol.ranks import Ranks


def test_hosts_begin_in_the_order_of_their_names_whoever_came_first() -> None:
    names = {0: "h10", 1: "h9", 2: "h1", 3: "h2", 4: "h11"}
    roll = Roll(
        job=1,
        uid=0,
        what="",
        body=Run(argv=("x",), output_limit=0),
        targets=ranks.pack(ranks.union(names)),
        size=2,
        may_fail=0,
    )
    given: list[list[str]] = []

    async def run() -> None:
        job = Job()

        def give(who: Ranks) -> None:
            given.append(sorted(names[rank] for rank in ranks.each(who)))
            job.began(len(given))

        rolling = Rolling(
            job,
            roll,
            begun=ranks.NONE,
            failed=ranks.NONE,
            name=names.__getitem__,
            give=give,
            withhold=lambda _: None,
            done=lambda: None,
        )
        rolling.begin()
        for number in (1, 2, 3):
            job.settled(number)

    asyncio.run(run())
    assert given == [["h1", "h2"], ["h10", "h9"], ["h11"]]
