"""The whole main job: bare hosts reached over SSH, the agent pushed onto them, the tree, a broadcast, a push, the VMs
of an infra.conf booted by libvirt and QEMU, their health, and a clean end."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deploy.guest import build_guest
from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.waiting import wait_until

INFRA = Path(__file__).parents[2] / "deploy" / "infra.conf"
HOSTS = ("suno-3.sophia.grid5000.fr", "suno-6.sophia.grid5000.fr", "suno-9.sophia.grid5000.fr")
PLACES = dict(zip(HOSTS, (("vm00", "vm03"), ("vm01", "vm04"), ("vm02", "vm05")), strict=True))
AGENTS = Path("/var/lib/canopy")
KEY = "ssh-ed25519 AAAA somebody@somewhere"
#: Two VMs at a time on two cores, in software: a boot takes some 5 s alone.
BOOT_WITHIN_S = 200.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    """Three hosts with nothing on them but sshd, Python, libvirt and QEMU, and a bridge."""
    need_test_hosts(libvirt=True)
    return testhosts_module([HostSpec(name, libvirt=True, vm_bridge="br0") for name in HOSTS])


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    runner = Ctl(tmp_path / "fleets")
    yield runner
    runner.close()


def _in_one_line(text: str) -> str:
    """How documents carry the format: line breaks lost."""
    return " ".join(text.split())


def test_from_bare_hosts_to_running_vms_and_back(hosts: TestHosts, ctl: Ctl, tmp_path: Path) -> None:
    """With disks, overlays on a base image; VMs without are booted by the demo (test_demo.py)."""
    infra = tmp_path / "infra.conf"
    infra.write_text(INFRA.read_text())
    for name in HOSTS:  # libvirtd runs it for a moment when it begins
        wait_until(lambda: "/usr/sbin/dmidecode" not in _programs(hosts, name), 30, "libvirtd to have begun")  # noqa: B023
    before = {name: _leavings(hosts, name) for name in HOSTS}

    ctl("up", str(infra), "-F", str(hosts.ssh_config))
    answers = ctl.json("broadcast", "hostname")
    assert {(tuple(fold["hosts"]), fold["stdout"]) for fold in answers} == {((name,), f"{name}\n") for name in HOSTS}

    _push_reaches_every_host(hosts, ctl, tmp_path)
    base = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "64M"], check=True)
    (tmp_path / "key.pub").write_text(f"{KEY}\n")
    (tmp_path / "user-data").write_text("#cloud-config\nfqdn: $name.lab on $host\n")
    spawn = [*_spawn(hosts, infra), "--image", str(base)]
    spawn += ["--ssh-keys", str(tmp_path / "key.pub"), "--user-data", str(tmp_path / "user-data")]
    _vms_boot_and_answer(hosts, ctl, spawn)
    for name in HOSTS:
        said = hosts.run(name, ["sh", "-c", f"cat {AGENTS}/*/vms/*/console.log"]).stdout
        assert said.count("disk vda of 64 MiB") == len(PLACES[name])
        for vm in (vm for vm in ctl.json("get", "vms") if vm["name"] in PLACES[name]):
            # What the guest's own kernel finds on its NoCloud disk.
            seed = f"canopy-guest {vm['name']} seed vdb: {vm['ip']}/{hosts.subnet.prefixlen} of {vm['mac'].lower()}, "
            assert seed in said
            assert f"key {KEY}, user data fqdn: {vm['name']}.lab on {name}" in said
        assert _overlays(hosts, name) == len(PLACES[name])
    _a_vm_is_suspended_resumed_and_put_back_to_its_snapshot(hosts, ctl)
    infra.write_text(_in_one_line(infra.read_text()))
    _a_rerun_changes_nothing(hosts, ctl, spawn)
    _a_killed_qemu_shows(hosts, ctl)

    ctl("destroy", str(infra))
    assert ctl.json("get", "vms") == []
    assert [_overlays(hosts, name) for name in HOSTS] == [0, 0, 0]
    ctl("down", "--purge")
    left: dict[str, tuple[object, ...]] = {}

    def is_clean() -> bool:
        found = {name: _leavings(hosts, name) for name in HOSTS}
        left.clear()
        left.update({name: found[name] for name in HOSTS if found[name] != before[name]})
        return not left

    with suppress(AssertionError):
        wait_until(is_clean, 30, "nothing is left on any host")
    assert not left, {name: (there, before[name]) for name, there in left.items()}


def _push_reaches_every_host(hosts: TestHosts, ctl: Ctl, tmp_path: Path) -> None:
    source = tmp_path / "twenty-megabytes"
    source.write_bytes(os.urandom(20 << 20))
    source.chmod(0o750)
    want = hashlib.sha256(source.read_bytes()).hexdigest()
    ctl("push", str(source), "/root/pushed")
    for name in HOSTS:
        got = hosts.run(
            name, ["sh", "-c", "sha256sum /root/pushed; stat -c %a /root/pushed; rm /root/pushed"]
        ).stdout.split()
        assert (got[0], got[-1]) == (want, "750")


def _spawn(hosts: TestHosts, infra: Path) -> list[str]:
    guest = build_guest()
    return [
        "spawn", str(infra), "--subnet", str(hosts.subnet), "--skip-ips", str(hosts.subnet.num_addresses // 2),
        "--bridge", "br0",
        "--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--cmdline", "console=ttyS0 quiet no_timer_check",
        "--wait", "reachable", "--timeout", str(BOOT_WITHIN_S),
    ]  # fmt: skip


def _overlays(hosts: TestHosts, name: str) -> int:
    return len(hosts.run(name, ["find", str(AGENTS), "-name", "overlay.qcow2"]).stdout.split())


def _vms_boot_and_answer(hosts: TestHosts, ctl: Ctl, spawn: list[str]) -> None:
    plan = ctl.json(*spawn, "--dry-run")
    assert plan
    assert ctl.json("get", "vms") == []

    ctl(*spawn, timeout_s=BOOT_WITHIN_S + 60)
    vms = ctl.json("get", "vms")
    assert {vm["name"]: vm["host"] for vm in vms} == {vm: host for host, names in PLACES.items() for vm in names}
    for name in HOSTS:
        assert _domains(hosts, name) == sorted(PLACES[name])
        assert len(_qemus(hosts, name)) == 2
        known = hosts.run(name, ["sh", "-c", f"cat {AGENTS}/*/vms.hosts"]).stdout
        assert {tuple(line.split()) for line in known.splitlines()[1:]} == {(vm["ip"], vm["name"]) for vm in vms}
    for vm in vms:  # from this machine, over the hosts' bridges
        subprocess.run(["ping", "-c", "1", "-W", "5", vm["ip"]], check=True, stdout=subprocess.DEVNULL)


def _a_vm_is_suspended_resumed_and_put_back_to_its_snapshot(hosts: TestHosts, ctl: Ctl) -> None:
    """With its console as the witness: what the guest's memory holds is where the guest lives."""
    address = next(vm["ip"] for vm in ctl.json("get", "vms") if vm["name"] == "vm00")
    ask = ["ping", "-c1", "-W2", address]

    def power() -> str:
        return str(next(vm["power"] for vm in _health_of_vms(ctl) if vm["name"] == "vm00"))

    wait_until(lambda: "42" in ctl.typed("vm00", "echo $((6 * 7))"), BOOT_WITHIN_S, "the console to answer")
    for _ in range(2):  # doing it twice is doing it once
        ctl("vm", "suspend", "vm00")
        wait_until(lambda: power() == "paused", BOOT_WITHIN_S, "the pause to show")
        assert subprocess.run(ask, stdout=subprocess.DEVNULL, check=False).returncode == 1
    ctl("vm", "resume", "vm00")
    wait_until(lambda: power() == "running", BOOT_WITHIN_S, "the VM to run")
    wait_until(
        lambda: subprocess.run(ask, stdout=subprocess.DEVNULL, check=False).returncode == 0, BOOT_WITHIN_S, "an answer"
    )

    assert "=1 unchanged" in ctl("vm", "resume", "vm00").stdout
    ctl("vm", "snapshot", "vm00", "--name", "before")
    assert "=1 unchanged" in ctl("vm", "snapshot", "vm00", "--name", "before").stdout
    ctl.typed("vm00", "touch /after")
    wait_until(lambda: "is 42" in ctl.typed("vm00", "ls /after && echo is $((6 * 7))"), BOOT_WITHIN_S, "the file")
    hosts.run(HOSTS[0], ["virsh", "snapshot-revert", "vm00", "before"])
    wait_until(lambda: "/after: No such file" in ctl.typed("vm00", "ls /after"), BOOT_WITHIN_S, "the guest of before")


