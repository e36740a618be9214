"""The disk that cloud-init reads: its label, its files, and what is filled into user data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from agent.nocloud import SeedError, documents, write_disk
from protocol.vms import Seed, VmSpec

KEY = "ssh-ed25519 AAAA somebody@somewhere"


def a_spec(**changes: Any) -> VmSpec:
    fields: dict[str, Any] = {
        "name": "vm1",
        "uuid": "11111111-2222-4333-8444-555555555555",
        "deployment": "lab",
        "vcpus": 1,
        "memory_mib": 64,
        "mac": "00:16:3E:12:00:05",
        "ip": "198.18.0.5",
        "prefix": 15,
        "gateway": "198.18.0.1",
        "seed": Seed(ssh_keys=(KEY,)),
    }
    return VmSpec(**(fields | changes))


def test_host_name_address_gateway_and_keys_are_told() -> None:
    files = documents(a_spec(), None, "h1")
    assert json.loads(files["meta-data"]) == {
        "instance-id": a_spec().uuid,
        "local-hostname": "vm1",
        "public-keys": [KEY],
    }
    assert json.loads(files["network-config"])["ethernets"]["eth0"] == {
        "set-name": "eth0",
        "match": {"macaddress": "00:16:3e:12:00:05"},
        "addresses": ["198.18.0.5/15"],
        "routes": [{"to": "0.0.0.0/0", "via": "198.18.0.1"}],
    }
    assert files["user-data"].startswith(b"#cloud-config\n")


def test_a_vm_without_gateway_and_keys_is_told_of_none() -> None:
    files = documents(a_spec(gateway=None, seed=Seed()), None, "h1")
    assert "public-keys" not in json.loads(files["meta-data"])
    assert b"routes" not in files["network-config"]


def test_names_are_filled_into_user_data_and_those_of_shells_stay() -> None:
    template = b"#!/bin/sh\necho $name ${ip}/$prefix via $gateway on $host of $deployment as $mac, $HOME $$\n"
    assert documents(a_spec(), template, "h1")["user-data"] == (
        b"#!/bin/sh\necho vm1 198.18.0.5/15 via 198.18.0.1 on h1 of lab as 00:16:3E:12:00:05, $HOME $\n"
    )


def test_user_data_that_is_no_text_is_refused() -> None:
    with pytest.raises(SeedError, match="no text"):
        documents(a_spec(), b"\xff\xfe", "h1")


def test_the_disk_has_the_label_and_the_files_that_cloud_init_looks_for(tmp_path: Path) -> None:
    files = documents(a_spec(), b"x" * 100_000, "h1")
    write_disk(files, tmp_path / "seed.iso")
    image = pycdlib.PyCdlib()
    image.open(str(tmp_path / "seed.iso"))
    try:
        assert image.pvd.volume_identifier.strip() == b"cidata"
        for view in ("rr_path", "joliet_path"):
            for name, data in files.items():
                found = io.BytesIO()
                image.get_file_from_iso_fp(found, **{view: f"/{name}"})
                assert found.getvalue() == data
    finally:
        image.close()
