"""`ctl check` and `ctl tune` on test hosts. Only what is a host's own is changed: its forwarding, its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.waiting import wait_until

FORWARD = "net.ipv4.ip_forward"
CLIENTS = "libvirt.max_clients"
#: What a host has of its own; the rest is this machine's, and no test's to change.
OWN = ("--forward", "--only", FORWARD, "--only", CLIENTS)
CONF = "/etc/libvirt/libvirtd.conf"


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    made = testhosts_module([HostSpec("alpha", libvirt=True), HostSpec("beta")])
    made.run("alpha", ["sh", "-c", f"echo 'max_clients = 20' >> {CONF}"])
    return made


@pytest.fixture(scope="module")
def ctl(hosts: TestHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    runner = Ctl(tmp_path_factory.mktemp("fleets"))
    try:
        runner("up", "-w", "alpha,beta", "-F", str(hosts.ssh_config))
        yield runner
    finally:
        runner.close()


def state(hosts: TestHosts, name: str) -> str:
    """All that may be changed on a host."""
    look = f"cat /proc/sys/net/ipv4/ip_forward; ls -A /etc/sysctl.d; stat -c '%a %U' {CONF}; cat {CONF}"
    return str(hosts.run(name, ["sh", "-c", look]).stdout)


def found(ctl: Ctl, *arguments: str) -> list[dict[str, Any]]:
    done = ctl("check", "--json", *arguments, status=1)
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


def test_every_host_tells_of_itself_and_those_that_agree_are_one(ctl: Ctl) -> None:
    told = found(ctl, "--forward")
    by = {(each["check"], each["text"]): (each["state"], sorted(each["hosts"])) for each in told}
    both = ["alpha", "beta"]
    assert by["limits", f"{FORWARD} is 0"] == ("bad", both)
    assert by["limits", f"{CLIENTS} is 20"][1] == ["alpha"]
    assert [state for (check, _), (state, hosts) in by.items() if check == "clock"] == ["ok"]
    assert ("bad", both) in [value for (check, _), value in by.items() if check == "kvm"], "test hosts hide it"
    assert {
        each["state"]: each["hosts"] for each in told if each["check"] == "libvirt" and "qemu:" in each["text"]
    } == {
        "ok": ["alpha"],
        "bad": ["beta"],
    }
    assert [value for (check, _), value in by.items() if check == "qemu"] == [("ok", both)]


def test_settings_are_raised_and_put_back_by_an_agent_that_was_killed_meanwhile(hosts: TestHosts, ctl: Ctl) -> None:
    here = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    before = {name: state(hosts, name) for name in ("alpha", "beta")}
    planned = ctl("tune", *OWN, status=2).stdout
    assert f"~ {FORWARD} 0 -> 1: " in planned
    assert "2 of 2 hosts to change" in planned
    assert {name: state(hosts, name) for name in before} == before, "nothing is changed without --apply"

    done = ctl("tune", "--apply", *OWN).stdout
    assert f"{CLIENTS} 20 -> 64: alpha" in done
    assert "libvirtd has yet to begin anew to take its settings: alpha; next: " in done
    assert ctl("tune", *OWN).stdout == "nothing to do on 2 hosts\n"
    assert all(state(hosts, name).startswith("1\n") for name in before)
    assert "max_clients = 64\n" in state(hosts, "alpha")
    persisted = hosts.run("beta", ["sh", "-c", "cat /etc/sysctl.d/60-canopy-*.conf"]).stdout
    assert str(persisted).splitlines()[1:] == [f"{FORWARD} = 1"]
    stale = [each["hosts"] for each in found(ctl) if "has not read its configuration" in each["text"]]
    assert stale == [["alpha"]]

    for name in before:
        hosts.run(name, ["sh", "-c", "kill -9 $(cat /var/lib/canopy/*/agent.pid)"])
    # As where it was killed before the change was whole.
    cut = """sed -i 's/"after":1,"target":null/"after":null,"target":1/' /var/lib/canopy/*/tuning"""
    hosts.run("beta", ["sh", "-c", cut])
    ctl("up", "-w", "alpha,beta", "-F", str(hosts.ssh_config))
    wait_until(lambda: state(hosts, "beta") == before["beta"], 30, "what was cut short to be taken back")
    undone = ctl("tune", "--undo").stdout
    assert f"{CLIENTS} 64 -> 20: alpha" in undone
    assert f"{FORWARD} 1 -> 0: alpha\n" in undone
    assert {name: state(hosts, name) for name in before} == before
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == here, "this machine's own is untouched"


VM = """<domain type='qemu'><name>bystander</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"""


def test_a_daemon_that_is_restarted_has_its_settings_and_its_vms_run_on(hosts: TestHosts, ctl: Ctl) -> None:
    only = ("alpha", "--only", CLIENTS)
    hosts.run("alpha", ["sh", "-c", f"cat >/root/vm.xml <<'END'\n{VM}\nEND\nvirsh create /root/vm.xml"])

    def process(name: str) -> list[int]:
        return [each.pid for each in hosts.processes("alpha") if each.argv and Path(each.argv[0]).name == name]

    def one(name: str, *, but: int = 0) -> int:
        """The process of this name, once it is alone: daemons have children for a moment."""

        def found() -> list[int]:
            pids = process(name)
            return pids if len(pids) == 1 and but not in pids else []

        return wait_until(found, 60, f"one {name}")[0]

    daemon, qemu = one("libvirtd"), one("qemu-system-x86_64")
    done = ctl("tune", *only, "--apply", "--restart-libvirt").stdout
    assert f"{CLIENTS} 20 -> 64: alpha" in done
    assert "has yet to begin anew" not in done
    anew = one("libvirtd", but=daemon)
    everybody = ["get", "vms", "--all", "-w", "alpha"]
    wait_until(lambda: "bystander" in ctl(*everybody, status=None).stdout, 60, "the VM to be seen again")
    assert qemu in process("qemu-system-x86_64")
    assert ctl(*everybody).stdout.splitlines()[-1].split()[-1] == "running"
    clients = hosts.run("alpha", ["virt-admin", "-c", "libvirtd:///system", "srv-clients-info", "libvirtd"]).stdout
    assert "nclients_max : 64" in " ".join(str(clients).split())
    assert not [each for each in found(ctl) if "has not read its configuration" in each["text"]]
    assert f"{CLIENTS} 64 -> 20: alpha" in ctl("tune", "alpha", "--undo", "--restart-libvirt").stdout
    one("libvirtd", but=anew)
    assert qemu in process("qemu-system-x86_64")

    def ended() -> bool:
        # Libvirt may still be looking for what runs, fail, and have ended it all the same: what counts is its process.
        hosts.run("alpha", ["virsh", "destroy", "bystander"], check=False)
        return not process("qemu-system-x86_64")

    wait_until(ended, 60, "the VM's end")


def test_a_host_that_is_left_for_good_is_left_as_it_was(hosts: TestHosts, ctl: Ctl) -> None:
    before = state(hosts, "beta")
    ctl("tune", "beta", "--apply", *OWN)
    assert state(hosts, "beta") != before
    ctl("down", "-w", "beta", "--purge")
    assert state(hosts, "beta") == before
