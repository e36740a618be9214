"""Output, credit and input that lie: a real agent between a parent and children that send what they may not."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from protocol import codec, ranks
from protocol.commands import Cancel, Input, Run
from protocol.limits import (
    FOLD_BYTES,
    INPUT_CREDIT,
    INPUT_PIECE,
    OUTCOME_CREDIT,
    OUTCOME_LAST,
    STREAM_FIRST,
    STREAM_MOST,
    STREAM_PIECE,
)
from protocol.messages import (
    Attach,
    Beat,
    Credit,
    Deliver,
    Grant,
    Heard,
    Kind,
    Manner,
    Message,
    Outcomes,
    Rejected,
    Streamed,
    Taken,
)
from protocol.outcomes import Cancelled, Exited, Fold, Lost, Outcome, Output
from protocol.pacing import weight
from protocol.quota import PASSED_MOST, STRANGE_MOST
from protocol.trust import Signer
from tests.bench.idle import resident_kib
from tests.net.liar import AGENT, Child, Stage
from tests.net.localfleet import own_address

CHILDREN = range(10, 40)
PIECE = bytes(STREAM_PIECE)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One agent for all tests of this module: what one of them sends must not hurt it for the next."""
    made = Stage(tmp_path_factory.mktemp("stage"), own_address(), CHILDREN, {})
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _unhurt(stage: Stage) -> Iterator[None]:
    """After each test the same process runs what it is rightly asked."""
    assert stage.process is not None
    yield
    assert stage.process.poll() is None, stage.log()[-3_000:]
    assert end_of(stage, give(stage, run("true"))) == Exited(0)
    assert "Traceback" not in stage.log(), stage.log()[-3_000:]


_unused = iter(CHILDREN)


@pytest.fixture
def child(stage: Stage) -> Child:
    """An attached child that no test has used."""
    return stage.attached(next(_unused))


def run(text: str, **more: Any) -> Run:
    return Run(argv=("/bin/sh", "-c", text), output_limit=1_000, **more)


def give(stage: Stage, body: Run, to: int = AGENT) -> int:
    """Have a host run it; the command's number."""
    delivery = stage.delivery(body, to=[to], targets=[to])
    stage.parent.send(delivery)
    return delivery.id


def heard(stage: Stage, id_: int) -> list[Fold]:
    """What came of a command, where the parent passes on all that comes."""
    stage.parent.send(Heard(2**62))
    return stage.parent.folds(id_)


def end_of(stage: Stage, id_: int) -> Outcome:
    stage.until(lambda: heard(stage, id_), "an outcome")
    return stage.parent.outcomes(id_)[AGENT][-1]


def cut_off(stage: Stage, child: Child) -> None:
    stage.until(lambda: child.ended, f"rank {child.rank} to be cut off")
    stage.leave(child)


def passed_up(stage: Stage, rank: int) -> int:
    """How much output of a rank the parent heard."""
    return sum(len(piece.data) for piece in stage.parent.all(Streamed) if piece.rank == rank)


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_outcomes_wait_below_a_parent_that_passes_none_on_and_arrive_when_it_does(stage: Stage, child: Child) -> None:
    ids = range(10**9, 10**9 + 24)
    folds = {
        id_: Fold(ranks.pack(ranks.only(child.rank)), Exited(0), Output(os.urandom(FOLD_BYTES), b"", FOLD_BYTES))
        for id_ in ids
    }

    def passed_on() -> dict[int, Fold]:
        return {one.id: fold for one in stage.parent.all(Outcomes) if one.id in folds for fold in one.folds}

    # An honest child, which stops where it is not heard.
    left, sent = list(ids), 0
    while sent < OUTCOME_CREDIT:
        child.send(Outcomes(left[0], (folds[left[0]],)))
        sent += weight([folds[left.pop(0)]])
    heard = stage.until(lambda: child.all(Heard), "the agent to have passed some on")[-1].total
    while sent - heard < OUTCOME_CREDIT:
        child.send(Outcomes(left[0], (folds[left[0]],)))
        sent += weight([folds[left.pop(0)]])
    before = len(stage.parent.all(Beat))
    stage.until(lambda: len(stage.parent.all(Beat)) > before, "a heartbeat, which does not wait")
    assert sum(weight([fold]) for fold in passed_on().values()) < OUTCOME_CREDIT + 2 * FOLD_BYTES
    assert left, "the child was stopped"
    told = 0

    def go_on() -> bool:
        nonlocal sent, told
        if len(passed_on()) > told:
            told = len(passed_on())
            stage.parent.send(Heard(2**62))
        while left and sent - child.all(Heard)[-1].total < OUTCOME_CREDIT:
            child.send(Outcomes(left[0], (folds[left[0]],)))
            sent += weight([folds[left.pop(0)]])
        return told == len(folds)

    stage.until(go_on, "all of them")
    assert passed_on() == folds
    stage.leave(child)


