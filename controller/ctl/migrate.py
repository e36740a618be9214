"""`ctl migrate`: running VMs to other hosts, some or many, with limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from controller import migration
from controller.ctl.commands import Commands
from controller.ctl.following import Following
from controller.ctl.options import Json, Quiet, ctl_of, seconds, selecting
from controller.migration import Wanted
from controller.move_plan import Room
from controller.placement import MemoryUnit
from controller.render import json_text
from controller.results import VmProgress
from controller.selection import EVERYBODY, Selection
from controller.session import Happening, Session, VmAnswer
from controller.spawn_plan import deployment_name, load
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from controller.text_problems import some
from controller.vm_sets import pick
from protocol.vms import VmChange, VmResult

app = Commands()


@app.command(
    "migrate",
    epilog="""\b
Examples:
  ctl migrate vm07 hv3
  ctl migrate 'web-*' 'hv[4-7]'                  each to the one with most memory left
  ctl migrate -w hv3 'hv[4-7]'                   all VMs of a host, so that it can be mended
  ctl migrate --plan infra.conf --dry-run        what it takes to be where the file has them
  ctl migrate --plan infra.conf --per-host 2 --per-link 4""",
)
@selecting()
def migrate(
    *,
    context: typer.Context,
    vms: Annotated[
        list[str] | None, typer.Argument(metavar="VM... HOST", help="VMs: names, ranges or wildcards; last, hosts.")
    ] = None,
    selection: Selection = EVERYBODY,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Go where this infra.conf says.")] = None,
    deployment: Annotated[str | None, typer.Option(metavar="NAME", help="Only VMs of this deployment.")] = None,
    per_host: Annotated[int, typer.Option(min=1, metavar="N", help="Moves of one host at a time.")] = 1,
    per_link: Annotated[int, typer.Option(min=1, metavar="N", help="Moves between two sites at a time.")] = 4,
    overcommit: Annotated[bool, typer.Option("--overcommit", help="Also to hosts without room.")] = False,
    memory_unit: Annotated[MemoryUnit, typer.Option(help="The unit of the file's memory columns.")] = MemoryUnit.AUTO,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would move, and in which order.")] = False,
    timeout: Annotated[
        float, typer.Option(callback=seconds, metavar="SECONDS", min=1, max=86_400, help="How long each may take.")
    ] = 3600.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move VMs to other hosts while they run, with their disks.

    libvirt moves them, from host to host, over an encrypted link of the agents' own; hosts need the VMs' images. A VM
    runs on one of the two hosts at any time, whatever breaks. Ctrl-C leaves those under way where they were. With
    --dry-run the exit code is 2 where something would move.
    """
    ctl = ctl_of(context)
    with ctl.session() as session:
        status, record = session.status(), session.infra()
        if plan is not None:
            if vms:
                raise CtlError("either --plan or VMs and hosts, not both", ExitStatus.USAGE)
            wanted = migration.by_file(
                load(plan)[0],
                deployment_name(plan, deployment),
                status,
                record,
                memory_unit=memory_unit,
                overcommit=overcommit,
            )
        else:
            wanted = _wanted(session, vms or [], selection, deployment)
        for name in (some(wanted.absent),) if wanted.absent else ():
            ctl.terminal.say(f"not on record, and not moved: {name}; `ctl spawn` makes them")
        room = {} if overcommit else migration.rooms(status, record)
        if dry_run:
            sites = {host.name: host.site for host in status.hosts}
            raise typer.Exit(_shown(ctl.terminal, wanted, room, sites, (per_host, per_link), as_json=as_json))
        if not wanted.moves:
            ctl.terminal.text(
                json_text(migration.moved_object((), {}, wanted.absent))
                if as_json
                else "all are where they should be\n"
            )
            raise typer.Exit
        job = session.move_vms(
            [(move.deployment, move.name, move.target) for move in wanted.moves],
            per_host=per_host,
            per_link=per_link,
            overcommit=overcommit,
            timeout=timeout,
        )
        following = Following(job, ctl.terminal, quiet=quiet)
        results = _follow(following, len(wanted.moves))
    if as_json:
        ctl.terminal.text(json_text(migration.moved_object(wanted.moves, results, wanted.absent)))
    else:
        ctl.terminal.text("".join(f"{line}\n" for line in migration.moved_lines(wanted.moves, results)))
    failed = migration.failed_lines(wanted.moves, results)
    for line in failed:
        ctl.terminal.say(line, bad=True)
    ctl.terminal.flush()
    following.check()
    raise typer.Exit(ExitStatus.FAILED if failed else ExitStatus.OK)


def _wanted(session: Session, words: list[str], selection: Selection, deployment: str | None) -> Wanted:
    if not words:
        raise CtlError("which VMs, and where to? Give VM... HOST, -w HOSTS HOST, or --plan FILE", ExitStatus.USAGE)
    *names, where = words
    hosts = session.choose(selection)
    if not names and hosts is None:
        raise CtlError(f"which VMs to {where}? Give their names before it, or -w HOSTS", ExitStatus.USAGE)
    targets = session.select(where)
    meant = pick(session.status().vms, names, deployment=deployment, hosts=hosts)
    wanted = migration.to_hosts(meant, targets, session.status(), session.infra())
    if not wanted.moves:
        raise CtlError(f"all of them are on {where} already", ExitStatus.USAGE)
    return wanted


def _follow(following: Following, total: int) -> dict[str, VmResult]:
    results: dict[str, VmResult] = {}
    going: dict[str, VmProgress] = {}

    def note(happening: Happening) -> None:
        if isinstance(happening, VmProgress):
            going[happening.name] = happening
        elif isinstance(happening, VmAnswer):
            for result in happening.results:
                results[result.name] = result
                going.pop(result.name, None)

    def line() -> str:
        said = dict(results)
        moved = sum(result.change is VmChange.MOVED for result in said.values())
        return migration.moving_line(total, moved, len(said) - moved, dict(going))

    following.run(line, note)
    return results


def _shown(
    terminal: Terminal,
    wanted: Wanted,
    room: Mapping[str, Room],
    sites: Mapping[str, str],
    limits: tuple[int, int],
    *,
    as_json: bool,
) -> int:
    rounds, stuck = migration.in_rounds(wanted.moves, room, sites, per_host=limits[0], per_link=limits[1])
    if as_json:
        terminal.text(json_text(migration.plan_object(rounds, stuck, wanted.absent)))
    else:
        terminal.text("".join(f"{line}\n" for line in migration.plan_lines(rounds, stuck)))
    return ExitStatus.USAGE if wanted.moves else ExitStatus.OK
