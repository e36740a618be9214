"""Outcomes as people and programs read them."""

from __future__ import annotations

import base64
import json

import pytest

from controller import render
from controller.progress import pull_line, push_line, size_text, waiting_line
from controller.session import Result
from protocol.outcomes import (
    NO_OUTPUT,
    Cancelled,
    Exited,
    FailedToStart,
    Killed,
    Lost,
    Outcome,
    Output,
    Refused,
    TimedOut,
)
from tests.unit.fake_service import printed

ORDER = {f"h{rank}": rank for rank in range(64)}


def result(hosts: str, outcome: Outcome | None = None, output: Output = NO_OUTPUT) -> Result:
    return Result(tuple(hosts.split()), Exited(0) if outcome is None else outcome, output)


def test_equal_outputs_stand_once_under_their_hosts_whatever_became_of_the_commands() -> None:
    results = [
        result("h2", Exited(1), printed(b"same\n")),
        result("h5", None, printed(b"other\n")),
        result("h0 h1", None, printed(b"same\n", b"a word\n")),
        result("h9", TimedOut()),
    ]
    assert render.outputs(results, ORDER, 1) == [(["h0", "h1", "h2"], b"same\n"), (["h5"], b"other\n")]
    assert render.outputs(results, ORDER, 2) == [(["h0", "h1"], b"a word\n")]


def test_outputs_that_were_cut_at_different_lengths_are_not_equal() -> None:
    results = [result("h0", None, Output(b"aa", b"", 2, 0)), result("h1", None, Output(b"aa", b"", 100, 0, "/s/1"))]
    assert [hosts for hosts, _ in render.outputs(results, ORDER, 1)] == [["h0"], ["h1"]]


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (Exited(3), "h[3,9] (2): exited with exit code 3"),
        (Killed(9), "h[3,9] (2): killed by signal 9"),
        (TimedOut(), "h[3,9] (2): timed out"),
        (Cancelled(ran=True), "h[3,9] (2): cancelled"),
        (Refused("no"), "h[3,9] (2): refused: no"),
        (FailedToStart("no such file"), "h[3,9] (2): failed to start: no such file"),
        (Lost("no word for 7 s"), "h[3,9] (2): lost: no word for 7 s"),
    ],
)
def test_each_outcome_that_is_not_well_has_a_line(outcome: Outcome, text: str) -> None:
    assert render.failures([result("h0"), result("h9", outcome), result("h3", outcome)], ORDER) == [text]


def test_a_hosts_words_can_not_command_the_terminal() -> None:
    (line,) = render.failures([result("h3", Refused("\x1b[2J\nall is\u202e well\x07"))], ORDER)
    assert line == "h3: refused: \\x1b[2J\\nall is\\u202e well\\x07"


def test_the_summary_says_who_is_missing_and_why() -> None:
    results = [
        result(" ".join(f"h{n}" for n in range(61) if n not in (3, 7))),
        result("h7", Lost("its relay h1 was lost")),
        result("h3", Lost("its relay h1 was lost")),
        result("h62", Exited(1)),
        result("h61", TimedOut()),
    ]
    assert render.summary(results, ORDER) == (
        "59 of 63 answered ok; failed: h[61-62]; missing: h[3,7] (lost: its relay h1 was lost)"
    )
    assert render.summary(results[:1], ORDER, unsettled=["h3"]) == (
        "59 of 60 answered ok; missing: h3 (no outcome yet)"
    )
    assert render.summary(results[:1], ORDER) == ""


def test_output_above_the_budget_is_told_with_its_place() -> None:
    big = Output(b"x" * 10, b"", 5000, 0, "/var/lib/canopy/f/spool/7.out, .err")
    results = [result("h0", None, big), result("h1", None, big), result("h2", None, printed(b"short"))]
    (line,) = render.shortened(results, ORDER, 12)
    assert line == (
        "h[0-1] (2): 10 of 5000 bytes of standard output shown; all of it is on the host "
        "(/var/lib/canopy/f/spool/7.out, .err): `ctl job 12 --output HOST` fetches it"
    )
    (one,) = render.shortened(results[:1], ORDER, 12)
    assert one.endswith("`ctl job 12 --output h0` fetches it")
    more = Output(b"x" * 10, b"", 7000, 0, "/var/lib/canopy/f/spool/7.out, .err")
    assert [line.split(" shown")[0] for line in render.shortened([*results, result("h5", None, more)], ORDER, 12)] == [
        "h[0-1,5] (3): 10 of 5000 to 7000 bytes of standard output"
    ]
    lost = Output(b"", b"yy", 0, 3)
    assert render.shortened([result("h3", None, lost)], ORDER, 12) == [
        "h3: 2 of 3 bytes of standard error shown; the rest was not kept on the host"
    ]


