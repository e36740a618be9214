"""A host's directory: who this agent is, and what it must still know after a restart.

identity   its CURVE key pair, ports and incarnation (0600; the secret key never leaves this file)
welcome    what the root sent at enrolment: the fleet, its verify key, and this host's signed plan
plan       the latest signed plan, where there has been a newer one
lock       held for the agent's life; agent.pid holds its pid
images/ vms/ spool/ parts/
outcomes/  what the root has not acknowledged yet, a file for each command
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from threading import get_native_id
from typing import TypeVar

import msgspec

from agent.keyring import new_keys, to_text
from agent.ports import free_ports, is_free
from protocol.commands import Command, Plan
from protocol.messages import Deliver
from protocol.trust import open_command

#: libvirt's QEMU runs as another user and must reach images and disks below; everything secret is 0600.
_DIRECTORY_MODE = 0o711
#: Who looks whether an agent runs holds the lock for a moment; an agent that begins just then waits for that, in s.
_LOCK_WITHIN = 1.0

_T = TypeVar("_T")


class NotEnrolled(Exception):
    """The directory does not hold what an agent needs; the text says what is missing and what to do."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What a host makes for itself at enrolment. Keys are raw; `address` is where it listens."""

    public: bytes
    secret: bytes
    address: str
    control_port: int
    bulk_port: int


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the root gives a host at enrolment. `payload` and `signature` are its first plan."""

    fleet: str
    verify_key: bytes
    payload: bytes
    signature: bytes


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by a file with `data`, whole or not at all, and on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{get_native_id()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.replace(path)


class HostDirectory:
    """The directory of one fleet's agent on this host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.vms = path / "vms"
        self.spool = path / "spool"
        self.parts = path / "parts"
        self.outcomes = path / "outcomes"

    def enrol(self, address: str, *, new_ports: bool = False) -> Identity:
        """The identity, made where there is none yet. A new `address` is taken over; the keys stay, and so do the
        ports, unless with `new_ports` somebody else listens at them while no agent runs here."""
        self.path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        self.path.chmod(_DIRECTORY_MODE)
        for folder in (self.images, self.vms):
            folder.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        for folder in (self.spool, self.parts):
            folder.mkdir(mode=0o700, exist_ok=True)
        file = self.path / "identity"
        known = self.identity() if file.exists() else None
        public, secret = new_keys() if known is None else (known.public, known.secret)
        if known is None or (new_ports and not self.is_locked() and not _ports_free(known, address)):
            control, bulk = free_ports(address, 2)
        else:
            control, bulk = known.control_port, known.bulk_port
        identity = Identity(public=public, secret=secret, address=address, control_port=control, bulk_port=bulk)
        if identity != known:
            write_atomically(file, msgspec.msgpack.encode(identity))
        return identity

    def identity(self) -> Identity:
        """The identity of `enrol`. Raises NotEnrolled."""
        return self._read("identity", Identity)

    def welcome(self) -> Welcome:
        """What the root sent. Raises NotEnrolled."""
        return self._read("welcome", Welcome)

    def _read(self, name: str, type_: type[_T]) -> _T:
        try:
            return msgspec.msgpack.decode((self.path / name).read_bytes(), type=type_)
        except (OSError, msgspec.DecodeError) as error:
            raise NotEnrolled(f"{self.path / name}: {error}; run `ctl up` for this host again") from error

    def plan(self, welcome: Welcome) -> Plan:
        """The latest plan that the fleet's key signed. Raises NotEnrolled."""
        plans = [_plan_of(welcome.payload, welcome.signature, welcome)]
        file = self.path / "plan"
        if file.exists():
            delivery = self._read("plan", Deliver)
            plans.append(_plan_of(delivery.payload, delivery.signature, welcome))
        return max(plans, key=lambda plan: plan.version)

    def save_plan(self, delivery: Deliver) -> None:
        """Keep a plan for the next start."""
        write_atomically(self.path / "plan", msgspec.msgpack.encode(delivery))

    def next_incarnation(self) -> int:
        """A number above that of every earlier start, kept before it is used.

        Seconds since 1970 where that is more, so that a host which was restored from an old copy of its disk still
        comes back with a higher one.
        """
        file = self.path / "incarnation"
        last = int(file.read_text()) if file.exists() else 0
        incarnation = max(last + 1, int(time.time()))
        write_atomically(file, str(incarnation).encode())
        return incarnation

    def is_locked(self) -> bool:
        """Whether an agent runs in this directory."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def lock(self) -> int:
        """Take the lock for this process's life; the descriptor. Raises BlockingIOError where an agent runs already."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_WITHIN
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise
                time.sleep(0.02)
        write_atomically(self.path / "agent.pid", f"{os.getpid()}\n".encode())
        return fd


def is_running(directory: Path, lock: str = "lock") -> bool:
    """Whether somebody holds the lock of this directory: its agent."""
    try:
        fd = os.open(directory / lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _ports_free(identity: Identity, address: str) -> bool:
    return all(is_free(address, port) for port in (identity.control_port, identity.bulk_port))


def _plan_of(payload: bytes, signature: bytes, welcome: Welcome) -> Plan:
    command: Command = open_command(payload, signature, welcome.verify_key, welcome.fleet)
    if not isinstance(command.body, Plan):
        raise NotEnrolled("the signed document in place of a plan is none; run `ctl up` for this host again")
    return command.body


def enrolment_text(identity: Identity) -> str:
    """The public half, as `agent enrol` prints it: one line of JSON."""
    public = {
        "key": to_text(identity.public),
        "control_port": identity.control_port,
        "bulk_port": identity.bulk_port,
    }
    return msgspec.json.encode(public).decode()
