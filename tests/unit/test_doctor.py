"""What `ctl doctor` makes of what was seen of a host."""

from __future__ import annotations

import msgspec
import pytest

from controller import api
from controller.doctor import Agent, Disk, Examined, Finding, Libvirt, Probed, findings, report, well
from tests.unit import fake_service as fake
from tests.unit.test_render_why import known

KEY = "ab" * 32
BUNDLE = "0" * 32


def probed(**fields: object) -> Probed:
    """A host that is well, but for what a test says."""
    usual: dict[str, object] = {
        "python": (3, 11),
        "executable": "/usr/bin/python3",
        "machine": "x86_64",
        "libc": "glibc",
        "libc_version": (2, 36),
        "user": "root",
        "directory": "/var/lib/canopy/f",
        "disk": Disk(place="/var/lib/canopy/f", free_mib=50_000, inodes_left=True, writable=True),
        "agent": Agent(installed=BUNDLE, running=True, started=BUNDLE, log="it began", key=KEY),
        "reach": {"h1": "", "service": ""},
        "libvirt": Libvirt(uri="qemu:///system", missing=False, problem=""),
        "time": 0.0,
    }
    return Probed(**(usual | fields))  # type: ignore[arg-type]  # a test says what differs


def seen(**fields: object) -> Examined:
    """What there is to see of a member that is well, but for what a test says."""
    usual: dict[str, object] = {
        "name": "h3",
        "known": known(fake.host(3, parent="h1", planned_parent="h1"), vms=0),
        "probed": probed(),
        "key": KEY,
        "bundle": BUNDLE,
    }
    return Examined(**(usual | fields))  # type: ignore[arg-type]  # a test says what differs


def bad(examined: Examined) -> dict[str, Finding]:
    """The bad findings; each has a next step."""
    found = {finding.check: finding for finding in findings(examined) if finding.state == "bad"}
    assert all(finding.step for finding in found.values())
    return found


DOWN = known(fake.host(3, up=False, why="connection closed"), vms=0)


def with_agent(**fields: object) -> Probed:
    return probed(agent=msgspec.structs.replace(probed().agent, **fields))


def test_a_host_that_is_well_has_a_line_for_everything_and_nothing_to_do() -> None:
    found = findings(seen())
    assert well(found)
    assert [finding.check for finding in found] == [
        *("tree", "ssh", "python", "disk", "agent", "port", "parent", "parent", "key", "clock", "libvirt", "version")
    ]
    assert not any(finding.step for finding in found)
    text = report("h3", found)
    assert text.splitlines()[0] == "h3: all well"
    assert all(line.startswith("  OK   ") for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("examined", "check", "text", "step"),
    [
        (
            seen(known=None, probed=with_agent(installed="", running=False, started="", key="")),
            "agent",
            "is not installed",
            "`ctl up -w h3` installs and starts it",
        ),
        (
            seen(known=DOWN, port="connection refused", probed=with_agent(running=False, started="", log="no room")),
            "agent",
            "is installed and does not run; its log ends: no room",
            "`ctl up -w h3` starts it",
        ),
        (seen(port="no answer within 3 s"), "port", "no answer within 3 s", "through between hosts"),
        (seen(ssh="connection refused", probed=None), "ssh", "connection refused", "`ssh h3 true`"),
        (seen(python="no Python 3.10 or newer: found none", probed=None), "python", "found none", "install one"),
        (
            seen(probed=probed(disk=Disk(place="/", free_mib=12, inodes_left=True, writable=True))),
            "disk",
            "12 MiB left in /",
            "make room",
        ),
        (
            seen(probed=probed(disk=Disk(place="/", free_mib=5000, inodes_left=False, writable=True))),
            "disk",
            "no inodes left in /",
            "make room",
        ),
        (
            seen(probed=probed(disk=Disk(place="/", free_mib=5000, inodes_left=True, writable=False))),
            "disk",
            "/ can't be written by root",
            "let root write",
        ),
        (
            seen(probed=probed(reach={"h1": "no answer", "service": ""})),
            "parent",
            "it does not reach h1 (198.18.0.2:7000): no answer",
            "let TCP",
        ),
        (
            seen(probed=probed(reach={"service": "connection refused"})),
            "parent",
            "does not reach the service (198.18.0.1:7000)",
            "--address",
        ),
        (seen(key="cd" * 32), "key", "another than the one on record", "`ctl down -w h3`, then `ctl up -w h3`"),
        (seen(probed=with_agent(key="")), "key", "has no key", "`ctl up -w h3` enrols it anew"),
        (
            seen(probed=probed(libvirt=Libvirt(uri="qemu:///system", missing=False, problem="no socket"))),
            "libvirt",
            "qemu:///system: no socket",
            "systemctl status libvirtd",
        ),
        (
            seen(
                known=known(fake.host(3, parent="h1", planned_parent="h1"), vms=2),
                probed=probed(libvirt=Libvirt(uri="qemu:///system", missing=True, problem="No module named 'libvirt'")),
            ),
            "libvirt",
            "there are VMs on record here, and No module",
            "python3-libvirt",
        ),
        (seen(bundle="1" * 32), "version", "bundle 000000000000, and today's is 111111111111", "replaces it"),
        (seen(bundle="", no_bundle="no wheels"), "version", "no wheels", "use a host"),
        (seen(known=DOWN), "tree", "not in the tree: connection closed", "`ctl why h3`"),
        (seen(known=None, stranger="no service runs for this fleet"), "tree", "no service runs", "`ctl up -w h3`"),
    ],
)
def test_what_is_bad_is_said_with_the_next_step(examined: Examined, check: str, text: str, step: str) -> None:
    found = bad(examined)
    assert text in found[check].text
    assert step in found[check].step
    assert not well(findings(examined))


