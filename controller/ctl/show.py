"""`ctl status`, `tree`, `health` and `get`: what the service knows of the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from msgspec.structs import replace

from controller import tables
from controller.api import Status, VmStatus
from controller.ctl.commands import Commands
from controller.ctl.context import Ctl
from controller.ctl.following import Following
from controller.ctl.options import Json, ctl_of, selecting
from controller.foreign import Foreign, foreign
from controller.progress import waiting_line
from controller.render import clean, json_text
from controller.selection import EVERYBODY, Selection
from controller.session import Session
from controller.status import CtlError, ExitStatus

app = Commands()


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the fleet in a few lines: its service, hosts up and down with the reasons, VMs by state."""
    ctl = ctl_of(context)
    found = ctl.session().status()
    if as_json:
        ctl.terminal.text(json_text({**msgspec.to_builtins(found), "vms": tables.vm_objects(found)}))
    else:
        ctl.terminal.text(tables.summary(found))


@app.command()
def tree(context: typer.Context) -> None:
    """Show which host hangs below which, and why where that is not as planned."""
    ctl = ctl_of(context)
    ctl.terminal.text(tables.tree(ctl.session().status()))


@app.command()
def health(context: typer.Context, as_json: Json = False) -> None:
    """Show how hosts and VMs are.

    Hosts: load over 1 and 5 minutes, memory, disk, the agent's age and version. VMs: state, and since when. TOLD is how
    old the word of it is. What nobody can vouch for now is `unknown`, which is neither up nor down.
    """
    ctl = ctl_of(context)
    found = ctl.session().status()
    if as_json:
        ctl.terminal.text(json_text({"hosts": found.hosts, "vms": tables.vm_objects(found)}))
    else:
        ctl.terminal.text(tables.health(found))


class What(StrEnum):
    """What there is to get."""

    HOSTS = "hosts"
    VMS = "vms"
    IPS = "ips"
    MAP = "map"
    SITES = "sites"
    INFRA = "infra"
    GROUPS = "groups"


class Form(StrEnum):
    """How it is printed."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    NAME = "name"


@app.command(
    epilog="""\b
Examples:
  ctl get hosts
  ctl get vms -o json
  ctl get vms --all           domains that others made as well, which are never touched
  ctl get ips                 IP and name, in the form of /etc/hosts
  ctl get map                 the VMs of each host
  ctl get infra > now.conf    the running state in the form of an infra.conf (CPU in percent, memory in MiB)
  ctl get hosts -o wide -l rack=1
  ctl get groups              what can stand behind an @
  ctl get vms -o name --deployment infra"""
)
@selecting(without=("everybody",))
def get(
    *,
    context: typer.Context,
    what: Annotated[
        What,
        typer.Argument(metavar="WHAT", help="hosts, vms, ips, map (which VM is where), sites, infra (a file), groups."),
    ],
    form: Annotated[
        Form, typer.Option("-o", "--output", help="A table, a wide one, JSON, or bare names, one a line.")
    ] = Form.TABLE,
    deployment: Annotated[
        str | None, typer.Option("--deployment", metavar="NAME", help="Only the VMs of this deployment.")
    ] = None,
    foreign_too: Annotated[
        bool, typer.Option("--all", help="With vms: ask hosts, and list domains that Canopy did not make as well.")
    ] = False,
    every_host: Annotated[bool, typer.Option("-a", help="All hosts, which is the default.")] = False,
    selection: Selection = EVERYBODY,
    as_json: Json = False,
) -> None:
    """Print hosts, VMs, addresses, which VM is where, or groups of hosts."""
    ctl = ctl_of(context)
    if foreign_too and (what is not What.VMS or deployment is not None):
        raise CtlError("--all goes with `ctl get vms`, and not with --deployment", ExitStatus.USAGE)
    if what is What.GROUPS:
        _groups(ctl, as_json=as_json or form is Form.JSON)
        return
    session = ctl.session()
    asked = session.choose(replace(selection, everybody=every_host))
    found = session.status()
    if what is What.INFRA:
        from controller.infra import format_infra
        from controller.running_infra import running_infra

        infra = running_infra(found, session.infra(), deployment=deployment, hosts=asked)
        if as_json or form is Form.JSON:
            ctl.terminal.text(json_text(infra))
        else:
            bare = "".join(f"{vm.name}\n" for vm in infra.vms)
            ctl.terminal.text(bare if form is Form.NAME else format_infra(infra))
        return
    hosts = {host.name for host in found.hosts} | {vm.host for vm in found.vms} if asked is None else set(asked)
    chosen = [vm for vm in found.vms if deployment in (None, vm.deployment) and vm.host in hosts]
    chosen.sort(key=lambda vm: (vm.deployment, vm.name))
    found = msgspec.structs.replace(
        found, vms=tuple(chosen), hosts=tuple(host for host in found.hosts if host.name in hosts)
    )
    others, status = _others(ctl, session, asked) if foreign_too else ([], ExitStatus.OK)
    text, value, names = _found(what, found, others, wide=form is Form.WIDE)
    if as_json or form is Form.JSON:
        text = json_text(value)
    elif form is Form.NAME:
        text = "".join(f"{name}\n" for name in names)
    ctl.terminal.text(text)
    raise typer.Exit(status)


def _others(ctl: Ctl, session: Session, hosts: Sequence[str] | None) -> tuple[list[Foreign], int]:
    """The domains of hosts that are none of the fleet's VMs, and the exit code for hosts that did not say."""
    following = Following(session.domains(hosts), ctl.terminal)
    following.run(lambda: waiting_line(len(following.order), list(following.waiting), following.seconds))
    # Asked for after the hosts, so that a VM that was just made is on record.
    found, wrong = foreign(following.results, session.status())
    following.show_failures()
    for line in wrong:
        ctl.terminal.say(line, bad=True)
    return found, max(following.end(), ExitStatus.FAILED if wrong else ExitStatus.OK)


def _groups(ctl: Ctl, *, as_json: bool) -> None:
    names = ctl.session().groups()
    ctl.terminal.text(json_text(names) if as_json else "".join(f"@{name}\n" for name in names))


def _found(what: What, found: Status, others: Sequence[Foreign], *, wide: bool) -> tuple[str, Any, Sequence[str]]:
    """What was asked for as a table, for programs, and as names."""
    match what:
        case What.HOSTS:
            return (tables.wide if wide else tables.hosts)(found), found.hosts, [host.name for host in found.hosts]
        case What.VMS:
            every: list[VmStatus | Foreign] = [*found.vms, *others]
            text = (tables.wide_vms if wide else tables.vms)(found, others)
            return text, [*tables.vm_objects(found), *others], [clean(vm.name) for vm in every]
        case What.IPS:
            text = "".join(f"{vm.ip}\t{vm.name}\n" for vm in found.vms)
            return text, {vm.name: vm.ip for vm in found.vms}, [vm.ip for vm in found.vms]
        case What.MAP:
            placed = tables.placed(found)
            text = tables.table(("HOST", "VMS"), [(host, " ".join(vms)) for host, vms in placed.items()])
            return text, placed, [" ".join([host, *vms]) for host, vms in placed.items()]
        case What.SITES:
            sites = tables.by_site(found)
            return tables.sites(found), {site: [host.name for host in hosts] for site, hosts in sites.items()}, [*sites]
        case What.GROUPS | What.INFRA:
            raise TypeError(f"{what} is not of the service's status")
