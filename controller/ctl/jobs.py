"""`ctl jobs` and `ctl job`: what was asked of hosts, and what came of it."""

from __future__ import annotations

import pwd
from typing import TYPE_CHECKING, Annotated

import typer

from controller import render, render_jobs
from controller.ctl.commands import Commands
from controller.ctl.completing import complete_job
from controller.ctl.following import Following
from controller.ctl.options import Json, Quiet, ctl_of
from controller.ctl.said import show_said
from controller.ctl.spools import show_output
from controller.ctl.views import Gathered
from controller.hosts import fold
from controller.progress import waiting_line
from controller.session import Happening, VmAnswer, VmReached, exit_status
from controller.status import ExitStatus

if TYPE_CHECKING:
    from protocol.vms import VmResult

#: How a job of files begins, of which hosts say a word each, where commands write what they like.
_OF_FILES = ('["push"', '["pull"')

app = Commands()


def _user(uid: int) -> str:
    """A user's name; one who has left is a number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@app.command(
    "jobs",
    epilog="""\b
Examples:
  ctl jobs
  ctl jobs -n 100 --json""",
)
def jobs(
    context: typer.Context,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", min=1, max=10_000, help="How many.")] = 20,
    as_json: Json = False,
) -> None:
    """List the latest jobs, newest first: commands, pushes, and what was done with VMs.

    OK, FAILED, LOST and MISSING count hosts. MISSING ones have no outcome yet.
    """
    ctl = ctl_of(context)
    found = ctl.session().jobs(count)
    if as_json:
        ctl.terminal.text(render.json_text(render_jobs.job_objects(found, _user)))
    else:
        ctl.terminal.text(render_jobs.jobs_table(found, _user))


@app.command(
    "job",
    epilog="""\b
Examples:
  ctl job 1234
  ctl job 1234 --wait
  ctl job 1234 --output h7 > h7.log
  ctl job 1234 --cancel""",
)
def job(
    *,
    context: typer.Context,
    number: Annotated[
        int,
        typer.Argument(
            metavar="ID", min=1, help="The job's number, as ctl jobs lists it.", autocompletion=complete_job
        ),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every host has its outcome.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End it on all hosts where it still runs.")] = False,
    output: Annotated[
        str | None, typer.Option(metavar="HOST", help="Write all that it wrote on this host, to the byte.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what came of a job so far, and which hosts are missing.

    The exit code is that of the command itself, and 3 while hosts are missing. Ctrl-C leaves the job as it is.
    """
    ctl = ctl_of(context)
    if output is not None:
        raise typer.Exit(show_output(ctl, number, output))
    with ctl.session() as session:
        if cancel:
            session.cancel_job(number)
        found = session.job(number, wait=wait)
        following = Following(found, ctl.terminal, quiet=quiet, leave=True)
        answers: list[VmAnswer] = []
        reached: list[VmReached] = []

        def note(happening: Happening) -> None:
            if isinstance(happening, VmAnswer):
                answers.append(happening)
            elif isinstance(happening, VmReached):
                reached.append(happening)

        def line() -> str:
            return waiting_line(len(following.order), list(following.waiting), following.seconds, following.failed)

        following.run(line, note)
    if as_json:
        _show_json(following, number, found.what, settled=found.settled, answers=answers, reached=reached)
    else:
        view = Gathered(ctl.terminal)
        if found.what.startswith(_OF_FILES):
            show_said(following)
        else:
            view.show(following)
        view.show_errors(following)
        view.show_late(following)
        _show_vms(following, answers, reached)
        following.show_failures()
    try:
        status = _end(following, [*answers, *reached])
    except KeyboardInterrupt:
        ctl.terminal.say(f"job {number} goes on: `ctl job {number} --cancel` ends it")
        raise
    if not found.settled and not quiet:
        ctl.terminal.say(f"job {number} goes on: --wait waits for the rest, --cancel ends it")
    raise typer.Exit(status)


def _end(following: Following, others: list[VmAnswer | VmReached]) -> int:
    """The exit code. The summary counts outcomes, and what hosts said of their VMs is none."""
    if others:
        following.terminal.flush()
        following.check()
        status: int = exit_status(result.outcome for result in following.results)
        if following.waiting:
            following.terminal.say(f"missing: {fold(list(following.waiting))} (no outcome yet)", bad=True)
    else:
        status = following.end()
    return status or (ExitStatus.UNREACHABLE if following.waiting else ExitStatus.OK)


def _show_vms(following: Following, answers: list[VmAnswer], reached: list[VmReached]) -> None:
    if not answers and not reached:
        return
    from controller import render_vms

    by_host: dict[str, list[VmResult]] = {}
    for answer in answers:  # several of a host whose VMs moved
        by_host.setdefault(answer.host, []).extend(answer.results)
    for line in render_vms.per_host(by_host):
        following.terminal.text(f"{line}\n")
    for one in reached:
        following.terminal.text(f"{one.host}: {fold(one.names) if one.names else 'none'} answered ping\n")
    for line in render_vms.not_right(by_host):
        following.terminal.say(line, bad=True)


def _show_json(
    following: Following,
    number: int,
    what: str,
    *,
    settled: bool,
    answers: list[VmAnswer],
    reached: list[VmReached],
) -> None:
    from controller.render_vms import vm_objects

    found = {
        "job": number,
        "what": render_jobs.words(what or "[]"),
        "settled": settled,
        "missing": list(following.waiting),
        "results": render.result_objects(following.results, following.order),
        "late": render.result_objects(following.late, following.order),
        "vms": vm_objects((answer.host, answer.results) for answer in answers),
        "reached": {one.host: one.names for one in reached},
    }
    following.terminal.text(render.json_text(found))
