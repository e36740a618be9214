"""What can be asked of a command beside its words and its hosts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from controller.run_api import RunOn
from protocol.limits import DEFAULT_OUTPUT


class RunOptions(TypedDict, total=False):
    """The options of `run`. Times are in seconds.

    `timeout` ends the command on hosts where it takes longer, `kill_after` is the time between the polite signal and
    the certain one. `output_limit` is how many bytes of each stream of each host come back; the rest stays on the host.
    With `detach` the job goes on when this process ends: `job` finds it by its number.

    With `batch` so many hosts run it at a time (a number, or `"10%"`), and once more than `max_fail` failed no more
    begin: those end as Cancelled, and never ran it.

    With `script` that program runs, and the command is its name and its arguments. `cwd` is absolute, `env` is added to
    the agent's environment, `user` needs an agent that is root, `nice` is added to the agent's level, `limits` are by
    setrlimit(2)'s names in small letters (-1: none).
    """

    timeout: float | None
    output_limit: int
    detach: bool
    batch: int | str | None
    max_fail: int | str
    script: bytes | None
    cwd: str | None
    env: Mapping[str, str] | None
    user: str
    nice: int
    limits: Mapping[str, int] | None
    kill_after: float | None


def run_request(
    command: str | Sequence[str],
    hosts: tuple[str, ...] | None,
    *,
    stream: bool = False,
    stdin: bytes | None = None,
    feed: bool = False,
    **options: Unpack[RunOptions],
) -> RunOn:
    """The request for a shell string, or for an argument vector."""
    script, timeout, batch = options.get("script"), options.get("timeout"), options.get("batch")
    if isinstance(command, str):
        command = (command,) if script is not None else ("/bin/sh", "-c", command)
    return RunOn(
        hosts=hosts,
        argv=tuple(command),
        timeout_ms=None if timeout is None else round(timeout * 1000),
        output_limit=options.get("output_limit", DEFAULT_OUTPUT),
        stream=stream,
        detach=options.get("detach", False),
        batch="" if batch is None else str(batch),
        max_fail="" if batch is None else str(options.get("max_fail", 0)),
        script=script,
        cwd=options.get("cwd"),
        env=dict(options.get("env") or {}),
        user=options.get("user", ""),
        nice=options.get("nice", 0),
        limits=dict(options.get("limits") or {}),
        kill_after=options.get("kill_after"),
        input=stdin,
        feed=feed,
    )
