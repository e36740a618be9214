"""What the tests of VMs share: an agent's stand-in in a process of its own, places for it to live, small guests."""

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
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pycdlib
import pytest

from protocol.vms import DirectBoot, Disk, Network, VmChange, VmPower, VmResult, VmSpec, VmState
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


class Driver:
    """An agent's stand-in: `vm_driver.py` in some place of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.states: dict[str, VmState] = {}
        #: Answers in their order, and None where the driver has ended.
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
        self._answers.put(None)

    def ask(self, do: str, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self._answers.get(timeout=BOOT_S)

    def dies(self, do: str, **request: Any) -> None:
        """Ask for something in the midst of which the driver is killed."""
        assert self.ask(do, **request) is None
        self.end()

    def create(self, *specs: VmSpec) -> list[VmResult]:
        answer = self.ask("create", deployment=DEPLOYMENT, specs=msgspec.to_builtins(specs))
        return msgspec.convert(answer, list[VmResult])

    def destroy(self) -> dict[str, VmChange]:
        return changes(msgspec.convert(self.ask("destroy", deployment=DEPLOYMENT), list[VmResult]))

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


def changes(results: list[VmResult]) -> dict[str, VmChange]:
    failed = [result for result in results if result.change is VmChange.FAILED]
    assert not failed, failed
    return {result.name: result.change for result in results}


def add_image(images: Path, source: Path) -> str:
    """Put a file where a push would, as the push would leave it; its digest."""
    images.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    shutil.copyfile(source, images / digest)
    (images / digest).chmod(0o444)
    return digest


def a_spec(name: str, ip: str, boot: tuple[str, str], *, bridge: str | None, disk: Disk | None = None) -> VmSpec:
    a, b, c = (int(part) for part in ip.split(".")[1:])
    cmdline = f"console=ttyS0 quiet no_timer_check ip={ip}:::255.254.0.0:{name}::off"
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
    assert pycdlib.__file__ is not None
    libraries = (Path(msgspec.__file__).parent, Path(pycdlib.__file__).parent)
    for package in (PROJECT / "agent", PROJECT / "protocol", *libraries):
        shutil.copytree(package, into / package.name)
    shutil.copyfile(PROJECT / "tests" / "e2e" / "vm_driver.py", into / "vm_driver.py")


def says(console: Path, text: str) -> None:
    wait_until(
        lambda: console.exists() and text in console.read_text(errors="replace"), BOOT_S, f"{text!r} on {console}"
    )


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

    def drive(self, directory: Path, uri: str, *, dies_at: str = "") -> Driver:
        """A driver whose code is in `directory`/code; at this step of its journal it is killed."""
        user = ["setpriv", "--clear-groups", f"--reuid={self.uid}", f"--regid={self.uid}"]
        enter = ["nsenter", f"--target={self._inside}", "--pid", "--mount"]
        command = [PYTHON, f"{directory}/code/vm_driver.py", str(directory), uri, dies_at]
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

    def enter(self, *command: str) -> str:
        """Run a command inside, as root; its output."""
        argv = ["nsenter", f"--target={self._inside}", "--pid", "--mount", *command]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def close(self) -> None:
        assert self._init.stdin is not None
        self._init.stdin.close()
        self._init.wait(timeout=30)


def qemu_of(directory: Path) -> list[int]:
    """The QEMUs, by their pids here, that have a file in the directory."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0") if entry.isdecimal() else []
            if words and b"qemu-system" in words[0] and any(str(directory).encode() in word for word in words):
                found.append(int(entry))
    return found
