"""What people and programs ask of a real service: choosing hosts by groups, labels and what failed; rolling
work; and a hundred of them at once."""

from __future__ import annotations

import asyncio
import doctest
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from controller import AsyncSession, Session, async_session, session
from controller.session import Job, Piece, Result
from controller.status import CtlError, ExitStatus
from protocol.limits import MAX_INLINE
from protocol.outcomes import Cancelled, Exited, Outcome, Output
from tests.net.localfleet import FLEET, ROOT, LocalFleet, local_fleet
from tests.waiting import wait_until

HOSTS = tuple(f"h{n}" for n in range(6))
DEADLINE_S = 40.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with local_fleet(tmp_path_factory.mktemp("clients"), HOSTS, fanout=3) as found:
        (found.session.directory.parent / "groups.toml").write_text('odd = "h[1,3,5]"\n')
        yield found


# --- choosing hosts ---------------------------------------------------------------------------------------------------


def test_a_host_set_is_read_wherever_hosts_are_asked_for(fleet: LocalFleet) -> None:
    assert set(fleet.answers("true", "@odd!h3")) == {"h1", "h5"}
    assert fleet.session.select("h[0-9]&@all") == HOSTS
    with pytest.raises(CtlError, match="the nearest is @odd"):
        fleet.session.run("true", "@od")


def test_labels_are_kept_and_choose(fleet: LocalFleet) -> None:
    session = fleet.session
    session.label("h[0-2]", {"rack": "1", "gpu": "yes"})
    session.label(["h1"], {"rack": "2"}, drop=["gpu"])
    assert session.select(labels={"rack": "1", "gpu": "yes"}) == ("h0", "h2")
    assert set(fleet.answers("true", "@label:rack=2,h5")) == {"h1", "h5"}
    for wrong in ({"a b": "1"}, {"a": "b c"}):
        with pytest.raises(CtlError):
            session.label("h0", {"fine": "1", **wrong})
    with pytest.raises(CtlError):
        session.label(["h0", "h99"], {"fine": "1"})
    assert all("fine" not in host.labels for host in session.status().hosts), "all or nothing"
    session.label(None, {}, drop=["rack", "gpu"])
    assert not any(host.labels for host in session.status().hosts)


def test_those_that_failed_can_be_asked_again(fleet: LocalFleet) -> None:
    job = fleet.session.run('[ "$CANOPY_HOST" != h2 ] && [ "$CANOPY_HOST" != h4 ]')
    job.results()
    assert fleet.session.failed() == ("h2", "h4")
    assert set(fleet.answers("true", "@failed")) == {"h2", "h4"}
    assert fleet.session.failed() == (), "all of the last job did well"
    with pytest.raises(CtlError, match="no host matches") as caught:
        fleet.session.run("true", "@failed")
    assert caught.value.status == ExitStatus.NO_TARGET
    assert set(fleet.answers("true", f"@failed:{job.id},h0")) == {"h0", "h2", "h4"}
    with pytest.raises(CtlError, match="there is no job 999999"):
        fleet.session.run("true", "@failed:999999")


# --- rolling work -----------------------------------------------------------------------------------------------------


def outcomes(job: Job) -> dict[str, Outcome]:
    return {host: result.outcome for result in job.results() for host in result.hosts}


def begun(directory: Path) -> list[str]:
    """Who has begun, in the order of it; a host that ran twice stands there twice."""
    return (directory / "begun").read_text().split() if (directory / "begun").exists() else []


def noting(directory: Path, then: str = "true") -> str:
    """A command that notes that it ran."""
    return f'echo "$CANOPY_HOST" >> {directory}/begun; {then}'


