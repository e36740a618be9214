"""What a fleet's service must still know after it was stopped: hosts, deployments, jobs. One SQLite file in WAL mode.

Everything else about the fleet can be asked of the agents again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

_SCHEMA = """
create table if not exists meta (key text primary key, value text not null) strict;
create table if not exists hosts (
    rank integer primary key, name text not null unique, site text not null, address text not null,
    control_port integer not null, bulk_port integer not null, key blob not null unique, parent integer,
    digest text not null, facts text not null, member integer not null default 1) strict;
create table if not exists vms (
    deployment text not null, name text not null, host text not null, ip text not null unique, mac text not null,
    vcpus integer not null, memory_mib integer not null, primary key (deployment, name)) strict;
create table if not exists jobs (
    id integer primary key, uid integer not null, what text not null, targets blob not null,
    issued_ms integer not null, settled_ms integer) strict;
create table if not exists outcomes (job integer not null, ranks blob not null, outcome text not null) strict;
create index if not exists outcomes_of_job on outcomes (job);
"""
_SCHEMA_VERSION = 1
#: Command numbers are taken from the database in blocks, so that a command costs no write for its number.
_ID_BLOCK = 1_000


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A member, or one that was and may come back under its old rank. `parent` is its planned parent's rank."""

    rank: int
    name: str
    site: str
    address: str
    control_port: int
    bulk_port: int
    key: bytes
    parent: int | None
    digest: str
    facts: dict[str, str]
    member: bool = True


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM on record."""

    deployment: str
    name: str
    host: str
    ip: str
    mac: str
    vcpus: int
    memory_mib: int


class State:
    """The database of one fleet."""

    def __init__(self, path: Path) -> None:
        """Opens it, making it where it is not there. Raises RuntimeError for one of a newer schema."""
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > _SCHEMA_VERSION:
            raise RuntimeError(f"{path} was written by a newer Canopy (schema {version}): upgrade this one")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"pragma user_version={_SCHEMA_VERSION}")
        self._next_id = self._ids_up_to = int(self.meta("next_id", "1"))

    def close(self) -> None:
        """Close it."""
        self._db.close()

    # --- single values ------------------------------------------------------------------------------------------------

    def meta(self, key: str, default: str) -> str:
        """A single value."""
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        return default if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Keep a single value."""
        self._db.execute("insert or replace into meta values (?, ?)", (key, value))

    def new_id(self) -> int:
        """A number that no command of this fleet had before, also over restarts."""
        if self._next_id >= self._ids_up_to:
            self._ids_up_to = self._next_id + _ID_BLOCK
            self.set_meta("next_id", str(self._ids_up_to))
        self._next_id += 1
        return self._next_id - 1

    # --- hosts --------------------------------------------------------------------------------------------------------

    def hosts(self) -> list[Host]:
        """All hosts, those that left as well, in order of rank."""
        rows = self._db.execute(
            "select rank, name, site, address, control_port, bulk_port, key, parent, digest, facts, member"
            " from hosts order by rank"
        )
        return [
            Host(
                rank=row[0],
                name=row[1],
                site=row[2],
                address=row[3],
                control_port=row[4],
                bulk_port=row[5],
                key=row[6],
                parent=row[7],
                digest=row[8],
                facts=msgspec.json.decode(row[9], type=dict[str, str]),
                member=bool(row[10]),
            )
            for row in rows
        ]

    def put_host(self, host: Host) -> None:
        """Keep a host."""
        facts = msgspec.json.encode(host.facts).decode()
        self._db.execute(
            "insert or replace into hosts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                host.rank,
                host.name,
                host.site,
                host.address,
                host.control_port,
                host.bulk_port,
                host.key,
                host.parent,
                host.digest,
                facts,
                int(host.member),
            ),
        )

    # --- VMs ----------------------------------------------------------------------------------------------------------

    def vms(self) -> list[Vm]:
        """All VMs on record, in the order in which they were put."""
        rows = self._db.execute("select deployment, name, host, ip, mac, vcpus, memory_mib from vms order by rowid")
        return [
            Vm(deployment=row[0], name=row[1], host=row[2], ip=row[3], mac=row[4], vcpus=row[5], memory_mib=row[6])
            for row in rows
        ]

    def put_vms(self, vms: Sequence[Vm]) -> list[str]:
        """Keep VMs, all or none. Returns what stands against it: addresses that other VMs have."""
        try:
            with self._db:
                self._db.execute("begin immediate")
                self._db.executemany(
                    "insert into vms values (?, ?, ?, ?, ?, ?, ?) on conflict (deployment, name) do update set"
                    " host = excluded.host, ip = excluded.ip, mac = excluded.mac, vcpus = excluded.vcpus,"
                    " memory_mib = excluded.memory_mib",
                    [(vm.deployment, vm.name, vm.host, vm.ip, vm.mac, vm.vcpus, vm.memory_mib) for vm in vms],
                )
        except sqlite3.IntegrityError:
            wanted = {vm.ip: vm for vm in vms}
            return [
                f"{vm.ip} for {wanted[vm.ip].name} is {vm.name}'s of {vm.deployment}"
                for vm in self.vms()
                if vm.ip in wanted and (vm.deployment, vm.name) != (wanted[vm.ip].deployment, wanted[vm.ip].name)
            ] or ["two VMs of the request have one address"]
        return []

    def drop_vms(self, deployment: str, names: Iterable[str]) -> None:
        """Forget VMs, which frees their addresses."""
        with self._db:
            self._db.execute("begin immediate")
            self._db.executemany(
                "delete from vms where deployment = ? and name = ?", [(deployment, name) for name in names]
            )

    # --- jobs: who ran what, where, when, and what came of it
    # ------------------------------------------------------------

    def job_begins(self, id_: int, uid: int, what: str, targets: bytes, issued_ms: int) -> None:
        """A command is about to be given."""
        self._db.execute("insert into jobs values (?, ?, ?, ?, ?, null)", (id_, uid, what, targets, issued_ms))

    def job_outcomes(self, id_: int, folds: Iterable[tuple[bytes, str]]) -> None:
        """Outcomes came: packed ranks, and the outcome in words."""
        self._db.executemany("insert into outcomes values (?, ?, ?)", [(id_, who, what) for who, what in folds])

    def job_settles(self, id_: int, settled_ms: int) -> None:
        """Every target has its outcome."""
        self._db.execute("update jobs set settled_ms = ? where id = ?", (settled_ms, id_))
