"""What `ctl check` and `ctl tune` make of what hosts say, and what they ask for, against the other end of a real
socket."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest

from controller import api, cli
from controller.advice import Size, advice
from controller.check import Checked, Seen, folded, judge, report, size_of, to_raise, usual_mtu, well
from protocol.checks import HostFacts, LibvirtFacts, Room, TuneAnswer, Tuned
from protocol.outcomes import Exited, Lost, Output, Refused
from tests.unit import fake_service as fake
from tests.unit.fake_service import FakeService

SIZE = Size(hosts=64, vms=960, vms_on_one=15)
ENOUGH: dict[str, int | None] = {key: found.least for key, found in advice(SIZE, forward=True).items()}
LIBVIRT = LibvirtFacts(
    uri="qemu:///system", version="9.0.0", missing=False, problem="", daemon="libvirtd", files=8192, stale=False
)
ROOM = Room(path="/var/lib/canopy/f", free_mib=50_000, total_mib=100_000, inodes_left=True)
NEIGHBOURS = "net.ipv4.neigh.default.gc_thresh1"


def facts(**fields: object) -> HostFacts:
    """Of a host that is well, but for what a test says."""
    usual: dict[str, object] = {
        "arrived_ms": 1_000_100,
        "answered_ms": 1_000_200,
        "user": "root",
        "kvm": True,
        "kvm_why": "/dev/kvm works",
        "qemu": "7.2.19",
        "qemu_why": "/usr/bin/qemu-system-x86_64",
        "libvirt": LIBVIRT,
        "rooms": (ROOM,),
        "interface": "eth0",
        "mtu": 1500,
        "settings": ENOUGH,
        "unread": {},
        "agent_files": 65_536,
        "modules": {"bridge": "loaded", "vxlan": "available", "tun": "loaded", "vhost_net": "loaded"},
        "huge_pages": 0,
        "ksm": False,
    }
    return HostFacts(**(usual | fields))  # type: ignore[arg-type]  # a test says what differs


def libvirt(**fields: object) -> HostFacts:
    return facts(libvirt=msgspec.structs.replace(LIBVIRT, **fields))


def room(**fields: object) -> HostFacts:
    return facts(rooms=(msgspec.structs.replace(ROOM, **fields),))


def settings(**values: int | None) -> HostFacts:
    changed = {key: value for key, value in (ENOUGH | values).items() if value != -1}
    return facts(settings=changed, unread={NEIGHBOURS: "it can't be read: Permission denied"})


def judged(of: HostFacts, *, forward: bool = False) -> list[Checked]:
    return judge(Seen(of, 1_000.0, 1_000.3), SIZE, 1500, forward=forward)


def not_well(of: HostFacts, state: str) -> Checked:
    """The one thing that is so."""
    (found,) = [each for each in judged(of) if each.state == state and each.check != "memory"]
    return found


def test_a_host_that_is_well_has_a_line_for_everything_and_nothing_to_do() -> None:
    found = judged(facts())
    assert well(found)
    assert list(dict.fromkeys(each.check for each in found)) == [
        *("kvm", "libvirt", "files", "qemu", "disk", "mtu", "limits", "modules", "clock", "memory")
    ]
    assert not any(each.step or each.should for each in found)


@pytest.mark.parametrize(
    ("of", "check", "text", "should", "step"),
    [
        (facts(kvm=False, kvm_why="/dev/kvm opens and runs no guest"), "kvm", "runs no guest", "runs a", "modprobe"),
        (libvirt(problem="no socket"), "libvirt", "qemu:///system: no socket", "", "systemctl status"),
        (libvirt(problem="No module named 'libvirt'", missing=True), "libvirt", "No module", "", "apt-get install"),
        (libvirt(stale=True), "libvirt", "libvirtd has not read its configuration", "", "systemctl restart libvirtd"),
        (libvirt(files=512), "files", "libvirtd may have 512 files", "at least 1024", "LimitNOFILE=1024"),
        (facts(qemu=None, qemu_why="there is no qemu-system-x86_64"), "qemu", "there is no", "", "apt-get install"),
        (room(free_mib=12), "disk", "12 MiB left in /var/lib", "at least 100 MiB", "make room"),
        (room(inodes_left=False), "disk", "no inodes left", "", "make room"),
        (facts(mtu=9000), "mtu", "9000 bytes on eth0", "1500, as on most", "ip link set eth0 mtu 1500"),
        (settings(**{NEIGHBOURS: 128}), "limits", "gc_thresh1 is 128", "at least 1024", "`ctl tune --apply`"),
        (settings(**{"libvirt.max_clients": 20}), "limits", "max_clients is 20", "at least 64", "ctl tune"),
        (facts(agent_files=256), "files", "agent may have 256", "at least 1024", "nofile for root"),
        (facts(modules={**facts().modules, "vxlan": "missing"}), "modules", "no vxlan", "", "full kernel"),
        (facts(arrived_ms=1_060_000, answered_ms=1_060_100), "clock", "60 s or more ahead", "within 2 s", "chrony"),
        (facts(arrived_ms=900_000, answered_ms=900_100), "clock", "100 s or more behind", "within 2 s", "chrony"),
    ],
)
def test_what_is_bad_is_said_with_what_should_be_and_the_next_step(
    of: HostFacts, check: str, text: str, should: str, step: str
) -> None:
    found = not_well(of, "bad")
    assert found.check == check
    assert text in found.text
    assert should in found.should
    assert step in found.step
    assert bool(found.step)
    assert not well(judged(of))


@pytest.mark.parametrize(
    ("of", "check", "text"),
    [
        (facts(kvm=None, kvm_why="this user may not open /dev/kvm"), "kvm", "may not open"),
        (facts(mtu=None, interface=""), "mtu", "no interface has the address"),
        (settings(**{NEIGHBOURS: None}), "limits", "Permission denied"),
        (facts(modules={**facts().modules, "tun": None}), "modules", "whether the kernel has tun"),
    ],
)
def test_what_is_not_known_is_called_unknown_and_is_not_well(of: HostFacts, check: str, text: str) -> None:
    found = not_well(of, "unknown")
    assert found.check == check
    assert text in found.text
    assert not well(judged(of))


@pytest.mark.parametrize(
    ("of", "check", "text"),
    [
        (
            settings(**{NEIGHBOURS: -1}),
            "limits",
            f"not this host's own, but of the machine that it is a part of: {NEIGHBOURS}",
        ),
        (libvirt(files=None), "files", "it does not run now"),
        (room(free_mib=3_000), "disk", "3000 MiB left"),
        (facts(modules={**facts().modules, "vhost_net": "missing"}), "modules", "no vhost_net"),
    ],
)
def test_what_is_neither_good_nor_bad_is_a_note(of: HostFacts, check: str, text: str) -> None:
    found = not_well(of, "note")
    assert found.check == check
    assert text in found.text
    assert well(judged(of))


def test_forwarding_is_asked_for_only_where_hosts_are_to_route() -> None:
    closed = settings(**{"net.ipv4.ip_forward": 0})
    assert well(judged(closed))
    assert "net.ipv4.ip_forward is 0" in [each.text for each in judged(closed, forward=True) if each.state == "bad"]


def test_a_clock_is_compared_as_well_as_the_answer_was_quick() -> None:
    (found,) = [
        each for each in judge(Seen(facts(), 995.0, 1_009.0), SIZE, 1500, forward=False) if each.check == "clock"
    ]
    assert (found.state, found.text) == ("ok", "within 9 s of the service node's")
    (found,) = [
        each for each in judge(Seen(facts(), 900.0, 1_100.0), SIZE, 1500, forward=False) if each.check == "clock"
    ]
    assert (found.state, found.text) == ("unknown", "the answer took too long to tell how far off it is")


def test_the_usual_mtu_is_what_most_have() -> None:
    assert usual_mtu([1500, 9000, 1500, None]) == 1500
    assert usual_mtu([9000, 1500]) == 9000
    assert usual_mtu([None]) is None


def test_vms_still_to_come_are_reckoned_with() -> None:
    hosts = [fake.host(rank) for rank in range(4)]
    vms = [fake.vm(f"vm{n}", "h1") for n in range(3)]
    assert size_of(fake.status(*hosts, vms=vms)) == Size(hosts=4, vms=3, vms_on_one=3)
    assert size_of(fake.status(*hosts, vms=vms), more_vms=10) == Size(hosts=4, vms=13, vms_on_one=6)


def test_hosts_that_agree_are_told_together_and_the_bad_first() -> None:
    bad = settings(**{NEIGHBOURS: 128})
    found = {name: judged(bad if name == "h1" else facts()) for name in ("h0", "h1", "h2")}
    checks = [(one.check, one.state, hosts) for one, hosts in folded(found) if one.check in ("kvm", "limits")]
    assert checks[:2] == [("kvm", "ok", ["h0", "h1", "h2"]), ("limits", "bad", ["h1"])]
    text = report(found)
    assert (
        f"BAD  limits   h1: {NEIGHBOURS} is 128\n              should be: at least 1024 (for 64 hosts and 960 VMs"
        in text
    )
    assert text.endswith("2 of 3 well, not so: h1\n")


def test_what_a_host_says_can_give_a_terminal_no_orders() -> None:
    found = {"h0": judged(facts(kvm=False, kvm_why="\x1b[2J\n"))}
    assert "\x1b" not in report(found)
    assert "\\x1b[2J\\n" in report(found)


def test_only_what_is_too_low_is_raised() -> None:
    low = settings(
        **{NEIGHBOURS: 128, "fs.inotify.max_user_instances": 1 << 15, "net.ipv6.neigh.default.gc_thresh1": -1}
    )
    assert to_raise(low, advice(SIZE, forward=True)) == {NEIGHBOURS: (128, 1024)}


# --- ctl --------------------------------------------------------------------------------------------------------------


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
        found.replies(api.GetNets, api.NetList(nets=()))
        found.replies(api.GetStatus, fake.status(*(fake.host(rank) for rank in range(3))))
        yield found


@pytest.fixture
def ctl(capsysbinary: pytest.CaptureFixture[bytes]) -> Ctl:
    def run(*arguments: str) -> Done:
        capsysbinary.readouterr()
        status = cli.run(arguments)
        out, err = capsysbinary.readouterr()
        return Done(status, out.decode(), err.decode())

    return run


def now() -> HostFacts:
    """A host that is well and whose clock is right."""
    return facts(arrived_ms=int(time.time() * 1000), answered_ms=int(time.time() * 1000))


def said(*folds: tuple[int, object]) -> list[api.Reply]:
    """A job's replies: what each host said, by rank; an outcome as it is."""
    told = []
    for rank, what in folds:
        if isinstance(what, Lost | Refused):
            told.append(fake.fold([rank], what))
        else:
            code = 1 if isinstance(what, TuneAnswer) and what.problem else 0
            data = what if isinstance(what, bytes) else msgspec.json.encode(what)
            told.append(fake.fold([rank], Exited(code), Output(out=data)))
    return [api.Accepted(id=7, hosts=fake.names(len(folds))), api.Folded(folds=tuple(told)), api.Settled()]


