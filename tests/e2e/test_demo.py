"""The demo, as the README promises it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import need_test_hosts

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


def _demo(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.demo"],
        cwd=ROOT,
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is left" in done.stdout
    return done.stdout


def test_the_demo_boots_six_guests_in_qemu() -> None:
    need_test_hosts(libvirt=True)  # the same programs
    said = _demo()
    assert "real QEMU guests" in said
    assert len([line for line in said.splitlines() if "canopy-guest" in line and "ready at" in line]) == 6
    assert "6 unchanged, nothing had to be done" in said


def test_the_demo_says_so_where_there_is_no_qemu(tmp_path: Path) -> None:
    (tmp_path / "uname").symlink_to("/usr/bin/uname")
    said = _demo(PATH=str(tmp_path))
    assert "libvirt's test driver, which boots nothing: QEMU is not installed" in said
    assert "6 unchanged, nothing had to be done" in said
