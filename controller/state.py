"""What a fleet's service must still know after it was stopped: hosts, deployments, jobs. One SQLite file in WAL mode.

Everything else about the fleet can be asked of the agents again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from controller import vm_records
from controller.rolling import Roll
from controller.status import CtlError
from controller.vm_records import VmRecords
from protocol import ranks
from protocol.limits import MAX_BITMAP, MAX_TEXT
from protocol.messages import Deliver
from protocol.outcomes import Fold, Lost
from protocol.vms import VmSpec

_SCHEMA = """
create table if not exists meta (key text primary key, value text not null) strict;
create table if not exists hosts (
    rank integer primary key, name text not null unique, site text not null, address text not null,
    control_port integer not null, bulk_port integer not null, key blob not null unique, parent integer,
    digest text not null, facts text not null, member integer not null default 1,
    incarnation integer not null default 0) strict;
create table if not exists starts (rank integer primary key, command integer not null) strict;
create table if not exists labels (
    host text not null, key text not null, value text not null, primary key (host, key)) strict;
create table if not exists commands (
    id integer primary key, job integer not null, uid integer not null, what text not null, delivery blob not null,
    issued_ms integer not null, deadline_ms integer, settled_ms integer) strict;
create index if not exists commands_of_job on commands (job);
create table if not exists rolls (job integer primary key, roll blob not null) strict;
create table if not exists outcomes (command integer not null, fold blob not null) strict;
create index if not exists outcomes_of_command on outcomes (command);
create table if not exists late (command integer not null, fold blob not null) strict;
create index if not exists late_of_command on late (command);
create table if not exists pulled (command integer not null, fold blob not null) strict;
create index if not exists pulled_of_command on pulled (command);
"""
_SCHEMA_VERSION = 2
#: Command numbers are taken from the database in blocks, so that a command costs no write for its number.
_ID_BLOCK = 1_000


#: An outcome that was lost has a set of ranks, a sentence (four bytes a character at most), and little else.
_LONGEST_LOST = MAX_BITMAP + 4 * MAX_TEXT + 256
#: Outcomes that are read to find lost ones: some milliseconds.
_LOOKED_AT = 2_000


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


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it was given: one of `job`'s. Times are by the root's clock, in ms; `settled_ms` None while it
    runs."""

    id: int
    job: int
    uid: int
    what: str
    delivery: Deliver
    issued_ms: int
    deadline_ms: int | None
    settled_ms: int | None