def low() -> HostFacts:
    """The same with too few inotify instances."""
    return msgspec.structs.replace(now(), settings={**ENOUGH, "fs.inotify.max_user_instances": 16})


def test_check_ends_with_0_where_all_is_well(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, now()), (2, now())))
    done = ctl("check")
    assert done.status == 0, done
    assert "OK   kvm      h[0-2] (3): /dev/kvm works\n" in done.out
    assert done.out.endswith("3 of 3 well\n")
    assert [asked.hosts for asked in service.asked(api.CheckOn)] == [None]


def test_check_ends_with_1_where_something_is_bad_and_with_3_where_a_host_is_lost(
    service: FakeService, ctl: Ctl
) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, low())))
    done = ctl("check", "h[0-1]")
    assert (done.status, done.out.splitlines()[-1]) == (1, "1 of 2 well, not so: h1")
    assert [asked.hosts for asked in service.asked(api.CheckOn)] == [("h0", "h1")]
    service.replies(api.CheckOn, *said((0, now()), (1, Lost("no word from it"))))
    done = ctl("check", "-w", "h0,h1")
    assert done.status == 3
    assert "h1: lost: no word from it" in done.err


def test_a_host_becomes_a_router_only_where_somebody_asks_for_it(service: FakeService, ctl: Ctl) -> None:
    closed = msgspec.structs.replace(now(), settings={**ENOUGH, "net.ipv4.ip_forward": 0})
    service.replies(api.CheckOn, *said((0, closed)))
    net = api.NetStatus(name="lab", subnet="10.77.0.0/16", isolated=True, bridge="cn-lab", vni=1, vms=0)
    service.replies(api.GetNets, api.NetList(nets=(net,)))
    assert (ctl("check").status, ctl("tune").status) == (0, 0)
    assert "ip_forward" not in ctl("check").out
    service.replies(api.GetNets, api.NetList(nets=(net, msgspec.structs.replace(net, isolated=False))))
    advised = ctl("check")
    assert advised.status == 0
    assert "net.ipv4.ip_forward is 0: VMs whose gateway this host is reach no further" in advised.out
    assert "`ctl tune --apply --forward` makes it a router" in advised.out
    # A gateway alone is no reason to, also with --apply.
    service.requests.clear()
    assert (ctl("tune").status, ctl("tune", "--apply").status) == (0, 0)
    assert service.asked(api.TuneOn) == []
    for asked in (["--forward"], ["--only", "net.ipv4.ip_forward"]):
        assert "~ net.ipv4.ip_forward 0 -> 1: h0\n" in ctl("tune", *asked).out
    assert "BAD  limits   h0: net.ipv4.ip_forward is 0\n" in ctl("check", "--forward").out


