"""A host's settings raised, and put back: `ctl tune` on the host.

Only what agent.tunables lists is written, and only upwards. What was there is in the journal (`tuning` in the agent's
directory) before anything is changed, so that a change that was cut short is taken back by `repair`, and `undo` puts
everything back at any later time. The files that make settings last are written from the journal alone:

/etc/sysctl.d/60-canopy-TAG.conf   read at boot (sysctl.d(5)); an administrator's own, later by name, has the last word
/etc/libvirt/libvirtd.conf         a marked block at its top, for libvirt takes the first of two equal keys

TAG stands for the agent's directory: several fleets may have agents on one host.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from agent.identity import write_atomically
from agent.libvirtd import Daemon, find_daemon, restart
from agent.tunables import JOURNAL, TUNABLES, problems
from protocol.checks import TuneAnswer, Tuned

#: A configuration of libvirt is 20 KiB of comments; one that is larger is none.
_MOST = 1 << 20


class TuneError(Exception):
    """It can't be done; the text says why, and what to do. Nothing is changed unless it says so."""


class Unfit(TuneError):
    """A key is not on the list, or a value out of its bounds."""


class _Missing(TuneError):
    """There is no such directory."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A setting: what it was before anything (None: not set), what it was raised to, what it is being raised to."""

    key: str
    before: int | None
    after: int | None = None
    target: int | None = None


class _Journal(msgspec.Struct, frozen=True, kw_only=True):
    """All that was raised. `made` are configuration files that were not there before."""

    entries: tuple[_Entry, ...] = ()
    undoing: bool = False
    made: tuple[str, ...] = ()