class State(VmRecords):
    """The database of one fleet."""

    def __init__(self, path: Path) -> None:
        """Opens it, making it where it is not there. Raises RuntimeError for one of a newer schema."""
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > _SCHEMA_VERSION:
            raise RuntimeError(f"{path} was written by a newer Canopy (schema {version}): upgrade this one")
        self._db.executescript(_SCHEMA + vm_records.SCHEMA)
        self._upgrade_vms()
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
            "insert into hosts (rank, name, site, address, control_port, bulk_port, key, parent, digest, facts, member)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) on conflict (rank) do update set name = excluded.name,"
            " site = excluded.site, address = excluded.address, control_port = excluded.control_port,"
            " bulk_port = excluded.bulk_port, key = excluded.key, parent = excluded.parent, digest = excluded.digest,"
            " facts = excluded.facts, member = excluded.member",
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

    def labels(self) -> dict[str, dict[str, str]]:
        """The labels of each host that has any."""
        found: dict[str, dict[str, str]] = {}
        for host, key, value in self._db.execute("select host, key, value from labels order by host, key"):
            found.setdefault(host, {})[key] = value
        return found

    def set_labels(self, hosts: Iterable[str], put: Mapping[str, str], drop: Iterable[str]) -> None:
        """Give hosts labels and take others away, all or none."""
        names, gone = list(hosts), list(drop)
        with self._db:
            self._db.execute("begin immediate")
            self._db.executemany(
                "delete from labels where host = ? and key = ?", [(name, key) for name in names for key in gone]
            )
            self._db.executemany(
                "insert or replace into labels values (?, ?, ?)",
                [(name, key, value) for name in names for key, value in put.items()],
            )

    # --- incarnations -------------------------------------------------------------------------------------------------

    def incarnations(self) -> dict[int, int]:
        """The last known incarnation of each host's agent."""
        return dict(self._db.execute("select rank, incarnation from hosts where incarnation > 0"))

    def put_incarnations(self, known: dict[int, int]) -> None:
        """Keep them: after a restart of the service, an agent with a higher one has forgotten what it was given.

        With each that is new goes the number of the latest command: what was given up to then, its predecessor may
        have begun.
        """
        latest = self._next_id - 1
        with self._db:
            self._db.execute("begin immediate")
            self._db.executemany(
                "insert or replace into starts select rank, ? from hosts where rank = ? and incarnation < ?",
                [(latest, rank, number) for rank, number in known.items()],
            )
            self._db.executemany(
                "update hosts set incarnation = ? where rank = ?", [(number, rank) for rank, number in known.items()]
            )

    def starts(self) -> dict[int, int]:
        """The latest command that had been given when each host's agent was first heard of, by rank."""
        return dict(self._db.execute("select rank, command from starts"))

    # --- commands: who ran what, where, when, and what came of it
    # -------------------------------------------------------

    def command_begins(self, record: Record) -> None:
        """A command is about to be given."""
        self._db.execute(
            "insert into commands values (?, ?, ?, ?, ?, ?, ?, null)",
            (
                record.id,
                record.job,
                record.uid,
                record.what,
                msgspec.msgpack.encode(record.delivery),
                record.issued_ms,
                record.deadline_ms,
            ),
        )

    def command_outcomes(
        self, id_: int, folds: Iterable[Fold], *, made: Iterable[VmSpec] = (), gone: Iterable[tuple[str, str, str]] = ()
    ) -> list[int]:
        """Outcomes came, and with them the word that VMs are as specified (`made`), or gone (`gone`: deployment,
        name and host), which frees their addresses. All of it or nothing is kept. Returns the numbers under which
        `outcome` finds them."""
        with self._db:
            self._db.execute("begin")
            rows = [
                self._db.execute("insert into outcomes values (?, ?)", (id_, msgspec.msgpack.encode(fold))).lastrowid
                for fold in folds
            ]
            self._vms_made(made)
            self._vms_gone(gone)
        return [row for row in rows if row is not None]

    def command_settles(self, id_: int, settled_ms: int) -> None:
        """Every target has its outcome."""
        self._db.execute("update commands set settled_ms = ? where id = ?", (settled_ms, id_))

    def make_durable(self) -> None:
        """Bring all that was kept to the disk itself, so that agents may forget what is on record here."""
        self._db.execute("pragma wal_checkpoint(full)")

    def open_commands(self) -> list[Record]:
        """Commands that were given and are not settled."""
        return self._records("where settled_ms is null order by id")

    def commands_of(self, job: int) -> list[Record]:
        """The commands of one job, in order."""
        return self._records("where job = ? order by id", job)

    def latest_jobs(self, count: int) -> list[int]:
        """The numbers of the latest jobs, newest first."""
        rows = self._db.execute("select distinct job from commands order by job desc limit ?", (count,))
        return [row[0] for row in rows]

    def put_roll(self, roll: Roll) -> None:
        """Keep rolling work for as long as it goes on."""
        self._db.execute("insert or replace into rolls values (?, ?)", (roll.job, msgspec.msgpack.encode(roll)))

    def rolls(self) -> list[Roll]:
        """The rolling work that goes on."""
        rows = self._db.execute("select roll from rolls order by job")
        return [msgspec.msgpack.decode(row[0], type=Roll) for row in rows]

    def roll(self, job: int) -> Roll | None:
        """Rolling work that goes on, by its number."""
        return next((roll for roll in self.rolls() if roll.job == job), None)

    def stop_roll(self, job: int) -> None:
        """Let no more hosts begin, also after a restart."""
        roll = self.roll(job)
        if roll is not None:
            self.put_roll(msgspec.structs.replace(roll, stopped=True))

    def drop_roll(self, job: int) -> None:
        """It is over."""
        self._db.execute("delete from rolls where job = ?", (job,))

    def _records(self, condition: str, *values: int) -> list[Record]:
        rows = self._db.execute(
            "select id, job, uid, what, delivery, issued_ms, deadline_ms, settled_ms from commands " + condition,  # noqa: S608  ours
            values,
        )
        return [
            Record(
                id=row[0],
                job=row[1],
                uid=row[2],
                what=row[3],
                delivery=msgspec.msgpack.decode(row[4], type=Deliver),
                issued_ms=row[5],
                deadline_ms=row[6],
                settled_ms=row[7],
            )
            for row in rows
        ]

    def outcomes_of(self, id_: int) -> Iterator[Fold]:
        """What is on record of a command's outcomes, in the order in which they came, one at a time: all at once may be
        a gigabyte."""
        for row in self.outcome_rows(id_):
            yield self.outcome(row)

    def outcome_rows(self, id_: int) -> list[int]:
        """The numbers of a command's outcomes, in the order in which they came."""
        rows = self._db.execute("select rowid from outcomes where command = ? order by rowid", (id_,))
        return [row[0] for row in rows]

    def outcome(self, row: int) -> Fold:
        """One outcome. Raises CtlError where it is on record no more."""
        return self._fold("outcomes", row)

    def _fold(self, table: str, row: int) -> Fold:
        found = self._db.execute(f"select fold from {table} where rowid = ?", (row,)).fetchone()  # noqa: S608  ours
        if found is None:
            raise CtlError("this job is so old that its outcomes are on record no more: `ctl jobs` lists what is")
        return msgspec.msgpack.decode(found[0], type=Fold)

    def late_outcomes(self, id_: int, folds: Iterable[Fold]) -> dict[int, Fold]:
        """Hosts answered after their outcome was settled. Returns what of that is kept beside it, by its number on
        record: the first answer of each host that is on record as lost."""
        lost = ranks.NONE
        for (packed,) in self._db.execute(
            "select fold from outcomes where command = ? and length(fold) <= ?", (id_, _LONGEST_LOST)
        ):
            fold = msgspec.msgpack.decode(packed, type=Fold)
            if isinstance(fold.outcome, Lost):
                lost |= ranks.unpack(fold.ranks)
        for row in self.late_rows(id_) if lost else ():
            lost &= ~ranks.unpack(self.late(row).ranks)
        news = {}
        for fold in folds:
            fresh = ranks.unpack(fold.ranks) & lost
            lost &= ~fresh
            if fresh:
                kept = msgspec.structs.replace(fold, ranks=ranks.pack(fresh))
                values = id_, msgspec.msgpack.encode(kept)
                number = self._db.execute("insert into late values (?, ?)", values).lastrowid
                if number is not None:
                    news[number] = kept
        return news

    def late_rows(self, id_: int) -> list[int]:
        """The numbers of what hosts answered to a command after they were settled as lost, in the order in which it
        came."""
        rows = self._db.execute("select rowid from late where command = ? order by rowid", (id_,))
        return [row[0] for row in rows]

    def late(self, row: int) -> Fold:
        """One such answer. Raises CtlError where it is on record no more."""
        return self._fold("late", row)

    def put_pulled(self, id_: int, fold: Fold) -> None:
        """What came of a pull at some hosts; `id_` is its Offer's."""
        self._db.execute("insert into pulled values (?, ?)", (id_, msgspec.msgpack.encode(fold)))

    def pulled(self, id_: int) -> list[Fold]:
        """What came of a pull, in the order in which it came."""
        rows = self._db.execute("select fold from pulled where command = ? order by rowid", (id_,))
        return [msgspec.msgpack.decode(row[0], type=Fold) for row in rows]

    def lost_on(self, rank: int, most: int) -> list[tuple[Record, Lost]]:
        """The latest commands, newest first, whose outcome on a host was lost. At most `most` are looked for among the
        latest _LOOKED_AT outcomes."""
        rows = self._db.execute(
            # A lost outcome has no output. The length of a value is known without reading it.
            "select command, fold from outcomes where length(fold) <= ? order by rowid desc limit ?",
            (_LONGEST_LOST, _LOOKED_AT),
        )
        found: list[tuple[Record, Lost]] = []
        for command, data in rows:
            fold = msgspec.msgpack.decode(data, type=Fold)
            if isinstance(fold.outcome, Lost) and ranks.holds(ranks.unpack(fold.ranks), rank):
                found += [(record, fold.outcome) for record in self._records("where id = ?", command)]
                if len(found) == most:
                    break
        return found

    def prune_jobs(self, keep: int) -> None:
        """Forget all but the latest `keep` jobs that are settled."""
        with self._db:
            self._db.execute("begin immediate")
            self._db.execute(
                "delete from commands where settled_ms is not null and job not in"
                " (select distinct job from commands order by job desc limit ?)",
                (keep,),
            )
            self._db.execute("delete from outcomes where command not in (select id from commands)")
            self._db.execute("delete from late where command not in (select id from commands)")
            self._db.execute("delete from pulled where command not in (select id from commands)")
