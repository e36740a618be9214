"""Whom an agent hears, and what it acts on: a real agent between a parent and children that lie."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import zmq

from agent.links import endpoint
from agent.ports import is_free
from protocol import codec, ranks
from protocol.asking import BAD_MOST
from protocol.commands import Below, Cancel, Leave, Run, Settled
from protocol.digest import content_digest
from protocol.limits import (
    ASK_WINDOW,
    CHUNK,
    MAX_CHUNK,
    MAX_FRAME,
    MAX_OUTPUT,
    VERSION_MAX,
)
from protocol.messages import (
    Ask,
    Attach,
    Attached,
    Beat,
    Chunk,
    ClockAsk,
    ClockTell,
    Deliver,
    Kind,
    Link,
    Links,
    Manner,
    Message,
    NoChunk,
    Outcomes,
    Progress,
    Rejected,
    Report,
    Reports,
    Streamed,
    Taken,
)
from protocol.outcomes import RESTARTED, Cancelled, Exited, FailedToStart, Fold, Lost, Outcome, Refused
from protocol.stream import count_of, stream_of
from protocol.trust import Signer
from tests.bench.idle import resident_kib
from tests.net.curve import RawCurve, frame, greeting
from tests.net.liar import AGENT, DEADLINE_S, Child, Keys, Stage, monitor, new_epoch
from tests.net.localfleet import own_address
from tests.pushes import file_push
from tests.waiting import wait_until

#: Children of the agent: each hostile test takes one that was not used yet, since a key that broke the rules stays
#: refused for a while.
CHILDREN = range(10, 200)
#: One who is planned below the agent as well, and whom no test plays: others speak in its name.
SIBLING = 7
#: One who does nothing wrong, and must be served whatever others do.
BYSTANDER = 8
#: Hosts below the first few children.
GRANDCHILDREN = {rank + 1_000: rank for rank in range(10, 200)}
NONCE = bytes(16)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One agent for all tests of this module: what one of them sends must not hurt it for the next."""
    made = Stage(tmp_path_factory.mktemp("stage"), own_address(), (SIBLING, BYSTANDER, *CHILDREN), GRANDCHILDREN)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _unhurt(stage: Stage) -> Iterator[None]:
    """After each test the same process serves others as before."""
    assert stage.process is not None
    pid = stage.process.pid
    yield
    assert stage.process.poll() is None, stage.log()[-3_000:]
    if stage.process.pid == pid:
        assert_serves(stage)
    assert "Traceback" not in stage.log(), stage.log()[-3_000:]


_unused = iter(CHILDREN)


@pytest.fixture
def rank() -> int:
    """The rank of a child that no test has used."""
    return next(_unused)


def assert_serves(stage: Stage) -> None:
    """A child that did nothing wrong attaches, asks the root for the time, and hears the answer."""
    bystander = stage.attached(BYSTANDER)
    nonce = os.urandom(16)
    bystander.send(ClockAsk(bystander.rank, nonce))
    stage.until(lambda: any(told.nonce == nonce for told in bystander.all(ClockTell)), "the bystander to be served")
    stage.leave(bystander)


def run(text: str) -> Run:
    return Run(argv=("/bin/sh", "-c", text), output_limit=1_000)


def outcome_of(stage: Stage, delivery: Deliver, rank: int = AGENT) -> Outcome:
    """What the parent hears of a command that it sent."""
    stage.parent.send(delivery)
    return stage.until(lambda: stage.parent.outcomes(delivery.id).get(rank), "an outcome")[-1]


def assert_runs_only_this(stage: Stage, marker: Path) -> None:
    """The agent is well and runs what is rightly asked of it, and nothing made the marker before."""
    assert outcome_of(stage, stage.delivery(run(f"test ! -e {marker}"))) == Exited(0)
    assert not marker.exists()


def cut_off(stage: Stage, child: Child) -> None:
    """The agent ended this connection."""
    stage.until(lambda: child.ended, f"rank {child.rank} to be cut off")


def told_links(stage: Stage, since: int = 0) -> list[Link]:
    """Links that the parent was told of."""
    found: list[Link] = []
    for message in stage.parent.heard[since:]:
        if isinstance(message, Links | Attach):
            found += message.links
    return found


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
def test_an_unknown_key_is_refused_at_the_handshake_and_never_heard(stage: Stage, rank: int, bulk: bool) -> None:
    heard = len(stage.parent.heard)
    stranger = stage.stranger(Keys(), rank, bulk=bulk)
    stranger.attach()
    stranger.send(ClockAsk(rank, NONCE))
    cut_off(stage, stranger)
    assert not stranger.connected
    assert_serves(stage)
    assert not [told for told in stage.parent.all(ClockAsk) if told.nonce == NONCE]
    assert rank not in {link.rank for link in told_links(stage, heard)}


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
def test_nobody_is_heard_in_plain_text(stage: Stage, mechanism: str, bulk: bool) -> None:
    with stage.context.socket(zmq.DEALER) as sock, monitor(sock) as events_of:
        sock.linger = 0
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        if mechanism == "PLAIN":
            sock.plain_username, sock.plain_password = b"root", b"root"
        port = stage.identity.bulk_port if bulk else stage.identity.control_port
        sock.connect(endpoint(stage.address, port))
        with suppress(zmq.Again):  # it may have been refused already
            sock.send_multipart(codec.encode(ClockAsk(SIBLING, NONCE)), zmq.NOBLOCK)
        events: list[int] = []

        def over() -> bool:
            with suppress(zmq.Again):
                events.append(struct.unpack("=hi", events_of.recv_multipart(zmq.NOBLOCK)[0])[0])
            return zmq.Event.DISCONNECTED in events or zmq.Event.HANDSHAKE_FAILED_PROTOCOL in events

        stage.until(over, "the connection to be refused")
        assert zmq.Event.HANDSHAKE_SUCCEEDED not in events
        sock.disable_monitor()
    assert not [told for told in stage.parent.all(ClockAsk) if told.nonce == NONCE]


