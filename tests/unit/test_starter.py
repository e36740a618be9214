"""agent/starter.py against seeds that do not keep to the rules: local programs in place of ssh."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import pytest

from agent import seed_session, starter
from agent.seed_frames import Archive, Enrol, Hello, Job, Ping, Platform, Result, Route, Terms, Up, Want, frame
from agent.seed_session import MARKER, Command, Failed, Session
from agent.starter import Starter

ROUTE = Route(hostname="h", port=22, user="root", strict="yes")
HELLO = Hello(id=0, python=(3, 11), machine="x86_64", libc="glibc", libc_version=(2, 36), uid=0, stored=(), ssh=True)


def enrolment(host: int) -> Enrol:
    return Enrol(
        id=host,
        key="k" * 40,
        address="198.18.0.1",
        control_port=1,
        bulk_port=2,
        running=False,
        identity="0" * 32,
        python=(3, 11),
        machine="x86_64",
        libc="glibc",
        libc_version=(2, 36),
        uid=0,
    )


class Service:
    """The upstream: remembers what it is told."""

    def __init__(self) -> None:
        self.enrolled: list[int] = []
        self.results: list[Result] = []
        self.settledness = asyncio.Event()

    async def enrol(self, enrolment: Enrol) -> bytes:
        self.enrolled.append(enrolment.id)
        return b"welcome"

    async def bundle(self, platform: Platform) -> Archive:
        if platform.python < (3, 10):
            raise Failed(f"no wheels for {platform.machine}")
        return Archive(identity="0" * 32, sha256="0" * 64, content=b"archive")

    def settled(self, result: Result) -> None:
        self.results.append(result)
        self.settledness.set()

    def ask(self) -> None:
        raise AssertionError("a root asked for more")


def speaks(*parts: Up | bytes, then: str = "sys.stdin.read()") -> tuple[str, ...]:
    """A program that writes frames or bytes, whatever it is told, and then does `then`."""
    said = b"".join(part if isinstance(part, bytes) else frame(part) for part in parts)
    return (sys.executable, "-I", "-c", f"import sys,time;sys.stdout.buffer.write({said!r});sys.stdout.flush();{then}")


async def outcome(*programs: Sequence[str], hosts: int = 1) -> Service:
    """Start `hosts` hosts, the first ones by these programs, until all that can be settled are."""
    service = Service()

    def command(job: Job, _: str) -> Command:
        return Command(argv=tuple(programs[job.id]), env=os.environ)

    root = Starter(
        name="",
        terms=Terms(fleet="f1", connect_timeout=1.0),
        seed=b"",
        slots=len(programs),
        parent=False,
        upstream=service,
        command=command,
    )
    try:
        root.add([Job(id=number, name=f"h{number}", route=ROUTE) for number in range(hosts)])
        async with asyncio.timeout(30):
            while len(service.results) < len(programs):
                service.settledness.clear()
                await service.settledness.wait()
    finally:
        await root.close()
    return service


def failure(program: Sequence[str]) -> Result:
    (result,) = asyncio.run(outcome(program)).results
    assert result.state == "failed"
    return result


WORD = MARKER + b"\n"


def test_a_seed_that_keeps_to_the_rules_is_welcomed() -> None:
    service = asyncio.run(outcome(speaks(b"motd\n", WORD, HELLO, enrolment(0), Result(id=0, state="started"))))
    assert service.results == [Result(id=0, state="started")]
    assert service.enrolled == [0]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"\xff\xff\xff\xff", "the host's seed sent a frame over the limit"),
        (b"\x00\x00\x00\x02{]", "the host's seed sent a frame that is none"),
        (b'\x00\x00\x00\x0d{"t":"reboot"}'[:17], "the host's seed sent a frame that is none"),
        (frame(Ping()), "the host's seed spoke out of turn"),
        (frame(enrolment(0)), "the host's seed spoke out of turn"),
        (frame(HELLO) + frame(enrolment(5)), "the host's seed spoke out of turn"),
    ],
)
def test_what_is_no_proper_frame_ends_the_session(said: bytes, reason: str) -> None:
    assert failure(speaks(WORD, said)).reason == reason


@pytest.mark.parametrize("noise", [b"x" * 10**6, b"a line\n" * 10**5])
def test_login_scripts_that_never_end_are_cut_off(noise: bytes) -> None:
    program = (sys.executable, "-I", "-c", f"import sys\nwhile 1: sys.stdout.buffer.write({noise[:70]!r})")
    assert failure(program).reason.startswith("login scripts on the host print over 256 KiB")


def test_a_host_that_runs_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "LOGIN_GRACE", 0.1)
    result = failure(speaks(then="time.sleep(60)"))
    assert result.reason.startswith("nothing ran on the host within")
    assert not result.reached


def test_a_session_cut_short_is_no_verdict_on_the_host() -> None:
    result = failure(speaks(WORD, HELLO, then="sys.exit('gone')"))
    assert result == Result(
        id=0, state="failed", reason="the session was cut short: ssh ended with 1: gone", reached=False
    )


def test_a_host_that_no_bundle_fits_is_not_tried_again() -> None:
    old = Hello(id=0, python=(3, 9), machine="\x1b[2J", libc="glibc", libc_version=(2, 31), uid=0, stored=(), ssh=True)
    result = failure(speaks(WORD, old))
    assert (result.reason, result.reached) == ("no wheels for ?[2J", True)


def test_a_worker_cannot_speak_for_hosts_that_it_was_not_given() -> None:
    """Host 0 is up and was given host 2 of three; it enrols and settles host 1, whose own session knows better."""
    started = (HELLO, enrolment(0), Result(id=0, state="started"))
    lies = (enrolment(1), Result(id=1, state="started"), Want(), enrolment(2), Result(id=2, state="current"))
    honest = speaks(WORD, then="time.sleep(1);sys.exit('refused')")
    service = asyncio.run(outcome(speaks(WORD, *started, Want(), *lies), honest, ("false",), hosts=3))
    assert 1 not in service.enrolled
    assert {result.id: result.state for result in service.results}[1] == "failed"


def test_a_hosts_words_cannot_drive_a_terminal() -> None:
    seed = speaks(WORD, Result(id=0, state="failed", reason="\x1b]0;title\x07 " + "x" * 500))
    assert failure(seed).reason == ("?]0;title? " + "x" * 500)[:400]


def test_a_missing_ssh_is_reported() -> None:
    assert failure(("/nowhere/ssh",)).reason == "ssh cannot be run here: No such file or directory"


def test_a_fault_in_the_starter_itself_does_not_go_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(Session, "greet", lambda _: 1 / 0)
        root = Starter(
            name="",
            terms=Terms(fleet="f1"),
            seed=b"",
            slots=1,
            parent=False,
            upstream=Service(),
            command=lambda _, __: Command(argv=("cat",), env=os.environ),
        )
        root.add([Job(id=0, name="h0", route=ROUTE)])
        try:
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(root.broken(), 10)
        finally:
            await root.close()

    asyncio.run(run())


def test_the_marker_is_the_seeds_own() -> None:
    from agent import seed

    assert seed.MARKER == seed_session.MARKER
