"""What a starter and its seeds say to each other, over the pipes of an SSH session.

A frame is four bytes of length (big-endian), a JSON object whose `t` names its kind, and, where that has a
`blob`, as many bytes more. Frames from a seed carry no blob. The seed itself, which has the standard library
alone, writes and reads the same by hand (agent/seed.py).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

MAX_UP = 1 << 16  # bytes of a frame from a seed: the longest carries a reason
SHARE = 64  # jobs in one frame; with its keys a job takes 1 to 2 kB, and a seed takes 1 MiB

Text = Annotated[str, msgspec.Meta(max_length=1024)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Version: TypeAlias = tuple[int, int]
_Frame = TypeVar("_Frame")


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which bundle runs on a host."""

    python: Version
    machine: Text  # uname -m
    libc: Text  # "glibc" or another's name
    libc_version: Version


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle as it travels."""

    identity: str
    sha256: str
    content: bytes


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """How a host reaches another by SSH: the service node's configuration, resolved for that one."""

    hostname: str
    port: int
    user: str
    strict: str  # StrictHostKeyChecking
    alias: str = ""  # HostKeyAlias
    known_hosts: tuple[str, ...] = ()  # the lines that concern this host


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A host to start; `route` is None where only the service node can."""

    id: int
    name: str
    route: Route | None = None


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all hosts of one run."""

    fleet: str
    directory: str = ""  # base directory on hosts; empty for the usual one
    starter: bool = True  # whether hosts start others
    connect_timeout: float = 10.0
    window: int = 8  # sessions at a time from a host: each costs it some 40 ms of CPU, and it has VMs to run


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="hello"):
    """A seed's first frame."""

    id: int
    python: Version
    machine: Text
    libc: Text
    libc_version: Version
    uid: int
    stored: tuple[Text, ...]  # identities of the bundles unpacked there
    ssh: bool

    @property
    def platform(self) -> Platform:
        """The part that chooses the bundle."""
        return Platform(python=self.python, machine=self.machine, libc=self.libc, libc_version=self.libc_version)


class Enrol(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="enrol"):
    """The public half of an agent's identity, and what its host is."""

    id: int
    key: Annotated[str, msgspec.Meta(min_length=40, max_length=40)]  # Z85
    address: Text
    control_port: Port
    bulk_port: Port
    running: bool  # the agent is up already, with the right bundle
    identity: Text  # of the bundle
    python: Version
    machine: Text
    libc: Text
    libc_version: Version
    uid: int


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="result"):
    """What became of a host. `reached` is false where SSH to it failed, so that another starter may do better."""

    id: int
    state: Literal["started", "current", "failed"]
    reason: Text = ""
    reached: bool = True
    lasting: bool = False  # the same starter would fail in the same way again
    by: Text = ""  # who started it
    went_back: bool = False  # the new agent did not start, and the previous one runs again


class Want(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="want"):
    """A host that is up has a slot free."""


class Need(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="need"):
    """A host lacks the bundle for another's platform."""

    platform: Platform


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="ping"):
    """A sign of life."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="begin"):
    """What a seed is told first."""

    id: int
    name: str
    terms: Terms


class Install(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="install"):
    """The bundle to run; the blob is the archive, unless the host has it."""

    identity: str
    sha256: str
    blob: int = 0


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="welcome"):
    """The service's answer to an enrolment; the blob is the document."""

    id: int
    blob: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="refused"):
    """The service's other answer."""

    id: int
    reason: str


class Jobs(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="jobs"):
    """A share of the hosts that wait."""

    jobs: tuple[Job, ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="done"):
    """There is no more to do."""


class Supply(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="supply"):
    """The answer to Need: a bundle as the blob, or why there is none."""

    platform: Platform
    identity: str = ""
    sha256: str = ""
    reason: str = ""
    blob: int = 0


Up: TypeAlias = Hello | Enrol | Result | Want | Need | Ping
Down: TypeAlias = Begin | Install | Welcome | Refused | Jobs | Done | Supply

_up: msgspec.json.Decoder[Up] = msgspec.json.Decoder(Up)
_down: msgspec.json.Decoder[Down] = msgspec.json.Decoder(Down)


class BadFrame(ValueError):
    """The other end sent something that is no frame."""


def up(header: bytes) -> Up:
    """A frame's object from a seed. Raises BadFrame."""
    return _decoded(_up, header)


def down(header: bytes) -> Down:
    """A frame's object from a starter, without its blob. Raises BadFrame."""
    return _decoded(_down, header)


def _decoded(decoder: msgspec.json.Decoder[_Frame], header: bytes) -> _Frame:
    try:
        return decoder.decode(header)
    # What is in an unknown field is skipped, however deep: that may be deeper than Python goes.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(str(error)) from None


def frame(message: Up | Down, blob: bytes = b"") -> bytes:
    """One frame as it goes over the pipe."""
    header = msgspec.json.encode(message)
    return len(header).to_bytes(4, "big") + header + blob
