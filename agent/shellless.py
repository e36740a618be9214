"""Shell strings that need no shell: a program's name and plain words, which a shell would only find and become.

To have a shell do that costs a host as much again as the program (0.8 ms for `hostname`). GNU make takes the same way
("make may take shortcuts that do not affect the results", its manual, 5.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from protocol.commands import Run

_SHELL = ("/bin/sh", "-c")
#: Characters that mean nothing to any shell, and blanks between the words.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=-]+(?: +[A-Za-z0-9_./:@%+,=-]+)*")
#: What dash, bash, busybox and the Korn shells do themselves, or some of them; and what shows the environment, to which
#: each shell adds something of its own.
_OWN_WORDS = (
    ". : alias autoload bg bind break builtin caller case cd chdir command compgen complete compopt continue coproc "
    "declare dirs disown do done echo elif else enable env esac eval exec exit export false fc fg fi for function "
    "functions getopts global hash help hist history if in integer jobs kill let local logout mapfile nameref popd "
    "print printenv printf pushd pwd r read readarray readonly repeat return select set shift shopt source stop "
    "suspend test then time times trap true type typeset ulimit umask unalias unset until wait whence while"
)
_OWN = frozenset(_OWN_WORDS.split())


def words(run: Run, environment: Mapping[str, str]) -> list[str] | None:
    """The program and its arguments that `run` comes to; None where a shell is to say so.

    `environment` is the command's, whose PATH must be that of this process. Where there is no such program, a shell
    should say that as well.
    """
    if len(run.argv) != 3 or tuple(run.argv[:2]) != _SHELL or not _PLAIN.fullmatch(run.argv[2]):
        return None
    found = run.argv[2].split()
    # Set for it alone, or found elsewhere than this process would find it, or a function that bash takes from there.
    if "=" in found[0] or "PATH" in run.env or "PATH" not in environment or found[0] in _OWN:
        return None
    return None if any(name.startswith("BASH_FUNC_") for name in environment) else found
