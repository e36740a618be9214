"""Commands on a fleet of real agents, three levels deep: what runs, what is said of it, and what stays."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Job, Piece, Result
from controller.status import CtlError
from protocol.limits import MAX_COMMAND_TEXT, MAX_OUTPUT, SETTLED_EVERY
from protocol.outcomes import Cancelled, Exited, FailedToStart, Killed, Lost, Outcome, TimedOut
from tests.bench.idle import resident_kib
from tests.net.localfleet import DEADLINE_S, MARK, ROOT, LocalFleet, ended, is_running, local_fleet, processes_of
from tests.waiting import wait_until

HOSTS = tuple(f"h{number}" for number in range(8))
#: So long that whatever a test leaves running is seen, and so short that it ends by itself.
LONG = 90


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Eight agents with at most two children each."""
    with local_fleet(tmp_path_factory.mktemp("fleet"), HOSTS, 2) as started:
        yield started


@pytest.fixture(autouse=True)
def _whole(fleet: LocalFleet) -> Iterator[None]:
    """Every test begins with the whole fleet, and leaves nothing running."""
    fleet.wait_until_home()
    yield
    wait_until(lambda: not commands_of(fleet), DEADLINE_S, "all commands' processes to be gone")


def commands_of(fleet: LocalFleet) -> list[int]:
    """Processes that carry the fleet's mark and are neither agents nor the service."""
    assert fleet.service is not None
    own = {fleet.service.pid, *(process.pid for process in fleet.agents.values())}
    return [pid for pid in fleet.processes() if pid not in own]


def outcomes(job: Job) -> dict[str, Outcome]:
    """The outcome of each host, each exactly once."""
    found: dict[str, Outcome] = {}
    for happening in job:
        if isinstance(happening, Result):
            for host in happening.hosts:
                assert host not in found, (host, found[host], happening)
                found[host] = happening.outcome
    return found


def pids_in(folder: Path, count: int) -> list[int]:
    """The pids that commands wrote into files there, once there are `count` of them."""

    def read() -> list[int]:
        texts = [file.read_text() for file in folder.iterdir()]
        return [int(text) for text in texts if text.endswith("\n")]

    return wait_until(lambda: found if len(found := read()) == count else None, DEADLINE_S, f"{count} pids") or []


def children_of(fleet: LocalFleet, name: str) -> list[str]:
    """Who hangs below a host now."""
    return [host.name for host in fleet.hosts().values() if host.parent == name]


def below(fleet: LocalFleet, name: str) -> set[str]:
    """Everybody below a host."""
    found = set(children_of(fleet, name))
    for child in list(found):
        found |= below(fleet, child)
    return found


# --- what commands come to --------------------------------------------------------------------------------------------


def test_the_tree_is_three_levels_deep(fleet: LocalFleet) -> None:
    parents = {host.name: host.parent for host in fleet.hosts().values()}

    def depth(name: str) -> int:
        parent = parents[name]
        return 1 if parent is None else 1 + depth(parent)

    assert max(depth(name) for name in HOSTS) >= 3
    assert max(Counter(parents.values()).values()) == 2


def test_equal_outputs_come_as_one_result_with_all_hosts(fleet: LocalFleet) -> None:
    (result,) = fleet.session.run("echo out; echo err >&2").results()
    assert result.hosts == HOSTS
    assert (result.outcome, result.stdout, result.stderr) == (Exited(0), b"out\n", b"err\n")


def test_different_outputs_come_each_with_its_host(fleet: LocalFleet) -> None:
    answers = fleet.answers('printf %s "$CANOPY_HOST"')
    assert answers == {name: name.encode() for name in HOSTS}


def test_only_the_hosts_that_were_named_run_a_command(fleet: LocalFleet) -> None:
    assert set(fleet.answers("true", ["h7", "h0"])) == {"h0", "h7"}


def test_exit_codes_come_as_they_are(fleet: LocalFleet) -> None:
    found = outcomes(fleet.session.run('exit "$((${CANOPY_HOST#h} * 36))"'))
    assert found == {name: Exited(int(name[1:]) * 36) for name in HOSTS}