def _flood(stage: Stage, child: Child, outcome_of: Callable[[int], Outcomes]) -> int:
    """Send outcomes that nobody hears, until the child is cut off; by how many KiB the agent has grown at the most."""
    assert stage.process is not None
    before = grown = resident_kib(stage.process.pid)
    made_up = itertools.count(10**9)

    def send() -> bool:
        nonlocal grown
        for _ in range(8):
            child.send(outcome_of(next(made_up)))
        assert stage.process is not None
        grown = max(grown, resident_kib(stage.process.pid))
        return child.ended

    stage.until(send, "it to be cut off")
    stage.leave(child)
    return grown - before


def _unheard_parent(stage: Stage) -> None:
    """Use up the agent's own credit, so that it may send no more."""
    other = stage.attached(next(_unused))
    fold = Fold(ranks.pack(ranks.only(other.rank)), Exited(0), Output(os.urandom(FOLD_BYTES)))
    for id_ in (10**8, 10**8 + 1):
        other.send(Outcomes(id_, (fold,)))
        stage.until(lambda: stage.parent.folds(id_), "it to be passed on")  # noqa: B023
    stage.leave(other)


@pytest.mark.parametrize("kind", ["large", "many", "wordy"])
def test_a_child_that_sends_outcomes_beyond_its_credit_is_cut_off_and_fills_no_memory(stage: Stage, kind: str) -> None:
    _unheard_parent(stage)
    child = stage.attached(next(_unused))
    packed = ranks.pack(ranks.only(child.rank))

    def outcome_of(id_: int) -> Outcomes:
        if kind == "large":
            return Outcomes(id_, (Fold(packed, Exited(0), Output(os.urandom(FOLD_BYTES))),))
        if kind == "many":
            return Outcomes(id_, tuple(Fold(packed, Exited(0), Output(out_total=number)) for number in range(1_000)))
        why = Lost(f"{id_:2000}")
        return Outcomes(id_, tuple(Fold(packed, why, Output(err_total=number)) for number in range(30)))

    assert _flood(stage, child, outcome_of) < 8 * OUTCOME_LAST // 1024


