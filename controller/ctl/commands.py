"""How the commands of `ctl` are declared: as typer's, but for mistakes, which are told all at once.

click reads one parameter after the other and ends at the first that is wrong. Here each is read, and what was wrong
goes to the command's body, which adds what it finds itself (`mistakes_of`); a body that doesn't is not begun.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from controller.nearest import hint
from controller.status import CtlError, ExitStatus, Mistakes

# click is typer's own business: newer ones bring it under another name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_Body = TypeVar("_Body", bound=Callable[..., Any])

_KEY = "canopy.mistakes"
#: Something that the command can't do without is not there.
_UNREADABLE = "canopy.unreadable"


class Careful(TyperCommand):
    """A command that begins only where all its parameters could be read."""

    #: The body adds its own mistakes to those of the parameters, and raises them before it does anything.
    gathers = False

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        for parameter in self.params:
            parameter.handle_parse_result = partial(_read, parameter.handle_parse_result, parameter)  # type: ignore[method-assign]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            left: list[str] = super().parse_args(ctx, args)
        except _UsageError as error:
            # What can't be read at all, as an unknown option, click tells itself.
            if _KEY not in ctx.meta:
                raise
            mistakes_of(ctx).add(_told(error))
            ctx.meta[_UNREADABLE] = True
            left = []
        if ctx.meta.get(_UNREADABLE):
            mistakes_of(ctx).add(_told_usage(ctx))
            mistakes_of(ctx).check()
        return left

    def invoke(self, ctx: Any) -> Any:
        if not self.gathers:
            mistakes_of(ctx).check()
        return super().invoke(ctx)


class Gathering(Careful):
    """A command whose body takes `mistakes_of` its context first."""

    gathers = True


class Group(TyperGroup):
    """Commands below one word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            told = hint(name, self.list_commands(ctx), more=f"{ctx.command_path} --help")
            raise CtlError(f"there is no command {ctx.command_path} {name}: {told}", ExitStatus.USAGE)
        return super().resolve_command(ctx, args)


class Commands(typer.Typer):
    """Some commands of `ctl`, each careful. Without rich, which takes longer than most commands."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"cls": Group, "rich_markup_mode": None, "add_completion": False, **more})

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **more: Any
    ) -> Callable[[_Body], _Body]:
        return super().command(name, cls=cls or Careful, **more)


def mistakes_of(context: Any) -> Mistakes:
    """What was wrong with the parameters of the command of this context, for what else is found."""
    found: Mistakes = context.meta.setdefault(_KEY, Mistakes())
    return found


def _read(handle: Any, parameter: Any, context: Any, given: Any, left: list[str]) -> Any:
    """Read one parameter; where it is wrong the command is given the default in its place."""
    try:
        return handle(context, given, left)
    except CtlError as error:
        mistakes_of(context).add(error)
    except _UsageError as error:
        mistakes_of(context).add(_told(error))
    if parameter.required:
        context.meta[_UNREADABLE] = True
    else:
        context.params[parameter.name] = parameter.get_default(context)
    return None, left


def _told(error: Any) -> CtlError:
    text = " ".join(error.format_message().split()).rstrip(".")  # a choice comes as a list over many lines
    plain = text.replace("a valid int range", "an integer").replace("a valid float range", "a number")
    return CtlError(plain[:1].lower() + plain[1:], ExitStatus.USAGE)


def _told_usage(context: Any) -> CtlError:
    pieces = context.command.collect_usage_pieces(context)
    return CtlError(f"write {' '.join([context.command_path, *pieces])}", ExitStatus.USAGE)