def test_check_tells_programs_the_same(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, low())))
    found = json.loads(ctl("check", "--json").out)
    (bad,) = [each for each in found if each["state"] == "bad"]
    assert (bad["check"], bad["hosts"], bad["should"]) == ("limits", ["h1"], "at least 128")


@pytest.mark.parametrize("answer", [b"{", b"[]", b'{"arrived_ms": 1}', b"\xff\xfe", b"[" * 100_000])
def test_an_answer_that_is_none_is_said_and_counts_as_failed(service: FakeService, ctl: Ctl, answer: bytes) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, answer)))
    done = ctl("check")
    assert done.status == 1
    assert "h1: its answer is none that an agent gives" in done.err
    assert "1 of 1 well" in done.out


def test_tune_says_what_it_would_change_and_changes_nothing(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, low()), (2, low())))
    done = ctl("tune")
    assert done.status == 2
    assert done.out.startswith("~ fs.inotify.max_user_instances 16 -> 128: h[1-2] (2)\n2 of 3 hosts to change")
    assert not service.asked(api.TuneOn)
    (first, low_one, _) = json.loads(ctl("tune", "--json").out)
    assert first == {"host": "h0", "changes": []}
    change = {"key": "fs.inotify.max_user_instances", "before": 16, "after": 128}
    assert low_one == {"host": "h1", "changes": [change]}
    service.replies(api.CheckOn, *said((0, now())))
    done = ctl("tune", "--apply")
    assert (done.status, done.out) == (0, "nothing to do on 1 hosts\n")
    assert not service.asked(api.TuneOn)


