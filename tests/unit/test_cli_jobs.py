"""`ctl jobs`, `ctl job` and `ctl broadcast --detach`, against the other end of a real socket."""

from __future__ import annotations

import getpass
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from controller import api, cli
from controller.render_jobs import jobs_table, took, what_text
from controller.status import ExitStatus
from protocol.outcomes import Exited, Lost, Output
from protocol.vms import VmChange, VmResult
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService
from tests.waiting import wait_until

DEADLINE_S = 60
WHAT = json.dumps(["run", "/bin/sh", "-c", "uname -r"])


@dataclass(frozen=True)
class Done:
    """What came of one `ctl`."""

    status: int
    out: str
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
        return Done(status, out.decode(), err.decode())

    return run


def job(number: int, **fields: object) -> api.JobStatus:
    """A job as the service tells of it: done on all of 4 hosts, unless said otherwise."""
    known: dict[str, object] = {
        "id": number,
        "uid": os.getuid(),
        "what": WHAT,
        "targets": 4,
        "ok": 4,
        "failed": 0,
        "lost": 0,
        "missing": 0,
        "began_s_ago": 72.0,
        "took_s": 0.31,
    }
    return api.JobStatus(**(known | fields))  # type: ignore[arg-type]  # a test says what differs


# --- what jobs look like ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "/bin/sh", "-c", "uname -r"], "uname -r"),
        (["run", "ls", "-l", "a file"], "ls -l 'a file'"),
        (["run", "/bin/sh", "-c", "a", "b"], "/bin/sh -c a b"),
        (["push", "/home/ada/app", "/opt/app"], "push /home/ada/app /opt/app"),
        (["create vms", "infra"], "create vms infra"),
        (["down"], "down"),
        (["fetch output", 7, "h1"], "fetch output 7 h1"),
    ],
)
def test_a_job_reads_as_it_was_typed(words: list[object], text: str) -> None:
    assert what_text(json.dumps(words)) == text


def test_a_job_that_is_not_over_says_that_it_runs() -> None:
    assert [took(seconds) for seconds in (None, 0.31, 59.9, 125.0)] == ["runs", "0.3 s", "59.9 s", "2 min 5 s"]


def test_a_long_or_hostile_command_takes_one_line_and_obeys_nothing() -> None:
    text = jobs_table([job(1, what=json.dumps(["run", "/bin/sh", "-c", "a\x1b[2J\n" + "b" * 500]))], str)
    (row,) = text.splitlines()[1:]
    assert "a\\x1b[2J\\nbbb" in row
    assert "b..." in row
    assert len(row) < 140


def test_jobs_are_listed_with_who_asked_and_how_hosts_did(service: FakeService, ctl: Ctl) -> None:
    running = job(9, ok=1, failed=1, lost=1, missing=1, took_s=None, uid=4_000_000)
    service.replies(api.GetJobs, api.Jobs(jobs=(running, job(7))))
    rows = [line.split() for line in ctl("jobs").out.splitlines()]
    assert rows[0] == ["JOB", "WHO", "WHAT", "HOSTS", "OK", "FAILED", "LOST", "MISSING", "BEGAN", "TOOK"]
    assert rows[1] == ["9", "4000000", "uname", "-r", "4", "1", "1", "1", "1", "1", "min", "12", "s", "ago", "runs"]
    assert rows[2] == f"7 {getpass.getuser()} uname -r 4 4 0 0 0 1 min 12 s ago 0.3 s".split()
    found = json.loads(ctl("jobs", "-n", "3", "--json").out)
    assert found[0]["what"] == ["run", "/bin/sh", "-c", "uname -r"]
    assert [one["job"] for one in found] == [9, 7]
    assert "id" not in found[0]
    assert (found[0]["missing"], found[0]["took_s"], found[1]["user"]) == (1, None, getpass.getuser())
    assert [asked.most for asked in service.asked(api.GetJobs)] == [20, 3]


# --- one job ----------------------------------------------------------------------------------------------------------


def following(service: FakeService, *replies: api.Reply, what: str = WHAT) -> None:
    """Have the service tell so of job 7 on 4 hosts."""
    service.replies(api.FollowJob, api.Accepted(id=7, hosts=fake.names(4), what=what), *replies)


