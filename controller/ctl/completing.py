"""What the shell offers when Tab is pressed: hosts, groups, labels and jobs. Where nobody answers it offers nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import typer

from controller.session import Session
from controller.status import CtlError

#: A list that is longer is no help, and takes a shell long to draw.
_MOST = 200
_OPERATORS = ",!&^"


def _session(context: typer.Context) -> Session:
    fleet = context.find_root().params.get("fleet")
    return Session(str(fleet) if fleet else None)


def _offered(find: Callable[[], Iterable[str]], start: str, before: str = "") -> Iterator[str]:
    try:
        found = [name for name in find() if name.startswith(start)]
    except (CtlError, OSError):
        return
    for name in found[:_MOST]:
        yield before + name


def _last(text: str) -> tuple[str, str]:
    """A host set that is being typed, in two: what is complete, and the name that is not."""
    end = max(text.rfind(sign) for sign in _OPERATORS) + 1
    return text[:end], text[end:]


def complete_host(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Hosts, and behind an @ groups."""
    session = _session(ctx)
    before, start = _last(incomplete)
    if start.startswith("@"):
        return _offered(lambda: [f"@{name}" for name in session.groups()], start, before)
    return _offered(lambda: [host.name for host in session.status().hosts], start, before)


def complete_group(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Groups."""
    session = _session(ctx)
    before, start = _last(incomplete)
    return _offered(session.groups, start, before)


def complete_label(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Labels that hosts have."""
    session = _session(ctx)

    def labels() -> list[str]:
        hosts = session.status().hosts
        return sorted({f"{key}={value}" for host in hosts for key, value in host.labels.items()})

    return _offered(labels, incomplete)


def complete_job(ctx: typer.Context, incomplete: str) -> Iterator[str]:
    """Jobs, the latest first."""
    session = _session(ctx)
    return _offered(lambda: [str(job.id) for job in session.jobs(_MOST)], incomplete)
