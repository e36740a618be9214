"""Options that several commands share, so that they are called the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

Where = Annotated[
    list[str] | None,
    typer.Option("-w", "--where", metavar="HOSTS", help="Only these hosts: h1,h[3-7],h[10-20]!h12. May be repeated."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("-x", "--exclude", metavar="HOSTS", help="Not these hosts. May be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")]
