"""What is fuzzed: every place where bytes of others are read, each with the one error that may come of it.

A target takes any bytes and returns; what it raises is a fault. Seeds are real samples, so that a fuzzer begins behind
the first check.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec
from nacl.bindings import crypto_sign, crypto_sign_BYTES, crypto_sign_seed_keypair

from agent.seed_frames import BadFrame, Hello, Job, Jobs, Ping, Result, down, frame, up
from controller import api
from controller.check import Seen, judge, report, size_of
from controller.infra import InfraError, format_infra, parse_infra
from controller.profile import ProfileError, parse_profile
from protocol import listing
from protocol.checks import HostFacts
from protocol.codec import MalformedMessage, decode, encode
from protocol.commands import Command, Run
from protocol.limits import MAX_PARTS, MAX_TEXT
from protocol.outcomes import Exited, Fold, Output
from protocol.trust import Untrusted, open_command
from tests.unit.fake_service import host, status
from tests.unit.test_check import facts
from tests.unit.test_codec import EACH

FLEET = "fuzz"
_VERIFY_KEY, _SECRET = crypto_sign_seed_keypair(bytes(32))
_SIZE = size_of(status(host(0), host(1)))


class Target(NamedTuple):
    """Something that takes any bytes."""

    name: str
    take: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _joined(frames: list[bytes]) -> bytes:
    """Frames as one string of bytes: each behind its length (2 bytes)."""
    return b"".join(len(each).to_bytes(2, "big") + each for each in frames)


def _frames(data: bytes) -> list[bytes]:
    """The frames of `_joined`, of any bytes; one more than a message may have is enough."""
    frames: list[bytes] = []
    while data and len(frames) <= MAX_PARTS:
        length = int.from_bytes(data[:2], "big")
        frames.append(data[2 : 2 + length])
        data = data[2 + length :]
    return frames


def _must(holds: bool) -> None:
    if not holds:
        raise AssertionError("an error without its places")


def codec(data: bytes) -> None:
    """Frames from a peer: a message that survives the way back and forth, or MalformedMessage."""
    try:
        message, blob = decode(_frames(data))
    except MalformedMessage:
        return
    assert decode(encode(message, blob)) == (message, blob) or message != message  # noqa: PLR0124  a nan is in it


def command(data: bytes) -> None:
    """A payload that the fleet signed: a command, or Untrusted."""
    signature = crypto_sign(b"canopy command\0" + data, _SECRET)[:crypto_sign_BYTES]
    with suppress(Untrusted):
        open_command(data, signature, _VERIFY_KEY, FLEET)


def infra(data: bytes) -> None:
    """An infra.conf: what it means can be written and reads back equal, or InfraError with places in the text."""
    try:
        found, _ = parse_infra(data)
    except InfraError as error:
        _must(bool(error.problems) and all(each.line >= 1 and each.column >= 1 for each in error.problems))
        return
    again, _ = parse_infra(format_infra(found))
    assert again == found


def profile(data: bytes) -> None:
    """A profile of VMs, or ProfileError."""
    try:
        parse_profile(data)
    except ProfileError as error:
        _must(bool(error.problems))


def pushed(data: bytes) -> None:
    """The listing of a push: what is taken stays below its folder and packs to what it was, or BadListing; the same
    where it stays packed, as long ones do."""
    found, packed = _listed(data), _listed(data, packed_above=0)
    assert (found is None) == (packed is None)
    if found is None or packed is None:
        return
    assert (tuple(packed.entries), packed.owners) == (found.entries, found.owners)
    assert not any(b".." in entry.path.split(b"/") or entry.path.startswith(b"/") for entry in found.entries)
    assert listing.unpack(listing.pack(found)) == found
    total = listing.Map(found)
    assert sum(length for _, _, _, length in total.pieces(0, min(total.size, 1 << 20))) == min(total.size, 1 << 20)


def _listed(data: bytes, **how: int) -> listing.Listing | None:
    try:
        return listing.unpack(data, **how)
    except listing.BadListing:
        return None


def request(data: bytes) -> None:
    """What a client sends the service, behind its length: a request, or BadFrame."""
    with suppress(api.BadFrame):
        api.length_of(data[: api.LENGTH_BYTES])
        api.unpack_request(data[api.LENGTH_BYTES :])


def reply(data: bytes) -> None:
    """What the service sends a client, or BadFrame."""
    with suppress(api.BadFrame):
        api.length_of(data[: api.LENGTH_BYTES])
        api.unpack_reply(data[api.LENGTH_BYTES :])


def seed(data: bytes) -> None:
    """The object of a frame from a seed, or from a starter, or BadFrame."""
    for decode_one in (up, down):
        with suppress(BadFrame):
            decode_one(data)


def told(data: bytes) -> None:
    """What a host tells of itself, which anything may come of but a fault or an order to a terminal."""
    try:
        found = msgspec.json.decode(data, type=HostFacts)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    text = report({"h0": judge(Seen(found, 1_000.0, 1_001.0), _SIZE, 1500, forward=True)})
    assert all(line.isprintable() for line in text.splitlines())
    text.encode()


_INFRA = b"""#list of nodes
node1 4 400 16192
node2 4 400 16192
#list of VMs
vm-0 1 0 2048
vm-1 1 0 2048 2147483647
vm-2 1 0 2048
#initial configuration
node1 vm-0
node2 (vm-1)
FARM vm-2
#end of configuration
"""
_PROFILE = b"""disk = "10G"
image = "debian"
[vm."vm-*"]
bridge = "br0"
"""
_LISTING = listing.Listing(
    entries=(
        listing.Entry(path=b"etc", kind=listing.Kind.DIRECTORY),
        listing.Entry(path=b"etc/hosts", kind=listing.Kind.FILE, size=120, digest=bytes(32)),
        listing.Entry(path=b"etc/link", kind=listing.Kind.LINK, target=b"hosts"),
        listing.Entry(path=b"etc/same", kind=listing.Kind.SAME, target=b"etc/hosts"),
    )
)
_RUN = Run(argv=("true",), output_limit=1)
_COMMAND = Command(fleet=FLEET, id=1, targets=b"\x01", issued_ms=1, expires_ms=2, body=_RUN)
_HELLO = Hello(
    id=1, python=(3, 11), machine="x86_64", libc="glibc", libc_version=(2, 36), uid=0, stored=("a",), ssh=True
)
_RESULT = Result(id=1, state="failed", reason="x" * (MAX_TEXT // 4))

_JOBS = Jobs(jobs=(Job(id=1, name="h1"),))
#: In a field that nobody knows; deeper than Python goes.
_DEEP = b'{"t": "ping", "x": ' + b"[" * 2_000
#: The same in a listing's first entry, as MessagePack.
_NESTED = b"\x91" * 5_000 + b"\xc0"

TARGETS = {
    target.name: target
    for target in (
        Target("codec", codec, tuple(_joined(encode(message, blob)) for message, blob in EACH)),
        Target("command", command, (msgspec.msgpack.encode(_COMMAND),)),
        Target("infra", infra, (_INFRA,)),
        Target("profile", profile, (_PROFILE, b"a = " + b"[" * 2_000)),
        Target("listing", pushed, (listing.pack(_LISTING), len(_NESTED).to_bytes(4, "big") + _NESTED)),
        Target(
            "request",
            request,
            (
                bytes(api.pack(api.RunOn(hosts=("h0",), argv=("true",), output_limit=1))),
                bytes(api.pack(api.TuneOn(hosts=None, settings={"a": 1}, timeout_ms=1))),
            ),
        ),
        Target(
            "reply",
            reply,
            (
                bytes(api.pack(api.Folded(folds=(Fold(b"\x01", Exited(0), Output(out=b"x")),)))),
                bytes(api.pack(api.Accepted(id=1, hosts={0: "h0"}))),
                bytes(api.pack(status(host(0)))),
            ),
        ),
        Target("seed", seed, (*(frame(each)[4:] for each in (_HELLO, _RESULT, Ping(), _JOBS)), _DEEP)),
        Target("facts", told, (msgspec.json.encode(facts()), json.dumps({"kvm": None}).encode(), _DEEP)),
    )
}
