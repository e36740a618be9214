"""What `ctl broadcast` does, once its arguments are read."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

import msgspec

from controller import render
from controller.ctl import views
from controller.ctl.context import Ctl
from controller.ctl.following import Following
from controller.progress import waiting_line
from controller.selection import EVERYBODY, Selection
from controller.session import Job
from controller.status import CtlError, ExitStatus, Mistakes
from controller.terminal import Terminal
from protocol.limits import DEFAULT_OUTPUT, MAX_OUTPUT

DEFAULT_LIMIT = f"{DEFAULT_OUTPUT >> 10}k"
#: A year in seconds: more is a slip of the finger.
LONGEST_TIMEOUT = 31_536_000


class Broadcast(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `ctl broadcast`, as they were given."""

    command: tuple[str, ...]
    selection: Selection = EVERYBODY
    timeout: float | None = None
    batch: str | None = None
    max_fail: str | None = None
    gather: bool = False
    merge: bool = False
    by_host: bool = False
    diff: bool = False
    stream: bool = False
    as_json: bool = False
    ndjson: bool = False
    outdir: str | None = None
    no_label: bool = False
    regroup: bool = False
    max_code: bool = False
    detach: bool = False
    output_limit: str = DEFAULT_LIMIT
    quiet: bool = False
    #: The words are an argument vector, and no shell reads them.
    vector: bool = False
    cwd: str | None = None
    env: tuple[str, ...] = ()
    user: str | None = None
    script: str | None = None
    stdin: bool = False
    kill_after: float | None = None
    nice: int | None = None
    limits: tuple[str, ...] = ()


def run(ctl: Ctl, asked: Broadcast, wrong: Mistakes | None = None) -> int:
    """Run the command and show what comes of it. The exit code; raises CtlError with all that is wrong, `wrong`
    included."""
    wrong = wrong or Mistakes()
    hosts: tuple[str, ...] | None = None
    with wrong:
        _check(asked)
    with wrong:
        limit = size(asked.output_limit)
    with wrong:
        how = _how(asked)
    with ctl.session() as session:
        chooser = session.chooser()
        with wrong:
            hosts = chooser.choose(asked.selection, known=bool(wrong))
        wrong.check()
        name = views.by_group(chooser) if asked.regroup else render.label
        view = _view(asked, ctl.terminal, name)
        job = session.run(
            _words(asked),
            hosts,
            timeout=asked.timeout,
            output_limit=limit,
            stream=view.pieces,
            detach=asked.detach,
            batch=asked.batch,
            max_fail=asked.max_fail or 0,
            stdin=_input(asked) if asked.stdin else None,
            **how,
        )
        may_fail = None if asked.batch is None else asked.max_fail or "0"
        if asked.detach:
            job.close()
            ctl.terminal.text(render.json_text({"job": job.id}) if asked.as_json else f"{job.id}\n")
            return ExitStatus.OK
        return follow(job, ctl.terminal, view, quiet=asked.quiet, max_code=asked.max_code, may_fail=may_fail)


def _words(asked: Broadcast) -> str | tuple[str, ...]:
    if asked.script is not None:
        return (asked.script.rpartition("/")[2], *asked.command)
    return asked.command if asked.vector else " ".join(asked.command)


def _how(asked: Broadcast) -> dict[str, Any]:
    rare = (asked.cwd, asked.env, asked.user, asked.script, asked.kill_after, asked.nice, asked.limits)
    if not any(rare):
        return {}
    from controller.ctl.asking import how

    return how(
        cwd=asked.cwd,
        env=asked.env,
        user=asked.user,
        nice=asked.nice,
        limits=asked.limits,
        kill_after=asked.kill_after,
        script=asked.script,
    )


def _input(asked: Broadcast) -> bytes | BinaryIO:
    import sys

    from controller.ctl.asking import standard_input

    return standard_input(sys.stdin.buffer, whole=asked.detach)