def test_a_command_that_dies_of_a_signal_says_which(fleet: LocalFleet) -> None:
    found = outcomes(fleet.session.run("case $CANOPY_HOST in h1) kill -SEGV $$;; h6) kill -KILL $$;; esac"))
    assert found == dict.fromkeys(HOSTS, Exited(0)) | {"h1": Killed(signal.SIGSEGV), "h6": Killed(signal.SIGKILL)}


def test_a_program_that_is_not_there_fails_to_start_and_says_its_name(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for argv, why in (
        ("/no/such/program", "No such file"),
        ("no-such-program", "No such file"),
        (str(tmp_path), "Permission denied"),
        (str(tmp_path / "text"), "Permission denied"),
    ):
        (result,) = fleet.session.run([argv]).results()
        assert isinstance(result.outcome, FailedToStart)
        assert result.outcome.why.startswith(f"{argv}: {why}")
        assert result.hosts == HOSTS


def test_a_command_gets_no_input_rather_than_the_agents(fleet: LocalFleet) -> None:
    (result,) = fleet.session.run("cat; readlink /proc/self/fd/0").results()
    assert (result.outcome, result.stdout) == (Exited(0), b"/dev/null\n")


def test_a_command_inherits_nothing_of_the_agents(fleet: LocalFleet) -> None:
    # Its descriptors of sockets and keys, the signals that it ignores and its Python path are none of their business.
    script = "ls /proc/self/fd; grep -E 'SigBlk|SigIgn' /proc/self/status; env | grep ^PYTHON"
    (result,) = fleet.session.run(script).results()
    lines = result.stdout.decode().split("\n")
    assert lines[:4] == ["0", "1", "2", "3"]  # 3 is what ls reads the directory through
    blocked, ignored, *rest = lines[4:]
    assert blocked == "SigBlk:\t0000000000000000"
    # Signals 32 and 33 are the C library's own, and it always has them ignored in what it spawns.
    assert ignored in ("SigIgn:\t0000000000000000", "SigIgn:\t0000000180000000")
    assert rest == [""]


def test_arguments_go_as_they_are_and_through_no_shell(fleet: LocalFleet) -> None:
    nasty = ["$HOME", "`id`", "a b", "'", '"', "\\", "*", "é\n", "", "-n"]
    (result,) = fleet.session.run(["printf", "%s\\0", *nasty]).results()
    assert result.stdout == b"".join(part.encode() + b"\0" for part in nasty)


def test_the_longest_argument_that_linux_takes_arrives(fleet: LocalFleet) -> None:
    longest = "x" * (MAX_COMMAND_TEXT - 1)  # execve counts the terminating NUL
    (result,) = fleet.session.run(["/usr/bin/printf", "%s", longest]).results()
    assert (result.outcome, result.stdout) == (Exited(0), longest.encode())


def test_binary_output_arrives_byte_by_byte(fleet: LocalFleet, tmp_path: Path) -> None:
    every = bytes(range(256)) * 1_000 + b"\xff\xfe\0"
    (tmp_path / "binary").write_bytes(every)
    (result,) = fleet.session.run(["cat", str(tmp_path / "binary")], output_limit=MAX_OUTPUT).results()
    assert result.hosts == HOSTS
    assert result.stdout == every


def test_a_full_megabyte_of_each_host_arrives(fleet: LocalFleet) -> None:
    # Different on each host, so that nothing folds.
    script = f'yes "$CANOPY_HOST" | head -c {MAX_OUTPUT}; yes err | head -c 10 >&2'
    answers = fleet.answers(script)
    assert answers == {name: (f"{name}\n".encode() * MAX_OUTPUT)[:MAX_OUTPUT] for name in HOSTS}


def test_what_goes_beyond_the_budget_stays_in_the_hosts_spool(fleet: LocalFleet) -> None:
    job = fleet.session.run("seq 1 20000; echo short >&2; echo done", output_limit=1_000)
    (*results,) = job.results()
    whole = b"".join(b"%d\n" % number for number in range(1, 20_001)) + b"done\n"
    assert sorted(host for result in results for host in result.hosts) == list(HOSTS)
    for result in results:
        assert result.outcome == Exited(0)
        assert result.stdout == whole[:1_000]
        assert result.output.out_total == len(whole)
        assert (result.stderr, result.output.err_total) == (b"short\n", 6)
        (host,) = result.hosts
        spool = fleet.directory(host).spool / f"{job.id}.out"
        assert result.output.spool == str(spool)
        assert spool.read_bytes() == whole
        assert spool.stat().st_mode & 0o777 == 0o600
        assert not spool.with_suffix(".err").exists()


def test_a_flood_that_a_command_leaves_in_the_background_holds_up_nobody(fleet: LocalFleet, tmp_path: Path) -> None:
    job = fleet.session.run(f"yes & echo $! > {tmp_path}/h3; echo said >&2", ["h3"])
    try:
        (result,) = job.results()
        assert (result.outcome, result.stderr) == (Exited(0), b"said\n")
        assert fleet.answers("echo $CANOPY_HOST", ["h3"]) == {"h3": b"h3\n"}
    finally:
        os.kill(pids_in(tmp_path, 1)[0], signal.SIGKILL)


def test_an_agent_without_descriptors_fails_to_start_commands_and_lives(fleet: LocalFleet) -> None:
    pid = fleet.pid("h3")
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for spare in range(6):  # it runs out at another point each time
        free = min(set(range(100)) - {int(entry) for entry in os.listdir(f"/proc/{pid}/fd")})
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free + spare, before[1]))
        try:
            (result,) = fleet.session.run(["true"], ["h3"]).results()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        if isinstance(result.outcome, FailedToStart):
            assert result.outcome.why == "true: Too many open files"
        else:
            assert result.outcome == Exited(0)
        if spare == 0:
            assert isinstance(result.outcome, FailedToStart)
    assert fleet.answers("echo $CANOPY_HOST", ["h3"]) == {"h3": b"h3\n"}


