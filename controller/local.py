"""A fleet of agent processes on this machine, for a first look: no SSH, no root."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.identity import HostDirectory, is_running, write_atomically
from agent.keyring import to_text
from agent.version import VERSION
from controller import api
from controller.launch import disown, ensure_service, last_line, start_detached
from controller.session import Session

_LOOPBACK = "127.0.0.1"
#: What an agent may take from its start to its place in the tree, in seconds, for each that is started beside it:
#: imports are what costs, about 0.1 s of a core each.
_WITHIN_FIRST, _WITHIN_EACH = 20.0, 0.5


def local_up(
    fleet: str | None,
    names: Sequence[str],
    fanout: int,
    *,
    site_of: Callable[[str], str] = lambda _: "",
    libvirt: str | None = None,
) -> dict[str, str]:
    """Start agents with these names where they do not run yet. Returns those that did not come up, and why.

    `libvirt` is the URI that each agent uses, in which `{dir}` stands for the agent's directory; by default each has a
    hypervisor of its own, which needs no daemon and no root. Raises CtlError.
    """
    session = ensure_service(fleet, listen=_LOOPBACK, advertised=_LOOPBACK)
    session.begin(len(names), fanout)
    members = {host.name: host.up for host in session.status().hosts}
    started = []
    for name in names:
        directory = HostDirectory(host_directory(session, name))
        if members.get(name) and is_running(directory.path):
            continue
        _start(session, name, directory, site_of(name), libvirt)
        started.append(name)
    missing = session.wait_for(names, _WITHIN_FIRST + _WITHIN_EACH * len(started))
    return {name: f"{why}; {last_line(host_directory(session, name) / 'agent.log')}" for name, why in missing.items()}


def host_directory(session: Session, name: str) -> Path:
    """Where the local agent of that name lives."""
    return session.directory / "hosts" / name


def hypervisor_directory(session: Session, name: str) -> Path:
    """Where libvirt keeps the VMs of a local agent: a short path, for sockets below it may have 107 bytes (unix(7))."""
    return session.directory / "v" / hashlib.sha256(name.encode()).hexdigest()[:6]


def _start(session: Session, name: str, directory: HostDirectory, site: str, libvirt: str | None) -> None:
    identity = directory.enrol(_LOOPBACK)
    welcome = session.enrol(
        api.Enrol(
            name=name,
            site=site,
            key=to_text(identity.public),
            address=_LOOPBACK,
            control_port=identity.control_port,
            bulk_port=identity.bulk_port,
            digest=f"local-{VERSION}",
            facts={"local": "yes", "python": f"{sys.version_info.major}.{sys.version_info.minor}"},
        )
    )
    write_atomically(directory.path / "welcome", welcome)
    argv = [sys.executable, "-m", "agent", "run", "--dir", str(directory.path)]
    uri = libvirt or f"qemu:///embed?root={hypervisor_directory(session, name)}"
    argv += ["--libvirt", uri.replace("{dir}", str(directory.path))]
    disown(start_detached(argv, directory.path / "agent.log", {"CANOPY_HOST": name}))


def wait_until_gone(session: Session, names: Sequence[str], within: float) -> list[str]:
    """Wait until the local agents of these names have ended; those that have not after `within` seconds."""
    deadline = time.monotonic() + within
    left = list(names)
    while left and time.monotonic() < deadline:
        left = [name for name in left if is_running(host_directory(session, name))]
        time.sleep(0.02)
    return left
