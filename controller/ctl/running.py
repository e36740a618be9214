"""What `ctl broadcast` does, once its arguments are read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from controller import render
from controller.ctl.context import Ctl, chosen_hosts
from controller.ctl.following import Following
from controller.ctl.streams import Streams
from controller.progress import waiting_line
from controller.session import Happening, Job, Piece, Result
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from protocol.limits import DEFAULT_OUTPUT, MAX_OUTPUT

DEFAULT_LIMIT = f"{DEFAULT_OUTPUT >> 10}k"
#: A year in seconds: more is a slip of the finger.
LONGEST_TIMEOUT = 31_536_000


@dataclass(frozen=True, kw_only=True)
class Broadcast:
    """The arguments of `ctl broadcast`, as they were given."""

    command: tuple[str, ...]
    where: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    timeout: float | None = None
    gather: bool = False
    stream: bool = False
    detach: bool = False
    as_json: bool = False
    output_limit: str = DEFAULT_LIMIT
    quiet: bool = False


def run(ctl: Ctl, asked: Broadcast) -> int:
    """Run the command and show what comes of it. The exit code; raises CtlError."""
    if asked.stream + asked.gather + asked.as_json > 1:
        raise CtlError("-b, --stream and --json exclude each other: choose one", ExitStatus.USAGE)
    if asked.detach and (asked.stream or asked.gather):
        raise CtlError("--detach shows no output: leave -b and --stream out, `ctl job` shows it", ExitStatus.USAGE)
    limit = size(asked.output_limit)
    with ctl.session() as session:
        hosts = chosen_hosts(session, asked.where, asked.exclude)
        command = " ".join(asked.command)
        job = session.run(
            command, hosts, timeout=asked.timeout, output_limit=limit, stream=asked.stream, detach=asked.detach
        )
        if asked.detach:
            job.close()
            ctl.terminal.text(render.json_text({"job": job.id}) if asked.as_json else f"{job.id}\n")
            return ExitStatus.OK
        return follow(job, ctl.terminal, stream=asked.stream, as_json=asked.as_json, quiet=asked.quiet)


def size(text: str) -> int:
    """Bytes as people write them: 65536, 256k, 1M. Raises CtlError (USAGE) for others, and above MAX_OUTPUT."""
    found = re.fullmatch("([0-9]{1,12})([kKmM]?)", text)
    count = int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()] if found else MAX_OUTPUT + 1
    if count > MAX_OUTPUT:
        raise CtlError(
            f"--output-limit {text}: give a size of at most {MAX_OUTPUT >> 20}M, like 65536, 256k or 1M",
            ExitStatus.USAGE,
        )
    return count


def follow(job: Job, terminal: Terminal, *, stream: bool = False, as_json: bool = False, quiet: bool = False) -> int:
    """Show a running command until its end. The exit code."""
    following = Following(job, terminal, quiet=quiet, announce=True)
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
            show_gathered(following)
        following.show_failures(shortened=not stream)
    return following.end()


def show_gathered(following: Following) -> None:
    """The outputs, equal ones once, under the hosts that gave them."""
    terminal = following.terminal
    for hosts, data in render.outputs(following.results, following.order, 1):
        for text in (render.RULE, hosts, render.RULE):
            terminal.header(text)
        terminal.write(data)
    for hosts, data in render.outputs(following.results, following.order, 2):
        for text in (render.RULE, f"{hosts}: standard error", render.RULE):
            terminal.say(text)
        terminal.say_bytes(data if data.endswith(b"\n") else data + b"\n")
