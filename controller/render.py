"""Results as text: what `ctl` shows of outcomes. Pure: no stream, no clock."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from controller.hosts import fold
from controller.session import Piece, Result
from protocol.outcomes import Cancelled, Exited, Killed, Lost, Outcome, Output, TimedOut, describe

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


#: How a set of hosts is called.
Name = Callable[[Sequence[str]], str]


def _commonest_first(groups: Iterable[tuple[_Key, list[str]]]) -> list[tuple[_Key, list[str]]]:
    # The sort is stable: groups of one size stay in the order of their first hosts.
    return sorted(groups, key=lambda group: -len(group[1]))


def outputs(results: Iterable[Result], order: Mapping[str, int], stream: int) -> list[tuple[list[str], bytes]]:
    """What was written to standard output (1) or error (2), equal ones once, with the hosts that wrote it.

    The most common one comes first, so that the odd ones stand last, where one looks.
    """

    def text_and_total(result: Result) -> tuple[bytes, int]:
        output = result.output
        return (output.out, output.out_total) if stream == 1 else (output.err, output.err_total)

    found = grouped(results, text_and_total, order)
    return [(hosts, data) for (data, _), hosts in _commonest_first(found) if data]


def merged(results: Iterable[Result], order: Mapping[str, int]) -> list[tuple[list[str], bytes, bytes]]:
    """Standard output and error together: hosts for which both are equal, in the order of `outputs`."""
    found = grouped(results, lambda r: r.output, order)
    return [(hosts, both.out, both.err) for both, hosts in _commonest_first(found) if both.out or both.err]


def each(results: Iterable[Result], order: Mapping[str, int]) -> list[tuple[str, Output]]:
    """What each host wrote, in the order of hosts."""
    found = {host: result.output for result in results for host in result.hosts}
    return [(host, found[host]) for host in sorted(found, key=order.__getitem__)]


def differences(results: Iterable[Result], order: Mapping[str, int], name: Name) -> list[tuple[str, bytes]]:
    """The most common standard output as it is, and for each other one what differs from it.

    Of hosts whose command did not run nothing is said: they have no output to compare.
    """
    ran = [result for result in results if isinstance(result.outcome, Exited | Killed | TimedOut)]
    found = _commonest_first(grouped(ran, lambda r: r.output.out, order))
    if not found:
        return []
    common, hosts = found[0]
    of = name(hosts)
    return [(of, common), *((name(others), _difference(common, data, of, name(others))) for data, others in found[1:])]


def _difference(common: bytes, other: bytes, of: str, to: str) -> bytes:
    if b"\0" in common or b"\0" in other:
        first = next((place for place, (a, b) in enumerate(zip(common, other, strict=False)) if a != b), None)
        where = min(len(common), len(other)) if first is None else first
        return f"binary, {len(common)} and {len(other)} bytes, different from byte {where} on\n".encode()
    import difflib

    lines = difflib.diff_bytes(
        difflib.unified_diff, common.splitlines(True), other.splitlines(True), of.encode(), to.encode(), n=1
    )
    return b"".join(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in lines)


def largest_code(results: Iterable[Result], otherwise: int) -> int:
    """The largest exit code of a host, as `clush -S` has it; `otherwise` where that is larger, or where hosts have
    none."""
    codes = [result.outcome.code for result in results if isinstance(result.outcome, Exited)]
    without = any(not isinstance(result.outcome, Exited) for result in results)
    return max([*codes, otherwise if without or not codes else 0])


def failures(results: Iterable[Result], order: Mapping[str, int], late: Iterable[Result] = ()) -> list[str]:
    """A line for each outcome that is not the one hoped for: `h[3,9] (2): exited with exit code 3`.

    Where hosts answered after they were lost that stands behind it: `h7: lost: …; answered later: ok`.
    """
    answers = {host: result.outcome for result in late for host in result.hosts}
    bad = [
        Result((host,), result.outcome, result.output) for result in results if not result.ok for host in result.hosts
    ]

    def both(result: Result) -> tuple[Outcome, Outcome | None]:
        lost = isinstance(result.outcome, Lost)
        return result.outcome, answers.get(result.hosts[0]) if lost else None

    return [
        f"{label(hosts)}: {clean(describe(outcome))}"
        + (f"; answered later: {clean(describe(later))}" if later is not None else "")
        for (outcome, later), hosts in grouped(bad, both, order)
    ]


def never_begun(results: Iterable[Result], order: Mapping[str, int]) -> str:
    """The hosts that were never given the command, folded."""
    never = [host for result in results if result.outcome == Cancelled(ran=False) for host in result.hosts]
    return fold(sorted(never, key=order.__getitem__))


def whole_output(job: int, hosts: Sequence[str], spool: str) -> str:
    """Where all that these hosts wrote is, and how to get it."""
    which = hosts[0] if len(hosts) == 1 else "HOST"
    return f"all of it is on the host ({clean(spool)}): `ctl job {job} --output {which}` fetches it"


def shortened(results: Iterable[Result], order: Mapping[str, int], job: int) -> list[str]:
    """A line for each kind of output of job `job` above its budget: how much there was, and how to get the rest."""
    results = list(results)

    def missing(result: Result) -> tuple[bool, bool, str]:
        output = result.output
        return len(output.out) < output.out_total, len(output.err) < output.err_total, output.spool

    def sizes(key: tuple[bool, bool, str], stream: int) -> str:
        outputs = [result.output for result in results if missing(result) == key]
        shown = [len((output.out, output.err)[stream]) for output in outputs]
        total = [(output.out_total, output.err_total)[stream] for output in outputs]
        return f"{_span(shown)} of {_span(total)} bytes of {_NAMES_OF_STREAMS[stream]}"

    lines = []
    for key, hosts in grouped(results, missing, order):
        parts = [sizes(key, stream) for stream in (0, 1) if key[stream]]
        if parts:
            rest = whole_output(job, hosts, key[2]) if key[2] else "the rest was not kept on the host"
            lines.append(f"{label(hosts)}: {' and '.join(parts)} shown; {rest}")
    return lines


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


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


def piece_object(piece: Piece) -> dict[str, Any]:
    """A piece of output for programs: `{"host": "h1", "stream": "stdout", "offset": 0, "data": "…"}`."""
    stream = "stdout" if piece.stream == 1 else "stderr"
    return {"host": piece.host, "stream": stream, "offset": piece.offset, **text_or_base64("data", piece.data)}


def json_line(value: object) -> str:
    """A value as JSON on one line."""
    return msgspec.json.encode(value).decode() + "\n"


def json_text(value: object) -> str:
    """A value as indented JSON with a last line end."""
    return msgspec.json.format(msgspec.json.encode(value)).decode() + "\n"