class Tuner:
    """The settings of this host. All of it blocks; one call at a time."""

    def __init__(
        self,
        directory: Path,
        *,
        root: Path = Path("/"),
        daemon: Callable[[Path], Daemon | None] = find_daemon,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`directory` is the agent's. `step` is told of each step once it is done. `root` stands for / in tests."""
        self._journal_file = directory / JOURNAL
        self._owner = str(directory)
        self._root = root
        self._daemon = daemon
        self._step = step
        self._wrote: Path | None = None
        self.tag = f"{zlib.crc32(os.fsencode(directory)):08x}"
        self.file = f"60-canopy-{self.tag}.conf"

    @property
    def in_use(self) -> bool:
        """Whether there is anything to repair or to undo."""
        return self._journal_file.exists()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> tuple[dict[str, int | None], dict[str, str]]:
        """Each setting that there is here, None where it can't be read; and why not, by key."""
        found: dict[str, int | None] = {}
        unread: dict[str, str] = {}
        for key in TUNABLES:
            try:
                value = self._current(key)
            except TuneError as error:
                found[key], unread[key] = None, str(error)
            else:
                if value is not None:
                    found[key] = value
        return found, unread

    def _current(self, key: str) -> int | None:
        """A setting's value; None where there is no such setting here. Raises TuneError."""
        tunable = TUNABLES[key]
        if tunable.place == "libvirt":
            daemon = self._daemon(self._root)
            if daemon is None:
                return None
            value = _option(self._configuration(daemon.conf)[0], tunable.option)
            return tunable.default if value is None else value
        try:
            return int(self._sysctl(key).read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TuneError(f"{key} can't be read: {error.strerror}") from error
        except ValueError as error:
            raise TuneError(f"{key} is no number") from error

    def _sysctl(self, key: str) -> Path:
        return self._root.joinpath("proc", "sys", *TUNABLES[key].path)

    # --- changing -----------------------------------------------------------------------------------------------------

    def apply(self, settings: Mapping[str, int], *, restart_libvirt: bool = False) -> TuneAnswer:
        """Raise settings to at least these values, all or none. Raises TuneError."""
        wrong = problems(dict(settings))
        if wrong:
            raise Unfit("; ".join(wrong))
        self.repair()
        journal = self._load()
        known = {entry.key: entry for entry in journal.entries}
        tuned: list[Tuned] = []
        made = list(journal.made)
        for key in (key for key in TUNABLES if key in settings):
            now = self._current(key)
            if now is None:
                tuned.append(Tuned(key=key, before=None, after=None, note="there is no such setting here"))
                continue
            if now >= settings[key]:
                tuned.append(Tuned(key=key, before=now, after=now))
                continue
            entry = known.get(key)
            # Where somebody else has changed it since, that is what was there.
            if entry is None or entry.after != now:
                entry = _Entry(key=key, before=now)
            known[key] = msgspec.structs.replace(entry, target=settings[key])
            tuned.append(Tuned(key=key, before=now, after=settings[key]))
        changed = [entry for entry in known.values() if entry.target is not None]
        if changed:
            daemon = self._daemon(self._root)
            if daemon is not None and any(TUNABLES[entry.key].place == "libvirt" for entry in changed):
                _, there = self._configuration(daemon.conf)
                if not there and str(daemon.conf) not in made:
                    made.append(str(daemon.conf))
            if any(TUNABLES[entry.key].place == "sysctl" for entry in changed):
                with self._sysctl_d():  # it must be fit to be written before anything is changed
                    pass
            journal = _Journal(entries=tuple(known.values()), made=tuple(made))
            self._save(journal)
            try:
                self._raise(journal)
            except (OSError, TuneError) as error:
                self._roll_back(journal)
                raise TuneError(f"nothing is changed: {_sentence(error)}") from error
        return self._answer(tuned, restart_libvirt=restart_libvirt)

    def _raise(self, journal: _Journal) -> None:
        for entry in journal.entries:
            if entry.target is not None and TUNABLES[entry.key].place == "sysctl":
                self._write_sysctl(entry.key, entry.target)
                if self._current(entry.key) != entry.target:
                    # What it took instead is nobody's wish, and the roll back leaves what is not ours.
                    self._write_sysctl(entry.key, _former(entry))
                    raise TuneError(f"the kernel does not take {entry.target} for {entry.key}")
        settled = tuple(
            msgspec.structs.replace(entry, after=entry.after if entry.target is None else entry.target, target=None)
            for entry in journal.entries
        )
        journal = msgspec.structs.replace(journal, entries=settled)
        self._persist(journal)
        self._save(journal)

    def repair(self) -> None:
        """Take back what was being raised when this process's predecessor ended, or finish putting all back. Raises
        TuneError."""
        if not self.in_use:
            return
        journal = self._load()
        try:
            if journal.undoing:
                self._put_back(journal)
            elif any(entry.target is not None for entry in journal.entries):
                self._roll_back(journal)
        except OSError as error:
            raise TuneError(f"what was being changed can't be put back: {_sentence(error)}") from error

    def _roll_back(self, journal: _Journal) -> None:
        for entry in reversed(journal.entries):
            if entry.target is not None:
                self._restore(entry, _former(entry))
        kept = tuple(
            msgspec.structs.replace(entry, target=None) for entry in journal.entries if entry.after is not None
        )
        journal = msgspec.structs.replace(journal, entries=kept)
        self._persist(journal)
        self._save(journal)

    def undo(self, *, restart_libvirt: bool = False) -> TuneAnswer:
        """Put back all that was raised, but for what somebody else has changed since. Raises TuneError."""
        if not self.in_use:
            return TuneAnswer()
        self.repair()
        journal = self._load()
        tuned = []
        for entry in journal.entries:
            now = self._current(entry.key)
            foreign = now not in (entry.after, entry.before)
            note = "somebody else has changed it since, and it stays" if foreign else ""
            tuned.append(Tuned(key=entry.key, before=now, after=now if foreign else entry.before, note=note))
        try:
            journal = msgspec.structs.replace(journal, undoing=True)
            self._save(journal)
            self._put_back(journal)
        except OSError as error:
            raise TuneError(f"not all could be put back, try again: {_sentence(error)}") from error
        return self._answer(tuned, restart_libvirt=restart_libvirt)

    def _put_back(self, journal: _Journal) -> None:
        for entry in reversed(journal.entries):
            self._restore(entry, entry.before)
        self._persist(msgspec.structs.replace(journal, entries=()))
        self._save(_Journal())

    def _restore(self, entry: _Entry, value: int | None) -> None:
        """A sysctl back to what it was; libvirt's settings go with the block in its configuration."""
        if TUNABLES[entry.key].place != "sysctl" or value is None:
            return
        now = self._current(entry.key)
        if now != value and now is not None and now in (entry.after, entry.target):
            self._write_sysctl(entry.key, value)

    def _write_sysctl(self, key: str, value: int | None) -> None:
        path = self._sysctl(key)
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, f"{value}\n".encode())
        finally:
            os.close(fd)
        self._step(f"{key} = {value}")

    def _answer(self, tuned: list[Tuned], *, restart_libvirt: bool) -> TuneAnswer:
        """What was done, and whether libvirt's daemon has yet to read it. It is restarted where that is wanted."""
        daemon = self._daemon(self._root)
        if daemon is None or not daemon.stale:
            return TuneAnswer(tuned=tuple(tuned))
        # What others wrote is no reason to disturb it.
        if self._wrote != daemon.conf and self._begin not in self._configuration(daemon.conf)[0]:
            return TuneAnswer(tuned=tuple(tuned))
        problem = restart(daemon) if restart_libvirt else ""
        if restart_libvirt and not problem:
            return TuneAnswer(tuned=tuple(tuned))
        if problem:
            problem = f"the settings are changed, and {daemon.name} could not be restarted: {problem}"
        return TuneAnswer(tuned=tuple(tuned), restart=daemon.name, problem=problem)

    # --- the journal --------------------------------------------------------------------------------------------------

    def _load(self) -> _Journal:
        try:
            journal = msgspec.json.decode(self._journal_file.read_bytes(), type=_Journal)
        except FileNotFoundError:
            return _Journal()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TuneError(
                f"{self._journal_file} can't be read, so what was there before is not known: {error}"
            ) from error
        strange = [entry.key for entry in journal.entries if entry.key not in TUNABLES]
        if strange:
            raise TuneError(f"{self._journal_file} is another version's, which could tune {', '.join(strange)}")
        return journal

    def _save(self, journal: _Journal) -> None:
        if journal.entries:
            write_atomically(self._journal_file, msgspec.json.encode(journal))
        else:
            self._journal_file.unlink(missing_ok=True)
        _sync(self._journal_file.parent)
        self._step("journal")

    # --- files that make it last --------------------------------------------------------------------------------------

    def _persist(self, journal: _Journal) -> None:
        """Write both files from what is settled."""
        settled = {entry.key: entry.after for entry in journal.entries if entry.after is not None}
        lines = [f"{key} = {value}\n" for key, value in settled.items() if TUNABLES[key].place == "sysctl"]
        head = f"# Written by the Canopy agent in {self._owner!r}; `ctl tune --undo` takes it away.\n"
        try:
            with self._sysctl_d() as directory:
                if lines:
                    _write_at(directory, self.file, (head + "".join(lines)).encode(), 0o644)
                else:
                    _remove_at(directory, self.file)
                os.fsync(directory)
        except _Missing:
            if lines:
                raise
        self._step("sysctl.d")
        options = {TUNABLES[key].option: value for key, value in settled.items() if TUNABLES[key].place == "libvirt"}
        daemon = self._daemon(self._root)
        if daemon is not None:
            self._configure(daemon.conf, options, made=str(daemon.conf) in journal.made)

    @contextlib.contextmanager
    def _sysctl_d(self) -> Iterator[int]:
        """A descriptor of /etc/sysctl.d, which nobody else may write to. Raises TuneError."""
        with _directory(self._root, "etc", "sysctl.d") as fd:
            yield fd

    @property
    def _begin(self) -> bytes:
        return f"# canopy {self.tag}: begin".encode()

    def _block(self) -> re.Pattern[bytes]:
        tag = self.tag.encode()
        return re.compile(rb"# canopy %b: begin[^\n]*\n(?:[^\n]*\n)*?# canopy %b: end\n" % (tag, tag))

    def _configuration(self, conf: Path) -> tuple[bytes, bool]:
        """libvirt's configuration and whether there is such a file. Raises TuneError."""
        try:
            fd = os.open(self._root / conf, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return b"", False
        except OSError as error:
            raise TuneError(f"/{conf} can't be read: {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise TuneError(f"/{conf} is no configuration of libvirt: it has more than {_MOST} bytes")
        return data, True

    def _configure(self, conf: Path, options: Mapping[str, int], *, made: bool) -> None:
        """Put these options into the block of libvirt's configuration, and nothing else."""
        data, there = self._configuration(conf)
        rest = self._block().sub(b"", data)
        if self._begin in rest:
            raise TuneError(f"/{conf} has Canopy's block without its end: remove it by hand, then try again")
        block = b""
        if options:
            lines = "".join(f"{option} = {value}\n" for option, value in options.items())
            note = "written for `ctl tune`, `ctl tune --undo` takes it away"
            block = b"%b, %b\n%b# canopy %b: end\n" % (self._begin, note.encode(), lines.encode(), self.tag.encode())
        if block + rest == data:
            return
        *folders, name = conf.parts
        with _directory(self._root, *folders) as directory:
            if made and not block + rest:
                _remove_at(directory, name)
            else:
                like = os.stat(name, dir_fd=directory, follow_symlinks=False) if there else None
                _write_at(directory, name, block + rest, 0o600, like)
            os.fsync(directory)
        self._wrote = conf
        self._step("libvirt")


def _former(entry: _Entry) -> int | None:
    """What a setting was before it was being raised."""
    return entry.before if entry.after is None else entry.after


def _option(data: bytes, option: str) -> int | None:
    """A number in libvirt's configuration, of which the first of several counts (libvirt, src/util/virconf.c)."""
    found = re.search(rb"^[ \t]*%b[ \t]*=[ \t]*([0-9]{1,18})[ \t]*(?:#.*)?$" % option.encode(), data, re.M)
    return None if found is None else int(found[1])


@contextlib.contextmanager
def _directory(root: Path, *names: str) -> Iterator[int]:
    """A descriptor of a directory below `root`, reached through no link, that only root or this user may write to.

    Raises TuneError.
    """
    shown = "/" + "/".join(names)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError as error:
                raise _Missing(f"there is no {shown}: make it, then try again") from error
            except NotADirectoryError as error:
                raise TuneError(f"{shown} is a link or no directory: make it one, then try again") from error
            except OSError as error:
                raise TuneError(f"{shown} can't be opened: {error.strerror}") from error
            os.close(fd)
            fd = below
            info = os.fstat(fd)
            if info.st_uid not in (0, os.geteuid()) or stat.S_IMODE(info.st_mode) & 0o022:
                raise TuneError(f"others than root may write to {shown}: mend its owner and mode, then try again")
        yield fd
    finally:
        os.close(fd)


def _write_at(directory: int, name: str, data: bytes, mode: int, like: os.stat_result | None = None) -> None:
    """Replace a file, whole or not at all; `like` is whose mode and owner it is to have."""
    temporary = _temporary(name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)  # of one that was cut short
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, mode, dir_fd=directory)
    with os.fdopen(fd, "wb") as file:
        if like is not None:
            os.fchown(fd, like.st_uid, like.st_gid)
        os.fchmod(fd, mode if like is None else stat.S_IMODE(like.st_mode))
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _remove_at(directory: int, name: str) -> None:
    """Remove a file that _write_at wrote, and what is left of one that was cut short."""
    for each in (name, _temporary(name)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each, dir_fd=directory)


def _temporary(name: str) -> str:
    return f".{name}.canopy"


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