def test_an_agent_that_does_not_run_is_why_its_port_is_closed() -> None:
    found = bad(seen(known=DOWN, port="connection refused", probed=with_agent(running=False, started="")))
    assert "for no agent runs" in found["port"].text
    assert found.keys() == {"tree", "agent", "port"}


@pytest.mark.parametrize(
    ("examined", "check", "text"),
    [
        (seen(offset=75.0), "clock", "1 min 15 s ahead of this machine's; harmless"),
        (seen(offset=-3700.0), "clock", "1 h 1 min behind this machine's; harmless"),
        (
            seen(probed=probed(libvirt=Libvirt(uri="qemu:///system", missing=True, problem="No module"))),
            "libvirt",
            "no VMs can run here: No module",
        ),
        (seen(probed=probed(reach={"h1": "no answer", "service": ""}), down=("h1",)), "parent", "not in the tree"),
    ],
)
def test_what_does_no_harm_is_told_and_is_not_bad(examined: Examined, check: str, text: str) -> None:
    found = findings(examined)
    assert any(finding.state == "note" and finding.check == check and text in finding.text for finding in found)
    assert well(found)


def test_an_agent_on_this_machine_needs_no_ssh_and_its_hypervisor_is_left_alone() -> None:
    host = known(fake.host(3, parent="h1", planned_parent="h1", facts={"local": "yes"}), vms=0)
    embedded = Libvirt(uri="qemu:///embed?root=/x", missing=False, problem="")
    found = findings(seen(known=host, probed=probed(libvirt=embedded, agent=with_agent(installed="").agent), bundle=""))
    assert well(found)
    texts = {finding.check: finding.text for finding in found}
    assert texts["ssh"] == "not needed: this machine"
    assert "private hypervisor" in texts["libvirt"]


def test_what_a_host_says_drives_no_terminal() -> None:
    assert "\x1b" not in report("h3", findings(seen(probed=with_agent(running=False, log="\x1b[2J"))))


def test_a_report_says_below_each_bad_line_what_to_do() -> None:
    text = report("h3", findings(seen(bundle="1" * 32)))
    assert text.startswith("h3: not well\n")
    lines = text.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("  BAD  version")]
    assert lines[place + 1].strip() == "next: `ctl up -w h3` replaces it"


def test_the_ancestors_are_those_of_the_service() -> None:
    above = api.Ancestor(name="h9", address="198.18.0.9", control_port=9)
    host = known(fake.host(3, parent="h9", planned_parent="h9"), vms=0, ancestors=(above,))
    found = [f.text for f in findings(seen(known=host, probed=probed(reach={"h9": ""}))) if f.check == "parent"]
    assert found == ["it reaches h9 (198.18.0.9:9)"]
