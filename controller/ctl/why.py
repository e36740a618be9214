"""`ctl why`: what is known of one host, since when, and from whom."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.ctl.options import Json, ctl_of
from controller.render import json_text
from controller.render_why import why as why_text

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(
    "why",
    epilog="""\b
Examples:
  ctl why h7
  ctl why h7 --json""",
)
def why(
    context: typer.Context,
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host of the fleet.")],
    as_json: Json = False,
) -> None:
    """Tell all that is known of a host: since when, and from whom.

    Where it hangs and why not where it was planned, whether it has its part of the plan, what it said of itself last,
    and which outcomes were lost on it. Nothing is asked of the host itself: ctl doctor does that.
    """
    ctl = ctl_of(context)
    known = ctl.session().host(host)
    ctl.terminal.text(json_text(known) if as_json else why_text(known))
