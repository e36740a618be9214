"""`ctl vm`, `ctl plan` and the getters on agents with libvirt's test driver."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import cli
from controller.infra import parse_infra
from controller.status import ExitStatus
from tests.net.localfleet import DEADLINE_S, FLEET, LocalFleet
from tests.net.vmfleet import infra_text, vm_fleet
from tests.waiting import wait_until

pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")


FOREIGN = """<domain type='test'><name>legacy</name><uuid>11111111-2222-4333-8444-555555555555</uuid>
<memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type>hvm</type></os></domain>"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with vm_fleet(tmp_path_factory.mktemp("life"), ["h0", "h1", "h2"], domains=FOREIGN) as made:
        yield made


class Ctl:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str, status: int = ExitStatus.OK) -> str:
        self._capfd.readouterr()
        found = cli.run(["--fleet", FLEET, *arguments])
        out, err = self._capfd.readouterr()
        assert found == status, (found, out, err)
        return out if status == ExitStatus.OK else out + err


@pytest.fixture
def ctl(capfd: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(capfd)


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    return str(path)


def powers(fleet: LocalFleet) -> dict[str, str]:
    return {vm.name: vm.state.power.value if vm.state else "?" for vm in fleet.session.status().vms}


def wait_for(fleet: LocalFleet, wanted: dict[str, str]) -> None:
    wait_until(lambda: wanted.items() <= powers(fleet).items(), DEADLINE_S, f"VMs to be {wanted}")


def test_one_vm_is_made_and_led_through_its_life(fleet: LocalFleet, ctl: Ctl, kernel: str) -> None:
    make = ["vm", "create", "web0", "--host", "h1", "--ip", "10.0.0.5/16", "--mem", "64M", "--vcpus", "2"]
    make += ["--kernel", kernel, "--id", "12345678-1234-4234-8234-123456789abc"]
    assert "+1 created" in ctl(*make)
    assert "=1 unchanged" in ctl(*make)
    (vm,) = json.loads(ctl("get", "vms", "-o", "json"))
    assert (vm["name"], vm["host"], vm["ip"], vm["vcpus"], vm["memory_mib"]) == ("web0", "h1", "10.0.0.5", 2, 64)
    for command, power in (("suspend", "paused"), ("resume", "running")):
        ctl("vm", command, "web*")
        wait_for(fleet, {"web0": power})
    assert "stopped" in ctl("vm", "stop", "web0", "--hard")
    wait_for(fleet, {"web0": "shut off"})
    assert "started" in ctl("vm", "start", "-w", "h1")
    wait_for(fleet, {"web0": "running"})
    assert "=1 unchanged" in ctl("vm", "start", "web0")
    assert "10.0.0.5 for web1 is web0's" in ctl(*make[:2], "web1", *make[3:], status=ExitStatus.FAILED)
    assert "not on record: web1" in ctl("vm", "stop", "web1", status=ExitStatus.NO_TARGET)
    assert "-1 removed" in ctl("vm", "destroy", "web0")


def test_domains_of_others_are_shown_with_all_alone_and_no_command_takes_them(
    fleet: LocalFleet, ctl: Ctl, kernel: str
) -> None:
    ctl("vm", "create", "web0", "--host", "h1", "--ip", "10.0.0.5/16", "--mem", "64M", "--kernel", kernel)
    assert "legacy" not in ctl("get", "vms")
    assert "legacy" not in ctl("get", "vms", "-o", "json", "-w", "h0")
    shown = ctl("get", "vms", "--all")
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["web0", "vms", "h1"],
        *(["legacy", "(not", "Canopy's)"] for _ in fleet.names),
    ]
    assert shown.splitlines()[-1].endswith("running")
    told = json.loads(ctl("get", "vms", "--all", "-w", "h1", "-o", "json"))
    assert [(vm["name"], vm["host"], vm["power"], vm.get("whose")) for vm in told] == [
        ("web0", "h1", "running", None),
        ("legacy", "h1", "running", "not Canopy's"),
    ]
    assert ctl("get", "vms", "--all", "-w", "h1", "-o", "name").split() == ["web0", "legacy"]
    assert "goes with `ctl get vms`" in ctl("get", "hosts", "--all", status=ExitStatus.USAGE)
    for command in ("start", "stop", "reboot", "suspend", "resume", "snapshot", "destroy"):
        more = ["--name", "s"] if command == "snapshot" else []
        assert "not on record" in ctl("vm", command, "legacy", *more, status=ExitStatus.NO_TARGET)
    assert "not on record" in ctl("console", "legacy", "--quiet", status=ExitStatus.NO_TARGET)
    make = ["vm", "create", "legacy", "--host", "h2", "--ip", "10.0.0.6/16", "--mem", "64M", "--kernel", kernel]
    assert "not made by Canopy" in ctl(*make, status=ExitStatus.FAILED)
    assert "not made by Canopy" in ctl("vm", "suspend", "legacy", status=ExitStatus.FAILED)
    assert "not made by Canopy" in ctl("vm", "destroy", "legacy", status=ExitStatus.FAILED)
    assert fleet.session.deployment("vms").addresses == {"web0": "10.0.0.5"}, "what was never made has no address"
    ctl("vm", "destroy", "web0")
    assert [line.split()[-1] for line in ctl("get", "vms", "--all").splitlines()[1:4]] == ["running"] * 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (["--ip", "10.0.0.5"], "the network's prefix is missing"),
        (["--ip", "x/8"], "give an IPv4 address"),
        (["--host", "h9"], "h9 is not in the fleet"),
        (["--mem", "much"], "--mem much: give a size"),
        (["--id", "x"], "can't be made so"),
    ],
)
def test_a_vm_that_can_t_be_is_refused_before_anything_happens(
    fleet: LocalFleet, ctl: Ctl, kernel: str, change: list[str], why: str
) -> None:
    make = ["vm", "create", "web0", "--host", "h1", "--ip", "10.0.0.5/16", "--mem", "64M", "--kernel", kernel]
    status = ExitStatus.NO_TARGET if "h9" in change else ExitStatus.USAGE
    assert why in ctl(*make, *change, status=status)
    assert fleet.session.status().vms == ()


