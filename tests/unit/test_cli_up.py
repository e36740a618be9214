"""`ctl up` and `ctl down` as commands: which hosts are meant, what is reported, and the exit code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import controller.local
import controller.up
from controller import api, cli
from controller.bootstrap import HostResult, Progress
from controller.session import Result, VmAnswer
from controller.status import ExitStatus
from controller.up import DownReport, UpOptions, UpReport
from protocol.outcomes import Exited, Lost, Output
from protocol.vms import VmChange, VmResult
from tests.unit import fake_service as fake

INFRA = """\
#list of nodes
suno-3.sophia 4 20 8
suno-6.sophia 4 20 8
suno-9.sophia 4 20 8
#list of VMs
#initial configuration
(suno-6.sophia)
#end of configuration
"""

Up = Callable[..., SimpleNamespace]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[UpOptions]:
    """What the engine behind `ctl up` is asked for; h3 and h7 refuse, h9 has no Python."""
    found: list[UpOptions] = []

    def up(options: UpOptions, progress: Callable[[Progress], None]) -> UpReport:
        found.append(options)
        reasons = {"h3": "connection refused", "h7": "connection refused", "h9": "no Python 3.10 or later"}
        failed = {name: reasons[name] for name in options.hosts if name in reasons}
        good = tuple(name for name in options.hosts if name not in failed)
        latest = HostResult(name=good[0], state="started") if good else None
        progress(Progress(total=len(options.hosts), started=len(good), current=0, failed=len(failed), latest=latest))
        return UpReport(started=good, current=(), failed=failed)

    monkeypatch.setattr(controller.up, "up", up)
    return found


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Up:
    monkeypatch.delenv("CANOPY_FLEET", raising=False)

    def run(*arguments: str) -> SimpleNamespace:
        status = cli.run(arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def test_hosts_come_from_ranges_files_and_nodes_each_once(ctl: Up, asked: list[UpOptions], tmp_path: Path) -> None:
    infra = tmp_path / "infra.conf"
    infra.write_text(INFRA)
    nodes = tmp_path / "nodes"
    nodes.write_text("a1\na1\nsuno-3.sophia\n# none\n")
    done = ctl("up", str(infra), "-w", "a[0-2]", "--hosts", str(nodes), "-x", "a2")
    assert done.status == 0
    # An offline node is none that could be started.
    assert asked[0].hosts == ("a0", "a1", "suno-3.sophia", "suno-9.sophia")


def test_hosts_come_from_standard_input(ctl: Up, asked: list[UpOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"h1\nh1\nh2\n")))
    assert ctl("up", "--hosts", "-").out == "2 of 2 hosts are up\n"
    assert asked[0].hosts == ("h1", "h2")


def test_the_options_reach_the_engine(ctl: Up, asked: list[UpOptions], tmp_path: Path) -> None:
    ctl(
        "--fleet", "lab", "up", "-w", "h1", "-F", str(tmp_path / "config"), "-l", "root", "--fanout", "8",
        "--tries", "5", "--connect-timeout", "2.5", "--flat", "--address", "198.18.0.1",
    )  # fmt: skip
    assert asked == [
        UpOptions(
            hosts=("h1",),
            fleet="lab",
            ssh_config=tmp_path / "config",
            login="root",
            fanout=8,
            tries=5,
            connect_timeout=2.5,
            flat=True,
            address="198.18.0.1",
        )
    ]
    ctl("up", "-w", "h1")
    assert asked[1] == UpOptions(hosts=("h1",))


def test_reasons_are_grouped_and_the_minimum_decides(ctl: Up, asked: list[UpOptions]) -> None:
    done = ctl("up", "-w", "h[0-63]")
    assert done.out == "61 of 64 hosts are up\n"
    assert done.err == "3 failed: h[3,7]: connection refused; h9: no Python 3.10 or later\n"
    assert done.status == 0
    done = ctl("up", "-w", "h[0-63]", "--min-up", "62")
    assert done.status == ExitStatus.UNREACHABLE
    assert "62 had to be up" in done.err
    assert len(asked) == 2


def test_an_upgrade_that_was_stopped_says_who_runs_what(ctl: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    report = UpReport(
        started=("h1",),
        current=(),
        outdated={"h2": "it ended at once; the previous version runs again", "h3": "not tried after that"},
        stopped="h2 did not come back on the new version: it ended at once",
    )
    monkeypatch.setattr(controller.up, "up", lambda *_: report)
    done = ctl("up", "-w", "h[1-3]")
    assert (done.status, done.out) == (ExitStatus.FAILED, "3 of 3 hosts are up\n")
    assert done.err.splitlines() == [
        "on the new version: h1",
        "on the old version: h2: it ended at once; the previous version runs again",
        "on the old version: h3: not tried after that",
        "ctl: the upgrade was stopped: h2 did not come back on the new version: it ended at once",
    ]
    found = json.loads(ctl("up", "-w", "h[1-3]", "--json").out)
    assert (found["up"], found["met"]) == (["h1", "h2", "h3"], True)
    assert [group["nodeset"] for group in found["outdated"]] == ["h2", "h3"]


def test_a_wave_is_as_the_user_wants_it(ctl: Up, asked: list[UpOptions]) -> None:
    ctl("up", "-w", "h1")
    ctl("up", "-w", "h1", "--wave", "3")
    assert [options.wave for options in asked] == ["10%", "3"]


def test_up_for_programs(ctl: Up, asked: list[UpOptions]) -> None:
    found = json.loads(ctl("up", "-w", "h[1-3]", "--json", "--min-up", "100%").out)
    assert found == {
        "up": ["h1", "h2"],
        "nodeset": "h[1-2]",
        "failed": [{"hosts": ["h3"], "nodeset": "h3", "why": "connection refused"}],
        "outdated": [],
        "stopped": "",
        "needed": 3,
        "met": False,
    }
    assert asked


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        ([], ExitStatus.USAGE, "which hosts?"),
        (["-w", "h1", "-x", "h1"], ExitStatus.NO_TARGET, "no host matches -w h1 -x h1"),
        (["-w", "@nowhere"], ExitStatus.USAGE, "there is no group @nowhere"),
        (["-w", "@all"], ExitStatus.NO_SERVICE, "no service runs"),
        (["-w", "h1", "--label", "rack", "--label", "a b=c"], ExitStatus.USAGE, "'rack' is neither"),
        (["--hosts", "/nowhere"], ExitStatus.USAGE, "/nowhere: No such file"),
        (["/nowhere.conf"], ExitStatus.USAGE, "/nowhere.conf: No such file"),
        (["-w", "h1", "--min-up", "2"], ExitStatus.USAGE, "--min-up 2"),
        (["-w", "h1", "--fanout", "0"], ExitStatus.USAGE, "fanout"),
        (["--local", "3", "-w", "h1"], ExitStatus.USAGE, "--local makes its hosts itself"),
        (["--local", "0"], ExitStatus.USAGE, "1 to 1024"),
        (["-w", "h1", "--libvirt", "test:///default"], ExitStatus.USAGE, "--libvirt goes with --local"),
    ],
)
def test_an_up_that_can_not_be_starts_nothing(
    ctl: Up, asked: list[UpOptions], arguments: list[str], status: int, why: str
) -> None:
    done = ctl("up", *arguments)
    assert (done.status, done.out) == (status, "")
    assert why in done.err
    assert not asked


def test_an_infra_conf_with_errors_is_told_whole(ctl: Up, asked: list[UpOptions], tmp_path: Path) -> None:
    infra = tmp_path / "infra.conf"
    infra.write_text("#list of nodes\nh1 4 20\nh2 x 20 8\n#end of configuration\n")
    done = ctl("up", str(infra))
    assert done.status == ExitStatus.USAGE
    assert f"{infra}:2:1:" in done.err
    assert f"{infra}:3:4:" in done.err
    assert not asked


def test_local_agents_are_named_by_number_or_by_an_infra_conf(
    ctl: Up, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[object, ...]] = []

    def local_up(
        fleet: str | None, names: tuple[str, ...], fanout: int, *, site_of: Callable[[str], str], libvirt: str | None
    ) -> dict[str, str]:
        calls.append((fleet, names, fanout, site_of(names[-1]), libvirt))
        return {"h1": "it did not start"} if "h1" in names else {}

    monkeypatch.setattr(controller.local, "local_up", local_up)
    done = ctl("up", "--local", "3")
    assert (done.status, done.out, done.err) == (0, "2 of 3 hosts are up\n", "1 failed: h1: it did not start\n")
    infra = tmp_path / "infra.conf"
    infra.write_text(INFRA)
    assert ctl("up", "--local", str(infra), "--libvirt", "test:///default").status == 0
    assert calls == [
        (None, ("h0", "h1", "h2"), 32, "", None),
        (None, ("suno-3.sophia", "suno-9.sophia"), 32, "sophia", "test:///default"),
    ]


# --- down -----------------------------------------------------------------------------------------------------------


def down_with(monkeypatch: pytest.MonkeyPatch, report: DownReport) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def down(fleet: str | None, hosts: tuple[str, ...] | None, *, purge: bool, vms: bool) -> DownReport:
        calls.append((fleet, hosts, purge, vms))
        return report

    monkeypatch.setattr(controller.up, "down", down)
    return calls


def test_down_says_who_is_gone_and_that_the_service_is(ctl: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Result(("h0", "h1"), Exited(0), Output())
    calls = down_with(monkeypatch, DownReport(vms=(), results=(gone,), left=(), service_ended=True))
    done = ctl("down", "--purge", "--vms")
    assert (done.status, done.out, done.err) == (0, "h[0-1] (2): gone\nthe service has ended\n", "")
    assert calls == [(None, None, True, True)]


def test_down_tells_what_it_could_not_do(ctl: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = VmAnswer(
        "h0",
        (
            VmResult(name="vm0", change=VmChange.FAILED, detail="it hangs"),
            VmResult(name="vm1", change=VmChange.REMOVED),
        ),
    )
    results = (Result(("h0",), Exited(0), Output()), Result(("h1",), Lost("no word for 7 s"), Output()))
    calls = down_with(monkeypatch, DownReport(vms=(answer,), results=results, left=("h2",), service_ended=False))
    with fake.fake_service() as service:
        monkeypatch.setenv("CANOPY_HOME", str(service.home))
        service.replies(api.GetStatus, fake.status(*(fake.host(rank) for rank in range(4))))
        done = ctl("down", "-x", "h3", "--vms")
    assert calls == [(None, ("h0", "h1", "h2"), False, True)]
    assert done.out == "h0: gone\n"
    assert done.err.splitlines() == [
        "h0: vm0: it hangs",
        "h1: lost: no word for 7 s",
        "h2: still running",
        "1 of 2 answered ok; missing: h1 (lost: no word for 7 s)",
    ]
    assert done.status == ExitStatus.UNREACHABLE
    found = json.loads(ctl("down", "--json").out)
    assert found["still_running"] == ["h2"]
    assert [one["nodeset"] for one in found["results"]] == ["h0", "h1"]
    assert found["vms"] == [
        {"host": "h0", "name": "vm0", "change": "failed", "detail": "it hangs"},
        {"host": "h0", "name": "vm1", "change": "removed", "detail": ""},
    ]


@pytest.mark.parametrize(("arguments", "status"), [((), ExitStatus.USAGE), (("-w", "h1"), 0), (("-x", "h0"), 0)])
def test_a_purge_takes_no_disk_of_a_vm_that_is_to_stay(
    ctl: Up, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int
) -> None:
    with fake.fake_service() as service:
        monkeypatch.setenv("CANOPY_HOME", str(service.home))
        service.replies(api.GetStatus, fake.status(fake.host(0), fake.host(1), vms=(fake.vm("vm0", "h0"),)))
        gone = (api.Accepted(id=7, hosts={1: "h1"}), api.Folded(folds=(fake.fold([1]),)), api.Settled())
        service.replies(api.DownOn, *gone)
        done = ctl("down", "--purge", *arguments)
        assert done.status == status
        assert bool(service.asked(api.DownOn)) is not bool(status)
    if status:
        assert "there are VMs on h0, whose disks --purge would remove: give --vms as well" in done.err
