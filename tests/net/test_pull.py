"""Pulls: what hosts have comes here, each content once, into a folder a host, and nowhere else."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Fetched, Result
from controller.status import CtlError
from protocol.limits import CHUNK
from protocol.outcomes import Cancelled, Exited, FailedToStart, Lost, Refused
from tests.net.localfleet import FLEET, LocalFleet, local_fleet
from tests.waiting import wait_until

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A chain of three agents, so that the last one reaches the service by itself for a pull alone."""
    with local_fleet(tmp_path_factory.mktemp("fleet"), ["h0", "h1", "h2"], 1) as started:
        yield started


@pytest.fixture(autouse=True)
def _clean(fleet: LocalFleet, tmp_path: Path) -> Iterator[None]:
    """No test leaves a temporary file, here or on hosts."""
    yield
    places = [tmp_path, fleet.session.directory / "pulls", *(fleet.directory(name).parts for name in fleet.names)]
    wait_until(
        lambda: (
            not [path for place in places for path in place.rglob("*") if place != tmp_path or ".canopy-" in str(path)]
        ),
        DEADLINE_S,
        "temporary files to be gone",
    )


def pulled(
    fleet: LocalFleet, path: str | list[str], out: Path, hosts: list[str] | None = None, **options: bool
) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for result in fleet.session.pull(path, out, hosts, **options).results():
        found |= dict.fromkeys(result.hosts, result)
    return found


