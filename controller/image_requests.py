"""What clients of the service ask about images: those on record, and what hosts have of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from controller import api
from controller.jobs import Job, as_images_done
from controller.node import RootNode
from controller.on_record import Image
from controller.spawn_images import format_of
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol import ranks
from protocol.commands import Images, Stream
from protocol.outcomes import Exited, Fold
from protocol.vms import ImageAction, ImageResult, ImageState, images_of

#: VMs that are named as users of an image.
_NAMED = 10


class ImageRequests:
    """Answers to requests about images."""

    def __init__(self, node: RootNode) -> None:
        self._node = node

    def added(self, source: Path, stream: Stream, head: bytes) -> None:
        """An image is being pushed: it is on record from now on."""
        node = self._node
        now_ms = node.clock_ms(node.loop.time())
        node.state.put_image(
            Image(digest=stream.digest, name=source.name, size=stream.size, format=format_of(head), added_ms=now_ms)
        )

    def _users(self) -> dict[str, list[str]]:
        """The VMs, as DEPLOYMENT/NAME, that are made of each image or are just being made."""
        found: dict[str, list[str]] = {}
        for spec in (*self._node.state.specs(), *self._node.specs_under_way()):
            for digest in images_of(spec):
                found.setdefault(digest, []).append(f"{spec.deployment}/{spec.name}")
        return {digest: list(dict.fromkeys(vms)) for digest, vms in found.items()}

    def known(self) -> api.ImageList:
        """The images on record."""
        node, users = self._node, self._users()
        now_ms = node.clock_ms(node.loop.time())
        return api.ImageList(
            images=tuple(
                api.KnownImage(
                    digest=image.digest,
                    name=image.name,
                    size=image.size,
                    format=image.format,
                    added_s_ago=max(0.0, (now_ms - image.added_ms) / 1000),
                    used=len(users.get(image.digest, ())),
                    vms=tuple(users.get(image.digest, ())[:_NAMED]),
                )
                for image in node.state.images()
            )
        )

    def ask(self, request: api.ImagesOn, uid: int) -> tuple[Job, dict[int, str]]:
        """List, verify or remove. Raises CtlError, with nothing done, where an image to be removed is in use."""
        node = self._node
        hosts = node.members.ranks_of(request.hosts)
        if request.action is ImageAction.REMOVE:
            if request.digests is None:
                raise CtlError("which images? Removing all of them is no request", ExitStatus.USAGE)
            users = self._users()
            used = [
                f"{digest[:12]} by {some(users[digest])}"
                for digest in dict.fromkeys(request.digests)
                if digest in users
            ]
            if used:
                raise CtlError(f"in use, and nothing was removed: {'; '.join(used)}; destroy these VMs first")
        job = Job(as_images_done(node.members.name))
        if request.action is ImageAction.REMOVE:
            job.also(_Removal(node, set(request.digests or ()), set(node.members.present)).heard)
        what = msgspec.json.encode([f"{request.action.value} images", *(request.digests or ())]).decode()
        node.give(job, hosts, Images(action=request.action, digests=request.digests), uid=uid, what=what)
        job.seal()
        return job, hosts


class _Removal:
    """Forgets the images that no host of the fleet has any more."""

    def __init__(self, node: RootNode, digests: set[str], hosts: set[int]) -> None:
        self._node = node
        self._missing = {digest: set(hosts) for digest in digests}

    def heard(self, fold: Fold) -> None:
        """Hosts answered."""
        if not isinstance(fold.outcome, Exited) or not fold.output.out:
            return
        hosts = set(ranks.each(ranks.unpack(fold.ranks)))
        for result in msgspec.msgpack.decode(fold.output.out, type=list[ImageResult]):
            if result.state in (ImageState.REMOVED, ImageState.ABSENT) and result.digest in self._missing:
                self._missing[result.digest] -= hosts
        self._node.state.drop_images([digest for digest, left in self._missing.items() if not left])
