"""Outcomes: what became of a command at one host. Every target ends in exactly one of these, always."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from protocol.limits import MAX_BITMAP, MAX_OUTPUT, MAX_PATH, MAX_TEXT

Why = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Written = Annotated[bytes, msgspec.Meta(max_length=MAX_OUTPUT)]
Total = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Exited(msgspec.Struct, frozen=True, tag="exited", array_like=True, forbid_unknown_fields=True):
    """The command ran and ended with `code`, 0 to 255."""

    code: Annotated[int, msgspec.Meta(ge=0, le=255)]


class Killed(msgspec.Struct, frozen=True, tag="killed", array_like=True, forbid_unknown_fields=True):
    """The command was ended by `signal` from outside Canopy."""

    signal: Annotated[int, msgspec.Meta(ge=1, le=127)]


class TimedOut(msgspec.Struct, frozen=True, tag="timed out", array_like=True, forbid_unknown_fields=True):
    """The agent ended the command at its deadline. It holds no figure: hosts' figures differ, and would not fold."""


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled", array_like=True, forbid_unknown_fields=True):
    """Somebody cancelled the command. `ran` is false where it had not begun."""

    ran: bool


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True, forbid_unknown_fields=True):
    """The agent would not act. `trust` is true where the reason is a signature, a replay or an expiry."""

    why: Why
    trust: bool = False


class FailedToStart(msgspec.Struct, frozen=True, tag="failed to start", array_like=True, forbid_unknown_fields=True):
    """The agent tried and could not begin."""

    why: Why


class Lost(msgspec.Struct, frozen=True, tag="lost", array_like=True, forbid_unknown_fields=True):
    """Nobody can say what became of it. `why` names the link or the restart that it was lost to."""

    why: Why


Outcome: TypeAlias = Exited | Killed | TimedOut | Cancelled | Refused | FailedToStart | Lost


class Output(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a command wrote, as far as its budget went, and how many bytes it wrote in all.

    `spool` is the file on the host that holds everything, where the budget did not.
    """

    out: Written = b""
    err: Written = b""
    out_total: Total = 0
    err_total: Total = 0
    spool: Annotated[str, msgspec.Meta(max_length=MAX_PATH)] = ""


NO_OUTPUT = Output()
#: What a fold costs beside its texts and its bitmap: tags, lengths and numbers, generously, in bytes.
_FOLD_OVERHEAD = 64
#: Why a command is lost that was given to an agent's predecessor, whoever says so.
RESTARTED = "its agent restarted"
#: And one whose outcome was on its disk, where that is no longer what was written.
UNREADABLE = "its agent restarted, and what it had written of the outcome can't be read"


class Fold(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One outcome with one output, and the set of ranks (packed) that it is true of."""

    ranks: Annotated[bytes, msgspec.Meta(max_length=MAX_BITMAP)]
    outcome: Outcome
    output: Output = NO_OUTPUT


def sentence(text: str) -> str:
    """`text` as a receiver takes it: at most MAX_TEXT characters, and none that UTF-8 can't carry.

    Whoever sends a longer one would be cut off for it, and sent away again wherever it told why.
    """
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def fitting(outcome: Outcome, output: Output) -> tuple[Outcome, Output]:
    """Both as a receiver takes them."""
    if isinstance(outcome, Refused | FailedToStart | Lost):
        outcome = msgspec.structs.replace(outcome, why=sentence(outcome.why))
    if max(len(output.out), len(output.err)) > MAX_OUTPUT or len(output.spool) > MAX_PATH:
        output = msgspec.structs.replace(
            output, out=output.out[:MAX_OUTPUT], err=output.err[:MAX_OUTPUT], spool=output.spool[:MAX_PATH]
        )
    return outcome, output


def succeeded(outcome: Outcome) -> bool:
    """Whether the outcome is the one that everybody hoped for."""
    return outcome == Exited(0)


def describe(outcome: Outcome) -> str:
    """The outcome in words, as people read it: `ok`, `exited with exit code 3`, `lost: …`."""
    match outcome:
        case Exited(code):
            return "ok" if code == 0 else f"exited with exit code {code}"
        case Killed(signal):
            return f"killed by signal {signal}"
        case TimedOut():
            return "timed out"
        case Cancelled(ran):
            return "cancelled" if ran else "cancelled before it began"
        case Refused(why):
            return f"refused: {why}"
        case FailedToStart(why):
            return f"failed to start: {why}"
        case Lost(why):
            return f"lost: {why}"


def size(fold: Fold) -> int:
    """About how many bytes it is on the wire, and never less; the same at both ends of a link."""
    output = fold.output
    count = len(fold.ranks) + len(output.out) + len(output.err) + _FOLD_OVERHEAD
    if not isinstance(fold.outcome, Exited):
        # A character takes up to four bytes in UTF-8.
        count += 4 * len(getattr(fold.outcome, "why", ""))
    return count + 4 * len(output.spool)
