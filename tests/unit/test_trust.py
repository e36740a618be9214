"""The guard admits what the fleet signed for this host, now, and nothing else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import ranks
from protocol.commands import Body, Cancel, Command, Member, Plan, Run, Settled
from protocol.messages import ClockTell, Deliver, Manner
from protocol.trust import Guard, RootTime, Signer, Untrusted

_FLEET = "fleet"
_RANK = 5
_SIGNER = Signer(b"\x01" * 32)
_STRANGER = Signer(b"\x02" * 32)
_NONCE = b"n" * 16
#: The agent's monotonic clock when it began, and the root's clock at that moment, both in seconds.
_STARTED = 100.0
_ROOT_STARTED = 1_700_000_000.0
_RUN = Run(argv=("true",), output_limit=0)
_ROOT = Member(None, "root", "198.18.0.1", 1, 2, b"r" * 32)
_PLAN = Plan(version=2, you=Member(_RANK, "h5", "198.18.0.5", 1, 2, b"k" * 32), ancestors=(_ROOT,))


def _guard(*, knows_time: bool = True) -> Guard:
    guard = Guard(fleet=_FLEET, verify_key=_SIGNER.verify_key, rank=_RANK, started=_STARTED)
    if knows_time:
        guard.time.ask(_NONCE, _STARTED)
        told = _SIGNER.clock(_FLEET, _RANK, _NONCE, round(_ROOT_STARTED * 1000))
        guard.time.tell(told, _RANK, _FLEET, _SIGNER.verify_key, _STARTED)
    return guard


def _command(body: Body = _RUN, **changes: object) -> Command:
    issued = round((_ROOT_STARTED + 10) * 1000)
    command = Command(
        fleet=_FLEET, id=7, targets=ranks.pack(ranks.union([1, _RANK])), issued_ms=issued, expires_ms=issued + 60_000,
        body=body,
    )  # fmt: skip
    return msgspec.structs.replace(command, **changes)


def _delivery(command: Command, signer: Signer = _SIGNER, **changes: object) -> Deliver:
    payload, signature = signer.command(command)
    return msgspec.structs.replace(
        Deliver(command.id, command.targets, None, Manner.WORK, payload, signature), **changes
    )


def _check(guard: Guard, delivery: Deliver, after: float = 11.0) -> Command:
    """What an agent does with a delivery, this long after it began."""
    command = guard.open(delivery)
    guard.check_time(command, _STARTED + after)
    return command


def test_a_command_that_the_fleet_signed_for_this_host_is_admitted() -> None:
    assert _check(_guard(), _delivery(_command())) == _command()


def test_a_forged_command_is_refused() -> None:
    with pytest.raises(Untrusted, match="signature"):
        _check(_guard(), _delivery(_command(), _STRANGER))


def test_a_command_altered_in_any_byte_is_refused() -> None:
    delivery = _delivery(_command())
    for at in range(len(delivery.payload)):
        altered = bytearray(delivery.payload)
        altered[at] ^= 0x01
        with pytest.raises(Untrusted, match="signature"):
            _check(_guard(), msgspec.structs.replace(delivery, payload=bytes(altered)))


def test_a_signature_altered_in_any_byte_is_refused() -> None:
    delivery = _delivery(_command())
    for at in range(len(delivery.signature)):
        altered = bytearray(delivery.signature)
        altered[at] ^= 0x80
        with pytest.raises(Untrusted, match="signature"):
            _check(_guard(), msgspec.structs.replace(delivery, signature=bytes(altered)))


@pytest.mark.parametrize(
    "change",
    [
        {"fleet": "other"},
        {"id": 8},
        {"targets": b"\xff\xff"},
        {"issued_ms": 0},
        {"expires_ms": 2**60},
        {"body": Run(argv=("false",), output_limit=0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_command_altered_in_any_field_under_the_old_signature_is_refused(change: dict[str, object]) -> None:
    _, signature = _SIGNER.command(_command())
    altered = _delivery(msgspec.structs.replace(_command(), **change), signature=signature)
    with pytest.raises(Untrusted, match="signature"):
        _check(_guard(), altered)


@given(st.binary(max_size=300), st.binary(min_size=64, max_size=64))
def test_garbage_is_refused(payload: bytes, signature: bytes) -> None:
    with pytest.raises(Untrusted):
        _guard().open(Deliver(1, b"\xff", None, Manner.WORK, payload, signature))


def test_a_truncated_or_lengthened_payload_is_refused() -> None:
    delivery = _delivery(_command())
    for payload in (b"", delivery.payload[:-1], delivery.payload + b"\0"):
        with pytest.raises(Untrusted, match="signature"):
            _check(_guard(), msgspec.structs.replace(delivery, payload=payload))


def test_a_command_for_others_is_refused_even_where_a_relay_widened_the_header() -> None:
    command = _command(targets=ranks.pack(ranks.only(1)))
    widened = _delivery(command, targets=ranks.pack(ranks.union([1, _RANK])))
    with pytest.raises(Untrusted, match="other hosts"):
        _check(_guard(), widened)


def test_a_command_under_another_number_is_refused() -> None:
    with pytest.raises(Untrusted, match="command 7 under the number 8"):
        _check(_guard(), _delivery(_command(), id=8))


def test_a_command_of_another_fleet_with_the_same_key_is_refused() -> None:
    with pytest.raises(Untrusted, match="another fleet"):
        _check(_guard(), _delivery(_command(fleet="other")))


def test_a_signed_document_that_is_no_command_is_refused() -> None:
    payload = msgspec.msgpack.encode({"fleet": _FLEET, "id": 7})
    signature = _SIGNER._sign(b"canopy command\0" + payload)
    with pytest.raises(Untrusted, match="no command"):
        _guard().open(Deliver(7, b"\x20", None, Manner.WORK, payload, signature))


def test_a_clock_answer_passes_for_no_command_and_a_command_for_no_clock_answer() -> None:
    told = _SIGNER.clock(_FLEET, _RANK, _NONCE, 5)
    text = msgspec.msgpack.encode((_FLEET, _RANK, _NONCE, 5))
    with pytest.raises(Untrusted, match="signature"):
        _guard().open(Deliver(7, b"\x20", None, Manner.WORK, text, told.signature))
    _, signature = _SIGNER.command(_command())
    guard = _guard(knows_time=False)
    guard.time.ask(_NONCE, 0.0)
    with pytest.raises(Untrusted, match="signature"):
        guard.time.tell(ClockTell(_RANK, _NONCE, 5, signature), _RANK, _FLEET, _SIGNER.verify_key, 1.0)


def test_an_expired_command_is_refused() -> None:
    _check(_guard(), _delivery(_command()), after=69.9)
    with pytest.raises(Untrusted, match="expired"):
        _check(_guard(), _delivery(_command()), after=70.1)


def test_a_command_from_before_this_agent_began_is_refused_for_it_may_have_run_then() -> None:
    with pytest.raises(Untrusted, match="before this agent began"):
        _check(_guard(), _delivery(_command(issued_ms=round((_ROOT_STARTED - 0.001) * 1000))))


@pytest.mark.parametrize("body", [_PLAN, Cancel(of=3), Settled(ids=(3,))], ids=lambda body: type(body).__name__)
def test_plans_cancels_and_settlings_need_no_clock_and_know_no_age(body: Body) -> None:
    command = _command(body, issued_ms=0, expires_ms=1)
    assert _check(_guard(knows_time=False), _delivery(command)) == command


@given(asked=st.floats(0, 1e6), delay_up=st.floats(0, 1e5), delay_down=st.floats(0, 1e5), later=st.floats(0, 1e5))
def test_a_delayed_clock_answer_only_makes_the_agent_stricter(
    asked: float, delay_up: float, delay_down: float, later: float
) -> None:
    offset = 1_700_000_000.0
    time = RootTime()
    time.ask(_NONCE, asked)
    arrived = asked + delay_up + delay_down
    told = _SIGNER.clock(_FLEET, _RANK, _NONCE, round((asked + delay_up + offset) * 1000))
    time.tell(told, _RANK, _FLEET, _SIGNER.verify_key, arrived)
    now = arrived + later
    # Milliseconds are rounded, and floats of that size are good to a microsecond.
    assert time.at(now) >= now + offset - 0.001
    assert time.at_least(now) <= now + offset + 0.001


def test_a_clock_answer_counts_once_and_only_for_what_was_asked() -> None:
    guard = _guard(knows_time=False)
    told = _SIGNER.clock(_FLEET, _RANK, _NONCE, 5_000)

    def tell(answer: ClockTell) -> None:
        guard.time.tell(answer, _RANK, _FLEET, _SIGNER.verify_key, 10.0)

    with pytest.raises(Untrusted, match="no question"):
        tell(told)
    guard.time.ask(_NONCE, 1.0)
    with pytest.raises(Untrusted, match="no question"):
        tell(_SIGNER.clock(_FLEET, _RANK, b"m" * 16, 5_000))
    with pytest.raises(Untrusted, match="no question"):
        tell(_SIGNER.clock(_FLEET, _RANK + 1, _NONCE, 5_000))
    with pytest.raises(Untrusted, match="signature"):
        tell(_STRANGER.clock(_FLEET, _RANK, _NONCE, 5_000))
    with pytest.raises(Untrusted, match="signature"):
        tell(_SIGNER.clock("other", _RANK, _NONCE, 5_000))
    with pytest.raises(Untrusted, match="signature"):
        tell(msgspec.structs.replace(told, time_ms=4_000))
    assert not guard.time.known
    tell(told)
    assert guard.time.at(1.0) == 5.0
    with pytest.raises(Untrusted, match="no question"):
        tell(told)


def test_an_answer_to_an_older_question_still_counts_when_it_comes_first() -> None:
    time = RootTime()
    first, second = b"1" * 16, b"2" * 16
    time.ask(first, 1.0)
    time.ask(second, 3.0)
    time.tell(_SIGNER.clock(_FLEET, _RANK, first, 5_000), _RANK, _FLEET, _SIGNER.verify_key, 4.0)
    time.tell(_SIGNER.clock(_FLEET, _RANK, second, 7_000), _RANK, _FLEET, _SIGNER.verify_key, 5.0)
    assert time.at(3.0) == 7.0


def test_one_seed_is_one_key() -> None:
    assert Signer(b"\x01" * 32).verify_key == _SIGNER.verify_key != _STRANGER.verify_key
