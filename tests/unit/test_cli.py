"""`ctl` in this process, against the other end of a real socket: what it asks for, prints, and ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller import api, cli
from controller.ctl import broadcast, push, quick
from controller.ctl.app import app
from controller.ctl.bringing import Push
from controller.ctl.running import Broadcast
from controller.selection import Selection
from controller.status import ExitStatus, Mistakes
from protocol.messages import HostHealth
from protocol.outcomes import Cancelled, Exited, FailedToStart, Fold, Lost, Outcome, Output, Refused, TimedOut
from protocol.vms import VmPower, VmState
from protocol.wishes import Wishes
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


@dataclass(frozen=True)
class Done:
    """What came of one `ctl`."""

    status: int
    out: bytes
    err: str


Ctl = Callable[..., Done]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    monkeypatch.delenv("CANOPY_FLEET", raising=False)
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


# --- broadcast ------------------------------------------------------------------------------------------------------


def test_equal_outputs_are_gathered_under_their_hosts_byte_for_byte(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        4,
        fake.fold([3], None, fake.printed(b"no end of line")),
        fake.fold([1], None, fake.printed(b"\xff\x00binary\r\n")),
        fake.fold([0, 2], None, fake.printed(b"\xff\x00binary\r\n")),
    )
    done = ctl("broadcast", "cat", "/x")
    rule = b"-" * 15 + b"\n"
    assert done.out == (
        rule + b"h[0-2] (3)\n" + rule + b"\xff\x00binary\r\n" + rule + b"h3\n" + rule + b"no end of line"
    )
    assert (done.status, done.err) == (0, "job 7\n4 of 4 answered ok, 2 different outputs\n")
    (asked,) = service.asked(api.RunOn)
    assert asked == api.RunOn(hosts=None, argv=("/bin/sh", "-c", "cat /x"), output_limit=262144)


def test_an_output_without_a_last_line_end_does_not_run_into_the_next_header(service: FakeService, ctl: Ctl) -> None:
    answering(service, 2, fake.fold([0], None, fake.printed(b"a")), fake.fold([1], None, fake.printed(b"b\n")))
    rule = b"-" * 15 + b"\n"
    assert ctl("broadcast", "x").out == rule + b"h0\n" + rule + b"a\n" + rule + b"h1\n" + rule + b"b\n"


def test_no_output_prints_nothing(service: FakeService, ctl: Ctl) -> None:
    answering(service, 2, fake.fold([0, 1]))
    assert ctl("broadcast", "true") == Done(0, b"", "job 7\n2 of 2 answered ok\n")
    assert ctl("broadcast", "-q", "true") == Done(0, b"", "")


def test_what_went_wrong_is_on_standard_error_and_the_last_line_sums_up(service: FakeService, ctl: Ctl) -> None:
    answering(
        service,
        10,
        fake.fold([0, 1, 2, 4, 5, 6], None, fake.printed(b"fine\n")),
        fake.fold([3, 9], Exited(3), fake.printed(b"", b"no such thing\n")),
        fake.fold([7, 8], Lost("its relay h2 was lost")),
    )
    done = ctl("broadcast", "x")
    assert done.status == ExitStatus.UNREACHABLE
    assert done.out.endswith(b"\nfine\n")
    assert done.err.splitlines() == [
        "job 7",
        "-" * 15,
        "h[3,9] (2): standard error",
        "-" * 15,
        "no such thing",
        "h[3,9] (2): exited with exit code 3",
        "h[7-8] (2): lost: its relay h2 was lost",
        "6 of 10 answered ok; failed: h[3,9]; missing: h[7-8] (lost: its relay h2 was lost)",
    ]


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([Exited(0)], 0),
        ([Exited(0), Exited(3)], 1),
        ([FailedToStart("no such file")], 1),
        ([Exited(3), TimedOut()], 3),
        ([Lost("gone")], 3),
        ([Lost("gone"), Refused("a bad signature", trust=True)], 5),
        ([Refused("a full disk")], 1),
    ],
)
def test_the_exit_code_tells_the_worst(service: FakeService, ctl: Ctl, outcomes: list[Outcome], status: int) -> None:
    answering(service, len(outcomes), *(fake.fold([rank], outcome) for rank, outcome in enumerate(outcomes)))
    assert ctl("broadcast", "x").status == status


def test_quiet_leaves_the_summary_out(service: FakeService, ctl: Ctl) -> None:
    answering(service, 2, fake.fold([0], Exited(1)), fake.fold([1]))
    assert ctl("broadcast", "-q", "x").err == "h0: exited with exit code 1\n"


def test_json_is_one_list_whatever_happened(service: FakeService, ctl: Ctl) -> None:
    answering(service, 3, fake.fold([0, 1], None, fake.printed(b"x\n")), fake.fold([2], Exited(3)))
    done = ctl("broadcast", "--json", "x")
    assert [(one["nodeset"], one["outcome"], one["stdout"]) for one in json.loads(done.out)] == [
        ("h[0-1]", {"kind": "exited", "code": 0}, "x\n"),
        ("h2", {"kind": "exited", "code": 3}, ""),
    ]
    assert done.status == 1


def test_a_stream_shows_whole_lines_each_with_its_host(service: FakeService, ctl: Ctl) -> None:
    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(2)))
        for rank, stream, offset, data in (
            (0, 1, 0, b"one\ntw"),
            (1, 1, 0, b"eins\r10%\r20%\n"),
            (0, 1, 6, b"o\n\n"),
            (0, 2, 0, b"a word\n"),
            (1, 1, 13, b"no end"),
        ):
            client.send(api.Streamed(rank=rank, stream=stream, offset=offset, data=data))
        output = Output(b"", b"", 19, 0)
        client.send(
            api.Folded(folds=(fake.fold([1], None, output),)),
            api.Folded(folds=(fake.fold([0], None, Output(b"", b"", 9, 100)),)),
            api.Settled(),
        )

    service.on(api.RunOn, answer)
    done = ctl("broadcast", "--stream", "x")
    assert done.out == b"h0: one\nh1: eins\r10%\r20%\nh0: two\nh0: \nh1: no end\n"
    assert done.err.splitlines() == [
        "job 7",
        "h0: a word",
        "h0: 93 bytes of standard error did not arrive",
        "2 of 2 answered ok",
    ]
    assert service.asked(api.RunOn)[0].stream


def test_a_line_that_never_ends_is_shown_in_parts(service: FakeService, ctl: Ctl) -> None:
    piece = b"x" * 60_000

    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(1)))
        for number in range(4):
            client.send(api.Streamed(rank=0, stream=1, offset=number * len(piece), data=piece))
        client.send(api.Folded(folds=(fake.fold([0], None, Output(b"", b"", 240_000, 0)),)), api.Settled())

    service.on(api.RunOn, answer)
    assert ctl("broadcast", "--stream", "x").out == (b"h0: " + b"x" * 120_000 + b"\n") * 2


def test_output_above_the_budget_is_said_once_for_all_its_hosts(service: FakeService, ctl: Ctl) -> None:
    output = Output(b"abc", b"", 5000, 0, "/var/lib/canopy/f/spool/7.out, .err")
    answering(service, 2, fake.fold([0, 1], None, output))
    done = ctl("broadcast", "--output-limit", "3", "x")
    assert done.err == (
        "job 7\nh[0-1] (2): 3 of 5000 bytes of standard output shown; all of it is on the host "
        "(/var/lib/canopy/f/spool/7.out, .err): `ctl job 7 --output HOST` fetches it\n2 of 2 answered ok\n"
    )
    assert service.asked(api.RunOn)[0].output_limit == 3


def test_hosts_that_are_named_are_asked_and_no_others(service: FakeService, ctl: Ctl) -> None:
    answering(service, 1, fake.fold([0]))
    service.replies(api.GetStatus, fake.status(*(fake.host(rank) for rank in range(3))))
    ctl("broadcast", "-w", "h[1-4]!h3", "-w", "h9", "-x", "h4", "x")
    ctl("broadcast", "-x", "h1", "x")
    assert [asked.hosts for asked in service.asked(api.RunOn)] == [("h1", "h2", "h9"), ("h0", "h2")]


@pytest.mark.parametrize("arguments", [["-x", "h[0-2]"], ["-w", "h1", "-x", "h1"], ["-w", ""]])
def test_no_target_is_exit_code_4_and_nothing_is_run(service: FakeService, ctl: Ctl, arguments: list[str]) -> None:
    service.replies(api.GetStatus, fake.status(*(fake.host(rank) for rank in range(3))))
    done = ctl("broadcast", *arguments, "reboot")
    assert done.status == ExitStatus.NO_TARGET
    assert done.err.startswith("ctl: no host matches")
    assert not service.asked(api.RunOn)


def test_what_the_service_refuses_is_one_sentence_with_its_exit_code(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.RunOn, api.Failed(why="not in this fleet: h9", status=int(ExitStatus.NO_TARGET)))
    assert ctl("broadcast", "-w", "h9", "x") == Done(4, b"", "ctl: not in this fleet: h9\n")


def test_without_a_service_the_next_step_is_told(service: FakeService, ctl: Ctl) -> None:
    done = ctl("--fleet", "other", "broadcast", "x")
    assert done == Done(6, b"", "ctl: no service runs for this fleet (other): start one with `ctl up`\n")
    assert not service.requests


def test_the_environment_names_the_fleet(service: FakeService, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANOPY_FLEET", "other")
    assert "(other)" in ctl("broadcast", "x").err
    assert "(other)" in ctl("status").err
    answering(service, 1, fake.fold([0]))
    assert ctl("--fleet", "default", "broadcast", "x").status == 0


def test_a_service_that_goes_away_costs_no_answer_that_has_come(service: FakeService, ctl: Ctl) -> None:
    service.replies(
        api.RunOn,
        api.Accepted(id=7, hosts=fake.names(3)),
        api.Folded(folds=(fake.fold([0, 1], None, fake.printed(b"fine\n")),)),
    )
    done = ctl("broadcast", "x")
    assert done.status == ExitStatus.NO_SERVICE
    assert b"h[0-1] (2)" in done.out
    assert done.err.splitlines()[1] == "2 of 3 answered ok; missing: h2 (no outcome yet)"
    assert "the service went away" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output-limit", "2M"],
        ["--output-limit", "many"],
        ["--output-limit", "-1"],
        ["--timeout", "0"],
        ["--timeout", "soon"],
        ["--timeout", "nan"],
        ["--stream", "--json"],
        ["-o", "/tmp/x", "-L"],
        ["-N"],
        ["--max-fail", "3"],
        ["-f", "64"],
        ["-t", "5"],
        ["-w", "h[3-1]"],
        ["--nonsense"],
        ["-w"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_asks_the_service_nothing(
    service: FakeService, ctl: Ctl, arguments: list[str]
) -> None:
    service.replies(api.GetStatus, fake.status(fake.host(0)))
    done = ctl("broadcast", *arguments, "true")
    assert (done.status, done.out) == (ExitStatus.USAGE, b"")
    assert done.err
    assert not service.asked(api.RunOn)


def test_an_error_of_ours_is_a_sentence_and_with_debug_a_traceback(
    service: FakeService, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise KeyError("a slip")

    monkeypatch.setattr(cli, "run_broadcast", broken)
    done = ctl("broadcast", "x")
    assert done.status == ExitStatus.FAILED
    assert done.err == "ctl: KeyError: 'a slip' (a mistake in ctl: run it with --debug for more)\n"
    with pytest.raises(KeyError):
        ctl("--debug", "broadcast", "x")
    assert not service.requests


# --- interruption ---------------------------------------------------------------------------------------------------


def interrupt() -> None:
    """Ctrl-C, once `ctl` minds it."""
    wait_until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler, DEADLINE_S, "a handler")
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_cancels_on_all_hosts_and_the_outcomes_are_shown(service: FakeService, ctl: Ctl) -> None:
    cancels: list[api.Request | None] = []

    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(3)), api.Folded(folds=(fake.fold([0]),)))
        interrupt()
        cancels.append(client.receive())
        client.send(api.Folded(folds=(fake.fold([1, 2], Cancelled(ran=True)),)), api.Settled())

    service.on(api.RunOn, answer)
    done = ctl("broadcast", "sleep", "60")
    assert cancels == [api.Cancel()]
    assert done.status == ExitStatus.INTERRUPTED
    begun, ending, *rest = done.err.splitlines()
    assert begun == "job 7"
    # Whether the first outcome was read when the signal came is nobody's to say.
    assert ending in {f"ending it on {hosts}; Ctrl-C again leaves at once" for hosts in ("h[1-2] (2)", "h[0-2] (3)")}
    assert rest == ["h[1-2] (2): cancelled", "1 of 3 answered ok; failed: h[1-2]"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once(service: FakeService, ctl: Ctl) -> None:
    left = threading.Event()

    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(1)))
        interrupt()
        assert client.receive() == api.Cancel()
        os.kill(os.getpid(), signal.SIGINT)
        assert left.wait(DEADLINE_S)

    service.on(api.RunOn, answer)
    done = ctl("broadcast", "sleep", "60")
    left.set()
    assert done.status == ExitStatus.INTERRUPTED
    assert done.err.splitlines()[-1] == "0 of 1 answered ok; missing: h0 (no outcome yet)"


# --- how arguments are read -----------------------------------------------------------------------------------------


def by_typer(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Broadcast | Push | int:
    """What typer makes of them: what is asked for, or the exit code of its refusal."""
    seen: list[Broadcast | Push] = []

    def run(_: object, asked: Broadcast | Push, wrong: Mistakes) -> int:
        wrong.check()
        seen.append(asked)
        return 0

    for module in (broadcast, push):
        monkeypatch.setattr(module, "run", run)
    with pytest.raises(SystemExit) as end:
        app(arguments, prog_name="ctl")
    return seen[0] if seen else int(str(end.value.code))


OPTIONS = [*quick.FLAGS, *quick.VALUES, *quick.TIMEOUTS, *quick.SELECTING_FLAGS, *quick.SELECTING_LISTS]
WORDS = st.sampled_from([*OPTIONS, "--", "-", "-z", "h[0-3]", "3", "0", "1.5", "64k", "hostname", "a=b", ""])


@given(words=st.lists(WORDS, max_size=7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_both_ways_of_reading_a_broadcast_agree(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = quick.parse(["broadcast", *words], None)
    if line is not None:
        assert by_typer(["broadcast", *words], monkeypatch) == line.asked
    capsys.readouterr()


PUSH_OPTIONS = [*quick.PUSH_FLAGS, *quick.PUSH_VALUES, *quick.SELECTING_FLAGS, *quick.SELECTING_LISTS]
PUSH_WORDS = st.sampled_from([*PUSH_OPTIONS, "--", "-", "-z", "h[0-3]", "3", "644", "a/b", "/srv/", "a=b", ""])


@given(words=st.lists(PUSH_WORDS, max_size=7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500, deadline=None)
def test_both_ways_of_reading_a_push_agree(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = quick.parse(["push", *words], None)
    if line is not None:
        assert by_typer(["push", *words], monkeypatch) == line.asked
    capsys.readouterr()


def test_the_usual_push_is_read_the_quick_way() -> None:
    line = quick.parse(["push", "-q", "app", "-w", "h1", "/opt/", "--no-compress"], None)
    asked = Push(
        files=(Path("app"),), destination="/opt/", selection=Selection(where=("h1",)), compress=False, quiet=True
    )
    assert line == quick.Line(None, debug=False, asked=asked)
    for words in (["app"], ["--help"], ["app", "/opt/", "--owner", "root"], ["app", "/opt/", "--mode"]):
        assert quick.parse(["push", *words], None) is None


@pytest.mark.parametrize(
    ("module", "told"),
    [(broadcast, {*OPTIONS, *quick.LEFT}), (push, {*PUSH_OPTIONS, *quick.PUSH_LEFT})],
    ids=["broadcast", "push"],
)
def test_the_quick_way_knows_all_options_but_help(module: ModuleType, told: set[str]) -> None:
    command = typer.main.get_command(module.app)
    options = [param for param in command.params if param.param_type_name == "option"]
    known = {name for param in options for name in (*param.opts, *param.secondary_opts)}
    assert known - {"--help", "-h"} == told


def test_the_quick_way_reads_the_global_options_too() -> None:
    line = quick.parse(["--debug", "--fleet", "a", "broadcast", "-w", "h1", "--", "-x", "y"], "b")
    assert line == quick.Line(
        "a", debug=True, asked=Broadcast(command=("-x", "y"), vector=True, selection=Selection(where=("h1",)))
    )
    assert quick.parse(["--version"], None) is None
    assert quick.parse([], None) is None
    assert quick.parse(["--fleet"], None) is None


def test_a_commands_own_options_are_its_own(service: FakeService, ctl: Ctl) -> None:
    answering(service, 1, fake.fold([0]))
    ctl("broadcast", "ls", "-w", "h1", "--help")
    assert service.asked(api.RunOn)[0].argv[2] == "ls -w h1 --help"


# --- start-up -------------------------------------------------------------------------------------------------------


def modules_of(service: FakeService, *arguments: str) -> set[str]:
    """All modules that a `ctl` of its own loads, from its start to its end."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "controller.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "CANOPY_HOME": str(service.home)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_a_broadcast_starts_without_anything_heavy(service: FakeService) -> None:
    answering(service, 2, fake.fold([0], None, fake.printed(b"a\n")), fake.fold([1], None, fake.printed(b"b\n")))
    loaded = modules_of(service, "broadcast", "-w", "h0", "true")
    assert {"controller.session", "msgspec"} <= loaded
    heavy = {"typer", "click", "rich", "pydantic", "ClusterShell", "libvirt", "zmq", "asyncio", "sqlite3", "threading"}
    assert not {name.partition(".")[0] for name in loaded} & heavy
    assert not loaded & {"controller.infra", "controller.api", "protocol.commands", "protocol.vms"}
    assert not loaded & {"dataclasses", "inspect"}, "they take as long as all of ctl's own files"
    assert not loaded & {"uuid", "platform", "decimal", "socket", "selectors", "msgspec.inspect"}, "nor these"


