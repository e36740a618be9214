"""`ctl spawn` and `ctl destroy`: everything is checked before anything happens, and what happens is told by host."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controller import api, cli
from controller.session import Session
from controller.spawn_images import image_digest, image_format
from controller.spawn_plan import deployment_name
from controller.status import CtlError, ExitStatus
from protocol.digest import content_digest
from protocol.limits import CHUNK
from protocol.outcomes import Lost, Output, Refused
from protocol.vms import ImageResult, ImageState, VmChange, VmPower, VmResult, VmSpec, VmState
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService

INFRA = """\
#list of nodes
h0 4 20 8
h1 4 20 8
#list of VMs
vm0 1 1 1
vm1 1 1 1
vm2 1 1 1
vm3 1 1 1
#initial configuration
h0 vm0 (vm2)
h1 vm1 vm3
#end of configuration
"""

Ctl = Callable[..., SimpleNamespace]


#: What a spawn asks for before it does anything.
ASKED_BEFORE = {api.GetStatus, api.GetDeployment, api.GetImages, api.GetNets}


class Hosts:
    """A service with two hosts that make VMs, as far as `changes` and `refusing` let them."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.vms: dict[str, api.VmStatus] = {}
        self.changes: dict[str, VmResult] = {}
        #: What becomes of pushes at these hosts.
        self.refusing: dict[str, str] = {}
        self.silent: set[str] = set()
        self.hosts = [fake.host(0), fake.host(1)]
        service.on(api.GetStatus, self._status)
        service.on(api.GetDeployment, self._deployment)
        #: Digests that hosts have, and images on record.
        self.stored: dict[str, set[str]] = {"h0": set(), "h1": set()}
        self.images: list[api.KnownImage] = []
        self.specs: dict[str, VmSpec] = {}
        service.on(api.GetImages, lambda _, client: client.send(api.ImageList(images=tuple(self.images))))
        service.replies(api.GetNets, api.NetList(nets=()))
        service.on(api.ImagesOn, self._list_images)
        service.replies(api.Reserve, api.Done())
        service.on(api.PushTo, self._push)
        service.on(api.CreateOn, self._create)
        service.on(api.SendNames, lambda _, client: self._settle(client, {0: "h0", 1: "h1"}))
        service.on(api.ProbeOn, self._probe)
        service.on(api.DestroyOn, self._destroy)

    def _status(self, _: api.GetStatus, client: Client) -> None:
        client.send(fake.status(*self.hosts, vms=self.vms.values()))

    def _deployment(self, asked: api.GetDeployment, client: Client) -> None:
        mine = [vm for vm in self.vms.values() if vm.deployment == asked.name]
        client.send(
            api.Deployment(
                name=asked.name,
                hosts={vm.name: vm.host for vm in mine},
                addresses={vm.name: vm.ip for vm in mine},
                taken=tuple(vm.ip for vm in self.vms.values() if vm.deployment != asked.name),
                specs=tuple(spec for spec in self.specs.values() if spec.deployment == asked.name),
            )
        )

    def _list_images(self, asked: api.ImagesOn, client: Client) -> None:
        client.send(api.Accepted(id=6, hosts={int(name[1:]): name for name in asked.hosts or ()}))
        for name in asked.hosts or ():
            have = [digest for digest in asked.digests or () if digest in self.stored[name]]
            results = [ImageResult(digest=digest, state=ImageState.PRESENT, size=6) for digest in have]
            client.send(api.ImagesDone(host=name, results=tuple(results)))
        client.send(api.Settled())

    def _settle(self, client: Client, hosts: dict[int, str]) -> None:
        client.send(api.Accepted(id=7, hosts=hosts), api.Folded(folds=(fake.fold(hosts),)), api.Settled())

    def _push(self, asked: api.PushTo, client: Client) -> None:
        hosts = {int(name[1:]): name for name in asked.hosts or ()}
        client.send(api.Accepted(id=7, hosts=hosts))
        for rank, name in hosts.items():
            why = self.refusing.get(name)
            outcome = None if why is None else Refused(why)
            client.send(api.Folded(folds=(fake.fold([rank], outcome, Output(b"pushed")),)))
        client.send(api.Settled())

    def _create(self, asked: api.CreateOn, client: Client) -> None:
        client.send(api.Accepted(id=8, hosts={int(name[1:]): name for name in asked.slices}))
        for name, specs in asked.slices.items():
            results = []
            for spec in specs:
                there = spec.name in self.vms
                self.specs[spec.name] = spec
                results.append(
                    self.changes.get(spec.name)
                    or VmResult(name=spec.name, change=VmChange.UNCHANGED if there else VmChange.CREATED)
                )
                power = VmPower.RUNNING if spec.start else VmPower.SHUTOFF
                self.vms[spec.name] = fake.vm(
                    spec.name,
                    name,
                    ip=spec.ip,
                    deployment=asked.deployment,
                    state=VmState(name=spec.name, deployment=asked.deployment, power=power),
                )
            client.send(api.VmsDone(host=name, results=tuple(results)))
        client.send(api.Settled())

    def _probe(self, asked: api.ProbeOn, client: Client) -> None:
        client.send(api.Accepted(id=9, hosts={0: "h0", 1: "h1"}))
        for name in ("h0", "h1"):
            there = tuple(vm for vm in asked.names if self.vms[vm].host == name and vm not in self.silent)
            client.send(api.VmsReached(host=name, names=there))
        client.send(api.Settled())

    def _destroy(self, asked: api.DestroyOn, client: Client) -> None:
        names = [vm.name for vm in self.vms.values() if asked.names is None or vm.name in asked.names]
        hosts = {int(self.vms[name].host[1:]): self.vms[name].host for name in names}
        client.send(api.Accepted(id=10, hosts=hosts))
        for host in hosts.values():
            results = []
            for name in [name for name in names if self.vms[name].host == host]:
                results.append(self.changes.get(name) or VmResult(name=name, change=VmChange.REMOVED))
                if results[-1].change is VmChange.REMOVED:
                    del self.vms[name]
            client.send(api.VmsDone(host=host, results=tuple(results)))
            names = [name for name in names if name in self.vms]
        client.send(api.Settled())


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.delenv("CANOPY_FLEET", raising=False)
    with fake.fake_service() as service:
        monkeypatch.setenv("CANOPY_HOME", str(service.home))
        yield Hosts(service)


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        status = cli.run(arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture
def infra(tmp_path: Path) -> Path:
    path = tmp_path / "infra.conf"
    path.write_text(INFRA)
    return path


@pytest.fixture
def spawn(infra: Path, tmp_path: Path) -> list[str]:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"k" * 3000)
    initrd.write_bytes(b"i" * 3000)
    return ["spawn", str(infra), "--kernel", str(kernel), "--initrd", str(initrd), "--subnet", "198.18.4.0/24"]


