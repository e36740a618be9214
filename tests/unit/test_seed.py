"""agent/seed.py and agent/seed_session.py: what runs on a bare host, and how it is let in."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import seed
from agent.seed_frames import Begin, Terms, frame
from agent.seed_session import MARKER, remote_command, why
from tests.waiting import wait_until

SEED = Path(seed.__file__).read_bytes()
DIGEST = "0123456789abcdef" * 2


def archive(*entries: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return content.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def host(tmp_path: Path) -> seed.Host:
    return seed.Host("f1", str(tmp_path / "base"))


def run_remote(
    script: bytes, shell: str = "sh", path: str = "", feed: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run the remote command as sshd would: through the account's shell, the seed on standard input."""
    return subprocess.run(
        [shell, "-c", remote_command(script)],
        input=script + feed,
        capture_output=True,
        env={"PATH": path or os.environ["PATH"]},
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_remote_command_runs_a_seed_and_leaves_it_the_rest_of_standard_input(shell: str) -> None:
    done = run_remote(b"import os; os.write(1, os.read(0, 5) + bytes([10]))", shell, feed=b"frame")
    assert (done.stdout, done.returncode) == (b"frame\n", 0)


def test_the_remote_command_holds_nothing_that_csh_or_fish_would_change() -> None:
    inside = remote_command(SEED).removeprefix("exec sh -c '").removesuffix("'")
    assert not set("'!\\\n") & set(inside)


def test_the_remote_command_names_the_old_pythons_that_it_found(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8.10;; *) exit 86;; esac\n')
    old.chmod(0o755)
    (tmp_path / "sh").symlink_to("/bin/sh")
    (tmp_path / "readlink").symlink_to("/usr/bin/readlink")
    (tmp_path / "python3").symlink_to(old)
    command = remote_command(SEED).replace("/usr/bin/python3", "/nowhere/python3").replace("/usr/local", "/nowhere")
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout.splitlines()[-1] == b"CANOPY-NONE, python3 3.8.10"


def test_the_seed_says_its_word_before_all_else_and_ends_when_its_parent_goes() -> None:
    done = run_remote(SEED)
    assert done.stdout.splitlines() == [b"", MARKER]
    assert done.returncode == 1


def test_the_seed_refuses_a_header_over_the_limit() -> None:
    done = run_remote(SEED, feed=(seed.MAX_HEADER + 1).to_bytes(4, "big"))
    assert b"over its limit" in done.stderr


def test_the_seed_answers_with_a_hello(tmp_path: Path) -> None:
    begin = frame(Begin(id=7, name="h7", terms=Terms(fleet="f1", directory=str(tmp_path))))
    done = run_remote(SEED, feed=begin)
    answer = done.stdout.split(MARKER + b"\n", 1)[1]
    hello = json.loads(answer[4 : 4 + int.from_bytes(answer[:4], "big")])
    assert (hello["t"], hello["id"], hello["uid"], hello["stored"]) == ("hello", 7, os.geteuid(), [])
    assert hello["machine"] == os.uname().machine


def test_a_fleets_id_that_leaves_the_base_directory_is_refused(tmp_path: Path) -> None:
    for fleet in ("../f1", "", "a/b", ".", "..", "-x", "F1"):
        with pytest.raises(seed.Failure):
            seed.Host(fleet, str(tmp_path))


def test_the_directory_lets_others_pass_and_read_nothing(host: seed.Host) -> None:
    assert stat.S_IMODE(host.directory.stat().st_mode) == 0o711


def test_the_previous_bundle_is_kept_and_no_older_one(host: seed.Host) -> None:
    first, second, third = (str(number) * 32 for number in (1, 2, 3))
    for identity in (first, second, third):
        (host.bundles / identity / "agent").mkdir(parents=True)
        (host.bundles / f"{identity}.tar.gz").touch()
    assert host.previous(first) == "", "nothing ran here yet"
    host.switch(first)
    assert host.stored() == [first]
    assert host.previous(first) == ""
    (host.bundles / second).mkdir()
    assert host.previous(second) == first
    host.switch(second, keep=host.previous(second))
    assert (host.current(), host.stored()) == (second, [first, second])
    assert not (host.bundles / f"{first}.tar.gz").exists(), "it is not given to others any more"
    (host.bundles / third).mkdir()
    host.switch(third, keep=host.previous(third))
    assert host.stored() == [second, third]
    host.switch(second)
    assert (host.current(), host.stored()) == (second, [second])


def test_an_agent_whose_keys_were_replaced_is_enrolled_anew(host: seed.Host) -> None:
    here = "198.18.0.9"
    (host.directory / "identity").write_bytes(b"keys")
    known = {"key": "k", "control_port": 1, "bulk_port": 2, "identity": DIGEST, "address": here}
    (host.directory / "enrolment.json").write_text(json.dumps({**known, "keys": host.keys()}))
    (host.bundles / DIGEST).mkdir()
    host.switch(DIGEST)
    (host.directory / "started").write_text(DIGEST)
    with (host.directory / "lock").open("w") as lock:
        assert host.enrolment(DIGEST, here) is None, "no agent runs"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert host.enrolment(DIGEST, here) == known
        assert host.enrolment(DIGEST, "198.18.0.8") is None
        (host.directory / "identity").write_bytes(b"other keys")
        assert host.enrolment(DIGEST, here) is None


@pytest.mark.parametrize(
    "entry",
    [
        ("../escaped", b"x"),
        ("/tmp/escaped", b"x"),
        ("a/../../escaped", b"x"),
        ("a//b", b"x"),
        link("a", "/etc/passwd", tarfile.SYMTYPE),
        link("a", "/etc/passwd", tarfile.LNKTYPE),
        link("a", "", tarfile.FIFOTYPE),
    ],
)
def test_a_bundle_with_anything_but_plain_files_below_it_is_refused(
    tmp_path: Path, entry: tuple[str, bytes] | tarfile.TarInfo
) -> None:
    with pytest.raises(seed.Failure, match=r"nothing was unpacked|damaged"):
        seed.unpack(archive(entry), tmp_path / "into")
    assert not (tmp_path / "escaped").exists()


def test_a_bundle_that_swells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "MAX_UNPACKED", 1000)
    with pytest.raises(seed.Failure):
        seed.unpack(archive(("a", bytes(600)), ("b", bytes(600))), tmp_path)


