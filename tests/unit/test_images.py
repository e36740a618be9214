"""A host's image store: what is there, whether it is right, and that nothing is removed that a VM is made of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.images import handle
from agent.vmxml import Flavour, Layout, domain_xml
from controller.api import KnownImage
from controller.spawn_images import DigestCache, ImageFinder, find_image, image_digest
from controller.status import CtlError
from protocol.stream import stream_of
from protocol.vms import DirectBoot, Disk, ImageAction, ImageState, Seed, VmSpec, images_of


class Host:
    """An agent's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir()

    def has_image(self, data: bytes) -> str:
        digest = stream_of(lambda _: data, len(data)).digest
        path = self.images / digest
        path.write_bytes(data)
        path.chmod(0o444)
        return digest

    def has_vm(self, name: str, **parts: object) -> None:
        known: dict[str, object] = {
            "name": name, "uuid": "00000000-0000-0000-0000-000000000000", "deployment": "d", "vcpus": 1,
            "memory_mib": 64, "mac": "00:16:3E:00:00:01", "ip": "10.0.0.1", "prefix": 8,
        }  # fmt: skip
        spec = VmSpec(**(known | parts))  # type: ignore[arg-type]
        layout = Layout(console="/c", kernel="/k", initrd="/i", overlay="/o", seed="/s")
        folder = self.directory / "vms" / name
        folder.mkdir(parents=True)
        document = domain_xml(spec, layout, Flavour(kind="test", architecture="x86_64"), str(self.directory))
        (folder / "domain.xml").write_text(document)

    def states(self, action: ImageAction, *digests: str) -> dict[str, ImageState]:
        return {one.digest: one.state for one in handle(self.directory, action, digests or None)}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_is_there_is_listed_with_its_size_and_its_vms(host: Host) -> None:
    base, kernel = host.has_image(b"base"), host.has_image(b"a kernel")
    host.has_vm("a", disk=Disk(image=base))
    host.has_vm("b", disk=Disk(image=base), boot=DirectBoot(kernel=kernel))
    (host.images / ".canopy-1-push").write_bytes(b"on its way")
    found = {one.digest: (one.state, one.size, one.vms) for one in handle(host.directory, ImageAction.LIST, None)}
    assert found == {base: (ImageState.PRESENT, 4, 2), kernel: (ImageState.PRESENT, 8, 1)}


def test_an_agent_that_never_had_an_image_has_none(tmp_path: Path) -> None:
    assert handle(tmp_path, ImageAction.LIST, None) == []
    assert handle(tmp_path, ImageAction.REMOVE, ["0" * 64])[0].state is ImageState.ABSENT


def test_every_kind_of_use_counts() -> None:
    spec = VmSpec(
        name="a", uuid="0", deployment="d", vcpus=1, memory_mib=1, mac="", ip="", prefix=8,
        boot=DirectBoot(kernel="k", initrd="i"), disk=Disk(image="d"), seed=Seed(user_data="u"),
    )  # fmt: skip
    assert images_of(spec) == {"k", "i", "d", "u"}


def test_images_are_read_again_against_their_digests(host: Host) -> None:
    right, changed, longer, writable = (host.has_image(data) for data in (b"1", b"22", b"333", b"4444"))
    for digest, data in ((changed, b"2x"), (longer, b"333more")):
        (host.images / digest).chmod(0o644)
        (host.images / digest).write_bytes(data)
        (host.images / digest).chmod(0o444)
    (host.images / writable).chmod(0o644)
    (host.images / ("f" * 64)).symlink_to("/etc/passwd")
    assert host.states(ImageAction.VERIFY) == {
        right: ImageState.RIGHT,
        changed: ImageState.WRONG,
        longer: ImageState.WRONG,
        writable: ImageState.WRONG,
        "f" * 64: ImageState.WRONG,
    }


