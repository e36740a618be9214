"""Commands as people give them, on real agents two levels deep: as whom, where, with what limits and input; and output
that flows no faster than it is read."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from agent.outlet import Outlet
from agent.processes import Process
from agent.settings import Settings
from agent.spool import Spools
from agent.watching import Watching
from controller.render_jobs import what_text
from controller.replies import HELD_MOST
from controller.session import Job, Piece, Result
from controller.status import CtlError, ExitStatus
from protocol.commands import Run
from protocol.limits import (
    DEFAULT_OUTPUT,
    INPUT_PIECE,
    INPUT_WINDOW,
    MAX_OUTPUT,
    MAX_SCRIPT,
    STREAM_FIRST,
    STREAM_TOTAL,
    STREAM_WINDOW,
)
from protocol.messages import Grant
from protocol.outcomes import Cancelled, Exited, FailedToStart, Outcome, Output, Refused, TimedOut
from tests.bench.idle import resident_kib
from tests.net.localfleet import DEADLINE_S, LocalFleet, is_running, local_fleet
from tests.waiting import wait_until

HOSTS = ("h0", "h1", "h2", "h3")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs commands as another")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Four agents, with at most two children each."""
    with local_fleet(tmp_path_factory.mktemp("running"), HOSTS, 2) as started:
        yield started


def one(job: Job) -> Result:
    """The result that all hosts have in common."""
    (result,) = job.results()
    assert result.hosts == HOSTS
    return result


def is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended and nobody has heard of it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def streamed(job: Job) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, Result]]:
    """Standard output and error of each host as they came, and its result."""
    out: dict[int, dict[str, bytearray]] = {1: {}, 2: {}}
    results: dict[str, Result] = {}
    for happening in job:
        if isinstance(happening, Piece):
            data = out[happening.stream].setdefault(happening.host, bytearray())
            assert happening.offset == len(data)
            data += happening.data
        else:
            assert isinstance(happening, Result)
            results |= dict.fromkeys(happening.hosts, happening)
    first, second = ({host: bytes(data) for host, data in out[number].items()} for number in (1, 2))
    return first, second, results


# --- as whom, where, with what ----------------------------------------------------------------------------------------


def test_words_are_passed_as_they_are_and_a_string_goes_through_the_shell(fleet: LocalFleet) -> None:
    assert one(fleet.session.run(["printf", "%s|", "a b", "$HOME", "*"])).stdout == b"a b|$HOME|*|"
    assert one(fleet.session.run("printf %s 'a b' | wc -c")).stdout.strip() == b"3"


def test_directory_and_environment_are_those_that_were_asked_for(fleet: LocalFleet, tmp_path: Path) -> None:
    found = one(fleet.session.run('pwd; echo "$A-$B"', cwd=str(tmp_path), env={"A": "x=y", "B": "b c"}))
    assert found.stdout == f"{tmp_path}\nx=y-b c\n".encode()


