"""`ctl push` at the service: files are listed and digested in a thread, and become one command of the tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.source import Source, gather
from agent.walk import BadSource
from controller import api
from controller.image_requests import ImageRequests
from controller.jobs import Job
from controller.node import RootNode
from controller.status import CtlError, ExitStatus
from protocol.commands import Push
from protocol.limits import MAX_PATH
from protocol.listing import BadListing

#: Permission bits of an image in a host's store: nobody is to write to what overlays build on.
_IMAGE_MODE = 0o444
#: What an image is called until its digest is known.
_IMAGE = b"image"


class Pushing:
    """Begins pushes. `directory` is the fleet's."""

    def __init__(self, node: RootNode, directory: Path, images: ImageRequests) -> None:
        self._node = node
        self._images = images
        self._directory = directory

    async def push(self, request: api.PushTo, hosts: dict[int, str], uid: int) -> Job:
        """Push to hosts by rank. Raises CtlError where there is nothing that could be pushed."""
        node = self._node
        try:
            source = await node.loop.run_in_executor(None, self._gather, request)
        except BadSource as error:
            raise CtlError(f"nothing was pushed: {error}", ExitStatus.USAGE) from error
        except (OSError, BadListing, ValueError) as error:
            raise CtlError(f"nothing was pushed: {error}") from error
        if request.image:
            head = await node.loop.run_in_executor(None, source.read, 0) if source.stream.size else b""
            self._images.added(Path(request.sources[0]), source.stream, head)
        body = Push(
            folder="@/" if request.image else request.folder,
            stream=source.stream,
            listing=source.inline_listing,
            image=request.image,
            backup=request.backup,
            by_time=request.by_time,
            exact=request.wishes.preserve,
            dry_run=request.dry_run,
        )
        job = Job()
        where = "image store" if request.image else os.path.join(request.folder, request.name)  # noqa: PTH118
        what = msgspec.json.encode(["push", *request.sources, where]).decode()
        if source.stream.inline is not None:
            node.loop.run_in_executor(None, source.close)
            node.give(job, hosts, body, uid=uid, what=what)
        else:
            node.give(job, hosts, body, uid=uid, what=what, source=source)
        job.seal()
        return job

    def _gather(self, request: api.PushTo) -> Source:
        wishes = request.wishes
        if request.image:
            wishes = msgspec.structs.replace(wishes, mode=_IMAGE_MODE, times=False, sparse=False)
            source = gather([(_IMAGE, request.sources[0])], wishes, self._directory, digests=False)
            try:
                source.rename(source.stream.digest.encode())
            except BaseException:
                source.close()
                raise
            return source
        roots = names(request.sources, request.name)
        return gather(roots, wishes, self._directory, data=not request.dry_run, digests=request.dry_run or None)


def names(sources: Sequence[str], name: str) -> list[tuple[bytes, str]]:
    """What each source is called on the other side: `name` where that is not empty, else its own last name.

    Raises BadSource, with all that is wrong.
    """
    found: dict[bytes, str] = {}
    troubles = []
    for source in sources:
        called = os.fsencode(name or Path(source).name)
        if not called:
            troubles.append(f"{source} has no name: give one at the end of the destination")
        elif called in found:
            troubles.append(f"{source} and {found[called]} would both be {os.fsdecode(called)}")
        elif len(called) > MAX_PATH:
            troubles.append(f"the name of {source[:100]}… is too long")
        else:
            found[called] = source
    if troubles:
        raise BadSource("; ".join(troubles))
    return list(found.items())
