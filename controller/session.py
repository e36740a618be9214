"""The Python API: a Session speaks to a fleet's service, and `ctl` is a thin layer over it.

>>> from controller import Session
>>> session = Session()
>>> for result in session.run("echo up"):  # as soon as hosts have ended, equal ones together
...     assert (result.ok, result.stdout) == (True, b"up\\n"), result.hosts
>>> session.select("@all!h0", pick=1) != ("h0",)  # host sets as on the command line
True
>>> found = session.run("exit 3", "h[0-1]").results()  # all at once; a host set, names, or nothing for all
>>> [(result.hosts, result.outcome.code) for result in found]
[(('h0', 'h1'), 3)]
>>> session.failed()
('h0', 'h1')
>>> with session.run("echo a; sleep 600", ["h0"], stream=True) as job:  # leaving it ends it on all hosts
...     piece = next(iter(job))
>>> (piece.host, piece.stream, piece.data)
('h0', 1, b'a\\n')

Every call is synchronous; `controller.AsyncSession` has the same for asyncio. A Session may be kept for as long as one
likes; each job has a connection of its own, and belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Unpack, overload

from controller.asking import RunOptions, run_request
from controller.client import fleets_directory
from controller.later import Later
from controller.results import (
    Fetched,
    Happening,
    ImageAnswer,
    Late,
    Piece,
    Progress,
    Result,
    VmAnswer,
    VmProgress,
    VmReached,
    exit_status,
)
from controller.running import Connection, Job, Running
from controller.selection import Chooser, Selection
from controller.vm_session import VmSession

if TYPE_CHECKING:
    from controller import api
    from controller.asking_files import PathLike, PullOptions, PushOptions
    from controller.groups import Member
else:
    api = Later("controller.api")

__all__ = [
    "Connection",
    "Fetched",
    "Happening",
    "ImageAnswer",
    "Job",
    "Late",
    "Piece",
    "Progress",
    "Result",
    "RunOptions",
    "Running",
    "Session",
    "VmAnswer",
    "VmProgress",
    "VmReached",
    "exit_status",
]


class Session(VmSession):
    """The service of one fleet; what it has for VMs is in VmSession. Raises CtlError (with `.status`) for whatever goes
    wrong."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to do: connections end with their commands."""

    # --- commands -----------------------------------------------------------------------------------------------------

    @overload
    def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: Literal[False] = False,
        stdin: bytes | BinaryIO | None = None,
        **options: Unpack[RunOptions],
    ) -> Running[Result]: ...

    @overload
    def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: bool,
        stdin: bytes | BinaryIO | None = None,
        **options: Unpack[RunOptions],
    ) -> Running[Result | Piece]: ...

    def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: bool = False,
        stdin: bytes | BinaryIO | None = None,
        **options: Unpack[RunOptions],
    ) -> Running[Any]:
        """Run a shell string, or an argument vector, on hosts: names, a host set as for `select`, or None for all.

        What comes is a Result for hosts with one outcome and one output, as soon as it is known. With `stream` output
        comes as Pieces too, no faster than they are taken. `stdin` is what the command reads: bytes (at most
        MAX_SCRIPT), or a file that is read in a thread while the job is iterated over. The options are those of
        `RunOptions`. Raises CtlError, with all that is wrong, before anything is run.
        """
        inline = stdin if isinstance(stdin, bytes) else None
        feed = stdin is not None and inline is None
        request = run_request(command, self._names(hosts), stream=stream, stdin=inline, feed=feed, **options)
        job = self._job(request)
        if stdin is not None and not isinstance(stdin, bytes):
            job.feed(stdin)
        return job

    def push(
        self,
        source: PathLike | Sequence[PathLike],
        destination: str,
        hosts: str | Iterable[str] | None = None,
        **options: Unpack[PushOptions],
    ) -> Running[Result | Progress]:
        """Push files and directories (with all that is in them) to hosts (None: all).

        A destination that ends in / is a directory, which is there; else it is the one source's name there. Options are
        those of `PushOptions`. Where a host has a file with the same bytes already, it is not sent. Raises CtlError
        where there is nothing that could be pushed; yields Progress and Results.
        """
        from controller.asking_files import push_request

        return self._job(push_request(source, destination, self._names(hosts), **options))

    def pull(
        self,
        paths: str | Sequence[str],
        directory: PathLike,
        hosts: str | Iterable[str] | None = None,
        **options: Unpack[PullOptions],
    ) -> Running[Result | Fetched]:
        """Bring files and directories of hosts (None: all) to this machine: `directory`/HOST/NAME for each.

        `paths` are paths from / on. Equal contents come once: those who have them share the files (hard links). Options
        are those of `PullOptions`. What is there with the same bytes is not fetched. Raises CtlError where nothing can
        be asked for; yields Fetched and Results.
        """
        from controller.asking_files import pull_request

        return self._job(pull_request(paths, directory, self._names(hosts), **options))

    def check(self, hosts: Iterable[str] | None = None, *, timeout: float = 60.0) -> Job:
        """Have hosts look at themselves: each Result's stdout is a protocol.checks.HostFacts (see controller.check)."""
        return self._job(api.CheckOn(hosts=self._names(hosts), timeout_ms=round(timeout * 1000)))

    def tune(
        self,
        settings: Mapping[str, int],
        hosts: Iterable[str] | None = None,
        *,
        undo: bool = False,
        restart_libvirt: bool = False,
        timeout: float = 120.0,
    ) -> Job:
        """Raise settings of hosts (agent.tunables) to at least these values, or put all back that was raised. Each
        Result's stdout is a protocol.checks.TuneAnswer."""
        return self._job(
            api.TuneOn(
                hosts=self._names(hosts),
                settings=dict(settings),
                undo=undo,
                restart_libvirt=restart_libvirt,
                timeout_ms=round(timeout * 1000),
            )
        )

    def down(
        self, hosts: str | Iterable[str] | None = None, *, purge: bool = False, vms: bool = False
    ) -> Running[Result]:
        """End agents. With `vms` their VMs are destroyed first, with `purge` nothing is left on the host."""
        return self._job(api.DownOn(hosts=self._names(hosts), purge=purge, vms=vms))

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def jobs(self, most: int = 20) -> tuple[api.JobStatus, ...]:
        """The latest jobs, newest first."""
        return self._ask(api.GetJobs(most=most), api.Jobs).jobs

    def job(self, id_: int, *, wait: bool = True) -> Job:
        """A job by its number, from its beginning: what came of it so far, and with `wait` what still comes."""
        return self._job(api.FollowJob(id=id_, wait=wait))

    def output(self, id_: int, host: str) -> Running[Result | Piece]:
        """All that a job wrote on one host, from that host's spool, as Pieces and a last Result with the totals."""
        return self._job(api.GetOutput(job=id_, host=host))

    def cancel_job(self, id_: int) -> None:
        """Stop a job on all hosts."""
        self._ask(api.CancelJob(id=id_), api.Done)

    # --- questions ----------------------------------------------------------------------------------------------------

    def status(self) -> api.Status:
        """The fleet: hosts, VMs, and what is known of each."""
        return self._ask(api.GetStatus(), api.Status)

    def host(self, name: str) -> api.HostKnown:
        """All that is known of one host."""
        return self._ask(api.GetHost(name=name), api.HostKnown)

    # --- which hosts --------------------------------------------------------------------------------------------------

    def select(
        self,
        where: str | Iterable[str] = (),
        *,
        exclude: str | Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        pick: int | None = None,
    ) -> tuple[str, ...]:
        """The hosts that host sets stand for, in the notation of `ctl -w`: `h[0-31]!h7`, `@rack1&@gpu`, `@site:sophia`,
        `@failed`. Without `where` all of the fleet; `labels` keeps those that have them, `pick` draws some at random.

        Raises CtlError (NO_TARGET) where none is left, and USAGE for what can't be read and for unknown groups.
        """
        asked = Selection(
            where=_texts(where),
            exclude=_texts(exclude),
            labels=tuple(f"{key}={value}" for key, value in (labels or {}).items()),
            pick=pick,
        )
        chosen = self.choose(asked)
        return tuple(host.name for host in self.status().hosts) if chosen is None else chosen

    def choose(self, asked: Selection, *, known: bool = False) -> tuple[str, ...] | None:
        """The hosts that the options of a command stand for; None for all of the fleet. Raises as `select` does, and
        with `known` for hosts that the fleet has not."""
        return self.chooser().choose(asked, known=known)

    def chooser(self) -> Chooser:
        """What reads host sets with the groups of this moment."""
        return Chooser(_Facts(self), fleets_directory)

    def groups(self) -> tuple[str, ...]:
        """The names of all groups that host sets may name behind an @."""
        return tuple(self.chooser().groups.names())

    def failed(self, job: int | None = None) -> tuple[str, ...]:
        """The hosts on which a job (None: the last one) failed or was lost. Those without an outcome are not among
        them."""
        return self._ask(api.GetFailed(job=job), api.FailedHosts).hosts

    def label(
        self, hosts: str | Iterable[str] | None, put: Mapping[str, str] | None = None, drop: Iterable[str] = ()
    ) -> None:
        """Give hosts (None: all) labels, and take others away. All or nothing: raises CtlError for bad ones."""
        self._ask(api.SetLabels(hosts=self._names(hosts), put=dict(put or {}), drop=tuple(drop)), api.Done)

    # --- the fleet itself ---------------------------------------------------------------------------------------------

    def begin(self, hosts: int, fanout: int) -> None:
        """Tell the service that hosts will be enrolled."""
        self._ask(api.Begin(hosts=hosts, fanout=fanout), api.Done)

    def enrol(self, enrolment: api.Enrol) -> bytes:
        """Take a host in; the welcome document that it must be given."""
        return self._ask(enrolment, api.Enrolled).welcome

    def wait_for(
        self,
        hosts: Iterable[str],
        within: float,
        *,
        newer_than: Mapping[str, int] | None = None,
        answering: bool = False,
    ) -> dict[str, str]:
        """Wait until hosts are in the tree; those that are not after `within` seconds, with what is known of each.

        Those of `newer_than` are to have started anew: to have an incarnation above that one. With `answering` all are
        to answer now, for what is known of them may be seconds old.
        """
        request = api.Await(
            hosts=tuple(hosts),
            within_ms=round(within * 1000),
            newer_than=dict(newer_than or {}),
            answering=answering,
        )
        return self._ask(request, api.Awaited).missing

    def shutdown(self) -> None:
        """End the service."""
        self._ask(api.Shutdown(), api.Done)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _names(self, hosts: str | Iterable[str] | None) -> tuple[str, ...] | None:
        """Hosts by name; a text is a host set."""
        return self.select(hosts) if isinstance(hosts, str) else None if hosts is None else tuple(hosts)


class _Facts:
    """What groups are made of, asked of the service."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def members(self) -> Sequence[Member]:
        return self._session.status().hosts

    def failed(self, job: int | None) -> Sequence[str]:
        return self._session.failed(job)


def _texts(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
