"""`ctl broadcast` on the command line. `quick` reads the usual forms of the same arguments."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.options import Json, Quiet, ctl_of, seconds, selecting
from controller.ctl.running import DEFAULT_LIMIT, LONGEST_TIMEOUT, Broadcast, run
from controller.selection import EVERYBODY, Selection
from controller.status import CtlError, ExitStatus
from protocol.limits import MAX_KILL_AFTER

app = Commands()


def _no_fanout(given: str | None) -> None:
    if given is not None:
        raise CtlError(
            "-f has no meaning here: the tree has its fanout since ctl up, and all hosts start at once; --batch "
            "takes some at a time",
            ExitStatus.USAGE,
        )


def _no_connecting(given: str | None) -> None:
    if given is not None:
        raise CtlError(
            "-t has no meaning here: agents are connected already; -u SECONDS ends commands that take longer",
            ExitStatus.USAGE,
        )


class _Broadcast(Gathering):
    """Notes whether `--` stood before the command's words, which click drops."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        left: list[str] = super().parse_args(ctx, args)
        count = len(ctx.params.get("command") or ())
        ctx.meta["vector"] = 0 < count < len(given) and given[-count - 1] == "--"
        return left


@app.command(
    "broadcast",
    cls=_Broadcast,
    # What follows the command's first word is the command's, options included.
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  ctl broadcast hostname
  ctl broadcast -w h[0-31] -x h7 'grep -c processor /proc/cpuinfo'
  ctl broadcast -g rack1 -l gpu=yes nvidia-smi -L
  ctl broadcast --diff cat /etc/resolv.conf
  ctl broadcast --timeout 30 apt-get -q update
  ctl broadcast -w @failed apt-get -q update
  ctl broadcast --batch 10% --max-fail 2 systemctl restart nginx
  ctl broadcast --stream tail -f /var/log/syslog
  ctl broadcast -o logs/ journalctl -b
  ctl broadcast --user postgres --cwd /tmp -- psql -c 'select 1'
  ctl broadcast --script fix.sh --limit nofile=1024 --nice 10
  ctl broadcast --stdin 'tar -x -C /opt' < app.tar
  ctl job $(ctl broadcast --detach apt-get -q upgrade) --wait
  ctl broadcast --json uname -r | jq '.[].nodeset'""",
)
@selecting()
def broadcast(
    *,
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CMD...",
            help="The command; words are joined by a space. After -- they are passed as they are, past the shell.",
        ),
    ] = None,
    selection: Selection = EVERYBODY,
    timeout: Annotated[
        float | None,
        typer.Option(
            "-u",
            "--timeout",
            metavar="SECONDS",
            help="End the command on hosts where it takes longer.",
            min=0.001,
            max=LONGEST_TIMEOUT,
            callback=seconds,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="So many hosts at a time, in order: 10% (rounded down, 1 at least) or a number. The next begin when "
            "all are done.",
        ),
    ] = None,
    max_fail: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="With --batch: begin no more where more have failed: 2% (rounded down) or a number (default: 0).",
        ),
    ] = None,
    gather: Annotated[
        bool,
        typer.Option(
            "-b",
            "--gather",
            help="Equal outputs once, under the hosts that gave them; the odd ones last (the default).",
        ),
    ] = False,
    merge: Annotated[
        bool, typer.Option("-B", "--merge", help="The same, with standard error below standard output.")
    ] = False,
    by_host: Annotated[
        bool, typer.Option("-L", "--by-host", help="Each host's lines with its name before them, in order of hosts.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="The most common output, and of the others what differs from it.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Lines as they come, each with its host.")] = False,
    as_json: Json = False,
    ndjson: Annotated[
        bool, typer.Option("--ndjson", help="A JSON object a line, as it comes; with --stream pieces of output too.")
    ] = False,
    outdir: Annotated[
        str | None,
        typer.Option("-o", "--outdir", metavar="DIR", help="A file a host, written as it comes; DIR/HOST.err apart."),
    ] = None,
    no_label: Annotated[
        bool, typer.Option("-N", "--no-label", help="With -L and --stream: no names, only what hosts wrote.")
    ] = False,
    regroup: Annotated[
        bool, typer.Option("-r", "--regroup", help="Hosts that make up a group by its name: @rack1.")
    ] = False,
    max_code: Annotated[
        bool, typer.Option("-S", "--max-code", help="End with the largest exit code of the hosts.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's number and leave; ctl job shows what comes of it.")
    ] = False,
    output_limit: Annotated[
        str,
        typer.Option(metavar="BYTES", help="How much of each host's output comes back; the rest stays on the host."),
    ] = DEFAULT_LIMIT,
    cwd: Annotated[str | None, typer.Option(metavar="DIR", help="The directory that it runs in.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An environment variable; may be given often.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="Run it as this user, from its home.")] = None,
    script: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Send this script and run it; CMD... are its arguments. No file stays."),
    ] = None,
    stdin: Annotated[
        bool,
        typer.Option(
            "--stdin", help="Send standard input to all hosts; the fastest may be 1 GiB ahead of the slowest."
        ),
    ] = False,
    kill_after: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="What it has to clean up when it is ended (default: 2).",
            min=0,
            max=MAX_KILL_AFTER,
            callback=seconds,
        ),
    ] = None,
    nice: Annotated[int | None, typer.Option(metavar="N", help="Be that much nicer.", min=-20, max=19)] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N,...", help="Resource limits: nofile, as, cpu, core …; none lifts one."),
    ] = None,
    quiet: Quiet = False,
    fanout: Annotated[str | None, typer.Option("-f", "--fanout", hidden=True, callback=_no_fanout)] = None,
    connect_timeout: Annotated[
        str | None, typer.Option("-t", "--connect-timeout", hidden=True, callback=_no_connecting)
    ] = None,
) -> None:
    """Run a command on all hosts at once, through their shell.

    Each host's output comes back once it is done; equal outputs are shown once, under the set of hosts that gave them,
    the most common one first. The job's number comes first and how many answered last, both on standard error.

    While it runs, Enter shows who is not done. Ctrl-C ends the command on all hosts and tells where it still runs; a
    second one leaves at once.
    """
    asked = Broadcast(
        command=tuple(command or ()),
        vector=bool(context.meta.get("vector")),
        cwd=cwd,
        env=tuple(env or ()),
        user=user,
        script=script,
        stdin=stdin,
        kill_after=kill_after,
        nice=nice,
        limits=tuple(limit or ()),
        selection=selection,
        timeout=timeout,
        batch=batch,
        max_fail=max_fail,
        gather=gather,
        merge=merge,
        by_host=by_host,
        diff=diff,
        stream=stream,
        as_json=as_json,
        ndjson=ndjson,
        outdir=outdir,
        no_label=no_label,
        regroup=regroup,
        max_code=max_code,
        detach=detach,
        output_limit=output_limit,
        quiet=quiet,
    )
    raise typer.Exit(run(ctl_of(context), asked, mistakes_of(context)))