def test_a_stream_comes_in_order_and_whole(fleet: LocalFleet) -> None:
    pieces: dict[tuple[str, int], bytearray] = {}
    found: dict[str, Result] = {}
    for happening in fleet.session.run("seq 1 30000; seq 30001 30010 >&2", stream=True):
        if isinstance(happening, Piece):
            got = pieces.setdefault((happening.host, happening.stream), bytearray())
            assert happening.offset == len(got)
            assert happening.host not in found, "a piece came after its host's outcome"
            got += happening.data
        elif isinstance(happening, Result):
            found |= dict.fromkeys(happening.hosts, happening)
    assert set(found) == set(HOSTS)
    for name in HOSTS:
        assert pieces[name, 1] == b"".join(b"%d\n" % number for number in range(1, 30_001))
        assert pieces[name, 2] == b"".join(b"%d\n" % number for number in range(30_001, 30_011))


def test_a_stream_comes_while_the_command_runs(fleet: LocalFleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    job = fleet.session.run(f"echo first; cat {shlex.quote(str(gate))}", ["h7"], stream=True)
    seen = []
    for happening in job:
        seen.append(happening)
        if isinstance(happening, Piece) and happening.data == b"first\n":
            gate.write_text("second\n")  # it can't go on before its first line was seen here
    assert [piece.data for piece in seen if isinstance(piece, Piece)] == [b"first\n", b"second\n"]


# --- the end of commands ----------------------------------------------------------------------------------------------

#: A command that leaves a child in the background, and says both pids.
_WITH_CHILD = (
    'cd {folder}; sleep {long} & echo $! > "$CANOPY_HOST.child"; echo $$ > "$CANOPY_HOST.shell"; wait; sleep {long}'
)
#: The same, where nobody heeds SIGTERM.
_STUBBORN = "trap '' TERM; " + _WITH_CHILD


@pytest.mark.parametrize("script", [_WITH_CHILD, _STUBBORN], ids=["polite", "stubborn"])
def test_a_cancel_ends_whole_process_groups(fleet: LocalFleet, tmp_path: Path, script: str) -> None:
    job = fleet.session.run(script.format(folder=tmp_path, long=LONG))
    pids = pids_in(tmp_path, 2 * len(HOSTS))
    assert all(is_running(pid) for pid in pids)
    job.cancel()
    assert outcomes(job) == dict.fromkeys(HOSTS, Cancelled(ran=True))
    wait_until(lambda: not any(is_running(pid) for pid in pids), DEADLINE_S, "their processes to be gone")


@pytest.mark.parametrize("script", [_WITH_CHILD, _STUBBORN], ids=["polite", "stubborn"])
def test_a_deadline_ends_whole_process_groups(fleet: LocalFleet, tmp_path: Path, script: str) -> None:
    job = fleet.session.run(script.format(folder=tmp_path, long=LONG), timeout=1.0)
    found = outcomes(job)
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert found == dict.fromkeys(HOSTS, TimedOut())
    assert len(pids) == 2 * len(HOSTS)
    wait_until(lambda: not any(is_running(pid) for pid in pids), DEADLINE_S, "their processes to be gone")


def test_a_cancel_asks_the_whole_group_before_it_kills_it(fleet: LocalFleet, tmp_path: Path) -> None:
    # The shell is gone at once, and what it left in the background still has the time to clean up.
    clean_up = 'trap "sleep 0.3; echo > $CANOPY_HOST.clean; exit" TERM; echo > $CANOPY_HOST.ready; sleep 60 & wait'
    job = fleet.session.run(f"cd {tmp_path}; ({clean_up}) & wait")
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == len(HOSTS), DEADLINE_S, "all to run")
    job.cancel()
    assert outcomes(job) == dict.fromkeys(HOSTS, Cancelled(ran=True))
    assert {path.name for path in tmp_path.glob("*.clean")} == {f"{name}.clean" for name in HOSTS}


