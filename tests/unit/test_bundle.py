"""controller/bundle.py: which wheels fit a host, and the archive that is made of them."""

from __future__ import annotations

import _ctypes
import ast
import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from agent import seed
from controller import bundle
from controller.bundle import BundleError, Bundles, Platform, Wheel

WHEELS = bundle.read_lock(bundle.LOCK.read_text())
PROJECTS = {"backports_zstd", "blake3", "cffi", "msgspec", "psutil", "pycdlib", "pynacl", "pyzmq"}


def platform(python: int = 11, machine: str = "x86_64", glibc: int = 36, libc: str = "glibc") -> Platform:
    return Platform(python=(3, python), machine=machine, libc=libc, libc_version=(2, glibc))


@pytest.mark.parametrize("machine", bundle.MACHINES)
@pytest.mark.parametrize("python", [minor for _, minor in bundle.PYTHONS])
def test_every_python_and_machine_has_one_wheel_of_each_project(python: int, machine: str) -> None:
    chosen = bundle.choose(WHEELS, platform(python, machine, glibc=28))
    wanted = {project for project in PROJECTS if (3, python) < bundle.BUILT_IN.get(project, (4, 0))}
    assert {wheel.file.split("-")[0] for wheel in chosen} == wanted
    assert len(chosen) == len(wanted) >= len(PROJECTS) - 1
    assert all(machine in wheel.file or wheel.file.endswith("-py3-none-any.whl") for wheel in chosen)


def test_hosts_that_differ_in_glibc_alone_share_a_bundle() -> None:
    assert bundle.choose(WHEELS, platform(glibc=28)) == bundle.choose(WHEELS, platform(glibc=41))


def test_a_wheel_for_a_newer_glibc_does_not_fit() -> None:
    with pytest.raises(BundleError, match=r"no wheel of .*pyzmq.* with glibc 2\.17"):
        bundle.choose(WHEELS, platform(glibc=17))


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64", True),
        ("cp310-cp310-manylinux2014_x86_64", False),
        ("cp312-cp312-manylinux2014_x86_64", False),
        ("cp38-abi3-manylinux_2_34_x86_64", True),
        ("cp312-abi3-manylinux_2_34_x86_64", False),
        ("cp311-cp311-manylinux_2_39_x86_64", False),
        ("cp311-cp311-manylinux2014_aarch64", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp36-abi3-manylinux2010_x86_64", True),
    ],
)
def test_tags_say_where_a_wheel_runs(tags: str, fits: bool) -> None:
    assert Wheel(file=f"thing-1.0-{tags}.whl", sha256="").fits(platform()) is fits


def test_a_host_on_musl_gets_a_clear_answer() -> None:
    with pytest.raises(BundleError, match="needs glibc, and this host has musl"):
        bundle.choose(WHEELS, platform(libc="musl"))


@pytest.mark.parametrize("wrong", [platform(python=15), platform(python=9), platform(machine="riscv64")])
def test_an_unknown_platform_gets_a_clear_answer(wrong: Platform) -> None:
    with pytest.raises(BundleError, match=r"the agent runs on Python 3\.10 to 3\.14"):
        bundle.choose(WHEELS, wrong)


def test_the_lock_names_no_place_to_fetch_from() -> None:
    assert "://" not in bundle.LOCK.read_text()


def test_the_lock_is_within_what_the_project_asks_for() -> None:
    root = Path(bundle.__file__).parent.parent
    asked = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    locked = dict(wheel.file.split("-")[:2] for wheel in WHEELS)
    checked = 0
    for line in asked:
        requirement = Requirement(line)
        if version := locked.get(requirement.name.lower().replace(".", "_")):
            assert requirement.specifier.contains(version), line
            checked += 1
    assert checked == len(PROJECTS) - 1, "all but cffi, which PyNaCl brings, are asked for"


