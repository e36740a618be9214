"""Base images over a fleet: brought, listed, read again, kept as long as a VM is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import cli
from controller.spawn_images import image_digest
from controller.status import ExitStatus
from tests.net.localfleet import FLEET, LocalFleet
from tests.net.vmfleet import DEPLOYMENT, infra_text, spawned, vm_fleet

pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with vm_fleet(tmp_path_factory.mktemp("images"), ["h0", "h1", "h2"]) as made:
        yield made


class Ctl:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str, status: int = ExitStatus.OK) -> str:
        self._capfd.readouterr()
        found = cli.run(["--fleet", FLEET, *arguments])
        out, err = self._capfd.readouterr()
        assert found == status, (out, err)
        return out + err


@pytest.fixture
def ctl(capfd: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(capfd)


def test_an_images_life(fleet: LocalFleet, ctl: Ctl, tmp_path: Path) -> None:
    kernel, other = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"kernel" * 50_000)
    other.write_bytes(b"initrd")
    (tmp_path / ".hidden").write_bytes(b"no image")
    ctl("image", "add", str(tmp_path))
    digest = image_digest(kernel)
    listed = {one["name"]: one for one in json.loads(ctl("image", "ls", "--json"))}
    assert set(listed) == {"vmlinuz", "initrd"}
    assert (listed["vmlinuz"]["digest"], set(listed["vmlinuz"]["hosts"])) == (digest, {"h0", "h1", "h2"})

    # By its name, without the file.
    spawned(fleet.session, infra_text(["h0", "h1"], 2), Path("vmlinuz"))
    assert "in use, and nothing was removed" in ctl("image", "rm", "initrd", "vmlinuz", status=ExitStatus.FAILED)
    assert {one["name"]: one["vms"] for one in json.loads(ctl("image", "ls", "--json"))} == {"vmlinuz": 2, "initrd": 0}
    assert "removed on h[0-2] (3)" in ctl("image", "gc")
    assert set(json.loads(ctl("image", "ls", "--json"))[0]["hosts"]) == {"h0", "h1", "h2"}

    stored = fleet.directory("h1").images / digest
    stored.chmod(0o644)
    stored.write_bytes(b"changed")
    stored.chmod(0o444)
    assert "its bytes have changed" in ctl("image", "ls", "--verify", status=ExitStatus.FAILED)
    ctl("image", "add", str(kernel))
    assert "right" in ctl("image", "ls", "--verify", "--json")

    # Nothing but the push of an image reaches the store.
    for where in (f"@/images/{digest}", str(stored), f"{stored.parent}/new"):
        results = fleet.session.push(other, where, ["h1"]).results()
        assert "use `ctl image add`" in str(results[0].outcome)

    list(fleet.session.destroy_vms(DEPLOYMENT))
    assert "removed on h[0-2] (3)" in ctl("image", "rm", digest[:8])
    assert json.loads(ctl("image", "ls", "--json")) == []
    assert "no file and no image is named" in ctl("image", "rm", "vmlinuz", status=ExitStatus.USAGE)
