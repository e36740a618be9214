"""What can be asked of a command beside its words and its hosts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

from controller import api
from protocol.limits import DEFAULT_OUTPUT


class RunOptions(TypedDict, total=False):
    """The options of `run`. Times are in seconds.

    `timeout` ends the command on hosts where it takes longer, `kill_after` is the time between the polite signal and
    the certain one. `output_limit` is how many bytes of each stream of each host come back; the rest stays on the host.
    With `detach` the job goes on when this process ends: `job` finds it by its number.

    With `batch` so many hosts run it at a time (a number, or `"10%"`), and once more than `max_fail` failed no more
    begin: those end as Cancelled, and never ran it.
    """

    timeout: float | None
    output_limit: int
    detach: bool
    batch: int | str | None
    max_fail: int | str


def run_request(
    command: str | Sequence[str],
    hosts: tuple[str, ...] | None,
    *,
    stream: bool = False,
    **options: Unpack[RunOptions],
) -> api.RunOn:
    """The request for a shell string, or for an argument vector."""
    timeout, batch = options.get("timeout"), options.get("batch")
    if isinstance(command, str):
        command = ("/bin/sh", "-c", command)
    return api.RunOn(
        hosts=hosts,
        argv=tuple(command),
        timeout_ms=None if timeout is None else round(timeout * 1000),
        output_limit=options.get("output_limit", DEFAULT_OUTPUT),
        stream=stream,
        detach=options.get("detach", False),
        batch="" if batch is None else str(batch),
        max_fail="" if batch is None else str(options.get("max_fail", 0)),
    )
