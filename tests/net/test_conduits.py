"""Conduits over real sockets: who gets in, what is heard, and that a push goes on without them."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import conduits as module
from agent import outflow, ways
from agent.conduits import Conduit, Conduits, dial
from agent.keyring import Keyring, new_keys, to_text
from agent.links import Downlink
from agent.outflow import Outflow
from agent.ports import free_ports
from agent.traffic import Traffic
from protocol import tempo
from protocol.codec import decode, encode
from protocol.conduit import Sealer
from protocol.messages import Ask, Chunk, Hold
from protocol.messages import Conduit as Offer
from protocol.stream import Blob
from protocol.tempo import Sent, Tempo
from tests.net.localfleet import own_address
from tests.net.test_packed_chunks import Fleet

RANK, OTHER = 1, 2
WITHIN_S = 20.0
#: So much that it is not all on its way before there are conduits.
MUCH = random.Random(3).randbytes(256 << 16)


class Host:
    """A host that offers conduits, and what it heard."""

    def __init__(self) -> None:
        self.address = own_address()
        self.keys = {rank: new_keys()[0] for rank in (RANK, OTHER)}
        self.keyring = Keyring(*new_keys())
        self.keyring.admit({key: rank for rank, key in self.keys.items()})
        self.heard: list[tuple[int, Any]] = []
        self.lost: list[tuple[int, str]] = []
        self.traffic = Traffic(asyncio.get_running_loop().time)
        self.connections: list[socket.socket] = []
        self.conduits = Conduits(
            self.keyring,
            self.address,
            heard=self._heard,
            lost=lambda rank, why: self.lost.append((rank, why)),
            traffic=self.traffic,
        )

    def _heard(self, rank: int, messages: Iterable[Sequence[Blob]]) -> None:
        self.heard += [(rank, decode(frames)[0]) for frames in messages]

    def offer(self, rank: int = RANK) -> Offer:
        offer = self.conduits.invite(rank)
        assert offer is not None
        return offer

    async def connect(self, shown: bytes = b"") -> socket.socket:
        """A connection to where conduits are, that has shown this."""
        sock = socket.socket()
        self.connections.append(sock)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        assert self.conduits._listening is not None
        await loop.sock_connect(sock, self.conduits._listening.getsockname())
        await loop.sock_sendall(sock, shown)
        return sock


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + WITHIN_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come to that"
        await asyncio.sleep(0.005)


async def is_hung_up(sock: socket.socket) -> bool:
    """Whether the other side ends a connection without a word."""
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), WITHIN_S) == b""
    except ConnectionResetError:
        return True


def with_host(test: Callable[[Host], Awaitable[None]]) -> None:
    async def run() -> None:
        host = Host()
        try:
            await test(host)
        finally:
            for sock in host.connections:
                sock.close()
            host.conduits.close()
            host.keyring.close()

    asyncio.run(run())


def sealed(sealer: Sealer, message: Any) -> bytes:
    sealer.add(encode(message))
    data = bytes(sealer.ready())
    sealer.sent(len(data))
    return data


def say(sock: socket.socket, sealer: Sealer, *messages: Any) -> None:
    for message in messages:
        sock.sendall(sealed(sealer, message))


def test_who_shows_the_ticket_is_heard_as_who_got_it_and_answered() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        answers: list[Any] = []

        def came(messages: Sequence[Sequence[Blob]]) -> None:
            answers.extend(bytes(decode(frames)[1] or b"") for frames in messages)

        mine = Conduit(
            await dial(host.address, offer), offer.up, offer.down, heard=came, lost=answers.append, traffic=host.traffic
        )
        mine.send(encode(Ask(5, (0, 1))))
        host.traffic.flush()
        await until(lambda: host.heard == [(RANK, Ask(5, (0, 1)))])
        chunks = [bytes([index]) * 65_536 for index in range(200)]  # more than the kernel takes at once
        for index, blob in enumerate(chunks):
            assert host.conduits.send(RANK, encode(Chunk(5, index), blob))
        host.traffic.flush()
        await until(lambda: len(answers) == len(chunks))
        assert answers == chunks
        assert not host.conduits.send(OTHER, encode(Hold(5, 0)))
        mine.close()
        await until(lambda: host.lost == [(RANK, "connection closed")])

    with_host(test)


def test_whole_chunks_fit_into_what_a_connection_begins_with() -> None:
    # Half of the largest buffer is what waiting for more can give (tcp(7), tcp_rmem).
    most = int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[2]) // 2

    async def test(host: Host) -> None:
        offer = host.offer()
        sock = await dial(host.address, offer)
        mine = Conduit(sock, offer.up, offer.down, heard=lambda _: None, lost=lambda _: None, traffic=host.traffic)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= min(module._WINDOW, most)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        for host.traffic.pressed in (False, True):
            assert host.traffic.waited_for() < module._WINDOW
        mine.close()

    with_host(test)


@pytest.mark.parametrize("shown", [b"x" * 32, b"short", bytes(32), b"x" * 100])
def test_who_shows_anything_else_is_hung_up_on_and_who_has_the_ticket_gets_in_after(shown: bytes) -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        stranger = await host.connect(shown)
        stranger.shutdown(socket.SHUT_WR)
        assert await is_hung_up(stranger)
        say(await host.connect(offer.ticket), Sealer(offer.up), Ask(5, ()))
        await until(lambda: host.heard == [(RANK, Ask(5, ()))])

    with_host(test)


def test_a_ticket_is_good_once() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        first, sealer = await host.connect(offer.ticket), Sealer(offer.up)
        say(first, sealer, Ask(5, ()))
        await until(lambda: len(host.heard) == 1)
        assert await is_hung_up(await host.connect(offer.ticket))
        say(first, sealer, Ask(5, ()))
        await until(lambda: len(host.heard) == 2)

    with_host(test)


def test_an_older_ticket_is_worth_nothing_beside_a_newer_one() -> None:
    async def test(host: Host) -> None:
        older, newer = host.offer(), host.offer()
        assert await is_hung_up(await host.connect(older.ticket))
        say(await host.connect(newer.ticket), Sealer(newer.up), Ask(5, ()))
        await until(lambda: len(host.heard) == 1)

    with_host(test)


def test_a_ticket_that_nobody_shows_is_soon_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICKET_FOR", 0.0)

    async def test(host: Host) -> None:
        offer = host.offer()
        assert await is_hung_up(await host.connect(offer.ticket))

    with_host(test)


def test_who_was_cut_off_has_no_ticket_left() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        host.conduits.close_one(RANK)
        assert await is_hung_up(await host.connect(offer.ticket))

    with_host(test)


def test_however_often_a_host_asks_it_has_one_ticket() -> None:
    async def test(host: Host) -> None:
        for _ in range(1_000):
            host.offer()
        assert len(host.conduits._invited) == 1

    with_host(test)


def test_who_shows_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHOW_WITHIN", 0.05)

    async def test(host: Host) -> None:
        host.offer()
        assert await is_hung_up(await host.connect())
        assert await is_hung_up(await host.connect(b"half a tick"))

    with_host(test)


def test_many_that_show_nothing_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNSHOWN_MOST", 4)

    async def test(host: Host) -> None:
        offer = host.offer()
        silent = [await host.connect() for _ in range(8)]
        say(await host.connect(offer.ticket), Sealer(offer.up), Ask(5, ()))
        await until(lambda: len(host.heard) == 1)
        assert await is_hung_up(silent[0])
        assert len(host.conduits._unshown) <= 4

    with_host(test)


def test_a_key_that_is_admitted_no_more_is_not_heard() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        sock, sealer = await host.connect(offer.ticket), Sealer(offer.up)
        say(sock, sealer, Ask(5, ()))
        await until(lambda: len(host.heard) == 1)
        host.keyring.admit({host.keys[OTHER]: OTHER})
        say(sock, sealer, Ask(6, ()))
        assert await is_hung_up(sock)
        assert host.lost == [(RANK, "its key is admitted no more")]
        assert len(host.heard) == 1

    with_host(test)


def test_a_rank_that_has_another_key_by_now_does_not_get_in_with_the_old_ones_ticket() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        host.keyring.admit({new_keys()[0]: RANK})
        assert await is_hung_up(await host.connect(offer.ticket))

    with_host(test)


def test_who_is_not_admitted_is_offered_none() -> None:
    async def test(host: Host) -> None:
        assert host.conduits.invite(77) is None

    with_host(test)


@pytest.mark.parametrize(
    "hostile",
    [
        lambda offer: sealed(Sealer(offer.down), Ask(5, ())),
        lambda offer: sealed(Sealer(bytes(32)), Ask(5, ())),
        lambda offer: b"\xff" * 4,
        lambda offer: bytes(1_000),
    ],
    ids=["turned round", "another's key", "a length without end", "zeros"],
)
def test_what_its_key_did_not_seal_ends_a_conduit(hostile: Callable[[Offer], bytes]) -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        sock = await host.connect(offer.ticket)
        sock.sendall(hostile(offer))
        assert await is_hung_up(sock)
        assert host.heard == []
        assert [rank for rank, _ in host.lost] == [RANK]

    with_host(test)


def test_what_came_before_a_bad_record_is_heard() -> None:
    async def test(host: Host) -> None:
        offer = host.offer()
        sock, sealer = await host.connect(offer.ticket), Sealer(offer.up)
        good, bad = (sealed(sealer, Ask(id_, ())) for id_ in (5, 6))
        sock.sendall(good + bad[:-1] + bytes([bad[-1] ^ 1]))
        assert await is_hung_up(sock)
        assert host.heard == [(RANK, Ask(5, ()))]

    with_host(test)


@pytest.fixture
def by_conduit(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The hosts that were sent a chunk by a conduit."""
    sent: set[int] = set()
    send = Conduits.send

    def watched(self: Conduits, rank: int, frames: Sequence[Blob]) -> bool:
        by_it = send(self, rank, frames)
        if by_it and len(frames) == 3:
            sent.add(rank)
        return by_it

    monkeypatch.setattr(Conduits, "send", watched)
    return sent


