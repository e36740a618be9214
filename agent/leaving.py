"""An agent's last acts on its host: systemd must not start it again, and after a purge nothing of it is left."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from agent import etchosts
from protocol.commands import Leave

log = logging.getLogger("canopy")

_UNITS = Path("/etc/systemd/system")
#: How long an agent may take to let go of all that it has, in seconds. On a signal: the seed kills it after 15 s, and
#: systemd after 20 (agent/seed.py). On a Leave, which may put the host's networks and settings back, and where its VMs
#: go with it, some of them perhaps by a QEMU that hangs, which takes libvirt 8 s: systemd is asked for the time.
_CLOSE_WITHIN, _LEAVE_WITHIN, _DESTROY_WITHIN = 12.0, 30.0, 600.0
#: How long `leave` may take after that, in seconds: `systemctl` waits for a systemd that reads its units anew, and a
#: purge removes images of many gigabytes.
_THEN = 60.0


def granted(leave: Leave | None) -> float:
    """How long an agent that ends may take to let go, in seconds; `leave` is None where a signal ends it."""
    if leave is None:
        return _CLOSE_WITHIN
    return _DESTROY_WITHIN if leave.vms else _LEAVE_WITHIN


def extension(leave: Leave | None) -> float:
    """What systemd must be asked for so that it does not kill an agent that leaves, and start it again, before its unit
    is disabled, in seconds; 0 where what the unit grants is enough."""
    return 0.0 if leave is None else granted(leave) + _THEN


async def let_go(closing: Awaitable[None], seconds: float) -> None:
    """Wait until an agent has let go of all that it has. What fails at that, or takes longer than `seconds`, does not
    keep it from leaving."""
    from agent.lanes import within  # an agent without VMs has no use for it until then

    try:
        await within(seconds, closing)
    except Exception as error:
        log.warning("not all came to its end: %s: %s", type(error).__name__, error)


def unit_name(fleet: str) -> str:
    """The systemd unit of this fleet's agent, as the seed names it."""
    return f"canopy-agent-{fleet}.service"


def leave(fleet: str, directory: Path, *, purge: bool, units: Path = _UNITS) -> None:
    """Take the agent's unit out of systemd, where there is one, and with `purge` remove its whole directory, this code
    included."""
    unit = units / unit_name(fleet)
    if unit.exists():
        _systemctl("disable", unit.name)
        if purge:
            unit.unlink(missing_ok=True)
            _systemctl("daemon-reload")
        # Does not wait: it is this very process that systemd ends, and Restart= must not bring it back.
        _systemctl("stop", "--no-block", unit.name)
    if purge:
        with suppress(etchosts.EtcHostsError):  # who may not change it now has never changed it
            etchosts.leave(fleet)
        shutil.rmtree(directory, ignore_errors=True)
        if directory.parent.name in ("canopy", ".canopy"):
            with suppress(OSError):  # another fleet's agent has its directory there
                directory.parent.rmdir()


def _systemctl(*arguments: str) -> None:
    with suppress(OSError):
        subprocess.run(("systemctl", *arguments), stdin=subprocess.DEVNULL, capture_output=True, check=False)
