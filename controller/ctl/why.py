"""`ctl why`: what is known of one host, since when, and from whom."""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec.structs import replace

from controller.ctl.commands import Commands
from controller.ctl.completing import complete_host
from controller.ctl.options import Json, ctl_of, selecting
from controller.render import json_text
from controller.render_why import known_object
from controller.render_why import why as why_text
from controller.selection import EVERYBODY, Selection
from controller.status import CtlError, ExitStatus

app = Commands()


@app.command(
    "why",
    epilog="""\b
Examples:
  ctl why h7
  ctl why @failed
  ctl why h7 --json""",
)
@selecting()
def why(
    *,
    context: typer.Context,
    hosts: Annotated[
        list[str] | None,
        typer.Argument(metavar="HOSTS...", help="Hosts of the fleet: h1 h[3-7] @rack1.", autocompletion=complete_host),
    ] = None,
    selection: Selection = EVERYBODY,
    as_json: Json = False,
) -> None:
    """Tell all that is known of hosts: since when, and from whom.

    Where a host hangs and why not where it was planned, whether it has its part of the plan, what it said of itself
    last, and which outcomes were lost on it. Nothing is asked of the host itself: ctl doctor does that.
    """
    ctl = ctl_of(context)
    asked = replace(selection, where=(*(hosts or ()), *selection.where))
    if not asked:
        raise CtlError("which hosts? Give names like h1 or h[3-7]", ExitStatus.USAGE)
    session = ctl.session()
    known = [session.host(name) for name in session.choose(asked) or ()]
    if as_json:
        found = [known_object(one) for one in known]
        ctl.terminal.text(json_text(found[0] if len(found) == 1 else found))
    else:
        ctl.terminal.text("\n".join(map(why_text, known)))
