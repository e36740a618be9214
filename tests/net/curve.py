"""A CURVE client over a plain TCP socket (ZeroMQ RFC 23 and 26), for what no ZeroMQ library would ever send.

It shakes hands as it should, unless the test wants otherwise; after that each frame is the caller's to make.
"""

from __future__ import annotations

import os
import socket

from nacl.bindings import crypto_box, crypto_box_keypair, crypto_box_open

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MORE, _LONG, _COMMAND = 1, 2, 4


def greeting(mechanism: bytes) -> bytes:
    """The first 64 bytes of a connection, for a client with this mechanism."""
    return _SIGNATURE + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame as ZMTP has it."""
    if len(body) > 255:  # one byte holds a short frame's length
        return bytes([flags | _LONG]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


class RawCurve:
    """One connection."""

    def __init__(self, address: str, port: int, *, server: bytes, public: bytes, secret: bytes) -> None:
        """Connects; keys are raw. Nothing is sent yet."""
        self._server, self._public, self._secret = server, public, secret
        self._own_public, self._own_secret = crypto_box_keypair()
        self._nonce = 0
        self.socket = socket.create_connection((address, port), timeout=10)

    def __enter__(self) -> RawCurve:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _short_nonce(self) -> bytes:
        self._nonce += 1
        return self._nonce.to_bytes(8, "big")

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError("the other end closed the connection")
            data += more
        return data

    def _frame(self) -> bytes:
        flags, first = self._exactly(2)
        length = first if not flags & _LONG else int.from_bytes(bytes([first]) + self._exactly(7), "big")
        return self._exactly(length)

    def greet(self) -> None:
        """Exchange greetings."""
        self.socket.sendall(greeting(b"CURVE"))
        self._exactly(64)

    def hello(self) -> bytes:
        """Send HELLO; returns the body of what comes back."""
        nonce = self._short_nonce()
        box = crypto_box(bytes(64), b"CurveZMQHELLO---" + nonce, self._server, self._own_secret)
        body = b"\x05HELLO\x01\x00" + bytes(72) + self._own_public + nonce + box
        self.socket.sendall(frame(body, _COMMAND))
        return self._frame()

    def shake_hands(self) -> None:
        """All of the handshake. Raises ConnectionError where the server will not have this key."""
        self.greet()
        welcome = self.hello()
        opened = crypto_box_open(welcome[24:], b"WELCOME-" + welcome[8:24], self._server, self._own_secret)
        self._peer, cookie = opened[:32], opened[32:]
        vouch_nonce = os.urandom(16)
        vouch = crypto_box(self._own_public + self._server, b"VOUCH---" + vouch_nonce, self._peer, self._secret)
        metadata = b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER" + b"\x08Identity" + bytes(4)
        nonce = self._short_nonce()
        secret = self._public + vouch_nonce + vouch + metadata
        box = crypto_box(secret, b"CurveZMQINITIATE" + nonce, self._peer, self._own_secret)
        self.socket.sendall(frame(b"\x08INITIATE" + cookie + nonce + box, _COMMAND))
        ready = self._frame()
        if not ready.startswith(b"\x05READY"):
            raise ConnectionRefusedError(repr(ready[:20]))

    def sealed(self, payload: bytes, *, more: bool) -> bytes:
        """A frame of a message, as it travels. `more` says that the message has not ended with it."""
        nonce = self._short_nonce()
        flags = b"\x01" if more else b"\x00"
        box = crypto_box(flags + payload, b"CurveZMQMESSAGEC" + nonce, self._peer, self._own_secret)
        return frame(b"\x07MESSAGE" + nonce + box)

    def is_closed(self) -> bool:
        """Whether the other end has closed the connection; what it sent before is thrown away."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 16):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.socket.settimeout(10)
        return True
