"""`ctl broadcast`: one command on many hosts."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from controller import render
from controller.ctl.context import chosen_hosts, ctl_of
from controller.ctl.following import Following
from controller.ctl.options import Exclude, Json, Quiet, Where
from controller.ctl.streams import Streams
from controller.progress import waiting_line
from controller.session import Happening, Job, Piece, Result
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from protocol.limits import DEFAULT_OUTPUT, MAX_OUTPUT

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_SIZE = re.compile(r"([0-9]{1,12})([kKmM]?)")


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()] if found else MAX_OUTPUT + 1
    if size > MAX_OUTPUT:
        raise typer.BadParameter(f"{text!r} is no size of at most {MAX_OUTPUT >> 20}M, like 65536, 256k or 1M")
    return size


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
  ctl broadcast --json uname -r | jq '.[].nodeset'""",
)
def broadcast(
    *,
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="CMD...", help="The command; words are joined by a space.")],
    where: Where = None,
    exclude: Exclude = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End the command on hosts where it takes longer.", min=0.001)
    ] = None,
    gather: Annotated[
        bool, typer.Option("-b", "--gather", help="Equal outputs once, under the hosts that gave them (the default).")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Lines as they come, each with its host.")] = False,
    as_json: Json = False,
    output_limit: Annotated[
        str,
        typer.Option(metavar="BYTES", help="How much of each host's output comes back; the rest stays on the host."),
    ] = f"{DEFAULT_OUTPUT >> 10}k",
    quiet: Quiet = False,
) -> None:
    """Run a command on all hosts at once, through their shell.

    Each host's output comes back once it is done; equal outputs are shown once, under the set of hosts that gave them.
    Ctrl-C ends the command on all hosts, a second one leaves at once.
    """
    if stream + gather + as_json > 1:
        raise CtlError("-b, --stream and --json exclude each other: choose one", ExitStatus.USAGE)
    ctl = ctl_of(context)
    limit = _bytes(output_limit)
    with ctl.session() as session:
        hosts = chosen_hosts(session, where, exclude)
        job = session.run(" ".join(command), hosts, timeout=timeout, output_limit=limit, stream=stream)
        raise typer.Exit(follow(job, ctl.terminal, stream=stream, as_json=as_json, quiet=quiet))


def follow(job: Job, terminal: Terminal, *, stream: bool = False, as_json: bool = False, quiet: bool = False) -> int:
    """Show a running command until its end. The exit code."""
    following = Following(job, terminal, quiet=quiet)
    streams = Streams(terminal)

    def line() -> str:
        return waiting_line(len(following.order), list(following.waiting), following.seconds)

    def show(happening: Happening) -> None:
        if isinstance(happening, Piece):
            streams.take(happening)
        elif stream and isinstance(happening, Result):
            for host in happening.hosts:
                streams.end(host, happening.output)

    following.run(line, show)
    if as_json:
        following.show_json()
    else:
        if not stream:
            _show_gathered(following)
        following.show_failures()
    return following.end()


def _show_gathered(following: Following) -> None:
    terminal = following.terminal
    for hosts, data in render.outputs(following.results, following.order, 1):
        for text in (render.RULE, hosts, render.RULE):
            terminal.header(text)
        terminal.write(data)
    for hosts, data in render.outputs(following.results, following.order, 2):
        for text in (render.RULE, f"{hosts}: standard error", render.RULE):
            terminal.say(text)
        terminal.say_bytes(data if data.endswith(b"\n") else data + b"\n")
