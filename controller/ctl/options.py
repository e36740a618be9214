"""What several commands share on the command line, so that it is called the same everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from controller.ctl.completing import complete_group, complete_host, complete_label
from controller.ctl.context import Ctl
from controller.selection import Selection

Where = Annotated[
    list[str] | None,
    typer.Option(
        "-w",
        "--where",
        metavar="HOSTS",
        help="Only these hosts: h1,h[3-7]  @rack1  h[10-20]!h12  @gpu&@rack1. May be repeated.",
        autocompletion=complete_host,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "-x", "--exclude", metavar="HOSTS", help="Not these hosts. May be repeated.", autocompletion=complete_host
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary.")]

#: The options that say which hosts are meant, each with the field of Selection that it fills.
SELECTING: dict[str, Any] = {
    "where": Where,
    "exclude": Exclude,
    "groups": Annotated[
        list[str] | None,
        typer.Option(
            "-g",
            "--group",
            metavar="GROUP",
            help="The hosts of a group, as -w @GROUP. May be repeated.",
            autocompletion=complete_group,
        ),
    ],
    "exclude_groups": Annotated[
        list[str] | None,
        typer.Option(
            "-X", "--exclude-group", metavar="GROUP", help="Not those of a group.", autocompletion=complete_group
        ),
    ],
    "labels": Annotated[
        list[str] | None,
        typer.Option(
            "-l",
            "--label",
            metavar="KEY=VALUE",
            help="Of those only hosts with this label. May be repeated.",
            autocompletion=complete_label,
        ),
    ],
    "everybody": Annotated[bool, typer.Option("-a", "--all", help="All hosts, which is the default.")],
    "hostfile": Annotated[
        list[str] | None,
        typer.Option("--hostfile", metavar="FILE", help="The hosts in a file, a set a line; - is standard input."),
    ],
    "pick": Annotated[int | None, typer.Option("--pick", metavar="N", min=1, help="N of them, drawn at random.")],
}
_DEFAULTS = {"everybody": False}


def selecting(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command's parameter `selection` is filled from the options of SELECTING but those in
    `without`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        wanted = {name: option for name, option in SELECTING.items() if name not in without}

        @functools.wraps(command)
        def called(**given: Any) -> None:
            found = {name: given.pop(name) for name in wanted}
            command(**given, selection=selection_of(found))

        signature = inspect.signature(command, eval_str=True)
        options = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name), annotation=wanted[name]
            )
            for name in wanted
        ]
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += options if parameter.name == "selection" else [parameter]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect reads it
        return called

    return decorate


def selection_of(given: dict[str, Any]) -> Selection:
    """What the options of SELECTING said."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value
    }
    return Selection(**fields)


def seconds(given: float | None) -> float | None:
    """A typer callback: a number of seconds. `nan` passes every comparison that a range makes."""
    if given is not None and given != given:  # noqa: PLR0124  what nan is
        raise typer.BadParameter("'nan' is not a number of seconds.")
    return given


def ctl_of(context: typer.Context) -> Ctl:
    """What `ctl` itself was given."""
    found = context.find_object(Ctl)
    if found is None:
        raise RuntimeError("a command runs only below ctl")
    return found
