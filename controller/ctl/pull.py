"""`ctl pull`: files and directories of many hosts."""

from __future__ import annotations

from typing import Annotated

import typer

from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.following import Following
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.ctl.said import show_said
from controller.progress import pull_line
from controller.selection import EVERYBODY, Selection
from controller.session import Fetched, Happening, Job
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal

app = Commands()


@app.command(
    "pull",
    cls=Gathering,
    epilog="""\b
Examples:
  ctl pull /var/log/syslog logs              logs/h0/syslog, logs/h1/syslog, …
  ctl pull -w h[0-31] /etc/ssh /etc/hosts out
  ctl pull --fold /etc/resolv.conf out       equal ones once: out/h0/resolv.conf, and out/h0.hosts says who has it""",
)
@selecting()
def pull(
    *,
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Paths on hosts, from / on.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where they go here: into a folder a host.")],
    selection: Selection = EVERYBODY,
    fold: Annotated[
        bool, typer.Option("--fold", help="Equal contents once, beside a file that names all who have them.")
    ] = False,
    preserve: Annotated[
        bool, typer.Option("--preserve", help="Keep times and set-user-ID bits, and as root owners.")
    ] = False,
    xattrs: Annotated[bool, typer.Option("--xattrs", help="Keep extended attributes and access lists.")] = False,
    compress: Annotated[bool, typer.Option("--compress/--no-compress", help="Compress where it pays.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring files and directories of all hosts here, into DIR/HOST/.

    Each distinct content is fetched from one host that has it, verified by digest, and put in place in one step.
    Folders of hosts that have the same share their files: hard links, so change none of them in place. What is here
    already is not fetched again. Symbolic links arrive as links. Ctrl-C ends it, and leaves nothing half behind.
    """
    wrong = mistakes_of(context)
    for path in paths:
        with wrong:
            if not path.startswith("/") or "\0" in path:
                raise CtlError(f"{path!r} is no path from / on, and hosts have no working directory", ExitStatus.USAGE)
    ctl = ctl_of(context)
    with ctl.session() as session:
        with wrong:
            hosts = session.choose(selection, known=bool(wrong))
        wrong.check()
        job = session.pull(paths, directory, hosts, fold=fold, preserve=preserve, xattrs=xattrs, compress=compress)
        raise typer.Exit(follow(job, ctl.terminal, as_json=as_json, quiet=quiet))


def follow(job: Job, terminal: Terminal, *, as_json: bool = False, quiet: bool = False) -> int:
    """Show a pull until its end. The exit code."""
    following = Following(job, terminal, quiet=quiet, announce=True)
    size, done = 0, dict.fromkeys(following.order, 0)

    def note(happening: Happening) -> None:
        nonlocal size
        if isinstance(happening, Fetched):
            size = happening.size
            done.update(happening.done)

    def line() -> str:
        finished = len(following.order) - len(following.waiting)
        return pull_line(size, done, len(following.order), finished, following.seconds)

    following.run(line, note)
    if as_json:
        following.show_json()
    else:
        show_said(following)
        following.show_failures()
    return following.end()
