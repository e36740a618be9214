"""Who may connect: this process's keys, and those that are admitted.

ZAP refuses keys that are not in the allow-list; without a ZAP handler libzmq accepts any client key, hence
ZAP_ENFORCE_DOMAIN on every socket.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85

from agent.sockets import NOW, Reader, Rounds
from protocol.limits import PENALTY

#: Messages taken from one socket before others get their turn.
_TURN = 100
#: The same where each may be a chunk, which takes some tenths of a millisecond to verify and to give on. Measured while
#: chunks kept all cores busy: a broadcast took 37 to 52 ms, with eight 56 to 89, and the push no longer.
_BACKGROUND_TURN = 2
#: A tenth of the share of a core that others get where there is not enough for all (sched(7)).
_BACKGROUND_NICE = 10
#: The two kinds of sockets, by their ZAP domains (ZeroMQ RFC 27).
CONTROL, BULK = "canopy-control", "canopy-bulk"
_ZAP_DOMAINS = (CONTROL, BULK)


def new_keys() -> tuple[bytes, bytes]:
    """A fresh CURVE key pair: public and secret, 32 raw bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def to_text(key: bytes) -> str:
    """A raw key as the 40 characters of Z85 (ZeroMQ RFC 32)."""
    text: bytes = z85.encode(key)
    return text.decode("ascii")


def from_text(text: str) -> bytes:
    """The raw key of `to_text`. Raises ValueError."""
    raw: bytes = z85.decode(text.encode("ascii"))
    if len(raw) != 32:
        raise ValueError("a key has 40 characters of Z85")
    return raw


#: Of public keys: some 20 us each, for all hosts of each push. A secret one is kept nowhere else.
_known_text = lru_cache(1_024)(to_text)


class Keyring:
    """This process's key pair, and the keys that may connect. One ZeroMQ context and one ZAP handler for all its
    sockets."""

    def __init__(self, public: bytes, secret: bytes, *, nice: int = 0, turn: int = _TURN) -> None:
        """`nice` is how much lower than others the priority of its I/O thread is (nice(2)); `turn`, how many messages
        its sockets take before others get theirs."""
        self.turn = turn
        self._keys = public, secret
        self.public = to_text(public).encode()
        self.secret = to_text(secret).encode()
        threads = set(os.listdir("/proc/self/task"))
        self.context: zmq.Context[Any] = zmq.Context()
        self.rounds = Rounds()
        self._admitted: dict[str, int] = {}
        #: Beside those, for as long as a push lasts, on the bulk socket alone: by push.
        self._order: dict[int, dict[str, int]] = {}
        self._barred: dict[str, float] = {}
        self._auth = zmq.auth.Authenticator(self.context)
        self._auth.start()
        for domain in _ZAP_DOMAINS:
            self._auth.configure_curve_callback(domain, credentials_provider=self)
        if nice:
            # libzmq can give its threads a policy (ZMQ_THREAD_SCHED_POLICY), but SCHED_IDLE starves beside busy VMs.
            for thread in set(os.listdir("/proc/self/task")) - threads:
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)
        self._zap_busy = False
        self._zap = Reader(self._auth.zap_socket, self._drain_zap)

    def in_background(self) -> Keyring:
        """Another with the same keys for sockets that are to disturb nobody: with a context and an I/O thread of their
        own, at a lower priority, and a few messages at a time."""
        return Keyring(*self._keys, nice=_BACKGROUND_NICE, turn=_BACKGROUND_TURN)

    def admit(self, keys: Mapping[bytes, int]) -> None:
        """From now on these keys may connect, each as its rank, and no others."""
        self._admitted = {_known_text(key): rank for key, rank in keys.items()}

    def admit_order(self, id_: int, keys: Mapping[bytes, int]) -> None:
        """These may connect to the bulk socket as well, each as its rank, until `dismiss_order`."""
        self._order[id_] = {_known_text(key): rank for key, rank in keys.items()}

    def dismiss_order(self, id_: int) -> None:
        """The push is over."""
        self._order.pop(id_, None)

    def bar(self, rank: int) -> None:
        """Refuse the key of `rank` for a while."""
        until = time.monotonic() + PENALTY
        self._barred = {key: end for key, end in self._barred.items() if end > time.monotonic()}
        for keys in (self._admitted, *self._order.values()):
            self._barred |= {key: until for key, holder in keys.items() if holder == rank}

    def count(self) -> int:
        """How many keys may connect."""
        return len(self._admitted) + sum(map(len, self._order.values()))

    def rank_of(self, key: str, domain: str) -> int | None:
        """The rank whose key this is, if it is admitted to the sockets of this domain."""
        if self._barred.get(key, 0.0) > time.monotonic():
            return None
        rank = self._admitted.get(key)
        if rank is None and domain == BULK:
            rank = next((keys[key] for keys in self._order.values() if key in keys), None)
        return rank

    def key_of(self, rank: int, domain: str) -> str | None:
        """The key that is admitted as this rank's."""
        maps = (self._admitted, *(self._order.values() if domain == BULK else ()))
        return next((key for keys in maps for key, holder in keys.items() if holder == rank), None)

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's credentials provider: whether the holder of this key may connect."""
        return domain in _ZAP_DOMAINS and self.rank_of(key.decode("ascii", "replace"), domain) is not None

    def _drain_zap(self) -> bool:
        if not self._zap_busy:
            self._zap_busy = True
            task = asyncio.get_running_loop().create_task(self._answer_zap())
            task.add_done_callback(lambda done: done.exception())
        return False

    async def _answer_zap(self) -> None:
        try:
            while self._zap.readable():
                await self._auth.handle_zap_message(self._auth.zap_socket.recv_multipart(NOW))
        finally:
            self._zap_busy = False
        self._zap.look()

    def close(self) -> None:
        """Close the ZAP handler and the context; every socket must be closed before."""
        self.rounds.stop()
        self._zap.close()
        self._auth.stop()
        self.context.destroy(linger=0)
