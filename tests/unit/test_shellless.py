"""Shell strings that need no shell come to the same without one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

import pytest

from agent.executing import execute
from agent.shellless import words
from protocol.commands import Run

ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/"}


def shell(text: str, *, env: Mapping[str, str] = {}) -> Run:
    return Run(argv=("/bin/sh", "-c", text), output_limit=1, env=dict(env))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hostname", ["hostname"]),
        ("uname  -r", ["uname", "-r"]),
        ("/bin/ls --color=never /etc/os-release", ["/bin/ls", "--color=never", "/etc/os-release"]),
        ("date +%s", ["date", "+%s"]),
    ],
)
def test_a_name_and_plain_words_need_no_shell(text: str, expected: list[str]) -> None:
    assert words(shell(text), ENVIRONMENT) == expected


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            " ",
            " hostname",
            "hostname ",
            "a\tb",
            "a\nb",
            "a;b",
            "a&",
            "a|b",
            "a>b",
            "a<b",
            "a $b",
            "a `b`",
            "a 'b'",
        ],
        *[
            'a "b"',
            "a \\b",
            "a *",
            "a ?",
            "a [b]",
            "a {b,c}",
            "a ~",
            "a #b",
            "! a",
            "a !b",
            "(a)",
            "A=b c",
            "a ^b",
            "ä",
        ],
        *["true", "echo a", "cd /tmp", "exit 3", "if", "[ -e /x ]", "export A=b", "kill -9 1", "ulimit -n", "env", "."],
    ],
)
def test_what_means_something_to_a_shell_goes_to_one(text: str) -> None:
    assert words(shell(text), ENVIRONMENT) is None


def test_only_a_shell_string_is_looked_at() -> None:
    for argv in (
        ("hostname",),
        ("/bin/sh", "-c", "hostname", "x"),
        ("/bin/bash", "-c", "hostname"),
        ("sh", "-c", "ls"),
    ):
        assert words(Run(argv=argv, output_limit=1), ENVIRONMENT) is None


def test_where_programs_are_found_elsewhere_the_shell_looks() -> None:
    assert words(shell("hostname", env={"PATH": "/opt/bin"}), ENVIRONMENT | {"PATH": "/opt/bin"}) is None
    assert words(shell("hostname"), {"HOME": "/"}) is None
    assert words(shell("hostname"), ENVIRONMENT | {"BASH_FUNC_hostname%%": "() { echo no; }"}) is None


def ran(text: str) -> tuple[int, bytes, bytes]:
    """Exit code, output and error of what an agent begins."""
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    pid = execute(shell(text), ENVIRONMENT, (None, to_out, to_err))
    os.close(to_out)
    os.close(to_err)
    with os.fdopen(out, "rb") as output, os.fdopen(err, "rb") as error:
        written = output.read(), error.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *written


@pytest.mark.parametrize(
    "text", ["uname -sr", "ls /nowhere", "seq 1 3", "no-such-program -x", "/etc/passwd", "/etc", "cat", "sh -c pwd"]
)
def test_it_ends_as_it_would_with_the_shell(text: str) -> None:
    with_shell = subprocess.run(
        ["/bin/sh", "-c", text], env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert ran(text) == (with_shell.returncode, with_shell.stdout, with_shell.stderr)
