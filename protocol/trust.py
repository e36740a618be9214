"""Who may command: signatures of the fleet's key, and an agent's guard against all that it did not sign as it stands.

The fleet's Ed25519 key is made on the service node and never leaves it. What it signs is prefixed with what it is, so
that no signature of one kind of document passes for another.
"""

from __future__ import annotations

from math import inf

import msgspec
from nacl.bindings import (
    crypto_sign,
    crypto_sign_BYTES,
    crypto_sign_open,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import BadSignatureError

from protocol import ranks
from protocol.commands import Cancel, Command, Input, Plan, Settled
from protocol.messages import ClockTell, Deliver

_COMMAND = b"canopy command\0"
_CLOCK = b"canopy clock\0"
#: Length in bytes of the seed that a fleet's key is made from.
SEED_BYTES = 32

#: Unanswered questions that an agent remembers: one that asks again must not disown an answer that is on its way.
_QUESTIONS = 8

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)


class Untrusted(ValueError):
    """The document must not be acted on; the text says why."""


class FromBefore(Untrusted):
    """The command is older than this agent: whether its predecessor ran it, nobody here can say."""


class Signer:
    """The fleet's private key. `seed` is 32 random bytes, drawn by the caller."""

    def __init__(self, seed: bytes) -> None:
        self.verify_key, self._secret = crypto_sign_seed_keypair(seed)

    def command(self, command: Command) -> tuple[bytes, bytes]:
        """The command's payload and its signature."""
        payload = _encoder.encode(command)
        return payload, self._sign(_COMMAND + payload)

    def clock(self, fleet: str, rank: int, nonce: bytes, time_ms: int) -> ClockTell:
        """The root's time, for the agent that asked with `nonce`."""
        return ClockTell(rank, nonce, time_ms, self._sign(_clock_text(fleet, rank, nonce, time_ms)))

    def _sign(self, text: bytes) -> bytes:
        return crypto_sign(text, self._secret)[:crypto_sign_BYTES]


def _clock_text(fleet: str, rank: int, nonce: bytes, time_ms: int) -> bytes:
    return _CLOCK + _encoder.encode((fleet, rank, nonce, time_ms))


def _verified(text: bytes, signature: bytes, verify_key: bytes) -> bool:
    try:
        crypto_sign_open(signature + text, verify_key)
    except BadSignatureError:
        return False
    return True


def open_command(payload: bytes, signature: bytes, verify_key: bytes, fleet: str) -> Command:
    """The command in `payload`, if the fleet signed it. Raises Untrusted."""
    if not _verified(_COMMAND + payload, signature, verify_key):
        raise Untrusted("its signature is not the fleet's")
    try:
        command = _command_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Untrusted(f"it is signed and yet no command: {error}") from error
    if command.fleet != fleet:
        raise Untrusted("it is for another fleet")
    return command


class RootTime:
    """An agent's notion of the root's clock, which never lags behind it.

    The agent asks with a nonce at its own time `asked`; the root answers with its time T, signed. What the root's
    clock showed when the agent asked was at most T, so T + (now - asked) is at least the root's time now, whatever a
    relay did to delay the answer. Both checks below use it in the direction in which an error refuses a command
    rather than admits one.
    """

    def __init__(self) -> None:
        self._offset: float | None = None
        self._least: float = -inf
        #: Questions that are not answered yet: nonce to local time, the latest last.
        self._pending: dict[bytes, float] = {}

    @property
    def known(self) -> bool:
        """Whether the root has answered once."""
        return self._offset is not None

    def ask(self, nonce: bytes, now: float) -> None:
        """A question with `nonce` leaves at local time `now` (seconds, monotonic)."""
        self._pending[nonce] = now
        if len(self._pending) > _QUESTIONS:
            del self._pending[next(iter(self._pending))]

    def tell(self, told: ClockTell, rank: int, fleet: str, verify_key: bytes, now: float) -> None:
        """Take the root's answer, which arrived at local time `now`.

        Raises Untrusted where it is not the root's answer to one of the last questions.
        """
        asked = self._pending.get(told.nonce)
        if asked is None or told.rank != rank:
            raise Untrusted("it answers no question of mine")
        text = _clock_text(fleet, told.rank, told.nonce, told.time_ms)
        if not _verified(text, told.signature, verify_key):
            raise Untrusted("its signature is not the fleet's")
        self._offset = told.time_ms / 1000 - asked
        self._least = told.time_ms / 1000 - now
        # What was asked before is answered by this, and its own answer, if still on its way, knows no better.
        self._pending = {nonce: at for nonce, at in self._pending.items() if at > asked}

    def at(self, local: float) -> float:
        """The root's time in seconds at the local time `local`; `known` must be true."""
        if self._offset is None:
            raise RuntimeError("the root's time is not known yet")
        return self._offset + local

    def at_least(self, local: float) -> float:
        """What the root's clock shows at the local time `local` at the least, in seconds.

        It showed T before the answer came.
        """
        return self._least + local


class Guard:
    """One agent's decision whether a delivered command is to be acted on."""

    def __init__(self, *, fleet: str, verify_key: bytes, rank: int, started: float) -> None:
        """`started` is the local monotonic time at which this agent's life began, and any earlier one had ended.

        That is when its process was created, rather than when it was ready: the root's time at `started` is known a
        message's travel time too late, and a command issued in between would be refused.
        """
        self.fleet = fleet
        self.verify_key = verify_key
        self.rank = rank
        self.started = started
        self.time = RootTime()

    def open(self, delivered: Deliver) -> Command:
        """The command, if the fleet's key signed it for this host under this number. Raises Untrusted."""
        command = open_command(delivered.payload, delivered.signature, self.verify_key, self.fleet)
        if command.id != delivered.id:
            raise Untrusted(f"it is command {command.id} under the number {delivered.id}")
        if not ranks.holds(ranks.unpack(command.targets), self.rank):
            raise Untrusted("it is signed for other hosts")
        return command

    def check_time(self, command: Command, now: float) -> None:
        """Refuse an opened command that is late, or from before this agent began.

        A command that was issued before the agent began may have been run by its predecessor: that is refused, which
        makes a replay over a restart useless. Replays within one life are the relay's to recognise by id.
        Raises Untrusted.
        """
        # Plans order themselves by version, input by its offset, a cancel or a settling does no harm twice: they need
        # no clock, and must work before one is known.
        if isinstance(command.body, Plan | Cancel | Settled | Input):
            return
        if command.issued_ms / 1000 < self.time.at(self.started):
            raise FromBefore("it was issued before this agent began")
        if command.expires_ms / 1000 < self.time.at(now):
            raise Untrusted("it has expired")