def test_a_message_of_more_outcomes_than_a_relay_folds_into_one_costs_its_sender_the_link(
    stage: Stage, child: Child
) -> None:
    rank = ranks.pack(ranks.only(child.rank))
    child.send(Outcomes(10**7, tuple(Fold(rank, Exited(0), Output(os.urandom(FOLD_BYTES // 2))) for _ in range(4))))
    cut_off(stage, child)
    assert not stage.parent.folds(10**7)


def test_who_comes_back_with_more_while_as_much_is_held_of_it_is_sent_elsewhere(stage: Stage) -> None:
    _unheard_parent(stage)
    first = stage.attached(next(_unused))
    packed = ranks.pack(ranks.only(first.rank))
    for id_ in range(10**7 + 100, 10**7 + 104):
        first.send(Outcomes(id_, (Fold(packed, Exited(0), Output(os.urandom(FOLD_BYTES))),)))
    beats = len(stage.parent.all(Beat))
    stage.until(lambda: len(stage.parent.all(Beat)) > beats, "the agent to have read them")
    again = stage.child(first.rank)
    again.attach()
    (refused,) = stage.until(lambda: again.all(Rejected), "it to be refused")
    assert "on their way" in refused.why
    stage.leave(first, again)
    for id_ in range(10**7 + 100, 10**7 + 104):
        assert stage.until(lambda: heard(stage, id_), "what it sent before"), "nothing of it is lost"  # noqa: B023


# --- a child's output -------------------------------------------------------------------------------------------------


def test_a_child_that_sends_beyond_its_credit_costs_itself_its_link_and_the_relay_no_memory(
    stage: Stage, child: Child
) -> None:
    assert stage.process is not None
    id_ = give(stage, run("yes", stream=True), to=child.rank)
    stage.until(lambda: child.all(Deliver), "the command to arrive")
    before = resident_kib(stage.process.pid)
    for number in range(4 * PASSED_MOST // STREAM_PIECE):
        child.send(Streamed(id_, child.rank, 1, number * STREAM_PIECE, PIECE, 0, False))
    rank = child.rank
    cut_off(stage, child)
    assert resident_kib(stage.process.pid) - before < 3 * PASSED_MOST // 1024
    assert passed_up(stage, rank) <= PASSED_MOST


def test_a_child_that_keeps_to_its_credit_may_send_without_end(stage: Stage, child: Child) -> None:
    id_ = give(stage, run("yes", stream=True), to=child.rank)
    stage.until(lambda: child.all(Deliver), "the command to arrive")
    for sent in range(0, 2 * PASSED_MOST, STREAM_MOST):
        for offset in range(sent, sent + STREAM_MOST, STREAM_PIECE):
            child.send(Streamed(id_, child.rank, 1, offset, PIECE, 0, False))
        stage.until(lambda: passed_up(stage, child.rank) == sent + STREAM_MOST, "it to be passed on")  # noqa: B023
        stage.parent.send(Credit(id_, (Grant(child.rank, sent + 2 * STREAM_MOST, sent + STREAM_MOST, 0),)))
        stage.until(lambda: child.all(Credit)[-1:], "the grant")
    assert not child.ended
    stage.leave(child)


def test_a_child_that_makes_up_jobs_is_cut_off(stage: Stage, child: Child) -> None:
    rank, made_up = child.rank, itertools.count(10**6)

    def make_up() -> bool:
        for _ in range(64):
            child.send(Streamed(next(made_up), rank, 1, 0, PIECE, 0, False))
        return child.ended

    stage.until(make_up, "it to be cut off")
    stage.leave(child)
    assert passed_up(stage, rank) <= STRANGE_MOST


def test_a_piece_above_the_limit_costs_its_sender_the_link(stage: Stage, child: Child) -> None:
    rank = child.rank
    header = codec.encode(Streamed(1, rank, 1, 0, b"", 0, False))[0]
    child.raw(header, msgspec.msgpack.encode((1, rank, 1, 0, PIECE + b"x")))
    cut_off(stage, child)
    assert not passed_up(stage, rank)


@pytest.mark.parametrize(
    "broken", [(1, 2), (1, 2, 3, 0, b"x"), (1, 2, 1, -1, b"x"), (-1, 2, 1, 0, b"x"), (1, 2, 1, 0, "x")]
)
def test_a_piece_that_is_none_costs_its_sender_the_link(stage: Stage, child: Child, broken: tuple[object, ...]) -> None:
    child.raw(codec.encode(Streamed(1, 1, 1, 0, b"", 0, False))[0], msgspec.msgpack.encode(broken))
    cut_off(stage, child)


@pytest.mark.parametrize("kind", [Kind.CREDIT, Kind.DELIVER])
def test_a_child_grants_nobody_anything(stage: Stage, child: Child, kind: Kind) -> None:
    sibling = stage.attached(next(_unused))
    message: Message = Credit(1, (Grant(sibling.rank, 10**6, 0, 0),))
    if kind is Kind.DELIVER:
        message = stage.delivery(Input(of=1, offset=0, data=b"x", last=False), to=[sibling.rank], manner=Manner.QUIET)
    child.send(message)
    cut_off(stage, child)
    assert not sibling.all(Credit)
    assert not sibling.all(Deliver)
    stage.leave(sibling)


@pytest.mark.parametrize(
    "message", [Streamed(1, AGENT, 1, 0, b"x", 0, False), Taken(1, AGENT, 0, True, True)], ids=["out", "in"]
)
def test_a_parent_that_sends_what_children_send_is_left(stage: Stage, message: Message) -> None:
    attachments = len(stage.parent.all(Attach))
    stage.parent.send(message)
    stage.until(lambda: len(stage.parent.all(Attach)) > attachments, "the agent to begin anew")


# --- credit -----------------------------------------------------------------------------------------------------------


def test_a_parent_that_grants_without_bound_and_takes_nothing_fills_no_host(stage: Stage) -> None:
    id_ = give(stage, run("yes", stream=True))
    stage.until(lambda: passed_up(stage, AGENT) == STREAM_FIRST, "what it may send unasked")
    for limit in (2**62, 0, 1, 2**62):  # a lower one takes nothing back
        stage.parent.send(Credit(id_, (Grant(AGENT, limit, 0, 0),)))
    stage.until(lambda: passed_up(stage, AGENT) == STREAM_MOST, "all that it keeps")
    # What it did not send nobody can have: it goes on where it was.
    stage.parent.send(Credit(id_, (Grant(AGENT, STREAM_MOST + 10, 2**62, 2**62),)))
    stage.until(lambda: passed_up(stage, AGENT) > STREAM_MOST, "it to go on")
    pieces = [piece for piece in stage.parent.all(Streamed) if piece.id == id_ and piece.data]
    assert [piece.offset for piece in pieces] == [
        sum(len(before.data) for before in pieces[:place]) for place in range(len(pieces))
    ]
    stage.parent.send(stage.delivery(Cancel(of=id_), manner=Manner.QUIET))
    assert end_of(stage, id_) == Cancelled(ran=True)


def test_credit_for_others_and_for_commands_that_are_not_there_is_nothing(stage: Stage, child: Child) -> None:
    stage.parent.send(Credit(10**9, (Grant(AGENT, None, 1, 1), Grant(child.rank, 5, 0, 0), Grant(65_535, 5, 0, 0))))
    (told,) = stage.until(lambda: child.all(Credit), "its own part to arrive")
    assert told.grants == (Grant(child.rank, 5, 0, 0),)
    stage.leave(child)


# --- input ------------------------------------------------------------------------------------------------------------


def piece(stage: Stage, of: int, offset: int, data: bytes, *, last: bool = False, **signed: Any) -> Deliver:
    return stage.delivery(Input(of=of, offset=offset, data=data, last=last), manner=Manner.QUIET, **signed)


def begun(stage: Stage, text: str) -> int:
    """A command that reads; its number, once it is ready for input."""
    id_ = give(stage, run(text, feed=True))
    stage.until(lambda: [told for told in stage.parent.all(Taken) if told.id == id_ and told.anew], "it to be ready")
    return id_


def _signed(stage: Stage, sent: Deliver, of: int, **signed: Any) -> Deliver:
    """The same command's number on what somebody else signed, or the fleet for somebody else."""
    payload, signature = stage.sign(Input(of=of, offset=0, data=b"wrong", last=True), id_=sent.id, **signed)
    return replace(sent, payload=payload, signature=signature)


ALTERED: dict[str, Callable[[Stage, Deliver, int], Deliver]] = {
    "another key's": lambda stage, sent, of: _signed(stage, sent, of, signer=Signer(os.urandom(32))),
    "for another host": lambda stage, sent, of: _signed(stage, sent, of, targets=[12]),
    "of another fleet": lambda stage, sent, of: _signed(stage, sent, of, fleet="other"),
    "altered": lambda _, sent, __: replace(sent, payload=sent.payload.replace(b"right", b"wrong")),
    "truncated": lambda _, sent, __: replace(sent, payload=sent.payload[:-1]),
    "without signature": lambda _, sent, __: replace(sent, signature=bytes(64)),
    "under another number": lambda _, sent, __: replace(sent, id=sent.id + 10**6),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_a_piece_that_the_fleet_did_not_sign_is_not_read(
    stage: Stage, alter: Callable[[Stage, Deliver, int], Deliver]
) -> None:
    id_ = begun(stage, "cat")
    right = piece(stage, id_, 0, b"right", last=True)
    stage.parent.send(alter(stage, right, id_))
    stage.parent.send(right)
    assert end_of(stage, id_) == Exited(0)
    assert {fold.output.out for fold in stage.parent.folds(id_)} == {b"right"}


def test_pieces_that_come_again_or_out_of_order_or_for_another_are_read_once_and_in_order(stage: Stage) -> None:
    id_, other = begun(stage, "cat"), begun(stage, "cat")
    first, second, third = (
        piece(stage, id_, place, text) for place, text in ((0, b"one "), (4, b"two "), (8, b"three"))
    )
    end = piece(stage, id_, 13, b"", last=True)
    for sent in (second, third, end, first, first, third, second, first, second, third, first, second, end):
        stage.parent.send(sent)
    assert end_of(stage, id_) == Exited(0)
    assert {fold.output.out for fold in stage.parent.folds(id_)} == {b"one two three"}
    stage.parent.send(first)  # of a command that is over
    stage.parent.send(piece(stage, other, 0, b"other", last=True))
    assert end_of(stage, other) == Exited(0)
    assert {fold.output.out for fold in stage.parent.folds(other)} == {b"other"}


def test_a_piece_above_the_limit_is_not_read_though_it_is_signed(stage: Stage) -> None:
    id_ = begun(stage, "cat")
    stage.parent.send(piece(stage, id_, 0, bytes(INPUT_PIECE + 1)))
    stage.parent.send(piece(stage, id_, 0, b"right", last=True))
    assert end_of(stage, id_) == Exited(0)
    assert {fold.output.out for fold in stage.parent.folds(id_)} == {b"right"}


def test_a_parent_that_sends_more_input_than_it_was_asked_for_fills_no_host_and_loses_nothing(stage: Stage) -> None:
    assert stage.process is not None
    data = os.urandom(INPUT_PIECE)
    id_ = begun(stage, "read -r _ < /dev/null; sleep 1; sha256sum")
    before = resident_kib(stage.process.pid)
    count = 16 * INPUT_CREDIT // INPUT_PIECE
    for number in range(count):
        stage.parent.send(piece(stage, id_, number * INPUT_PIECE, data))
    assert end_of(stage, give(stage, run("true"))) == Exited(0)
    assert resident_kib(stage.process.pid) - before < 8 * INPUT_CREDIT // 1024

    def pump() -> bool:
        """Send on from what it has taken, as the root does, until it is over."""
        taken = max(told.taken for told in stage.parent.all(Taken) if told.id == id_)
        at = taken // INPUT_PIECE
        for number in range(at, min(at + 4, count)):
            skip = taken - number * INPUT_PIECE if number == at else 0
            stage.parent.send(piece(stage, id_, number * INPUT_PIECE + skip, data[skip:], last=number == count - 1))
        return bool(stage.parent.outcomes(id_).get(AGENT))

    stage.until(pump, "the command to have read all")
    digest = hashlib.sha256(data * count).hexdigest().encode()
    assert {fold.output.out.split()[0] for fold in stage.parent.folds(id_)} == {digest}
