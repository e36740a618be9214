"""Links between two ends in one process: what is heard, and in which order, when connections end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from agent import links
from agent.keyring import Keyring, new_keys
from agent.links import Downlink, Uplink
from agent.ports import free_ports

ADDRESS = "127.0.0.1"
RANK = 7
WITHIN_S = 10.0


class Ends:
    """A parent, and a child that connects to it as often as it likes."""

    def __init__(self) -> None:
        parent, child = new_keys(), new_keys()
        self.parent_key = parent[0]
        self.parent_ring, self.child_ring = Keyring(*parent), Keyring(*child)
        self.parent_ring.admit({child[0]: RANK})
        (self.port,) = free_ports(ADDRESS, 1)
        #: What the parent heard and lost, in order.
        self.told: list[bytes] = []
        #: What each of the child's connections heard.
        self.heard: list[list[bytes]] = []
        self.down = Downlink(
            self.parent_ring,
            "canopy-control",
            ADDRESS,
            self.port,
            heard=lambda _, frames: self.told.append(frames[0]),
            lost=lambda _, why: self.told.append(f"lost: {why}".encode()),
        )
        self.ups: list[Uplink] = []

    def connect(self) -> Uplink:
        heard: list[bytes] = []
        self.heard.append(heard)
        up = Uplink(
            self.child_ring,
            ADDRESS,
            self.port,
            self.parent_key,
            heard=lambda frames: heard.append(bytes(frames[0])),
            lost=lambda _: None,
        )
        self.ups.append(up)
        return up

    def close(self) -> None:
        for up in self.ups:
            if not up._socket.closed:
                up.close()
        self.down.close()
        self.child_ring.close()
        self.parent_ring.close()


def with_ends(test: Callable[[Ends], Any]) -> None:
    async def inner() -> None:
        ends = Ends()
        try:
            await test(ends)
        finally:
            ends.close()

    asyncio.run(inner())


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def wait_for_event(ends: Ends) -> None:
    """Block, and the event loop with it, until libzmq has told of a connection's end; nobody has read it yet."""
    assert ends.down._monitor._pair.poll(round(WITHIN_S * 1000), zmq.POLLIN)


def test_what_a_child_sent_before_its_end_is_heard_before_its_end_is() -> None:
    async def test(ends: Ends) -> None:
        up = ends.connect()
        up.send([b"attach"])
        await until(lambda: ends.told == [b"attach"])
        for number in range(3):
            up.send([b"outcome %d" % number])
        up.close(linger_ms=1_000)
        wait_for_event(ends)
        ends.down._monitor.drain()  # the order that a loaded event loop may choose
        assert ends.told == [b"attach", b"outcome 0", b"outcome 1", b"outcome 2", b"lost: connection closed"]

    with_ends(test)


@pytest.mark.parametrize("penalty", [True, False])
def test_what_is_left_of_a_connection_that_was_cut_off_harms_none_that_has_its_descriptor_now(
    monkeypatch: pytest.MonkeyPatch, penalty: bool
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(links, "shut_down", ended.append)  # so that the number stays in use, as if another had it

    async def test(ends: Ends) -> None:
        up = ends.connect()
        up.send([b"attach"])
        await until(lambda: ends.told == [b"attach"])
        (peer,) = ends.down._peers.values()
        ends.down.drop(RANK, penalty=penalty)
        assert ended == [peer.fd]
        for _ in range(3):
            up.send([b"left"])
        read = 0
        while read < 3:
            assert ends.down._socket.poll(round(WITHIN_S * 1000), zmq.POLLIN)
            parts = ends.down._next()
            assert parts is not None
            ends.down._take(parts)
            read += 1
        assert ended == [peer.fd]
        assert ends.told == [b"attach"]

    with_ends(test)


def test_what_others_sent_is_still_heard_when_a_connection_ends() -> None:
    async def test(ends: Ends) -> None:
        first = ends.connect()
        first.send([b"attach"])
        await until(lambda: ends.told == [b"attach"])
        first.send([b"outcome"])
        first.close(linger_ms=1_000)
        second = ends.connect()
        second.send([b"attach again"])
        await until(lambda: b"attach again" in ends.told)
        # Where the new connection spoke before the news of the old one's end, that is no news any more.
        lost = [b"lost: connection closed"] if b"lost: connection closed" in ends.told else []
        assert ends.told == [b"attach", b"outcome", *lost, b"attach again"]
        assert ends.down.send(RANK, [b"answer"])
        await until(lambda: ends.heard[1] == [b"answer"])

    with_ends(test)


def test_what_is_left_of_a_former_connection_does_not_take_the_place_of_the_present_one() -> None:
    async def test(ends: Ends) -> None:
        for _ in range(20):
            ends.told.clear()
            former = ends.connect()
            former.send([b"attach"])
            await until(lambda: b"attach" in ends.told)
            for _ in range(5):
                former.send([b"more"])
            former.close(linger_ms=1_000)
            present = ends.connect()
            present.send([b"attach"])
            await until(lambda: ends.told.count(b"attach") == 2)
            await until(lambda: ends.told.count(b"more") == 5)
            assert ends.down.send(RANK, [b"answer"])
            await until(lambda: ends.heard[-1] == [b"answer"])
            present.close()
            await until(lambda: ends.told[-1] == b"lost: connection closed")

    with_ends(test)
