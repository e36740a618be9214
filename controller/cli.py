"""The `ctl` command: which way its arguments are read, and what becomes of errors."""

from __future__ import annotations

from controller.ctl import lean  # before anything that imports msgspec

# isort: split
import os
import sys
from collections.abc import Sequence

from controller.ctl import quick
from controller.ctl.context import Ctl, tell
from controller.ctl.running import Broadcast
from controller.ctl.running import run as run_broadcast
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal

lean.read()


def main() -> None:
    """The process: run `ctl`, and end with its exit code."""
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # Whoever read our output has gone.
        pass
    # Taking the interpreter down in order takes 10 ms of a command's 60, and nothing is left to be done.
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run `ctl` with these arguments. Its exit code; with --debug errors are raised."""
    debug = "--debug" in arguments
    try:
        line = quick.parse(arguments, os.environ.get("CANOPY_FLEET"))
        if line is None:
            return _run_typer(list(arguments))
        ctl = Ctl(fleet=line.fleet, debug=line.debug, terminal=Terminal())
        if isinstance(line.asked, Broadcast):
            return run_broadcast(ctl, line.asked)
        from controller.ctl.bringing import run as run_push

        return run_push(ctl, line.asked)
    except BrokenPipeError:
        return ExitStatus.FAILED
    except (CtlError, KeyboardInterrupt) as error:
        if debug:
            raise
        return tell(error)
    except Exception as error:
        if debug:
            raise
        print(f"ctl: {type(error).__name__}: {error} (a mistake in ctl: run it with --debug for more)", file=sys.stderr)
        return ExitStatus.FAILED


def _run_typer(arguments: list[str]) -> int:
    from controller.ctl.app import app

    try:
        app(arguments, prog_name="ctl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return ExitStatus.OK


if __name__ == "__main__":
    main()
