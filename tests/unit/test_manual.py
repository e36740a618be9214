"""What teaches: the manual page, completion, and pages with command lines that must be what `ctl` understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from controller import api, cli
from controller.ctl.app import app
from controller.ctl.manual import page
from tests.unit import fake_service as fake
from tests.unit.fake_service import FakeService

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root() -> Any:
    return typer.main.get_command(app)


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        capsys.readouterr()
        cli.run(arguments)
        return capsys.readouterr().out

    return run


# --- the manual page --------------------------------------------------------------------------------------------------


def commands(root: Any) -> dict[str, Any]:
    context = root.make_context("ctl", [], resilient_parsing=True)
    found = {name: root.get_command(context, name) for name in root.list_commands(context)}
    for name, group in list(found.items()):
        found |= {f"{name} {inner}": command for inner, command in getattr(group, "commands", {}).items()}
    return found


def test_the_page_has_every_command_and_every_option_that_is_shown(root: Any) -> None:
    text = page(root).replace("\\-", "-")
    for name, command in commands(root).items():
        assert f"\n.SS ctl {name} " in text
        for param in command.params:
            if not getattr(param, "hidden", False):
                assert all(option in text for option in param.opts if option.startswith("-"))


def test_every_command_has_a_text_and_every_option_says_what_it_is_for(root: Any) -> None:
    for name, command in commands(root).items():
        assert command.help, name
        # A group has the examples of its commands.
        told = name in {"status", "tree", "health"} or " " in name
        assert told or "\b\nExamples:\n" in command.epilog, name
        for param in command.params:
            assert getattr(param, "hidden", False) or getattr(param, "help", "") or param.name == "help", (name, param)


def test_no_line_of_a_text_is_a_request_to_roff(root: Any) -> None:
    requests = {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".nf", ".fi"}
    for line in page(root).splitlines():
        assert not line.startswith("'")
        assert not line.startswith(".") or line.split()[0] in requests, line
        assert line.isascii()


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff checks what man would show")
def test_groff_has_nothing_to_complain_of(root: Any) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"],
        input=page(root).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == b""


def test_the_page_is_printed_as_it_is_into_a_pipe(ctl: Callable[..., str], root: Any) -> None:
    assert ctl("man") == page(root)


# --- command lines in pages -------------------------------------------------------------------------------------------


def lines_of(name: str) -> Iterator[str]:
    """The lines in a page's blocks that are `ctl`'s, behind the name of the tool where there are several."""
    for block in re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            found = re.match(r"(?:ctl\s{2,})?(ctl .*)", line)
            if found:
                yield found[1]


def parses(root: Any, line: str) -> None:
    """Fails where `ctl` would refuse the line before it does anything."""
    words = shlex.split(re.split(r"\s[<>]\s", line)[0], comments=True)
    assert words[0] == "ctl"
    context = root.make_context("ctl", words[1:])
    name, command, rest = root.resolve_command(context, [*context._protected_args, *context.args])
    within = command.make_context(name, rest, parent=context)
    if hasattr(command, "resolve_command"):
        inner, command, rest = command.resolve_command(within, [*within._protected_args, *within.args])
        command.make_context(inner, rest, parent=within)


@pytest.mark.parametrize("name", ["COMING_FROM.md", "README.md", "deploy/grid5000/README.md"])
def test_every_command_line_in_a_page_is_understood(root: Any, name: str) -> None:
    lines = list(lines_of(name))
    assert len(lines) > 10
    for line in lines:
        parses(root, line)


def test_every_example_in_a_help_is_understood(root: Any) -> None:
    seen = 0
    for command in commands(root).values():
        for line in (command.epilog or "").replace("\\\n", " ").splitlines():
            text = re.split(r"\s{3,}|\s\|\s|\s>\s", line.strip())[0]
            if text.startswith("ctl ") and "$(" not in text and "…" not in text:
                parses(root, text)
                seen += 1
    assert seen > 40


def test_a_task_of_every_tool_is_told(root: Any) -> None:
    text = (ROOT / "COMING_FROM.md").read_text()
    for tool in ("clush", "pdsh", "TakTuk", "Ansible", "flux", "ctl"):
        assert len(re.findall(rf"^{tool}\s{{2,}}", text, flags=re.MULTILINE)) >= 3, tool


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    monkeypatch.delenv("CANOPY_FLEET", raising=False)
    monkeypatch.setattr("ClusterShell.Defaults.config_paths", lambda _: [])
    with fake.fake_service() as found:
        monkeypatch.setenv("CANOPY_HOME", str(found.home))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(found.home))
        (found.home / "groups.toml").write_text('rack1 = "h[0-1]"\n')
        found.replies(
            api.GetStatus,
            fake.status(*(fake.host(rank, site="sophia", labels={"gpu": "yes"}) for rank in range(2)), fake.host(12)),
        )
        yield found


@pytest.fixture
def complete(ctl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    def run(line: str) -> list[str]:
        monkeypatch.setenv("_CTL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        return ctl().split()

    return run


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ctl bro", ["broadcast"]),
        ("ctl broadcast --ba", ["--batch"]),
        ("ctl broadcast -w h1", ["h1", "h12"]),
        ("ctl broadcast -w h0,h1", ["h0,h1", "h0,h12"]),
        ("ctl broadcast -w @", ["@rack1", "@sophia", "@all", "@failed"]),
        ("ctl push -x h0!@so", ["h0!@sophia"]),
        ("ctl broadcast -g ra", ["rack1"]),
        ("ctl broadcast -l g", ["gpu=yes"]),
        ("ctl why h12", ["h12"]),
    ],
)
def test_hosts_groups_and_labels_are_offered(
    complete: Callable[[str], list[str]], line: str, offered: list[str]
) -> None:
    assert complete(line) == offered


def test_jobs_are_offered(fleet: FakeService, complete: Callable[[str], list[str]]) -> None:
    job = api.JobStatus(
        id=17, uid=0, what="[]", targets=1, ok=1, failed=0, lost=0, missing=0, began_s_ago=1.0, took_s=1.0
    )
    fleet.replies(api.GetJobs, api.Jobs(jobs=(job,)))
    assert complete("ctl job 1") == ["17"]


def test_without_a_service_nothing_is_offered_and_nothing_said(
    complete: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CANOPY_HOME", str(tmp_path))
    assert complete("ctl broadcast -w h") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_what_it_needs(ctl: Callable[..., str], shell: str) -> None:
    text = ctl("completion", shell)
    assert f"_CTL_COMPLETE=complete_{shell}" in text


@pytest.mark.usefixtures("fleet")
def test_bash_takes_a_group_for_one_word(ctl: Callable[..., str], tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(ctl("completion", "bash"))
    program = tmp_path / "ctl"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m controller.cli "$@"\n')
    program.chmod(0o755)
    asks = f". {script}; COMP_WORDS=(ctl broadcast -w @rac); COMP_CWORD=3; _ctl_completion {program}"
    show = 'printf "%s|" "${COMPREPLY[@]}" "$COMP_WORDBREAKS"'
    done = subprocess.run(["bash", "-c", f"{asks}; {show}"], capture_output=True, text=True, check=True, timeout=60)
    offered, breaks = done.stdout.split("|")[:2]
    assert offered == "@rack1"
    assert not set("@=") & set(breaks)