def test_a_directory_that_is_not_there_fails_to_start_and_nothing_runs(fleet: LocalFleet, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    found = one(fleet.session.run(f"touch {tmp_path}/ran", cwd=str(missing)))
    assert found.outcome == FailedToStart(f"{missing}: No such file or directory")
    assert not (tmp_path / "ran").exists()


def test_nice_level_and_limits_are_set(fleet: LocalFleet) -> None:
    found = one(fleet.session.run("nice; ulimit -n; ulimit -Hn; ulimit -c", nice=5, limits={"nofile": 64, "core": 0}))
    level = min(19, os.nice(0) + 5)  # the tests may run at a level of their own
    assert found.stdout == f"{level}\n64\n64\n0\n".encode()


def test_a_limit_that_no_host_has_is_refused_with_those_that_it_has(fleet: LocalFleet) -> None:
    outcome = one(fleet.session.run("true", limits={"memories": 1})).outcome
    assert isinstance(outcome, Refused)
    assert "there is no limit memories here" in outcome.why
    assert "nofile" in outcome.why


@AS_ROOT
def test_a_command_runs_as_the_user_with_its_groups_home_and_name(fleet: LocalFleet) -> None:
    found = one(fleet.session.run("id -un; id -gn; id -G; echo $USER $LOGNAME; test -w /etc/shadow", user="daemon"))
    assert found.stdout == b"daemon\ndaemon\n1\ndaemon daemon\n"
    assert found.outcome == Exited(1)


@AS_ROOT
def test_a_user_whom_a_host_does_not_know_is_refused(fleet: LocalFleet, tmp_path: Path) -> None:
    found = one(fleet.session.run(f"touch {tmp_path}/ran", user="nobody-of-that-name"))
    assert found.outcome == Refused("there is no user nobody-of-that-name on this host")
    assert not (tmp_path / "ran").exists()


def test_a_script_runs_by_its_first_line_and_leaves_no_file(fleet: LocalFleet) -> None:
    script = b"#!/usr/bin/env python3\nimport sys\nprint('python', sys.argv[1:])\n"
    assert one(fleet.session.run(["s.py", "a b", "c"], script=script)).stdout == b"python ['a b', 'c']\n"
    assert one(fleet.session.run(["s", "x"], script=b"echo without $1")).stdout == b"without x\n"
    for host in HOSTS:
        assert not any(fleet.directory(host).path.rglob("*script*"))


@AS_ROOT
def test_a_script_runs_as_another_user_too(fleet: LocalFleet) -> None:
    assert one(fleet.session.run(["s"], script=b"#!/bin/sh\nid -un\n", user="nobody")).stdout == b"nobody\n"


def test_a_script_whose_interpreter_is_missing_fails_to_start(fleet: LocalFleet) -> None:
    outcome = one(fleet.session.run(["s.x"], script=b"#!/no/such/interpreter\n")).outcome
    assert isinstance(outcome, FailedToStart)
    assert outcome.why.startswith("s.x: No such file")


def test_all_mistakes_of_a_request_are_told_at_once_and_nothing_is_run(fleet: LocalFleet) -> None:
    before = [job.id for job in fleet.session.jobs(1)]
    with pytest.raises(CtlError) as caught:
        fleet.session.run(
            "true", cwd="relative", env={"A=B": "x"}, nice=99, kill_after=-1.0, script=b"x" * (MAX_SCRIPT + 1)
        )
    assert caught.value.status == ExitStatus.USAGE
    for part in ("absolute path", "environment", "nice level", "certain one", "script has"):
        assert part in str(caught.value)
    assert [job.id for job in fleet.session.jobs(1)] == before


# --- ending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cleared", ["", "env -i "])
def test_what_left_the_group_and_its_parents_ends_with_the_command(
    fleet: LocalFleet, tmp_path: Path, cleared: str
) -> None:
    # Two forks and a session of its own, pipes let go of: no signal to the group reaches it, nor does its environment
    # tell whose it is where that is cleared.
    escape = (
        f"{cleared}setsid sh -c 'echo $$ > {tmp_path}/'$CANOPY_HOST'.tmp; "
        f"mv {tmp_path}/'$CANOPY_HOST'.tmp {tmp_path}/'$CANOPY_HOST'; "
    )
    job = fleet.session.run(f"({escape}exec sleep 90' </dev/null >/dev/null 2>&1 &); sleep 90")
    files = [tmp_path / host for host in HOSTS]
    wait_until(lambda: all(file.exists() for file in files), DEADLINE_S, "the processes to have begun")
    pids = [int(file.read_text()) for file in files]
    assert all(is_running(pid) for pid in pids)
    job.cancel()
    assert one(job).outcome == Cancelled(ran=True)
    assert not any(is_running(pid) for pid in pids)


def test_what_a_command_that_ended_well_left_running_goes_on(fleet: LocalFleet, tmp_path: Path) -> None:
    job = fleet.session.run(f"setsid sleep 90 </dev/null >/dev/null 2>&1 & echo $! > {tmp_path}/$CANOPY_HOST")
    assert one(job).ok
    pids = [int((tmp_path / host).read_text()) for host in HOSTS]
    assert all(is_running(pid) for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_cancel_ends_nothing_of_a_command_beside_it(fleet: LocalFleet, tmp_path: Path) -> None:
    command = "env -i setsid sh -c 'echo $$ > {}'$CANOPY_HOST'; exec sleep 90' </dev/null >/dev/null 2>&1"
    files = {which: [tmp_path / f"{which}{host}" for host in HOSTS] for which in "ab"}
    jobs = {which: fleet.session.run(f"({command.format(tmp_path / which)} &); sleep 90") for which in "ab"}

    def begun() -> bool:
        return all(file.exists() and file.read_text() for which in files.values() for file in which)

    wait_until(begun, DEADLINE_S, "the processes to have begun")
    pids = {which: [int(file.read_text()) for file in files[which]] for which in "ab"}
    jobs["a"].cancel()
    assert one(jobs["a"]).outcome == Cancelled(ran=True)
    assert {which: list(map(is_running, pids[which])) for which in "ab"} == {"a": [False] * 4, "b": [True] * 4}
    jobs["b"].cancel()
    assert one(jobs["b"]).outcome == Cancelled(ran=True)
    assert not any(map(is_running, pids["b"]))
    assert not [child for host in HOSTS for child in psutil.Process(fleet.pid(host)).children() if is_zombie(child)]


def test_a_command_has_the_time_that_it_was_given_to_clean_up(fleet: LocalFleet) -> None:
    # Longer than the usual two seconds, and as long as it needs.
    job = fleet.session.run(
        "trap 'sleep 3; echo cleaned; exit 0' TERM; sleep 90 & wait", timeout=0.5, kill_after=60.0, output_limit=100
    )
    found = one(job)
    assert found.outcome == TimedOut()
    assert found.stdout == b"cleaned\n"


# --- input ------------------------------------------------------------------------------------------------------------


def test_a_small_input_goes_with_the_command(fleet: LocalFleet) -> None:
    assert one(fleet.session.run("cat", stdin=b"hello\0\xff")).stdout == b"hello\0\xff"
    assert one(fleet.session.run("cat", stdin=b"")).stdout == b""
    assert one(fleet.session.run("cat")).stdout == b""


def test_a_large_input_reaches_all_whole_and_so_does_its_end(fleet: LocalFleet) -> None:
    data = os.urandom(1 << 20) * 3
    job = fleet.session.run("sha256sum | cut -c1-64", stdin=io.BytesIO(data))
    assert one(job).stdout.strip().decode() == hashlib.sha256(data).hexdigest()
    with fleet.session.run("true") as next_:
        assert next_.id - job.id < len(data) // INPUT_PIECE, "pieces take no jobs' numbers"


def test_whoever_closes_its_input_does_not_hold_the_others_back(fleet: LocalFleet) -> None:
    data = b"x" * (INPUT_WINDOW + (1 << 20))
    job = fleet.session.run(
        "case $CANOPY_HOST in h1) exec <&-; sleep 1;; h2) head -c 5;; *) wc -c;; esac", stdin=io.BytesIO(data)
    )
    found = {host: result.stdout.strip() for result in job.results() for host in result.hosts}
    count = str(len(data)).encode()
    assert found == {"h0": count, "h1": b"", "h2": b"xxxxx", "h3": count}


def test_a_host_that_reads_nothing_starves_no_other_and_finds_all_of_it_when_it_reads(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    data = b"x" * (4 * INPUT_WINDOW)
    job = fleet.session.run(
        f"test $CANOPY_HOST = h1 && while ! test -e {go}; do sleep 0.05; done; wc -c", stdin=io.BytesIO(data)
    )
    found: dict[str, bytes] = {}
    for happening in job:
        if isinstance(happening, Result):
            found |= dict.fromkeys(happening.hosts, happening.stdout.strip())
            if set(found) == {"h0", "h2", "h3"}:
                go.touch()
    assert found == dict.fromkeys(HOSTS, str(len(data)).encode())


def test_an_input_goes_on_where_a_relay_that_dies_left_it(fleet: LocalFleet, tmp_path: Path) -> None:
    relay = next(host for host in HOSTS if any(other.parent == host for other in fleet.hosts().values()))
    below = next(host.name for host in fleet.hosts().values() if host.parent == relay)
    reader, writer = os.pipe()
    data = os.urandom(400_000)
    with os.fdopen(reader, "rb") as source:
        job = fleet.session.run(
            f"head -c 200000 > {tmp_path}/half; touch {tmp_path}/read; cat", [below], stdin=source, output_limit=1 << 20
        )
        pieces = iter(job)
        with os.fdopen(writer, "wb") as sink:
            # Room is granted to whoever takes in what happens: in a thread, as a program would.
            found: list[object] = []
            thread = threading.Thread(target=lambda: found.extend(pieces))
            thread.start()
            sink.write(data[:200_000])
            sink.flush()
            wait_until((tmp_path / "read").exists, DEADLINE_S, "the first half to be read")
            fleet.kill(relay)
            sink.write(data[200_000:])
        thread.join(DEADLINE_S)
    fleet.restart(relay)
    (result,) = found
    assert isinstance(result, Result)
    assert result.outcome == Exited(0)
    assert result.stdout == data[200_000:]


# --- output -----------------------------------------------------------------------------------------------------------


def test_a_stream_arrives_whole_from_all_with_both_streams_apart(fleet: LocalFleet) -> None:
    command = "seq 1 100000; printf 'no end of line\\0\\377'; seq 1 3000 >&2; exit 3"
    out, err, results = streamed(fleet.session.run(command, stream=True))
    whole = b"".join(b"%d\n" % number for number in range(1, 100_001)) + b"no end of line\0\xff"
    errors = b"".join(b"%d\n" % number for number in range(1, 3_001))
    assert out == dict.fromkeys(HOSTS, whole)
    assert err == dict.fromkeys(HOSTS, errors)
    assert {(r.outcome, r.output.out_total, r.output.err_total) for r in results.values()} == {
        (Exited(3), len(whole), len(errors))
    }


def test_lines_are_sent_together_and_yet_soon(fleet: LocalFleet, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job = fleet.session.run(f"echo first; while ! test -e {go}; do sleep 0.05; done; seq 1 1000", ["h0"], stream=True)
    pieces = []
    for happening in job:
        if isinstance(happening, Piece):
            pieces.append(happening.data)
            go.touch()  # it does not go on before its first line was heard
    assert pieces[0] == b"first\n"
    assert len(pieces) < 50


def test_a_client_that_reads_slowly_slows_the_command_and_fills_nobodys_memory(fleet: LocalFleet) -> None:
    assert fleet.service is not None
    before = {host: resident_kib(fleet.pid(host)) for host in HOSTS} | {"service": resident_kib(fleet.service.pid)}
    job = fleet.session.run("head -c 1000000000 /dev/zero", stream=True)
    first = next(iter(job))
    assert isinstance(first, Piece)
    # Other commands are answered meanwhile, again and again: the flood is not in their way.
    for _ in range(20):
        assert one(fleet.session.run("true")).ok
    after = {host: resident_kib(fleet.pid(host)) for host in HOSTS} | {"service": resident_kib(fleet.service.pid)}
    bound = 3 * STREAM_WINDOW // 1024
    assert {who: after[who] - before[who] for who in after if after[who] - before[who] > bound} == {}
    job.close()
    settled = {host: result.outcome for result in fleet.session.job(job.id).results() for host in result.hosts}
    assert settled == dict.fromkeys(HOSTS, Cancelled(ran=True))


def test_many_clients_that_do_not_read_leave_the_service_and_the_relays_small(fleet: LocalFleet) -> None:
    assert fleet.service is not None
    watched = {host: fleet.pid(host) for host in HOSTS} | {"service": fleet.service.pid}
    before = {who: resident_kib(pid) for who, pid in watched.items()}
    # 4 hosts with 400 kB of their own each: 51 MB together. And 24 floods, which may have 96 MB on their way alone.
    gathered = [fleet.session.run("yes $CANOPY_HOST | head -c 400000", output_limit=MAX_OUTPUT) for _ in range(32)]
    floods = [fleet.session.run("yes", stream=True) for _ in range(24)]
    wait_until(
        lambda: not any(job.missing for job in fleet.session.jobs(56) if "400000" in job.what),
        DEADLINE_S,
        "all that ends to be on record",
    )
    grown = {who: resident_kib(pid) - before[who] for who, pid in watched.items()}
    # For each client HELD_MOST and as much in its socket's buffer, for 32 one outcome more, and STREAM_TOTAL for all; a
    # third more is what an allocator may need. Hosts keep what is not acknowledged.
    bound = dict.fromkeys(watched, 4 * (56 * 2 * HELD_MOST + 32 * 400_000 + STREAM_TOTAL) // 3 // 1024)
    assert {who: kib for who, kib in grown.items() if kib > bound[who]} == {}
    assert one(fleet.session.run("true")).ok
    # Who reads gets all of it, though there is nothing left to grant.
    out, _, _ = streamed(fleet.session.run("seq 1 20000", stream=True))
    assert out == dict.fromkeys(HOSTS, b"".join(b"%d\n" % number for number in range(1, 20_001)))
    for job in floods:
        job.close()
    for job in gathered:
        found = {host: result.stdout for result in job.results() for host in result.hosts}
        assert found == {host: (f"{host}\n" * 200_000)[:400_000].encode() for host in HOSTS}


def test_a_job_of_which_nobody_reads_the_stream_any_more_is_settled(fleet: LocalFleet) -> None:
    job = fleet.session.run("yes", stream=True)
    next(iter(job))
    job.close()
    found = {host: result.outcome for result in fleet.session.job(job.id).results() for host in result.hosts}
    assert found == dict.fromkeys(HOSTS, Cancelled(ran=True))


def test_a_flood_from_one_host_does_not_hold_up_the_outcomes_of_the_others(fleet: LocalFleet) -> None:
    written = 0
    found: set[str] = set()
    with fleet.session.run("echo begun; test $CANOPY_HOST != h1 || exec yes", stream=True) as job:
        for happening in job:
            if isinstance(happening, Piece):
                written += len(happening.data) if happening.host == "h1" else 0
            elif isinstance(happening, Result):
                found |= set(happening.hosts)
            if found == {"h0", "h2", "h3"} and written > STREAM_WINDOW:
                break
    assert found == {"h0", "h2", "h3"}


def test_what_became_of_a_command_does_not_wait_for_whoever_reads_its_output(tmp_path: Path) -> None:
    async def run() -> tuple[Outcome, Output, bytes]:
        loop, watching = asyncio.get_running_loop(), Watching()
        ended: asyncio.Future[tuple[Outcome, Output]] = loop.create_future()
        sent: list[bytes] = []
        outlet = Outlet(lambda _, __, data, *___: sent.append(data), first=1_000)
        with ThreadPoolExecutor(1) as disk:
            Process(
                Run(argv=("sh", "-c", "head -c 100000 /dev/zero; exit 3"), output_limit=10, stream=True),
                7,
                Spools(tmp_path, Settings),
                environment=dict(os.environ),
                disk=disk,
                finished=lambda outcome, output: ended.set_result((outcome, output)),
                outlet=outlet,
                took=lambda *_: None,
                watching=watching,
            )
            outcome, output = await asyncio.wait_for(ended, DEADLINE_S)
        assert len(b"".join(sent)) == 1_000
        outlet.granted(Grant(0, 200_000, 1_000, 0))
        watching.close()
        return outcome, output, b"".join(sent)

    outcome, output, data = asyncio.run(run())
    assert (outcome, output.out_total) == (Exited(3), 100_000)
    assert data == bytes(100_000)


def test_a_stream_goes_on_where_a_relay_that_dies_left_it(fleet: LocalFleet) -> None:
    relay = next(host for host in HOSTS if any(other.parent == host for other in fleet.hosts().values()))
    below = next(host.name for host in fleet.hosts().values() if host.parent == relay)
    job = fleet.session.run("seq 1 1000000", [below], stream=True)
    data = bytearray()
    results = []
    for happening in job:
        if isinstance(happening, Piece):
            assert happening.offset == len(data)
            data += happening.data
            if fleet.agents[relay].poll() is None and len(data) > 4 * STREAM_FIRST:
                fleet.kill(relay)
        else:
            results.append(happening)
    fleet.restart(relay)
    assert bytes(data) == b"".join(b"%d\n" % number for number in range(1, 1_000_001))
    (result,) = results
    assert isinstance(result, Result)
    assert (result.outcome, result.output.out_total) == (Exited(0), len(data))


# --- the spool --------------------------------------------------------------------------------------------------------


def test_what_is_beyond_the_budget_stays_on_its_host_and_is_fetched_whole(fleet: LocalFleet) -> None:
    job = fleet.session.run("seq 1 100000; head -c 300000 /dev/zero >&2; exit 2")
    found = one_total(job)
    out, err, results = streamed(fleet.session.output(job.id, "h2"))
    assert out["h2"] == b"".join(b"%d\n" % number for number in range(1, 100_001))
    assert err["h2"] == bytes(300_000)
    assert found == (len(out["h2"]), len(err["h2"]))
    assert results["h2"].outcome == Exited(0)
    (fetching,) = fleet.session.jobs(1)
    assert what_text(fetching.what) == f"fetch output {job.id} h2"


def one_total(job: Job) -> tuple[int, int]:
    """How much every host wrote; the outcomes hold their budget, and name the spool."""
    totals = set()
    for result in job.results():
        assert len(result.stdout) == len(result.stderr) == DEFAULT_OUTPUT
        assert "spool" in result.output.spool
        totals.add((result.output.out_total, result.output.err_total))
    (total,) = totals
    return total


def test_output_that_no_host_keeps_is_refused_with_the_reason(fleet: LocalFleet) -> None:
    job = fleet.session.run("echo short")
    assert one(job).ok
    (result,) = fleet.session.output(job.id, "h1").results()
    assert result.outcome == Refused(f"the output of job {job.id} is not kept here, or no longer")
    with pytest.raises(CtlError, match="there is no job"):
        fleet.session.output(10**9, "h1")
    other = fleet.session.run("true", ["h0"])
    assert other.results()[0].ok
    with pytest.raises(CtlError, match="h1 was no target"):
        fleet.session.output(other.id, "h1")


def test_nothing_of_all_this_was_a_mistake_of_ours(fleet: LocalFleet) -> None:
    for log in (*map(fleet.log, HOSTS), (fleet.session.directory / "service.log").read_text()):
        assert "Traceback" not in log
