"""The gate before libvirt: what a move needs passes as it came, and nothing else does, whoever made it up."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from agent.rpcgate import FLAGS, WITH_DISK, Forbidden, Gate, Move

UUID = "90b9e46c-ac6d-552e-a351-7169c58a2e9b"
MEMORY, DISK = "unix:///run/libvirt/c1/m", "unix:///run/libvirt/c1/d"
REMOTE, KEEPALIVE = 0x20008086, 0x6B656570
DOMAIN = "<domain type='qemu'><name>vm1</name></domain>"
COOKIE = f"<qemu-migration><name>vm1</name><uuid>{UUID}</uuid><hostname>h</hostname></qemu-migration>"


def awaited(text: str) -> None:
    if "vm1" not in text or "evil" in text:
        raise ValueError("it is another")


MOVE = Move(name="vm1", uuid=UUID, flags=FLAGS | WITH_DISK, memory_uri=MEMORY, disk_uri=DISK, domain=awaited)


def call(procedure: int, arguments: bytes = b"", *, program: int = REMOTE, type_: int = 0, status: int = 0) -> bytes:
    """A call as libvirt's client writes it."""
    return struct.pack(">IIIiiIi", 28 + len(arguments), program, 1, procedure, type_, 7, status) + arguments


def opaque(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def text(words: str) -> bytes:
    return opaque(words.encode())


def prepare(
    *,
    parameters: dict[str, str] | None = None,
    cookie: str = COOKIE,
    flags: int = FLAGS | WITH_DISK,
    finish: bool = False,
    more: bytes = b"",
) -> bytes:
    given = {"destination_xml": DOMAIN, "migrate_uri": MEMORY, "disks_uri": DISK} | (parameters or {})
    body = struct.pack(">I", len(given))
    for key, value in given.items():
        body += text(key) + struct.pack(">i", 7) + text(value)
    body += opaque(cookie.encode() + b"\0" if cookie else b"") + struct.pack(">I", flags)
    return call(306 if finish else 303, body + (struct.pack(">i", 0) if finish else b"") + more)


GOOD = [
    pytest.param(call(66), id="which authentication"),
    pytest.param(call(60, struct.pack(">i", 15)), id="which features"),
    pytest.param(call(1, struct.pack(">I", 1) + text("qemu:///system") + struct.pack(">I", 0)), id="open"),
    pytest.param(call(360), id="tell me when it closes"),
    pytest.param(call(2), id="close"),
    pytest.param(call(1, program=KEEPALIVE, type_=2), id="ping"),
    pytest.param(prepare(), id="prepare"),
    pytest.param(prepare(parameters={"persistent_xml": DOMAIN, "destination_name": "vm1"}), id="prepare with more"),
    pytest.param(prepare(finish=True), id="finish"),
    pytest.param(prepare(cookie="", finish=True), id="finish without a cookie"),
    pytest.param(
        prepare(cookie=COOKIE.replace("</qemu-m", f"<feature name='persistent'/>{DOMAIN}</qemu-m"), finish=True),
        id="finish with the domain to keep",
    ),
]


@pytest.mark.parametrize("frame", GOOD)
def test_what_a_move_needs_passes_as_it_came(frame: bytes) -> None:
    assert Gate(MOVE).feed(frame) == frame


@pytest.mark.parametrize("frame", GOOD)
def test_it_does_so_in_whatever_pieces_it_comes(frame: bytes) -> None:
    gate = Gate(MOVE)
    assert b"".join(gate.feed(frame[at : at + 1]) for at in range(len(frame))) == frame
    assert gate.feed(frame + frame[:5]) == frame


BAD = [
    pytest.param(call(11, text(DOMAIN)), id="define a domain"),
    pytest.param(call(10), id="create one"),
    pytest.param(call(302), id="begin a move from here"),
    pytest.param(call(216), id="prepare by an older call"),
    pytest.param(call(1, struct.pack(">I", 1) + text("lxc:///system") + struct.pack(">I", 0)), id="another driver"),
    pytest.param(call(1, struct.pack(">I", 0)), id="no driver"),
    pytest.param(call(66, type_=3), id="a stream"),
    pytest.param(call(303, type_=5), id="a call with descriptors"),
    pytest.param(call(1, program=0x20008087), id="the QEMU program: a monitor command"),
    pytest.param(call(1, program=0x06900690), id="the administration program"),
    pytest.param(call(1, b"x" * 8, program=KEEPALIVE, type_=2), id="a ping with something in it"),
    pytest.param(prepare(parameters={"migrate_uri": "tcp://0.0.0.0:4444"}), id="memory over a port"),
    pytest.param(prepare(parameters={"disks_uri": "unix:///run/other"}), id="a disk from elsewhere"),
    pytest.param(prepare(parameters={"listen_address": "0.0.0.0"}), id="an open port"),
    pytest.param(prepare(parameters={"destination_name": "vm2"}), id="another name"),
    pytest.param(prepare(parameters={"destination_xml": DOMAIN.replace("vm1", "evil")}), id="another domain"),
    pytest.param(prepare(parameters={"persistent_xml": "<evil/>vm1"}), id="another domain to keep"),
    pytest.param(prepare(flags=FLAGS), id="without its disk"),
    pytest.param(prepare(flags=(FLAGS | WITH_DISK) & ~32), id="running at once"),
    pytest.param(prepare(flags=FLAGS | WITH_DISK | 512), id="unsafe"),
    pytest.param(prepare(more=b"\0\0\0\1"), id="more behind it"),
    pytest.param(prepare(cookie=COOKIE.replace("vm1", "vm2")), id="another's cookie"),
    pytest.param(prepare(cookie=COOKIE.replace(UUID, UUID[::-1])), id="another UUID's cookie"),
    pytest.param(prepare(cookie=COOKIE.replace("<hostname>", "<tpm/><hostname>")), id="a cookie with more"),
    pytest.param(prepare(cookie='<!DOCTYPE x [<!ENTITY a "b">]>' + COOKIE), id="a cookie with entities"),
    pytest.param(prepare(cookie="<qemu-migration>"), id="half a cookie"),
    pytest.param(
        prepare(cookie=COOKIE.replace("</qemu-m", f"{DOMAIN.replace('vm1', 'evil')}</qemu-m")),
        id="another domain in the cookie",
    ),
    pytest.param(struct.pack(">I", 3), id="shorter than its own length"),
    pytest.param(struct.pack(">I", 1 << 30), id="a gigabyte"),
    pytest.param(call(303, struct.pack(">I", 1 << 31)), id="two billion parameters"),
    pytest.param(call(303, struct.pack(">I", 1) + struct.pack(">I", 1 << 31)), id="a name of two gigabytes"),
]


@pytest.mark.parametrize("frame", BAD)
def test_nothing_else_passes(frame: bytes) -> None:
    gate = Gate(MOVE)
    with pytest.raises(Forbidden):
        gate.feed(frame)


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([1, 2, 60, 66, 303, 306, 360, 361]))
def test_whatever_comes_passes_whole_or_is_forbidden(arguments: bytes, procedure: int) -> None:
    gate = Gate(MOVE)
    frame = call(procedure, arguments)
    try:
        assert gate.feed(frame) == frame
    except Forbidden:
        return
    assert procedure not in (303, 306)


@settings(derandomize=True, deadline=None)
@given(st.integers(28, len(prepare()) - 1), st.integers(1, 255))
def test_a_prepared_move_with_one_byte_altered_names_no_other_socket_flag_or_domain(at: int, by: int) -> None:
    frame = bytearray(prepare())
    frame[at] ^= by
    seen: list[str] = []
    keep: Callable[[str], None] = seen.append
    try:
        Gate(replace(MOVE, domain=keep)).feed(bytes(frame))
    except Forbidden:
        return
    for must in (MEMORY, DISK):
        assert must.encode() in frame
    # What may differ is in the domain, which is looked at by itself, or in what a cookie tells beside it.
    assert len(seen) == 1