def test_an_agent_attaches_to_nobody_but_the_holder_of_its_parents_key(tmp_path: Path) -> None:
    alone = Stage(tmp_path, own_address(), [], {})
    try:
        impostor = Keys()
        port = alone.plan().ancestors[0].control_port
        alone.parent.socket.unbind(endpoint(alone.address, port))
        wait_until(lambda: is_free(alone.address, port), DEADLINE_S, "the true parent's place to be free")
        with alone.context.socket(zmq.ROUTER) as sock:
            sock.linger = 0
            sock.curve_server = True
            sock.curve_secretkey = zmq.utils.z85.encode(impostor.secret)
            sock.curve_publickey = zmq.utils.z85.encode(impostor.public)
            sock.bind(endpoint(alone.address, port))
            events_of = monitor(sock)
            events: list[int] = []

            def accepted_twice() -> bool:
                with suppress(zmq.Again):
                    events.append(struct.unpack("=hi", events_of.recv_multipart(zmq.NOBLOCK)[0])[0])
                return events.count(zmq.Event.ACCEPTED) > 1

            alone.start_unattended()
            alone.until(accepted_twice, "the agent to try again")
            assert zmq.Event.HANDSHAKE_SUCCEEDED not in events
            with pytest.raises(zmq.Again):
                sock.recv_multipart(zmq.NOBLOCK)
            sock.disable_monitor()
            events_of.close()
    finally:
        alone.close()


def test_a_key_that_the_plan_no_longer_has_is_not_heard_on_its_live_connection(stage: Stage) -> None:
    revoked, silent = next(_unused), next(_unused)
    attached = stage.attached(revoked)
    connected = stage.child(silent)  # shook hands while it was allowed to, and has said nothing yet
    stage.until(lambda: connected.connected, "the handshake")
    below = stage.below
    stage.below = {rank: parent for rank, parent in below.items() if rank not in (revoked, silent)}
    stage.version += 1
    assert outcome_of(stage, stage.delivery(stage.plan())) == Exited(0)
    attached.send(ClockAsk(revoked, NONCE))
    connected.attach()
    connected.send(ClockAsk(silent, NONCE))
    cut_off(stage, attached)
    cut_off(stage, connected)
    assert not [told for told in stage.parent.all(ClockAsk) if told.nonce == NONCE]
    assert silent not in {link.rank for link in told_links(stage)}
    again = stage.child(revoked)
    cut_off(stage, again)
    assert not again.connected


# --- who one is -------------------------------------------------------------------------------------------------------

FOLD = Fold(ranks.pack(ranks.only(SIBLING)), Exited(0))

