"""VMs from a plan, and their end: what `ctl spawn` and `ctl destroy` do, as functions over a Session.

Run again, both find what is there and do what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controller import api
from controller.session import Happening, Job, Result, Session, VmAnswer, VmReached
from controller.spawn_plan import Prepared
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol.outcomes import Outcome, describe, succeeded
from protocol.vms import VmChange, VmPower, VmResult

#: Watches a job to its end, and returns what happened; the first argument says what the job is for.
Watch = Callable[[str, Job], Sequence[Happening]]
#: How often the service is asked for states, in seconds. Agents report within a fraction of one.
_LOOK_EVERY = 0.2
#: And how long it may take to hear that VMs run which their hosts have started, in seconds: agents look every few.
_STARTED_WITHIN = 15.0
#: A VM in one of these runs.
_RUNNING = (VmPower.RUNNING, VmPower.BLOCKED)
#: What a VM is that is not as the file has it.
NOT_RIGHT = (VmChange.FAILED, VmChange.DIFFERS)


class Wait(StrEnum):
    """What `ctl spawn` waits for."""

    DEFINED = "defined"  # libvirt knows the VMs
    STARTED = "started"  # and their hosts say that those that shall run do
    REACHABLE = "reachable"  # and these answer ping from their hosts


@dataclass(frozen=True, kw_only=True)
class SpawnReport:
    """What came of it.

    `answers` are hosts' words on their VMs; `troubles` are hosts that gave none, with the reason. `not_running` and
    `unreachable` are VMs that the wait was in vain for. `unnamed` are hosts without the new name -> IP file.
    """

    answers: dict[str, tuple[VmResult, ...]]
    troubles: dict[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    not_running: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    unnamed: dict[str, str] = field(default_factory=dict)


def watch(_what: str, job: Job) -> Sequence[Happening]:
    """Wait for a job to end."""
    return list(job)


def spawn(
    session: Session,
    prepared: Prepared,
    *,
    wait: Wait = Wait.STARTED,
    timeout: float = 600.0,
    watch: Watch = watch,
) -> SpawnReport:
    """Bring images and VMs to their hosts, and names to all hosts. Raises CtlError where the service refuses.

    `timeout` in seconds is for making the VMs, and as much again for the wait. `watch` sees to each job until its end.
    """
    deployment = prepared.plan.deployment
    slices = dict(prepared.slices)
    troubles: dict[str, str] = {}
    outcomes: list[Outcome] = []

    def fail(results: Iterable[Happening], what: str) -> None:
        for result in results:
            if isinstance(result, Result) and not succeeded(result.outcome):
                outcomes.append(result.outcome)
                for host in result.hosts:
                    troubles[host] = f"{what}: {describe(result.outcome)}"
                    slices.pop(host, None)

    for path in prepared.images.values():
        if slices:
            what = f"push {path.name}"
            fail(watch(what, session.push(path, "", sorted(slices), image=True)), what)
    answers: dict[str, tuple[VmResult, ...]] = {}
    if slices:
        happened = watch("create VMs", session.create_vms(deployment, slices, timeout=timeout))
        fail(happened, "create VMs")
        answers = {answer.host: answer.results for answer in happened if isinstance(answer, VmAnswer)}
    unnamed = _send_names(session, watch)
    for host in slices:
        if host not in answers:
            troubles.setdefault(host, "create VMs: it said nothing of them")
    made = {result.name for results in answers.values() for result in results if result.change not in NOT_RIGHT}
    waited = [name for name in prepared.to_run if name in made]
    not_running: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    if wait is not Wait.DEFINED and waited:
        not_running = _wait_until_running(session, deployment, waited, time.monotonic() + min(timeout, _STARTED_WITHIN))
    if wait is Wait.REACHABLE and waited:
        happened = watch("ping VMs", session.probe_vms(deployment, waited, timeout=timeout))
        reached = {name for answer in happened if isinstance(answer, VmReached) for name in answer.names}
        unreachable = tuple(name for name in waited if name not in reached)
        outcomes += [result.outcome for result in happened if isinstance(result, Result)]
    return SpawnReport(
        answers=dict(sorted(answers.items())),
        troubles=dict(sorted(troubles.items())),
        outcomes=tuple(outcomes),
        not_running=not_running,
        unreachable=unreachable,
        unnamed=unnamed,
    )


def _send_names(session: Session, watch: Watch) -> dict[str, str]:
    """Bring the name -> IP file to all hosts; those that did not take it, with the reason."""
    happened = watch("send names", session.send_names())
    return {
        host: describe(result.outcome)
        for result in happened
        if isinstance(result, Result) and not result.ok
        for host in result.hosts
    }


def _wait_until_running(
    session: Session,
    deployment: str,
    names: Sequence[str],
    deadline: float,
) -> tuple[str, ...]:
    while True:
        states: Mapping[str, api.VmStatus] = {vm.name: vm for vm in session.status().vms if vm.deployment == deployment}
        left = tuple(name for name in names if not _runs(states.get(name)))
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(_LOOK_EVERY)


def _runs(vm: api.VmStatus | None) -> bool:
    return vm is not None and vm.state is not None and vm.state.power in _RUNNING


@dataclass(frozen=True, kw_only=True)
class DestroyReport:
    """What came of `ctl destroy`: hosts' words on their VMs, hosts that gave none, names that were not on record."""

    answers: dict[str, tuple[VmResult, ...]]
    troubles: dict[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    absent: tuple[str, ...] = ()
    unnamed: dict[str, str] = field(default_factory=dict)


def destroy(
    session: Session, doomed: Mapping[str, Sequence[str]], *, absent: Sequence[str] = (), watch: Watch = watch
) -> DestroyReport:
    """Remove VMs, named by deployment, with their disks; their addresses are free then. Raises CtlError."""
    answers: dict[str, tuple[VmResult, ...]] = {}
    troubles: dict[str, str] = {}
    outcomes: list[Outcome] = []
    for deployment, names in sorted(doomed.items()):
        for happening in watch("destroy VMs", session.destroy_vms(deployment, names)):
            if isinstance(happening, VmAnswer):
                answers[happening.host] = (*answers.get(happening.host, ()), *happening.results)
            elif isinstance(happening, Result) and not succeeded(happening.outcome):
                outcomes.append(happening.outcome)
                troubles |= dict.fromkeys(happening.hosts, describe(happening.outcome))
    return DestroyReport(
        answers=dict(sorted(answers.items())),
        troubles=dict(sorted(troubles.items())),
        outcomes=tuple(outcomes),
        absent=tuple(absent),
        unnamed=_send_names(session, watch) if doomed else {},
    )


def on_record(
    status: api.Status, names: Sequence[str], deployment: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """The named VMs by deployment, and the names of which none is on record.

    Raises CtlError (USAGE) for a name that several deployments have, where none was chosen.
    """
    owners: dict[str, list[str]] = {}
    for vm in status.vms:
        if deployment is None or vm.deployment == deployment:
            owners.setdefault(vm.name, []).append(vm.deployment)
    unclear = [name for name in names if len(owners.get(name, ())) > 1]
    if unclear:
        raise CtlError(f"several deployments have {some(unclear)}: choose one with --deployment", ExitStatus.USAGE)
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        for owner in owners.get(name, ()):
            found.setdefault(owner, []).append(name)
    return found, [name for name in dict.fromkeys(names) if name not in owners]
