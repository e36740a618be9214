"""The demo: the three hosts of an infra.conf as agents on this machine, a broadcast, a push, six VMs, their health, a
clean end.

    make demo

Every step is a `ctl` command, shown before it is run. VMs are real QEMU guests, with KVM where it truly works and in
software elsewhere; where QEMU or a kernel can't be had, libvirt's test driver stands in for them, and the demo says so.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent.kvmprobe import probe_kvm
from deploy.guest import GuestError, build_guest

INFRA = Path(__file__).with_name("infra.conf")
#: An address range that is made for tests (RFC 2544); the demo's VMs are on no network that anybody reaches.
SUBNET = "198.18.0.0/24"
#: Six guests boot on the cores of a laptop, in software.
BOOT_WITHIN_S = 180.0

_BOLD, _PLAIN = ("\033[1m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")


def say(text: str) -> None:
    """A sentence of the demo's own."""
    print(f"\n{_BOLD}# {text}{_PLAIN}", flush=True)


class Demo:
    """One run, in a directory that goes away with it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = dict(os.environ) | {"CANOPY_HOME": str(home)}
        self.ctl = str(Path(sys.executable).with_name("ctl"))

    def run(self, *arguments: str) -> None:
        """Run `ctl`, shown first. Raises CalledProcessError."""
        print(f"{_BOLD}$ ctl {shlex.join(arguments)}{_PLAIN}", flush=True)
        subprocess.run([self.ctl, *arguments], env=self.environment, check=True)

    def end(self) -> None:
        """Whatever happened, nothing stays behind."""
        subprocess.run(
            [self.ctl, "down", "--vms", "--purge"], env=self.environment, check=False, capture_output=True, timeout=120
        )


def real_vms() -> tuple[list[str], str]:
    """How `ctl spawn` boots real guests here. Raises GuestError where that can't be."""
    if shutil.which("qemu-system-x86_64") is None:
        raise GuestError("QEMU is not installed")
    try:
        import libvirt  # noqa: F401
    except ImportError as error:
        raise GuestError("Python's libvirt is not installed") from error
    guest = build_guest()
    kvm = asyncio.run(probe_kvm())
    how = "with KVM" if kvm.usable else f"in software (TCG): {kvm.why}"
    # Without KVM on a busy machine Linux may take the timer for broken, and panics: it is not to try it.
    cmdline = "console=ttyS0 quiet no_timer_check"
    boot = ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--cmdline", cmdline]
    return boot, f"real QEMU guests, {how}, with Debian's kernel {guest.release}"


def wait_for_guests(home: Path, names: list[str]) -> None:
    """Wait until each guest has said on its console that it is up, and print what it said. Raises TimeoutError."""
    deadline = time.monotonic() + BOOT_WITHIN_S
    silent = set(names)
    while silent:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not up within {BOOT_WITHIN_S:g} s: {', '.join(sorted(silent))}")
        for console in home.glob("default/hosts/*/vms/*/console.log"):
            name = console.parent.name
            said = [line for line in console.read_text(errors="replace").splitlines() if "ready at" in line]
            if name in silent and said:
                silent.discard(name)
                print(f"{console.parents[2].name}: {said[-1].strip()}", flush=True)
        time.sleep(0.2)


def show(demo: Demo) -> None:
    """The demo itself."""
    try:
        boot, how = real_vms()
        libvirt = []
    except GuestError as error:
        boot, how = ["--kernel", str(_stand_in(demo.home))], f"libvirt's test driver, which boots nothing: {error}"
        libvirt = ["--libvirt", f"test://{_test_node(demo.home)}"]
    say("A fleet: the hosts of infra.conf, as three agents on this machine. No SSH, no root.")
    demo.run("up", "--local", str(INFRA), *libvirt)
    demo.run("tree")
    say("A broadcast: equal outputs once, with the folded names of their hosts.")
    demo.run("broadcast", "uname -sr")
    demo.run("broadcast", "echo I am $CANOPY_HOST")
    say("A push: 20 MB, in chunks, verified, in place all at once or not at all.")
    file = demo.home / "twenty-megabytes"
    file.write_bytes(os.urandom(20 << 20))
    demo.run("push", str(file), str(demo.home / "pushed"), "-w", "suno-3.sophia.grid5000.fr")
    say(f"Six VMs of infra.conf: {how}.")
    spawn = ["spawn", str(INFRA), "--subnet", SUBNET, *boot]
    demo.run(*spawn, "--dry-run")
    demo.run(*spawn)
    if not libvirt:
        wait_for_guests(demo.home, [f"vm{number:02}" for number in range(6)])
    demo.run("get", "vms")
    say("Run again: nothing changes.")
    demo.run(*spawn)
    say("Health, as agents report it by themselves.")
    demo.run("health")
    say("A clean end.")
    demo.run("destroy", str(INFRA))
    demo.run("down", "--purge")


def _stand_in(home: Path) -> Path:
    """The test driver looks at no kernel, but Canopy verifies that hosts have the one that was asked for."""
    kernel = home / "kernel"
    kernel.write_bytes(b"no kernel: libvirt's test driver boots nothing\n")
    return kernel


def _test_node(home: Path) -> Path:
    node = home / "node.xml"
    node.write_text(
        "<node><cpu><mhz>2000</mhz><model>demo</model><active>8</active><nodes>1</nodes><sockets>1</sockets>"
        "<cores>8</cores><threads>1</threads></cpu><memory>16777216</memory></node>\n"
    )
    return node


def main() -> int:
    """Show it, and clean up whatever happens."""
    # A short path: sockets below it may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="canopy-") as home:
        demo = Demo(Path(home))
        try:
            show(demo)
        except (subprocess.CalledProcessError, TimeoutError) as error:
            print(f"\nthe demo failed at this step: {error}", file=sys.stderr)
            for log in sorted(Path(home).glob("default/**/*.log")):
                print(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            demo.end()
    print("\nThat was all of it; nothing is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
