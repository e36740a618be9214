"""Where a pushed file goes: where it was sent and nowhere else, whole or not at all, whoever else is at work there."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.incoming import Incoming, put
from agent.paths import BadDestination
from controller.session import Result
from controller.status import CtlError
from protocol.commands import Cancel
from protocol.limits import CHUNK, MAX_INLINE
from protocol.messages import Ask, Manner
from protocol.outcomes import Cancelled, Exited, FailedToStart, Outcome, Refused
from tests.net.liar import AGENT, Stage
from tests.net.localfleet import LocalFleet, local_fleet, own_address
from tests.pushes import file_push
from tests.waiting import wait_until

DEADLINE_S = 30.0
OTHER_UID = 65_534
#: The three sizes that take different ways: in the command, in one chunk, in several of which the last is short.
SIZES = (1_000, MAX_INLINE + 1, 3 * CHUNK + 17)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, and be another user")

#: A mount namespace of its own, with a file system that can't be written and one that is small.
_MOUNTS = """
mount -t tmpfs -o size=1m,mode=755 none "$0/small"
mount --bind "$0/ro" "$0/ro"
mount -o remount,bind,ro "$0/ro"
exec "$@"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where mounts of the middle host's own are."""
    made = tmp_path_factory.mktemp("place")
    for name in ("ro", "small"):
        (made / name).mkdir()
    (made / "ro" / "old").write_bytes(b"old")
    return made


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[LocalFleet]:
    """A chain of three agents; the one in the middle has file systems that are full or can't be written."""
    before: dict[str, list[str]] = {}
    if os.geteuid() == 0:
        before["h1"] = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _MOUNTS, str(place)]
    with local_fleet(tmp_path_factory.mktemp("fleet"), ["h0", "h1", "h2"], 1, before=before) as started:
        parents = {host.name: host.parent for host in started.hosts().values()}
        assert parents == {"h0": None, "h1": "h0", "h2": "h1"}
        yield started


