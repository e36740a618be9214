"""What several commands share on the command line, so that it is called the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.ctl.context import Ctl

Where = Annotated[
    list[str] | None,
    typer.Option("-w", "--where", metavar="HOSTS", help="Only these hosts: h1,h[3-7],h[10-20]!h12. May be repeated."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("-x", "--exclude", metavar="HOSTS", help="Not these hosts. May be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")]


def seconds(given: float | None) -> float | None:
    """A typer callback: a number of seconds. `nan` passes every comparison that a range makes."""
    if given is not None and given != given:  # noqa: PLR0124  what nan is
        raise typer.BadParameter("'nan' is not a number of seconds.")
    return given


def ctl_of(context: typer.Context) -> Ctl:
    """What `ctl` itself was given."""
    found = context.find_object(Ctl)
    if found is None:
        raise RuntimeError("a command runs only below ctl")
    return found
