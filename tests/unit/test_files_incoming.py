"""Files and directories that are brought from one place to another: as they were, whole, and nowhere else."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

from agent import placing, staged
from agent.compare import _is_time
from agent.incoming import Incoming
from agent.paths import BadDestination
from agent.source import Source, gather
from agent.walk import BadSource
from protocol import listing as listings
from protocol.commands import Stream
from protocol.digest import content_digest
from protocol.limits import CHUNK, MAX_CHUNK, MAX_CHUNKS
from protocol.listing import PACKED_MOST, Entry, Kind, Listing, pack
from protocol.stream import stream_of
from protocol.wishes import Wishes
from tests.pushes import DEFAULT, bring, feed

OTHER_UID = 65_534
#: What a push says that had only that to put right, of one thing.
DRESSED = "mode, time, owner or attributes of 1"
#: The digest of a file without data.
EMPTY = content_digest(b"")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    made = tmp_path / "agent" / "parts"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with some of everything."""
    top = tmp_path / "tree"
    (top / "deep" / "er").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "empty" / "none").touch()
    (top / "small").write_bytes(b"small")
    (top / "deep" / "large").write_bytes(os.urandom(3 * CHUNK + 5))
    (top / "deep" / "er" / "run").write_bytes(b"#!/bin/sh\n")
    (top / "deep" / "er" / "run").chmod(0o4751)
    (top / "deep" / "shut").write_bytes(b"shut")
    (top / "deep" / "shut").chmod(0o000)
    os.link(top / "small", top / "deep" / "another")
    (top / "link").symlink_to("../../etc/passwd")
    (top / "deep" / "dangling").symlink_to(b"\xff nowhere \n")
    (top / os.fsdecode(b"odd \xff\n name")).write_bytes(b"odd")
    (top / "deep").chmod(0o750)
    os.utime(top / "small", ns=(5, 1_000_000_000_000_000_007))
    return top