def test_tune_apply_asks_only_those_hosts_that_have_something_to_change(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CheckOn, *said((0, now()), (1, low())))
    answer = TuneAnswer(tuned=(Tuned(key="fs.inotify.max_user_instances", before=16, after=128),))
    service.replies(api.TuneOn, api.Accepted(id=8, hosts={1: "h1"}), *said((1, answer))[1:])
    done = ctl("tune", "--apply")
    assert (done.status, done.out) == (0, "fs.inotify.max_user_instances 16 -> 128: h1\n")
    (asked,) = service.asked(api.TuneOn)
    assert (asked.hosts, asked.settings) == (("h1",), {"fs.inotify.max_user_instances": 128})
    assert not asked.restart_libvirt
    (done_one,) = json.loads(ctl("tune", "--apply", "--json").out)
    change = {"key": "fs.inotify.max_user_instances", "before": 16, "after": 128, "note": ""}
    assert done_one == {"host": "h1", "changes": [change], "restart": "", "problem": ""}


def test_a_host_that_could_not_is_told_with_the_reason(service: FakeService, ctl: Ctl) -> None:
    service.replies(api.CheckOn, *said((0, low())))
    service.replies(api.TuneOn, *said((0, TuneAnswer(problem="nothing is changed: Read-only file system"))))
    done = ctl("tune", "--apply")
    assert done.status == 1
    assert "h0: nothing is changed: Read-only file system" in done.err


def test_undo_needs_no_look_and_names_what_stays(service: FakeService, ctl: Ctl) -> None:
    key = "fs.inotify.max_user_instances"
    stays = Tuned(key=key, before=999, after=999, note="somebody else has changed it since, and it stays")
    answers = (
        TuneAnswer(tuned=(Tuned(key=key, before=512, after=128),), restart="libvirtd"),
        TuneAnswer(tuned=(stays,)),
    )
    service.replies(api.TuneOn, *said(*enumerate(answers)))
    done = ctl("tune", "--undo")
    assert done.status == 0
    assert done.out.splitlines()[:2] == [f"{key} 512 -> 128: h0", f"{key} stays 999: h1 ({stays.note})"]
    assert done.out.splitlines()[2].startswith("libvirtd has yet to begin anew to take its settings: h0; next: ")
    assert not service.asked(api.CheckOn)
    assert [asked.undo for asked in service.asked(api.TuneOn)] == [True]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--apply", "--undo"), "exclude each other"),
        (("--restart-libvirt",), "goes with --apply or --undo"),
        (("--undo", "--only", "net.ipv4.ip_forward"), "leave --only out"),
        (
            ("--only", "kernel.core_pattern", "--only", "x\x1b"),
            r"no setting that can be tuned: kernel.core_pattern, x\x1b",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anybody_is_asked(
    service: FakeService, ctl: Ctl, arguments: tuple[str, ...], why: str
) -> None:
    done = ctl("tune", *arguments)
    assert done.status == 2
    assert why in done.err
    assert not service.requests
