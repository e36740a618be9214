"""What holds for the project as a whole: layers, light agents, make targets, locks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.testhosts.model import DEBIAN_PACKAGES, LIBVIRT_DEBIAN_PACKAGES

ROOT = Path(__file__).resolve().parents[2]
# A test of a few lines of Python may meet a busy machine; none takes a second on an idle one.
DEADLINE_S = 60

# What a pure module may be made of: no input but its arguments, no output but its results.
PURE_MODULES = {
    "__future__", "abc", "array", "base64", "binascii", "bisect", "blake3", "collections", "copy", "dataclasses",
    "enum", "functools", "hashlib", "heapq", "hmac", "ipaddress", "itertools", "math", "msgspec", "operator",
    "protocol", "re", "string", "struct", "textwrap", "types", "typing", "unicodedata", "zlib",
}  # fmt: skip
# Signing is pure where keys are passed in; the rest of PyNaCl draws random keys and nonces by itself.
PURE_NACL = {"nacl._sodium", "nacl.bindings", "nacl.exceptions"}
IMPURE_BUILTINS = {"__import__", "breakpoint", "eval", "exec", "input", "open", "print"}
HEAVY_MODULES = {"ClusterShell", "click", "libvirt", "pydantic", "rich", "sqlite3", "typer", "yaml"}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name in ("agent", "protocol"), path
            yield node.module if node.module and node.level == 0 else path.parent.name


def python_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


def make_targets() -> set[str]:
    return set(re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^ \\]+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", python_files("protocol"), ids=lambda path: path.name)
def test_protocol_is_made_of_pure_modules(path: Path) -> None:
    impure = {name for name in imported(path) if name.partition(".")[0] not in PURE_MODULES and name not in PURE_NACL}
    assert not impure


@pytest.mark.parametrize("path", python_files("protocol"), ids=lambda path: path.name)
def test_protocol_calls_nothing_that_reads_or_writes_by_itself(path: Path) -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & IMPURE_BUILTINS
    assert not re.findall(r"crypto_(?:sign|box)_keypair\b|randombytes", path.read_text())


@pytest.mark.parametrize("package", ["agent", "protocol"])
def test_what_goes_to_hosts_is_python_3_10(package: str) -> None:
    for path in python_files(package):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))


def test_the_seed_is_made_of_the_standard_library_alone() -> None:
    seed = ROOT / "agent" / "seed.py"
    # The one thing of ours that it imports is in the bundle that it has just unpacked.
    assert {name.partition(".")[0] for name in imported(seed)} - sys.stdlib_module_names <= {"agent"}
    top_level = [node for node in ast.parse(seed.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "agent" not in ast.dump(ast.Module(body=list(top_level), type_ignores=[]))


def test_the_seed_loads_with_nothing_installed() -> None:
    # -I and -S leave out the working directory, the environment and site-packages; the name keeps main() from running.
    script = f"import runpy; runpy.run_path({str(ROOT / 'agent' / 'seed.py')!r}, run_name='seed')"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, timeout=DEADLINE_S)


def test_an_agent_starts_without_anything_heavy() -> None:
    # libvirt is among them: a host without VMs never pays for it.
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("agent", "protocol")
        for path in python_files(package)
        if path.name != "__main__.py"
    ]
    script = f"""
import importlib, json, sys
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps(sorted(name.partition(".")[0] for name in sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True, timeout=DEADLINE_S
    )
    loaded = set(json.loads(done.stdout))
    assert {"agent", "msgspec", "protocol", "zmq"} <= loaded
    assert not loaded & (HEAVY_MODULES | {"controller", "deploy"})


def test_an_agent_starts_without_openssl() -> None:
    code = "import sys, agent.__main__; sys.exit(bool({'_hashlib', '_ssl'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=DEADLINE_S)


def test_make_alone_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    listed = re.findall(r"^  make (\S+) +\S", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(make_targets())
    assert {"demo", "test", "check", "setup"} <= set(listed)


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_make_commands_in_the_pages_exist(page: Path) -> None:
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= make_targets()


def test_the_readme_promises_make_demo_and_make_test() -> None:
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))


def test_set_up_installs_what_test_hosts_ask_for() -> None:
    needs = re.findall(r'^ +"[^":]+: ([a-z0-9. -]+)"$', (ROOT / "deploy" / "setup.sh").read_text(), re.MULTILINE)
    essential = {"util-linux"}  # every Debian has it
    assert {*DEBIAN_PACKAGES, *LIBVIRT_DEBIAN_PACKAGES} - essential <= set(" ".join(needs).split())


@pytest.mark.parametrize("name", ["dev.txt", "fuzz.txt", "runtime.txt", "vm.txt"])
def test_locks_name_a_version_and_hashes_for_each_package_and_no_address(name: str) -> None:
    text = (ROOT / "deploy" / "lock" / name).read_text()
    assert "://" not in text
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^ ]+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_locks_hold_all_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = project["project"]["dependencies"]
    for wanted, lock in (
        (runtime, "runtime.txt"),
        (runtime + project["dependency-groups"]["dev"] + project["build-system"]["requires"], "dev.txt"),
        (runtime + project["dependency-groups"]["fuzz"], "fuzz.txt"),
        (runtime + project["project"]["optional-dependencies"]["vm"], "vm.txt"),
    ):
        names = {re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace(".", "-") for requirement in wanted}
        assert names <= pins(ROOT / "deploy" / "lock" / lock).keys()


def test_hosts_get_the_versions_that_the_tests_run_with() -> None:
    wheels = re.findall(
        r"^[0-9a-f]{64}  ([^-]+)-([^-]+)-", (ROOT / "controller" / "agent-wheels.lock").read_text(), re.M
    )
    assert wheels
    tested = pins(ROOT / "deploy" / "lock" / "dev.txt")
    assert {(name.replace("_", "-"), version) for name, version in wheels} <= tested.items()