def test_hosts_that_answer_alike_are_named_without_anything_heavy(service: FakeService) -> None:
    answering(service, 3, fake.fold([0, 1, 2], None, fake.printed(b"a\n")))
    assert not {name.partition(".")[0] for name in modules_of(service, "broadcast", "true")} & {"ClusterShell"}


def test_what_was_kept_out_at_the_start_is_there_for_who_asks_for_it() -> None:
    code = """
import controller.cli, gc, typing_extensions
import datetime, decimal, msgspec, msgspec.inspect, msgspec.json, msgspec.yaml, uuid
assert typing_extensions.Protocol and uuid.uuid4() and decimal.Decimal(1)
assert msgspec.inspect.type_info(int) == msgspec.inspect.IntType()
moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
assert msgspec.convert(msgspec.to_builtins(moment), datetime.datetime) == moment
assert gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=DEADLINE_S, check=True)


def test_another_msgspec_that_asks_for_more_is_given_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "msgspec").mkdir()
    (tmp_path / "msgspec/__init__.py").write_text("import uuid\nNAMESPACE = uuid.NAMESPACE_DNS\n")
    code = "import controller.ctl.lean, sys; assert 'msgspec' not in sys.modules; import msgspec; msgspec.NAMESPACE"
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=DEADLINE_S, check=True)


def test_rich_is_not_loaded_for_any_command(service: FakeService) -> None:
    service.replies(api.GetStatus, fake.status(fake.host(0)))
    for arguments in (["status"], ["--help"], ["spawn", "--help"]):
        assert not {name.partition(".")[0] for name in modules_of(service, *arguments)} & {"rich", "zmq", "libvirt"}


def test_output_to_a_closed_pipe_ends_quietly(service: FakeService) -> None:
    answering(service, 1, fake.fold([0], None, fake.printed(b"x" * 1_000_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "controller.cli", "broadcast", "x"],
        cwd=ROOT,
        env={**os.environ, "CANOPY_HOME": str(service.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"job 7\n"
    process.stderr.close()
    assert process.wait(DEADLINE_S) == ExitStatus.FAILED


# --- help -----------------------------------------------------------------------------------------------------------


COMMANDS = [
    "up",
    "status",
    "tree",
    "why",
    "doctor",
    "health",
    "broadcast",
    "jobs",
    "job",
    "push",
    "spawn",
    "destroy",
    "get",
    "label",
    "down",
    "man",
    "completion",
]


def test_ctl_alone_lists_its_commands(ctl: Ctl) -> None:
    text = ctl("--help").out.decode()
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "130 interrupted" in text
    assert ctl().status == ExitStatus.USAGE


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(ctl: Ctl, name: str) -> None:
    done = ctl(name, "--help")
    assert done.status == 0
    text = done.out.decode()
    assert text.startswith(f"Usage: ctl {name} ")
    assert name in {"status", "tree", "health"} or f"\n    ctl {name} " in text
    assert "`" not in text or "g5k-subnets" in text or "unknown" in text or "ctl up" in text


def test_a_slip_in_a_commands_name_is_answered_with_the_nearest(ctl: Ctl) -> None:
    done = ctl("broadcst", "x")
    assert done.status == ExitStatus.USAGE
    assert done.err == "ctl: there is no command ctl broadcst: the nearest is broadcast\n"
    assert "there are create, start, stop, " in ctl("vm", "nope").err


def test_the_version_is_told(ctl: Ctl) -> None:
    from agent.version import VERSION

    assert ctl("--version") == Done(0, f"ctl {VERSION}\n".encode(), "")


# --- push -----------------------------------------------------------------------------------------------------------


def test_a_push_tells_where_the_file_was_there_already(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    source = tmp_path / "tool"
    source.write_bytes(b"x")
    service.replies(
        api.PushTo,
        api.Accepted(id=7, hosts=fake.names(4)),
        api.Advanced(size=1, done={0: 1}),
        api.Folded(folds=(fake.fold([0, 1], None, Output(b"pushed")), fake.fold([2], None, Output(b"unchanged")))),
        api.Folded(folds=(fake.fold([3], Refused("/opt is no directory")),)),
        api.Settled(),
    )
    done = ctl("push", "-w", "h[0-3]", "--mode", "755", str(source), "/opt/")
    assert done.out == b"h[0-1] (2): pushed\nh2: unchanged\n"
    assert done.err.splitlines() == ["h3: refused: /opt is no directory", "3 of 4 answered ok; failed: h3"]
    assert done.status == ExitStatus.FAILED
    (asked,) = service.asked(api.PushTo)
    assert asked == api.PushTo(
        hosts=("h0", "h1", "h2", "h3"), sources=(str(source),), folder="/opt/", wishes=Wishes(mode=0o755)
    )


def test_a_push_names_who_was_bypassed_but_not_for_what_fails_everywhere(
    service: FakeService, ctl: Ctl, tmp_path: Path
) -> None:
    (tmp_path / "tool").write_bytes(b"x")
    service.replies(
        api.PushTo,
        api.Accepted(id=7, hosts=fake.names(4)),
        api.Advanced(size=1, done={}, left=((1, 0, "it was silent"), (2, 0, "it was silent"), (3, 1, "it changed"))),
        api.Folded(folds=(fake.fold([0, 1, 2, 3], FailedToStart("it changed")),)),
        api.Settled(),
    )
    done = ctl("push", "-w", "h[0-3]", str(tmp_path / "tool"), "/opt/")
    assert done.err.splitlines() == [
        "h[0-3] (4): failed to start: it changed",
        "h0 was bypassed by h[1-2] (2): it was silent",
        "0 of 4 answered ok; failed: h[0-3]",
    ]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["/nowhere/at/all", "/x"], "No such file"),
        (["/etc/hostname", "x"], "no path from / on"),
        (["--mode", "9", "/etc/hostname", "/x"], "give a mode in octal"),
        (["--mode", "77777", "/etc/hostname", "/x"], "give a mode in octal"),
        (["/etc/hostname"], "DST"),
    ],
)
def test_a_push_that_can_not_be_is_refused_here(service: FakeService, ctl: Ctl, arguments: list[str], why: str) -> None:
    done = ctl("push", *arguments)
    assert done.status == ExitStatus.USAGE
    assert why in done.err
    assert not service.requests


def test_the_options_of_a_push_reach_the_service(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    said = Output(b"new: b\nchanged: a")
    service.replies(
        api.PushTo,
        api.Accepted(id=7, hosts=fake.names(3)),
        api.Folded(folds=(fake.fold([0, 1], None, said), fake.fold([2], None, Output(b"nothing would change")))),
        api.Settled(),
    )
    options = ["--owner", "root:adm", "--preserve", "--xattrs", "--backup", "--suffix", ".old", "--no-compress"]
    done = ctl("push", "--dry-run", "--checksum", "size-mtime", *options, f"{tmp_path}/a", f"{tmp_path}/b", "/opt/")
    assert done.status == ExitStatus.OK, done.err
    assert done.out == b"h[0-1] (2): 2 changes\n  new: b\n  changed: a\nh2: nothing would change\n"
    (asked,) = service.asked(api.PushTo)
    assert asked == api.PushTo(
        hosts=None,
        sources=(f"{tmp_path}/a", f"{tmp_path}/b"),
        folder="/opt/",
        backup=".old",
        by_time=True,
        dry_run=True,
        wishes=Wishes(user="root", group="adm", preserve=True, xattrs=True, compress=False),
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["/etc/hostname", "/etc/hosts", "/x"], "go into a directory"),
        (["--owner", "a:b:c", "/etc/hostname", "/x"], "no owner"),
        (["--owner", ":", "/etc/hostname", "/x"], "no owner"),
        (["--suffix", "a/b", "/etc/hostname", "/x"], "no end of a file's name"),
        (["--checksum", "never", "/etc/hostname", "/x"], "always"),
        (["/etc/hostname", "/opt/.."], "must name a file"),
    ],
)
def test_an_odd_push_is_refused_here(service: FakeService, ctl: Ctl, arguments: list[str], why: str) -> None:
    done = ctl("push", *arguments)
    assert done.status == ExitStatus.USAGE
    assert why in done.err
    assert not service.requests


# --- pull -----------------------------------------------------------------------------------------------------------


def test_a_pull_tells_what_came_and_from_whom_it_did_not(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    service.replies(
        api.PullFrom,
        api.Accepted(id=7, hosts=fake.names(3)),
        api.Fetched(size=10, done={0: 10}),
        api.Folded(folds=(fake.fold([0], None, Output(b"pulled 10 B")), fake.fold([1], None, Output(b"pulled 10 B")))),
        api.Folded(folds=(fake.fold([2], Refused("/var/log/x: No such file or directory")),)),
        api.Settled(),
    )
    done = ctl("pull", "--fold", "--preserve", "/var/log/x", str(tmp_path))
    assert done.out == b"h[0-1] (2): pulled 10 B\n"
    assert done.err.splitlines()[0] == "h2: refused: /var/log/x: No such file or directory"
    assert done.status == ExitStatus.FAILED
    (asked,) = service.asked(api.PullFrom)
    wishes = Wishes(times=False, preserve=True)
    assert asked == api.PullFrom(hosts=None, paths=("/var/log/x",), directory=str(tmp_path), wishes=wishes, fold=True)


def test_a_pull_of_no_path_is_refused_here(service: FakeService, ctl: Ctl) -> None:
    done = ctl("pull", "etc/hosts", "out")
    assert done.status == ExitStatus.USAGE
    assert "no path from / on" in done.err
    assert not service.requests


# --- what is known --------------------------------------------------------------------------------------------------


def a_fleet() -> api.Status:
    health = HostHealth(
        load1=0.5,
        load5=0.25,
        cpus=8,
        memory_mib=32_768,
        memory_free_mib=9_000,
        disk_mib=100_000,
        disk_free_mib=512,
        agent_rss_mib=30.4,
        uptime_s=3_600,
        version="0.1.0",
    )

    def state(name: str, power: VmPower, **fields: Any) -> VmState:
        return VmState(name=name, deployment="infra", power=power, **fields)

    return fake.status(
        fake.host(0, site="sophia", health=health, health_age_s=2.0),
        *(fake.host(rank, parent="h0", planned_parent="h0") for rank in (1, 2)),
        fake.host(3, planned_parent="h0", why="h0 was silent for 7 s"),
        fake.host(4, up=False),
        fake.host(5, up=False),
        vms=[
            fake.vm("vm0", "h0", state=state("vm0", VmPower.RUNNING, age_ms=5_000, reachable=True), age_s=60.0),
            fake.vm("vm1", "h0", ip="198.18.4.2", state=state("vm1", VmPower.CRASHED, reason="failed"), age_s=1.0),
            fake.vm("vm2", "h1", ip="198.18.4.3", deployment="other"),
            fake.vm("vm3", "h4", ip="198.18.4.4", state=state("vm3", VmPower.RUNNING), age_s=90.0),
        ],
    )


@pytest.fixture
def known(service: FakeService) -> FakeService:
    service.replies(api.GetStatus, a_fleet())
    return service


@pytest.mark.usefixtures("known")
def test_status_folds_hosts_by_reason_and_counts_vms_by_state(ctl: Ctl) -> None:
    assert ctl("status").out.decode().splitlines() == [
        "fleet default-0: service version 0.1.0, process 4711, up 1 h 2 min",
        "hosts: 4 of 6 up, fanout 32",
        "  down: h[4-5] (2): no word from it for 7 s",
        "  not where the plan has them: h3 (see `ctl tree`)",
        "VMs: 4 (2 unknown, 1 crashed, 1 running)",
    ]
    assert json.loads(ctl("status", "--json").out)["hosts"][4]["up"] is False


@pytest.mark.usefixtures("known")
def test_tree_tells_who_hangs_where_and_why_not_as_planned(ctl: Ctl) -> None:
    assert ctl("tree").out.decode().splitlines() == [
        "default-0 (service)",
        "├─ h0  [sophia]",
        "│  └─ h[1-2] (2)",
        "└─ h3  (planned below h0: h0 was silent for 7 s)",
        "not in the tree: h[4-5] (2): no word from it for 7 s",
    ]


@pytest.mark.usefixtures("known")
def test_health_says_unknown_where_nobody_can_vouch(ctl: Ctl) -> None:
    lines = ctl("health").out.decode().splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert "up     0.50 0.25  8        9000 MiB of 32.0 GiB  512 MiB of 97.7 GiB  1 h" in rows["h0"]
    assert rows["h1"].split()[1:3] == ["up", "unknown"]
    assert "no word from it for 7 s" in rows["h4"]
    assert rows["vm0"].split()[2:] == [
        "running",
        "1",
        "min",
        "5",
        "s",
        "-",
        "yes",
        "198.18.4.1",
        "1",
        "min",
        "ago",
        "-",
    ]
    assert rows["vm1"].split()[2:6] == ["crashed", "1", "s", "failed"]
    assert rows["vm2"].split()[2] == "unknown"
    assert "never" in rows["vm2"]
    assert rows["vm3"].split()[2] == "unknown"
    assert "its host is down; running when last heard of" in rows["vm3"]
    powers = {found["name"]: found["power"] for found in json.loads(ctl("health", "--json").out)["vms"]}
    assert powers == {"vm0": "running", "vm1": "crashed", "vm2": "unknown", "vm3": "unknown"}
    for vms in (json.loads(ctl("status", "--json").out)["vms"], json.loads(ctl("get", "vms", "--json").out)):
        assert {vm["name"]: vm["power"] for vm in vms} == powers


@pytest.mark.usefixtures("known")
def test_get_prints_names_tables_and_json(ctl: Ctl) -> None:
    assert ctl("get", "hosts", "-o", "name").out == b"h0\nh1\nh2\nh3\nh4\nh5\n"
    assert ctl("get", "vms", "-o", "name", "--deployment", "infra").out == b"vm0\nvm1\nvm3\n"
    assert ctl("get", "ips").out.splitlines()[0] == b"198.18.4.1\tvm0"
    assert ctl("get", "ips", "-o", "name").out.splitlines()[-1] == b"198.18.4.3"
    assert json.loads(ctl("get", "ips", "--json").out)["vm2"] == "198.18.4.3"
    assert ctl("get", "map").out.splitlines()[1].split() == [b"h0", b"vm0", b"vm1"]
    assert json.loads(ctl("get", "map", "-o", "json").out)["h4"] == ["vm3"]
    assert ctl("get", "hosts").out.splitlines()[2].split() == [b"h1", b"-", b"198.18.0.2", b"up", b"h0"]
    assert {found["name"]: found["host"] for found in json.loads(ctl("get", "vms", "--json").out)}["vm3"] == "h4"
    assert ctl("get", "everything").status == ExitStatus.USAGE