def _a_rerun_changes_nothing(hosts: TestHosts, ctl: Ctl, spawn: list[str]) -> None:
    before = {name: sorted(_qemus(hosts, name)) for name in HOSTS}
    ctl(*spawn)
    assert {name: sorted(_qemus(hosts, name)) for name in HOSTS} == before


def _a_killed_qemu_shows(hosts: TestHosts, ctl: Ctl) -> None:
    victim = next(iter(_qemus(hosts, HOSTS[1]).items()))
    os.kill(victim[0], signal.SIGKILL)

    def says_so() -> bool:
        states = {vm["name"]: vm["power"] for vm in _health_of_vms(ctl)}
        return states[victim[1]] in ("crashed", "shut off") and sum(s == "running" for s in states.values()) == 5

    wait_until(says_so, 5, f"`ctl health` says that {victim[1]} is gone")


def _health_of_vms(ctl: Ctl) -> list[dict[str, Any]]:
    vms: list[dict[str, Any]] = ctl.json("health")["vms"]
    return vms


def _qemus(hosts: TestHosts, name: str) -> dict[int, str]:
    """QEMU processes of a host: pid as seen from here, and the VM's name."""
    found = {}
    for process in hosts.processes(name):
        if process.argv and "qemu-system" in process.argv[0] and "-name" in process.argv:
            guest = process.argv[process.argv.index("-name") + 1]
            found[process.outer_pid] = guest.removeprefix("guest=").split(",")[0]
    return found


def _domains(hosts: TestHosts, name: str) -> list[str]:
    return sorted(hosts.run(name, ["virsh", "list", "--all", "--name"]).stdout.split())


def _programs(hosts: TestHosts, name: str) -> list[str]:
    return sorted(
        process.argv[0] for process in hosts.processes(name) if process.argv and "sshd:" not in process.argv[0]
    )


def _leavings(hosts: TestHosts, name: str) -> tuple[object, ...]:
    """All that the agent could leave on a host: processes, files, domains."""
    files = hosts.run(
        name,
        ["sh", "-c", "find /root /var/lib/canopy /tmp /etc/systemd/system -name '*anopy*' 2>/dev/null; ls -A /root"],
    ).stdout
    return _programs(hosts, name), files, _domains(hosts, name)
