"""`ctl spawn` and `ctl destroy`: the VMs of an infra.conf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from controller import api, render_vms
from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.following import Watcher
from controller.ctl.options import Json, Quiet, ctl_of, seconds
from controller.ctl.spawn_options import wanting
from controller.deployment import render_plan
from controller.plan_changes import changes, changes_object, render_changes
from controller.render import json_text
from controller.session import Session, exit_status
from controller.shares import at_a_time, share
from controller.spawn import NOT_RIGHT, DestroyReport, SpawnReport, Wait, on_record
from controller.spawn import destroy as destroy_vms
from controller.spawn import spawn as spawn_vms
from controller.spawn_plan import Prepared, SpawnOptions, deployment_name, in_network, load, prepare
from controller.status import CtlError, ExitStatus, Mistakes
from controller.terminal import Terminal
from protocol.limits import MAX_IN_FLIGHT

app = Commands()

Deployment = Annotated[
    str | None, typer.Option("--deployment", metavar="NAME", help="The deployment (default: the file's name).")
]
InfraFile = Annotated[Path, typer.Argument(metavar="INFRA.CONF", help="Nodes, VMs, and which VM runs where.")]

#: The exit code of a plan that has something to do, as `diff` and `terraform plan -detailed-exitcode` have it.
CHANGES = 2


@app.command(
    "spawn",
    cls=Gathering,
    epilog="""\b
Examples:
  ctl spawn infra.conf --kernel vmlinuz --initrd initrd.gz --cmdline console=ttyS0 \\
      --subnet 198.18.0.0/22 --bridge br0
  ctl spawn infra.conf --image debian.qcow2 --g5k-subnets subnets.txt --wait reachable
  ctl spawn infra.conf --profile lab.toml --subnet 10.0.0.0/16 --wave 5% --max-fail 2%
  ctl spawn infra.conf --image debian.qcow2 --subnet 10.0.0.0/16 --in-flight 16
  ctl spawn infra.conf --image debian.qcow2 --subnet 10.0.0.0/16 --dry-run""",
)
@wanting
def spawn(
    *,
    context: typer.Context,
    infra: InfraFile,
    wanted: SpawnOptions,
    wait: Annotated[
        Wait,
        typer.Option(
            help="defined: until hosts have made them; started: until they run; address: have their addresses; "
            "reachable: answer ping."
        ),
    ] = Wait.STARTED,
    timeout: Annotated[
        float,
        typer.Option(
            callback=seconds, metavar="SECONDS", min=1, max=86_400, help="For making them, and again for the wait."
        ),
    ] = 600.0,
    wave: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Make so many VMs at a time, and wait: 5% (rounded down, 1 at least) or a number.",
        ),
    ] = None,
    max_fail: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Begin no more waves where more have failed: 2% (rounded down) or a number."
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_IN_FLIGHT,
            help="So many VMs at a time on each host (default: 4; more made nothing faster on 2 cores).",
        ),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove VMs on record that the file lacks.")] = False,
    etc_hosts: Annotated[
        bool | None,
        typer.Option("--etc-hosts/--no-etc-hosts", help="Keep the names in hosts' /etc/hosts too, from now on."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Boot the VMs of an infra.conf.

    The file is checked whole before anything happens. Kernels and images go to the hosts that need them; each VM gets
    an address, which it keeps, and the list of names and addresses goes to all hosts. Run it again at any time: what
    is there stays, what is missing is made, and what differs is told and left as it is. `ctl plan` tells beforehand.
    """
    wrong = mistakes_of(context)
    # Of how many, is known once the file is read: here it is looked at how they are written.
    with wrong:
        at_a_time("--wave", wave or "1", 1)
    with wrong:
        share("--max-fail", max_fail or "0", 1)
    _check_input(infra, wanted, wrong)
    ctl = ctl_of(context)
    terminal = ctl.terminal
    with ctl.session() as session:
        looked = look(session, infra, wanted, terminal, dry_run=dry_run)
        looked.check_wait(wait)
        prepared = looked.prepared
        name = prepared.plan.deployment
        if dry_run:
            terminal.text(json_text(prepared.plan) if as_json else render_plan(prepared.plan))
            raise typer.Exit
        if not as_json:
            _say_plan(prepared, terminal)
        total = sum(len(specs) for specs in prepared.slices.values())
        size = None if wave is None else at_a_time("--wave", wave, total)
        most = share("--max-fail", max_fail or "0", total)
        watch = Watcher(terminal, quiet=quiet)
        if prune and prepared.others:
            removed = destroy_vms(session, {name: prepared.others}, watch=watch)
            for line in (*render_vms.by_reason(removed.troubles), *render_vms.not_right(removed.answers)):
                terminal.say(line, bad=True)
        report = spawn_vms(
            session,
            prepared,
            wait=wait,
            timeout=timeout,
            wave=size,
            max_fail=None if max_fail is None else most,
            in_flight=in_flight,
            in_etc_hosts=etc_hosts,
            watch=watch,
        )
        status = session.status()
        left = session.deployment(name).hosts if prune else prepared.others
        others = [one for one in prepared.others if one in left]
        names = render_vms.names_paths(status, str(session.directory))
    if as_json:
        terminal.text(json_text(render_vms.spawn_object(name, report, prepared.addresses.by_name, names)))
    else:
        for line in render_vms.per_host(report.answers):
            terminal.text(f"{line}\n")
        terminal.text(f"{render_vms.total(name, report.answers)}\n")
        terminal.text(f"names and addresses, on every host: {', '.join(names)}\n")
    for line in render_vms.spawn_troubles(report, others):
        terminal.say(line, bad=True)
    for line in render_vms.held(prepared.held):
        terminal.say(line, bad=True)
    raise typer.Exit(_spawn_status(report) or (ExitStatus.UNREACHABLE if prepared.held else ExitStatus.OK))


