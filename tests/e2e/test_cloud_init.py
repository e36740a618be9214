"""What cloud-init itself makes of a VM's NoCloud disk: Debian's own, unpacked and not installed."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from agent.nocloud import documents, write_disk
from deploy.guest import GuestError, default_cache, package
from protocol.vms import Seed
from tests.e2e.vm_host import PYTHON, a_spec

READER = Path(__file__).with_name("cloud_init.py")
#: cloud-init, and what its data source imports: 1.5 MB.
PACKAGES = (
    *("cloud-init", "python3-certifi", "python3-chardet", "python3-configobj", "python3-idna", "python3-jinja2"),
    *("python3-markupsafe", "python3-netifaces", "python3-requests", "python3-six", "python3-urllib3", "python3-yaml"),
)
KEY = "ssh-ed25519 AAAA somebody@somewhere"
USER_DATA = b"#cloud-config\nfqdn: $name.lab\nruncmd: [[echo, $ip on $host, $HOME]]\n"


@pytest.fixture(scope="module")
def cloud_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Python finds it."""
    cache = default_cache() / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    root = tmp_path_factory.mktemp("system")
    try:
        for name in PACKAGES:
            subprocess.run(["dpkg", "-x", package(name, cache), root], check=True)
    except (GuestError, FileNotFoundError) as error:
        pytest.skip(f"no Debian package of cloud-init is to be had here: {error}")
    return root / "usr/lib/python3/dist-packages"


def as_read(disk: Path, into: Path) -> None:
    """The files of a disk."""
    image = pycdlib.PyCdlib()
    image.open(str(disk))
    into.mkdir()
    try:
        for name in ("meta-data", "network-config", "user-data"):
            found = io.BytesIO()
            image.get_file_from_iso_fp(found, rr_path=f"/{name}")
            (into / name).write_bytes(found.getvalue())
    finally:
        image.close()


@pytest.mark.parametrize("gateway", ["198.18.0.1", None])
def test_cloud_init_finds_host_name_keys_user_data_and_an_address_on_the_right_interface(
    cloud_init: Path, tmp_path: Path, gateway: str | None
) -> None:
    spec = a_spec("web-1", "198.18.0.5", ("", ""), bridge=None)
    fields = {key: getattr(spec, key) for key in spec.__struct_fields__}
    spec = type(spec)(**{**fields, "gateway": gateway, "seed": Seed(ssh_keys=(KEY,))})
    write_disk(documents(spec, USER_DATA, "h7"), tmp_path / "seed.iso")
    as_read(tmp_path / "seed.iso", tmp_path / "seed")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [PYTHON, READER, tmp_path / "seed", tmp_path / "work"],
        env={"PYTHONPATH": str(cloud_init), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["instance"], told["host"], told["keys"]) == (spec.uuid, "web-1", [KEY])
    assert told["config"] == {"fqdn": "web-1.lab", "runcmd": [["echo", "198.18.0.5 on h7", "$HOME"]]}
    # The interface is known by its MAC, and has the name that the others go by.
    assert [[mac, name] for mac, name, *_ in told["renames"]] == [[spec.mac.lower(), "eth0"]]
    for line in ("Address=198.18.0.5/15", f"MACAddress={spec.mac.lower()}", "Name=eth0"):
        assert line in told["networkd"].splitlines()
    assert "iface eth0 inet static" in told["ifupdown"]
    assert "address 198.18.0.5/15" in told["ifupdown"]
    assert "set-name: eth0" in told["netplan"]
    for renderer in ("networkd", "ifupdown", "netplan"):
        assert ("198.18.0.1" in told[renderer]) == (gateway is not None)
