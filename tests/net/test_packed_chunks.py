"""Chunks that travel compressed, over real links between the bulk parts of hosts in one process."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from backports import zstd

from agent import packing
from agent.bulk import Bulk
from agent.keyring import Keyring, new_keys
from agent.packing import Packer, Unavailable
from agent.ports import free_ports
from protocol.commands import Hop, Stream
from protocol.limits import CHUNK
from protocol.relay import Relay
from protocol.stream import Blob, stream_of
from protocol.transfer import Role
from tests.net.localfleet import own_address

ID = 5
HOSTS = 3
COUNT = 40
TEXT = (b"a line of a log that says what every line before it said\n" * 50_000)[: COUNT * CHUNK - 99]
NOISE = random.Random(2).randbytes(COUNT * CHUNK - 99)
#: One of these takes 0.1 s by itself.
WITHIN_S = 60.0


class Node:
    """A host's, or for None the root's, bulk part, and where its bytes are."""

    def __init__(self, rank: int | None, fleet: Fleet) -> None:
        self.fleet, self.rank = fleet, rank
        self.chunks: dict[int, bytes] = {}
        self.read_by_now: list[tuple[int, bytes | None, bytes | None]] = []
        self.done = False
        self.why: str | None = None
        #: How many bytes of chunks came over its link.
        self.came = 0
        self.keyring = Keyring(*fleet.keys[rank])
        root = SimpleNamespace(address=fleet.address, bulk_port=fleet.ports[None], key=fleet.keys[None][0])
        relay = cast(Relay, SimpleNamespace(rank=rank, root=root))
        self.bulk = Bulk(
            self.keyring,
            relay,
            fleet.address,
            fleet.ports[rank],
            store=lambda: self,
            expel=lambda peer, why: fleet.expelled.append((peer, why)),
            left=lambda _, source, __: fleet.left.append((rank, source)),
        )
        heard = self.bulk._heard

        def count(source: int | None, messages: Iterable[Sequence[Blob]]) -> None:
            messages = list(messages)
            self.came += sum(len(frame) for frames in messages for frame in frames)
            heard(source, messages)

        self.bulk._heard = count  # type: ignore[method-assign]

    def read(self, id_: int, index: int) -> None:
        blob, packed = self.fleet.data[index * CHUNK :][:CHUNK], None
        if self.rank is None:
            packed = self.fleet.pack(blob)
        self.read_by_now.append((index, blob, packed))
        asyncio.get_running_loop().call_soon(self._was_read, id_)

    def _was_read(self, id_: int) -> None:
        read, self.read_by_now = self.read_by_now, []
        self.bulk.was_read(id_, read)

    def store(self, id_: int, chunks: Sequence[tuple[int, Blob]]) -> None:
        self.chunks |= {index: bytes(blob) for index, blob in chunks}
        asyncio.get_running_loop().call_soon(self.bulk.was_stored, id_, [index for index, _ in chunks])

    def headed(self, id_: int) -> None:
        raise AssertionError(id_)

    def complete(self, id_: int) -> None:
        assert id_ == ID
        self.done = True

    def broken(self, id_: int, why: str, *, keep: bool) -> None:
        self.why = why
        self.bulk.demote(id_)


class Fleet:
    """A root and hosts in a row."""

    def __init__(self, data: bytes, pack: Any, *, compress: bool = True) -> None:
        self.data, self.pack, self.compress = data, pack, compress
        self.address = own_address()
        ranks = (None, *range(HOSTS))
        self.keys = {rank: new_keys() for rank in ranks}
        self.ports = dict(zip(ranks, free_ports(self.address, len(ranks)), strict=True))
        self.expelled: list[tuple[int, str]] = []
        #: Who left whom as a source.
        self.left: list[tuple[int | None, int]] = []
        self.hosts: list[Node] = []

    def _stream(self) -> Stream:
        stream = stream_of(lambda i: self.data[i * CHUNK :][:CHUNK], len(self.data), compress=self.compress)
        order = tuple(Hop(rank, self.address, self.ports[rank], self.keys[rank][0]) for rank in range(HOSTS))
        return msgspec.structs.replace(stream, order=order, inline=None)

    async def _push(self, late: int | None) -> None:
        stream, nodes = self._stream(), [Node(rank, self) for rank in (None, *range(HOSTS))]
        self.hosts = nodes[1:]
        try:
            deadline = time.monotonic() + WITHIN_S
            if late is not None:
                self.hosts[late].keyring.admit({self.keys[rank][0]: rank for rank in range(HOSTS)})
            for node in nodes:
                if late is None or node.rank != late:
                    node.bulk.begin(ID, stream, Role.SOURCE if node.rank is None else Role.TARGET, 0)
            if late is not None:
                last = self.hosts[late]
                while not last.bulk._waiting:
                    assert time.monotonic() < deadline, "nobody asks the last for a conduit"
                    await asyncio.sleep(0.01)
                last.bulk.begin(ID, stream, Role.TARGET, 0)
            while not all(host.done or host.why for host in self.hosts):
                assert time.monotonic() < deadline, [(host.done, len(host.chunks)) for host in self.hosts]
                await asyncio.sleep(0.01)
        finally:
            for node in nodes:
                node.bulk.close()
                node.keyring.close()

    def push(self, *, late: int | None = None) -> Fleet:
        """Push to all, until each has it or can't have it; the one that is `late` knows of the push when another has
        asked it for a conduit."""
        asyncio.run(self._push(late))
        return self

    def arrived(self) -> bool:
        """Whether every host has it, whole."""
        return all(b"".join(host.chunks[i] for i in sorted(host.chunks)) == self.data for host in self.hosts)


def test_what_can_be_packed_arrives_whole_over_links_that_carry_far_less() -> None:
    fleet = Fleet(TEXT, Packer().pack).push()
    assert fleet.arrived()
    assert all(host.came < len(TEXT) // 10 for host in fleet.hosts), [host.came for host in fleet.hosts]


def test_what_cannot_be_packed_is_sent_plain() -> None:
    fleet = Fleet(NOISE, Packer().pack).push()
    assert fleet.arrived()
    assert all(len(NOISE) < host.came < len(NOISE) * 1.01 for host in fleet.hosts), [host.came for host in fleet.hosts]


def test_a_stream_of_both_arrives_whole() -> None:
    mixed = b"".join((TEXT if index // 7 % 2 else NOISE)[index * CHUNK :][:CHUNK] for index in range(COUNT))
    assert Fleet(mixed, Packer().pack).push().arrived()


@pytest.mark.parametrize(
    "pack",
    [
        lambda _: zstd.compress(bytes(64 * CHUNK)),
        lambda blob: zstd.compress(blob)[:-1],
        lambda blob: zstd.compress(blob[::-1]),
        lambda _: b"garbage",
        lambda blob: blob,
    ],
    ids=["bomb", "cut", "other bytes", "garbage", "plain"],
)
def test_a_root_that_sends_bad_frames_fails_the_push_and_nothing_of_them_is_stored(pack: Any) -> None:
    fleet = Fleet(TEXT, pack).push()
    assert all("does not match its digest" in (host.why or "") for host in fleet.hosts), [h.why for h in fleet.hosts]
    assert not any(host.chunks for host in fleet.hosts)
    assert not any(host.done for host in fleet.hosts)
    assert fleet.expelled == []


def test_a_frame_in_a_push_that_must_not_be_compressed_is_refused() -> None:
    fleet = Fleet(TEXT, Packer().pack, compress=False).push()
    assert all(host.why for host in fleet.hosts)
    assert not any(host.chunks for host in fleet.hosts)


def test_a_host_without_the_library_says_what_to_do_and_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(TEXT, zstd.compress)

    def missing() -> Any:
        raise Unavailable("no Zstandard here: push with --no-compress")

    monkeypatch.setattr(packing, "_library", missing)
    fleet.push()
    assert fleet.hosts[0].why == "no Zstandard here: push with --no-compress"
    assert all(host.why for host in fleet.hosts)
    assert not any(host.chunks for host in fleet.hosts)
    assert fleet.expelled == []