SOME = api.Folded(folds=(fake.fold([0, 1], None, fake.printed(b"6.1\n")), fake.fold([3], Lost("its relay died"))))
REST = api.Folded(folds=(fake.fold([2], Exited(3)),))


def test_a_job_that_runs_is_shown_as_far_as_it_came_with_who_is_missing(service: FakeService, ctl: Ctl) -> None:
    following(service, SOME, api.OnRecord())
    done = ctl("job", "7")
    rule = "-" * 15
    assert done.out.splitlines() == [rule, "h[0-1] (2)", rule, "6.1"]
    assert done.err.splitlines() == [
        "h3: lost: its relay died",
        "2 of 4 answered ok; missing: h3 (lost: its relay died), h2 (no outcome yet)",
        "job 7 goes on: --wait waits for the rest, --cancel ends it",
    ]
    assert done.status == ExitStatus.UNREACHABLE
    assert service.asked(api.FollowJob) == [api.FollowJob(id=7, wait=False)]


def test_what_a_lost_host_answered_after_all_is_shown_beside_that_it_is_lost(service: FakeService, ctl: Ctl) -> None:
    late = api.Late(folds=(fake.fold([3], Exited(4), fake.printed(b"5.15\n")),))
    following(service, SOME, REST, late, api.Settled())
    done = ctl("job", "7")
    rule = "-" * 15
    assert done.out.splitlines() == [rule, "h[0-1] (2)", rule, "6.1", rule, "h3: answered later", rule, "5.15"]
    assert done.err.splitlines()[:2] == [
        "h2: exited with exit code 3",
        "h3: lost: its relay died; answered later: exited with exit code 4",
    ]
    assert done.status == ExitStatus.UNREACHABLE, "it was lost when its outcome was needed"
    following(service, SOME, REST, late, api.Settled())
    (found,) = json.loads(ctl("job", "7", "--json").out)["late"]
    assert (found["hosts"], found["outcome"], found["stdout"]) == (["h3"], {"kind": "exited", "code": 4}, "5.15\n")


def test_a_job_with_hosts_missing_is_no_success(service: FakeService, ctl: Ctl) -> None:
    following(service, api.Folded(folds=(fake.fold([0, 1, 2]),)), api.OnRecord())
    assert ctl("job", "7").status == ExitStatus.UNREACHABLE


def test_a_job_that_is_over_ends_as_its_command_did(service: FakeService, ctl: Ctl) -> None:
    following(service, api.Folded(folds=(fake.fold([0, 1, 3]),)), REST, api.Settled())
    done = ctl("job", "7", "--wait")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines() == ["h2: exited with exit code 3", "3 of 4 answered ok; failed: h2"]
    assert service.asked(api.FollowJob) == [api.FollowJob(id=7, wait=True)]


def test_a_job_for_programs_says_who_is_missing(service: FakeService, ctl: Ctl) -> None:
    following(service, SOME, api.OnRecord())
    found = json.loads(ctl("job", "7", "--json").out)
    assert (found["job"], found["settled"], found["missing"]) == (7, False, ["h2"])
    assert found["what"] == json.loads(WHAT)
    assert [(one["nodeset"], one["outcome"]["kind"]) for one in found["results"]] == [
        ("h[0-1]", "exited"),
        ("h3", "lost"),
    ]


@pytest.mark.parametrize("kind", ["push", "pull"])
def test_a_job_of_files_tells_what_hosts_say_of_them_as_its_command_did(
    service: FakeService, ctl: Ctl, kind: str
) -> None:
    said = (fake.fold([0, 2], None, Output(b"pushed")), fake.fold([1], None, Output(b"new: a\nnew: b")))
    what = json.dumps([kind, "a", "/srv"], separators=(",", ":"))
    following(service, api.Folded(folds=said), api.OnRecord(), what=what)
    assert ctl("job", "7").out.splitlines() == ["h[0,2] (2): pushed", "h1: 2 changes", "  new: a", "  new: b"]


