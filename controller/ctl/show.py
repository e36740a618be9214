"""`ctl status`, `tree`, `health` and `get`: what the service knows of the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer

from controller import tables
from controller.api import Status
from controller.ctl.options import Json, ctl_of
from controller.render import json_text

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the fleet in a few lines: its service, hosts up and down with the reasons, VMs by state."""
    ctl = ctl_of(context)
    found = ctl.session().status()
    ctl.terminal.text(json_text(found) if as_json else tables.summary(found))


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
        up = {host.name for host in found.hosts if host.up}
        vms = [{**msgspec.to_builtins(vm), "power": tables.vm_state(vm, host_up=vm.host in up)} for vm in found.vms]
        ctl.terminal.text(json_text({"hosts": found.hosts, "vms": vms}))
    else:
        ctl.terminal.text(tables.health(found))


class What(StrEnum):
    """What there is to get."""

    HOSTS = "hosts"
    VMS = "vms"
    IPS = "ips"
    MAP = "map"


class Form(StrEnum):
    """How it is printed."""

    TABLE = "table"
    JSON = "json"
    NAME = "name"


@app.command(
    epilog="""\b
Examples:
  ctl get hosts
  ctl get vms -o json
  ctl get ips                 IP and name, in the form of /etc/hosts
  ctl get map                 the VMs of each host
  ctl get vms -o name --deployment infra"""
)
def get(
    context: typer.Context,
    what: Annotated[What, typer.Argument(metavar="WHAT", help="hosts, vms, ips (of VMs) or map (which VM is where).")],
    form: Annotated[
        Form, typer.Option("-o", "--output", help="A table, JSON, or bare names, one a line.")
    ] = Form.TABLE,
    deployment: Annotated[
        str | None, typer.Option("--deployment", metavar="NAME", help="Only the VMs of this deployment.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print hosts, VMs, addresses, or which VM is where."""
    ctl = ctl_of(context)
    found = ctl.session().status()
    chosen = [vm for vm in found.vms if deployment in (None, vm.deployment)]
    chosen.sort(key=lambda vm: (vm.deployment, vm.name))
    found = msgspec.structs.replace(found, vms=tuple(chosen))
    text, value, names = _found(what, found)
    if as_json or form is Form.JSON:
        text = json_text(value)
    elif form is Form.NAME:
        text = "".join(f"{name}\n" for name in names)
    ctl.terminal.text(text)


def _found(what: What, found: Status) -> tuple[str, Any, Sequence[str]]:
    """What was asked for as a table, for programs, and as names."""
    match what:
        case What.HOSTS:
            return tables.hosts(found), found.hosts, [host.name for host in found.hosts]
        case What.VMS:
            return tables.vms(found), found.vms, [vm.name for vm in found.vms]
        case What.IPS:
            text = "".join(f"{vm.ip}\t{vm.name}\n" for vm in found.vms)
            return text, {vm.name: vm.ip for vm in found.vms}, [vm.ip for vm in found.vms]
        case What.MAP:
            placed = tables.placed(found)
            text = tables.table(("HOST", "VMS"), [(host, " ".join(vms)) for host, vms in placed.items()])
            return text, placed, [" ".join([host, *vms]) for host, vms in placed.items()]
