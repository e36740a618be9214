"""A VM's NoCloud disk, which cloud-init reads at the first boot: host name, address, keys, user data.

Files and label are those of https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html; the
network is in version 2 of https://cloudinit.readthedocs.io/en/latest/reference/network-config-format-v2.html. Both
are YAML, of which JSON is a part.
"""

from __future__ import annotations

import io
from pathlib import Path
from string import Template

import msgspec

from protocol.vms import VmSpec

_LABEL = "cidata"
#: What the VM's one interface is called, whatever the guest's system would call it.
_INTERFACE = "eth0"
#: What cloud-init takes for user data that asks for nothing.
_NOTHING = b"#cloud-config\n{}\n"


class SeedError(Exception):
    """The disk can't be made; the text says why and what to do."""


def documents(spec: VmSpec, template: bytes | None, host: str) -> dict[str, bytes]:
    """The files of a VM's NoCloud disk, by name. `template` is its user data before the names are filled in, None for
    none; `host` is the name of its host. Pure. Raises SeedError."""
    address: dict[str, object] = {
        "match": {"macaddress": spec.mac.lower()},
        # Without a name to set, the renderers for networkd and ifupdown take the key for the name that there is.
        "set-name": _INTERFACE,
        "addresses": [f"{spec.ip}/{spec.prefix}"],
    }
    if spec.gateway is not None:
        address["routes"] = [{"to": "0.0.0.0/0", "via": spec.gateway}]
    meta: dict[str, object] = {"instance-id": spec.uuid, "local-hostname": spec.name}
    if spec.seed is not None and spec.seed.ssh_keys:
        meta["public-keys"] = list(spec.seed.ssh_keys)
    return {
        "meta-data": msgspec.json.encode(meta),
        "network-config": msgspec.json.encode({"version": 2, "ethernets": {_INTERFACE: address}}),
        "user-data": _NOTHING if template is None else _filled(template, spec, host),
    }


def _filled(template: bytes, spec: VmSpec, host: str) -> bytes:
    try:
        text = template.decode()
    except UnicodeDecodeError as error:
        raise SeedError(f"the user data is no text: {error.reason} at byte {error.start}") from None
    # Shells have names of their own: what is not known here stays as it is.
    return (
        Template(text)
        .safe_substitute(
            name=spec.name,
            ip=spec.ip,
            prefix=str(spec.prefix),
            gateway=spec.gateway or "",
            mac=spec.mac,
            deployment=spec.deployment,
            host=host,
        )
        .encode()
    )


def write_disk(files: dict[str, bytes], path: Path) -> None:
    """Write an ISO 9660 image with these files and cloud-init's label. Blocks. Raises SeedError, OSError."""
    try:
        import pycdlib
    except ImportError as error:
        raise SeedError(f"VMs with a seed need pycdlib, and `import pycdlib` says: {error}") from error
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, vol_ident=_LABEL, joliet=3, rock_ridge="1.09")
    try:
        for number, (name, data) in enumerate(sorted(files.items())):
            # Rock Ridge has the true name; ISO 9660's own has no dash and no lower case.
            image.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
        image.write(str(path))
    finally:
        image.close()
