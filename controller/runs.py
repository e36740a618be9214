"""What a command is asked to be, checked before anything is sent: all mistakes at once."""

from __future__ import annotations

import typing
from functools import cache

import msgspec

from controller import api
from controller.status import CtlError, ExitStatus
from protocol.commands import Run
from protocol.limits import MAX_COMMAND_TEXT, MAX_ENV, MAX_KILL_AFTER, MAX_OUTPUT, MAX_PATH, MAX_SCRIPT

#: What each field must be, in the words of whoever gave it.
_RULES = {
    "argv": f"a command has 1 to 4,096 words of at most {MAX_COMMAND_TEXT >> 10} KiB",
    "output_limit": f"the output limit is at most {MAX_OUTPUT >> 20} MiB",
    "script": f"a script has 1 byte to {MAX_SCRIPT >> 10} KiB: push a larger one with `ctl push`, and run it there",
    "cwd": f"the working directory is an absolute path of at most {MAX_PATH} bytes",
    "env": f"there are at most {MAX_ENV} environment variables, whose names have no = and are not empty",
    "user": "a user is a name or a number of at most 256 characters",
    "nice": "a nice level is between -20 and 19",
    "limits": "a resource limit is a name like nofile, as or cpu with a number, or -1 for none",
    "kill_after": f"the time from the polite signal to the certain one is between 0 and {MAX_KILL_AFTER:g} s",
    "input": f"input that goes with the command has at most {MAX_SCRIPT >> 10} KiB",
}


def run_body(request: api.RunOn) -> Run:
    """The command of a request, as hosts take it. Raises CtlError with all that they would not take."""
    fields = {name: getattr(request, name) for name in Run.__struct_fields__ if name != "first"}
    wrong = [_RULES[name] for name, type_ in _types().items() if not _is(fields[name], type_)]
    texts = [*request.argv, *request.env, *request.env.values(), request.user]
    if any("\0" in text for text in texts):
        wrong.append("no word of a command has a NUL byte in it")
    if request.feed and request.input is not None:
        wrong.append("input goes with the command or comes after it, not both")
    if request.detach and request.feed:
        wrong.append("who is gone sends no input: leave --stdin or --detach out")
    if request.batch and request.feed:
        wrong.append("standard input comes once, for all hosts at a time: leave --stdin or --batch out")
    if wrong:
        raise CtlError("; ".join(wrong), ExitStatus.USAGE)
    # Nobody reads the stream of a command that was left.
    return Run(**fields | {"stream": request.stream and not request.detach})


@cache
def _types() -> dict[str, object]:
    # Once: to read them takes longer than all else that the service does before a command leaves it.
    hints = typing.get_type_hints(Run, include_extras=True)
    return {name: hints[name] for name in _RULES}


def _is(value: object, type_: object) -> bool:
    try:
        msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError:
        return False
    return True