CLAIMS: dict[str, Message] = {
    "outcomes": Outcomes(1, (FOLD,)),
    "outcomes of the parent": Outcomes(1, (Fold(ranks.pack(ranks.only(AGENT)), Exited(0)),)),
    "outcomes of everybody": Outcomes(1, (Fold(ranks.pack((1 << 65_536) - 1), Exited(0)),)),
    "reports": Reports((Report(SIBLING, None, (), True),)),
    "output": Streamed(1, SIBLING, 1, 0, b"forged", 0, False),
    "input": Taken(1, SIBLING, 1, False, False),
    "clock": ClockAsk(SIBLING, NONCE),
    "progress": Progress(1, ((SIBLING, 1),)),
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_child_that_speaks_for_another_is_not_heard(stage: Stage, rank: int, claim: Message) -> None:
    # It is cut off only where it can't have spoken in good faith by a plan of yesterday, which the simulator waits for.
    liar = stage.attached(rank)
    liar.send(claim)
    nonce = os.urandom(16)
    liar.send(ClockAsk(rank, nonce))
    stage.until(
        lambda: liar.ended or any(asked.nonce == nonce for asked in stage.parent.all(ClockAsk)),
        "the liar's own word to be heard, or the liar to be cut off",
    )
    assert codec.encode(claim) not in [codec.encode(message) for message in stage.parent.all(type(claim))]
    stage.leave(liar)


@pytest.mark.parametrize(
    ("as_rank", "parent"), [(SIBLING, AGENT), (AGENT, None), (None, SIBLING)], ids=["sibling", "parent", "to another"]
)
def test_a_child_that_attaches_as_another_is_cut_off(
    stage: Stage, rank: int, as_rank: int | None, parent: int | None
) -> None:
    heard = len(stage.parent.heard)
    liar = stage.child(rank)
    liar.attach(rank=as_rank, parent=parent)
    cut_off(stage, liar)
    assert_serves(stage)
    assert not {rank, as_rank} & {link.rank for link in told_links(stage, heard)}


def test_a_key_that_broke_the_rules_is_refused_for_a_while(stage: Stage, rank: int) -> None:
    liar = stage.child(rank)
    liar.attach(rank=SIBLING)
    cut_off(stage, liar)
    for bulk in (False, True):
        again = stage.child(rank, bulk=bulk)
        cut_off(stage, again)
        assert not again.connected


def test_a_child_can_say_nothing_of_links_that_are_not_below_it(stage: Stage, rank: int) -> None:
    other = next(_unused)
    honest = stage.attached(other)
    # The child is answered before the parent is told: what is told of the other later would be the liar's doing.
    stage.until(lambda: other in {link.rank for link in told_links(stage)}, "the other to be told of")
    heard = len(stage.parent.heard)
    liar = stage.attached(rank)
    own, moved = Link(rank + 1_000, rank, 1, 1, True), Link(rank + 1_000, rank, 1, 2, True)
    stolen = Link(other, rank, 9, 9, True)
    ended = Link(other, AGENT, 9, 9, False, "forged")
    liar.send(Links((stolen, ended, Link(AGENT, None, 9, 9, False, "forged"), own)))
    stage.until(lambda: own in told_links(stage, heard), "the child's own link to be told")
    liar.attach(stolen, moved)
    stage.until(lambda: moved in told_links(stage, heard), "the second attachment to be told")
    told = told_links(stage, heard)
    assert {link.rank for link in told} <= {rank, rank + 1_000}
    # And what is meant for the other goes to the other alone.
    delivery = stage.delivery(run("true"), to=[other], targets=[other])
    stage.parent.send(delivery)
    stage.until(lambda: honest.all(Deliver), "the command to arrive")
    assert not liar.all(Deliver)


def test_a_stolen_routing_id_takes_over_no_connection(stage: Stage, rank: int) -> None:
    owner = stage.child(next(_unused), route=b"chosen")
    owner.attach()
    stage.until(lambda: owner.all(Attached), "the owner to be attached")
    thief = stage.child(rank, route=b"chosen")
    thief.attach()
    thief.send(ClockAsk(rank, NONCE))
    stage.until(lambda: thief.connected, "the handshake")
    nonce = os.urandom(16)
    owner.send(ClockAsk(owner.rank, nonce))
    stage.until(lambda: any(told.nonce == nonce for told in owner.all(ClockTell)), "the owner to be answered")
    delivery = stage.delivery(run("true"), to=[owner.rank], targets=[owner.rank])
    stage.parent.send(delivery)
    stage.until(lambda: owner.all(Deliver), "the command to arrive")
    assert not thief.all(Deliver)
    assert owner.rank not in {asked.rank for asked in stage.parent.all(ClockAsk) if asked.nonce == NONCE}


def test_the_latest_connection_of_a_key_is_the_one(stage: Stage, rank: int) -> None:
    first = stage.attached(rank)
    second = stage.child(rank)
    second.attach()
    stage.until(lambda: second.all(Attached), "the second connection to be attached")
    cut_off(stage, first)
    stage.parent.send(stage.delivery(run("true"), to=[rank], targets=[rank]))
    stage.until(lambda: second.all(Deliver), "the command to arrive")
    assert not first.all(Deliver)


# --- which way --------------------------------------------------------------------------------------------------------


def test_a_child_commands_neither_its_parent_nor_its_siblings(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    sibling = stage.attached(next(_unused))
    for targets in ([AGENT], [sibling.rank], [AGENT, sibling.rank]):
        child = stage.attached(next(_unused))
        # Signed by the fleet's own key: the direction alone is wrong.
        child.send(stage.delivery(run(f"touch {marker}"), to=targets, targets=targets))
        cut_off(stage, child)
    assert_serves(stage)
    assert_runs_only_this(stage, marker)
    assert not sibling.all(Deliver)


WRONG_WAY: dict[str, tuple[bool, Message, bytes | None]] = {
    "attached": (False, Attached(1, 1), None),
    "rejected": (False, Rejected("forged"), None),
    "clock": (False, ClockTell(SIBLING, NONCE, 1, bytes(64)), None),
    "chunk on control": (False, Chunk(1, 0), b"forged"),
    "ask on control": (False, Ask(1, (0,)), None),
    "chunk on bulk": (True, Chunk(1, 0), b"forged"),
    "no chunk on bulk": (True, NoChunk(1, 0, "forged", True), None),
    "attach on bulk": (True, Attach(1, 1, (Link(SIBLING, AGENT, 1, 1, True),)), None),
    "outcomes on bulk": (True, Outcomes(1, (FOLD,)), None),
    "beat on bulk": (True, Beat(), None),
}


@pytest.mark.parametrize(("bulk", "message", "blob"), WRONG_WAY.values(), ids=WRONG_WAY)
def test_a_message_that_goes_the_wrong_way_costs_the_connection(
    stage: Stage, rank: int, bulk: bool, message: Message, blob: bytes | None
) -> None:
    child = stage.child(rank, bulk=True) if bulk else stage.attached(rank)
    child.send(message, blob)
    cut_off(stage, child)


def test_a_parent_that_speaks_as_a_child_is_left(stage: Stage) -> None:
    for message in (Outcomes(1, (FOLD,)), ClockAsk(SIBLING, NONCE), Links((Link(SIBLING, AGENT, 1, 1, True),))):
        attachments = len(stage.parent.all(Attach))
        stage.parent.send(message)
        stage.until(lambda: len(stage.parent.all(Attach)) > attachments, "the agent to begin anew")  # noqa: B023
    stage.parent.raw(b"garbage")
    attachments = len(stage.parent.all(Attach))
    stage.until(lambda: len(stage.parent.all(Attach)) > attachments, "the agent to begin anew")


# --- what is no message -----------------------------------------------------------------------------------------------


def _header(kind: int, version: int = VERSION_MAX) -> bytes:
    return msgspec.msgpack.encode((version, kind))


#: MessagePack that says it has 2^32 - 1 items and has none; and one that is nested deeper than any stack.
_FALSE_LENGTH = b"\xdd\xff\xff\xff\xff"
_DEEP = b"\x91" * 200_000

GARBAGE: dict[str, list[bytes]] = {
    "one empty frame": [b""],
    "two empty frames": [b"", b""],
    "one frame": [_header(Kind.BEAT)],
    "random": [os.urandom(100), os.urandom(1_000)],
    "text": [b"GET / HTTP/1.1\r\n", b"Host: canopy\r\n\r\n"],
    "unknown kind": [_header(99), b"\x90"],
    "negative kind": [_header(-1), b"\x90"],
    "other version": [_header(Kind.BEAT, VERSION_MAX + 1), b"\x90"],
    "body of another kind": [_header(Kind.OUTCOMES), codec.encode(Beat())[1]],
    "trailing bytes": [_header(Kind.BEAT), b"\x90\x90"],
    "false length": [_header(Kind.LINKS), _FALSE_LENGTH],
    "false length inside": [_header(Kind.LINKS), b"\x91" + _FALSE_LENGTH],
    "deep": [_header(Kind.LINKS), _DEEP],
    "deep header": [_DEEP[:16_000], b"\x90"],
    "large header": [bytes(16_385), b"\x90"],
    "rank out of bounds": [
        _header(Kind.OUTCOMES),
        msgspec.msgpack.encode((1, ((b"\xff" * 8_193, ("exited", 0)),))),
    ],
    "blob without a chunk": [_header(Kind.BEAT), b"\x90", b"blob"],
    "four frames": [_header(Kind.BEAT), b"\x90", b"", b""],
    "a thousand frames": [b"x"] * 1_000,
    "empty maps": [_header(Kind.LINKS), b"\xdc\xff\xff" + b"\x80" * 65_535],
}


@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE)
def test_garbage_costs_its_sender_the_connection(stage: Stage, rank: int, bulk: bool, frames: list[bytes]) -> None:
    child = stage.child(rank, bulk=True) if bulk else stage.attached(rank)
    child.raw(*frames)
    cut_off(stage, child)


@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
def test_an_oversize_frame_costs_its_sender_the_connection(stage: Stage, rank: int, bulk: bool) -> None:
    child = stage.child(rank, bulk=bulk)
    child.raw(_header(Kind.BEAT), bytes(MAX_FRAME + 1))
    cut_off(stage, child)


def _raw(stage: Stage, rank: int) -> RawCurve:
    keys = stage.keys[rank]
    return RawCurve(
        stage.address,
        stage.identity.control_port,
        server=stage.identity.public,
        public=keys.public,
        secret=keys.secret,
    )


BEFORE_KEYS: dict[str, bytes] = {
    "nothing of ZeroMQ": b"GET / HTTP/1.1\r\nHost: canopy\r\n\r\n" + bytes(64),
    "unknown mechanism": greeting(b"GSSAPI"),
    "no mechanism": greeting(b""),
    "old version": b"\x01\x00" + bytes(62),
    "frame before the handshake": greeting(b"CURVE") + frame(b"\x07MESSAGE" + bytes(100)),
    "wrong command": greeting(b"CURVE") + frame(b"\x05READY" + bytes(100), 4),
    "hello of zeros": greeting(b"CURVE") + frame(b"\x05HELLO\x01\x00" + bytes(192), 4),
    "giant hello": greeting(b"CURVE") + b"\x06" + (1 << 62).to_bytes(8, "big") + bytes(100),
}


@pytest.mark.parametrize("data", BEFORE_KEYS.values(), ids=BEFORE_KEYS)
def test_whoever_can_not_shake_hands_is_hung_up_on(stage: Stage, data: bytes) -> None:
    with RawCurve(
        stage.address, stage.identity.control_port, server=stage.identity.public, public=bytes(32), secret=bytes(32)
    ) as raw:
        with suppress(ConnectionError):
            raw.socket.sendall(data)
        stage.until(raw.is_closed, "the connection to be closed")


def test_whoever_begins_a_handshake_and_stops_is_hung_up_on(stage: Stage, rank: int) -> None:
    silent, greeted, half = (_raw(stage, rank) for _ in range(3))
    with silent, greeted, half:
        greeted.greet()
        half.greet()
        half.hello()
        for raw in (silent, greeted, half):
            stage.until(raw.is_closed, "the connection to be closed")


def _attach_raw(stage: Stage, raw: RawCurve, rank: int) -> bytes:
    """Attach as anybody does; returns what was sent."""
    header, body = codec.encode(Attach(1, 1, (Link(rank, AGENT, 1, new_epoch(), True),)))
    heard = len(stage.parent.heard)
    sealed = raw.sealed(header, more=True) + raw.sealed(body, more=False)
    raw.socket.sendall(sealed)
    stage.until(lambda: rank in {link.rank for link in told_links(stage, heard)}, "the raw client to be heard")
    return sealed


def test_the_raw_client_speaks_as_the_library_does(stage: Stage, rank: int) -> None:
    # Otherwise the tests around here would show nothing.
    with _raw(stage, rank) as raw:
        raw.shake_hands()
        _attach_raw(stage, raw, rank)
        assert not raw.is_closed()


def test_a_forged_box_costs_the_connection(stage: Stage, rank: int) -> None:
    with _raw(stage, rank) as raw:
        raw.shake_hands()
        _attach_raw(stage, raw, rank)
        raw.socket.sendall(altered(raw.sealed(bytes(50), more=False), 60))
        stage.until(raw.is_closed, "the connection to be closed")


def test_a_replayed_box_costs_the_connection(stage: Stage, rank: int) -> None:
    with _raw(stage, rank) as raw:
        raw.shake_hands()
        raw.socket.sendall(_attach_raw(stage, raw, rank))
        stage.until(raw.is_closed, "the connection to be closed")


def test_what_is_no_box_costs_the_connection(stage: Stage, rank: int) -> None:
    for body in (b"", b"\x07MESSAGE", os.urandom(200), b"\x05HELLO" + bytes(194)):
        for flags in (0, 4):
            with _raw(stage, next(_unused)) as raw:
                raw.shake_hands()
                raw.socket.sendall(frame(body, flags))
                stage.until(raw.is_closed, "the connection to be closed")
    assert rank


def test_a_message_that_breaks_off_is_never_heard(stage: Stage, rank: int) -> None:
    header, body = codec.encode(Attach(1, 1, (Link(rank, AGENT, 1, 1, True),)))
    heard = len(stage.parent.heard)
    for left_out in (1, len(body) + 30):
        with _raw(stage, rank) as raw:
            raw.shake_hands()
            raw.socket.sendall((raw.sealed(header, more=True) + raw.sealed(body, more=False))[:-left_out])
            raw.socket.shutdown(1)
            stage.until(raw.is_closed, "the connection to be closed")
    assert_serves(stage)
    assert rank not in {link.rank for link in told_links(stage, heard)}


def test_a_message_without_end_costs_its_sender_the_connection_before_it_costs_memory(stage: Stage, rank: int) -> None:
    assert stage.process is not None
    before = resident_kib(stage.process.pid)
    part = bytes(1 << 20)
    with _raw(stage, rank) as raw:
        raw.shake_hands()

        def flood() -> bool:
            stage.pump()  # the agent's parent is not to fall silent, however long this takes
            try:
                raw.socket.sendall(raw.sealed(part, more=True))
            except OSError:
                return True
            return False

        sent = 0
        while sent < 4_096 and not flood():
            sent += 1
        assert sent < 4_096, "four gigabytes of one message were taken"
    stage.until(
        lambda: resident_kib(stage.process.pid) < before + (64 << 10),  # type: ignore[union-attr]
        "the memory to be given back",
    )


def test_connections_that_say_nothing_do_not_keep_others_out(stage: Stage, rank: int) -> None:
    # More than the agent may have descriptors, were they all kept.
    held: list[RawCurve] = []
    try:
        for _ in range(1_500):
            held.append(_raw(stage, rank))
            if len(held) % 100 == 0:
                stage.pump()
        assert_serves(stage)
        assert outcome_of(stage, stage.delivery(run("true"))) == Exited(0)
    finally:
        for raw in held:
            raw.socket.close()


# --- commands ---------------------------------------------------------------------------------------------------------


def altered(data: bytes, at: int) -> bytes:
    """One bit of it changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_command_that_another_key_signed_is_not_run(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    outcome = outcome_of(stage, stage.delivery(run(f"touch {marker}"), signer=Signer(os.urandom(32))))
    assert isinstance(outcome, Refused)
    assert outcome.trust
    assert_runs_only_this(stage, marker)


def _other_number(delivery: Deliver) -> Deliver:
    return msgspec.structs.replace(delivery, id=delivery.id + 100_000)


def _other_bit_of_payload(delivery: Deliver) -> Deliver:
    return msgspec.structs.replace(delivery, payload=altered(delivery.payload, len(delivery.payload) // 2))


def _longer_payload(delivery: Deliver) -> Deliver:
    return msgspec.structs.replace(delivery, payload=delivery.payload + b"\0")


def _other_bit_of_signature(delivery: Deliver) -> Deliver:
    return msgspec.structs.replace(delivery, signature=altered(delivery.signature, 40))


def _no_signature(delivery: Deliver) -> Deliver:
    return msgspec.structs.replace(delivery, signature=bytes(64))


@pytest.mark.parametrize(
    "alter",
    [_other_number, _other_bit_of_payload, _longer_payload, _other_bit_of_signature, _no_signature],
    ids=lambda alter: alter.__name__,
)
def test_an_altered_command_is_not_run(stage: Stage, tmp_path: Path, alter: Callable[[Deliver], Deliver]) -> None:
    marker = tmp_path / "ran"
    outcome = outcome_of(stage, alter(stage.delivery(run(f"touch {marker}"))))
    assert isinstance(outcome, Refused)
    assert outcome.trust
    assert_runs_only_this(stage, marker)


def test_another_commands_signature_does_not_fit(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    harmless = stage.delivery(run("true"))
    forged = msgspec.structs.replace(stage.delivery(run(f"touch {marker}")), signature=harmless.signature)
    assert isinstance(outcome_of(stage, forged), Refused)
    assert_runs_only_this(stage, marker)


def test_a_command_is_not_run_where_it_was_not_signed_for(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for signed_for in ([SIBLING], [], [0, 2, 3, 65_535]):
        widened = stage.delivery(run(f"touch {marker}"), to=[AGENT, SIBLING], targets=signed_for)
        outcome = outcome_of(stage, widened)
        assert isinstance(outcome, Refused)
        assert outcome.trust
    assert_runs_only_this(stage, marker)


def test_a_command_of_another_fleet_is_not_run(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    outcome = outcome_of(stage, stage.delivery(run(f"touch {marker}"), fleet="another"))
    assert isinstance(outcome, Refused)
    assert outcome.trust
    assert_runs_only_this(stage, marker)


def test_an_expired_command_is_not_run(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    now = stage.now_ms()
    outcome = outcome_of(stage, stage.delivery(run(f"touch {marker}"), issued_ms=now - 100, expires_ms=now - 50))
    assert isinstance(outcome, Refused)
    assert outcome.trust
    assert_runs_only_this(stage, marker)


def test_a_command_that_comes_again_is_answered_again_and_run_once(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    delivery = stage.delivery(run(f"echo run >> {marker}; exit 7"))
    assert outcome_of(stage, delivery) == Exited(7)
    for times in (2, 3):
        stage.parent.send(delivery)
        stage.until(lambda: len(stage.parent.outcomes(delivery.id)[AGENT]) == times, "another answer")  # noqa: B023
    assert stage.parent.outcomes(delivery.id)[AGENT] == [Exited(7)] * 3
    # Nor when the root has said that it is settled, and a liar brings it again.
    stage.parent.send(stage.delivery(Settled(ids=(delivery.id,)), manner=Manner.QUIET))
    stage.parent.send(delivery)
    stage.until(lambda: len(stage.parent.outcomes(delivery.id)[AGENT]) == 4, "another answer")
    assert isinstance(stage.parent.outcomes(delivery.id)[AGENT][-1], Refused)
    assert marker.read_text() == "run\n"


def test_a_command_from_before_a_restart_is_not_run_again(stage: Stage, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    delivery = stage.delivery(run(f"echo run >> {marker}"))
    assert outcome_of(stage, delivery) == Exited(0)
    stage.kill()
    stage.start()
    stage.parent.send(delivery)
    stage.until(lambda: len(stage.parent.outcomes(delivery.id)[AGENT]) == 2, "an answer")
    # It may have got to the predecessor's disk; otherwise nobody here can say what became of it.
    assert stage.parent.outcomes(delivery.id)[AGENT][-1] in (Lost(RESTARTED), Exited(0))
    assert outcome_of(stage, stage.delivery(run("true"))) == Exited(0)
    assert marker.read_text() == "run\n"


def test_nothing_is_run_before_the_root_told_the_time_and_no_liar_tells_it(stage: Stage, tmp_path: Path) -> None:
    old = stage.delivery(run(f"echo old >> {tmp_path / 'ran'}"))
    told = stage.parent.all(ClockAsk)[-1]
    stale = stage.signer.clock("stage", AGENT, told.nonce, stage.now_ms())
    stage.kill()
    stage.parent.answers.discard(ClockAsk)
    try:
        attached, asked = len(stage.parent.all(Attach)), len(stage.parent.all(ClockAsk))
        stage.start_unattended()
        stage.until(
            lambda: len(stage.parent.all(Attach)) > attached and len(stage.parent.all(ClockAsk)) > asked,
            "the agent to attach and ask for the time",
        )
        question = stage.parent.all(ClockAsk)[-1]
        # A time at which the old command would be young again: replayed, forged, for another host or question.
        past = stage.now_ms() - 3_600_000
        liar = Signer(os.urandom(32))
        stage.parent.send(stale)
        stage.parent.send(liar.clock("stage", AGENT, question.nonce, past))
        stage.parent.send(stage.signer.clock("stage", SIBLING, question.nonce, past))
        stage.parent.send(stage.signer.clock("another", AGENT, question.nonce, past))
        stage.parent.send(stage.signer.clock("stage", AGENT, bytes(16), past))
        true = stage.signer.clock("stage", AGENT, question.nonce, stage.now_ms())
        stage.parent.send(msgspec.structs.replace(true, time_ms=past))
        stage.parent.send(old)
        stage.parent.send(stage.delivery(run(f"echo new >> {tmp_path / 'ran'}")))
        # A cancel needs no clock: when it is answered, all before it was looked at.
        cancelled = stage.new_id()
        stage.parent.send(stage.delivery(Cancel(of=cancelled), manner=Manner.QUIET))
        stage.until(lambda: stage.parent.outcomes(cancelled), "the cancel to be answered")
        assert not (tmp_path / "ran").exists()
    finally:
        stage.parent.answers.add(ClockAsk)
    ran = tmp_path / "ran"
    stage.until(lambda: ran.exists() and ran.read_text(), "the new command to be run once the time is known")
    assert stage.until(lambda: stage.parent.outcomes(old.id).get(AGENT), "an answer")[-1] == Lost(RESTARTED)
    assert ran.read_text() == "new\n"


def test_a_forged_cancel_stops_nothing_and_a_forged_leave_ends_nobody(stage: Stage, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    running = stage.delivery(run(f"while [ ! -e {gate} ]; do sleep 0.05; done; exit 9"))
    stage.parent.send(running)
    forger = Signer(os.urandom(32))
    stage.parent.send(stage.delivery(Cancel(of=running.id), manner=Manner.QUIET, signer=forger))
    stage.parent.send(stage.delivery(Cancel(of=running.id), manner=Manner.QUIET, targets=[SIBLING]))
    leave = stage.delivery(Leave(purge=True), signer=forger)
    assert isinstance(outcome_of(stage, leave), Refused)
    stage.parent.send(stage.delivery(Settled(ids=(leave.id,)), manner=Manner.QUIET))
    assert outcome_of(stage, stage.delivery(run("true"))) == Exited(0)
    gate.touch()
    assert stage.until(lambda: stage.parent.outcomes(running.id).get(AGENT), "an outcome") == [Exited(9)]


def test_a_rightful_cancel_stops_a_command(stage: Stage) -> None:
    # So that the test above shows something.
    running = stage.delivery(run("sleep 60"))
    stage.parent.send(running)
    stage.parent.send(stage.delivery(Cancel(of=running.id), manner=Manner.QUIET))
    assert stage.until(lambda: stage.parent.outcomes(running.id).get(AGENT), "an outcome")[-1] == Cancelled(ran=True)


def test_only_the_fleet_says_who_may_connect(stage: Stage) -> None:
    intruder = Keys()
    plan = stage.plan()
    wider = msgspec.structs.replace(
        plan, version=plan.version + 10, below=(*plan.below, Below(9, AGENT, intruder.public))
    )
    before = (stage.directory.path / "plan").read_bytes() if (stage.directory.path / "plan").exists() else None
    forged = stage.delivery(wider, signer=Signer(os.urandom(32)))
    others = stage.delivery(
        msgspec.structs.replace(wider, you=msgspec.structs.replace(plan.you, rank=SIBLING)), targets=[AGENT]
    )
    older = stage.delivery(msgspec.structs.replace(wider, version=plan.version))
    assert isinstance(outcome_of(stage, forged), Refused)
    assert isinstance(outcome_of(stage, others), Refused)
    assert outcome_of(stage, older) == Exited(0)
    stranger = stage.stranger(intruder, 9)
    cut_off(stage, stranger)
    assert not stranger.connected
    after = (stage.directory.path / "plan").read_bytes() if (stage.directory.path / "plan").exists() else None
    assert after == before


# --- chunks -----------------------------------------------------------------------------------------------------------


class Pushed:
    """A push through the agent, of which the parent has the bytes."""

    def __init__(self, stage: Stage, data: bytes, path: Path, targets: list[int]) -> None:
        self.stage, self.data = stage, data
        self.push = file_push(data, path)
        self.delivery = stage.delivery(self.push, to=targets, targets=targets, manner=Manner.BULK)
        self.id = self.delivery.id
        stage.parent.send(self.delivery)

    def asked(self) -> list[int]:
        """Which chunks the agent has asked its parent for so far."""
        return [
            index
            for ask in self.stage.parent.bulk_heard
            if isinstance(ask, Ask) and ask.id == self.id
            for index in ask.indices
        ]

    def give(self, index: int) -> None:
        """Give the agent the chunk as it is."""
        chunk = self.push.stream.chunk
        self.stage.parent.send_chunk(self.id, index, self.data[index * chunk : (index + 1) * chunk])

    def serve(self) -> Outcome:
        """Give what is asked for until there is an outcome."""
        given = 0

        def outcome() -> list[Outcome] | None:
            nonlocal given
            for index in self.asked()[given:]:
                self.give(index)
                given += 1
            return self.stage.parent.outcomes(self.id).get(AGENT)

        return self.stage.until(outcome, "the push to end")[-1]


def test_a_pushed_file_arrives(stage: Stage, tmp_path: Path) -> None:
    # So that the tests below show something.
    data = os.urandom(3 * CHUNK + 5)
    assert Pushed(stage, data, tmp_path / "file", [AGENT]).serve() == Exited(0)
    assert (tmp_path / "file").read_bytes() == data


def _bulk_child_of(stage: Stage, tmp_path: Path, rank: int) -> tuple[Child, Pushed]:
    """A child that is a target of a push of eight chunks, none of which the agent has yet."""
    control = stage.attached(rank)
    pushed = Pushed(stage, os.urandom(8 * CHUNK), tmp_path / "file", [AGENT, rank])
    stage.until(lambda: control.all(Deliver), "the push to be announced")
    stage.until(pushed.asked, "the agent to ask for the first chunks")
    return stage.child(rank, bulk=True), pushed


def test_a_child_that_asks_for_more_than_its_credit_is_cut_off(stage: Stage, tmp_path: Path, rank: int) -> None:
    child, pushed = _bulk_child_of(stage, tmp_path, rank)
    child.send(Ask(pushed.id, tuple(range(ASK_WINDOW))))
    child.send(Ask(pushed.id, (ASK_WINDOW,)))
    cut_off(stage, child)
    assert pushed.serve() == Exited(0)


def test_a_child_that_asks_for_what_the_file_does_not_have_is_cut_off(stage: Stage, tmp_path: Path, rank: int) -> None:
    child, pushed = _bulk_child_of(stage, tmp_path, rank)
    child.send(Ask(pushed.id, (8,)))
    cut_off(stage, child)
    assert pushed.serve() == Exited(0)


def test_chunks_go_to_the_hosts_of_the_pushs_order_and_to_nobody_else(stage: Stage, tmp_path: Path) -> None:
    target, outsider, relay = (next(_unused) for _ in range(3))
    grandchild = relay + 1_000
    for rank in (target, outsider):
        stage.attached(rank)
    stage.attached(relay, Link(grandchild, relay, 1, 1, True))
    secret = os.urandom(8 * CHUNK)
    pushed = Pushed(stage, secret, tmp_path / "file", [AGENT, target, grandchild])
    assert pushed.serve() == Exited(0)
    entitled = [stage.child(rank, bulk=True) for rank in (target, grandchild)]
    for child in entitled:
        child.send(Ask(pushed.id, (0, 1)))
    stage.until(lambda: all(len(child.all(Chunk)) == 2 for child in entitled), "those that it is for to be served")
    for rank in (outsider, relay):
        curious = stage.child(rank, bulk=True)
        curious.send(Ask(pushed.id, (0, 1)))
        cut_off(stage, curious)
        assert not curious.all(Chunk)


def test_a_key_of_a_pushs_order_gets_its_chunks_and_nothing_else_and_no_longer_than_the_push(
    stage: Stage, tmp_path: Path
) -> None:
    foreign = 9_000  # planned elsewhere in the tree: the agent's plan does not name it
    keys = stage.keys[foreign] = Keys()
    pushed = Pushed(stage, os.urandom(8 * CHUNK), tmp_path / "file", [AGENT, foreign])
    other = Pushed(stage, os.urandom(8 * CHUNK), tmp_path / "other", [AGENT])
    assert (pushed.serve(), other.serve()) == (Exited(0), Exited(0))

    on_control = stage.stranger(keys, foreign)
    on_control.attach()
    cut_off(stage, on_control)
    assert not on_control.connected

    entitled = stage.stranger(keys, foreign, bulk=True)
    entitled.send(Ask(pushed.id, (0, 1)))
    stage.until(lambda: len(entitled.all(Chunk)) == 2, "the next in the order to be served")
    stage.parent.send(stage.delivery(Settled(ids=(pushed.id,)), manner=Manner.QUIET))
    assert_serves(stage)  # what was sent before was heard
    entitled.send(Ask(pushed.id, (2,)))
    cut_off(stage, entitled)
    assert len(entitled.all(Chunk)) == 2
    late = stage.stranger(keys, foreign, bulk=True)
    late.send(Ask(other.id, (0,)))
    cut_off(stage, late)
    assert not late.connected
    assert not late.all(Chunk)


@pytest.mark.parametrize("kind", ["altered", "short", "long", "empty", "another chunk"])
def test_a_corrupted_chunk_is_not_stored(stage: Stage, tmp_path: Path, kind: str) -> None:
    data = os.urandom(2 * CHUNK + 100)
    pushed = Pushed(stage, data, tmp_path / "file", [AGENT])
    first, second = data[:CHUNK], data[CHUNK : 2 * CHUNK]
    bad = {
        "altered": altered(first, 1_000),
        "short": first[:-1],
        "long": first + b"\0",
        "empty": b"",
        "another chunk": second,
    }[kind]
    for times in range(1, BAD_MOST + 1):
        stage.until(lambda: pushed.asked().count(0) >= times, "the agent to ask for the chunk")  # noqa: B023
        stage.parent.send_chunk(pushed.id, 0, bad)
    outcome = stage.until(lambda: stage.parent.outcomes(pushed.id).get(AGENT), "an outcome")[-1]
    assert isinstance(outcome, FailedToStart)
    assert "does not match its digest" in outcome.why
    assert list(tmp_path.iterdir()) == []


def test_a_corrupted_chunk_is_asked_for_again(stage: Stage, tmp_path: Path) -> None:
    data = os.urandom(CHUNK)
    pushed = Pushed(stage, data, tmp_path / "file", [AGENT])
    stage.until(pushed.asked, "the agent to ask")
    stage.parent.send_chunk(pushed.id, 0, altered(data, 0))
    stage.until(lambda: pushed.asked() == [0, 0], "the agent to ask again")
    pushed.give(0)
    assert stage.until(lambda: stage.parent.outcomes(pushed.id).get(AGENT), "an outcome")[-1] == Exited(0)
    assert (tmp_path / "file").read_bytes() == data


def test_chunks_that_nobody_asked_for_are_not_taken(stage: Stage, tmp_path: Path) -> None:
    data = os.urandom(8 * CHUNK)
    pushed = Pushed(stage, data, tmp_path / "file", [AGENT])
    stage.until(pushed.asked, "the agent to ask")
    for index in (7, 6, 5):
        pushed.give(index)
        stage.parent.send_chunk(pushed.id + 1_000, index, b"x")
    assert pushed.serve() == Exited(0)
    assert sorted(pushed.asked()) == list(range(8))
    assert (tmp_path / "file").read_bytes() == data


def test_a_manifest_that_contradicts_itself_is_refused(stage: Stage, tmp_path: Path) -> None:
    push = file_push(os.urandom(CHUNK + 1), tmp_path / "file")
    good = push.stream
    small = stream_of(lambda _: b"right", 5)
    for bad in (
        msgspec.structs.replace(good, size=good.size + CHUNK),
        msgspec.structs.replace(good, digests=good.digests[:-32]),
        msgspec.structs.replace(good, digests=altered(good.digests, 3)),
        msgspec.structs.replace(good, digest=content_digest(b"other").hex()),
        msgspec.structs.replace(good, inline=b"other", size=5, digests=b"", digest=content_digest(b"").hex()),
        msgspec.structs.replace(small, inline=b"wrong"),
        msgspec.structs.replace(good, head=3),
    ):
        outcome = outcome_of(stage, stage.delivery(msgspec.structs.replace(push, stream=bad), manner=Manner.BULK))
        assert isinstance(outcome, Refused), bad
    assert list(tmp_path.iterdir()) == []
    assert count_of(good) == 2


def test_a_chunk_above_the_limit_costs_its_sender_the_connection(stage: Stage, tmp_path: Path) -> None:
    pushed = Pushed(stage, os.urandom(CHUNK), tmp_path / "file", [AGENT])
    stage.until(pushed.asked, "the agent to ask")
    header, body = codec.encode(Chunk(pushed.id, 0), b"")[:2]
    stage.parent.bulk.send_multipart([stage.parent._routes["bulk"], header, body, bytes(MAX_CHUNK + 1)])
    stage.until(lambda: pushed.asked() == [0, 0], "the agent to ask over another connection")
    pushed.give(0)
    assert stage.until(lambda: stage.parent.outcomes(pushed.id).get(AGENT), "an outcome")[-1] == Exited(0)
    assert MAX_OUTPUT < MAX_FRAME
