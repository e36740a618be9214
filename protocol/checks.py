"""What hosts answer when they are asked to look at themselves or to change their settings: JSON in the output."""

from __future__ import annotations

from typing import Literal

import msgspec

#: Whether a part of the kernel is there: in use, to be loaded, or neither. None: it can't be told.
Presence = Literal["loaded", "available", "missing"]


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """A place on disk: MiB, and whether new files can be made."""

    path: str
    free_mib: int
    total_mib: int
    inodes_left: bool


class LibvirtFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The libvirt that the agent uses. `missing` is Python's binding; `problem` why it can't be used, else empty.

    `daemon` is its name, empty for a libvirt without one; `files` how many files that may have open, None where
    it does not run or can't be told. `stale`: its configuration was written after it began.
    """

    uri: str
    version: str
    missing: bool
    problem: str
    daemon: str
    files: int | None
    stale: bool


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A host as its agent sees it.

    `arrived_ms` and `answered_ms` are by the host's clock, in ms since 1970. `kvm` and `qemu` (its version) come with
    what there is to say of them. `interface` carries the agent's address. `settings` has each of `agent.tunables` that
    this kernel and libvirt have, None where it could not be read, with the reason in `unread`. `agent_files`
    is how many files the agent may have open. `huge_pages` counts those set aside.
    """

    arrived_ms: int
    answered_ms: int
    user: str
    kvm: bool | None
    kvm_why: str
    qemu: str | None
    qemu_why: str
    libvirt: LibvirtFacts
    rooms: tuple[Room, ...]
    interface: str
    mtu: int | None
    settings: dict[str, int | None]
    unread: dict[str, str]
    agent_files: int
    modules: dict[str, Presence | None]
    huge_pages: int | None
    ksm: bool | None


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one setting: before and after, equal where nothing was done; None where there is none here.

    `note` says what else is to be known of it.
    """

    key: str
    before: int | None
    after: int | None
    note: str = ""


class TuneAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of all. `restart` is the daemon that must begin anew to take its settings, empty where none must.
    `problem` is why nothing was changed, or what could not be restored."""

    tuned: tuple[Tuned, ...] = ()
    restart: str = ""
    problem: str = ""
