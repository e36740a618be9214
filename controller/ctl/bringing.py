"""What `ctl push` does, once its arguments are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from controller import render
from controller.asking_files import PushOptions, push_request
from controller.ctl.context import Ctl
from controller.ctl.following import Following, Pushed
from controller.ctl.said import show_said
from controller.selection import EVERYBODY, Selection
from controller.session import Job
from controller.status import CtlError, ExitStatus, Mistakes
from controller.terminal import Terminal


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `ctl push`, as they were given."""

    files: tuple[Path, ...]
    destination: str
    selection: Selection = EVERYBODY
    mode: str | None = None
    owner: str = ""
    preserve: bool = False
    xattrs: bool = False
    backup: bool = False
    suffix: str = "~"
    checksum: Literal["always", "size-mtime"] = "always"
    compress: bool = True
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False


def run(ctl: Ctl, asked: Push, wrong: Mistakes | None = None) -> int:
    """Push, and show what comes of it. The exit code; raises CtlError with all that is wrong, `wrong` included."""
    wrong = wrong or Mistakes()
    bits: int | None = None
    with wrong:
        bits = _mode_bits(asked.mode)
    options: PushOptions = {
        "mode": bits,
        "owner": asked.owner,
        "preserve": asked.preserve,
        "xattrs": asked.xattrs,
        "backup": asked.suffix if asked.backup else "",
        "checksum": asked.checksum,
        "compress": asked.compress,
        "dry_run": asked.dry_run,
    }
    with wrong:
        if asked.destination.startswith("@/"):
            raise CtlError(f"{asked.destination!r} is the agents' own: give a path from / on", ExitStatus.USAGE)
    with wrong:
        push_request(asked.files, asked.destination, None, **options)
    with ctl.session() as session:
        hosts: tuple[str, ...] | None = None
        with wrong:
            hosts = session.choose(asked.selection, known=bool(wrong))
        wrong.check()
        job = session.push(asked.files, asked.destination, hosts, **options)
        return _follow(job, ctl.terminal, as_json=asked.as_json, quiet=asked.quiet)


def _mode_bits(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise CtlError(f"--mode {text}: give a mode in octal, like 644 or 0755", ExitStatus.USAGE)
    return mode


def _follow(job: Job, terminal: Terminal, *, as_json: bool, quiet: bool) -> int:
    following = Following(job, terminal, quiet=quiet, announce=True)
    pushed = Pushed(following)
    following.run(pushed.line, pushed.note)
    if as_json:
        following.show_json()
    else:
        show_said(following)
        following.show_failures()
        if not quiet:
            # A push that can't go on anywhere is no fault of the hosts that passed this on.
            told = {getattr(result.outcome, "why", "") for result in following.results}
            bypassed = ((whom, why, by) for (whom, why), by in pushed.bypassed.items() if why not in told)
            for whom, why, by in bypassed:
                terminal.say(f"{whom} was bypassed by {render.label(by)}: {render.clean(why)}")
    return following.end()