@app.command(
    "plan",
    cls=Gathering,
    epilog="""\b
Examples:
  ctl plan infra.conf --image debian.qcow2 --subnet 10.0.0.0/16
  ctl plan infra.conf --profile lab.toml --subnet 10.0.0.0/16 --json
Exit codes: 0 nothing to do, 2 something to do, or wrong usage (which standard error tells).""",
)
@wanting
def plan(
    *,
    context: typer.Context,
    infra: InfraFile,
    wanted: SpawnOptions,
    as_json: Json = False,
) -> None:
    """Show what `ctl spawn` with the same options would do, and change nothing.

    + is made, ~ differs (or is off, and would be started), - is on record and not in the file: `ctl spawn --prune`
    removes it.
    """
    _check_input(infra, wanted, mistakes_of(context))
    ctl = ctl_of(context)
    with ctl.session() as session:
        looked = look(session, infra, wanted, ctl.terminal, dry_run=True, digest=True)
    found = changes(looked.prepared, looked.status, looked.known)
    ctl.terminal.text(json_text(changes_object(found)) if as_json else render_changes(found))
    raise typer.Exit(CHANGES if found.changes else ExitStatus.OK)


def _check_input(infra: Path, wanted: SpawnOptions, wrong: Mistakes) -> None:
    """Raise CtlError with what is wrong already, and what is wrong with the file where anything is: it is read again
    otherwise."""
    with wrong:
        deployment_name(infra, wanted.deployment or None)
    if wrong:
        with wrong:
            load(infra)
    wrong.check()


@dataclass(frozen=True)
class Looked:
    """A file, as it would be made now."""

    prepared: Prepared
    status: api.Status | None
    known: api.Deployment | None
    nets: Sequence[api.NetStatus]

    def check_wait(self, wait: Wait) -> None:
        """Raises CtlError where hosts can't ping VMs that they are to wait for."""
        apart = {net.bridge: net.name for net in self.nets if net.isolated}
        blind = {
            apart[spec.network.bridge]
            for specs in self.prepared.slices.values()
            for spec in specs
            if spec.start and spec.network.bridge in apart
        }
        if wait is Wait.REACHABLE and blind:
            raise CtlError(
                f"no host is in an isolated network ({', '.join(sorted(blind))}) to ping its VMs from: "
                "wait for `address` instead",
                ExitStatus.USAGE,
            )


def look(
    session: Session, infra: Path, wanted: SpawnOptions, terminal: Terminal, *, dry_run: bool, digest: bool = False
) -> Looked:
    """Read a file, ask the service what there is, and decide. Raises CtlError."""
    name = deployment_name(infra, wanted.deployment or None)
    parsed, warnings = load(infra)
    status, known, images, nets = _known(session, name, terminal, dry_run=dry_run)
    options = in_network(replace(wanted, deployment=name), nets or ())
    prepared = prepare(
        parsed,
        options,
        status=status,
        known=known,
        warnings=warnings,
        digest=digest or not dry_run,
        images=images,
        nets=nets,
        cache=session.directory / "digests.json",
    )
    return Looked(prepared, status, known, nets or ())