def test_a_job_that_made_vms_tells_what_hosts_did(service: FakeService, ctl: Ctl) -> None:
    made = VmResult(name="vm1", change=VmChange.CREATED)
    bad = VmResult(name="vm2", change=VmChange.FAILED, detail="no memory")
    following(
        service,
        api.VmsDone(host="h0", results=(made,)),
        api.VmsDone(host="h1", results=(bad,)),
        api.VmsReached(host="h2", names=("vm3", "vm4")),
        api.OnRecord(),
        what=json.dumps(["create vms", "infra"]),
    )
    done = ctl("job", "7")
    assert done.out.splitlines() == ["h0: +1 created", "h1: !1 failed", "h2: vm[3-4] answered ping"]
    assert done.err.splitlines()[:2] == ["h1: vm2 failed: no memory", "missing: h3 (no outcome yet)"]


def test_a_job_of_which_a_host_says_something_again_and_again_tells_all_of_it(service: FakeService, ctl: Ctl) -> None:
    moved = [VmResult(name=name, change=VmChange.MOVED) for name in ("vm1", "vm2")]
    for _ in range(2):
        said = [api.VmsDone(host="h1", results=(one,)) for one in moved]
        following(service, *said, api.OnRecord(), what=json.dumps(["migrate"]))
    assert ctl("job", "7").out.splitlines() == ["h1: /2 moved"]
    assert [(vm["host"], vm["name"]) for vm in json.loads(ctl("job", "7", "--json").out)["vms"]] == [
        ("h1", "vm1"),
        ("h1", "vm2"),
    ]


def test_a_job_is_cancelled_by_its_number(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CancelJob, api.Done())
    following(service, SOME, REST, api.Settled())
    assert ctl("job", "7", "--cancel", "--wait").status == ExitStatus.UNREACHABLE
    assert service.requests == [api.CancelJob(id=7), api.FollowJob(id=7, wait=True)]


def test_ctrl_c_leaves_a_job_that_is_only_followed(service: FakeService, ctl: Ctl) -> None:
    left: list[api.Request | None] = []
    seen = threading.Event()

    def answer(_: api.FollowJob, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(4), what=WHAT), SOME)
        wait_until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler, DEADLINE_S, "a handler")
        os.kill(os.getpid(), signal.SIGINT)
        left.append(client.receive())
        seen.set()

    service.on(api.FollowJob, answer)
    done = ctl("job", "7", "--wait")
    assert seen.wait(DEADLINE_S)
    assert left == [None], "it goes without a word, and so cancels nothing"
    assert done.status == ExitStatus.INTERRUPTED
    assert done.err.splitlines()[-1] == "job 7 goes on: `ctl job 7 --cancel` ends it"


def test_a_job_that_nobody_knows_is_a_slip(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.FollowJob, api.Failed(why="there is no job 8: `ctl jobs` lists them", status=2))
    assert ctl("job", "8") == Done(2, "", "ctl: there is no job 8: `ctl jobs` lists them\n")
    assert ctl("job", "0").status == ctl("job", "all").status == ExitStatus.USAGE


# --- detached ---------------------------------------------------------------------------------------------------------


def test_a_detached_command_prints_its_number_and_leaves(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.RunOn, api.Accepted(id=7, hosts=fake.names(4)))
    assert ctl("broadcast", "--detach", "reboot") == Done(0, "7\n", "")
    assert json.loads(ctl("broadcast", "--json", "--detach", "reboot").out) == {"job": 7}
    assert [asked.detach for asked in service.asked(api.RunOn)] == [True, True]
    assert ctl("broadcast", "--detach", "--stream", "reboot").status == ExitStatus.USAGE


def test_a_service_that_goes_away_leaves_word_how_to_ask_for_the_rest(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.RunOn, api.Accepted(id=7, hosts=fake.names(2)), api.Folded(folds=(fake.fold([0]),)))
    done = ctl("broadcast", "x")
    assert done.status == ExitStatus.NO_SERVICE
    assert done.err.splitlines()[-1] == (
        "ctl: the service went away, and job 7 goes on on its hosts: see the service's log, "
        "start it again with `ctl up`, then `ctl job 7 --wait` has the rest"
    )