def test_the_bundle_holds_whatever_agent_and_protocol_import() -> None:
    provided = {
        "backports",
        "compression",
        "zmq",
        "msgspec",
        "nacl",
        "psutil",
        "pycdlib",
        "_cffi_backend",
        "blake3",
        "agent",
        "protocol",
        "libvirt",
    }
    for path, content in bundle.sources().items():
        for node in ast.walk(ast.parse(content)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in provided or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_the_sources_are_agent_and_protocol_alone() -> None:
    found = bundle.sources()
    assert {path.split("/")[0] for path in found} == {"agent", "protocol"}
    assert "agent/seed.py" in found
    assert all(path.endswith(".py") for path in found)


def fake_wheel(store: Path, file: str, content: dict[str, bytes]) -> Wheel:
    store.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(store / file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return Wheel(file=file, sha256=hashlib.sha256((store / file).read_bytes()).hexdigest())


@pytest.fixture
def offline(tmp_path: Path) -> Bundles:
    """Bundles of one small wheel, which is in the cache already."""
    content = {
        "thing/__init__.py": b"x = 1\n",
        "thing/tests/test_it.py": b"",
        "thing/hints.pyi": b"",
        "thing-1.0.dist-info/METADATA": b"",
    }
    wheel = fake_wheel(tmp_path / "cache" / "wheels", "thing-1.0-cp38-abi3-manylinux2014_x86_64.whl", content)
    lock = tmp_path / "lock"
    lock.write_text(f"# a comment\n{wheel.sha256}  {wheel.file}\n")
    return Bundles(tmp_path / "cache", lock)


def test_a_bundle_is_flat_and_free_of_what_no_agent_reads(offline: Bundles, tmp_path: Path) -> None:
    made = offline.get(platform())
    seed.unpack(made.archive, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["agent", "protocol", "thing"]
    assert (tmp_path / "out" / "thing" / "__init__.py").exists()
    assert not list((tmp_path / "out").rglob("*test_it*")) + list((tmp_path / "out").rglob("*.pyi"))


def test_an_unpacked_bundle_runs_from_its_bytecode(offline: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seed.unpack(offline.get(platform(sys.version_info[1])).archive, out)
    (out / "thing" / "__init__.py").write_text("raise SystemExit('compiled again')")
    code = f"import sys; sys.path.insert(0, {str(out)!r}); import thing, agent; print(thing.x, agent.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", str(out / "agent" / "__init__.py")], done.stderr


def test_equal_inputs_make_equal_archives() -> None:
    files = {"b/x.py": b"1", "a.py": b"2"}
    assert bundle.pack(files) == bundle.pack(dict(reversed(files.items())))
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(bundle.pack(files)))) as tar:
        assert [(entry.name, entry.mtime, entry.uid) for entry in tar] == [("a.py", 0, 0), ("b/x.py", 0, 0)]


def test_the_identity_follows_every_input() -> None:
    wheels = bundle.choose(WHEELS, platform())
    files = {"agent/a.py": b"1"}
    first = bundle.identity_of(platform(), wheels, files)
    assert first == bundle.identity_of(platform(glibc=40), wheels, dict(files))
    assert first != bundle.identity_of(platform(), wheels, {"agent/a.py": b"2"})
    assert first != bundle.identity_of(platform(), wheels[1:], files)
    assert first != bundle.identity_of(platform(python=12), wheels, files)


def test_the_identity_is_known_without_building(offline: Bundles, tmp_path: Path) -> None:
    known = offline.identity(platform())
    assert not (tmp_path / "cache" / "bundles").exists()
    assert offline.get(platform()).identity == known


def test_a_bundle_is_built_once(offline: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = offline.get(platform())
    again = Bundles(tmp_path / "cache", tmp_path / "lock")
    monkeypatch.setattr(again, "_build", lambda *_: pytest.fail("built again"))
    assert again.get(platform()) == made


def test_a_damaged_bundle_in_the_cache_is_built_anew(offline: Bundles, tmp_path: Path) -> None:
    made = offline.get(platform())
    (path,) = (tmp_path / "cache" / "bundles").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert Bundles(tmp_path / "cache", tmp_path / "lock").get(platform()).identity == made.identity
    assert hashlib.sha256(path.read_bytes()).hexdigest() in path.name


def test_a_damaged_wheel_in_the_cache_is_never_used(
    offline: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (tmp_path / "cache" / "wheels").iterdir()
    path.write_bytes(b"changed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(BundleError, match="cannot be fetched"):
        offline.get(platform())


def test_without_an_index_the_user_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(BundleError) as raised:
        Bundles(tmp_path).get(platform())
    assert "give pip a reachable index, or put the files that" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_library_works_without_what_the_loader_does_not_read(tmp_path: Path) -> None:
    library = Path(_ctypes.__file__)
    kept = bundle.loadable(library.read_bytes())
    assert len(kept) < library.stat().st_size
    (tmp_path / library.name).write_bytes(kept)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ctypes, _ctypes; print(_ctypes.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / library.name)


def test_what_is_no_library_is_left_as_it_is() -> None:
    assert bundle.loadable(b"x = 1\n") == b"x = 1\n"
