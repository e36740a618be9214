"""Results as text: what `ctl` shows of outcomes. Pure: no stream, no clock."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from controller.hosts import fold
from controller.session import Result
from protocol.outcomes import Lost, Outcome, describe

_Key = TypeVar("_Key", bound=Hashable)

RULE = "-" * 15
_NAMES_OF_STREAMS = ("standard output", "standard error")


def clean(text: str) -> str:
    """`text` as one line that a terminal shows and does not obey: what does not print stands as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def label(hosts: Sequence[str]) -> str:
    """The hosts, and how many they are where they are several: `h3`, `h[0-3] (4)`."""
    return hosts[0] if len(hosts) == 1 else f"{fold(hosts)} ({len(hosts)})"


def grouped(
    results: Iterable[Result], key: Callable[[Result], _Key], order: Mapping[str, int]
) -> list[tuple[_Key, list[str]]]:
    """The hosts for each value of `key`. Hosts by `order` (name to rank), groups by their first hosts."""
    groups: dict[_Key, list[str]] = {}
    for result in results:
        groups.setdefault(key(result), []).extend(result.hosts)
    for hosts in groups.values():
        hosts.sort(key=order.__getitem__)
    return sorted(groups.items(), key=lambda group: order[group[1][0]])


def outputs(results: Iterable[Result], order: Mapping[str, int], stream: int) -> list[tuple[str, bytes]]:
    """What was written to standard output (1) or error (2), equal ones once, under the hosts that wrote it."""

    def text_and_total(result: Result) -> tuple[bytes, int]:
        output = result.output
        return (output.out, output.out_total) if stream == 1 else (output.err, output.err_total)

    return [(label(hosts), data) for (data, _), hosts in grouped(results, text_and_total, order) if data]


def failures(results: Iterable[Result], order: Mapping[str, int]) -> list[str]:
    """A line for each outcome that is not the one hoped for: `h[3,9] (2): exited with exit code 3`."""
    bad = [result for result in results if not result.ok]
    return [
        f"{label(hosts)}: {clean(describe(outcome))}" for outcome, hosts in grouped(bad, lambda r: r.outcome, order)
    ]


def shortened(results: Iterable[Result], order: Mapping[str, int]) -> list[str]:
    """A line for each output above its budget: how much there was, and where the rest is."""

    def missing(result: Result) -> tuple[int, int, int, int, str]:
        output = result.output
        return len(output.out), output.out_total, len(output.err), output.err_total, output.spool

    lines = []
    for (out, out_total, err, err_total, spool), hosts in grouped(results, missing, order):
        parts = [
            f"{shown} of {total} bytes of {name}"
            for name, shown, total in zip(_NAMES_OF_STREAMS, (out, err), (out_total, err_total), strict=True)
            if shown < total
        ]
        if parts:
            rest = f"all of it is on the host: {clean(spool)}" if spool else "the rest was not kept on the host"
            lines.append(f"{label(hosts)}: {' and '.join(parts)} shown; {rest}")
    return lines


def summary(results: Sequence[Result], order: Mapping[str, int], *, unsettled: Sequence[str] = ()) -> str:
    """One line where not all went well, empty where all did. `unsettled` are hosts without an outcome.

    `61 of 64 answered ok; failed: h[1-2]; missing: h[3,7] (lost: …)`
    """
    good = sum(len(result.hosts) for result in results if result.ok)
    total = sum(len(result.hosts) for result in results) + len(unsettled)
    if good == total:
        return ""
    parts = [f"{good} of {total} answered ok"]
    failed = [
        name for result in results if not result.ok and not isinstance(result.outcome, Lost) for name in result.hosts
    ]
    if failed:
        parts.append(f"failed: {fold(failed)}")
    lost = [result for result in results if isinstance(result.outcome, Lost)]
    missing = [
        f"{fold(hosts)} ({clean(describe(outcome))})" for outcome, hosts in grouped(lost, lambda r: r.outcome, order)
    ]
    if unsettled:
        missing.append(f"{fold(unsettled)} (no outcome yet)")
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    return "; ".join(parts)


def text_or_base64(name: str, data: bytes) -> dict[str, str]:
    """`data` under `name` where it is UTF-8, else in base64 under `name_base64`."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        import base64

        return {f"{name}_base64": base64.b64encode(data).decode()}


def outcome_object(outcome: Outcome) -> dict[str, Any]:
    """An outcome for programs: its kind and what it holds, `{"kind": "exited", "code": 0}`."""
    fields = {name: getattr(outcome, name) for name in outcome.__struct_fields__}
    return {"kind": outcome.__struct_config__.tag, **fields}


def result_objects(results: Sequence[Result], order: Mapping[str, int]) -> list[dict[str, Any]]:
    """The results for programs, equal ones in one."""
    return [
        {
            "hosts": hosts,
            "nodeset": fold(hosts),
            "outcome": outcome_object(outcome),
            **text_or_base64("stdout", output.out),
            **text_or_base64("stderr", output.err),
            "stdout_bytes": output.out_total,
            "stderr_bytes": output.err_total,
            "spool": output.spool,
        }
        for (outcome, output), hosts in grouped(results, lambda r: (r.outcome, r.output), order)
    ]


def json_text(value: object) -> str:
    """A value as indented JSON with a last line end."""
    return msgspec.json.format(msgspec.json.encode(value)).decode() + "\n"
