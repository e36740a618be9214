"""`--etc-hosts`: the block in a host's /etc/hosts comes, follows and goes. The host here has a /etc of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Result
from tests.net.localfleet import DEADLINE_S, LocalFleet
from tests.net.vmfleet import DEPLOYMENT, infra_text, spawned, vm_fleet
from tests.waiting import wait_until

pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace takes root")


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    path = tmp_path / "etc"
    path.mkdir()
    return path


@pytest.fixture
def fleet(tmp_path: Path, etc: Path) -> Iterator[LocalFleet]:
    own = ["unshare", "--mount", "sh", "-c", f'cp -a /etc/. {etc} && mount --bind {etc} /etc && exec "$@"', "sh"]
    with vm_fleet(tmp_path, ["h0"], before={"h0": own}) as made:
        yield made


def test_names_come_into_the_file_and_go_with_their_vms(fleet: LocalFleet, etc: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    before, here = (etc / "hosts").read_text(), Path("/etc/hosts").read_text()
    spawned(fleet.session, infra_text(["h0"], 2), kernel)
    assert (etc / "hosts").read_text() == before, "nobody asked for it yet"

    results = [one for one in fleet.session.send_names(in_etc_hosts=True) if isinstance(one, Result)]
    assert all(one.ok for one in results), results
    lines = (etc / "hosts").read_text().splitlines()
    assert {"198.18.0.1\tvm00000", "198.18.0.2\tvm00001"} <= set(lines)

    list(fleet.session.destroy_vms(DEPLOYMENT, ["vm00000"]))
    wait_until(lambda: "vm00000" not in (etc / "hosts").read_text(), DEADLINE_S, "the name to go")
    assert "198.18.0.2\tvm00001" in (etc / "hosts").read_text()

    list(fleet.session.send_names(in_etc_hosts=False))
    assert (etc / "hosts").read_text() == before
    assert Path("/etc/hosts").read_text() == here
