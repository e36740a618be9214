"""A hypervisor inside the agent, for hosts without libvirtd and users without root: qemu:///embed?root=DIRECTORY.

libvirt's QEMU driver runs in this process then (https://libvirt.org/drvqemu.html#embedded-driver). QEMU itself is a
process of its own and goes on when this one ends; the next process that opens the directory finds its VMs running.
One process at a time can have a directory open, and a process can have one directory open in its life.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from agent.vmfiles import closed_to, qemu_user

# sun_path less its NUL (unix(7)), and the longest name that libvirt gives a socket: names are cut to 20 characters.
_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = f"/lib/qemu/domain-99999-{20 * 'x'}/monitor.sock"

# By default consoles go through virtlogd, a daemon that may not run.
_SETTINGS = 'stdio_handler = "file"\n'
_AS_ROOT = """\
# This directory is where no user but root may go, so QEMU can be no other.
user = "root"
group = "root"
dynamic_ownership = 0
"""


class EmbeddedError(Exception):
    """There can be no hypervisor in that directory; the text says why and what to do."""


def embedded_root(uri: str) -> str | None:
    """The directory of an embedded hypervisor's URI, empty where it names none; None for any other URI."""
    parts = urlsplit(uri)
    if parts.scheme != "qemu" or parts.path != "/embed":
        return None
    return parse_qs(parts.query).get("root", [""])[0]


def embedded_settings(uri: str) -> str | None:
    """Where the settings of QEMU are for an embedded hypervisor; None for any other URI."""
    root = embedded_root(uri)
    return None if root is None else os.path.join(root, "etc", "qemu.conf")


def prepare_embedded(uri: str) -> None:
    """Make the directory of an embedded hypervisor, so that it needs no other daemon; nothing for any other URI.

    Settings that are there stay. Raises EmbeddedError.
    """
    root, settings = embedded_root(uri), embedded_settings(uri)
    if root is None or settings is None:
        return
    if not os.path.isabs(root):
        raise EmbeddedError(f"{uri} names no absolute directory; write qemu:///embed?root=/some/directory")
    spare = _SOCKET_PATH_BYTES - len(os.fsencode(root)) - len(_LONGEST_SOCKET)
    if spare < 0:
        raise EmbeddedError(
            f"{root} is {-spare} bytes too long for libvirt's sockets below it; choose a directory with a shorter path"
        )
    try:
        os.makedirs(os.path.dirname(settings), mode=0o711, exist_ok=True)
        if os.path.exists(settings):
            return
        user = qemu_user() if os.geteuid() == 0 else None
        closed = user is not None and closed_to(user, Path(root)) is not None
        with open(settings, "w", encoding="ascii") as file:
            file.write(_SETTINGS + (_AS_ROOT if closed else ""))
    except OSError as error:
        raise EmbeddedError(f"{root} can't hold an embedded hypervisor: {error.strerror}") from error
