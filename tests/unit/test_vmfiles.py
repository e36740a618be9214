"""agent.vmfiles: a host's files for VMs."""

from __future__ import annotations

import pwd
import stat
from pathlib import Path

import pytest

from agent.vmfiles import VmFileError, VmFiles, qemu_user
from agent.vmxml import Flavour, Layout, domain_xml
from protocol.vms import DirectBoot, VmSpec

KERNEL = "a" * 64
SPEC = VmSpec(
    name="vm1",
    uuid="5f3f6c1e-0f0f-5a5a-8b8b-000000000001",
    deployment="lab",
    vcpus=1,
    memory_mib=64,
    mac="00:16:3e:12:00:01",
    ip="198.18.0.1",
    prefix=15,
    boot=DirectBoot(kernel=KERNEL),
)
DOCUMENT = domain_xml(SPEC, Layout(console="/c", kernel="/k"), Flavour(kind="qemu", architecture="x86_64"), "/owner")


@pytest.fixture
def files(tmp_path: Path) -> VmFiles:
    made = VmFiles(tmp_path)
    made.open_up(None)
    return made


def test_a_vms_directory_comes_and_goes_whole(files: VmFiles, tmp_path: Path) -> None:
    files.add("vm1", DOCUMENT)
    mark = files.mark("vm1")
    assert mark is not None
    assert (mark.owner, mark.spec) == ("/owner", SPEC)
    assert files.names() == ["vm1"]
    assert files.remove("vm1")
    assert not files.remove("vm1")
    assert list((tmp_path / "vms").iterdir()) == []


def test_a_directory_that_is_there_is_not_replaced(files: VmFiles, tmp_path: Path) -> None:
    files.add("vm1", DOCUMENT)
    with pytest.raises(FileExistsError):
        files.add("vm1", "another")
    assert (tmp_path / "vms" / "vm1" / "domain.xml").read_text() == DOCUMENT
    assert files.names() == ["vm1"]


def test_what_a_killed_agent_left_half_made_or_half_removed_is_cleared_and_vms_are_not(
    files: VmFiles, tmp_path: Path
) -> None:
    files.add("vm1", DOCUMENT)
    (tmp_path / "vms" / ".vm2.x1").mkdir()
    (tmp_path / "vms" / ".vm2.x1" / "overlay.qcow2").touch()
    files.open_up(None)
    assert [path.name for path in (tmp_path / "vms").iterdir()] == ["vm1"]


def test_a_missing_image_is_named(files: VmFiles) -> None:
    with pytest.raises(VmFileError, match=f"kernel {KERNEL[:12]} is not on this host"):
        files.layout(SPEC)


def test_an_image_that_is_a_link_is_no_image(files: VmFiles, tmp_path: Path) -> None:
    (tmp_path / "images" / KERNEL).symlink_to("/etc/passwd")
    with pytest.raises(VmFileError):
        files.layout(SPEC)


def test_nobody_else_gets_into_the_directories(files: VmFiles, tmp_path: Path) -> None:
    files.add("vm1", DOCUMENT)
    for folder in (tmp_path / "images", tmp_path / "vms", tmp_path / "vms" / "vm1"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_qemu_runs_as_whom_its_settings_name(tmp_path: Path) -> None:
    settings = tmp_path / "qemu.conf"
    someone = next(entry for entry in pwd.getpwall() if entry.pw_uid != 0)
    for text in (f'user = "{someone.pw_name}"', f'# user = "root"\n\n user="+{someone.pw_uid}"'):
        settings.write_text(text)
        user = qemu_user(str(settings))
        assert user is not None
        assert user.uid == someone.pw_uid
        assert someone.pw_gid in user.gids
    settings.write_text('user = "root"')
    assert qemu_user(str(settings)) is None
    settings.write_text('user = "no such user"')
    assert qemu_user(str(settings)) is None


def test_a_directory_that_qemus_user_cannot_enter_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "qemu.conf"
    someone = next(entry for entry in pwd.getpwall() if entry.pw_uid != 0 and entry.pw_gid != tmp_path.stat().st_gid)
    settings.write_text(f'user = "{someone.pw_name}"')
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(VmFileError, match=f"QEMU as {someone.pw_name}, which may not enter /"):
        VmFiles(closed / "agent").open_up(qemu_user(str(settings)))
