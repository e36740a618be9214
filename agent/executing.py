"""How a command's process begins.

The plain case is `os.posix_spawnp`: no thread and no copy of this process's page tables. It knows no working
directory, no user, no limits, and starts no script; those are set between fork(2) and execve(2), where this process's
other threads (libzmq's) are not there and nothing but system calls is made.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import resource
import signal
import warnings
from contextlib import suppress
from dataclasses import dataclass

from agent import shellless
from protocol.commands import Run

#: Python ignores SIGPIPE and SIGXFSZ, and whoever started the agent perhaps others: none of it is to be inherited.
_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
#: What the kernel adds to a script that it has no interpreter for, a shell does itself (POSIX.1-2017, sh).
_SHELL = "/bin/sh"
#: Which descriptor a script is read from: beyond those that a script uses itself, and the same on every host, for what
#: it says of itself is to be the same too.
_SCRIPT_FD = 255


class Unable(Exception):
    """This host or this agent can't run it so, and never could: one sentence."""


@dataclass(frozen=True)
class _Person:
    """Whom a command runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def execute(run: Run, environment: dict[str, str], pipes: tuple[int | None, int, int]) -> int:
    """Start it in a session of its own, with these descriptors as its standard input (None: nothing to read), output
    and error; its pid. Raises Unable, OSError and ValueError."""
    environment = environment | run.env
    if run.script is None and run.cwd is None and not (run.user or run.nice or run.limits):
        found = shellless.words(run, environment)
        if found is not None:
            # Where it can't be begun, the shell says why, as it always does.
            with suppress(OSError):
                return _spawned(found, environment | {"PWD": os.getcwd()}, pipes)
        return _spawned(run.argv, environment, pipes)
    return _forked(run, environment, pipes)


def _spawned(argv: tuple[str, ...] | list[str], environment: dict[str, str], pipes: tuple[int | None, int, int]) -> int:
    stdin, out, err = pipes
    return os.posix_spawnp(
        argv[0],
        argv,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0) if stdin is None else (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, out, 1),
            (os.POSIX_SPAWN_DUP2, err, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=_ALL_SIGNALS,
    )


def _forked(run: Run, environment: dict[str, str], pipes: tuple[int | None, int, int]) -> int:
    person, home = _person(run.user, environment) if run.user else (None, None)
    environment |= run.env  # which has the last word, over what the user's entry says as well
    limits = [(_limit(name), value) for name, value in run.limits.items()]
    script = _script(run.script) if run.script is not None else None
    told, tell = os.pipe2(os.O_CLOEXEC)
    stdin, out, err = pipes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 3.12 warns of fork() beside threads: see the first lines of this file
            pid = os.fork()
        if pid == 0:
            try:
                tell = _place(tell, (stdin, out, err), script)
                _become(run, person, home, limits)
                _exec(run, environment)
            except BaseException as error:
                with suppress(BaseException):
                    number = error.errno if isinstance(error, OSError) and error.errno else 0
                    name = getattr(error, "filename", None) or ""
                    os.write(tell, f"{number} {name}".encode("utf-8", "replace"))
            finally:
                os._exit(127)
        os.close(tell)
        tell = -1
        # Closed by execve: the process is what it was to be. Only system calls lie between.
        text = os.read(told, 8_192)
    finally:
        os.close(told)
        if tell >= 0:
            os.close(tell)
        if script is not None:
            os.close(script)
    if text:
        os.waitpid(pid, 0)
        digits, _, name = text.decode("utf-8", "replace").partition(" ")
        number = int(digits)
        raise OSError(number, os.strerror(number) if number else "it could not begin", name or None)
    return pid


def _place(tell: int, pipes: tuple[int | None, int, int], script: int | None) -> int:
    """In the child: every descriptor where it belongs, before a limit says how many there may be. `tell`'s new one."""
    stdin, out, err = pipes
    os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    tell = fcntl.fcntl(tell, fcntl.F_DUPFD_CLOEXEC, _SCRIPT_FD + 1)
    if script is not None:
        os.dup2(script, _SCRIPT_FD)
    return tell


def _become(run: Run, person: _Person | None, home: str | None, limits: list[tuple[int, int]]) -> None:
    """In the child: all else that execve keeps."""
    os.setsid()
    for number in _ALL_SIGNALS:
        with suppress(OSError):  # some numbers are the C library's own
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))
    if run.nice:
        os.nice(run.nice)
    if person is not None:
        os.setgroups(person.groups)
        os.setresgid(person.gid, person.gid, person.gid)
        os.setresuid(person.uid, person.uid, person.uid)
    if run.cwd is not None:
        os.chdir(run.cwd)
    elif home is not None:
        try:
            os.chdir(home)
        except OSError:
            os.chdir("/")


def _exec(run: Run, environment: dict[str, str]) -> None:
    """In the child: become the program. Returns never; raises OSError."""
    if run.script is None:
        os.execvpe(run.argv[0], run.argv, environment)
    path = f"/proc/self/fd/{_SCRIPT_FD}"
    try:
        os.execve(path, run.argv, environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        os.execve(_SHELL, [_SHELL, path, *run.argv[1:]], environment)


def _script(text: bytes) -> int:
    """The script as a file without a name, which nobody can alter and which is gone with its last reader."""
    fd = os.memfd_create("script", os.MFD_CLOEXEC)
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
    os.fchmod(fd, 0o555)
    return fd


def given_input(data: bytes) -> int:
    """A descriptor from which all of `data` can be read."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _limit(name: str) -> int:
    number: int | None = getattr(resource, f"RLIMIT_{name.upper()}", None)
    if number is None:
        known = sorted(found[7:].lower() for found in vars(resource) if found.startswith("RLIMIT_"))
        raise Unable(f"there is no limit {name} here; there are {', '.join(known)}")
    return number


def _person(user: str, environment: dict[str, str]) -> tuple[_Person | None, str | None]:
    """The user, and the home directory; `environment` gets what login(1) would set. None for whom the agent runs as.

    Raises Unable.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        raise Unable(f"there is no user {user} on this host") from None
    environment |= {
        "HOME": entry.pw_dir,
        "USER": entry.pw_name,
        "LOGNAME": entry.pw_name,
        "SHELL": entry.pw_shell or _SHELL,
    }
    if os.geteuid() != 0:
        if entry.pw_uid == os.geteuid():
            return None, entry.pw_dir
        raise Unable(
            f"only an agent that runs as root can run commands as another, and this one runs as {_own_name()}: "
            f"run `ctl up` with a user that is root on the hosts"
        )
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return _Person(entry.pw_uid, entry.pw_gid, groups), entry.pw_dir


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"
