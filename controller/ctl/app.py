"""The list of commands: `ctl` as typer sees it."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from controller.ctl.commands import Group
from controller.ctl.context import Ctl, tell
from controller.status import CtlError
from controller.terminal import Terminal

#: Which module has which command, in the order that people meet them. A module is loaded when its command is: importing
#: and reading the signatures of all takes longer than a command to a thousand hosts.
_MODULES = {
    "up": "up",
    "status": "show",
    "tree": "show",
    "why": "why",
    "doctor": "doctor",
    "health": "show",
    "check": "check",
    "tune": "check",
    "broadcast": "broadcast",
    "jobs": "jobs",
    "job": "jobs",
    "push": "push",
    "pull": "pull",
    "plan": "spawn",
    "spawn": "spawn",
    "destroy": "spawn",
    "vm": "vm",
    "migrate": "migrate",
    "image": "image",
    "console": "console",
    "net": "net",
    "get": "show",
    "label": "label",
    "down": "up",
    "man": "manual",
    "completion": "manual",
}


class _Commands(Group):
    """The commands, each loaded when it is asked for; and one way for all errors."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _MODULES and cmd_name not in self.commands:
            self.commands.update(_loaded(_MODULES[cmd_name]))
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except (CtlError, KeyboardInterrupt) as error:
            if debug:
                raise
            raise typer.Exit(tell(error)) from None


def _loaded(module: str) -> dict[str, Any]:
    command = typer.main.get_command(import_module(f"controller.ctl.{module}").app)
    return dict(getattr(command, "commands", None) or {command.name: command})


app = typer.Typer(
    name="ctl",
    cls=_Commands,
    # Both load rich, which takes longer than most commands.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from agent.version import VERSION

        typer.echo(f"ctl {VERSION}")
        raise typer.Exit


@app.callback(
    epilog="""\b
From bare hosts to running VMs:
  ctl up -w h[0-63]            start an agent on each host, over SSH
  ctl broadcast uname -r       run a command on all of them
  ctl push app.tar.gz /opt/    bring a file to all of them
  ctl pull /var/log/syslog .   bring each one's here, into a folder a host
  ctl spawn infra.conf …       boot the VMs of a configuration
  ctl health                   see how hosts and VMs are
  ctl down                     end the agents; VMs stay

\b
Exit codes: 0 all well, 1 a command failed somewhere, 2 wrong usage, 3 hosts unreachable or timed out,
4 no host matched, 5 refused for trust, 6 no service, 130 interrupted."""
)
def _ctl(
    context: typer.Context,
    fleet: Annotated[
        str | None,
        typer.Option("--fleet", envvar="CANOPY_FLEET", metavar="NAME", help="Which fleet (default: default)."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run commands, push files and boot VMs on all hosts of a fleet at once."""
    context.obj = Ctl(fleet=fleet, debug=debug, terminal=Terminal())