def picture(top: Path, *, times: bool = False) -> dict[str, object]:
    """All that is there: kinds, modes, contents."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        info = path.lstat()
        what: object = os.readlink(path) if path.is_symlink() else b""
        if path.is_file() and not path.is_symlink():
            what = path.read_bytes()
        mode = 0 if path.is_symlink() else stat.S_IMODE(info.st_mode)
        time = info.st_mtime_ns if times or (path.is_file() and not path.is_symlink()) else None
        found[str(path.relative_to(top))] = (stat.S_IFMT(info.st_mode), mode, what, time)
    return found


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob(".canopy-*")]


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_a_directory_arrives_as_it_was(tree: Path, target: Path, notes: Path) -> None:
    assert bring([(b"tree", tree)], target, notes) == "pushed"
    assert picture(target / "tree") == picture(tree)
    assert (target / "tree/deep/another").stat().st_ino == (target / "tree/small").stat().st_ino
    assert not leftovers(target)
    assert list(notes.iterdir()) == []
    assert [path for path in notes.parent.iterdir() if path != notes] == []


def test_a_directory_that_is_there_already_is_not_written_again(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    before = {path: path.lstat() for path in target.rglob("*")}
    source = gather([(b"tree", str(tree))], DEFAULT, notes.parent)
    incoming = Incoming(str(target), source.stream, source.inline_listing, notes)
    assert feed(incoming, source) == []
    assert incoming.said() == "unchanged"
    incoming.close()
    after = {path: path.lstat() for path in target.rglob("*")}
    assert {path: (info.st_ino, info.st_ctime_ns) for path, info in before.items()} == {
        path: (info.st_ino, info.st_ctime_ns) for path, info in after.items()
    }


def test_only_what_differs_changes_and_what_is_not_in_the_push_stays(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    own = target / "tree/deep/own"
    own.write_bytes(b"mine")
    kept = (target / "tree/deep/large").stat().st_ino
    (tree / "small").write_bytes(b"other")
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    (tree / "new" / "er").mkdir(parents=True)
    (tree / "new" / "er" / "file").write_bytes(b"new")
    assert bring([(b"tree", tree)], target, notes) == "pushed 4 of 10"
    assert own.read_bytes() == b"mine"
    own.unlink()
    assert picture(target / "tree") == picture(tree)
    assert (target / "tree/deep/large").stat().st_ino == kept


def test_a_destination_with_a_default_access_list_leaves_modes_as_they_were(
    tree: Path, target: Path, notes: Path
) -> None:
    entries = ((0x01, 7), (0x04, 5), (0x20, 0))  # acl(5): the owner all, the group to read, others nothing
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, may, 0xFFFFFFFF) for tag, may in entries)
    try:
        os.setxattr(target, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    (tree / "small").chmod(0o664)
    bring([(b"tree", tree), (b"one", tree / "small")], target, notes)
    assert picture(target / "tree") == picture(tree)
    assert stat.S_IMODE((target / "one").stat().st_mode) == 0o664


def test_files_and_directories_go_together(tree: Path, target: Path, notes: Path) -> None:
    (tree / "lone").write_bytes(b"")
    said = bring([(b"one", tree / "small"), (b"d", tree / "deep"), (b"three", tree / "lone")], target, notes)
    assert said == "pushed"
    assert sorted(os.listdir(target)) == ["d", "one", "three"]
    assert picture(target / "d") == picture(tree / "deep")


def test_a_link_that_is_given_by_name_is_followed_and_one_in_a_directory_is_not(
    tree: Path, target: Path, notes: Path
) -> None:
    (tree.parent / "given").symlink_to(tree / "small")
    bring([(b"given", tree.parent / "given")], target, notes)
    assert not (target / "given").is_symlink()
    assert (target / "given").read_bytes() == b"small"


@pytest.mark.parametrize("several", [False, True], ids=["alone", "with another"])
def test_holes_are_not_sent_and_are_holes_again(tmp_path: Path, target: Path, notes: Path, *, several: bool) -> None:
    sparse, data = tmp_path / "sparse", os.urandom(8_192)
    with sparse.open("wb") as file:
        file.truncate(50 << 20)
        file.seek(30 << 20)
        file.write(data)
    roots: list[tuple[bytes, str | Path]] = [(b"sparse", sparse)]
    if several:
        (tmp_path / "other").write_bytes(b"other")
        roots.append((b"other", tmp_path / "other"))
    source = gather([(name, str(path)) for name, path in roots], DEFAULT, notes.parent)
    assert source.stream.size < 100_000
    source.close()
    assert bring(roots, target, notes) == "pushed"
    there = target / "sparse"
    assert there.stat().st_size == 50 << 20
    assert there.stat().st_blocks * 512 < 1 << 20
    with there.open("rb") as file:
        file.seek(30 << 20)
        assert file.read(len(data)) == data
        assert not file.read().strip(b"\0")
    assert bring(roots, target, notes) == "unchanged"
    # The same length with something in a hole is another file.
    with there.open("r+b") as file:
        file.seek(10 << 20)
        file.write(b"not nothing")
    assert bring(roots, target, notes) == ("pushed 1 of 2" if several else "pushed")
    with there.open("rb") as file:
        assert not file.read(30 << 20).strip(b"\0")


def test_a_mode_is_for_files_alone(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes, Wishes(mode=0o604))
    assert stat.S_IMODE((target / "tree/deep/shut").stat().st_mode) == 0o604
    assert stat.S_IMODE((target / "tree/deep").stat().st_mode) == 0o750


def test_all_times_are_kept_where_that_is_asked_for(tree: Path, target: Path, notes: Path) -> None:
    for path in (tree / "deep", tree / "deep" / "er", tree):
        os.utime(path, ns=(7, 7_000_000_007))
    bring([(b"tree", tree)], target, notes, Wishes(preserve=True), exact=True)
    assert picture(target / "tree", times=True) == picture(tree, times=True)
    assert (target / "tree").stat().st_mtime_ns == 7_000_000_007
    # Also of what is there already.
    os.utime(target / "tree" / "deep")
    (target / "tree" / "deep").chmod(0o700)
    assert bring([(b"tree", tree)], target, notes, Wishes(preserve=True), exact=True) == DRESSED
    assert (target / "tree" / "deep").stat().st_mtime_ns == 7_000_000_007
    assert stat.S_IMODE((target / "tree" / "deep").stat().st_mode) == 0o750
    # And of a directory that something is put into, or a link.
    (tree / "deep" / "large").write_bytes(b"other")
    os.utime(tree / "link", ns=(8, 8_000_000_008), follow_symlinks=False)
    assert bring([(b"tree", tree)], target, notes, Wishes(preserve=True), exact=True) == "pushed 1 of 9"
    assert picture(target / "tree", times=True) == picture(tree, times=True)
    assert (target / "tree" / "link").lstat().st_mtime_ns == 8_000_000_008
    assert bring([(b"tree", tree)], target, notes, Wishes(preserve=True), exact=True) == "unchanged"


def test_a_files_time_is_put_right_and_its_directorys_is_the_hosts_own(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    there, folder = target / "tree/deep/large", target / "tree/deep"
    number = there.stat().st_ino
    os.utime(there)
    os.utime(folder, ns=(9, 9))
    assert bring([(b"tree", tree)], target, notes, dry_run=True) == "mode, time, owner or attributes: tree/deep/large"
    assert bring([(b"tree", tree)], target, notes) == DRESSED
    assert (there.stat().st_mtime_ns, there.stat().st_ino) == ((tree / "deep/large").stat().st_mtime_ns, number)
    assert folder.stat().st_mtime_ns == 9
    assert bring([(b"tree", tree)], target, notes) == "unchanged"
    # A file system that keeps whole seconds has the time as exactly as it can.
    os.utime(tree / "deep/large", ns=(0, 5_000_000_007))
    os.utime(there, ns=(0, 5_000_000_000))
    assert bring([(b"tree", tree)], target, notes) == "unchanged"
    os.utime(there, ns=(0, 5_000_000_008))
    assert bring([(b"tree", tree)], target, notes) == DRESSED


@pytest.mark.parametrize(
    ("wanted", "there", "same"),
    [
        (7_123_456_789, 7_123_456_789, True),
        (7_123_456_789, 7_123_456_700, True),  # NTFS
        (7_123_456_789, 7_120_000_000, True),  # exFAT
        (7_123_456_789, 7_000_000_000, True),  # ext4 with small inodes
        (7_123_456_789, 6_000_000_000, True),  # FAT
        (7_000_000_000, 6_000_000_000, True),
        (-1, -2_000_000_000, True),
        (7_123_456_789, 7_123_456_800, False),
        (7_123_456_789, 7_123_456_788, False),
        (7_123_456_789, 7_123_456_600, False),
        (7_123_456_789, 7_123_000_000, False),
        (7_123_456_789, 7_110_000_000, False),
        (7_123_456_789, 8_000_000_000, False),
        (8_123_456_789, 7_000_000_000, False),
        (8_123_456_789, 6_000_000_000, False),
        (7_123_456_789, 0, False),
    ],
)
def test_a_time_is_right_as_exactly_as_a_file_system_keeps_it(
    tmp_path: Path, wanted: int, there: int, *, same: bool
) -> None:
    file = tmp_path / "file"
    file.touch()
    os.utime(file, ns=(0, there))
    assert _is_time(wanted, file.stat()) is same


def test_a_time_as_fat_keeps_it_is_left_alone_and_vouches_for_no_bytes(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    there = target / "tree/deep/large"
    os.utime(tree / "deep/large", ns=(0, 5_000_000_007))
    os.utime(there, ns=(0, 4_000_000_000))
    for by_time in (False, True):
        assert bring([(b"tree", tree)], target, notes, by_time=by_time) == "unchanged"
    there.write_bytes(there.read_bytes()[::-1])
    os.utime(there, ns=(0, 4_000_000_000))
    assert bring([(b"tree", tree)], target, notes, by_time=True) == "pushed 1 of 9"
    assert there.read_bytes() == (tree / "deep/large").read_bytes()


def test_only_its_owner_is_expected_to_set_a_files_time(
    tree: Path, target: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring([(b"tree", tree)], target, notes)
    there = target / "tree/deep/large"
    os.utime(there, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: there.stat().st_uid + OTHER_UID)
        assert bring([(b"tree", tree)], target, notes) == "unchanged"
        assert bring([(b"tree", tree)], target, notes, by_time=True) == "unchanged"
    assert bring([(b"tree", tree)], target, notes) == DRESSED
    assert there.stat().st_mtime_ns == (tree / "deep/large").stat().st_mtime_ns


@as_root
def test_owners_are_given_and_kept(tree: Path, target: Path, notes: Path) -> None:
    os.chown(tree / "small", OTHER_UID, OTHER_UID)
    bring([(b"kept", tree)], target, notes, Wishes(preserve=True))
    assert ((target / "kept/small").stat().st_uid, (target / "kept/deep").stat().st_uid) == (OTHER_UID, 0)
    bring([(b"given", tree)], target, notes, Wishes(user=str(OTHER_UID), group="daemon"))
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in (target / "given").rglob("*")}
    assert owners == {(OTHER_UID, 1)}
    assert stat.S_IMODE((target / "given/deep/er/run").stat().st_mode) == 0o4751
    # What has the right bytes has its owner put right.
    os.chown(target / "given/small", 0, 0)
    assert bring([(b"given", tree)], target, notes, Wishes(user=str(OTHER_UID), group="daemon")) == DRESSED
    assert (target / "given/small").stat().st_uid == OTHER_UID


def test_extended_attributes_go_along_where_that_is_asked_for(tree: Path, target: Path, notes: Path) -> None:
    try:
        os.setxattr(tree / "small", "user.colour", b"green")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    os.setxattr(tree / "deep", "user.colour", b"red")
    bring([(b"without", tree)], target, notes)
    assert os.listxattr(target / "without/small") == []
    assert bring([(b"without", tree)], target, notes) == "unchanged"
    said = bring([(b"without", tree)], target, notes, Wishes(xattrs=True))
    assert said == "mode, time, owner or attributes of 2"
    assert os.getxattr(target / "without/small", "user.colour") == b"green"
    assert os.getxattr(target / "without/deep", "user.colour") == b"red"
    assert bring([(b"without", tree)], target, notes, Wishes(xattrs=True)) == "unchanged"
    bring([(b"with", tree)], target, notes, Wishes(xattrs=True))
    assert os.getxattr(target / "with/small", "user.colour") == b"green"
    assert os.getxattr(target / "with/deep", "user.colour") == b"red"


def test_what_is_replaced_is_kept_under_another_name(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    for number in (1, 2):
        (tree / "small").write_bytes(b"%d" % number)
        bring([(b"tree", tree)], target, notes, backup=".old")
    assert (target / "tree/small").read_bytes() == b"2"
    assert (target / "tree/small.old").read_bytes() == b"1"
    assert not (target / "tree/deep/large.old").exists()


def test_size_and_time_are_trusted_only_where_that_is_asked_for(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    there = target / "tree/small"
    time = there.stat().st_mtime_ns
    there.write_bytes(b"SMALL")
    os.utime(there, ns=(time, time))
    assert bring([(b"tree", tree)], target, notes, by_time=True) == "unchanged"
    assert there.read_bytes() == b"SMALL"
    assert bring([(b"tree", tree)], target, notes) == "pushed 2 of 9"  # the file, and its other name
    assert there.read_bytes() == b"small"
    os.utime(there, ns=(1, 1))
    assert bring([(b"tree", tree)], target, notes, by_time=True) == DRESSED
    assert there.stat().st_mtime_ns == time


def test_a_dry_run_says_what_would_change_and_changes_nothing(tree: Path, target: Path, notes: Path) -> None:
    assert "new: tree/deep/large" in bring([(b"tree", tree)], target, notes, dry_run=True).split("\n")
    assert list(target.iterdir()) == []
    bring([(b"tree", tree)], target, notes)
    before = picture(target)
    assert bring([(b"tree", tree)], target, notes, dry_run=True) == "nothing would change"
    (tree / "deep/large").write_bytes(b"other")
    (tree / "deep/shut").chmod(0o400)
    (tree / "newer").touch()
    assert bring([(b"tree", tree)], target, notes, dry_run=True).split("\n") == [
        "new: tree/newer",
        "changed: tree/deep/large",
        "mode, time, owner or attributes: tree/deep/shut",
    ]
    assert picture(target) == before
    assert not leftovers(target)


def test_a_long_listing_travels_in_front_of_the_data(tmp_path: Path, target: Path, notes: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(1_500):
        (many / f"file {number}").write_bytes(b"%d" % number * 50)
    source = gather([(b"many", str(many))], DEFAULT, notes.parent)
    assert source.stream.head > 1
    assert source.inline_listing is None
    incoming = Incoming(str(target), source.stream, None, notes)
    count = source.stream.size // CHUNK + 1
    assert feed(incoming, source) == list(range(count))
    # The head and all files can still be had by those who ask, from where they are now.
    assert [incoming.read(index) for index in range(count)] == [source.read(index) for index in range(count)]
    incoming.close()
    assert picture(target / "many") == picture(many)
    assert bring([(b"many", many)], target, notes) == "unchanged"
    assert "new: again/file 100" in bring([(b"again", many)], target, notes, dry_run=True).split("\n")
    assert not leftovers(target)


# --- what is not sent -------------------------------------------------------------------------------------------------


def test_a_listing_that_stays_packed_is_followed_as_any_other(
    tree: Path, target: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = listings.unpack.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "packed_above", 0)
    whole = Wishes(preserve=True)
    assert bring([(b"tree", tree)], target, notes, whole, exact=True) == "pushed"
    assert picture(target / "tree", times=True) == picture(tree, times=True)
    assert (target / "tree/deep/another").stat().st_ino == (target / "tree/small").stat().st_ino
    assert bring([(b"tree", tree)], target, notes, whole, exact=True) == "unchanged"
    (tree / "small").write_bytes(b"other")
    (tree / "deep/shut").chmod(0o600)
    assert bring([(b"tree", tree)], target, notes, dry_run=True).split("\n") == [
        "changed: tree/small",
        "changed: tree/deep/another",
        "mode, time, owner or attributes: tree/deep/shut",
    ]
    assert bring([(b"tree", tree)], target, notes, whole, exact=True, backup="~") == "pushed 2 of 9"
    assert (target / "tree/small~").read_bytes() == b"small"
    for path in (target / "tree/small~", target / "tree/deep/another~"):
        path.unlink()
    assert picture(target / "tree") == picture(tree)
    assert not leftovers(target)


def test_what_is_no_file_is_refused_by_name_and_all_of_it_at_once(tree: Path, notes: Path) -> None:
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        folder = os.open(tree / "deep", os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{folder}/sock")
        os.close(folder)
    with pytest.raises(BadSource) as refused:
        gather([(b"tree", str(tree)), (b"null", "/dev/null")], DEFAULT, notes.parent)
    for part in ("tree/pipe: it is a pipe", "tree/deep/sock: it is a socket", "/dev/null is a device"):
        assert part in str(refused.value)
    assert [path for path in notes.parent.iterdir() if path != notes] == []


def test_a_source_can_be_read_again_after_a_restart(tree: Path, notes: Path) -> None:
    single = gather([(b"large", str(tree / "deep/large"))], DEFAULT, notes.parent)
    several = gather([(b"tree", str(tree)), (b"x", str(tree / "small"))], DEFAULT, notes.parent)
    for source in (single, several):
        source.save(notes / "saved")
        again = Source.load(notes / "saved", source.stream)
        count = -(-source.stream.size // source.stream.chunk)
        assert [again.read(index) for index in range(count)] == [source.read(index) for index in range(count)]
        source.close()
        again.close()
    (notes / "saved").write_bytes(b"spoilt")
    with pytest.raises(OSError, match="saved"):
        Source.load(notes / "saved", single.stream)


# --- where it does not go ---------------------------------------------------------------------------------------------


def offered(target: Path, notes: Path, *entries: Entry, data: bytes = b"", exact: bool = False) -> str:
    """Bring a made-up listing, whatever it says; what is said of it."""
    body = msgspec.msgpack.encode(Listing(entries))
    stream = stream_of(lambda index: data[index * CHUNK : (index + 1) * CHUNK], len(data))
    incoming = Incoming(str(target), stream, len(body).to_bytes(4, "big") + body, notes, exact=exact)
    try:
        for at in range(0, len(data), CHUNK):
            incoming.write([(at // CHUNK, data[at : at + CHUNK])])
        incoming.finish()
        return incoming.said()
    finally:
        incoming.close()


D, F, L = Kind.DIRECTORY, Kind.FILE, Kind.LINK


@pytest.mark.parametrize(
    "entries",
    [
        [Entry(b"../out", F)],
        [Entry(b"/etc/out", F)],
        [Entry(b"a", L, target=b".."), Entry(b"a/out", F)],
        [Entry(b"a", D), Entry(b"a", L, target=b".."), Entry(b"a/out", F)],
        [Entry(b"fine", F), Entry(b"\0", F)],
        [Entry(b"fine", F), Entry(b"fine", F)],
        [Entry(b"fine", F), Entry(b"x" * 300, F)],
        [Entry(b"fine", F), Entry(b"whose", F, owner=0)],
        [Entry(b"fine", F, size=1)],
    ],
)
def test_a_listing_that_is_hostile_anywhere_leaves_nothing(entries: list[Entry], target: Path, notes: Path) -> None:
    with pytest.raises(BadDestination):
        offered(target, notes, *entries)
    assert list(target.iterdir()) == []
    assert list(notes.iterdir()) == []
    assert sorted(os.listdir(target.parent)) == ["agent", "target"]


@pytest.mark.parametrize("chunk", [CHUNK, MAX_CHUNK])
def test_a_head_that_is_longer_than_any_listing_takes_no_memory_and_leaves_nothing(
    target: Path, notes: Path, chunk: int
) -> None:
    most = -(-PACKED_MOST // chunk)
    stream = Stream(size=MAX_CHUNKS * chunk, chunk=chunk, digests=bytes(32 * MAX_CHUNKS), digest="0" * 64)
    for head in (most + 1, MAX_CHUNKS):
        with pytest.raises(BadDestination, match="refused as a whole: the head"):
            Incoming(str(target), msgspec.structs.replace(stream, head=head), None, notes)
    assert list(target.iterdir()) == []
    assert list(notes.iterdir()) == []
    longest = Incoming(str(target), msgspec.structs.replace(stream, head=most), None, notes)
    longest.close()


@pytest.mark.parametrize("deep", [False, True])
def test_no_link_below_the_destination_is_followed(target: Path, notes: Path, *, deep: bool) -> None:
    outside = target.parent / "outside"
    (outside / "b").mkdir(parents=True)
    if deep:
        (target / "a").mkdir()
        (target / "a" / "b").symlink_to(outside / "b")
    else:
        (target / "a").symlink_to(outside)
    with pytest.raises(BadDestination, match="symbolic link"):
        offered(target, notes, Entry(b"a", D), Entry(b"a/b", D), Entry(b"a/b/c", F))
    assert list((outside / "b").iterdir()) == []


def test_a_directory_that_becomes_a_link_in_the_middle_is_not_followed(tree: Path, target: Path, notes: Path) -> None:
    bring([(b"tree", tree)], target, notes)
    (tree / "deep" / "large").write_bytes(os.urandom(2 * CHUNK))
    source = gather([(b"tree", str(tree))], DEFAULT, notes.parent)
    incoming = Incoming(str(target), source.stream, source.inline_listing, notes)
    outside = target.parent / "outside"
    (target / "tree" / "deep").rename(outside)
    (target / "tree" / "deep").symlink_to(outside)
    before = picture(outside)
    with pytest.raises(BadDestination, match="symbolic link"):
        feed(incoming, source)
    incoming.close()
    source.close()
    assert picture(outside) == before
    assert not leftovers(target)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "no regular file"),
    ],
)
def test_something_in_the_way_of_one_file_stops_all_of_them(
    target: Path, notes: Path, make: Callable[[Path], None], why: str
) -> None:
    make(target / "b")
    with pytest.raises(BadDestination, match=why):
        offered(target, notes, Entry(b"a", F), Entry(b"b", F))
    assert os.listdir(target) == ["b"]


def test_a_file_in_the_way_of_a_directory_stays(target: Path, notes: Path) -> None:
    (target / "a").write_bytes(b"old")
    with pytest.raises(BadDestination, match="no directory here"):
        offered(target, notes, Entry(b"a", D), Entry(b"a/b", F))
    assert (target / "a").read_bytes() == b"old"


def test_an_owner_that_nobody_knows_here_is_refused(tree: Path, target: Path, notes: Path) -> None:
    for wishes, why in ((Wishes(user="nobody-at-all"), "no user"), (Wishes(group="nobody-at-all"), "no group")):
        with pytest.raises(BadDestination, match=why):
            bring([(b"tree", tree)], target, notes, wishes)
    assert list(target.iterdir()) == []


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that another user can reach and write to, unlike pytest's own."""
    with TemporaryDirectory() as path:
        Path(path).chmod(0o777)
        yield Path(path)


