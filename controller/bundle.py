"""The agent's bundle: agent/, protocol/ and the wheels they import, for one kind of host, as one archive.

A bundle is a flat directory for PYTHONPATH. It is made on the service node from the installed packages and
from wheels that pip fetches, pinned by file name and SHA-256 in agent-wheels.lock. Its identity is a digest
of all that went in, so the same inputs give the same identity, and a host tells by it whether it has to be
replaced.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import py_compile
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

import agent
import protocol

LOCK = Path(__file__).with_name("agent-wheels.lock")
PYTHONS = tuple((3, minor) for minor in range(10, 15))  # from msgspec's oldest to the newest with wheels
MACHINES = ("x86_64", "aarch64")
FORMAT = "2"  # raise it when this file changes what a bundle holds
PIP_DEADLINE = 300.0  # seconds; some 3 MB are fetched
COMPRESSION = 6  # 9 takes four times as long for one percent less
# What a wheel carries that no running agent reads: tests, sources, other systems' and other frameworks' parts.
LEFT_OUT = re.compile(
    r"(^|/)tests?/|\.dist-info/|\.(pyi|pyx|pxd|pxi|h|c|md|txt|rst|typed)$"
    r"|^backports/zstd/(_cffi/|zipfile/|tarfile\.py$)"
    r"|^psutil/_ps(aix|bsd|osx|sunos|windows)\.py$|^zmq/(devices|eventloop|green|log|ssh|backend/cffi)/"
)
# PyNaCl and pyzmq need cffi's extension alone: their bindings were generated when the wheels were built.
ONLY = {"cffi": re.compile(r"^_cffi_backend[^/]*\.so$")}
# What later Pythons have in their standard library.
BUILT_IN = {"backports_zstd": (3, 14)}
# PEP 600, "Legacy manylinux tags".
LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


class BundleError(Exception):
    """No bundle can be made; the message is one sentence with the cause and the next step."""


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which wheels run on a host, as its seed reports it."""

    python: tuple[int, int]
    machine: str  # uname -m
    libc: str  # "glibc" or another's name
    libc_version: tuple[int, int]


