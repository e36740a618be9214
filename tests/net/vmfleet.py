"""A local fleet whose agents make VMs with libvirt's test driver: nothing but state, and gone with the agent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from controller.infra import parse_infra
from controller.session import Session
from controller.spawn import SpawnReport, Wait, spawn
from controller.spawn_plan import Prepared, SpawnOptions, prepare
from protocol.vms import VmChange
from tests.net.localfleet import LocalFleet, local_fleet

DEPLOYMENT = "lab"
# Room for a host's share of VMs; the test driver does not count.
_NODE = """<node>
  <cpu><mhz>2000</mhz><model>x86_64</model><active>64</active><nodes>2</nodes><sockets>2</sockets>
    <cores>16</cores><threads>1</threads></cpu>
  <memory>268435456</memory>
  {domains}
</node>"""


@contextlib.contextmanager
def vm_fleet(
    home: Path,
    names: Iterable[str],
    fanout: int = 8,
    *,
    before: Mapping[str, Sequence[str]] | None = None,
    domains: str = "",
) -> Iterator[LocalFleet]:
    """A fleet in `home` whose hosts have a libvirt of their own each, with these domains of somebody else's. `before`
    as in start_python."""
    node = home / "node.xml"
    node.write_text(_NODE.format(domains=domains))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANOPY_LIBVIRT", f"test://{node}")
        with local_fleet(home, names, fanout, before=before) as fleet:
            yield fleet


def infra_text(hosts: Iterable[str], vms: int) -> str:
    """An infra.conf of so many VMs, in turn on each host."""
    hosts = list(hosts)
    lines = ["#list of nodes", *(f"{host} 64 6400 262144" for host in hosts)]
    lines += ["#list of VMs", *(f"vm{n:05} 1 10 64" for n in range(vms)), "#initial configuration"]
    for place, host in enumerate(hosts):
        lines.append(" ".join([host, *(f"vm{n:05}" for n in range(place, vms, len(hosts)))]))
    return "\n".join([*lines, "#end of configuration", ""])


def prepared(session: Session, text: str, kernel: Path, **options: object) -> Prepared:
    """What a spawn of this infra.conf would do."""
    known: dict[str, object] = {"deployment": DEPLOYMENT, "kernel": kernel, "subnet": "198.18.0.0/16"}
    infra, _ = parse_infra(text)
    return prepare(
        infra,
        SpawnOptions(**(known | options)),  # type: ignore[arg-type]  # a test says what it wants
        status=session.status(),
        known=session.deployment(DEPLOYMENT),
        images=session.images(),
    )


def spawned(session: Session, text: str, kernel: Path, **options: object) -> tuple[SpawnReport, float]:
    """Spawn an infra.conf, and how long that took in seconds."""
    began = time.monotonic()
    report = spawn(session, prepared(session, text, kernel, **options), wait=Wait.STARTED, timeout=120)
    return report, time.monotonic() - began


def by_change(report: SpawnReport) -> dict[VmChange, set[str]]:
    """The VMs of a report by what was done to them."""
    found: dict[VmChange, set[str]] = {}
    for results in report.answers.values():
        for result in results:
            found.setdefault(result.change, set()).add(result.name)
    return found
