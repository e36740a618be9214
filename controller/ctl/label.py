"""`ctl label`: words that hosts carry, and by which they can be chosen."""

from __future__ import annotations

from typing import Annotated

import typer

from controller import labels, tables
from controller.ctl.commands import Commands
from controller.ctl.completing import complete_host
from controller.ctl.options import Json, ctl_of
from controller.render import json_text
from controller.selection import Selection

app = Commands()


@app.command(
    "label",
    # `rack-` is a word, and `-x` would be none of ours.
    epilog="""\b
Examples:
  ctl label                        which labels there are, and who carries them
  ctl label h[0-31] rack=1 gpu=yes
  ctl label @sophia gpu-           take one away
  ctl broadcast -l rack=1 -l gpu=yes nvidia-smi""",
)
def label(
    *,
    context: typer.Context,
    hosts: Annotated[
        str | None,
        typer.Argument(metavar="HOSTS", help="Whom to label, as for -w; @all for all.", autocompletion=complete_host),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE|KEY-...", help="Labels to give, and to take away.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give hosts labels, take them away, or show them.

    They are kept by the service, also while a host is away. -l KEY=VALUE chooses by them, and @label:KEY=VALUE does in
    a host set.
    """
    ctl = ctl_of(context)
    put, drop = labels.parse(words or ())
    session = ctl.session()
    chosen = None if hosts is None else session.choose(Selection(where=(hosts,)))
    if put or drop:
        session.label(chosen, put, drop)
        return
    asked = None if chosen is None else set(chosen)
    found = [host for host in session.status().hosts if asked is None or host.name in asked]
    if as_json:
        ctl.terminal.text(json_text({host.name: host.labels for host in found}))
    else:
        ctl.terminal.text(tables.labels(found))
