"""What can be asked of a push and of a pull, and the requests that say it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict, Unpack

from controller import api
from controller.status import CtlError, ExitStatus, Mistakes
from protocol.wishes import Wishes

PathLike: TypeAlias = "str | os.PathLike[str]"


class PushOptions(TypedDict, total=False):
    """The options of `push`.

    `mode` replaces files' permissions, `owner` (`USER`, `USER:GROUP` or `:GROUP`) their owners; with `preserve` users,
    groups and all times are kept, with `xattrs` extended attributes. With `backup`, what is replaced is kept under its
    name and that suffix. `checksum` says whether the bytes of what is there are compared always, or size and time are
    trusted. Chunks are compressed where that pays, unless `compress` is false. With `dry_run` nothing is changed, and
    each host's output says what would be. With `image` one file goes into the hosts' image stores, and the destination
    is not used.
    """

    mode: int | None
    owner: str
    preserve: bool
    xattrs: bool
    backup: str
    checksum: Literal["always", "size-mtime"]
    compress: bool
    dry_run: bool
    image: bool


class PullOptions(TypedDict, total=False):
    """The options of `pull`.

    With `fold` the first of those who have equal contents alone has a folder, beside HOST.hosts, which names all of
    them, a line each. With `preserve` times and set-user-ID bits are kept, and as root owners; with `xattrs` extended
    attributes. Chunks are compressed where that pays, unless `compress` is false.
    """

    fold: bool
    preserve: bool
    xattrs: bool
    compress: bool


def push_request(
    source: PathLike | Sequence[PathLike],
    destination: str,
    hosts: tuple[str, ...] | None,
    **options: Unpack[PushOptions],
) -> api.PushTo:
    """The request for a push. Raises CtlError where there is nothing that could be pushed. Looks at the files."""
    image = options.get("image", False)
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    wrong = Mistakes()
    folder, name = "@/", ""
    if not image:
        folder, _, name = destination.rpartition("/")
        folder += "/"
        with wrong:
            _check_destination(destination, name)
    with wrong:
        if not sources:
            raise CtlError("nothing to push", ExitStatus.USAGE)
        if len(sources) > 1 and (name or image):
            raise CtlError(
                f"{len(sources)} things go into a directory: end the destination with / (or push one)", ExitStatus.USAGE
            )
    for one in sources:
        try:
            os.stat(one)  # noqa: PTH116  a str may be given
        except OSError as error:
            wrong.add(CtlError(f"{one}: {error.strerror}", ExitStatus.USAGE))
    wrong.check()
    user, _, group = options.get("owner", "").partition(":")
    wishes = Wishes(
        mode=options.get("mode"),
        user=user,
        group=group,
        preserve=options.get("preserve", False),
        xattrs=options.get("xattrs", False),
        compress=options.get("compress", True),
    )
    return api.PushTo(
        hosts=hosts,
        sources=tuple(os.path.abspath(one) for one in sources),  # noqa: PTH100  resolves no link
        folder=folder,
        name=name,
        wishes=wishes,
        image=image,
        backup=options.get("backup", ""),
        by_time=options.get("checksum", "always") == "size-mtime",
        dry_run=options.get("dry_run", False),
    )


def _check_destination(destination: str, name: str) -> None:
    if not destination.startswith(("/", "@/")) or "\0" in destination:
        raise CtlError(f"{destination!r} is no path from / on, and hosts have no working directory", ExitStatus.USAGE)
    if name in (".", ".."):
        raise CtlError(f"{destination}: the destination must name a file, or end with /", ExitStatus.USAGE)


def pull_request(
    paths: str | Sequence[str], directory: PathLike, hosts: tuple[str, ...] | None, **options: Unpack[PullOptions]
) -> api.PullFrom:
    """The request for a pull. Raises CtlError where nothing can be asked for."""
    names = (paths,) if isinstance(paths, str) else tuple(paths)
    if not names:
        raise CtlError("nothing to pull", ExitStatus.USAGE)
    wishes = Wishes(
        times=False,
        preserve=options.get("preserve", False),
        xattrs=options.get("xattrs", False),
        compress=options.get("compress", True),
    )
    where = os.path.abspath(directory)  # noqa: PTH100  resolves no link
    return api.PullFrom(hosts=hosts, paths=names, directory=where, wishes=wishes, fold=options.get("fold", False))