def test_so_many_hosts_run_it_at_a_time(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    # Each notes how many run beside it.
    script = f'cd {tmp_path}/now; touch "$CANOPY_HOST"; sleep 0.05; ls | wc -l; rm "$CANOPY_HOST"'
    job = fleet.session.run(script, batch=2)
    found = job.results()
    assert {host for result in found for host in result.hosts} == set(HOSTS)
    assert all(int(result.stdout) <= 2 for result in found)
    (status,) = [known for known in fleet.session.jobs() if known.id == job.id]
    assert (status.targets, status.ok, status.missing) == (6, 6, 0)


def test_no_more_hosts_begin_once_too_many_failed_and_each_is_told(fleet: LocalFleet, tmp_path: Path) -> None:
    fails = noting(tmp_path, '[ "$CANOPY_HOST" != h1 ] && [ "$CANOPY_HOST" != h2 ]')
    job = fleet.session.run(fails, batch="34%", max_fail=1)
    found = outcomes(job)
    never: Outcome = Cancelled(ran=False)
    assert found == {"h0": Exited(0), "h1": Exited(1), "h2": Exited(1), "h3": Exited(0), "h4": never, "h5": never}
    assert sorted(begun(tmp_path)) == ["h0", "h1", "h2", "h3"]
    assert outcomes(fleet.session.job(job.id)) == found, "it is on record"
    assert fleet.session.failed(job.id) == ("h1", "h2", "h4", "h5")


def test_a_cancel_lets_no_more_hosts_begin(fleet: LocalFleet, tmp_path: Path) -> None:
    job = fleet.session.run(noting(tmp_path, "exec sleep 600"), batch=1, max_fail="100%")
    wait_until(lambda: begun(tmp_path), DEADLINE_S, "the first host to begin")
    job.cancel()
    found = outcomes(job)
    assert found == {"h0": Cancelled(ran=True)} | {host: Cancelled(ran=False) for host in HOSTS[1:]}
    assert begun(tmp_path) == ["h0"]


def test_what_is_no_share_begins_nothing(fleet: LocalFleet, tmp_path: Path) -> None:
    for batch, max_fail in (("0", "0"), ("-1", "0"), ("ten", "0"), ("101%", "0"), ("2", "-1"), ("2", "x%")):
        with pytest.raises(CtlError) as caught:
            fleet.session.run(noting(tmp_path), batch=batch, max_fail=max_fail)
        assert caught.value.status == ExitStatus.USAGE
    assert not begun(tmp_path)


def test_a_service_that_is_killed_goes_on_rolling_and_nobody_runs_it_twice(fleet: LocalFleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waits = noting(tmp_path, f"while [ ! -e {gate} ]; do sleep 0.05; done")
    job = fleet.session.run(waits, batch=2, detach=True)
    job.close()
    wait_until(lambda: len(begun(tmp_path)) == 2, DEADLINE_S, "the first hosts to begin")
    fleet.kill_service()
    fleet.start_service()
    (status,) = [known for known in fleet.session.jobs() if known.id == job.id]
    assert (status.targets, status.took_s) == (6, None)
    gate.touch()
    assert outcomes(fleet.session.job(job.id)) == dict.fromkeys(HOSTS, Exited(0))
    assert sorted(begun(tmp_path)) == sorted(HOSTS)


# --- many at once -----------------------------------------------------------------------------------------------------


def test_a_hundred_clients_are_served_at_once_and_none_waits_for_another(fleet: LocalFleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fleet.session.run(noting(tmp_path, f"while [ ! -e {gate} ]; do sleep 0.05; done"))
    wait_until(lambda: len(begun(tmp_path)) == len(HOSTS), DEADLINE_S, "the slow job to begin everywhere")

    def ask(number: int) -> tuple[set[str], set[bytes]]:
        results = Session(FLEET).run(f"echo {number}").results()
        return {host for result in results for host in result.hosts}, {result.stdout for result in results}

    with ThreadPoolExecutor(100) as clients:
        for number, (hosts, texts) in enumerate(clients.map(ask, range(100))):
            assert (hosts, texts) == (set(HOSTS), {f"{number}\n".encode()})
    assert len(slow.waiting_for()) == len(HOSTS), "and it still runs"
    gate.touch()
    assert outcomes(slow) == dict.fromkeys(HOSTS, Exited(0))


# --- from Python ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch) -> LocalFleet:
    """The fleet that is meant where nobody names one."""
    monkeypatch.setenv("CANOPY_FLEET", FLEET)
    return fleet


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("module", [session, async_session])
def test_the_examples_of_the_documentation_are_true(module: ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted > 3
    assert not done.failed


@pytest.mark.usefixtures("chosen")
def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    # Hosts that end later come in a result of their own.
    counts = re.findall(r"^(\d+) Exited\(code=0\)", capsys.readouterr().out, flags=re.MULTILINE)
    assert sum(map(int, counts)) == len(HOSTS)


def test_results_come_as_soon_as_hosts_have_ended(fleet: LocalFleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = fleet.session.run(f'[ "$CANOPY_HOST" = h5 ] || exit 0; while [ ! -e {gate} ]; do sleep 0.05; done')
    came: set[str] = set()
    for result in job:
        came |= set(result.hosts)
        if len(came) == len(HOSTS) - 1:
            assert job.waiting_for() == ("h5",)
            gate.touch()
    assert came == set(HOSTS)
    assert job.settled


def test_leaving_a_block_ends_the_command(fleet: LocalFleet, tmp_path: Path) -> None:
    with fleet.session.run(noting(tmp_path, "echo on; exec sleep 600"), ["h0"], stream=True) as job:
        piece = next(iter(job))
        assert isinstance(piece, Piece)
    assert outcomes(fleet.session.job(job.id)) == {"h0": Cancelled(ran=True)}


@pytest.mark.usefixtures("chosen")
def test_asyncio_has_the_same() -> None:
    async def ask() -> None:
        here = AsyncSession()
        assert [host.name for host in (await here.status()).hosts] == list(HOSTS)
        found = await (await here.run("echo out; echo err >&2; exit 3", "@odd")).results()
        assert [(one.hosts, one.outcome, one.stdout, one.stderr) for one in found] == [
            (("h1", "h3", "h5"), Exited(3), b"out\n", b"err\n")
        ]
        job = await here.run(["cat"], ["h2"], stdin=b"in")
        assert [result.stdout async for result in job] == [b"in"]
        assert (await here.jobs(1))[0].id == job.id
        assert await (await here.job(job.id)).results() == [Result(("h2",), Exited(0), Output(b"in", b"", 2, 0))]
        with pytest.raises(CtlError, match="not in this fleet: h99"):
            await here.run("true", ["h99"])
        with pytest.raises(CtlError, match="the nearest is @odd"):
            await here.run("true", "@od")

    asyncio.run(ask())


@pytest.mark.usefixtures("chosen")
def test_asyncio_pushes_and_pulls_too(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(3 * MAX_INLINE))

    async def ask() -> None:
        here, target = AsyncSession(), tmp_path / "pushed"
        job = await here.push(tmp_path / "source", str(target), ["h1"], mode=0o640)
        assert [(one.hosts, one.stdout) for one in await job.results()] == [(("h1",), b"pushed")]
        assert (target.stat().st_size, target.stat().st_mode & 0o777) == (3 * MAX_INLINE, 0o640)
        found = await (await here.pull(str(target), tmp_path / "here", "@odd", fold=True)).results()
        assert [(one.hosts, one.ok) for one in found] == [(("h1", "h3", "h5"), True)]
        assert (tmp_path / "here/h1/pushed").read_bytes() == target.read_bytes()
        with pytest.raises(CtlError, match="no path from / on"):
            await here.push(tmp_path / "source", "pushed", ["h1"])

    asyncio.run(ask())


def test_a_task_that_leaves_takes_its_command_with_it(chosen: LocalFleet) -> None:
    async def ask() -> int:
        async with await AsyncSession().run("echo on; exec sleep 600", ["h0"], stream=True) as job:
            async for piece in job:
                assert isinstance(piece, Piece)
                break
        other = await AsyncSession().run("exec sleep 600", ["h1"])
        await other.cancel()
        assert [type(result.outcome) async for result in other] == [Cancelled]
        return job.id

    assert outcomes(chosen.session.job(asyncio.run(ask()))) == {"h0": Cancelled(ran=True)}


@pytest.mark.usefixtures("chosen")
def test_many_tasks_wait_for_nobody_but_their_own() -> None:
    async def ask() -> list[bytes]:
        here = AsyncSession()
        slow = await here.run("exec sleep 600", ["h0"])
        jobs = await asyncio.gather(*(here.run(f"echo {number}", ["h0", "h1"]) for number in range(20)))
        texts = [(await job.results())[0].stdout for job in jobs]
        assert not slow.settled
        await slow.close()
        return texts

    assert asyncio.run(ask()) == [f"{number}\n".encode() for number in range(20)]


@pytest.mark.usefixtures("fleet")
def test_without_a_service_asyncio_says_so_too() -> None:
    with pytest.raises(CtlError, match="no service runs") as caught:
        asyncio.run(AsyncSession("nobody").status())
    assert caught.value.status == ExitStatus.NO_SERVICE
