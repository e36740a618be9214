"""Jobs as text. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from controller.api import JobStatus
from controller.render import clean
from controller.tables import age, table

#: A command in a table: longer ones make each row take two lines on usual terminals.
_WIDEST = 60
#: What `ctl broadcast` makes of a shell's line.
_SHELL = ["/bin/sh", "-c"]


def what_text(what: str) -> str:
    """What a job was, as a person would type it: `uname -r`, `push app.tar /opt/app.tar`."""
    all_ = words(what)
    if all_[0] != "run":
        return " ".join(all_)
    argv = all_[1:]
    return argv[2] if argv[:2] == _SHELL and len(argv) == 3 else shlex.join(argv)


def words(what: str) -> list[str]:
    """What a job was, in its words: who was asked for what."""
    # Older services put numbers there too.
    return [str(word) for word in msgspec.json.decode(what)]


def took(seconds: float | None) -> str:
    """How long a job took: `0.3 s`, `2 min 5 s`, or that it runs."""
    if seconds is None:
        return "runs"
    return f"{seconds:.1f} s" if seconds < 60 else age(seconds)


def jobs_table(jobs: Sequence[JobStatus], user: Callable[[int], str]) -> str:
    """Jobs, a line each. `user(uid)` is a user's name."""
    return table(
        ("JOB", "WHO", "WHAT", "HOSTS", "OK", "FAILED", "LOST", "MISSING", "BEGAN", "TOOK"),
        [
            (
                str(job.id),
                user(job.uid),
                _short(what_text(job.what)),
                *map(str, (job.targets, job.ok, job.failed, job.lost, job.missing)),
                f"{age(job.began_s_ago)} ago",
                took(job.took_s),
            )
            for job in jobs
        ],
    )


def _short(text: str) -> str:
    text = clean(text)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def job_objects(jobs: Sequence[JobStatus], user: Callable[[int], str]) -> list[dict[str, Any]]:
    """Jobs for programs: as the service tells of them, with the user's name and the words of what it was. A job's
    number is `job` wherever programs are told of it."""
    found = []
    for job in jobs:
        fields = msgspec.to_builtins(job)
        found.append({"job": fields.pop("id"), **fields, "user": user(job.uid), "what": words(job.what)})
    return found
