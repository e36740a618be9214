"""`ctl net`: networks of VMs that span hosts."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.ctl.commands import Commands
from controller.ctl.context import Ctl
from controller.ctl.following import Watcher
from controller.ctl.options import Json, Quiet, ctl_of
from controller.render import json_text
from controller.session import Job, Result, exit_status
from protocol.outcomes import describe

app = Commands()
net = Commands(
    name="net",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Networks of VMs that span hosts: a bridge on each, joined by VXLAN, with nothing broadcast between them.",
    epilog="""\b
Examples:
  ctl net create lab --subnet 10.77.0.0/16 --isolated
  ctl spawn infra.conf --subnet 10.77.0.0/16 --bridge cn-lab …
  ctl net ls
  ctl net rm lab""",
)
app.add_typer(net)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Up to 12 lower-case letters, digits and '-'.")]


@app.callback()
def _no_command_of_its_own() -> None:
    """Keeps `net` a group, also while it is the only one here."""


@net.command(
    "create",
    epilog="""\b
Examples:
  ctl net create lab --subnet 10.77.0.0/16
  ctl net create lab --subnet 10.77.0.0/16 --isolated""",
)
def create(
    *,
    context: typer.Context,
    name: Name,
    subnet: Annotated[str, typer.Option(metavar="CIDR", help="The addresses of its VMs.")],
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Hosts have no address in it; else each has the first, the VMs' gateway.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make a network on every host.

    VMs whose address is in the subnet are in it; put them on the bridge cn-NAME. Each host is told where each VM is,
    and again whenever one comes, goes or moves: nothing is learnt and nothing is flooded. Hosts that come later make
    it too.
    """
    ctl = ctl_of(context)
    with ctl.session() as session:
        _end(ctl, session.create_net(name, subnet, isolated=isolated), f"net create {name}", quiet=quiet)


@net.command(
    "rm",
    epilog="""\b
Examples:
  ctl net rm lab""",
)
def remove(*, context: typer.Context, name: Name, quiet: Quiet = False) -> None:
    """Remove a network from every host. Refused as long as VMs are in it."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        _end(ctl, session.remove_net(name), f"net rm {name}", quiet=quiet)


@net.command(
    "ls",
    epilog="""\b
Examples:
  ctl net ls
  ctl net ls --json""",
)
def listing(*, context: typer.Context, as_json: Json = False) -> None:
    """List networks."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        nets = session.nets()
    if as_json:
        ctl.terminal.text(json_text(nets))
        return
    for each in nets:
        kind = "isolated" if each.isolated else "with a gateway on each host"
        ctl.terminal.text(f"{each.name}\t{each.subnet}\t{each.bridge}\t{each.vms} VMs\t{kind}\n")


def _end(ctl: Ctl, job: Job, what: str, *, quiet: bool) -> None:
    happened = Watcher(ctl.terminal, quiet=quiet)(what, job)
    results = [happening for happening in happened if isinstance(happening, Result)]
    for result in results:
        if not result.ok:
            ctl.terminal.say(f"{', '.join(result.hosts)}: {describe(result.outcome)}", bad=True)
    raise typer.Exit(exit_status(result.outcome for result in results))