class Wheel(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the lock."""

    file: str
    sha256: str

    @property
    def tags(self) -> tuple[str, str, list[str]]:
        """Python tag, ABI tag and platform tags of the file's name (PEP 427)."""
        python, abi, platforms = self.file.removesuffix(".whl").split("-")[-3:]
        return python, abi, platforms.split(".")

    @property
    def requirement(self) -> str:
        """A line for pip's requirements file that only this very file satisfies."""
        project, version = self.file.split("-")[:2]
        return f"{project}=={version} --hash=sha256:{self.sha256}"

    def fits(self, platform: Platform) -> bool:
        """Whether a CPython on `platform` can load it."""
        python, abi, tags = self.tags
        if (python, abi, tags) == ("py3", "none", ["any"]):
            return True
        minor = int(python.removeprefix("cp3"))
        right = platform.python[1] >= minor if abi == "abi3" else platform.python[1] == minor
        return right and any(_tag_fits(tag, platform) for tag in tags)


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """An archive (.tar.gz) and how to recognise it."""

    identity: str  # of the inputs: 32 hexadecimal digits
    sha256: str  # of the archive
    archive: bytes


def _tag_fits(tag: str, platform: Platform) -> bool:
    name, _, machine = tag.partition("_")
    needs = LEGACY.get(name)
    if found := re.fullmatch(r"manylinux_(\d+)_(\d+)_(\w+)", tag):
        needs, machine = (int(found[1]), int(found[2])), found[3]
    return needs is not None and machine == platform.machine and needs <= platform.libc_version


def read_lock(text: str) -> list[Wheel]:
    """The wheels of a lock in sha256sum's form; lines that begin with # are comments."""
    lines = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [Wheel(sha256=digest, file=file) for digest, file in lines]


def choose(wheels: Iterable[Wheel], platform: Platform) -> list[Wheel]:
    """One wheel of each project for `platform`, sorted by name; raises BundleError where there is none."""
    if platform.libc != "glibc":
        raise BundleError(
            f"the agent needs glibc, and this host has {platform.libc}: use a distribution built on glibc"
        )
    version = ".".join(map(str, platform.python))
    if platform.python not in PYTHONS or platform.machine not in MACHINES:
        newest = ".".join(map(str, PYTHONS[-1]))
        raise BundleError(
            f"no wheels for Python {version} on {platform.machine}: "
            f"the agent runs on Python 3.10 to {newest}, x86_64 or aarch64"
        )
    chosen: dict[str, Wheel] = {}
    projects = set()
    for wheel in wheels:
        project = wheel.file.split("-")[0]
        if project in BUILT_IN and platform.python >= BUILT_IN[project]:
            continue
        projects.add(project)
        if wheel.fits(platform):
            chosen[project] = wheel
    if missing := sorted(projects - chosen.keys()):
        glibc = ".".join(map(str, platform.libc_version))
        raise BundleError(
            f"no wheel of {', '.join(missing)} for Python {version} on {platform.machine} with glibc {glibc}: "
            "the host's distribution is too old for the agent"
        )
    return [chosen[project] for project in sorted(chosen)]


def sources() -> dict[str, bytes]:
    """The Python files of agent/ and protocol/ as installed here, by path in the bundle."""
    found = {}
    for package in (agent, protocol):
        if package.__file__ is None:
            raise BundleError(f"the package {package.__name__} has no files here: install canopy again")
        top = Path(package.__file__).parent
        for path in top.rglob("*.py"):
            found[f"{package.__name__}/{path.relative_to(top).as_posix()}"] = path.read_bytes()
    return found


def identity_of(platform: Platform, wheels: Sequence[Wheel], files: dict[str, bytes]) -> str:
    """The digest of all that goes into a bundle; equal for hosts that the same wheels fit."""
    parts = [FORMAT, "cp{}{}".format(*platform.python), platform.machine]
    parts += [wheel.sha256 for wheel in wheels]
    parts += [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in sorted(files.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def unpack_wheel(wheel: Wheel, path: Path) -> dict[str, bytes]:
    """What a host needs of a wheel, by path in the bundle."""
    only = ONLY.get(wheel.file.split("-")[0])
    with zipfile.ZipFile(path) as archive:
        return {
            name: loadable(archive.read(name))
            for name in archive.namelist()
            if not name.endswith("/") and not LEFT_OUT.search(name) and (only is None or only.match(name))
        }


def loadable(content: bytes) -> bytes:
    """A shared library without what only debuggers and linkers read; anything else as it is.

    The loader goes by the program headers alone, and the sections that it does not map stand at the end (elf(5)).
    PyNaCl's library, with all its symbols, is nine tenths such.
    """
    if content[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return content
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    end = headers + size * count
    for start in range(headers, end, size):
        (offset,) = struct.unpack_from("<Q", content, start + 8)
        (length,) = struct.unpack_from("<Q", content, start + 32)
        end = max(end, offset + length)
    kept = bytearray(content[:end])
    struct.pack_into("<Q", kept, 40, 0)  # where the section headers are,
    struct.pack_into("<HH", kept, 60, 0, 0)  # how many, and which of them has the names
    return bytes(kept)


def compiled(files: dict[str, bytes]) -> dict[str, bytes]:
    """The bytecode of the Python files among `files`, for this interpreter's version.

    It spares each host some 0.15 s of compiling. The files say that they are not to be checked against their sources
    (PEP 552), since an unpacked source has another time stamp.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path, content in files.items():
            if path.endswith(".py"):
                source = Path(scratch, "source.py")
                source.write_bytes(content)
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                target = str(source) + "c"
                py_compile.compile(str(source), target, dfile=path, doraise=True, invalidation_mode=mode)
                folder, _, name = path.rpartition("/")
                cached = f"{name.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"
                found["/".join(filter(None, (folder, "__pycache__", cached)))] = Path(target).read_bytes()
    return found


def pack(files: dict[str, bytes]) -> bytes:
    """A .tar.gz that depends on nothing but `files`."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, content in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(plain.getvalue(), COMPRESSION, mtime=0)


def cache_directory() -> Path:
    """Where wheels and bundles are kept between runs (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "canopy"


class Bundles:
    """Makes bundles, and keeps them in the cache; its methods may be called from any thread."""

    def __init__(self, cache: Path | None = None, lock: Path = LOCK) -> None:
        """`cache` is the user's own by default; `lock` names the wheels."""
        self._cache = cache or cache_directory()
        self._lock = lock
        self._wheels = read_lock(lock.read_text())
        self._sources = sources()
        self._ready: dict[str, Bundle] = {}
        self._building = threading.Lock()

    def identity(self, platform: Platform) -> str:
        """The identity of the bundle for `platform`, without building it; raises BundleError."""
        return identity_of(platform, choose(self._wheels, platform), self._sources)

    def get(self, platform: Platform) -> Bundle:
        """The bundle for `platform`, from memory, from the cache, or built now; raises BundleError."""
        wheels = choose(self._wheels, platform)
        identity = identity_of(platform, wheels, self._sources)
        with self._building:
            if identity not in self._ready:
                try:
                    self._ready[identity] = self._cached(identity) or self._build(identity, platform, wheels)
                except OSError as error:
                    raise BundleError(
                        f"the agent's bundle cannot be kept in {self._cache} ({error.strerror}): "
                        "make room there, or set XDG_CACHE_HOME"
                    ) from error
            return self._ready[identity]

    def _cached(self, identity: str) -> Bundle | None:
        for path in (self._cache / "bundles").glob(f"{identity}-*.tar.gz"):
            archive = path.read_bytes()
            digest = hashlib.sha256(archive).hexdigest()
            if path.name == f"{identity}-{digest}.tar.gz":
                return Bundle(identity=identity, sha256=digest, archive=archive)
            path.unlink(missing_ok=True)
        return None

    def _build(self, identity: str, platform: Platform, wheels: Sequence[Wheel]) -> Bundle:
        store = self._cache / "wheels"
        store.mkdir(parents=True, exist_ok=True)
        if missing := [wheel for wheel in wheels if not _intact(store / wheel.file, wheel.sha256)]:
            self._fetch(missing, platform, store)
        files = dict(self._sources)
        for wheel in wheels:
            files.update(unpack_wheel(wheel, store / wheel.file))
        if platform.python == sys.version_info[:2]:
            files.update(compiled(files))
        archive = pack(files)
        digest = hashlib.sha256(archive).hexdigest()
        bundles = self._cache / "bundles"
        bundles.mkdir(exist_ok=True)
        temporary = bundles / f".{identity}-{os.getpid()}"
        temporary.write_bytes(archive)
        temporary.rename(bundles / f"{identity}-{digest}.tar.gz")
        return Bundle(identity=identity, sha256=digest, archive=archive)

    def _fetch(self, wheels: Sequence[Wheel], platform: Platform, store: Path) -> None:
        """Have pip fetch `wheels` into `store`; pip takes a file only when its hash is the lock's."""
        major, minor = platform.python
        tags = sorted({tag for wheel in wheels for tag in wheel.tags[2]})
        with tempfile.TemporaryDirectory(dir=store) as scratch:
            requirements = Path(scratch, "requirements.txt")
            requirements.write_text("".join(wheel.requirement + "\n" for wheel in wheels))
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-input", "--require-hashes", "--only-binary=:all:", "--no-deps"]
            command += ["--implementation", "cp", "--python-version", f"{major}.{minor}"]
            command += ["--abi", f"cp{major}{minor}", "--abi", "abi3", "--abi", "none"]
            command += [word for tag in tags for word in ("--platform", tag)]
            command += ["--dest", scratch, "--requirement", str(requirements)]
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=PIP_DEADLINE,
                    check=False,
                )
                problem = _pip_problem(done.stderr) if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"pip did not finish within {PIP_DEADLINE:.0f} s"
            for wheel in wheels:
                if not problem and not _intact(Path(scratch, wheel.file), wheel.sha256):
                    problem = f"pip did not bring {wheel.file}"
            if problem:
                raise BundleError(
                    f"the agent's wheels cannot be fetched ({problem}): give pip a reachable index, "
                    f"or put the files that {self._lock} lists into {store}"
                )
            for wheel in wheels:
                Path(scratch, wheel.file).rename(store / wheel.file)


def _intact(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False


def _pip_problem(stderr: str) -> str:
    """pip's own word for what went wrong: its first line marked as an error."""
    if "No module named pip" in stderr:
        return "this Python has no pip; `python -m ensurepip` installs it"
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return errors[0] if errors else "pip failed without a reason"
