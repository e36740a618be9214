"""What the host that a VM comes from may ask of this host's libvirt: the calls of that one move, and nothing else.

libvirt moves a VM from daemon to daemon: the one that has it calls the other's. Whoever may call libvirt as he likes
is root on its host, and no host is to be that on another. So the agent stands between: it takes the calls apart, lets
through those that a move makes, and looks into the two that name a domain. Pure: bytes in, bytes out.

Sources: libvirt's src/rpc/virnetprotocol.x (a call's header), src/remote/remote_protocol.x (procedures and arguments,
which are never renumbered), RFC 4506 (how arguments are written); https://libvirt.org/migration.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

#: Programs, and how a frame begins: its length (all of it), program, version, procedure, type, serial, status.
_REMOTE, _KEEPALIVE = 0x20008086, 0x6B656570
_HEAD = struct.Struct(">IIIiiIi")
_CALL, _MESSAGE = 0, 2
_OPEN, _PREPARE, _FINISH = 1, 303, 306
#: CLOSE, SUPPORTS_FEATURE, AUTH_LIST, CONNECT_REGISTER_CLOSE_CALLBACK and …_UNREGISTER_…: they change nothing.
_HARMLESS = frozenset({2, 60, 66, 360, 361})
#: Two copies of a domain and a cookie; libvirt's own bound is 32 MiB.
_MOST = 1 << 20
_URI = "qemu:///system"

#: VIR_MIGRATE_LIVE, PEER2PEER, PERSIST_DEST and UNDEFINE_SOURCE (https://libvirt.org/html/libvirt-libvirt-domain.html);
#: and PAUSED: the VM goes on here when it is known that it has gone where it was, and not before, so that it never runs
#: twice.
FLAGS = 1 | 2 | 8 | 16 | 32
#: VIR_MIGRATE_NON_SHARED_INC: its disk goes along, as far as it differs from its image.
WITH_DISK = 128

# virTypedParameterType: int, unsigned int, long long, unsigned long long, double, boolean; and string.
_SIZES = {1: 4, 2: 4, 3: 8, 4: 8, 5: 8, 6: 4}
_STRING = 7
_PARAMETERS = frozenset({"destination_xml", "persistent_xml", "migrate_uri", "disks_uri", "destination_name"})
#: What a move tells the other side beside the domain.
_COOKIE = frozenset(
    (
        *("name", "uuid", "hostname", "hostuuid", "feature", "domain", "nbd", "cpu"),
        *("capabilities", "statistics", "network", "allowReboot", "lockstate"),
    )
)


class Forbidden(Exception):
    """It asked for something that its move does not need; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """What is awaited. `domain` checks a domain's XML, and raises ValueError."""

    name: str
    uuid: str
    flags: int
    memory_uri: str
    disk_uri: str
    domain: Callable[[str], None]