@pytest.fixture(params=SIZES, ids=["inline", "one chunk", "chunks"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each size."""
    file = tmp_path_factory.mktemp("source") / "source"
    file.write_bytes(os.urandom(request.param))
    file.chmod(0o640)
    os.utime(file, ns=(1_000_000_007, 1_000_000_007))
    return file


@pytest.fixture(autouse=True)
def _clean(fleet: LocalFleet, tmp_path: Path) -> Iterator[None]:
    """No test leaves a temporary file, on whichever way it ended."""
    yield
    wait_until(lambda: not left_over(tmp_path), DEADLINE_S, "temporary files to be gone")
    wait_until(
        lambda: not [note for name in fleet.names for note in fleet.directory(name).parts.iterdir()],
        DEADLINE_S,
        "the notes of temporary files to be gone",
    )


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".canopy-*") if not path.is_symlink()]


def pushed(fleet: LocalFleet, file: Path, where: str | Path, hosts: list[str] | None = None) -> dict[str, Result]:
    """Push to each host by itself, since all of them see the same files; results by host."""
    found: dict[str, Result] = {}
    for host in hosts or ["h2"]:
        for result in fleet.session.push(file, str(where), [host]).results():
            found |= dict.fromkeys(result.hosts, result)
    return found


def push_one(fleet: LocalFleet, file: Path, where: str | Path, host: str = "h2") -> Outcome:
    return pushed(fleet, file, where, [host])[host].outcome


def refusal(fleet: LocalFleet, file: Path, where: str | Path) -> str:
    """Why a push is refused."""
    outcome = push_one(fleet, file, where)
    assert isinstance(outcome, Refused), outcome
    assert not outcome.trust
    return outcome.why


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_content_mode_and_time_arrive(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert push_one(fleet, source, target) == Exited(0)
    info = target.lstat()
    assert target.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(info.st_mode) == 0o640
    assert info.st_mtime_ns == 1_000_000_007
    assert info.st_uid == os.geteuid()


def test_a_file_goes_to_many_hosts_at_once(fleet: LocalFleet, source: Path) -> None:
    (result,) = fleet.session.push(source, "@/arrived").results()
    assert (result.hosts, result.outcome, result.stdout) == (fleet.names, Exited(0), b"pushed")
    for name in fleet.names:
        assert (fleet.directory(name).path / "arrived").read_bytes() == source.read_bytes()


def test_hosts_that_share_a_directory_do_not_disturb_one_another(
    fleet: LocalFleet, source: Path, tmp_path: Path
) -> None:
    results = fleet.session.push(source, str(tmp_path / "target")).results()
    assert all(result.ok for result in results), results
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_an_empty_file_arrives(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "target").write_bytes(b"old")
    assert push_one(fleet, tmp_path / "empty", tmp_path / "target") == Exited(0)
    assert (tmp_path / "target").read_bytes() == b""


@pytest.mark.parametrize("mode", [0o000, 0o4755, 0o1777, 0o400])
def test_every_mode_is_kept(fleet: LocalFleet, source: Path, tmp_path: Path, mode: int) -> None:
    source.chmod(mode)
    assert push_one(fleet, source, tmp_path / "target") == Exited(0)
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["x" * 255, "é\n 'x'", "-rf", ".canopy", "a\\b"])
def test_any_name_will_do(fleet: LocalFleet, source: Path, tmp_path: Path, name: str) -> None:
    assert push_one(fleet, source, f"{tmp_path}/{name}") == Exited(0)
    assert (tmp_path / name).read_bytes() == source.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_destination_that_ends_in_a_slash_is_a_directory(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    assert push_one(fleet, source, f"{tmp_path}/") == Exited(0)
    assert (tmp_path / "source").read_bytes() == source.read_bytes()


def test_what_is_there_already_is_not_written_again(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert pushed(fleet, source, target)["h2"].stdout == b"pushed"
    before = target.stat()
    (result,) = pushed(fleet, source, target).values()
    assert (result.outcome, result.stdout) == (Exited(0), b"unchanged")
    after = target.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    # A mode that differs is put right, and that is all.
    target.chmod(0o600)
    assert pushed(fleet, source, target)["h2"].stdout == b"mode, time, owner or attributes of 1"
    assert (target.stat().st_ino, stat.S_IMODE(target.stat().st_mode)) == (before.st_ino, 0o640)


def test_one_changed_byte_is_enough_to_be_written_again(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    data = source.read_bytes()
    target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert pushed(fleet, source, target)["h2"].stdout == b"pushed"
    assert target.read_bytes() == data


def test_another_name_of_the_old_file_keeps_the_old_content(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    os.link(tmp_path / "target", tmp_path / "other")
    assert push_one(fleet, source, tmp_path / "target") == Exited(0)
    assert (tmp_path / "other").read_bytes() == b"old"


def test_an_image_goes_into_the_store_under_its_digest(fleet: LocalFleet, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(SIZES[2]))
    for said in (b"pushed", b"unchanged"):
        (result,) = fleet.session.push(tmp_path / "image", "", image=True).results()
        assert (result.hosts, result.outcome, result.stdout) == (fleet.names, Exited(0), said)
    for name in fleet.names:
        (image,) = fleet.directory(name).images.iterdir()
        assert image.read_bytes() == (tmp_path / "image").read_bytes()
        assert stat.S_IMODE(image.stat().st_mode) == 0o444
        assert len(image.name) == 64
        image.unlink()


def test_a_directory_with_a_long_listing_goes_to_many_hosts(fleet: LocalFleet, tmp_path: Path) -> None:
    many = tmp_path / "many"
    (many / "deep").mkdir(parents=True)
    for number in range(900):
        (many / f"{number}").write_bytes(os.urandom(700))
    (many / "deep" / "large").write_bytes(os.urandom(2 * CHUNK + 1))
    (many / "deep" / "link").symlink_to("../0")
    (would,) = fleet.session.push(many, "@/", dry_run=True).results()
    assert would.hosts == fleet.names
    assert b"new: many/100" in would.stdout.split(b"\n")
    for said in (b"pushed", b"unchanged"):
        (result,) = fleet.session.push([many], "@/").results()
        assert (result.hosts, result.outcome, result.stdout) == (fleet.names, Exited(0), said)
    (many / "7").write_bytes(b"other")
    (result,) = fleet.session.push([many], "@/").results()
    assert (result.hosts, result.stdout) == (fleet.names, b"pushed 1 of 902")
    for name in fleet.names:
        there = fleet.directory(name).path / "many"
        assert {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()} == {
            path.name: path.read_bytes() for path in many.iterdir() if path.is_file()
        }
        assert (there / "deep" / "large").read_bytes() == (many / "deep" / "large").read_bytes()
        assert os.readlink(there / "deep" / "link") == "../0"
        assert left_over(there.parent) == []


# --- where it does not go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("{0}/sub/../target", "'..'"),
        ("{0}/../../../../../../etc/target", "'..'"),
        ("@/../target", "'..'"),
        ("{0}/missing/target", "missing does not exist"),
        ("{0}/file/target", "file is not a directory"),
        ("{0}/sub", "is a directory"),
        ("{0}/fifo", "no regular file"),
        ("{0}/socket", "no regular file"),
        ("/dev/null", "no regular file"),
    ],
)
def test_a_destination_that_is_none_is_refused(
    fleet: LocalFleet, source: Path, tmp_path: Path, path: str, why: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        folder = os.open(tmp_path, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{folder}/socket")  # the path itself may be longer than a socket's may be
        os.close(folder)
    before = sorted(tmp_path.rglob("*"))
    assert why in refusal(fleet, source, path.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"old"
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("@/.", "must name a file"),
        ("{0}/.", "must name a file"),
        ("{0}/..", "must name a file"),
        ("target", "no path from / on"),
        ("~/target", "no path from / on"),
        ("{0}/nul\0byte", "no path from / on"),
        ("{0}/" + "x" * 256, "256 bytes"),
    ],
)
def test_a_destination_that_is_none_anywhere_is_refused_before_anything_is_sent(
    fleet: LocalFleet, tmp_path: Path, path: str, why: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(CtlError) as refused:
        fleet.session.push(tmp_path / "source", path.format(tmp_path), ["h2"])
    assert why in str(refused.value)


@pytest.mark.parametrize("dangling", [False, True], ids=["to a file", "to nothing"])
def test_a_link_at_the_destination_is_replaced_and_not_followed(
    fleet: LocalFleet, source: Path, tmp_path: Path, dangling: bool
) -> None:
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_bytes(b"precious")
    (tmp_path / "target").symlink_to(victim)
    assert push_one(fleet, source, tmp_path / "target") == Exited(0)
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert victim.exists() != dangling
    assert dangling or victim.read_bytes() == b"precious"


def test_a_link_to_a_directory_at_the_destination_is_replaced(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "inside")
    assert push_one(fleet, source, tmp_path / "target") == Exited(0)
    assert list((tmp_path / "inside").iterdir()) == []
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_directories_are_found_through_links_of_ones_own(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "relative").symlink_to("../absolute/./deep")
    assert push_one(fleet, source, f"{tmp_path}/absolute/relative/target") == Exited(0)
    assert (tmp_path / "real" / "deep" / "target").read_bytes() == source.read_bytes()


def test_links_that_lead_in_a_circle_are_refused(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "symbolic link" in refusal(fleet, source, tmp_path / "a" / "target")


@as_root
def test_a_link_of_another_user_is_not_followed(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.lchown(tmp_path / "link", OTHER_UID, OTHER_UID)
    assert "symbolic link of another user" in refusal(fleet, source, tmp_path / "link" / "target")
    # Nor where a link of one's own leads to it.
    (tmp_path / "mine").symlink_to(tmp_path / "link")
    assert "symbolic link of another user" in refusal(fleet, source, tmp_path / "mine" / "target")
    assert list((tmp_path / "victim").iterdir()) == []


# --- who else is at work there ----------------------------------------------------------------------------------------

#: Swaps a directory for a link to another, and back, for as long as it may.
_SWAP = """
import os, sys
os.chdir(sys.argv[1])
while True:
    os.rename("a", "b")
    os.symlink(sys.argv[2], "link")
    os.rename("link", "a")
    os.unlink("a")
    os.rename("b", "a")
"""


def put_one(data: bytes, path: Path, notes: Path) -> None:
    """A file onto this machine, as an agent does it."""
    push = file_push(data, path, mode=0o644)
    incoming = Incoming(push.folder, push.stream, push.listing, notes)
    try:
        put(incoming, push.stream, [data])
    finally:
        incoming.close()


#: How often a push meets each side of a race: on a machine that is busy otherwise it is once or twice a second.
_OFTEN = 20


@as_root
def test_no_directory_is_swapped_for_a_link_while_nobody_looks(
    fleet: LocalFleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    for folder in (home, *home.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    playground, victim, notes = home / "playground", home / "victim", home / "notes"
    for folder in (playground, playground / "a", victim, notes):
        folder.mkdir()
    for folder in (playground, playground / "a"):
        os.chown(folder, OTHER_UID, OTHER_UID)
    swapper = subprocess.Popen(
        ["/usr/bin/python3", "-c", _SWAP, str(playground), str(victim)],
        user=OTHER_UID, group=OTHER_UID, extra_groups=[], env={}, stderr=subprocess.PIPE,
    )  # fmt: skip
    outcomes: dict[str, int] = {}
    try:
        wait_until(lambda: not (playground / "a").is_dir() or (playground / "a").is_symlink(), DEADLINE_S, "a swap")
        deadline = time.monotonic() + 2 * DEADLINE_S
        while min(outcomes.get("put", 0), outcomes.get("link", 0)) < _OFTEN and time.monotonic() < deadline:
            for _ in range(100):
                try:
                    put_one(os.urandom(20), playground / "a" / "target", notes)
                    what = "put"
                except BadDestination as error:
                    what = "link" if "symbolic link" in str(error) else "gone"
                except OSError:
                    what = "gone"
                outcomes[what] = outcomes.get(what, 0) + 1
        # And some the whole way, through an agent.
        (home / "source").write_bytes(b"pushed")
        for _ in range(20):
            push_one(fleet, home / "source", playground / "a" / "target")
        assert swapper.poll() is None, swapper.communicate()
    finally:
        swapper.kill()
        swapper.communicate()
    assert list(victim.iterdir()) == []
    # The race was run: both sides of it were met often.
    assert min(outcomes["put"], outcomes["link"]) >= _OFTEN, outcomes
    assert list(notes.iterdir()) == []
    assert not [path for path in playground.rglob("*") if path.name.startswith(".canopy-")]


def test_a_reader_sees_the_old_file_or_the_new_one(fleet: LocalFleet, tmp_path: Path) -> None:
    versions = [os.urandom(size) for size in (2_000_000, 1_500_000, 40_000)]
    for number, data in enumerate(versions):
        (tmp_path / f"source{number}").write_bytes(data)
    target = tmp_path / "target"
    target.write_bytes(versions[0])
    whole = {hashlib.sha256(data).digest() for data in versions}
    seen: dict[bytes, int] = {}
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            digest = hashlib.sha256(target.read_bytes()).digest()
            seen[digest] = seen.get(digest, 0) + 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in [1, 2, 0] * 7:
            assert push_one(fleet, tmp_path / f"source{number}", target) == Exited(0)
    finally:
        over.set()
        reader.join()
    assert set(seen) <= whole
    assert len(seen) >= 2
    assert sum(seen.values()) > 20


def test_two_pushes_to_one_place_leave_one_of_the_files(fleet: LocalFleet, tmp_path: Path) -> None:
    versions = [os.urandom(1_000_000) for _ in range(4)]
    for number, data in enumerate(versions):
        (tmp_path / f"source{number}").write_bytes(data)
    jobs = [fleet.session.push(tmp_path / f"source{number}", str(tmp_path / "target"), ["h2"]) for number in range(4)]
    for job in jobs:
        assert all(result.ok for result in job.results())
    assert (tmp_path / "target").read_bytes() in versions


# --- no room, no right ------------------------------------------------------------------------------------------------


@as_root
def test_a_file_system_that_can_not_be_written_fails_with_its_reason(
    fleet: LocalFleet, source: Path, place: Path
) -> None:
    for name in ("new", "old"):
        outcome = push_one(fleet, source, place / "ro" / name, "h1")
        assert isinstance(outcome, FailedToStart)
        assert "Read-only file system" in outcome.why
    assert fleet.answers(["ls", "-A", f"{place}/ro"], ["h1"]) == {"h1": b"old\n"}
    # What is right already needs no writing.
    (place / "same").write_bytes(b"old")
    (place / "same").chmod(stat.S_IMODE((place / "ro" / "old").stat().st_mode))
    assert pushed(fleet, place / "same", place / "ro" / "old", ["h1"])["h1"].stdout == b"unchanged"


@as_root
def test_a_full_disk_fails_with_its_reason_and_keeps_the_old_file(
    fleet: LocalFleet, tmp_path: Path, place: Path
) -> None:
    for size in (SIZES[0], 3_000_000):
        (tmp_path / "source").write_bytes(os.urandom(size))
        # Full to the last byte for the small one, which the other then finds as well.
        fleet.answers(f"cd {place}/small; echo old > target; cat /dev/zero > filler 2> /dev/null || true", ["h1"])
        outcome = push_one(fleet, tmp_path / "source", place / "small" / "target", "h1")
        assert isinstance(outcome, FailedToStart)
        assert "No space left" in outcome.why
        listing = fleet.answers(f"cd {place}/small; cat target; rm filler; ls -A", ["h1"])
        assert listing == {"h1": b"old\ntarget\n"}


@as_root
def test_a_relay_that_has_no_room_gives_the_file_on(fleet: LocalFleet, tmp_path: Path, place: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(data)
    results = fleet.session.push(tmp_path / "source", str(place / "small" / "target")).results()
    outcomes = {host: result.outcome for result in results for host in result.hosts}
    assert isinstance(outcomes.pop("h1"), FailedToStart)
    assert outcomes == {"h0": Exited(0), "h2": Exited(0)}
    assert (place / "small" / "target").read_bytes() == data
    (place / "small" / "target").unlink()


def test_a_source_that_changes_in_mid_push_is_not_put_anywhere(fleet: LocalFleet, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 * CHUNK))
    os.kill(fleet.pid("h0"), signal.SIGSTOP)
    try:
        job = fleet.session.push(source, str(tmp_path / "target"), ["h2"])
        with source.open("r+b") as file:
            file.seek(20 * CHUNK)
            file.write(b"changed")
    finally:
        os.kill(fleet.pid("h0"), signal.SIGCONT)
    (result,) = job.results()
    assert isinstance(result.outcome, FailedToStart)
    assert "changed while it was pushed" in result.outcome.why
    assert not (tmp_path / "target").exists()


def test_a_push_goes_on_after_a_restart_of_the_service(fleet: LocalFleet, tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    for number in range(700):
        (top / f"{number}").write_bytes(os.urandom(100))
    (top / "large").write_bytes(os.urandom(100 * CHUNK))
    os.kill(fleet.pid("h0"), signal.SIGSTOP)
    try:
        job = fleet.session.push(top, "@/")
        fleet.kill_service()
        job.close()
        fleet.start_service()
    finally:
        os.kill(fleet.pid("h0"), signal.SIGCONT)
    fleet.wait_until_home()
    results = fleet.session.job(job.id).results()
    assert {host for result in results for host in result.hosts} == set(fleet.names)
    assert all(result.ok for result in results), results
    for name in fleet.names:
        there = fleet.directory(name).path / "top"
        assert (there / "large").read_bytes() == (top / "large").read_bytes()
        assert len(list(there.iterdir())) == 701
    wait_until(lambda: not list((fleet.session.directory / "pushes").iterdir()), DEADLINE_S, "its note to be gone")


# --- in the middle ----------------------------------------------------------------------------------------------------


#: A child of the agent that the push is for as well.
CHILD = 10


class Pushed:
    """A push of eight chunks that an agent was told of, and what it asked for."""

    def __init__(self, stage: Stage, data: bytes, target: Path) -> None:
        self.stage, self.data, self._target = stage, data, target
        delivery = stage.delivery(
            file_push(data, target), to=[AGENT, CHILD], targets=[AGENT, CHILD], manner=Manner.BULK
        )
        self.id = delivery.id
        self._given = 0
        stage.parent.send(delivery)

    def chunk(self, index: int) -> bytes:
        return self.data[index * CHUNK : (index + 1) * CHUNK]

    def asked(self) -> list[int]:
        """The chunks that were asked for, in order."""
        asks = [ask for ask in self.stage.parent.bulk_heard if isinstance(ask, Ask) and ask.id == self.id]
        return [index for ask in asks for index in ask.indices]

    def give(self, most: int) -> None:
        """Give what was asked for first, so many in all."""
        for index in self.asked()[self._given : most]:
            self.stage.parent.send_chunk(self.id, index, self.chunk(index))
            self._given += 1

    def give_all(self) -> None:
        """Give whatever else was asked for."""
        self.give(len(self.asked()))

    def ended(self) -> bool:
        """Give what else was asked for; whether the agent has said what became of it."""
        self.give_all()
        return bool(self.stage.parent.outcomes(self.id))

    def again(self) -> Pushed:
        """The same push once more."""
        return Pushed(self.stage, self.data, self._target)


@contextmanager
def half_pushed(tmp_path: Path) -> Iterator[tuple[Stage, Pushed]]:
    """An agent that was told of a push and has two chunks of eight."""
    stage = Stage(tmp_path / "stage", own_address(), [CHILD], {})
    try:
        stage.start()
        push = Pushed(stage, os.urandom(8 * CHUNK), tmp_path / "target")
        stage.until(lambda: len(push.asked()) >= 2, "the agent to ask")
        push.give(2)
        (staging,) = stage.until(lambda: left_over(tmp_path), "the temporary directory")
        assert stat.S_IMODE(staging.stat().st_mode) == 0o700
        part = staging / "0"
        stage.until(lambda: part.read_bytes()[: 2 * CHUNK] == push.data[: 2 * CHUNK], "two chunks to be stored")
        assert stat.S_IMODE(part.stat().st_mode) == 0o600
        yield stage, push
    finally:
        stage.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old file there"])
def test_a_push_goes_on_after_a_restart_of_the_agent_with_what_had_come(
    tmp_path: Path, *, there: bool, number: signal.Signals
) -> None:
    if there:
        (tmp_path / "target").write_bytes(b"old")
    with half_pushed(tmp_path) as (stage, push):
        assert stage.process is not None
        stage.process.send_signal(number)
        stage.process.wait(DEADLINE_S)
        stage.start()
        # Nobody sees a half file; what has come waits in a directory that is the agent's alone.
        assert (tmp_path / "target").exists() == there
        assert not there or (tmp_path / "target").read_bytes() == b"old"
        again = push.again()
        stage.until(again.ended, "an outcome")
        assert stage.parent.outcomes(again.id) == {AGENT: [Exited(0)]}
        assert sorted(again.asked()) == [2, 3, 4, 5, 6, 7]
        assert not left_over(tmp_path)
        assert list(stage.directory.parts.iterdir()) == []
    assert (tmp_path / "target").read_bytes() == push.data


def test_what_had_come_and_was_spoilt_since_is_asked_for_again(tmp_path: Path) -> None:
    with half_pushed(tmp_path) as (stage, push):
        stage.kill()
        (staging,) = left_over(tmp_path)
        with (staging / "0").open("r+b") as file:
            file.write(b"spoilt")
        stage.start()
        again = push.again()
        stage.until(again.ended, "an outcome")
        assert sorted(again.asked()) == [0, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "target").read_bytes() == push.data


def test_a_push_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    with half_pushed(tmp_path) as (stage, push):
        stage.parent.send(stage.delivery(Cancel(of=push.id), manner=Manner.QUIET))
        outcomes = stage.until(lambda: stage.parent.outcomes(push.id).get(AGENT), "an outcome")
        assert outcomes == [Cancelled(ran=True)]
        stage.until(lambda: not left_over(tmp_path), "the temporary file to be gone")
        stage.until(lambda: not list(stage.directory.parts.iterdir()), "its note to be gone")
    assert (tmp_path / "target").read_bytes() == b"old"


def test_a_relay_that_fails_in_mid_push_gives_the_file_on(tmp_path: Path) -> None:
    with half_pushed(tmp_path) as (stage, push):
        assert stage.process is not None
        resource.prlimit(stage.process.pid, resource.RLIMIT_FSIZE, (3 * CHUNK, 3 * CHUNK))
        stage.attached(CHILD)
        child = stage.child(CHILD, bulk=True)
        child.send(Ask(push.id, (0, 1, 2, 3)))

        def half() -> bool:
            push.give_all()
            return len(child.chunks) == 4

        stage.until(half, "the child to have the first half")
        child.send(Ask(push.id, (4, 5, 6, 7)))

        def whole() -> bool:
            push.give_all()
            return len(child.chunks) == 8

        stage.until(whole, "the child to have the rest")
        assert b"".join(child.chunks[push.id, index] for index in range(8)) == push.data
        outcome = stage.until(lambda: stage.parent.outcomes(push.id).get(AGENT), "an outcome")[0]
        assert isinstance(outcome, FailedToStart)
        assert "File too large" in outcome.why
        stage.until(lambda: not left_over(tmp_path), "the temporary file to be gone")
    assert not (tmp_path / "target").exists()