def _known(
    session: Session, deployment: str, terminal: Terminal, *, dry_run: bool
) -> tuple[api.Status | None, api.Deployment | None, Sequence[api.KnownImage], Sequence[api.NetStatus] | None]:
    """What the service knows. A plan can be shown without it."""
    try:
        return session.status(), session.deployment(deployment), session.images(), session.nets()
    except CtlError as error:
        if not dry_run or error.status != ExitStatus.NO_SERVICE:
            raise
        terminal.say("no service runs: hosts are not looked at, and addresses are given as if there were no VM yet")
        return None, None, (), None


def _say_plan(prepared: Prepared, terminal: Terminal) -> None:
    plan = prepared.plan
    guessed = " (guessed from the largest node; --memory-unit sets it)" if plan.unit_was_auto else ""
    terminal.say(f"memory in {plan.memory_unit.value}{guessed}")
    for warning in plan.warnings:
        terminal.say(warning)


def _spawn_status(report: SpawnReport) -> int:
    status = exit_status(report.outcomes)
    if status:
        return status
    if report.unreachable:
        return ExitStatus.UNREACHABLE
    return (
        ExitStatus.FAILED
        if report.troubles or report.not_running or report.not_begun or _any_not_right(report)
        else ExitStatus.OK
    )


def _any_not_right(report: SpawnReport | DestroyReport) -> bool:
    return any(result.change in NOT_RIGHT for results in report.answers.values() for result in results)


@app.command(
    "destroy",
    epilog="""\b
Examples:
  ctl destroy infra.conf
  ctl destroy vm00 vm07
  ctl destroy --deployment infra --all""",
)
def destroy(
    *,
    context: typer.Context,
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="INFRA.CONF|NAME...", help="A file, or names of VMs.")
    ] = None,
    deployment: Deployment = None,
    everything: Annotated[bool, typer.Option("--all", help="All VMs of --deployment.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove VMs with their disks, and free their addresses.

    Of an infra.conf, those of its VMs that are there; run again, it finds nothing to do.
    """
    ctl = ctl_of(context)
    terminal = ctl.terminal
    with ctl.session() as session:
        doomed, absent = _doomed(session.status(), targets or [], deployment, everything=everything)
        report = destroy_vms(session, doomed, absent=absent, watch=Watcher(terminal, quiet=quiet))
    if as_json:
        terminal.text(json_text(render_vms.destroy_object(report)))
    else:
        for line in render_vms.per_host(report.answers):
            terminal.text(f"{line}\n")
        total = render_vms.total(", ".join(doomed), report.answers)
        terminal.text(f"{total if doomed else 'nothing to remove: none of these VMs is on record'}\n")
    troubles = [*render_vms.by_reason(report.troubles), *render_vms.not_right(report.answers)]
    troubles += [f"without the names file: {line}" for line in render_vms.by_reason(report.unnamed)]
    for line in troubles:
        terminal.say(line, bad=True)
    failed = report.troubles or _any_not_right(report)
    raise typer.Exit(exit_status(report.outcomes) or (ExitStatus.FAILED if failed else ExitStatus.OK))


def _doomed(
    status: api.Status, targets: Sequence[str], deployment: str | None, *, everything: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The VMs that are meant, by deployment, and names of a file that are not on record."""
    if everything:
        if deployment is None or targets:
            raise CtlError("--all goes with --deployment NAME and no names", ExitStatus.USAGE)
        names = [vm.name for vm in status.vms if vm.deployment == deployment]
        if not names:
            raise CtlError(f"no VM of {deployment} is on record: `ctl get vms` lists all", ExitStatus.NO_TARGET)
        return {deployment: names}, []
    if not targets:
        raise CtlError("which VMs? Give an infra.conf, names, or --deployment NAME --all", ExitStatus.USAGE)
    path = Path(targets[0])
    if len(targets) == 1 and path.is_file() and all(vm.name != targets[0] for vm in status.vms):
        infra, _ = load(path)
        return on_record(status, [vm.name for vm in infra.vms], deployment_name(path, deployment))
    found, absent = on_record(status, targets, deployment)
    if absent:
        raise CtlError(f"not on record: {', '.join(absent)}; `ctl get vms` lists all", ExitStatus.NO_TARGET)
    return found, []