class Gate:
    """One connection of the other host's libvirt."""

    def __init__(self, move: Move) -> None:
        self._move = move
        self._buffer = bytearray()

    def feed(self, data: bytes) -> bytes:
        """The bytes that may go on, whole calls only. Raises Forbidden, and then the connection is to end."""
        self._buffer += data
        passed = bytearray()
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if not _HEAD.size <= length <= _MOST:
                raise Forbidden(f"a call of {length} bytes")
            if len(self._buffer) < length:
                break
            frame = bytes(self._buffer[:length])
            del self._buffer[:length]
            self._look(frame)
            passed += frame
        return bytes(passed)

    def _look(self, frame: bytes) -> None:
        _, program, version, procedure, type_, _, status = _HEAD.unpack_from(frame)
        arguments = _Arguments(frame[_HEAD.size :])
        if (program, version, type_) == (_KEEPALIVE, 1, _MESSAGE) and procedure in (1, 2) and not arguments.left:
            return
        if (program, version, type_, status) != (_REMOTE, 1, _CALL, 0):
            raise Forbidden(f"message {type_} of procedure {procedure} of program {program:#x}")
        if procedure == _OPEN:
            uri = arguments.text() if arguments.number() else None
            if uri != _URI or arguments.number():
                raise Forbidden(f"to open {uri!r}")
        elif procedure in (_PREPARE, _FINISH):
            self._look_at_move(arguments, finish=procedure == _FINISH)
        elif procedure not in _HARMLESS:
            raise Forbidden(f"procedure {procedure} of libvirt")

    def _look_at_move(self, arguments: _Arguments, *, finish: bool) -> None:
        move = self._move
        given = arguments.parameters()
        cookie = arguments.opaque()
        flags = arguments.number()
        if finish:
            arguments.number()  # whether it is cancelled
        if arguments.left:
            raise Forbidden("a call with more behind it")
        if flags != move.flags:
            raise Forbidden(f"a move with the flags {flags:#x}, not {move.flags:#x}")
        wanted = {"migrate_uri": move.memory_uri, "disks_uri": move.disk_uri, "destination_name": move.name}
        for key, value in given.items():
            if key not in _PARAMETERS:
                raise Forbidden(f"a move with the parameter {key}")
            if key in wanted and value != wanted[key]:
                raise Forbidden(f"a move with {key} {value}")
        if "destination_xml" not in given or "migrate_uri" not in given:
            raise Forbidden("a move without a domain, or without a way for its memory")
        for key in ("destination_xml", "persistent_xml"):
            if key in given:
                self._look_at_domain(given[key])
        if cookie:
            self._look_at_cookie(cookie)

    def _look_at_domain(self, text: str) -> None:
        try:
            self._move.domain(text)
        except ValueError as error:
            raise Forbidden(f"a domain that is not the one awaited: {error}") from error

    def _look_at_cookie(self, cookie: bytes) -> None:
        from xml.etree import ElementTree as ET

        text = cookie.rstrip(b"\0").decode("utf-8", "replace")
        if "<!" in text or "<?" in text:
            raise Forbidden("a cookie with declarations")
        try:
            root = ET.fromstring(text)  # noqa: S314  without declarations there are no entities to expand
        except ET.ParseError as error:
            raise Forbidden(f"a cookie that is no XML: {error}") from error
        if root.tag != "qemu-migration":
            raise Forbidden(f"a cookie of {root.tag}")
        odd = sorted({child.tag for child in root} - _COOKIE)
        if odd:
            raise Forbidden(f"a cookie with {', '.join(odd)[:100]}")
        for tag, value in (("name", self._move.name), ("uuid", self._move.uuid)):
            if root.findtext(tag) != value or len(root.findall(tag)) != 1:
                raise Forbidden(f"a cookie of another {tag}")
        for domain in root.findall("domain"):
            self._look_at_domain(ET.tostring(domain, encoding="unicode"))


class _Arguments:
    """A call's arguments, taken from the front. Raises Forbidden where they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes there are."""
        return len(self._data) - self._at

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise Forbidden("a call that is cut short")
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def number(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def opaque(self) -> bytes:
        length = self.number()
        taken = self._take(length)
        self._take(-length % 4)
        return taken

    def text(self) -> str:
        try:
            text = self.opaque().decode("utf-8")
        except UnicodeDecodeError as error:
            raise Forbidden("a text that is no UTF-8") from error
        if "\0" in text:
            raise Forbidden("a text with an end within")
        return text

    def parameters(self) -> dict[str, str]:
        """Typed parameters, which are texts all."""
        found: dict[str, str] = {}
        for _ in range(self.number()):
            key, kind = self.text(), self.number()
            if kind in _SIZES:
                self._take(_SIZES[kind])
            if kind != _STRING:
                raise Forbidden(f"a move with the parameter {key}")
            if key in found:
                raise Forbidden(f"a move with {key} twice")
            found[key] = self.text()
        return found