def offered_by_other(target: Path, *entries: Entry, data: bytes = b"", exact: bool = False) -> str:
    """The same in a process of another user: what is said of it, or the exception."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups([])
            os.setresgid(OTHER_UID, OTHER_UID, OTHER_UID)
            os.setresuid(OTHER_UID, OTHER_UID, OTHER_UID)
            notes = target / "notes"
            notes.mkdir(0o700, exist_ok=True)
            said = offered(target, notes, *entries, data=data, exact=exact)
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


@as_root
def test_a_directory_of_another_users_gets_files_though_its_time_cannot_be_put_back(shared: Path, notes: Path) -> None:
    tree = Entry(b"tree", D, 0o777, 5_000_000_000)
    offered(shared, notes, tree, exact=True)
    for data in (b"one", b"three"):  # the second time the time is another from the start
        file = Entry(b"tree/file", F, 0o644, 7, size=len(data))
        assert offered_by_other(shared, tree, file, data=data, exact=True) in ("pushed", "pushed 1 of 1")
        assert (shared / "tree/file").read_bytes() == data
    assert (shared / "tree/file").stat().st_uid == OTHER_UID
    assert (shared / "tree").stat().st_mtime_ns != tree.mtime_ns
    assert not leftovers(shared)


@as_root
@pytest.mark.parametrize(
    ("there", "now", "exact"),
    [
        (Entry(b"tree", D, 0o777, 5), Entry(b"tree", D, 0o755, 5), True),
        (Entry(b"file", F, 0o644, 5), Entry(b"file", F, 0o600, 5, digest=EMPTY), False),
        (Entry(b"file", F, 0o644, 5), Entry(b"file", F, 0o644, 6, digest=EMPTY), True),
    ],
    ids=["a directory's mode", "a file's mode", "a file's exact time"],
)
def test_what_cannot_be_put_right_of_another_users_is_known_before_anything_changes(
    shared: Path, notes: Path, there: Entry, now: Entry, exact: bool
) -> None:
    offered(shared, notes, there, exact=True)
    said = offered_by_other(shared, now, Entry(b"new", F, 0o644, 7, size=3), data=b"new", exact=exact)
    assert said.startswith("BadDestination")
    assert "is another user's here" in said
    assert sorted(path.name for path in shared.iterdir()) == sorted(["notes", os.fsdecode(there.path)])


def test_a_file_that_does_not_match_its_own_digest_is_not_put_anywhere(target: Path, notes: Path) -> None:
    for size in (10, CHUNK + 10):
        good, bad = Entry(b"good", F, size=4, digest=b""), Entry(b"bad", F, size=size, digest=b"x" * 32)
        with pytest.raises(OSError, match="does not match its digest"):
            offered(target, notes, good, bad, data=os.urandom(4 + size))
        assert list(target.iterdir()) == []


def test_no_room_is_known_before_anything_is_written(target: Path, notes: Path) -> None:
    data = b"x" * 10
    body = pack(Listing((Entry(b"a", F, size=1 << 55, extents=((0, 1 << 55),)),)))
    stream = msgspec.structs.replace(stream_of(lambda _: data, len(data)), size=1 << 55, chunk=1 << 52)
    with pytest.raises(OSError, match="No space left"):
        Incoming(str(target), stream, body, notes)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(("quick", "first"), [(float("inf"), 3), (0.0, 1)], ids=["at once", "step by step"])
def test_room_for_a_large_file_is_reserved_ahead_of_what_is_written(
    target: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, quick: float, first: int
) -> None:
    monkeypatch.setattr(staged, "_QUICK", quick)
    step = staged._RESERVED
    size = 3 * step
    stream = stream_of(lambda _: bytes(CHUNK), size)
    incoming = Incoming(str(target), stream, pack(Listing((Entry(b"a", F, size=size),))), notes)
    try:
        (path,) = (path for path in target.rglob("*") if path.is_file())
        for written, reserved in ((0, first), (step // CHUNK, max(first, 2)), (size // CHUNK - 1, 3)):
            if written:
                incoming.write([(written, bytes(CHUNK))])
            info = path.stat()
            assert info.st_size == size
            assert reserved * step <= info.st_blocks * 512 < (reserved + 1) * step
    finally:
        incoming.close()


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A directory of eight chunks of data: small files, then one that is large."""
    top = tmp_path / "large"
    top.mkdir()
    for number in range(200):
        (top / f"{number:03}").write_bytes(os.urandom(5_000))
    (top / "z").write_bytes(os.urandom(4 * CHUNK))
    return top