def test_json_holds_text_as_text_and_bytes_in_base64() -> None:
    binary = b"\xff\x00\n"
    results = [result("h1 h0", Exited(3), printed("größer\n".encode(), binary)), result("h2", Lost("gone"))]
    objects = json.loads(render.json_text(render.result_objects(results, ORDER)))
    assert objects == [
        {
            "hosts": ["h0", "h1"],
            "nodeset": "h[0-1]",
            "outcome": {"kind": "exited", "code": 3},
            "stdout": "größer\n",
            "stderr_base64": base64.b64encode(binary).decode(),
            "stdout_bytes": 9,
            "stderr_bytes": 3,
            "spool": "",
        },
        {
            "hosts": ["h2"],
            "nodeset": "h2",
            "outcome": {"kind": "lost", "why": "gone"},
            "stdout": "",
            "stderr": "",
            "stdout_bytes": 0,
            "stderr_bytes": 0,
            "spool": "",
        },
    ]


def test_the_waiting_line_names_five_at_most() -> None:
    assert waiting_line(64, [f"h{n}" for n in range(7)], 12.4) == (
        "57/64 done: 57 ok, 0 failed, 7 waiting, 12 s: h0 h1 h2 h3 h4 and 2 more"
    )
    assert waiting_line(2, ["h1"], 0, 1) == "1/2 done: 0 ok, 1 failed, 1 waiting, 0 s: h1"
    assert waiting_line(2, [], 3) == "2/2 done: 2 ok, 0 failed, 0 waiting, 3 s"


def test_a_push_line_tells_share_hosts_rate_what_is_left_and_who_is_slowest() -> None:
    assert push_line(20 << 20, {"h0": 20 << 20, "h1": 10 << 20}, ["h1"], 10) == (
        "[###############.....]  75% of 40.0 MiB, 1/2 hosts, 3.0 MiB/s, 10 s left, slowest h1 50%"
    )
    done = {f"h{number}": 100 - number for number in range(8)}
    assert push_line(100, done, list(done), 0).endswith("slowest h7 93% h6 94% h5 95% h4 96% h3 97%")
    assert push_line(0, {"h0": 0, "h1": 0}, [], 0) == "[####################] 100% of 0 B, 2/2 hosts"
    assert push_line(0, {"h0": 0, "h1": 0}, ["h1"], 4) == "1/2 hosts, 4 s"
    assert push_line(10, {"h0": 1}, ["h0"], 900.0).split(", ")[3] == "2 h 15 min left"


HALVES = "a 50% b 50% c 50% d 50% e 50%"


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (0, "[##########..........]  50% of 4.9 KiB, 0/5 hosts, 500 B/s, 5 s left, slowest " + HALVES),
        (101, "[#####.....]  50% of 4.9 KiB, 0/5 hosts, 500 B/s, 5 s left, slowest " + HALVES),
        (88, "50% of 4.9 KiB, 0/5 hosts, 500 B/s, 5 s left, slowest " + HALVES),
        (80, "50% of 4.9 KiB, 0/5 hosts, 500 B/s, 5 s left, slowest a b c d e"),
    ],
)
def test_a_narrow_terminal_takes_the_bar_before_the_names(width: int, line: str) -> None:
    assert push_line(1_000, dict.fromkeys("abcde", 500), list("abcde"), 5, width) == line


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes_are_read_in_their_unit(count: int, text: str) -> None:
    assert size_text(count) == text


def test_a_pull_line_tells_how_much_has_come() -> None:
    assert pull_line(0, {"h0": 0}, 2, 0, 3) == "0/2 hosts, 3 s, hosts look at what they have"
    assert pull_line(40 << 20, {"h0": 20 << 20, "h1": 10 << 20}, 2, 1, 10) == (
        "[###############.....]  75% of 40.0 MiB, 1/2 hosts, 3.0 MiB/s, 3 s left"
    )