def test_vms_of_a_host_that_is_gone_are_given_up_and_removed_when_it_is_back(
    fleet: LocalFleet, ctl: Ctl, kernel: str
) -> None:
    make = ["vm", "create", "--ip", "10.0.0.7/16", "--mem", "64M", "--kernel", kernel]
    ctl(*make, "db0", "--host", "h2")
    assert "up, and can be asked: h2" in ctl("vm", "destroy", "db0", "--forget", status=ExitStatus.USAGE)
    fleet.kill("h2")
    fleet.wait_until_down("h2")
    assert fleet.session.deployment("vms").addresses == {"db0": "10.0.0.7"}
    ctl("vm", "destroy", "db0", "--forget")
    ctl(*make, "db0", "--host", "h0")  # the very name and address, elsewhere
    files = fleet.directory("h2").path / "vms"
    assert [path.name for path in files.iterdir()] == ["db0"]
    fleet.restart("h2")
    wait_until(lambda: not list(files.iterdir()), DEADLINE_S, "h2 to remove what was given up")
    assert fleet.session.deployment("vms").hosts == {"db0": "h0"}
    ctl("vm", "destroy", "db0")


def test_a_plan_tells_by_its_exit_code_whether_there_is_something_to_do(
    fleet: LocalFleet, ctl: Ctl, kernel: str, tmp_path: Path
) -> None:
    file = tmp_path / "lab.conf"
    file.write_text(infra_text(fleet.names, 6))
    options = [str(file), "--kernel", kernel, "--subnet", "198.18.0.0/24"]
    assert ctl("plan", *options, status=2).splitlines()[-1] == "lab: +6, 0 as planned"
    assert fleet.session.status().vms == ()
    ctl("spawn", *options)
    assert ctl("plan", *options) == "lab: 6 VMs as planned, nothing to do\n"
    file.write_text(infra_text(fleet.names, 5).replace("vm00000 1 10 64", "vm00000 2 10 64"))
    told = json.loads(ctl("plan", *options, "--json", status=2))
    assert told["total"] == {"+": 0, "~": 1, "-": 1, "=": 4}
    assert told["hosts"]["h0"] == [{"name": "vm00000", "change": "~", "detail": "vcpus 1 -> 2"}]
    ctl("spawn", *options, "--prune", status=ExitStatus.FAILED)  # what differs is told and left
    assert set(fleet.session.deployment("lab").hosts) == {f"vm{n:05}" for n in range(5)}
    ctl("destroy", "--deployment", "lab", "--all")


def test_waves_end_where_too_many_fail(fleet: LocalFleet, ctl: Ctl, kernel: str, tmp_path: Path) -> None:
    file = tmp_path / "lab.conf"
    file.write_text(infra_text(fleet.names, 9))
    options = ["spawn", str(file), "--kernel", kernel, "--subnet", "198.18.0.0/24"]
    assert json.loads(ctl(*options, "--wave", "4", "--max-fail", "0", "--json"))["not_begun"] == []
    ctl("destroy", "--deployment", "lab", "--all")
    # A VM that is another deployment's is in the way on h0.
    other = tmp_path / "other.conf"
    other.write_text(infra_text(["h0"], 1))
    ctl("spawn", str(other), "--kernel", kernel, "--subnet", "198.18.9.0/24")
    told = ctl(*options, "--wave", "3", "--max-fail", "0", status=ExitStatus.FAILED)
    assert "belongs to the deployment other" in told
    assert "not begun, since too many failed before: vm[00003-00008]" in told
    ctl("destroy", "--deployment", "other", "--all")
    assert "created" in ctl(*options, "--wave", "3", "--max-fail", "0")
    ctl("destroy", "--deployment", "lab", "--all")


def test_the_running_state_reads_back_equal_as_a_file(fleet: LocalFleet, ctl: Ctl, kernel: str, tmp_path: Path) -> None:
    file = tmp_path / "lab.conf"
    text = infra_text(fleet.names, 6).replace("vm00001 1 10 64", "vm00001 2 150 128 300")
    file.write_text(text.replace("h2 vm00002 vm00005", "h2 vm00002 (vm00005)"))
    options = ["--kernel", kernel, "--subnet", "198.18.0.0/24", "--deployment", "lab"]
    ctl("spawn", str(file), *options, "--in-flight", "1")
    wait_for(fleet, {"vm00005": "shut off", "vm00000": "running"})
    now = tmp_path / "now.conf"
    now.write_text(ctl("get", "infra"))
    infra, warnings = parse_infra(now.read_bytes())
    assert warnings == ()
    assert infra == parse_infra(file.read_bytes())[0]
    assert ctl("plan", str(now), *options) == "lab: 6 VMs as planned, nothing to do\n"
    assert json.loads(ctl("get", "infra", "-o", "json"))["nodes"][0]["memory"] == 262144
    assert ctl("get", "sites", "-o", "json")
    assert "198.18.0.6" in ctl("get", "vms", "-o", "wide")
    fleet.kill("h1")
    fleet.wait_until_down("h1")
    assert "\n(h1) vm00001 vm00004\n" in ctl("get", "infra")
    fleet.restart("h1")
    ctl("destroy", "--deployment", "lab", "--all")
