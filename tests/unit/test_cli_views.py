"""The ways in which `ctl broadcast` shows outputs, and who is chosen, against the other end of a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller import api, cli
from controller.status import ExitStatus
from protocol.outcomes import Cancelled, Exited, Fold, Lost, Output, TimedOut
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService

RULE = "-" * 15


@dataclass(frozen=True)
class Done:
    """What came of one `ctl`."""

    status: int
    out: bytes
    err: str


Ctl = Callable[..., Done]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeService]:
    monkeypatch.delenv("CANOPY_FLEET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # Its own list begins with /etc/clustershell, of whatever machine this is.
    monkeypatch.setattr("ClusterShell.Defaults.config_paths", lambda name: [str(tmp_path / "cs" / name)])
    with fake.fake_service() as found:
        monkeypatch.setenv("CANOPY_HOME", str(found.home))
        yield found


@pytest.fixture
def ctl(capsysbinary: pytest.CaptureFixture[bytes]) -> Ctl:
    def run(*arguments: str) -> Done:
        capsysbinary.readouterr()
        status = cli.run(arguments)
        out, err = capsysbinary.readouterr()
        return Done(status, out, err.decode())

    return run


def answering(service: FakeService, count: int, *folds: Fold) -> None:
    """Have the service answer every run with these."""
    service.replies(
        api.RunOn,
        api.Accepted(id=7, hosts=fake.names(count)),
        *(api.Folded(folds=(one,)) for one in folds),
        api.Settled(),
    )


def streaming(service: FakeService, *pieces: tuple[int, int, int, bytes], totals: dict[int, tuple[int, int]]) -> None:
    """Have the service answer every run with these pieces: rank, stream, offset, data."""

    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(len(totals))))
        for rank, stream, offset, data in pieces:
            client.send(api.Streamed(rank=rank, stream=stream, offset=offset, data=data))
        for rank, (out, err) in totals.items():
            client.send(api.Folded(folds=(fake.fold([rank], None, Output(b"", b"", out, err)),)))
        client.send(api.Settled())

    service.on(api.RunOn, answer)


# --- gathered ---------------------------------------------------------------------------------------------------------


def test_the_most_common_output_comes_first_and_the_odd_ones_last(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        8,
        fake.fold([0], None, fake.printed(b"odd\n")),
        fake.fold([2, 7], None, fake.printed(b"few\n")),
        fake.fold([1, 3, 4, 5, 6], None, fake.printed(b"most\n")),
    )
    done = ctl("broadcast", "x")
    assert [line for line in done.out.decode().splitlines() if line != RULE] == [
        "h[1,3-6] (5)",
        "most",
        "h[2,7] (2)",
        "few",
        "h0",
        "odd",
    ]
    assert done.err.splitlines() == ["job 7", "8 of 8 answered ok, 3 different outputs"]


def test_both_streams_together_are_gathered_by_both(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        4,
        fake.fold([0, 1], None, fake.printed(b"out", b"err\n")),
        fake.fold([2], None, fake.printed(b"out", b"")),
        fake.fold([3], None, fake.printed(b"", b"only err\n")),
    )
    done = ctl("broadcast", "-B", "x")
    assert done.out.decode().splitlines() == [
        *(RULE, "h[0-1] (2)", RULE, "out", "err"),
        *(RULE, "h2", RULE, "out"),
        *(RULE, "h3", RULE, "only err"),
    ]
    assert "err" not in done.err


def test_differences_are_shown_against_the_most_common(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        6,
        fake.fold([0], None, fake.printed(b"a\nB\nc\n")),
        fake.fold([1, 2, 3], None, fake.printed(b"a\nb\nc\n")),
        fake.fold([4], None, fake.printed(b"a\nb\nc")),
        fake.fold([5], Lost("gone")),
    )
    done = ctl("broadcast", "--diff", "x")
    assert done.out.decode().splitlines() == [
        *(RULE, "h[1-3] (3)", RULE, "a", "b", "c"),
        *(RULE, "h0", RULE, "--- h[1-3] (3)", "+++ h0", "@@ -1,3 +1,3 @@", " a", "-b", "+B", " c"),
        *(RULE, "h4", RULE, "--- h[1-3] (3)", "+++ h4", "@@ -2,2 +2,2 @@", " b", "-c", "+c"),
        "\\ No newline at end of file",
    ]
    assert "h5: lost: gone" in done.err


def test_a_host_that_wrote_nothing_differs_too_and_bytes_are_no_lines(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        4,
        fake.fold([0, 1], None, fake.printed(b"\x00\xffbin")),
        fake.fold([2], None, fake.printed(b"\x00\xfeb")),
        fake.fold([3]),
    )
    out = ctl("broadcast", "--diff", "x").out
    assert b"binary, 5 and 3 bytes, different from byte 1 on\n" in out
    assert b"binary, 5 and 0 bytes, different from byte 0 on\n" in out


def test_groups_that_are_whole_go_by_their_name(service: FakeService, ctl: Ctl) -> None:
    (service.home / "groups.toml").write_text('rack1 = "h[0-2]"\n')
    service.replies(api.GetStatus, fake.status(*(fake.host(rank) for rank in range(4))))
    answering(service, 4, fake.fold([0, 1, 2], None, fake.printed(b"a\n")), fake.fold([3], None, fake.printed(b"b\n")))
    assert ctl("broadcast", "-r", "x").out.decode().splitlines() == [
        *(RULE, "@rack1 (3)", RULE, "a"),
        *(RULE, "h3", RULE, "b"),
    ]


# --- by host ----------------------------------------------------------------------------------------------------------


def test_by_host_every_line_has_its_host_in_order(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        3,
        fake.fold([2], None, fake.printed(b"x\ny", b"word\n")),
        fake.fold([0, 1], None, fake.printed(b"z\r\n")),
    )
    done = ctl("broadcast", "-L", "-q", "x")
    assert done.out == b"h0: z\r\nh1: z\r\nh2: x\nh2: y\n"
    assert done.err == "h2: word\n"


def test_without_labels_all_bytes_are_as_they_were(service: FakeService, ctl: Ctl) -> None:
    answering(
        service, 2, fake.fold([1], None, fake.printed(b"\xff no end")), fake.fold([0], None, fake.printed(b"\x00a"))
    )
    assert ctl("broadcast", "-L", "-N", "x").out == b"\x00a\xff no end"
    streaming(service, (0, 1, 0, b"\x00a\nb"), (1, 1, 0, b"\xff"), (0, 1, 4, b"c"), totals={0: (5, 0), 1: (1, 0)})
    assert ctl("broadcast", "--stream", "-N", "x").out == b"\x00a\nb\xffc"


# --- for programs -----------------------------------------------------------------------------------------------------


def test_a_line_of_json_for_each_outcome_as_it_comes(service: FakeService, ctl: Ctl) -> None:
    answering(service, 3, fake.fold([0, 2], None, fake.printed(b"a\n")), fake.fold([1], TimedOut()))
    done = ctl("broadcast", "--ndjson", "x")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [(one["nodeset"], one["outcome"]["kind"], one["stdout"]) for one in found] == [
        ("h[0,2]", "exited", "a\n"),
        ("h1", "timed out", ""),
    ]
    assert done.status == ExitStatus.UNREACHABLE


def test_a_line_of_json_for_each_piece_too_when_streaming(service: FakeService, ctl: Ctl) -> None:
    streaming(service, (0, 1, 0, b"a"), (0, 2, 0, b"\xff"), totals={0: (1, 1)})
    found = [json.loads(line) for line in ctl("broadcast", "--ndjson", "--stream", "x").out.splitlines()]
    assert found[:2] == [
        {"host": "h0", "stream": "stdout", "offset": 0, "data": "a"},
        {"host": "h0", "stream": "stderr", "offset": 0, "data_base64": "/w=="},
    ]
    assert found[2]["nodeset"] == "h0"


# --- into files -------------------------------------------------------------------------------------------------------


def test_each_host_has_a_file_and_another_for_its_errors(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    target = tmp_path / "logs"
    target.mkdir()
    (target / "h1").write_text("of an earlier command, and longer")
    (target / "h1.err").write_text("and its errors")
    (target / "other").write_text("somebody's")
    streaming(
        service,
        *((0, 1, 0, b"one\xff"), (1, 1, 0, b"x"), (0, 2, 0, b"err\n"), (0, 1, 4, b"\x00two")),
        totals={0: (8, 4), 1: (1, 0), 2: (0, 0)},
    )
    done = ctl("broadcast", "-o", str(target), "x")
    assert (done.status, done.out) == (0, b"")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "h0": b"one\xff\x00two",
        "h0.err": b"err\n",
        "h1": b"x",
        "h2": b"",
        "other": b"somebody's",
    }


def test_bytes_that_did_not_arrive_are_told(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    streaming(service, (0, 1, 4, b"late"), totals={0: (10, 0)})
    assert "h0: 6 bytes did not arrive" in ctl("broadcast", "-o", str(tmp_path / "o"), "x").err


@pytest.mark.parametrize("name", ["../evil", "..", "a/b"])
def test_a_host_can_not_choose_the_file_by_its_name(service: FakeService, ctl: Ctl, tmp_path: Path, name: str) -> None:
    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts={0: name}))
        client.send(api.Streamed(rank=0, stream=1, offset=0, data=b"x"))
        client.send(api.Folded(folds=(fake.fold([0]),)), api.Settled())

    service.on(api.RunOn, answer)
    done = ctl("broadcast", "-o", str(tmp_path / "o"), "x")
    assert done.status == ExitStatus.FAILED
    assert "is no name for a file" in done.err
    assert list(tmp_path.rglob("*")) == [tmp_path / "o"]


def test_a_directory_that_can_not_be_is_refused_before_anything_runs(
    service: FakeService, ctl: Ctl, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert ctl("broadcast", "-o", str(tmp_path / "file"), "x").status == ExitStatus.USAGE
    assert not service.requests


def test_a_file_that_can_not_be_written_stops_no_command_and_is_told(
    service: FakeService, ctl: Ctl, tmp_path: Path
) -> None:
    (tmp_path / "h0").symlink_to("/dev/full")
    streaming(service, (0, 1, 0, b"x"), (1, 1, 0, b"y"), totals={0: (1, 0), 1: (1, 0)})
    (tmp_path / "h1").mkdir()
    done = ctl("broadcast", "-o", str(tmp_path), "x")
    assert done.status == ExitStatus.FAILED
    assert "h1" in done.err
    assert "not whole" in done.err
    assert (tmp_path / "h0").read_bytes() == b"x", "a link is replaced, not followed"


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_the_largest_exit_code_can_be_asked_for(service: FakeService, ctl: Ctl) -> None:
    answering(service, 3, fake.fold([0]), fake.fold([1], Exited(42)), fake.fold([2], Exited(7)))
    assert ctl("broadcast", "-S", "x").status == 42
    answering(service, 2, fake.fold([0], Exited(1)), fake.fold([1], Lost("gone")))
    assert ctl("broadcast", "-S", "x").status == ExitStatus.UNREACHABLE
    answering(service, 1, fake.fold([0]))
    assert ctl("broadcast", "-S", "x").status == 0


@pytest.mark.parametrize(("arguments", "why"), [(["-f", "64"], "the tree has its fanout"), (["-t", "5"], "-u SECONDS")])
def test_what_has_no_meaning_here_is_refused_with_what_has(
    service: FakeService, ctl: Ctl, arguments: list[str], why: str
) -> None:
    done = ctl("broadcast", *arguments, "x")
    assert done.status == ExitStatus.USAGE
    assert why in done.err
    assert len(done.err.splitlines()) == 1
    assert not service.requests


# --- who is chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(service: FakeService) -> FakeService:
    (service.home / "groups.toml").write_text('rack1 = "h[0-1]"\n')
    service.replies(
        api.GetStatus,
        fake.status(
            *(fake.host(rank, site="sophia", labels={"gpu": "yes"} if rank == 2 else {}) for rank in range(3)),
            fake.host(3),
        ),
    )
    service.replies(api.GetFailed, api.FailedHosts(job=5, hosts=("h3",)))
    answering(service, 1, fake.fold([0]))
    return service


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        (["-w", "@rack1"], ("h0", "h1")),
        (["-g", "rack1"], ("h0", "h1")),
        (["-g", "@rack1", "-x", "h0"], ("h1",)),
        (["-w", "@sophia!@rack1"], ("h2",)),
        (["-l", "gpu=yes"], ("h2",)),
        (["-w", "@failed"], ("h3",)),
        (["-a", "-X", "rack1"], ("h2", "h3")),
        (["-w", "@all", "--pick", "4"], ("h0", "h1", "h2", "h3")),
    ],
)
def test_hosts_are_chosen_in_all_ways(fleet: FakeService, ctl: Ctl, arguments: list[str], hosts: tuple[str]) -> None:
    assert ctl("broadcast", *arguments, "x").status == 0
    assert fleet.asked(api.RunOn)[0].hosts == hosts


def test_an_unknown_group_runs_nowhere_and_names_the_nearest(fleet: FakeService, ctl: Ctl) -> None:
    done = ctl("broadcast", "-w", "@rak1", "x")
    assert done.status == ExitStatus.USAGE
    assert done.err == "ctl: there is no group @rak1: the nearest is @rack1\n"
    assert not fleet.asked(api.RunOn)


def test_other_commands_choose_in_the_same_ways(fleet: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("get", "hosts", "-o", "name", "-l", "gpu=yes").out == b"h2\n"
    assert ctl("get", "hosts", "-o", "name", "-w", "@sophia!@rack1").out == b"h2\n"
    assert b"gpu=yes" in ctl("get", "hosts", "-o", "wide").out
    assert ctl("get", "groups").out.decode().split() == ["@rack1", "@sophia", "@all", "@failed"]
    source = tmp_path / "f"
    source.write_text("x")
    fleet.replies(api.PushTo, api.Accepted(id=8, hosts={0: "h0"}), api.Folded(folds=(fake.fold([0]),)), api.Settled())
    assert ctl("push", "-g", "rack1", "--pick", "9", str(source), "/x").status == 0
    assert fleet.asked(api.PushTo)[0].hosts == ("h0", "h1")
    assert ctl("down", "-w", "@nowhere").status == ExitStatus.USAGE


def test_labels_are_given_taken_and_shown(fleet: FakeService, ctl: Ctl) -> None:
    fleet.replies(api.SetLabels, api.Done())
    assert ctl("label", "@rack1", "rack=1", "gpu-") == Done(0, b"", "")
    assert fleet.asked(api.SetLabels) == [api.SetLabels(hosts=("h0", "h1"), put={"rack": "1"}, drop=("gpu",))]
    assert ctl("label").out.decode().splitlines() == ["LABEL    HOSTS", "gpu=yes  h2"]
    assert json.loads(ctl("label", "h2", "--json").out) == {"h2": {"gpu": "yes"}}
    assert ctl("label", "h1", "a b").status == ExitStatus.USAGE
    assert len(fleet.asked(api.SetLabels)) == 1


# --- some at a time ---------------------------------------------------------------------------------------------------


def test_rolling_work_that_was_stopped_lists_who_did_not_begin(service: FakeService, ctl: Ctl) -> None:
    answering(service, 6, fake.fold([0]), fake.fold([1], Exited(1)), fake.fold([2, 3, 4, 5], Cancelled(ran=False)))
    done = ctl("broadcast", "--batch", "2", "x")
    assert done.err.splitlines()[1:] == [
        "h1: exited with exit code 1",
        "h[2-5] (4): cancelled before it began",
        "not begun, since more than 0 failed: h[2-5]",
        "1 of 6 answered ok; failed: h[1-5]",
    ]
    assert [(asked.batch, asked.max_fail) for asked in service.asked(api.RunOn)] == [("2", "0")]
    ctl("broadcast", "--batch", "10%", "--max-fail", "5%", "x")
    assert [(asked.batch, asked.max_fail) for asked in service.asked(api.RunOn)][1:] == [("10%", "5%")]


def test_hosts_stand_in_the_order_that_people_count_in_whoever_came_first(service: FakeService, ctl: Ctl) -> None:
    hosts = {0: "h10", 1: "h9", 2: "a-2.lab", 3: "h2", 4: "a-10.lab", 5: "lone"}
    service.replies(
        api.RunOn,
        api.Accepted(id=7, hosts=hosts),
        *(api.Folded(folds=(fake.fold([rank], None, fake.printed(b"x\n")),)) for rank in hosts),
        api.Settled(),
    )
    done = ctl("broadcast", "-L", "x")
    assert done.out.decode().split(": x\n")[:-1] == ["a-2.lab", "a-10.lab", "h2", "h9", "h10", "lone"]