def test_an_image_goes_unless_a_vm_is_made_of_it(host: Host) -> None:
    used, free = host.has_image(b"used"), host.has_image(b"free")
    host.has_vm("a", seed=Seed(user_data=used))
    assert host.states(ImageAction.REMOVE, used, free, "0" * 64) == {
        used: ImageState.IN_USE,
        free: ImageState.REMOVED,
        "0" * 64: ImageState.ABSENT,
    }
    assert os.listdir(host.images) == [used]
    assert host.states(ImageAction.VERIFY) == {used: ImageState.RIGHT}


def test_a_vm_that_nobody_can_read_may_be_made_of_anything(host: Host) -> None:
    digest = host.has_image(b"base")
    host.has_vm("a")
    document = host.directory / "vms" / "a" / "domain.xml"
    document.write_text(document.read_text().replace('"vcpus":1', '"vcpus":"of a later version"').replace(
        "&quot;vcpus&quot;:1", "&quot;vcpus&quot;:&quot;of a later version&quot;"
    ))  # fmt: skip
    assert host.states(ImageAction.REMOVE, digest) == {digest: ImageState.IN_USE}
    assert host.states(ImageAction.VERIFY, digest) == {digest: ImageState.RIGHT}


@pytest.mark.parametrize("used", [False, True])
def test_a_removal_that_was_cut_short_is_gone_on_with(host: Host, used: bool) -> None:
    digest = host.has_image(b"base")
    if used:
        host.has_vm("a", disk=Disk(image=digest))
    (host.images / digest).rename(host.images / f"{digest}.going")
    assert host.states(ImageAction.REMOVE, digest) == {digest: ImageState.IN_USE if used else ImageState.ABSENT}
    assert os.listdir(host.images) == ([digest] if used else [])


def test_a_long_reading_stops_when_nobody_waits_for_it(host: Host) -> None:
    digest = host.has_image(b"base")
    [result] = handle(host.directory, ImageAction.VERIFY, [digest], lambda: True)
    assert (result.state, result.detail) == (ImageState.FAILED, "given up")


def known(name: str, digest: str) -> KnownImage:
    return KnownImage(digest=digest * 64, name=name, size=1, format="qcow2", added_s_ago=0.0, used=0)


def test_an_image_is_found_by_its_name_or_the_beginning_of_its_digest() -> None:
    images = [known("debian.qcow2", "a"), known("ubuntu.qcow2", "b"), known("debian.qcow2", "c")]
    assert find_image(images, "ubuntu.qcow2").digest == "b" * 64
    assert find_image(images, "c" * 8).digest == "c" * 64
    with pytest.raises(CtlError, match="several images: choose one by its digest, aaaaaaaaaaaa, cccccccccccc"):
        find_image(images, "debian.qcow2")
    for name in ("b", "fedora", "d" * 12):
        with pytest.raises(CtlError, match="no file and no image is named"):
            find_image(images, name)


def test_a_file_wins_over_an_image_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder = ImageFinder(known=[known("base", "a")])
    assert finder.find("base") == ("a" * 64, "qcow2")
    Path("base").write_bytes(b"raw bytes")
    finder = ImageFinder(known=[known("base", "a")])
    assert finder.find("base") == (image_digest(Path("base")), "raw")
    assert list(finder.files.values()) == [Path("base")]


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = tmp_path / "base", tmp_path / "digests.json"
    path.write_bytes(b"base")
    os.utime(path, (1, 1))
    monkeypatch.setattr("controller.spawn_images._FRESH", 0.0)
    first = DigestCache(kept).digest(path)
    assert first == image_digest(path)
    monkeypatch.setattr("controller.spawn_images.image_digest", lambda _: "read again")
    assert DigestCache(kept).digest(path) == first
    path.write_bytes(b"esab")
    os.utime(path, (1, 1))
    assert DigestCache(kept).digest(path) == "read again", "the time of its change can't be set back"
    kept.write_bytes(b"{")
    assert DigestCache(kept).digest(path) == "read again"


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path, kept = tmp_path / "base", tmp_path / "digests.json"
    path.write_bytes(b"base")
    DigestCache(kept).digest(path)
    assert not kept.exists()
