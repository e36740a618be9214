"""`ctl vm`: one VM made without an infra.conf, and what can be done to VMs that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from controller import render_vms
from controller.ctl.commands import Commands
from controller.ctl.following import Watcher
from controller.ctl.options import Json, Quiet, ctl_of, seconds, selecting
from controller.profile import Settings, size_mib
from controller.render import json_text
from controller.selection import EVERYBODY, Selection
from controller.session import Session, exit_status
from controller.single import single
from controller.spawn import NOT_RIGHT, DestroyReport, SpawnReport, Wait, act, destroy, spawn
from controller.spawn_plan import deployment_name
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from controller.vm_sets import pick
from protocol.vms import Action, VmChange

app = Commands()
vm = Commands(
    name="vm",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="VMs by name: make one, and start, stop, reboot, suspend, resume, snapshot or destroy those that are there.",
    epilog="""\b
Examples:
  ctl vm create web0 --host hv7 --ip 10.0.0.5/16 --mem 2G --vcpus 2 --image debian.qcow2 --bridge br0
  ctl vm stop 'vm[00-31]'
  ctl vm reboot 'web-*' --hard
  ctl vm suspend -w hv[0-3]
  ctl vm snapshot db0 --name before-upgrade
  ctl vm destroy web0
  ctl vm destroy --forget 'vm*' -w hv9   VMs of a host that is gone: their addresses are free""",
)
app.add_typer(vm)


@app.callback()
def _no_command_of_its_own() -> None:
    """Keeps `vm` a group, also while it is the only one here."""


Vms = Annotated[list[str] | None, typer.Argument(metavar="VM...", help="Names, ranges or wildcards: vm[00-12], web-*.")]
Deployment = Annotated[str | None, typer.Option("--deployment", metavar="NAME", help="Only VMs of this deployment.")]
AllVms = Annotated[bool, typer.Option("--all-vms", help="All VMs of --deployment.")]
Timeout = Annotated[
    float, typer.Option(callback=seconds, metavar="SECONDS", min=1, max=86_400, help="How long hosts may take.")
]
Hard = Annotated[bool, typer.Option("--hard", help="At once, without asking the guest.")]


@vm.command("create")
def create(
    *,
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The VM's name, and its host name.")],
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="The host that it is made on.")],
    ip: Annotated[str, typer.Option("--ip", metavar="IP/PREFIX", help="Its address, as 10.0.0.5/16.")],
    mem: Annotated[str, typer.Option("--mem", metavar="SIZE", help="Its memory, as 512M or 2G.")],
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=4096, help="How many CPUs it has.")] = 1,
    id_: Annotated[
        str | None, typer.Option("--id", metavar="UUID", help="Its UUID (default: made of deployment and name).")
    ] = None,
    deployment: Annotated[str, typer.Option("--deployment", metavar="NAME", help="The deployment it is in.")] = "vms",
    kernel: Annotated[Path | None, typer.Option(metavar="FILE", help="Boot this kernel directly.")] = None,
    initrd: Annotated[Path | None, typer.Option(metavar="FILE", help="The kernel's initial RAM disk.")] = None,
    cmdline: Annotated[str, typer.Option(metavar="TEXT", help="Its command line; ip= is added.")] = "",
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A base disk: a file or an image's name.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="The disk's size, like 10G.")] = None,
    user_data: Annotated[Path | None, typer.Option(metavar="FILE", help="cloud-init user data.")] = None,
    ssh_keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Public keys that may log in.")] = None,
    bridge: Annotated[str | None, typer.Option(metavar="BRIDGE", help="A bridge on the host.")] = None,
    gateway: Annotated[str | None, typer.Option(metavar="IP", help="The VM's gateway.")] = None,
    wait: Annotated[Wait, typer.Option(help="What to wait for, as `ctl spawn` has it.")] = Wait.STARTED,
    timeout: Timeout = 600.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one VM on one host. Run again, it finds it there."""
    ctl = ctl_of(context)
    deployment_name(Path(), deployment)
    texts = {"kernel": kernel, "initrd": initrd, "image": image, "user_data": user_data, "ssh_keys": ssh_keys}
    if kernel is None and (initrd is not None or cmdline):
        raise CtlError("--initrd and --cmdline go with --kernel; an image has its own", ExitStatus.USAGE)
    settings = Settings(
        **{key: str(path) for key, path in texts.items() if path is not None},
        cmdline=cmdline if kernel is not None else None,
        bridge=bridge,
        disk_mib=None if disk is None else _size("--disk", disk),
    )
    with ctl.session() as session:
        prepared = single(
            name,
            deployment=deployment,
            host=host,
            address=ip,
            vcpus=vcpus,
            memory_mib=_size("--mem", mem),
            settings=settings,
            status=session.status(),
            known=session.deployment(deployment),
            images=session.images(),
            gateway=gateway,
            uuid=id_,
            cache=session.directory / "digests.json",
        )
        report = spawn(session, prepared, wait=wait, timeout=timeout, watch=Watcher(ctl.terminal, quiet=quiet))
    if as_json:
        ctl.terminal.text(json_text(render_vms.spawn_object(deployment, report, prepared.addresses.by_name, ())))
    else:
        _lines(ctl.terminal, render_vms.per_host(report.answers))
    for line in render_vms.spawn_troubles(report, ()):
        ctl.terminal.say(line, bad=True)
    raise typer.Exit(_status(report, bad=bool(report.not_running or report.unreachable)))


