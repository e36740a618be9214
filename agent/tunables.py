"""The settings of a host that `ctl tune` may raise: a closed list, so that nobody's word makes a path or a key.

Each is a whole number, and each may only be raised. Where a value comes from: `Tunable.place`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

#: The journal of what was changed, in the agent's directory. It is here since an idle agent imports this alone.
JOURNAL = "tuning"

Place = Literal["sysctl", "libvirt"]


class Tunable(NamedTuple):
    """One setting. `least` and `most` bound what it may be set to; `meaning` has the source of what it does.

    place "sysctl": the file of its name below /proc/sys; "libvirt": the daemon's own configuration.
    `default` is what holds where a file of configuration says nothing; None where the kernel always has a value.
    """

    key: str
    place: Place
    least: int
    most: int
    meaning: str
    default: int | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """A sysctl's file below /proc/sys, name by name."""
        return tuple(self.key.split("."))

    @property
    def option(self) -> str:
        """The name in libvirt's configuration."""
        return self.key.rpartition(".")[2]


_NEIGHBOURS = (
    "entries of the neighbour table {} (arp(7); Linux, Documentation/networking/ip-sysctl.rst, neigh/default/gc_thresh)"
)
_THRESHOLDS = {
    "gc_thresh1": "that are never collected",
    "gc_thresh2": "that may be there for 5 s",
    "gc_thresh3": "that may be there at all",
}
# An entry takes some 400 bytes of the kernel's memory: a slip of the finger is not to cost gigabytes.
_MOST_NEIGHBOURS = 1 << 20
# A watch takes up to 1080 bytes (inotify(7), NOTES).
_MOST_WATCHES = 1 << 22
_MOST_INSTANCES = 1 << 16
# A connection costs libvirtd some tens of KiB.
_MOST_CLIENTS = 100_000
# "A small fraction of max_workers", which is 20 by default (libvirtd.conf), and no more than all of a large machine's.
_MOST_REQUESTS = 1_000

#: The whole list, by key.
TUNABLES: dict[str, Tunable] = {
    tunable.key: tunable
    for tunable in (
        *(
            Tunable(f"net.{family}.neigh.default.{name}", "sysctl", 128, _MOST_NEIGHBOURS, _NEIGHBOURS.format(what))
            for family in ("ipv4", "ipv6")
            for name, what in _THRESHOLDS.items()
        ),
        Tunable(
            "fs.inotify.max_user_instances",
            "sysctl",
            128,
            _MOST_INSTANCES,
            "inotify instances of one user, root's services among them (inotify(7))",
        ),
        Tunable(
            "fs.inotify.max_user_watches",
            "sysctl",
            8_192,
            _MOST_WATCHES,
            "files that one user may watch by inotify (inotify(7))",
        ),
        Tunable(
            "net.ipv4.ip_forward",
            "sysctl",
            1,
            1,
            "whether the host passes packets on between its interfaces (ip(7))",
        ),
        Tunable(
            "libvirt.max_clients",
            "libvirt",
            1,
            _MOST_CLIENTS,
            "connections that libvirt's daemon takes at a time (libvirtd.conf)",
            5_000,
        ),
        Tunable(
            "libvirt.max_client_requests",
            "libvirt",
            1,
            _MOST_REQUESTS,
            "requests in flight on one connection, keepalive's included (libvirtd.conf)",
            5,
        ),
    )
}


def problems(settings: dict[str, int]) -> list[str]:
    """What is wrong with such settings: keys that are not on the list, values out of bounds. All at once."""
    found = []
    for key, value in settings.items():
        tunable = TUNABLES.get(key)
        if tunable is None:
            found.append(f"{key!r} is no setting that can be tuned")
        elif not tunable.least <= value <= tunable.most:
            found.append(f"{key} can be {tunable.least} to {tunable.most}, not {value}")
    return found