def test_equal_contents_come_once_and_each_host_has_a_folder(fleet: LocalFleet, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(os.urandom(3 * CHUNK + 17))
    source.chmod(0o640)
    job = fleet.session.pull(str(source), out)
    got: dict[str, int] = {}
    results = []
    for happening in job:
        if isinstance(happening, Fetched):
            assert happening.size == 3 * CHUNK + 17
            got |= happening.done
        elif isinstance(happening, Result):
            results.append(happening)
    assert {host for result in results for host in result.hosts} == set(fleet.names)
    assert all(result.outcome == Exited(0) for result in results), results
    assert list(got.values()) == [3 * CHUNK + 17]  # from one host alone
    inodes = set()
    for name in fleet.names:
        there = out / name / "source"
        assert there.read_bytes() == source.read_bytes()
        assert stat.S_IMODE(there.stat().st_mode) == 0o640
        inodes.add(there.stat().st_ino)
    assert len(inodes) == 1
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert all(result.ok for result in pulled(fleet, str(source), out).values())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_each_hosts_own_content_arrives(fleet: LocalFleet, tmp_path: Path) -> None:
    for name in fleet.names:
        (fleet.directory(name).path / "own").write_text(f"{name}\n")
        (fleet.directory(name).path / "same").write_text("same\n")
    found = pulled(fleet, ["@/own", "@/same"], tmp_path / "out")
    assert all(result.outcome == Exited(0) for result in found.values()), found
    for name in fleet.names:
        assert (tmp_path / "out" / name / "own").read_text() == f"{name}\n"
        assert (tmp_path / "out" / name / "same").read_text() == "same\n"
        assert sorted(os.listdir(tmp_path / "out" / name)) == ["own", "same"]


def test_a_directory_arrives_with_its_links_holes_and_modes(fleet: LocalFleet, tmp_path: Path) -> None:
    top, out = tmp_path / "top", tmp_path / "out"
    (top / "deep").mkdir(parents=True)
    for number in range(900):
        (top / f"{number}").write_bytes(b"%d" % number)
    (top / "deep" / "link").symlink_to("/etc/passwd")
    with (top / "deep" / "sparse").open("wb") as file:
        file.truncate(20 << 20)
        file.seek(10 << 20)
        file.write(b"data")
    (top / "deep").chmod(0o711)
    (tmp_path / "other").write_bytes(b"other")
    found = pulled(fleet, [str(top), f"{tmp_path}/other"], out, ["h2"])
    assert found["h2"].outcome == Exited(0), found
    there = out / "h2" / "top"
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in top.iterdir())
    assert all((there / f"{number}").read_bytes() == b"%d" % number for number in range(900))
    assert os.readlink(there / "deep" / "link") == "/etc/passwd"
    assert (there / "deep" / "sparse").read_bytes() == (top / "deep" / "sparse").read_bytes()
    assert (there / "deep" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert stat.S_IMODE((there / "deep").stat().st_mode) == 0o711
    assert (out / "h2" / "other").read_bytes() == b"other"


def test_folded_contents_are_here_once_beside_the_names_of_their_hosts(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(b"same")
    found = pulled(fleet, str(tmp_path / "same"), tmp_path / "out", fold=True)
    assert set(found) == set(fleet.names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["h0", "h0.hosts"]
    assert (tmp_path / "out" / "h0" / "same").read_bytes() == b"same"
    assert (tmp_path / "out" / "h0.hosts").read_text() == "h0\nh1\nh2\n"


def test_times_are_kept_where_that_is_asked_for(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.utime(tmp_path / "file", ns=(5, 1_000_000_007))
    pulled(fleet, str(tmp_path / "file"), tmp_path / "out", ["h1"], preserve=True)
    assert (tmp_path / "out/h1/file").stat().st_mtime_ns == 1_000_000_007


def test_what_runs_as_another_user_on_a_host_does_so_here_only_where_that_is_asked_for(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    for name in ("tool", "top/tool"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).chmod(0o6755)
    paths = [str(tmp_path / "tool"), str(tmp_path / "top")]
    for preserve, mode in ((False, 0o755), (True, 0o6755)):
        out = tmp_path / f"out{preserve}"
        assert all(result.ok for result in pulled(fleet, paths, out, ["h0", "h1"], preserve=preserve).values())
        found = {
            stat.S_IMODE((out / host / name).stat().st_mode) for host in ("h0", "h1") for name in ("tool", "top/tool")
        }
        assert found == {mode}


def test_what_is_not_there_is_said_by_host_and_the_others_come(fleet: LocalFleet, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert all(
        isinstance(result.outcome, Refused) and "No such file" in result.outcome.why
        for result in pulled(fleet, f"{tmp_path}/missing", tmp_path / "out").values()
    )
    (refused,) = pulled(fleet, str(tmp_path / "pipe"), tmp_path / "out", ["h1"]).values()
    assert isinstance(refused.outcome, Refused)
    assert "is a pipe" in refused.outcome.why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["relative"], "names nothing"),
        (["/etc/.."], "names nothing"),
        (["/"], "names nothing"),
        (["/a/x", "/b/x"], "both be x"),
    ],
)
def test_a_path_that_is_none_is_refused_before_anything_is_asked(
    fleet: LocalFleet, tmp_path: Path, paths: list[str], why: str
) -> None:
    with pytest.raises(CtlError, match=why):
        fleet.session.pull(paths, tmp_path / "out")


def test_a_place_that_can_not_be_written_fails_with_its_reason(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "out").write_bytes(b"no directory")
    for result in pulled(fleet, str(tmp_path / "file"), tmp_path / "out").values():
        assert isinstance(result.outcome, FailedToStart)
        assert "can't be written" in result.outcome.why
    # A link where a host's folder would be is the person's own, and what is in the folder is replaced, not followed.
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "h0").mkdir(parents=True)
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out" / "h0" / "file").symlink_to(tmp_path / "precious")
    assert pulled(fleet, str(tmp_path / "file"), tmp_path / "out", ["h0"])["h0"].ok
    assert (tmp_path / "out" / "h0" / "file").read_bytes() == b"x"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_another_host_gives_what_the_first_does_not_live_to_give(fleet: LocalFleet, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(60 * CHUNK))
    (tmp_path / "out" / "h0").mkdir(parents=True)
    job = fleet.session.pull(str(source), tmp_path / "out")
    results: list[Result] = []
    stopped = False
    for happening in job:
        if isinstance(happening, Fetched) and not stopped:
            stopped = True
            fleet.kill("h0")
        elif isinstance(happening, Result):
            results.append(happening)
    fleet.restart("h0")
    assert {host for result in results for host in result.hosts} == set(fleet.names)
    assert all(result.ok for result in results), results
    assert (tmp_path / "out" / "h2" / "source").read_bytes() == source.read_bytes()


def test_a_job_tells_what_its_pull_did_on_each_host(fleet: LocalFleet, tmp_path: Path) -> None:
    for name, text in (("h0", "same"), ("h1", "same"), ("h2", "other")):
        (fleet.directory(name).path / "mine").write_text(text)
    (fleet.directory("h2").path / "mine").unlink()
    job = fleet.session.pull("@/mine", tmp_path / "out")
    told = {host: (result.outcome, result.stdout) for result in job.results() for host in result.hosts}
    assert told["h0"] == told["h1"] == (Exited(0), b"pulled 4 B")
    again = fleet.session.job(job.id)
    assert {host: (result.outcome, result.stdout) for result in again.results() for host in result.hosts} == told
    (status,) = fleet.session.jobs(1)
    assert (status.id, status.targets, status.ok, status.failed, status.missing) == (job.id, 3, 2, 1, 0)
    assert fleet.session.failed(job.id) == ("h2",)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ctl")), "--fleet", FLEET, "job", str(job.id), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["settled"], shown["missing"]) == (1, True, [])
    assert [(one["nodeset"], one["stdout"]) for one in shown["results"]] == [("h[0-1]", "pulled 4 B"), ("h2", "")]


@pytest.mark.parametrize("by_number", [False, True])
def test_a_pull_that_is_cancelled_leaves_nothing_half(fleet: LocalFleet, tmp_path: Path, *, by_number: bool) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(200 * CHUNK))
    job = fleet.session.pull(str(source), tmp_path / "out", ["h1", "h2"])
    results: list[Result] = []
    frozen = False
    try:
        for happening in job:
            if isinstance(happening, Fetched) and not frozen:
                frozen = True
                os.kill(fleet.pid("h1"), signal.SIGSTOP)
                (status,) = fleet.session.jobs(1)
                assert (status.id, status.targets, status.missing, status.took_s) == (job.id, 2, 2, None)
                if by_number:
                    fleet.session.cancel_job(job.id)
                else:
                    job.cancel()
            elif isinstance(happening, Result):
                results.append(happening)
    finally:
        os.kill(fleet.pid("h1"), signal.SIGCONT)
    assert {host for result in results for host in result.hosts} == {"h1", "h2"}
    assert all(isinstance(result.outcome, Cancelled | Lost) for result in results), results
    assert not list((tmp_path / "out").rglob("*"))
    recorded = {host for result in fleet.session.job(job.id).results() for host in result.hosts if not result.ok}
    assert recorded == {"h1", "h2"}
    fleet.wait_until_home()
