"""What is on record of VMs: where each is, its address, and what it was made of. A part of the fleet's database.

A VM is put on record, with its address, before its host is asked to make it, and forgotten when its host has said that
it is gone; so an address is never free while a VM may have it, whatever is killed in between.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from controller.on_record import Capacity, Image, Move, Vm
from protocol.vms import VmSpec

SCHEMA = """
create table if not exists vms (
    deployment text not null, name text not null, host text not null, ip text not null unique, mac text not null,
    vcpus integer not null, memory_mib integer not null, cpu integer not null default 0, spec blob,
    primary key (deployment, name)) strict;
create table if not exists capacities (
    host text primary key, cpus integer not null, cpu integer not null, memory_mib integer not null) strict;
create table if not exists images (
    digest text primary key, name text not null, size integer not null, format text not null,
    added_ms integer not null) strict;
create table if not exists moves (
    deployment text not null, name text not null, uuid text not null, source text not null, target text not null,
    primary key (deployment, name)) strict;
create table if not exists disowned (
    deployment text not null, name text not null, host text not null, primary key (deployment, name, host)) strict;
"""


_decode_spec = msgspec.msgpack.Decoder(VmSpec).decode


class VmRecords:
    """The VMs of a fleet's database, which `controller.state.State` opens."""

    _db: sqlite3.Connection

    def _upgrade_vms(self) -> None:
        """A database of schema 1 had no demand and no specification of a VM."""
        columns = {row[1] for row in self._db.execute("pragma table_info(vms)")}
        if "cpu" not in columns:
            self._db.execute("alter table vms add column cpu integer not null default 0")
            self._db.execute("alter table vms add column spec blob")

    def vms(self, deployment: str | None = None) -> list[Vm]:
        """All VMs on record, or a deployment's, in the order in which they were put, without their specifications."""
        rows = self._db.execute(
            "select deployment, name, host, ip, mac, vcpus, memory_mib, cpu from vms"
            " where ?1 is null or deployment = ?1 order by rowid",
            (deployment,),
        )
        return [
            Vm(
                deployment=row[0],
                name=row[1],
                host=row[2],
                ip=row[3],
                mac=row[4],
                vcpus=row[5],
                memory_mib=row[6],
                cpu=row[7],
            )
            for row in rows
        ]

    def specs(self, deployment: str | None = None) -> list[VmSpec]:
        """What VMs were made of, of those whose hosts have said that they made them so."""
        rows = self._db.execute(
            "select spec from vms where spec is not null and (?1 is null or deployment = ?1) order by rowid",
            (deployment,),
        )
        return [_decode_spec(row[0]) for row in rows]

    def put_vms(self, vms: Sequence[Vm]) -> list[str]:
        """Keep VMs, all or none. Returns what stands against it: addresses that other VMs have.

        What a VM on record was made of, and its size, stay until its host has said otherwise (`vms_made`).
        """
        try:
            with self._db:
                self._db.execute("begin immediate")
                self._db.executemany(
                    "insert into vms (deployment, name, host, ip, mac, vcpus, memory_mib, cpu)"
                    " values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (deployment, name) do update set"
                    " host = excluded.host, ip = excluded.ip, mac = excluded.mac, cpu = excluded.cpu",
                    [(vm.deployment, vm.name, vm.host, vm.ip, vm.mac, vm.vcpus, vm.memory_mib, vm.cpu) for vm in vms],
                )
        except sqlite3.IntegrityError:
            wanted = {vm.ip: vm for vm in vms}
            return [
                f"{vm.ip} for {wanted[vm.ip].name} is {vm.name}'s of {vm.deployment}"
                for vm in self.vms()
                if vm.ip in wanted and (vm.deployment, vm.name) != (wanted[vm.ip].deployment, wanted[vm.ip].name)
            ] or ["two VMs of the request have one address"]
        return []

    def move_vm(self, deployment: str, name: str, host: str) -> None:
        """A VM is on another host now."""
        self._db.execute("update vms set host = ? where deployment = ? and name = ?", (host, deployment, name))

    def moves(self) -> list[Move]:
        """VMs that move, or of which nobody knows yet on which of two hosts they are."""
        rows = self._db.execute("select deployment, name, uuid, source, target from moves order by rowid")
        return [Move(deployment=row[0], name=row[1], uuid=row[2], source=row[3], target=row[4]) for row in rows]

    def put_move(self, move: Move) -> None:
        """A VM is about to move."""
        self._db.execute(
            "insert or replace into moves values (?, ?, ?, ?, ?)",
            (move.deployment, move.name, move.uuid, move.source, move.target),
        )

    def end_move(self, move: Move, *, moved: bool) -> None:
        """It is known where a VM is that was to move."""
        with self._db:
            self._db.execute("begin immediate")
            self._db.execute("delete from moves where deployment = ? and name = ?", (move.deployment, move.name))
            if moved:
                self.move_vm(move.deployment, move.name, move.target)

    def _vms_gone(self, gone: Iterable[tuple[str, str, str]]) -> None:
        keys = list(gone)
        self._db.executemany("delete from vms where deployment = ? and name = ? and host = ?", keys)
        self._db.executemany("delete from disowned where deployment = ? and name = ? and host = ?", keys)

    def _vms_made(self, specs: Iterable[VmSpec]) -> None:
        self._db.executemany(
            "update vms set spec = ?, vcpus = ?, memory_mib = ? where deployment = ? and name = ?",
            [(msgspec.msgpack.encode(spec), spec.vcpus, spec.memory_mib, spec.deployment, spec.name) for spec in specs],
        )

    # --- VMs that were given up ---------------------------------------------------------------------------------------

    def disown(self, vms: Iterable[Vm]) -> None:
        """Forget VMs whose host can't be asked. It is told to remove them when it comes back."""
        with self._db:
            self._db.execute("begin immediate")
            keys = [(vm.deployment, vm.name, vm.host) for vm in vms]
            self._db.executemany("insert or ignore into disowned values (?, ?, ?)", keys)
            self._db.executemany("delete from vms where deployment = ? and name = ?", [key[:2] for key in keys])

    def disowned(self, host: str) -> dict[str, list[str]]:
        """The VMs that a host is to remove, by deployment."""
        found: dict[str, list[str]] = {}
        rows = self._db.execute("select deployment, name from disowned where host = ? order by 1, 2", (host,))
        for deployment, name in rows:
            found.setdefault(deployment, []).append(name)
        return found

    def disowned_hosts(self) -> set[str]:
        """The hosts that are to remove VMs."""
        return {row[0] for row in self._db.execute("select distinct host from disowned")}

    # --- images -------------------------------------------------------------------------------------------------------

    def images(self) -> list[Image]:
        """The images on record, in the order in which they were added."""
        rows = self._db.execute("select digest, name, size, format, added_ms from images order by rowid")
        return [Image(digest=row[0], name=row[1], size=row[2], format=row[3], added_ms=row[4]) for row in rows]

    def put_image(self, image: Image) -> None:
        """Keep an image, under its latest name."""
        self._db.execute(
            "insert into images values (?, ?, ?, ?, ?) on conflict (digest) do update set name = excluded.name",
            (image.digest, image.name, image.size, image.format, image.added_ms),
        )

    def drop_images(self, digests: Iterable[str]) -> None:
        """Forget images."""
        self._db.executemany("delete from images where digest = ?", [(digest,) for digest in digests])

    # --- hosts as files declare them ----------------------------------------------------------------------------------

    def capacities(self) -> dict[str, Capacity]:
        """What the last infra.conf that named a host said of it."""
        rows = self._db.execute("select host, cpus, cpu, memory_mib from capacities order by rowid")
        return {row[0]: Capacity(cpus=row[1], cpu=row[2], memory_mib=row[3]) for row in rows}

    def put_capacities(self, capacities: Mapping[str, Capacity]) -> None:
        """Keep what an infra.conf says of its hosts."""
        with self._db:
            self._db.execute("begin immediate")
            self._db.executemany(
                "insert into capacities values (?, ?, ?, ?) on conflict (host) do update set cpus = excluded.cpus,"
                " cpu = excluded.cpu, memory_mib = excluded.memory_mib",
                [(host, had.cpus, had.cpu, had.memory_mib) for host, had in capacities.items()],
            )
