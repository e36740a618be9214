"""`ctl image`: base images in the stores of hosts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from controller import render_images
from controller.api import KnownImage
from controller.ctl.commands import Commands
from controller.ctl.following import Watcher
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.render import json_text, label
from controller.selection import EVERYBODY, Selection
from controller.session import Happening, ImageAnswer, Result, exit_status
from controller.spawn_images import find_image, image_digest
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from protocol.outcomes import describe, succeeded
from protocol.vms import ImageAction, ImageResult

app = Commands()
image = Commands(
    name="image",
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Base images on hosts: read-only, named by what is in them, shared by the VMs that are made of them.",
    epilog="""\b
Examples:
  ctl image add debian.qcow2 vmlinuz initrd.img
  ctl image add images/ -w h[0-31]
  ctl image ls --verify
  ctl image rm debian.qcow2
  ctl image gc                      all that no VM is made of""",
)
app.add_typer(image)


@app.callback()
def _no_command_of_its_own() -> None:
    """Keeps `image` a group, also while it is the only one here."""


Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names or digests, as `ctl image ls` shows them.")]


@image.command("add")
@selecting()
def add(
    *,
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE|DIR...", help="Images, or directories of them.")],
    selection: Selection = EVERYBODY,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring images to hosts.

    A host that has an image already is sent nothing. Of a directory its files are images, not those of directories in
    it nor those whose names begin with a dot.
    """
    ctl = ctl_of(context)
    files = [file for path in paths for file in _files(path)]
    with ctl.session() as session:
        hosts = session.choose(selection)
        watch = Watcher(ctl.terminal, quiet=quiet)
        outcomes, rows = [], []
        for file in files:
            happened = watch(f"push {file.name}", session.push(file, "", hosts, image=True))
            results = [one for one in happened if isinstance(one, Result)]
            outcomes += [result.outcome for result in results]
            good = [host for result in results if succeeded(result.outcome) for host in result.hosts]
            bad = {host: describe(result.outcome) for result in results if not result.ok for host in result.hosts}
            rows.append({"name": file.name, "digest": image_digest(file), "hosts": good, "hosts_failed": bad})
    if as_json:
        ctl.terminal.text(json_text(rows))
    else:
        ctl.terminal.text(render_images.added(rows))
    for line in render_images.add_troubles(rows):
        ctl.terminal.say(line, bad=True)
    raise typer.Exit(exit_status(outcomes))


def _files(path: Path) -> Iterable[Path]:
    try:
        if not path.is_dir():
            return [path]
        found = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
    if not found:
        raise CtlError(f"{path}: no file is in it", ExitStatus.USAGE)
    return found


@image.command("ls")
@selecting()
def ls(
    *,
    context: typer.Context,
    selection: Selection = EVERYBODY,
    verify: Annotated[
        bool, typer.Option("--verify", help="Have hosts read all of them again, against their digests.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List images, the VMs on record that are made of each, and the hosts that have it."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        hosts = session.choose(selection)
        known = session.images()
        action = ImageAction.VERIFY if verify else ImageAction.LIST
        happened = Watcher(ctl.terminal, quiet=quiet)(f"{action.value} images", session.images_on(action, None, hosts))
    answers = _answers(happened)
    if as_json:
        ctl.terminal.text(json_text(render_images.list_object(known, answers)))
    else:
        ctl.terminal.text(render_images.listing(known, answers))
    raise typer.Exit(_end(ctl.terminal, known, happened))


@image.command("rm")
@selecting()
def rm(
    *,
    context: typer.Context,
    names: Names,
    selection: Selection = EVERYBODY,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove images from hosts. One that a VM is made of stays: the service looks, and each host again."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        hosts = session.choose(selection)
        known = session.images()
        digests = [find_image(known, name).digest for name in names]
        happened = Watcher(ctl.terminal, quiet=quiet)(
            "remove images", session.images_on(ImageAction.REMOVE, digests, hosts)
        )
    raise typer.Exit(_removed(ctl.terminal, known, happened, as_json=as_json))


@image.command("gc")
@selecting()
def gc(
    *,
    context: typer.Context,
    selection: Selection = EVERYBODY,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the images that no VM is made of."""
    ctl = ctl_of(context)
    with ctl.session() as session:
        hosts = session.choose(selection)
        known = session.images()
        used = {one.digest for one in known if one.used}
        watch = Watcher(ctl.terminal, quiet=quiet)
        here = _answers(watch("list images", session.images_on(ImageAction.LIST, None, hosts)))
        # What a host has VMs of is left everywhere: others may have VMs of it that nobody has told of yet.
        used |= {result.digest for results in here.values() for result in results if result.vms}
        every = {result.digest for results in here.values() for result in results} | {one.digest for one in known}
        every -= used
        happened: Sequence[Happening] = ()
        if every:
            happened = watch("remove images", session.images_on(ImageAction.REMOVE, sorted(every), hosts))
    raise typer.Exit(_removed(ctl.terminal, known, happened, as_json=as_json))


def _answers(happened: Sequence[Happening]) -> dict[str, tuple[ImageResult, ...]]:
    return {one.host: one.results for one in happened if isinstance(one, ImageAnswer)}


def _removed(terminal: Terminal, known: Sequence[KnownImage], happened: Sequence[Happening], *, as_json: bool) -> int:
    answers = _answers(happened)
    text = json_text(render_images.list_object(known, answers)) if as_json else render_images.removed(known, answers)
    terminal.text(text)
    return _end(terminal, known, happened)


def _end(terminal: Terminal, known: Sequence[KnownImage], happened: Sequence[Happening]) -> int:
    """Say what is not right. The exit code."""
    answers = _answers(happened)
    bad = [one for one in happened if isinstance(one, Result) and not one.ok]
    lines = render_images.not_right(known, answers)
    for line in (*lines, *(f"{label(one.hosts)}: {describe(one.outcome)}" for one in bad)):
        terminal.say(line, bad=True)
    return exit_status(one.outcome for one in bad) or (ExitStatus.FAILED if lines else ExitStatus.OK)