def _check(asked: Broadcast) -> None:
    """Raise CtlError (USAGE) with all that does not go together."""
    wrong = []
    shown = {
        "-b": asked.gather,
        "-B": asked.merge,
        "-L": asked.by_host,
        "--diff": asked.diff,
        "--stream": asked.stream,
        "--json": asked.as_json,
        "--ndjson": asked.ndjson,
        "-o": asked.outdir is not None,
    }
    given = [name for name, value in shown.items() if value]
    if len(given) > 1 and given != ["--stream", "--ndjson"]:
        wrong.append(f"{', '.join(given)} exclude each other: choose one")
    if asked.no_label and not (asked.by_host or asked.stream):
        wrong.append("-N goes with -L or --stream: gathered output has its hosts above it")
    if asked.detach and [name for name in given if name != "--json"]:
        wrong.append("--detach shows no output: leave the others out, `ctl job` shows it")
    if asked.max_fail is not None and asked.batch is None:
        wrong.append("--max-fail goes with --batch: without it all hosts begin at once")
    wrong += _bad_shares(asked)
    if not asked.command and asked.script is None:
        wrong.append("give a command, or a --script")
    if asked.stdin and asked.batch is not None:
        wrong.append("standard input comes once, for all hosts at a time: leave --stdin or --batch out")
    if wrong:
        raise CtlError("; ".join(wrong), ExitStatus.USAGE)


def _bad_shares(asked: Broadcast) -> list[str]:
    if asked.batch is None and asked.max_fail is None:
        return []
    from controller.shares import at_a_time, share

    wrong = []
    # Of how many, the service knows: here it is looked at how they are written.
    for option, text, count in (("--batch", asked.batch, at_a_time), ("--max-fail", asked.max_fail, share)):
        try:
            count(option, text or "1", 1)
        except CtlError as error:
            wrong.append(str(error))
    return wrong


def _view(asked: Broadcast, terminal: Terminal, name: render.Name) -> views.View:
    if asked.outdir is not None:
        return views.Directory(terminal, asked.outdir)
    if asked.ndjson:
        return views.Lines(terminal, pieces=asked.stream)
    if asked.stream:
        return views.Stream(terminal, labelled=not asked.no_label)
    if asked.as_json:
        return views.Json(terminal)
    if asked.by_host:
        return views.ByHost(terminal, labelled=not asked.no_label)
    if asked.diff:
        return views.Differences(terminal, name)
    return views.Merged(terminal, name) if asked.merge else views.Gathered(terminal, name)


def size(text: str) -> int:
    """Bytes as people write them: 65536, 256k, 1M. Raises CtlError (USAGE) for others, and above MAX_OUTPUT."""
    if text == DEFAULT_LIMIT:  # to compile a pattern takes a hundredth of a command's start
        return DEFAULT_OUTPUT
    found = re.fullmatch("([0-9]{1,12})([kKmM]?)", text)
    count = int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()] if found else MAX_OUTPUT + 1
    if count > MAX_OUTPUT:
        raise CtlError(
            f"--output-limit {text}: give a size of at most {MAX_OUTPUT >> 20}M, like 65536, 256k or 1M",
            ExitStatus.USAGE,
        )
    return count


def follow(
    job: Job,
    terminal: Terminal,
    view: views.View,
    *,
    quiet: bool = False,
    max_code: bool = False,
    may_fail: str | None = None,
) -> int:
    """Show a running command until its end. `may_fail` is how many might, of rolling work. The exit code."""
    following = Following(job, terminal, quiet=quiet, announce=True, always=True)

    def line() -> str:
        return waiting_line(len(following.order), list(following.waiting), following.seconds, following.failed)

    following.run(line, view.note)
    view.end(following)
    never = render.never_begun(following.results, following.order)
    if never and may_fail is not None and not following.interrupted:
        terminal.say(f"not begun, since more than {may_fail} failed: {never}", bad=True)
    status = following.end(outputs=view.outputs)
    return render.largest_code(following.results, status) if max_code else status
