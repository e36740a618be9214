"""What is to be tuned on hosts, and what came of it, as text and for programs. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from agent.tunables import TUNABLES
from controller.render import clean, label
from controller.status import CtlError, ExitStatus
from protocol.checks import TuneAnswer

_Key = TypeVar("_Key", bound=Hashable)

#: For each host the settings that are too low: what they are and what they should be at least.
Changes = Mapping[str, Mapping[str, tuple[int, int]]]


def keys_of(only: Sequence[str]) -> tuple[str, ...]:
    """The settings that a person named, all where none is. Raises CtlError with those that are none."""
    strange = [key for key in only if key not in TUNABLES]
    if strange:
        raise CtlError(
            f"no setting that can be tuned: {', '.join(map(clean, strange))}; there are {', '.join(TUNABLES)}",
            ExitStatus.USAGE,
        )
    return tuple(only or TUNABLES)


def _by(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    groups: dict[_Key, list[str]] = {}
    for key, host in pairs:
        groups.setdefault(key, []).append(host)
    return groups


def planned_text(changes: Changes) -> str:
    """What would be changed, a line for each change that hosts share."""
    shared = _by(((key, *values), host) for host, each in changes.items() for key, values in each.items())
    order = {key: number for number, key in enumerate(TUNABLES)}
    lines = [
        f"~ {key} {now} -> {least}: {label(hosts)}"
        for (key, now, least), hosts in sorted(shared.items(), key=lambda item: order[item[0][0]])
    ]
    touched = sum(map(bool, changes.values()))
    lines.append(
        f"{touched} of {len(changes)} hosts to change: `ctl tune --apply` does it, `ctl tune --undo` takes it back"
        if touched
        else f"nothing to do on {len(changes)} hosts"
    )
    return "".join(f"{line}\n" for line in lines)


def planned_objects(changes: Changes) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {"host": host, "changes": [{"key": key, "before": now, "after": least} for key, (now, least) in each.items()]}
        for host, each in changes.items()
    ]


def done_text(answers: Mapping[str, TuneAnswer]) -> str:
    """What was changed, what was not and why, and which daemons have yet to begin anew."""
    lines = []
    changed = _by(
        ((one.key, one.before, one.after, one.note), host)
        for host, answer in answers.items()
        for one in answer.tuned
        if one.before != one.after or one.note
    )
    for (key, before, after, note), hosts in changed.items():
        what = f"{_value(before)} -> {_value(after)}" if before != after else f"stays {_value(before)}"
        lines.append(f"{key} {what}: {label(hosts)}" + (f" ({clean(note)})" if note else ""))
    for name, hosts in _by((a.restart, host) for host, a in answers.items() if a.restart).items():
        step = "again with --restart-libvirt, or systemctl restart there; VMs go on"
        lines.append(f"{clean(name)} has yet to begin anew to take its settings: {label(hosts)}; next: {step}")
    if not lines and answers and not any(answer.problem for answer in answers.values()):
        lines.append(f"nothing to do on {len(answers)} hosts")
    return "".join(f"{line}\n" for line in lines)


def done_objects(answers: Mapping[str, TuneAnswer]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {"host": host, "changes": answer.tuned, "restart": answer.restart, "problem": answer.problem}
        for host, answer in answers.items()
    ]


def _value(value: int | None) -> str:
    return "unset" if value is None else str(value)


def problems_of(answers: Mapping[str, TuneAnswer]) -> list[str]:
    """What went wrong, a line for each thing that hosts share."""
    shared = _by((answer.problem, host) for host, answer in answers.items() if answer.problem)
    return [f"{label(hosts)}: {clean(problem)}" for problem, hosts in shared.items()]
