"""The small guest is built from Debian's packages alone. That it boots is shown where VMs are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deploy.guest import GuestError, build_guest


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    guest = build_guest()
    shutil.copytree(guest.kernel.parents[1] / "packages", tmp_path / "packages")
    again = build_guest(tmp_path)
    assert again.kernel != guest.kernel
    assert again.release == guest.release
    assert again.kernel.read_bytes() == guest.kernel.read_bytes()
    assert again.initrd.read_bytes() == guest.initrd.read_bytes()


def test_what_is_built_is_not_built_again() -> None:
    first = build_guest()
    made = first.initrd.stat()
    assert build_guest() == first
    assert first.initrd.stat() == made


def test_a_machine_without_the_tools_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    with pytest.raises(GuestError, match="apt-get install apt cpio dpkg"):
        build_guest(tmp_path)
