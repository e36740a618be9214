"""VmWorker with real QEMU: under a test host's libvirtd, and in a hypervisor embedded in the agent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.guest import Guest, build_guest
from deploy.testhosts import HostSpec, TestHosts
from protocol.vms import DirectBoot, Disk, Network, VmChange, VmPower, VmResult, VmSpec, VmState
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.waiting import wait_until

PROJECT = Path(__file__).parents[2]
DEPLOYMENT = "lab"
BRIDGE = "br0"
QEMU = "qemu-system-x86_64"
PYTHON = "/usr/bin/python3"
NOBODY = 65534
AGENT = Path("/var/lib/canopy/lab")
CODE = Path("/opt/canopy")
# A boot without KVM takes 3 s of an idle core; cores may be shared by much.
BOOT_S = 120.0
# What a person is promised.
KILLED_SHOWS_S = 5.0

pytestmark = pytest.mark.timeout(400)


class Driver:
    """An agent's stand-in: `vm_driver.py` in some place of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.states: dict[str, VmState] = {}
        self._answers: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "answer" in said:
                self._answers.put(said["answer"])
            else:
                self.states.update((state.name, state) for state in msgspec.convert(said["changed"], list[VmState]))

    def ask(self, do: str, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._answers.get(timeout=BOOT_S)

    def create(self, *specs: VmSpec) -> list[VmResult]:
        answer = self.ask("create", deployment=DEPLOYMENT, specs=msgspec.to_builtins(specs))
        return msgspec.convert(answer, list[VmResult])

    def destroy(self) -> dict[str, VmChange]:
        return _changes(msgspec.convert(self.ask("destroy", deployment=DEPLOYMENT), list[VmResult]))

    def is_told(self, name: str, power: VmPower, deadline_s: float) -> VmState:
        """Wait until the driver has said by itself that a VM is in a state."""

        def seen() -> VmState | None:
            state = self.states.get(name)
            return state if state is not None and state.power is power else None

        state = wait_until(seen, deadline_s, f"{name} to be {power.value}")
        assert state is not None
        return state

    def end(self, *, kill: bool = False) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if kill:
            # What was started is nsenter, which waits for the driver in its namespace.
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            os.kill(int(children), signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=BOOT_S)
        self._reader.join(timeout=BOOT_S)
        self.process.stdout.close()


def _changes(results: list[VmResult]) -> dict[str, VmChange]:
    failed = [result for result in results if result.change is VmChange.FAILED]
    assert not failed, failed
    return {result.name: result.change for result in results}


@pytest.fixture(scope="module")
def guest() -> Guest:
    return build_guest()


def add_image(images: Path, source: Path) -> str:
    """Put a file where a push would, as the push would leave it; its digest."""
    images.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    shutil.copyfile(source, images / digest)
    (images / digest).chmod(0o444)
    return digest


def a_spec(name: str, ip: str, boot: tuple[str, str], *, bridge: str | None, disk: Disk | None = None) -> VmSpec:
    a, b, c = (int(part) for part in ip.split(".")[1:])
    cmdline = f"console=ttyS0 quiet ip={ip}:::255.254.0.0:{name}::off"
    return VmSpec(
        name=name,
        uuid=str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{DEPLOYMENT}/{name}")),
        deployment=DEPLOYMENT,
        vcpus=1,
        memory_mib=96,
        mac=f"00:16:3e:{a:02x}:{b:02x}:{c:02x}",
        ip=ip,
        prefix=15,
        boot=DirectBoot(kernel=boot[0], initrd=boot[1], cmdline=cmdline),
        disk=disk,
        network=Network(bridge=bridge),
    )


def put_code(into: Path) -> None:
    """What the system's own Python needs to run the driver; it brings libvirt's binding."""
    tell = "import sys; print(*sys.version_info[:2])"
    version = subprocess.run([PYTHON, "-c", tell], capture_output=True, text=True, check=True).stdout.split()
    if version != [str(number) for number in sys.version_info[:2]]:
        pytest.skip(f"msgspec of this Python is of no use to {PYTHON} {version}; the main job's test covers it")
    into.mkdir()
    assert msgspec.__file__ is not None
    for package in (PROJECT / "agent", PROJECT / "protocol", Path(msgspec.__file__).parent):
        shutil.copytree(package, into / package.name)
    shutil.copyfile(PROJECT / "tests" / "e2e" / "vm_driver.py", into / "vm_driver.py")


def says(console: Path, text: str) -> None:
    wait_until(
        lambda: console.exists() and text in console.read_text(errors="replace"), BOOT_S, f"{text!r} on {console}"
    )


# --- a test host with libvirtd ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    fleet = testhosts_module([HostSpec("hv1", libvirt=True, vm_bridge=BRIDGE)])
    put_code(fleet.host("hv1").root / CODE.relative_to("/"))
    return fleet


def drive(fleet: TestHosts) -> Driver:
    command = ["/usr/bin/env", f"PYTHONPATH={CODE}", PYTHON, f"{CODE}/vm_driver.py"]
    process = fleet.popen(
        "hv1",
        [*command, str(AGENT), "qemu:///system"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    return Driver(process)


def pids(fleet: TestHosts, program: str, word: str = "") -> list[int]:
    """The host's processes of a program, by their pids inside, that have the word in an argument."""
    return [
        process.pid
        for process in fleet.processes("hv1")
        if process.argv and Path(process.argv[0]).name == program and any(word in given for given in process.argv)
    ]


def signal_in_host(fleet: TestHosts, how: str, pid: int) -> None:
    fleet.run("hv1", ["kill", f"-{how}", str(pid)])


def test_vms_on_a_host_live_through_what_happens_to_it(host: TestHosts, guest: Guest, tmp_path: Path) -> None:
    root = host.host("hv1").root
    images = root / AGENT.relative_to("/") / "images"
    files = root / AGENT.relative_to("/") / "vms"
    base = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    boot = (add_image(images, guest.kernel), add_image(images, guest.initrd))
    addresses = [str(host.vm_subnet[number]) for number in (10, 11)]
    first = a_spec("vm1", addresses[0], boot, bridge=BRIDGE)
    second = a_spec("vm2", addresses[1], boot, bridge=BRIDGE, disk=Disk(image=add_image(images, base)))

    driver = drive(host)
    assert _changes(driver.create(first, second)) == {"vm1": VmChange.CREATED, "vm2": VmChange.CREATED}
    says(files / "vm1" / "console.log", f"canopy-guest vm1 ready at {addresses[0]}")
    says(files / "vm2" / "console.log", "canopy-guest vm2 disk vda of 64 MiB")
    assert driver.ask("reachable", names=["vm1", "vm2", "vm9"], deadline_s=BOOT_S / 60) == {
        "vm1": True,
        "vm2": True,
        "vm9": None,
    }
    _nobody_else_can_read(host, AGENT / "images" / boot[1])
    _nobody_else_can_read(host, AGENT / "vms" / "vm2" / "overlay.qcow2")
    running = {name: pids(host, QEMU, f"guest={name},")[0] for name in ("vm1", "vm2")}

    # The agent goes, and its VMs stay.
    driver.end(kill=True)
    driver = drive(host)
    assert _changes(driver.create(first, second)) == {"vm1": VmChange.UNCHANGED, "vm2": VmChange.UNCHANGED}
    assert {name: pids(host, QEMU, f"guest={name},")[0] for name in running} == running

    # libvirtd hangs, and then dies, and nothing is said of VMs that is not known.
    [libvirtd] = pids(host, "libvirtd")
    signal_in_host(host, "STOP", libvirtd)
    driver.is_told("vm1", VmPower.UNKNOWN, BOOT_S)
    signal_in_host(host, "CONT", libvirtd)
    driver.is_told("vm1", VmPower.RUNNING, BOOT_S)
    signal_in_host(host, "KILL", libvirtd)
    driver.is_told("vm2", VmPower.UNKNOWN, BOOT_S)
    host.run("hv1", ["libvirtd", "-d"])
    driver.is_told("vm2", VmPower.RUNNING, BOOT_S)

    # A QEMU that is killed behind libvirt's back shows.
    signal_in_host(host, "KILL", running["vm1"])
    assert driver.is_told("vm1", VmPower.SHUTOFF, KILLED_SHOWS_S).reason == "crashed"
    assert driver.states["vm2"].power is VmPower.RUNNING
    assert driver.ask("reachable", names=["vm1", "vm2"], deadline_s=2) == {"vm1": False, "vm2": True}
    assert _changes(driver.create(first, second)) == {"vm1": VmChange.STARTED, "vm2": VmChange.UNCHANGED}

    assert driver.destroy() == {"vm1": VmChange.REMOVED, "vm2": VmChange.REMOVED}
    driver.end()
    assert pids(host, QEMU) == []
    assert list(files.iterdir()) == []
    assert host.run("hv1", ["virsh", "-c", "qemu:///system", "list", "--all", "--name"]).stdout.strip() == ""


def _nobody_else_can_read(fleet: TestHosts, file: Path) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert fleet.run("hv1", ["head", "-c1", str(file)], check=False).returncode == 0
    assert fleet.run("hv1", [*nobody, "head", "-c1", str(file)], check=False).returncode != 0


# --- a hypervisor inside the agent, for fleets without root and without daemons -------------------------------------


class Cage:
    """A PID namespace with an init that reaps, in which a user's agent and its VMs live and with which they end."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        # `cat` ends when this process does, and the namespace with it.
        self._init = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "tini", "-s", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

        def first_inside() -> int:
            children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
            return int(children[0]) if children else 0

        self._inside = wait_until(first_inside, 10, "the namespace's init")

    def drive(self, directory: Path, uri: str) -> Driver:
        """A driver whose code is in `directory`/code."""
        user = ["setpriv", "--clear-groups", f"--reuid={self.uid}", f"--regid={self.uid}"]
        enter = ["nsenter", f"--target={self._inside}", "--pid", "--mount"]
        command = [PYTHON, f"{directory}/code/vm_driver.py", str(directory), uri]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{directory}/code", "HOME": str(directory)}
        return Driver(
            subprocess.Popen(
                [*enter, *(user if self.uid else ()), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd="/",
            )
        )

    def close(self) -> None:
        assert self._init.stdin is not None
        self._init.stdin.close()
        self._init.wait(timeout=30)


@pytest.fixture
def cage(uid: int) -> Iterator[Cage]:
    need_test_hosts(libvirt=True)
    made = Cage(uid)
    yield made
    made.close()


def qemu_of(directory: Path) -> list[int]:
    """The QEMUs, by their pids here, that have a file in the directory."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0") if entry.isdecimal() else []
            if words and b"qemu-system" in words[0] and any(str(directory).encode() in word for word in words):
                found.append(int(entry))
    return found


@pytest.mark.parametrize(
    ("uid", "mode", "runs_as"),
    [
        pytest.param(0, 0o755, "another user", id="root"),
        # As under /root: QEMU's own user has no way in.
        pytest.param(0, 0o700, "the same user", id="root in a closed directory"),
        pytest.param(NOBODY, 0o700, "the same user", id="an ordinary user"),
    ],
)
def test_an_embedded_hypervisor_needs_no_daemon_and_its_vms_outlive_the_agent(
    cage: Cage, guest: Guest, mode: int, runs_as: str
) -> None:
    # Not among pytest's own temporary directories, which are closed in any case.
    directory = Path("/var/tmp") / f"canopy-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(mode=mode)
    os.chown(directory, cage.uid, cage.uid)
    try:
        put_code(directory / "code")
        _embedded(cage, guest, directory, runs_as)
    finally:
        shutil.rmtree(directory)


def _embedded(cage: Cage, guest: Guest, directory: Path, runs_as: str) -> None:
    boot = (add_image(directory / "images", guest.kernel), add_image(directory / "images", guest.initrd))
    os.chown(directory / "images", cage.uid, cage.uid)
    spec = a_spec("vm1", "198.18.0.5", boot, bridge=None)
    uri = f"qemu:///embed?root={directory}/libvirt"
    driver = cage.drive(directory, uri)
    assert _changes(driver.create(spec)) == {"vm1": VmChange.CREATED}
    says(directory / "vms" / "vm1" / "console.log", "canopy-guest vm1 ready at 198.18.0.5")
    [qemu] = qemu_of(directory)
    same = Path(f"/proc/{qemu}").stat().st_uid == cage.uid
    assert runs_as == ("the same user" if same else "another user")

    driver.end(kill=True)
    assert qemu_of(directory) == [qemu]
    driver = cage.drive(directory, uri)
    driver.is_told("vm1", VmPower.RUNNING, BOOT_S)
    assert _changes(driver.create(spec)) == {"vm1": VmChange.UNCHANGED}
    os.kill(qemu, signal.SIGKILL)
    assert driver.is_told("vm1", VmPower.SHUTOFF, KILLED_SHOWS_S).reason == "crashed"
    assert driver.destroy() == {"vm1": VmChange.REMOVED}
    driver.end()
    assert qemu_of(directory) == []
    assert list((directory / "vms").iterdir()) == []
