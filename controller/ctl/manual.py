"""`ctl man` and `ctl completion`: what `--help` says as one manual page, and what a shell needs to know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from agent.version import VERSION
from controller.ctl.commands import Commands
from controller.ctl.options import ctl_of

app = Commands()

_ENVIRONMENT = {
    "CANOPY_FLEET": "The fleet that is meant without --fleet.",
    "CANOPY_HOME": "Where fleets live, in place of canopy in the XDG state directory.",
    "NO_COLOR": "With any value: no colours.",
}
_FILES = {
    "~/.local/state/canopy/groups.toml": 'Groups of hosts, a line each: rack1 = "h[0-31]".',
    "~/.config/canopy/groups.toml": "The same; where both have a group the first one wins.",
    "/etc/clustershell/groups.conf": "ClusterShell's groups, which are known as well: see groups.conf(5).",
    "~/.local/state/canopy/FLEET/": "A fleet's keys, records, log and socket.",
}
#: What programs find under one name in all that --json prints.
_JSON = {
    "name": "What a host, VM, image or network is called, in an object of its own.",
    "host, hosts, nodeset": "The host or hosts that something is said of; a nodeset is hosts, folded.",
    "job": "A job's number.",
    "what": "What a job was, in words.",
    "change, detail": "What became of a VM, or would, and what is to be said of it.",
    "power": "A VM's state, unknown where nobody can vouch for it now.",
    "before, after": "A setting's value.",
    "why": "Why something is as it is, a sentence.",
    "hosts_failed": "Hosts that could not, and why.",
    "not_on_record": "Names of VMs that nobody has on record.",
}


# --- the page ---------------------------------------------------------------------------------------------------------


def page(root: Any) -> str:
    """All of a command's help as a manual page (man(7)). `root` is a click group."""
    context = root.make_context("ctl", [], resilient_parsing=True)
    lines = [
        f'.TH CTL 1 "" "canopy {VERSION}" "Canopy"',
        ".SH NAME",
        _text(f"ctl - {_first(root.help)}"),
        ".SH SYNOPSIS",
        ".B ctl",
        _text("[OPTIONS] COMMAND [ARGS]..."),
        ".SH DESCRIPTION",
        *_paragraphs(root.help),
        *_paragraphs(root.epilog),
        ".SH OPTIONS",
        *_options(root, context),
        ".SH COMMANDS",
    ]
    lines += _commands(root, context, "ctl")
    for title, entries in (("JSON", _JSON), ("ENVIRONMENT", _ENVIRONMENT), ("FILES", _FILES)):
        lines.append(f".SH {title}")
        for name, what in entries.items():
            lines += [".TP", f".B {_text(name)}", _text(what)]
    lines += [".SH SEE ALSO", _text("clush(1), nodeset(1), ssh(1), virsh(1)")]
    return "\n".join(lines) + "\n"


def _commands(group: Any, context: Any, path: str) -> Iterator[str]:
    """A section for each command, those of a group within the group behind it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        within = command.make_context(name, [], parent=context, resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(within))
        yield from (f".SS {_text(f'{path} {name} {usage}')}", *_paragraphs(command.help))
        yield from _options(command, within)
        yield from _paragraphs(command.epilog)
        if hasattr(command, "list_commands"):
            yield from _commands(command, within, f"{path} {name}")


def _first(text: str | None) -> str:
    return (text or "").strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")


def _text(text: str) -> str:
    """Text as roff takes it: no line is a request, no backslash an escape, and a hyphen is the one that is typed."""
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    safe = re.sub(r"[^\0-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", safe)
    return re.sub(r"^([.'])", r"\\&\1", safe, flags=re.MULTILINE)


def _paragraphs(text: str | None) -> Iterator[str]:
    """Paragraphs; one behind `\\b`, click's mark, keeps its lines."""
    for part in (text or "").strip().split("\n\n"):
        if part.startswith("\b"):
            yield from (".PP", ".nf", *(_text(line) for line in part.removeprefix("\b\n").split("\n")), ".fi")
        elif part:
            yield from (".PP", _text(" ".join(part.split("\n"))))


def _options(command: Any, context: Any) -> Iterator[str]:
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None:
            names, what = record
            yield from (".TP", f".B {_text(names)}", _text(" ".join(what.split()) or " "))


def _tree() -> Any:
    from controller.ctl.app import app as whole

    return typer.main.get_command(whole)


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command(
    "man",
    epilog="""\b
Examples:
  ctl man
  ctl man > ~/.local/share/man/man1/ctl.1    from then on: man ctl""",
)
def manual(context: typer.Context) -> None:
    """Show the manual page; into a file or a pipe it goes as man reads it."""
    text = page(_tree())
    terminal = ctl_of(context).terminal
    reader = shutil.which("man")
    if terminal.out_is_terminal and reader is not None:
        shown = subprocess.run([reader, "-l", "-"], input=text.encode(), check=False)
        raise typer.Exit(shown.returncode)
    terminal.text(text)


class Shell(StrEnum):
    """A shell that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command(
    "completion",
    epilog="""\b
Examples:
  eval "$(ctl completion bash)"                                  in ~/.bashrc
  ctl completion zsh > ~/.zfunc/_ctl                             a directory of $fpath
  ctl completion fish > ~/.config/fish/completions/ctl.fish""",
)
def completion(
    context: typer.Context, shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]
) -> None:
    """Print what a shell needs to complete commands, options, hosts, groups, labels and jobs."""
    if shell is Shell.BASH:
        # bash would take `@rack1` and `rack=1` for two words each, as it does for npm, which does the same.
        terminal = ctl_of(context).terminal
        terminal.text("COMP_WORDBREAKS=${COMP_WORDBREAKS//[@=]/}\n")
        terminal.flush()
    # How click is asked for a script, which ends the process
    # (https://click.palletsprojects.com/en/stable/shell-completion/).
    os.environ["_CTL_COMPLETE"] = f"source_{shell}"
    try:
        _tree().main(args=[], prog_name="ctl")
    finally:
        del os.environ["_CTL_COMPLETE"]


if __name__ == "__main__":
    # `make man`
    sys.stdout.write(page(_tree()))