def half(large: Path, target: Path, notes: Path, *, keep: bool) -> tuple[Source, list[int]]:
    """Bring three chunks, and stop."""
    source = gather([(b"large", str(large))], DEFAULT, notes.parent)
    incoming = Incoming(str(target), source.stream, source.inline_listing, notes)
    brought = feed(incoming, source, most=3)
    incoming.close(keep=keep)
    return source, brought


def test_what_is_cancelled_leaves_nothing(large: Path, target: Path, notes: Path) -> None:
    half(large, target, notes, keep=False)[0].close()
    assert list(target.iterdir()) == []
    assert list(notes.iterdir()) == []


def test_what_is_interrupted_goes_on_where_it_was(large: Path, target: Path, notes: Path) -> None:
    source, brought = half(large, target, notes, keep=True)
    assert os.listdir(target) == [path.name for path in leftovers(target)]
    count = -(-source.stream.size // CHUNK)
    again = Incoming(str(target), source.stream, source.inline_listing, notes)
    assert brought + feed(again, source) == list(range(count))
    again.close()
    source.close()
    assert picture(target / "large") == picture(large)
    assert os.listdir(target) == ["large"]
    assert list(notes.iterdir()) == []


def test_what_another_push_is_at_work_on_is_left_to_it(large: Path, target: Path, notes: Path) -> None:
    source, _ = half(large, target, notes, keep=True)
    one = Incoming(str(target), source.stream, source.inline_listing, notes)
    two = Incoming(str(target), source.stream, source.inline_listing, notes)
    assert one.have
    assert not two.have
    feed(one, source)
    two.close()
    one.close()
    source.close()
    assert picture(target / "large") == picture(large)
    assert os.listdir(target) == ["large"]
    assert list(notes.iterdir()) == []


def test_what_came_before_and_does_not_match_is_fetched_again(large: Path, target: Path, notes: Path) -> None:
    source, brought = half(large, target, notes, keep=True)
    (staging,) = leftovers(target)
    for path in (staging / "0").iterdir():
        path.chmod(0o600)
        path.write_bytes(b"spoilt" * 1_000)
    again = Incoming(str(target), source.stream, source.inline_listing, notes)
    assert feed(again, source)[: len(brought)] == brought
    again.close()
    source.close()
    assert picture(target / "large") == picture(large)


def test_files_are_on_disk_before_they_have_their_names(
    large: Path, tree: Path, target: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fsync, rename = os.fsync, os.rename

    def syncing(fd: int) -> None:
        told.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def renaming(*args: object, **options: object) -> None:
        told.append("rename")
        rename(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(placing, "_syncfs", lambda _: told.append("syncfs"))
    bring([(b"large", large)], target, notes)
    assert told[1:] == ["syncfs", "rename", "sync target"]  # first of all the note is written
    told.clear()
    bring([(b"one", tree / "small")], target, notes)
    assert told[1:] == ["sync 0", "rename", "sync target"]


def test_whoever_lets_go_hears_of_it_when_nothing_is_left(tree: Path, target: Path, notes: Path) -> None:
    source = gather([(b"tree", str(tree))], DEFAULT, notes.parent)
    incoming = Incoming(str(target), source.stream, source.inline_listing, notes)
    feed(incoming, source, most=1)
    assert leftovers(target)
    closing = threading.Thread(target=incoming.close)
    with incoming._in_use():  # as a write on another thread
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
    closing.join()
    assert not leftovers(target)
    source.close()
