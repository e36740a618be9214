"""What all work on a host's VMs shares, and how it says what became of one."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import dataclass

from agent import domains
from agent.hypervisor import HypervisorError
from agent.vmactions import CannotAct
from agent.vmfiles import VmFileError, VmFiles
from agent.vmlocks import Locks
from agent.vmrepair import Call, HalfDone, Repairs
from agent.vmwatch import VmWatch
from protocol.vms import VmChange, VmResult

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostVms:
    """One agent's VMs: `uri` is libvirt's, `owner` the agent's directory, by which its domains are marked."""

    uri: str
    owner: str
    files: VmFiles
    locks: Locks
    repairs: Repairs
    watch: VmWatch
    call: Call


class VmRefused(Exception):
    """One VM can't be had as asked; the text says why."""


#: Errors that say in a sentence what is the matter with one VM.
OWN_WORDS = (VmRefused, VmFileError, HypervisorError, domains.NotOurs, CannotAct, HalfDone)


async def outcome(name: str, work: Awaitable[VmResult]) -> VmResult:
    """The result of work on one VM, whatever becomes of it: nothing is raised for one VM's sake."""
    try:
        return await work
    except OWN_WORDS as error:
        return VmResult(name=name, change=VmChange.FAILED, detail=str(error))
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return VmResult(name=name, change=VmChange.FAILED, detail=detail)
    except Exception as error:
        _LOG.exception("VM %s", name)
        return VmResult(name=name, change=VmChange.FAILED, detail=f"{type(error).__name__}: {error}")
