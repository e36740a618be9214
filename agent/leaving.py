"""An agent's last acts on its host: systemd must not start it again, and after a purge nothing of it is left."""

from __future__ import annotations

import asyncio
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
#: How long an agent may take to let go of a part of what it has, in seconds: a little longer than a push waits for its
#: disk (agent/incoming.py).
LET_GO_WITHIN = 11.0
#: To put the host's networks or settings back, and to destroy VMs, some perhaps of a QEMU that hangs, which takes
#: libvirt 8 s.
PUT_BACK_WITHIN, DESTROY_WITHIN = 30.0, 600.0
#: For what is still written when all parts have come to their end. On a signal the seed kills an agent after 15 s, and
#: systemd after 20 (agent/seed.py).
LAST_WITHIN = 2.0
#: How long `leave` may take after that, in seconds: `systemctl` waits for a systemd that reads its units anew, and a
#: purge removes images of many gigabytes.
_THEN = 60.0


def granted(leave: Leave | None) -> float:
    """How long an agent that ends may take to let go of all, in seconds: all parts at the same time, but for what takes
    the end of VMs. `leave` is None where a signal ends it."""
    if leave is None:
        return LET_GO_WITHIN + LAST_WITHIN
    return (DESTROY_WITHIN if leave.vms else 0.0) + LET_GO_WITHIN + PUT_BACK_WITHIN + LAST_WITHIN


def extension(leave: Leave | None) -> float:
    """What systemd must be asked for so that it does not kill an agent that leaves, and start it again, before its unit
    is disabled, in seconds; 0 where what the unit grants is enough."""
    return 0.0 if leave is None else granted(leave) + _THEN


class NotEnded(Exception):
    """A part of an agent's work can't be brought to its end; the text says why."""


class Ending:
    """An agent's work as it is brought to its end: what fails or hangs holds up no other part, and is told."""

    def __init__(self) -> None:
        #: What did not come to its end and why, a sentence each.
        self.left: list[str] = []

    async def part(self, what: str, work: Awaitable[object], seconds: float) -> None:
        """Bring a part to its end, or give it up after `seconds`. Raises nothing of its."""
        from agent.lanes import within  # an agent without VMs has no use for it until then

        try:
            await within(seconds, work)
        except asyncio.TimeoutError:
            self._tell(f"{what}: not ended within {seconds:g} s")
        except NotEnded as error:
            self._tell(f"{what}: {error}")
        except Exception as error:
            self._tell(f"{what}: {type(error).__name__}: {error}")

    def _tell(self, sentence: str) -> None:
        log.warning("left as it is: %s", sentence)
        self.left.append(sentence)


def unit_name(fleet: str) -> str:
    """The systemd unit of this fleet's agent, as the seed names it."""
    return f"canopy-agent-{fleet}.service"


def leave(fleet: str, directory: Path, *, purge: bool, units: Path = _UNITS) -> None:
    """Take the agent's unit out of systemd, where there is one, and with `purge` remove its whole directory, this code
    included. VMs that are still there keep it: it has their disks."""
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
        if any((directory / "vms").glob("*")):
            log.warning("VMs are left, and %s with their disks", directory)
            return
        shutil.rmtree(directory, ignore_errors=True)
        if directory.parent.name in ("canopy", ".canopy"):
            with suppress(OSError):  # another fleet's agent has its directory there
                directory.parent.rmdir()


def _systemctl(*arguments: str) -> None:
    with suppress(OSError):
        subprocess.run(("systemctl", *arguments), stdin=subprocess.DEVNULL, capture_output=True, check=False)