@pytest.fixture
def by_link(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The hosts that were sent a chunk by the bulk link, each time."""
    sent: list[int] = []
    send = Downlink.send

    def watched(self: Downlink, rank: int, frames: Sequence[Blob]) -> bool:
        if len(frames) == 3:
            sent.append(rank)
        return send(self, rank, frames)

    monkeypatch.setattr(Downlink, "send", watched)
    return sent


def test_a_push_passes_through_conduits_and_none_of_it_by_the_links(
    by_conduit: set[int], by_link: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_CONDUIT_WITHIN", WITHIN_S)
    assert Fleet(MUCH, lambda _: None).push().arrived()
    assert by_conduit == {0, 1, 2}
    assert not by_link


_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()


@pytest.mark.skipif(not {"bbr", "cubic", "reno"} <= set(_AVAILABLE), reason="the kernel has not all of them")
@pytest.mark.parametrize(
    ("chosen", "longest_us", "relays", "used"),
    [
        ("bbr", 10**9, True, "cubic"),
        ("bbr", 0, True, "bbr"),
        ("bbr", 10**9, False, "bbr"),
        ("reno", 10**9, True, "reno"),
    ],
    ids=["one segment", "between sites", "the root", "another choice"],
)
def test_a_host_that_relays_in_one_segment_does_not_send_by_bbr(
    monkeypatch: pytest.MonkeyPatch, chosen: str, longest_us: int, relays: bool, used: str
) -> None:
    monkeypatch.setattr(outflow, "_SEGMENT_US", longest_us)

    async def test(host: Host) -> None:
        host.conduits._relays = relays
        offer = host.offer()
        assert host.conduits._listening is not None
        # What is accepted has what its listener has.
        host.conduits._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, chosen.encode())
        say(await host.connect(offer.ticket), Sealer(offer.up), Ask(5, ()))
        await until(lambda: len(host.heard) == 1)
        sock = host.conduits._conduits[RANK]._socket
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == used.encode()

    with_host(test)


class Clockwork:
    """Looks that are a tenth of a second apart, whatever the time is."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.now = sock, 100.0
        self.outflow = Outflow(sock, self.now, relays=False)

    def look(self, *, free: bool = False) -> None:
        assert self.outflow.look_at <= self.now
        self.outflow.look(self.now, free=free)
        self.now += tempo.LOOK
        assert self.outflow.look_at <= self.now

    def pace(self) -> int:
        """In bytes a second, as the kernel has it (SO_MAX_PACING_RATE)."""
        return int.from_bytes(self.sock.getsockopt(socket.SOL_SOCKET, 47, struct.calcsize("@L")), sys.byteorder)


_UNPACED = 2 ** (8 * struct.calcsize("@L")) - 1


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sender:
        sender.connect(server.getsockname())
        receiver, _ = server.accept()
        with receiver:
            yield sender, receiver


def test_what_a_connection_says_is_what_it_has_sent() -> None:
    said: list[Sent] = []

    class Told(Tempo):
        def look(self, sent: Sent, now: float, *, free: bool = False) -> None:
            said.append(sent)

    with connected() as (sender, receiver):
        outflow_ = Outflow(sender, 100.0, relays=False)
        outflow_._tempo = Told(relays=False)
        outflow_.look(100.0, free=False)
        sender.sendall(bytes(200_000))
        received = 0
        while received < 200_000:
            received += len(receiver.recv(200_000))
        deadline = time.monotonic() + WITHIN_S
        while said[-1].acknowledged - said[0].acknowledged < 200_000:
            assert time.monotonic() < deadline, "not all was acknowledged"
            outflow_.look(100.0, free=False)
    assert said[-1].acknowledged - said[0].acknowledged == 200_000
    assert 0 < said[-1].shortest <= 2 * WITHIN_S
    assert 0 < said[-1].trip <= 2 * WITHIN_S
    assert 0 <= said[-1].busy <= 2 * WITHIN_S


def test_the_kernel_is_told_the_pace_and_that_there_is_none_any_more() -> None:
    class Set(Tempo):
        def look(self, sent: Sent, now: float, *, free: bool = False) -> None:
            self.most = None if free else next(limits)

    limits = iter([12_345_678.9, 5e6, tempo.FASTEST])
    with connected() as (sender, _):
        clockwork = Clockwork(sender)
        clockwork.outflow._tempo = Set(relays=False)
        assert clockwork.pace() == _UNPACED
        paces = []
        for free in (False, False, True, False, True):
            clockwork.look(free=free)
            paces.append(clockwork.pace())
        assert paces == [12_345_678, 5_000_000, _UNPACED, int(tempo.FASTEST), _UNPACED]


def test_a_kernel_that_says_less_of_a_connection_has_it_go_unlimited() -> None:
    class Old(socket.socket):
        def getsockopt(self, *args: int) -> Any:
            return bytes(104) if args[1] == socket.TCP_INFO else super().getsockopt(*args)

    with Old() as sock:
        clockwork = Clockwork(sock)
        for _ in range(30):
            clockwork.look()
        assert clockwork.pace() == _UNPACED


def test_who_asks_for_a_conduit_before_its_source_knows_of_the_push_gets_one_then(by_conduit: set[int]) -> None:
    assert Fleet(MUCH, lambda _: None).push(late=1).arrived()
    assert by_conduit == {0, 1, 2}


def _none(self: Conduits, rank: int) -> Offer | None:
    return None


_invite = Conduits.invite


def _nowhere(self: Conduits, rank: int) -> Offer | None:
    offer = _invite(self, rank)
    assert offer is not None
    return msgspec.structs.replace(offer, port=free_ports(self._address, 1)[0])


@pytest.mark.parametrize("invite", [_none, _nowhere])
def test_a_push_passes_without_conduits_where_none_can_be_had(
    monkeypatch: pytest.MonkeyPatch, invite: Callable[[Conduits, int], Offer | None]
) -> None:
    monkeypatch.setattr(Conduits, "invite", invite)
    fleet = Fleet(MUCH, lambda _: None).push()
    assert fleet.arrived()
    assert fleet.expelled == []


def test_a_source_whose_conduit_does_not_open_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(MUCH, lambda _: None)
    liar = to_text(fleet.keys[1][0]).encode()

    def invite(self: Conduits, rank: int) -> Offer | None:
        offer = _invite(self, rank)
        if offer is None or self._keyring.public != liar:
            return offer
        return msgspec.structs.replace(offer, down=bytes(32))

    monkeypatch.setattr(Conduits, "invite", invite)
    assert fleet.push().arrived()
    assert (2, 1) in fleet.left
