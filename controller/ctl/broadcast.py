"""`ctl broadcast` on the command line. `quick` reads the usual forms of the same arguments."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.ctl.options import Exclude, Json, Quiet, Where, ctl_of, seconds
from controller.ctl.running import DEFAULT_LIMIT, LONGEST_TIMEOUT, Broadcast, run

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(
    "broadcast",
    # What follows the command's first word is the command's, options included.
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  ctl broadcast hostname
  ctl broadcast -w h[0-31] -x h7 'grep -c processor /proc/cpuinfo'
  ctl broadcast --timeout 30 apt-get -q update
  ctl broadcast --stream tail -f /var/log/syslog
  ctl job $(ctl broadcast --detach apt-get -q upgrade) --wait
  ctl broadcast --json uname -r | jq '.[].nodeset'""",
)
def broadcast(
    *,
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="CMD...", help="The command; words are joined by a space.")],
    where: Where = None,
    exclude: Exclude = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="End the command on hosts where it takes longer.",
            min=0.001,
            max=LONGEST_TIMEOUT,
            callback=seconds,
        ),
    ] = None,
    gather: Annotated[
        bool, typer.Option("-b", "--gather", help="Equal outputs once, under the hosts that gave them (the default).")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Lines as they come, each with its host.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's number and leave; ctl job shows what comes of it.")
    ] = False,
    as_json: Json = False,
    output_limit: Annotated[
        str,
        typer.Option(metavar="BYTES", help="How much of each host's output comes back; the rest stays on the host."),
    ] = DEFAULT_LIMIT,
    quiet: Quiet = False,
) -> None:
    """Run a command on all hosts at once, through their shell.

    Each host's output comes back once it is done; equal outputs are shown once, under the set of hosts that gave them.
    Ctrl-C ends the command on all hosts, a second one leaves at once.
    """
    asked = Broadcast(
        command=tuple(command),
        where=tuple(where or ()),
        exclude=tuple(exclude or ()),
        timeout=timeout,
        gather=gather,
        stream=stream,
        detach=detach,
        as_json=as_json,
        output_limit=output_limit,
        quiet=quiet,
    )
    raise typer.Exit(run(ctl_of(context), asked))
