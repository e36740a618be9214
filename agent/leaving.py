"""An agent's last acts on its host: systemd must not start it again, and after a purge nothing of it is left."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from agent import etchosts

_UNITS = Path("/etc/systemd/system")


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
