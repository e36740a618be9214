"""What the service keeps of VMs, images and hosts' sizes, and tells of them. Pure data."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.vms import VmSpec


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM on record. `cpu` is its demand in hundredths of a CPU, as far as its file told. `spec` is what its host made
    it of, None until the host has said that it did."""

    deployment: str
    name: str
    host: str
    ip: str
    mac: str
    vcpus: int
    memory_mib: int
    cpu: int = 0
    spec: VmSpec | None = None


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that moves from one host to another, by their names."""

    deployment: str
    name: str
    uuid: str
    source: str
    target: str


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """A host as an infra.conf declares it: `cpu` in hundredths of a CPU, memory in MiB."""

    cpus: int
    cpu: int
    memory_mib: int


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was pushed to hosts. `added_ms` by the root's clock."""

    digest: str
    name: str
    size: int
    format: Literal["qcow2", "raw"]
    added_ms: int