def test_a_bundle_cut_short_is_refused(tmp_path: Path) -> None:
    whole = archive(("agent/a.py", os.urandom(5000)))
    with pytest.raises(seed.Failure, match="damaged"):
        seed.unpack(whole[: len(whole) // 2], tmp_path)


def test_a_bundle_is_stored_whole_or_not_at_all(host: seed.Host) -> None:
    good = archive(("agent/__init__.py", b""), ("agent/new.py", b"x = 1\n"))
    with pytest.raises(seed.Failure, match="digest"):
        host.store(DIGEST, "0" * 64, good)
    bad = archive(("agent/__init__.py", b""), ("../x", b""))
    with pytest.raises(seed.Failure):
        host.store(DIGEST, hashlib.sha256(bad).hexdigest(), bad)
    assert list(host.bundles.iterdir()) == []
    host.store(DIGEST, hashlib.sha256(good).hexdigest(), good)
    assert host.stored() == [DIGEST]
    assert (host.bundles / f"{DIGEST}.tar.gz").read_bytes() == good


def test_a_bundle_without_bytecode_is_compiled_on_the_host(host: seed.Host) -> None:
    good = archive(("agent/__init__.py", b""), ("agent/new.py", b"x = 1\n"))
    host.store(DIGEST, hashlib.sha256(good).hexdigest(), good)
    names = [path.name for path in (host.bundles / DIGEST / "agent" / "__pycache__").iterdir()]
    assert f"new.{sys.implementation.cache_tag}.pyc" in names


def test_an_identity_that_is_a_path_is_refused(host: seed.Host) -> None:
    good = archive(("agent/__init__.py", b""))
    with pytest.raises(seed.Failure):
        host.store("../../etc", hashlib.sha256(good).hexdigest(), good)


def test_switching_to_a_bundle_drops_the_others(host: seed.Host) -> None:
    for identity in (DIGEST, DIGEST[::-1]):
        (host.bundles / identity).mkdir()
        (host.bundles / f"{identity}.tar.gz").write_bytes(b"")
        host.switch(identity)
    assert host.current() == DIGEST[::-1]
    assert sorted(path.name for path in host.bundles.iterdir()) == [DIGEST[::-1], f"{DIGEST[::-1]}.tar.gz"]


def test_a_file_is_replaced_whole_and_with_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "welcome"
    target.write_bytes(b"old")
    seed.write_file(target, b"new", 0o600)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def test_a_held_lock_is_seen_and_a_free_one_is_not_taken(locked: Path, tmp_path: Path) -> None:
    assert seed.is_locked(locked)
    (tmp_path / "free").touch()
    assert not seed.is_locked(tmp_path / "free")
    assert not seed.is_locked(tmp_path / "absent")


def test_a_seed_whose_parent_vanished_makes_way_for_a_new_one(host: seed.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "BUSY_GRACE", 0.0)
    code = (
        "import fcntl,os,sys;f=open(sys.argv[1],'w');fcntl.flock(f,2);"
        "f.write(str(os.getpid()));f.flush();print('held',flush=True);sys.stdin.read()"
    )
    words = [sys.executable, "-I", "-c", code, str(host.directory / "seed.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as old:
        assert old.stdout
        assert old.stdout.readline() == b"held\n"
        os.close(host.claim())
        assert old.wait(10) == -signal.SIGTERM


def test_a_process_that_took_over_a_noted_number_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        # The kernel shows no arguments for a moment after exec.
        wait_until(Path(f"/proc/{other.pid}/cmdline").read_bytes, 10, "the arguments of sleep")
        seed.signal_process(str(other.pid), b"/var/lib/canopy/f1", signal.SIGTERM)
        seed.signal_process("no number", b"sleep", signal.SIGTERM)
        assert other.poll() is None
        seed.signal_process(str(other.pid), b"sleep", signal.SIGTERM)
        assert other.wait(10) == -signal.SIGTERM


def test_a_host_has_one_sentence_for_a_full_disk() -> None:
    begin = {"terms": {"directory": "/srv"}}
    assert seed.explain(OSError(28, "No space left on device"), begin) == "no space left in /srv: make room there"


def test_the_unit_watches_the_agent_and_ends_it_in_order() -> None:
    unit = seed.UNIT.format(fleet="f1", python="/usr/bin/python3", directory="/var/lib/canopy/f1", restart="1500ms")
    for line in (
        "User=root",
        "Type=notify",
        "WatchdogSec=30",
        "Restart=always",
        "RestartSec=1500ms",
        "KillMode=mixed",
        "ExecStart=/usr/bin/python3 -m agent run --dir /var/lib/canopy/f1",
        "Environment=PYTHONPATH=/var/lib/canopy/f1/current",
    ):
        assert line in unit.splitlines()


@pytest.mark.parametrize(
    ("said", "reason", "lasting"),
    [
        ("ssh: connect to host 1.2.3.4 port 22: Connection refused", "connection refused", False),
        ("ssh: connect to host 1.2.3.4 port 22: Connection timed out", "no answer to SSH within 10 s", False),
        ("Connection timed out during banner exchange\nConnection to h port 22 timed out",
         "no answer to SSH within 10 s", False),
        ("ssh: Could not resolve hostname h: Name or service not known", "no such host name", True),
        ("ssh: Could not resolve hostname h: Temporary failure in name resolution",
         "the host's name could not be resolved", False),
        ("kex_exchange_identification: Connection closed by remote host", "the host closed the SSH connection", False),
        ("Unable to negotiate with 1.2.3.4 port 22: no matching host key type found.",
         "ssh ended with 255: Unable to negotiate with 1.2.3.4 port 22: no matching host key type found.", False),
    ],
)  # fmt: skip
def test_equal_causes_have_equal_reasons(said: str, reason: str, lasting: bool) -> None:
    assert why(said.encode(), 255, 10.0) == (reason, lasting)


def test_reasons_about_keys_say_what_to_do() -> None:
    changed = "@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."
    assert "ssh-keygen -R" in why(changed.encode(), 255, 10.0)[0]
    unknown = (
        "No ED25519 host key is known for h and you have requested strict checking.\nHost key verification failed."
    )
    assert "known_hosts" in why(unknown.encode(), 255, 10.0)[0]
    denied = "root@1.2.3.4: Permission denied (publickey,password)."
    assert why(denied.encode(), 255, 10.0)[0].startswith("permission denied (publickey,password): ")


def test_a_reason_cannot_carry_control_characters_to_a_terminal() -> None:
    assert why(b"bad \x1b[2J thing", 1, 10.0)[0] == "ssh ended with 1: bad ?[2J thing"