def test_vms_are_made_by_their_hosts_and_the_rerun_changes_nothing(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    first = ctl(*spawn, "--cmdline", "console=ttyS0", "--bridge", "br0")
    assert first.status == 0, first.err
    assert first.out.splitlines() == [
        "h[0-1] (2): +2 created",
        "infra: 4 VMs on 2 hosts: 4 created",
        "names and addresses, on every host: /var/lib/canopy/default-0/vms.hosts",
    ]
    (created,) = hosts.service.asked(api.CreateOn)
    assert {host: [spec.name for spec in specs] for host, specs in created.slices.items()} == {
        "h0": ["vm0", "vm2"],
        "h1": ["vm1", "vm3"],
    }
    vm0, vm2 = created.slices["h0"]
    assert (vm0.start, vm2.start, vm0.network.bridge) == (True, False, "br0")
    assert vm0.boot is not None
    assert vm0.boot.cmdline.endswith(" console=ttyS0")
    images = [(Path(asked.sources[0]).name, asked.image, asked.hosts) for asked in hosts.service.asked(api.PushTo)]
    assert images == [("vmlinuz", True, ("h0", "h1")), ("initrd", True, ("h0", "h1"))]
    assert len(hosts.service.asked(api.SendNames)) == 1

    second = ctl(*spawn, "--cmdline", "console=ttyS0", "--bridge", "br0")
    assert second.status == 0
    assert "infra: 4 VMs on 2 hosts: 4 unchanged, nothing had to be done" in second.out
    assert hosts.service.asked(api.CreateOn)[1] == created


def test_hosts_are_told_how_many_to_make_at_a_time(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    assert ctl(*spawn).status == 0
    assert ctl(*spawn, "--in-flight", "16").status == 0
    assert [asked.in_flight for asked in hosts.service.asked(api.CreateOn)] == [None, 16]
    for wrong in ("0", "257", "many"):
        assert ctl(*spawn, "--in-flight", wrong).status == ExitStatus.USAGE
    assert len(hosts.service.asked(api.CreateOn)) == 2


def test_images_are_named_as_hosts_will_name_them(tmp_path: Path, hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    kernel = tmp_path / "vmlinuz"
    ctl(*spawn)
    boot = hosts.service.asked(api.CreateOn)[0].slices["h0"][0].boot
    assert boot is not None
    assert boot.kernel == content_digest(content_digest(kernel.read_bytes())).hex()
    large = tmp_path / "large"
    large.write_bytes(b"x" * (CHUNK + 1))
    digests = content_digest(b"x" * CHUNK) + content_digest(b"x")
    assert image_digest(large) == content_digest(digests).hex()


def test_a_dry_run_shows_the_plan_and_asks_for_nothing(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    done = ctl(*spawn, "--dry-run")
    assert done.status == 0
    assert "  vm0  198.18.4.1       00:16:3E:12:04:01  1 vCPU, 1024 MiB" in done.out
    plan = json.loads(ctl(*spawn, "--dry-run", "--json").out)
    assert [(host["name"], [vm["name"] for vm in host["vms"]]) for host in plan["hosts"]] == [
        ("h0", ["vm0", "vm2"]),
        ("h1", ["vm1", "vm3"]),
    ]
    assert {type(asked) for asked in hosts.service.requests} == ASKED_BEFORE


def test_a_plan_can_be_shown_without_a_service(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    done = ctl("--fleet", "none", *spawn, "--dry-run")
    assert done.status == 0
    assert "no service runs" in done.err
    assert ctl("--fleet", "none", *spawn).status == ExitStatus.NO_SERVICE
    assert not hosts.service.requests


def test_addresses_are_kept_and_those_of_others_are_not_given(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    hosts.vms["other"] = fake.vm("other", "h1", deployment="another", ip="198.18.4.1")
    hosts.vms["vm3"] = fake.vm("vm3", "h1", ip="198.18.4.9")
    hosts.hosts = [fake.host(0, address="198.18.4.2"), fake.host(1, address="fe80::1")]
    ctl(*spawn, "--gateway", "198.18.4.3")
    specs = [spec for specs in hosts.service.asked(api.CreateOn)[0].slices.values() for spec in specs]
    assert {spec.name: spec.ip for spec in specs} == {
        "vm0": "198.18.4.4",
        "vm1": "198.18.4.5",
        "vm2": "198.18.4.6",
        "vm3": "198.18.4.9",
    }


def test_what_is_not_right_is_told_by_host(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    hosts.changes = {
        "vm1": VmResult(name="vm1", change=VmChange.FAILED, detail="no memory"),
        "vm2": VmResult(name="vm2", change=VmChange.DIFFERS, detail="it has 2 vCPUs"),
    }
    hosts.vms["gone"] = fake.vm("gone", "h0", ip="198.18.4.77")
    done = ctl(*spawn)
    assert done.status == ExitStatus.FAILED
    assert done.out.splitlines()[:2] == ["h0: +1 created ~1 differs", "h1: +1 created !1 failed"]
    assert done.err.splitlines()[-3:] == [
        "h0: vm2 differs: it has 2 vCPUs",
        "h1: vm1 failed: no memory",
        "on record and not in the file: gone; `ctl destroy` removes them",
    ]


def test_a_host_without_the_image_is_told_and_the_others_go_on(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    hosts.refusing = {"h1": "its disk is full"}
    done = ctl(*spawn, "--json")
    assert done.status == ExitStatus.FAILED
    found = json.loads(done.out)
    assert found["hosts_failed"] == {"h1": "push vmlinuz: refused: its disk is full"}
    assert [(vm["name"], vm["change"], vm["ip"]) for vm in found["vms"]] == [
        ("vm0", "created", "198.18.4.1"),
        ("vm2", "created", "198.18.4.3"),
    ]
    assert [asked.hosts for asked in hosts.service.asked(api.PushTo)] == [("h0", "h1"), ("h0",)]
    assert list(hosts.service.asked(api.CreateOn)[0].slices) == ["h0"]


def test_a_lost_host_is_exit_code_3(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    def create(asked: api.CreateOn, client: Client) -> None:
        results = tuple(VmResult(name=spec.name, change=VmChange.UNCHANGED) for spec in asked.slices["h0"])
        client.send(
            api.Accepted(id=8, hosts={0: "h0", 1: "h1"}),
            api.VmsDone(host="h0", results=results),
            api.Folded(folds=(fake.fold([1], Lost("no word for 7 s")),)),
            api.Settled(),
        )

    hosts.service.on(api.CreateOn, create)
    hosts.vms["vm0"] = fake.vm("vm0", "h0", state=VmState(name="vm0", deployment="infra", power=VmPower.RUNNING))
    done = ctl(*spawn)
    assert done.status == ExitStatus.UNREACHABLE
    assert "h1: create VMs: lost: no word for 7 s" in done.err


def test_reachable_waits_for_those_that_run_and_names_the_silent(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    assert ctl(*spawn, "--wait", "reachable").status == 0
    assert hosts.service.asked(api.ProbeOn)[0].names == ("vm0", "vm1", "vm3")
    hosts.silent = {"vm1", "vm3"}
    done = ctl(*spawn, "--wait", "reachable", "--timeout", "1")
    assert done.status == ExitStatus.UNREACHABLE
    assert "no answer to ping: vm[1,3]" in done.err
    assert hosts.service.asked(api.ProbeOn)[1].timeout_ms == 1000


def test_started_waits_until_hosts_say_so(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    states = iter([VmPower.SHUTOFF, VmPower.RUNNING])

    def status(_: api.GetStatus, client: Client) -> None:
        vms = list(hosts.vms.values())
        if vms:
            power = next(states, VmPower.RUNNING)
            vms[0] = fake.vm(vms[0].name, vms[0].host, state=VmState(name=vms[0].name, deployment="infra", power=power))
        client.send(fake.status(*hosts.hosts, vms=vms))

    hosts.service.on(api.GetStatus, status)
    done = ctl(*spawn)
    assert (done.status, done.err) == (0, "memory in GiB (guessed from the largest node; --memory-unit sets it)\n")
    assert next(states, None) is None


def test_a_vm_that_does_not_run_in_time_is_named(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    hosts.service.on(api.GetStatus, lambda _, client: client.send(fake.status(*hosts.hosts)))
    done = ctl(*spawn, "--timeout", "1")
    assert done.status == ExitStatus.FAILED
    assert "not running: vm[0-1,3] (see `ctl health`)" in done.err
    assert ctl(*spawn, "--timeout", "1", "--wait", "defined").status == 0


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"infra": "#list of nodes\nh0 4 20\nh1 x 20 8\n"}, ExitStatus.USAGE, "has 2 errors, and nothing was changed"),
        ({"infra": INFRA.replace("h0 4 20 8", "h0 4 20 0")}, ExitStatus.USAGE, "--overcommit"),
        ({"hosts": [fake.host(0)]}, ExitStatus.NO_TARGET, "not in the fleet: h1; start them with `ctl up -w h1`"),
        (
            {"hosts": [fake.host(0), fake.host(1, up=False)]},
            ExitStatus.UNREACHABLE,
            "down: h1 (no word from it for 7 s)",
        ),
        ({"vms": [fake.vm("vm0", "h1")]}, ExitStatus.USAGE, "vm0 is on h1 and the file has it on h0"),
        ({"arguments": ["--subnet", "198.18.4.0/30"]}, ExitStatus.USAGE, "4 VMs need an address and 2 are free"),
        ({"arguments": ["--subnet", "x"]}, ExitStatus.USAGE, "not an IPv4 network"),
        ({"arguments": ["--g5k-subnets", "/nowhere"]}, ExitStatus.USAGE, "either --subnet"),
        ({"arguments": ["--kernel", "/nowhere"]}, ExitStatus.USAGE, "/nowhere: No such file"),
        ({"arguments": ["--deployment", "a b"]}, ExitStatus.USAGE, "no deployment name"),
        ({"arguments": ["--bridge", "a bridge"]}, ExitStatus.USAGE, "no name of a network interface"),
        ({"arguments": ["--cmdline", "x" * 3000]}, ExitStatus.USAGE, "shorten --cmdline"),
        ({"arguments": ["--cmdline", "größe"]}, ExitStatus.USAGE, "printable ASCII"),
    ],
)
def test_a_spawn_that_can_not_be_is_refused_before_anything_happens(
    *, hosts: Hosts, ctl: Ctl, infra: Path, spawn: list[str], change: dict[str, Any], status: int, why: str
) -> None:
    infra.write_text(change.get("infra", INFRA))
    hosts.hosts = change.get("hosts", hosts.hosts)
    hosts.vms = {vm.name: vm for vm in change.get("vms", [])}
    for dry in ([], ["--dry-run"]):
        done = ctl(*spawn, *change.get("arguments", []), *dry)
        assert (done.status, done.out) == (status, "")
        assert why in done.err
    assert {type(asked) for asked in hosts.service.requests} <= ASKED_BEFORE


def test_something_to_boot_has_to_be_given(hosts: Hosts, ctl: Ctl, infra: Path) -> None:
    done = ctl("spawn", str(infra), "--subnet", "198.18.4.0/24")
    assert (done.status, done.err) == (2, "ctl: give --kernel or --image: without either VMs have nothing to boot\n")
    done = ctl("spawn", str(infra), "--subnet", "198.18.4.0/24", "--image", str(infra), "--cmdline", "quiet")
    assert "go with --kernel" in done.err
    assert not hosts.service.asked(api.PushTo)


def test_an_image_is_a_base_for_overlays_in_its_own_format(hosts: Hosts, ctl: Ctl, infra: Path, tmp_path: Path) -> None:
    qcow2, raw = tmp_path / "a.img", tmp_path / "b.img"
    qcow2.write_bytes(b"QFI\xfb" + bytes(100))
    raw.write_bytes(bytes(1000))
    assert (image_format(qcow2), image_format(raw)) == ("qcow2", "raw")
    assert ctl("spawn", str(infra), "--subnet", "198.18.4.0/24", "--image", str(qcow2)).status == 0
    disk = hosts.service.asked(api.CreateOn)[0].slices["h0"][0].disk
    assert disk is not None
    assert (disk.image, disk.image_format) == (image_digest(qcow2), "qcow2")


def test_grid5000_addresses_come_from_its_file(hosts: Hosts, ctl: Ctl, spawn: list[str], tmp_path: Path) -> None:
    lines = tmp_path / "subnets"
    lines.write_text("".join(f"10.158.4.{n}\t00:16:3E:9E:04:{n:02X}\n" for n in range(1, 9)))
    done = ctl(*spawn[:-2], "--g5k-subnets", str(lines), "--skip-ips", "2")
    assert done.status == 0
    assert hosts.vms["vm0"].ip == "10.158.4.3"


def test_a_deployment_is_named_after_its_file() -> None:
    assert deployment_name(Path("/tmp/infra.conf")) == "infra"
    assert deployment_name(Path("a.b.conf")) == "a.b"
    assert deployment_name(Path("x y.conf"), "xy") == "xy"
    with pytest.raises(CtlError, match="--deployment"):
        deployment_name(Path("x y.conf"))


# --- destroy --------------------------------------------------------------------------------------------------------


def test_destroy_removes_a_files_vms_and_finds_nothing_the_second_time(
    hosts: Hosts, ctl: Ctl, infra: Path, spawn: list[str]
) -> None:
    ctl(*spawn)
    hosts.vms["other"] = fake.vm("other", "h1", deployment="another")
    done = ctl("destroy", str(infra))
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == ["h[0-1] (2): -2 removed", "infra: 4 VMs on 2 hosts: 4 removed"]
    assert set(hosts.vms) == {"other"}
    assert len(hosts.service.asked(api.SendNames)) == 2
    again = ctl("destroy", str(infra))
    assert (again.status, again.out) == (0, "nothing to remove: none of these VMs is on record\n")
    assert len(hosts.service.asked(api.DestroyOn)) == 1


def test_destroy_takes_names_and_whole_deployments(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    ctl(*spawn)
    assert ctl("destroy", "vm0", "vm1").status == 0
    assert hosts.service.asked(api.DestroyOn)[0].names == ("vm0", "vm1")
    found = json.loads(ctl("destroy", "--deployment", "infra", "--all", "--json").out)
    assert [(vm["name"], vm["change"]) for vm in found["vms"]] == [("vm2", "removed"), ("vm3", "removed")]
    assert hosts.vms == {}


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        ([], ExitStatus.USAGE, "which VMs?"),
        (["vm9"], ExitStatus.NO_TARGET, "not on record: vm9"),
        (["vm0", "vm9"], ExitStatus.NO_TARGET, "not on record: vm9"),
        (["--all"], ExitStatus.USAGE, "--all goes with --deployment"),
        (["--all", "--deployment", "infra", "vm0"], ExitStatus.USAGE, "--all goes with --deployment"),
        (["--all", "--deployment", "none"], ExitStatus.NO_TARGET, "no VM of none"),
        (["both"], ExitStatus.USAGE, "several deployments have both"),
    ],
)
def test_a_destroy_that_is_not_clear_removes_nothing(
    hosts: Hosts, ctl: Ctl, arguments: list[str], status: int, why: str
) -> None:
    hosts.vms = {
        "vm0": fake.vm("vm0", "h0"),
        "one": fake.vm("both", "h0"),
        "two": fake.vm("both", "h1", deployment="another"),
    }
    done = ctl("destroy", *arguments)
    assert (done.status, done.out) == (status, "")
    assert why in done.err
    assert not hosts.service.asked(api.DestroyOn)


def test_a_vm_that_could_not_be_removed_is_named(hosts: Hosts, ctl: Ctl, spawn: list[str]) -> None:
    ctl(*spawn)
    hosts.changes = {"vm1": VmResult(name="vm1", change=VmChange.FAILED, detail="its QEMU hangs")}
    done = ctl("destroy", "--deployment", "infra", "--all")
    assert done.status == ExitStatus.FAILED
    assert done.err == "h1: vm1 failed: its QEMU hangs\n"
    assert set(hosts.vms) == {"vm1"}


def test_the_functions_serve_programs_too(hosts: Hosts, infra: Path, tmp_path: Path) -> None:
    from controller.spawn import Wait, destroy, spawn
    from controller.spawn_plan import SpawnOptions, load, prepare

    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"k")
    with Session() as session:
        prepared = prepare(
            load(infra)[0],
            SpawnOptions(deployment="mine", kernel=kernel, subnet="198.18.4.0/24"),
            status=session.status(),
            known=session.deployment("mine"),
        )
        report = spawn(session, prepared, wait=Wait.REACHABLE, timeout=5)
        assert (report.unreachable, report.troubles, list(report.answers)) == ((), {}, ["h0", "h1"])
        assert destroy(session, {"mine": ["vm0"]}).answers["h0"][0].change is VmChange.REMOVED
    assert set(hosts.vms) == {"vm1", "vm2", "vm3"}
