"""A running command from its start to its exit code, as its person sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from controller import render
from controller.ctl.context import Interruptible
from controller.hosts import counted
from controller.progress import push_line, waiting_line
from controller.session import Happening, ImageAnswer, Job, Late, Progress, Result, VmAnswer, VmReached, exit_status
from controller.status import CtlError, ExitStatus
from controller.terminal import Live, Terminal


class Following:
    """Collects a job's results, under a live line and with Ctrl-C as `ctl` has it."""

    def __init__(
        self,
        job: Job,
        terminal: Terminal,
        *,
        quiet: bool = False,
        announce: bool = False,
        always: bool = False,
        leave: bool = False,
    ) -> None:
        """`announce` tells who watches the job's number, and with `always` anybody, as well as how many answered when
        all went well. With `leave` Ctrl-C leaves the job as it is."""
        self.terminal = terminal
        self.results: list[Result] = []
        #: What hosts answered that are lost all the same.
        self.late: list[Result] = []
        #: Names to their places, in the order that people count in: h2 before h10, whoever came first.
        self.order = {name: place for place, name in enumerate(sorted(job.hosts.values(), key=counted))}
        #: Hosts without an outcome. A dictionary, since the live line copies it while it changes.
        self.waiting = dict.fromkeys(self.order)
        self._job = job
        self._quiet = quiet
        self._began = time.monotonic()
        #: How many hosts have an outcome that is not the one hoped for.
        self.failed = 0
        self._always = always
        self._interruptible = Interruptible(_leave if leave else self._cancel)
        self._broken: CtlError | None = None
        if announce and (terminal.watched or always) and not quiet:
            terminal.say(f"job {job.id}")
            terminal.flush()

    @property
    def seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self._began

    def _cancel(self) -> None:
        self._job.cancel()
        if not self._quiet:
            self.terminal.say_from_handler(f"ending it on {self._pending()}; Ctrl-C again leaves at once")

    def _pending(self) -> str:
        return render.label(list(self.waiting)) if self.waiting else "no host: all are done"

    def run(self, line: Callable[[], str], other: Callable[[Happening], None] = lambda _: None) -> None:
        """Go on until every host has an outcome, or the person has had enough, or the service is gone.

        `line()` is the live line's text; `other` is called with what happens, results included.
        """

        def text() -> str:
            return f"cancelling (Ctrl-C leaves at once): {line()}" if self._interruptible.interrupted else line()

        try:
            pending = lambda: f"not done: {self._pending()}"  # noqa: E731  a name for what Enter asks
            with self._interruptible, Live(self.terminal, text, quiet=self._quiet, more=pending):
                for happening in self._job:
                    if isinstance(happening, Result):
                        self.results.append(happening)
                        self.failed += 0 if happening.ok else len(happening.hosts)
                        for host in happening.hosts:
                            self.waiting.pop(host, None)
                    elif isinstance(happening, Late):
                        self.late.append(happening.result)
                    elif isinstance(happening, VmAnswer | VmReached | ImageAnswer):
                        self.waiting.pop(happening.host, None)
                    other(happening)
        except KeyboardInterrupt:
            # The second one, where the first cancelled: what has come is shown, and that is all.
            pass
        except CtlError as error:
            # What has come is shown, whatever became of the rest.
            self._broken = error
        if not self._job.settled:
            # With its connection the command ends too, wherever it still runs.
            self._job.close()

    def show_json(self) -> None:
        """The results, for programs."""
        self.terminal.text(render.json_text(render.result_objects(self.results, self.order)))

    def show_failures(self, *, shortened: bool = True) -> None:
        """Who did not do well, and what was cut short."""
        for failure in render.failures(self.results, self.order, self.late):
            self.terminal.say(failure, bad=True)
        for short in render.shortened([*self.results, *self.late], self.order, self._job.id) if shortened else ():
            self.terminal.say(short)

    @property
    def interrupted(self) -> bool:
        """Whether the person wanted it to end."""
        return self._interruptible.interrupted

    def check(self) -> None:
        """Raise KeyboardInterrupt where the person had enough, and CtlError where the service went away."""
        if self._interruptible.interrupted:
            raise KeyboardInterrupt
        if self._broken is not None and self._broken.status == ExitStatus.NO_SERVICE:
            raise CtlError(
                f"the service went away, and job {self._job.id} goes on on its hosts: see the service's log, "
                f"start it again with `ctl up`, then `ctl job {self._job.id} --wait` has the rest",
                ExitStatus.NO_SERVICE,
            ) from self._broken
        if self._broken is not None:
            raise self._broken

    def end(self, *, outputs: int | None = None) -> int:
        """Sum up. `outputs` is how many different outputs were shown. The exit code; raises as `check` does."""
        said = render.summary(self.results, self.order, unsettled=list(self.waiting))
        if said and not self._quiet:
            self.terminal.say(said, bad=True)
        elif self._always and not self._quiet:
            several = f", {outputs} different outputs" if outputs is not None and outputs > 1 else ""
            self.terminal.say(f"{len(self.order)} of {len(self.order)} answered ok{several}")
        self.terminal.flush()
        self.check()
        return exit_status(result.outcome for result in self.results)


def _leave() -> None:
    raise KeyboardInterrupt


class Watcher:
    """Watches one job after the other to its end, each under a live line that says what it is for."""

    def __init__(self, terminal: Terminal, *, quiet: bool = False) -> None:
        self._terminal = terminal
        self._quiet = quiet

    def __call__(self, what: str, job: Job) -> Sequence[Happening]:
        """What happened. Raises KeyboardInterrupt and CtlError, once all that was to come has come."""
        following = Following(job, self._terminal, quiet=self._quiet)
        pushed = Pushed(following)
        happened: list[Happening] = []
        vms = 0

        def line() -> str:
            told = waiting_line(len(following.order), list(following.waiting), following.seconds)
            counted = f"{vms} VMs, " if vms else ""
            return f"{what}: {pushed.line() if pushed.size else counted + told}"

        def note(happening: Happening) -> None:
            nonlocal vms
            happened.append(happening)
            pushed.note(happening)
            if isinstance(happening, VmAnswer):
                vms += len(happening.results)
            elif isinstance(happening, VmReached):
                vms += len(happening.names)

        following.run(line, note)
        following.check()
        return happened

    def until(self, what: str, look: Callable[[], str | None]) -> None:
        """Wait for something that is no job. Ctrl-C is a KeyboardInterrupt."""
        told = ""
        with Live(self._terminal, lambda: f"{what}: {told}", quiet=self._quiet):
            while (now := look()) is not None:
                told = now


class Pushed:
    """How far a push has come, for its live line."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._done: dict[str, int] = {}
        #: Who was bypassed and why, and by whom.
        self.bypassed: dict[tuple[str, str], list[str]] = {}
        self.size = 0

    def note(self, happening: Happening) -> None:
        """Something happened."""
        if isinstance(happening, Progress):
            self.size = happening.size
            self._done.update(happening.done)
            for whom, who, why in happening.bypassed:
                self.bypassed.setdefault((whom, why), []).append(who)

    def line(self) -> str:
        """The live line."""
        hosts, waiting = self._following.order, self._following.waiting
        waiting = dict(waiting)  # it changes meanwhile
        have = {host: self._done.get(host, 0) if host in waiting else self.size for host in hosts}
        return push_line(self.size, have, waiting, self._following.seconds, self._following.terminal.columns)
