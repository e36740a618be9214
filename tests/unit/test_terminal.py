"""What a person sees who watches, and what a file gets instead."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controller import api
from protocol.outcomes import Exited, Output
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60


class Watched:
    """A process whose standard error is a terminal; `seen` grows as it writes."""

    def __init__(
        self, argv: list[str], environment: dict[str, str], *, out_too: bool = False, typing: bool = False
    ) -> None:
        """With `typing` it is the terminal that the process has its keyboard from as well."""
        self._master, slave = pty.openpty()
        self.seen = b""
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *argv] if typing else argv,
            cwd=ROOT,
            env=environment,
            stdin=slave if typing else subprocess.DEVNULL,
            stdout=slave if out_too else subprocess.PIPE,
            stderr=slave,
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the other end any more
                return
            self.seen += data

    def type(self, text: bytes) -> None:
        """Press keys."""
        os.write(self._master, text)

    def end(self) -> tuple[int, bytes]:
        """Its exit code and its standard output."""
        out, _ = self._process.communicate(timeout=DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return self._process.returncode, out or b""

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._reader.join(DEADLINE_S)
        os.close(self._master)


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake.fake_service() as found:
        yield found


@contextmanager
def watching(
    service: FakeService, *arguments: str, out_too: bool = False, typing: bool = False, **environment: str
) -> Iterator[Watched]:
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "CANOPY_FLEET")}
    watched = Watched(
        [sys.executable, "-m", "controller.cli", *arguments],
        clean | {"CANOPY_HOME": str(service.home), "TERM": "xterm"} | environment,
        out_too=out_too,
        typing=typing,
    )
    try:
        yield watched
    finally:
        watched.close()


def slow(service: FakeService, seen: Callable[[], bool]) -> None:
    """Two hosts of 64 fail; they answer only when `seen()`."""

    def answer(_: api.RunOn, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(64)))
        client.send(api.Folded(folds=(fake.fold(range(2, 64), None, fake.printed(b"fine\n")),)))
        wait_until(seen, DEADLINE_S, "the live line")
        client.send(api.Folded(folds=(fake.fold([0, 1], Exited(3)),)), api.Settled())

    service.on(api.RunOn, answer)


def test_a_live_line_says_who_is_waited_for_and_goes_away(service: FakeService) -> None:
    screens: list[Watched] = []
    slow(service, lambda: any(b"2 waiting" in screen.seen for screen in screens))
    with watching(service, "broadcast", "x") as watched:
        screens.append(watched)
        status, out = watched.end()
        assert status == 1
        assert out == b"-" * 15 + b"\nh[2-63] (62)\n" + b"-" * 15 + b"\nfine\n"
        live, _, rest = watched.seen.rpartition(b"\r\x1b[K")
        assert b"62/64 done: 62 ok, 0 failed, 2 waiting, " in live
        assert b" s: h0 h1" in live
        assert rest.splitlines() == [
            b"\x1b[31mh[0-1] (2): exited with exit code 3\x1b[0m",
            b"\x1b[31m62 of 64 answered ok; failed: h[0-1]\x1b[0m",
        ]


def test_quiet_and_a_dumb_terminal_have_no_live_line_and_no_color_no_colour(service: FakeService) -> None:
    for arguments, no_color, term in ((["broadcast", "-q", "x"], "1", "xterm"), (["broadcast", "x"], "", "dumb")):
        slow(service, lambda: True)
        with watching(service, *arguments, NO_COLOR=no_color, TERM=term) as watched:
            assert watched.end()[0] == 1
            assert b"\x1b" not in watched.seen
            quiet = "-q" in arguments
            assert watched.seen.splitlines() == [
                *([] if quiet else [b"job 7"]),
                b"h[0-1] (2): exited with exit code 3",
                *([] if quiet else [b"62 of 64 answered ok; failed: h[0-1]"]),
            ]


def test_enter_shows_who_is_not_done(service: FakeService) -> None:
    screens: list[Watched] = []
    slow(service, lambda: any(b"not done: h[0-1] (2)" in screen.seen for screen in screens))
    with watching(service, "broadcast", "x", typing=True) as watched:
        wait_until(lambda: b"2 waiting" in watched.seen, DEADLINE_S, "the live line")
        watched.type(b"\n")
        screens.append(watched)
        assert watched.end()[0] == 1


def test_a_host_has_its_colour_in_every_stream(service: FakeService) -> None:
    service.replies(
        api.RunOn,
        api.Accepted(id=7, hosts=fake.names(2)),
        api.Streamed(rank=0, stream=1, offset=0, data=b"a\n"),
        api.Streamed(rank=1, stream=1, offset=0, data=b"b\n"),
        api.Folded(folds=(fake.fold([0, 1], None, Output(b"", b"", 2, 0)),)),
        api.Settled(),
    )
    seen = []
    for colour in ("", "1"):
        for _ in range(2):
            with watching(service, "broadcast", "-q", "--stream", "x", out_too=True, NO_COLOR=colour) as watched:
                watched.end()
                seen.append(watched.seen)
    assert seen[0] == seen[1]
    first, second = seen[0].splitlines()
    assert re.fullmatch(rb"\x1b\[\d\dmh0: \x1b\[0ma", first)
    assert re.fullmatch(rb"\x1b\[\d\dmh1: \x1b\[0mb", second)
    assert seen[2] == b"h0: a\r\nh1: b\r\n"


def test_on_a_terminal_an_unfinished_line_is_finished(service: FakeService) -> None:
    service.replies(
        api.RunOn,
        api.Accepted(id=7, hosts=fake.names(2)),
        api.Folded(folds=(fake.fold([0], Exited(3), fake.printed(b"no end")), fake.fold([1]))),
        api.Settled(),
    )
    with watching(service, "broadcast", "x", out_too=True, NO_COLOR="1") as watched:
        watched.end()
        rule = b"-" * 15 + b"\r\n"
        assert watched.seen == (
            b"job 7\r\n"
            + rule
            + b"h0\r\n"
            + rule
            + b"no end\r\nh0: exited with exit code 3\r\n1 of 2 answered ok; failed: h0\r\n"
        )


def test_a_push_shows_how_far_it_is(service: FakeService, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 2048)
    screens: list[Watched] = []

    def answer(_: api.PushTo, client: Client) -> None:
        client.send(api.Accepted(id=7, hosts=fake.names(2)), api.Advanced(size=2048, done={0: 2048, 1: 1024}))
        wait_until(lambda: any(b" 75% of 4.0 KiB" in screen.seen for screen in screens), DEADLINE_S, "the bar")
        client.send(api.Folded(folds=(fake.fold([0, 1], None, fake.printed(b"pushed")),)), api.Settled())

    service.on(api.PushTo, answer)
    with watching(service, "push", str(source), "/x") as watched:
        screens.append(watched)
        assert watched.end() == (0, b"h[0-1] (2): pushed\n")
        assert b"[###############.....]  75% of 4.0 KiB, 0/2 hosts" in watched.seen