def _size(option: str, text: str) -> int:
    size = size_mib(text)
    if size is None:
        raise CtlError(f"{option} {text}: give a size like 10G or 512M, up to 1024T", ExitStatus.USAGE)
    return size


def _lines(terminal: Terminal, lines: list[str]) -> None:
    for line in lines:
        terminal.text(f"{line}\n")


def _status(report: SpawnReport | DestroyReport, *, bad: bool = False) -> int:
    wrong = any(one.change in (*NOT_RIGHT, VmChange.ABSENT) for results in report.answers.values() for one in results)
    return exit_status(report.outcomes) or (ExitStatus.FAILED if report.troubles or wrong or bad else ExitStatus.OK)


def _picked(
    session: Session, names: list[str] | None, selection: Selection, deployment: str | None, *, everything: bool
) -> dict[str, list[str]]:
    hosts = session.choose(selection)
    return pick(session.status().vms, names or (), deployment=deployment, hosts=hosts, everything=everything)


def _command(action: Action, text: str, **options: Any) -> None:
    """`ctl vm ACTION`, with `hard` or `label` where the action has them."""

    @selecting()
    def command(
        *,
        context: typer.Context,
        names: Vms = None,
        selection: Selection = EVERYBODY,
        deployment: Deployment = None,
        all_vms: AllVms = False,
        hard: bool = False,
        label: str | None = None,
        timeout: Timeout = 600.0,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        ctl = ctl_of(context)
        with ctl.session() as session:
            meant = _picked(session, names, selection, deployment, everything=all_vms)
            watch = Watcher(ctl.terminal, quiet=quiet)
            report = act(session, meant, action, hard=hard, label=label, timeout=timeout, watch=watch)
        _told(ctl.terminal, report, ", ".join(meant), as_json=as_json)
        raise typer.Exit(_status(report))

    command.__doc__ = text
    _without(command, {"hard", "label"} - set(options), options)
    vm.command(action.value, help=text)(command)


def _without(command: Callable[..., None], names: set[str], options: dict[str, Any]) -> None:
    """Take parameters off a command's signature, which keep their defaults, and give others their annotations."""
    import inspect

    signature = inspect.signature(command)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]  # typer reads it
        parameters=[
            parameter.replace(annotation=options.get(name, parameter.annotation))
            for name, parameter in signature.parameters.items()
            if name not in names
        ]
    )


def _told(terminal: Terminal, report: DestroyReport, deployments: str, *, as_json: bool) -> None:
    if as_json:
        terminal.text(json_text(render_vms.destroy_object(report)))
    else:
        _lines(terminal, [*render_vms.per_host(report.answers), render_vms.total(deployments, report.answers)])
    for line in (*render_vms.by_reason(report.troubles), *render_vms.not_right(report.answers)):
        terminal.say(line, bad=True)


_command(Action.START, "Start VMs that are off.")
_command(Action.STOP, "Stop VMs: their guests are asked to shut down.", hard=Hard)
_command(Action.REBOOT, "Reboot VMs: their guests are asked to.", hard=Hard)
_command(Action.SUSPEND, "Halt VMs where they are; they keep their memory.")
_command(Action.RESUME, "Have suspended VMs go on.")
_command(
    Action.SNAPSHOT,
    "Take a snapshot of VMs.",
    label=Annotated[str | None, typer.Option("--name", metavar="NAME", help="The snapshot's name.")],
)


@vm.command("destroy")
@selecting()
def destroy_(
    *,
    context: typer.Context,
    names: Vms = None,
    selection: Selection = EVERYBODY,
    deployment: Deployment = None,
    all_vms: AllVms = False,
    forget: Annotated[
        bool,
        typer.Option("--forget", help="Of hosts that are down: free the addresses now; removed when the host is back."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove VMs with their disks, and free their addresses."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        meant = _picked(session, names, selection, deployment, everything=all_vms)
        if forget:
            for one, vms in meant.items():
                session.disown_vms(one, vms)
            count = sum(map(len, meant.values()))
            ctl.terminal.text(f"forgotten: {count}; removed from their hosts if these come back\n")
            raise typer.Exit
        report = destroy(session, meant, watch=Watcher(ctl.terminal, quiet=quiet))
    _told(ctl.terminal, report, ", ".join(meant), as_json=as_json)
    raise typer.Exit(_status(report))