def test_what_left_its_group_delays_no_outcome_and_ends_with_it(fleet: LocalFleet, tmp_path: Path) -> None:
    # A daemon has a session of its own, holds the command's pipes, and takes no polite signal.
    daemon = f"setsid sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/h3; exec sleep {LONG}' & "
    job = fleet.session.run(f"{daemon} trap '' TERM; wait; sleep {LONG}", ["h3"])
    (pid,) = pids_in(tmp_path, 1)
    job.cancel()
    assert outcomes(job) == {"h3": Cancelled(ran=True)}
    assert not is_running(pid)


def test_a_client_that_goes_away_cancels_its_command(fleet: LocalFleet, tmp_path: Path) -> None:
    job = fleet.session.run(_WITH_CHILD.format(folder=tmp_path, long=LONG))
    pids = pids_in(tmp_path, 2 * len(HOSTS))
    job._connection.close()
    wait_until(lambda: not any(is_running(pid) for pid in pids), DEADLINE_S, "their processes to be gone")


def test_a_command_that_has_ended_is_not_late_for_what_it_left_in_the_background(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    # The background job holds the command's pipes open; it neither delays the outcome nor dies of it.
    left = f"(exec sleep {LONG}) & echo $! > {tmp_path}/$CANOPY_HOST; echo said"
    assert fleet.answers(left) == dict.fromkeys(HOSTS, b"said\n")
    pids = pids_in(tmp_path, len(HOSTS))
    assert all(is_running(pid) for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# --- faults -----------------------------------------------------------------------------------------------------------


def _marking(folder: Path) -> str:
    """A command that leaves one line for each time that it is run, and ends when it is told to."""
    return f"echo run >> {folder}/$CANOPY_HOST; while [ ! -e {folder}/go ]; do sleep 0.05; done; echo $CANOPY_HOST"


def _wait_for_marks(folder: Path) -> None:
    wait_until(lambda: len(list(folder.iterdir())) == len(HOSTS), DEADLINE_S, "the command to run everywhere")


def test_a_relay_killed_in_mid_command_loses_its_own_outcome_and_no_other(fleet: LocalFleet, tmp_path: Path) -> None:
    victim = "h0"
    orphans = below(fleet, victim)
    assert len(orphans) >= 2
    job = fleet.session.run(_marking(tmp_path))
    _wait_for_marks(tmp_path)
    fleet.kill(victim)
    wait_until(
        lambda: all(host.up for host in fleet.hosts().values() if host.name in orphans),
        DEADLINE_S,
        "the orphans to be in the tree again",
    )
    assert {host.parent for host in fleet.hosts().values() if host.name in orphans} <= {None, *orphans}
    (tmp_path / "go").touch()
    found: dict[str, Result] = {}
    for happening in job:
        if isinstance(happening, Result):
            for host in happening.hosts:
                assert host not in found
                found[host] = happening
    lost = found.pop(victim).outcome
    assert isinstance(lost, Lost)
    assert lost.why.startswith("link h0 - the service: ")
    assert {host: (result.outcome, result.stdout) for host, result in found.items()} == {
        host: (Exited(0), f"{host}\n".encode()) for host in HOSTS if host != victim
    }
    # Also after the victim is back nothing is run a second time.
    fleet.restart(victim)
    fleet.answers("true")
    assert {host: (tmp_path / host).read_text() for host in HOSTS} == dict.fromkeys(HOSTS, "run\n")


def test_an_agent_that_restarts_in_mid_command_reports_it_lost_and_does_not_run_it_again(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    victim = "h7"
    job = fleet.session.run(_marking(tmp_path))
    _wait_for_marks(tmp_path)
    fleet.kill(victim)
    fleet.restart(victim)
    (tmp_path / "go").touch()
    found = outcomes(job)
    assert found.pop(victim) == Lost("its agent restarted")
    assert found == dict.fromkeys(set(HOSTS) - {victim}, Exited(0))
    assert {host: (tmp_path / host).read_text() for host in HOSTS} == dict.fromkeys(HOSTS, "run\n")


def test_a_frozen_agent_delays_only_itself_and_goes_on_when_it_is_woken(fleet: LocalFleet) -> None:
    frozen = "h1"
    orphans = below(fleet, frozen)
    os.kill(fleet.pid(frozen), signal.SIGSTOP)
    try:
        frozen_at = time.monotonic()
        elsewhere = [name for name in HOSTS if name != frozen and name not in orphans]
        assert set(fleet.answers("true", elsewhere)) == set(elsewhere)
        job = fleet.session.run("echo $CANOPY_HOST")
        wait_until(lambda: time.monotonic() > frozen_at + 3, DEADLINE_S, "three seconds to pass")
    finally:
        os.kill(fleet.pid(frozen), signal.SIGCONT)
    assert outcomes(job) == dict.fromkeys(HOSTS, Exited(0))
    assert fleet.agents[frozen].poll() is None
    assert set(fleet.answers("true")) == set(HOSTS)


def test_agents_come_back_by_themselves_to_a_service_that_was_killed(fleet: LocalFleet, tmp_path: Path) -> None:
    before = {name: fleet.pid(name) for name in HOSTS}
    job = fleet.session.run(_marking(tmp_path))
    _wait_for_marks(tmp_path)
    fleet.kill_service()
    with pytest.raises(CtlError, match="the service went away"):
        outcomes(job)
    job._connection.close()
    (tmp_path / "go").touch()
    fleet.start_service()
    fleet.wait_until_home()
    assert fleet.answers("echo $CANOPY_HOST") == {name: f"{name}\n".encode() for name in HOSTS}
    assert {name: fleet.pid(name) for name in HOSTS} == before
    assert all(process.poll() is None for process in fleet.agents.values())
    assert {host: (tmp_path / host).read_text() for host in HOSTS} == dict.fromkeys(HOSTS, "run\n")


# --- what stays -------------------------------------------------------------------------------------------------------


def _descriptors(fleet: LocalFleet) -> dict[str, Counter[str]]:
    """What each agent and the service holds open: kinds of descriptors, and how many threads."""
    assert fleet.service is not None
    found = {}
    for name, pid in {"service": fleet.service.pid, **{name: fleet.pid(name) for name in HOSTS}}.items():
        links = []
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/{pid}/fd/{entry}").split(":")[0])
        found[name] = Counter(links)
    return found


def at_rest(fleet: LocalFleet) -> dict[str, Counter[str]]:
    """The descriptors once nothing has changed for longer than anything is waited for after a command's end."""
    seen, since = _descriptors(fleet), time.monotonic()

    def unchanged() -> bool:
        nonlocal seen, since
        now = _descriptors(fleet)
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() > since + 2 * SETTLED_EVERY

    wait_until(unchanged, DEADLINE_S, "the agents to come to rest")
    return seen


def _zombies(fleet: LocalFleet) -> list[str]:
    """Children of agents that ended and were not reaped."""
    agents = {process.pid for process in fleet.agents.values()}
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if int(parent) in agents and state == "Z":
                found.append(stat)
    return found


def test_two_hundred_broadcasts_leave_no_descriptor_and_no_zombie(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(600_000))

    def some(count: int) -> None:
        for _ in range(count):
            fleet.answers(["true"])
        for argv in (["false"], ["/no/such/program"]):
            fleet.session.run(argv).results()
        outcomes(fleet.session.run(f"sleep {LONG}", timeout=0.1))
        results = fleet.session.push(tmp_path / "file", f"{tmp_path}/copy", ["h5"]).results()
        assert all(result.ok for result in results), (results, fleet.log("h5")[-1_000:])

    some(5)  # what is made once and kept, such as threads' descriptors, is there after this
    before = at_rest(fleet)
    some(200)
    assert at_rest(fleet) == before
    assert not _zombies(fleet)


def test_an_idle_agent_takes_at_most_32_mib_of_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    with local_fleet(tmp_path_factory.mktemp("idle"), ["h0", "h1"], 1) as fleet:
        wait_until(lambda: all(h.health for h in fleet.hosts().values()), DEADLINE_S, "the agents' first reports")
        sizes = {name: resident_kib(fleet.pid(name)) for name in fleet.names}
        assert max(sizes.values()) <= 32 * 1024, sizes


def test_down_with_purge_leaves_nothing(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    with local_fleet(tmp_path_factory.mktemp("purge"), [f"h{number}" for number in range(4)], 1) as fleet:
        fleet.answers("seq 1 1000", None)
        (tmp_path / "file").write_bytes(b"x" * 600_000)
        assert fleet.session.push(tmp_path / "file", f"{tmp_path}/copy").results()
        (result,) = fleet.session.down(purge=True).results()
        assert (result.hosts, result.outcome) == (fleet.names, Exited(0))
        for process in fleet.agents.values():
            assert process.wait(DEADLINE_S) == 0
        assert list((fleet.session.directory / "hosts").iterdir()) == []
        assert fleet.session.status().hosts == ()
        fleet.session.shutdown()
        assert fleet.service is not None
        assert fleet.service.wait(DEADLINE_S) == 0
        assert fleet.processes() == []
        assert {path.name for path in tmp_path.iterdir()} == {"file", "copy"}


def test_a_local_fleet_comes_up_and_goes_down_by_itself(tmp_path: Path) -> None:
    """`local_up` starts agents that outlive whoever asked for them."""
    script = """
import sys
from controller.local import local_up, wait_until_gone
from controller.session import Session
names = ["h0", "h1", "h2"]
if sys.argv[1] == "up":
    print(local_up("net", names, 2))
else:
    session = Session("net")
    print([(result.hosts, result.ok) for result in session.down(purge=True).results()])
    print(wait_until_gone(session, names, 20))
    session.shutdown()
"""
    mark = os.urandom(8).hex()
    environment = {**os.environ, "CANOPY_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), MARK: mark}

    def run(what: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, what],
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout

    with ended(mark):
        assert run("up") == "{}\n"
        assert len(processes_of(mark)) == 4
        assert run("up") == "{}\n"
        assert len(processes_of(mark)) == 4
        assert run("down") == "[(('h0', 'h1', 'h2'), True)]\n[]\n"
        wait_until(lambda: not processes_of(mark), DEADLINE_S, "all of it to be gone")
