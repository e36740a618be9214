"""The TOML file beside an infra.conf, for what that format lacks: what VMs boot, their disks and networks.

    image = "debian.qcow2"              the same for all VMs, unless a pattern says otherwise
    disk = "10G"
    apart = ["db-*"]                    VMs of one pattern share no host

    [vm."web-*"]                        by VM name: later tables win over earlier ones
    network = "front"
    user_data = "web.yaml"

Patterns are those of fnmatch(3): * ? [abc]. Files are named relative to the profile. An image is a file, or the name or
digest of one that `ctl image ls` lists. A network is one of `ctl net`: its VMs have its bridge, and addresses of its
subnet; all others have those of the command line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from controller.text_problems import shown
from protocol.nets import NetName
from protocol.vms import Bridge, Cmdline

#: Larger files are refused: a thousand patterns are some 100 KiB.
MAX_BYTES = 256 << 10
#: So are longer lines: a kernel's command line has 2,047 characters at most. tomllib takes time that grows with the
#: square of the length of a dotted key.
_MAX_LINE = 4096
_SIZE = re.compile(r"([1-9][0-9]{0,9}) ?(M|G|T|MiB|GiB|TiB)")
_SIZES = {"M": 1, "G": 1024, "T": 1024 * 1024}


class ProfileError(Exception):
    """All that is wrong with a profile. `problems` holds one line for each, with the path of its key."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(shown(self.problems)))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM is made of, as far as it is said; None is not said. `disk_mib` is the size of its disk."""

    image: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    bridge: str | None = None
    network: str | None = None
    user_data: str | None = None
    ssh_keys: str | None = None
    disk_mib: int | None = None

    def over(self, below: Settings) -> Settings:
        """These, and where they say nothing those of `below`."""
        said = {key: value for key in self.__struct_fields__ if (value := getattr(self, key)) is not None}
        # A VM has one interface.
        if "network" in said:
            below = msgspec.structs.replace(below, bridge=None)
        elif "bridge" in said:
            below = msgspec.structs.replace(below, network=None)
        if "image" in said and "kernel" not in said:
            below = msgspec.structs.replace(below, kernel=None, initrd=None, cmdline=None)
        elif "kernel" in said:
            below = msgspec.structs.replace(below, initrd=None, cmdline=None)
            if "image" not in said:
                below = msgspec.structs.replace(below, image=None)
        return msgspec.structs.replace(below, **said)


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile. `patterns` are in the order of the file."""

    defaults: Settings = Settings()
    patterns: tuple[tuple[str, Settings], ...] = ()
    apart: tuple[str, ...] = ()

    def settings(self, name: str) -> Settings:
        """What is said of the VM of this name."""
        found = self.defaults
        for pattern, settings in self.patterns:
            if fnmatchcase(name, pattern):
                found = settings.over(found)
        return found

    def rules(self, names: Iterable[str]) -> dict[str, str]:
        """The first pattern of `apart` that each name matches, for those that match one."""
        found = {}
        for name in names:
            rule = next((pattern for pattern in self.apart if fnmatchcase(name, pattern)), None)
            if rule is not None:
                found[name] = rule
        return found

    def unused(self, names: Iterable[str]) -> tuple[str, ...]:
        """The patterns that no name matches: most are slips."""
        names = list(names)
        every = [*(pattern for pattern, _ in self.patterns), *self.apart]
        return tuple(
            pattern for pattern in dict.fromkeys(every) if not any(fnmatchcase(name, pattern) for name in names)
        )


#: The keys that a VM has, beside `disk`, and what each takes.
_TEXTS = {
    "image": "a file, or the name or digest of an image",
    "kernel": "a file, or the name or digest of an image",
    "initrd": "a file, or the name or digest of an image",
    "cmdline": "a kernel's command line of printable ASCII, at most 2047 characters",
    "bridge": "a network interface: 1 to 15 letters, digits, '-', '_' and '.'",
    "network": "a network of `ctl net`: up to 12 lower-case letters, digits and '-'",
    "user_data": "a file with a user-data template",
    "ssh_keys": "a file of public keys, one a line",
}
_TYPES: Mapping[str, Any] = {"cmdline": Cmdline, "bridge": Bridge, "network": NetName}
_FILES = ("image", "kernel", "initrd", "user_data", "ssh_keys")
_VM_KEYS = (*_TEXTS, "disk")
_TOP_KEYS = (*_VM_KEYS, "apart", "vm")


def size_mib(text: str) -> int | None:
    """A size like `10G` or `512 MiB`, in MiB; None where it is none. Units are powers of 1024."""
    found = _SIZE.fullmatch(text)
    size = None if found is None else int(found[1]) * _SIZES[found[2][0]]
    return size if size is not None and size <= 2**30 else None


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises ProfileError, and OSError where it can't be read."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    return parse_profile(data, file=str(path), folder=path.parent)


def parse_profile(data: bytes, *, file: str = "profile", folder: Path | None = None) -> Profile:
    """The profile in `data`. Paths are relative to `folder`. Raises ProfileError; nothing else, whatever the bytes."""
    if len(data) > MAX_BYTES:
        raise ProfileError([f"{file}: it is longer than {MAX_BYTES >> 10} KiB"])
    long = next((number for number, line in enumerate(data.split(b"\n"), 1) if len(line) > _MAX_LINE), None)
    if long is not None:
        raise ProfileError([f"{file}: line {long} is longer than {_MAX_LINE} bytes"])
    try:
        document = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ProfileError([f"{file}: byte {error.start} is not UTF-8; save it as UTF-8 text"]) from None
    except tomllib.TOMLDecodeError as error:
        # tomllib ends its sentences with the line and column.
        raise ProfileError([f"{file}: {error}"]) from None
    except (RecursionError, ValueError):
        raise ProfileError([f"{file}: it is nested too deep, or has a number that is too long"]) from None
    return _Reader(file, folder or Path()).profile(document)


class _Reader:
    def __init__(self, file: str, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._problems: list[str] = []

    def profile(self, document: dict[str, Any]) -> Profile:
        defaults = self._settings(document, (), _TOP_KEYS)
        patterns = []
        tables = document.get("vm", {})
        if not isinstance(tables, dict):
            self._wrong(("vm",), 'tables like [vm."web-*"]', tables)
            tables = {}
        for pattern, table in tables.items():
            where = ("vm", pattern)
            if not pattern:
                self._wrong(where, "a pattern of VM names", pattern)
            elif not isinstance(table, dict):
                near = get_close_matches(pattern, _VM_KEYS, n=1)
                self._wrong(where, f"a table [vm.PATTERN] with {near[0] if near else 'keys'} in it", table)
            else:
                patterns.append((pattern, self._settings(table, where, _VM_KEYS)))
        apart = document.get("apart", [])
        if not isinstance(apart, list) or not all(isinstance(one, str) and one for one in apart):
            self._wrong(("apart",), "a list of patterns of VM names", apart)
            apart = []
        if self._problems:
            raise ProfileError(self._problems)
        return Profile(defaults=defaults, patterns=tuple(patterns), apart=tuple(apart))

    def _settings(self, table: dict[str, Any], where: tuple[str, ...], keys: tuple[str, ...]) -> Settings:
        found: dict[str, Any] = {}
        for key, value in table.items():
            if key in ("vm", "apart") and key in keys:
                continue
            if key == "disk":
                size = size_mib(value) if isinstance(value, str) else None
                if size is None:
                    self._wrong((*where, key), 'a size like "10G" or "512M", up to 1024T', value)
                else:
                    found["disk_mib"] = size
            elif key in _TEXTS:
                text = self._text(key, value)
                if text is None:
                    self._wrong((*where, key), _TEXTS[key], value)
                else:
                    found[key] = text
            else:
                near = get_close_matches(key, keys, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(keys)}"
                self._problems.append(f"{self._file}: {_dotted((*where, key))}: no such key{hint}")
        if "bridge" in found and "network" in found:
            self._problems.append(
                f"{self._file}: {_dotted((*where, 'bridge'))}: either a bridge or a network, not both"
            )
        for needs in ("initrd", "cmdline"):
            if needs in found and "kernel" not in found:
                self._problems.append(
                    f"{self._file}: {_dotted((*where, needs))}: it goes with a kernel in the same table"
                )
        return Settings(**found)

    def _text(self, key: str, value: Any) -> str | None:
        if not isinstance(value, str) or (not value and key != "cmdline") or "\0" in value:
            return None
        if key in _TYPES:
            try:
                msgspec.convert(value, _TYPES[key])
            except msgspec.ValidationError:
                return None
        # A file beside the profile wins over an image of that name, which is looked for later.
        if key in _FILES and ((self._folder / value).exists() or key in ("user_data", "ssh_keys")):
            return str(self._folder / value)
        return value

    def _wrong(self, where: tuple[str, ...], expected: str, value: Any) -> None:
        self._problems.append(f"{self._file}: {_dotted(where)}: expected {expected}, not {repr(value)[:80]}")


def _dotted(where: tuple[str, ...]) -> str:
    """A key's path as TOML writes it."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else _quoted(part) for part in where)


def _quoted(part: str) -> str:
    return msgspec.json.encode(part[:80].encode("utf-8", "backslashreplace").decode()).decode()
