"""The service: the long-lived root process on the service node. Clients come through a Unix socket that only its user
may open."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from controller import api
from controller.console import open_console
from controller.host_requests import HostRequests
from controller.image_requests import ImageRequests
from controller.jobs import Job
from controller.moving import Mover
from controller.names import Names
from controller.nets import NetKeeper
from controller.node import RootNode
from controller.replies import Replies
from controller.requests import Requests
from controller.status import CtlError, ExitStatus
from controller.vm_requests import VmRequests
from protocol.outcomes import Fold

log = logging.getLogger("canopy")

#: What may wait in this process for a client to read it, in bytes, before one more reply: a piece of output is four
#: times as much.
_UNREAD = 64 << 10
_UCRED = struct.Struct("3i")


class Service:
    """Clients' requests, answered one connection at a time each."""

    def __init__(self, node: RootNode, directory: Path, listen: str) -> None:
        self._node = node
        self._images = ImageRequests(node)
        self._requests = Requests(node, directory, self._images, listen)
        self._hosts = HostRequests(node)
        self._vms = VmRequests(node)
        self.nets = NetKeeper(node)
        self.mover = Mover(node)
        self.names = Names(node, directory, self._requests.push_file)
        self.ended = asyncio.Event()

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request, its replies, perhaps a Cancel in between."""
        try:
            if _uid_of(writer) not in (0, os.getuid()):
                raise CtlError("this fleet belongs to another user", ExitStatus.REFUSED)
            request = await _receive(reader)
            if request is not None:
                await self._serve(request, reader, writer)
        except CtlError as error:
            writer.write(api.pack(api.Failed(why=str(error), status=int(error.status))))
        except (api.BadFrame, asyncio.IncompleteReadError) as error:
            why = f"the request is malformed: {error}; are `ctl` and the service of one version?"
            writer.write(api.pack(api.Failed(why=why, status=int(ExitStatus.USAGE))))
        except ConnectionError:
            pass
        except Exception:
            log.exception("a request failed")
            why = "the service failed at this request; its log says how"
            writer.write(api.pack(api.Failed(why=why, status=int(ExitStatus.FAILED))))
        finally:
            try:
                await writer.drain()
                writer.close()
                await writer.wait_closed()
            except ConnectionError:
                pass

    async def _serve(self, request: api.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(request, api.FollowJob):
            job, accepted, replies = self._requests.follow(request)
        else:
            answer = await self._answer(request, _uid_of(writer))
            if not isinstance(answer, tuple):
                writer.write(api.pack(answer))
                return
            job, hosts = answer
            replies = job.replies
            accepted = api.Accepted(id=min(job.ids), hosts=hosts)
        writer.write(api.pack(accepted))
        detached = isinstance(request, api.FollowJob) or (isinstance(request, api.RunOn) and request.detach)
        follows = isinstance(request, api.FollowJob)
        listening = asyncio.create_task(self._listen(job, reader, detached=detached, follows=follows))
        # A client that reads slowly is to slow the hosts down, not to fill this process's memory.
        writer.transport.set_write_buffer_limits(high=_UNREAD)
        try:
            while batch := await _some(replies):
                # One call for all that there is: outcomes come by the dozen, and the client wakes up for each.
                writer.write(b"".join(map(api.pack, together(batch))))
                await writer.drain()
                for reply in batch:
                    if isinstance(reply, api.Streamed):
                        job.read(reply)
        except ConnectionError:
            # Whoever writes to a client that has gone may learn it before whoever listens to it.
            if not detached:
                self._node.cancel(job)
            raise
        finally:
            listening.cancel()
            job.ignore(replies)

    async def _listen(self, job: Job, reader: asyncio.StreamReader, *, detached: bool, follows: bool) -> None:
        """A client that says Cancel stops its command everywhere; so does one that goes, unless it is detached from
        it. Who began it may send its input."""
        request: api.Request | None = None
        with contextlib.suppress(api.BadFrame, asyncio.IncompleteReadError, ConnectionError):
            while isinstance(request := await _receive(reader), api.Typed | api.InputData) and not follows:
                if isinstance(request, api.Typed):
                    self._node.feed(job, request.offset, request.data, request.seen, again=request.again)
                elif job.sending is not None:
                    job.sending.add(request.data, last=request.last)
        if isinstance(request, api.Cancel) or (request is None and not detached):
            self._node.cancel(job)

    async def _answer(  # noqa: PLR0911, PLR0912  one line a request
        self, request: api.Request, uid: int
    ) -> api.Reply | tuple[Job, dict[int, str]]:
        requests, vms = self._requests, self._vms
        match request:
            case api.GetStatus():
                return requests.status()
            case api.GetHost(name=name):
                return requests.host(name)
            case api.GetDeployment(name=name):
                return vms.deployment(name)
            case api.Begin(hosts=hosts, fanout=fanout):
                self._node.members.expect(hosts, fanout)
                return api.Done()
            case api.Enrol():
                return requests.enrol(request)
            case api.Await():
                return await requests.wait_for(request)
            case api.RunOn():
                return requests.run(request, uid)
            case api.GetOutput():
                return requests.output(request, uid)
            case api.PushTo():
                return await requests.push(request, uid)
            case api.Reserve():
                return vms.reserve(request)
            case api.PullFrom():
                return requests.pull(request, uid)
            case api.CreateOn():
                return vms.create(request, uid)
            case api.ProbeOn():
                return vms.probe(request, uid)
            case api.DestroyOn():
                return vms.destroy(request, uid)
            case api.MoveOn():
                return self.mover.move(request, uid)
            case api.Disown():
                return vms.disown(request)
            case api.ActOn():
                return vms.act(request, uid)
            case api.GetInfra():
                return vms.infra()
            case api.GetImages():
                return self._images.known()
            case api.ImagesOn():
                return self._images.ask(request, uid)
            case api.CreateNet():
                return self.nets.create(request, uid)
            case api.RemoveNet(name=name):
                return self.nets.remove(name, uid)
            case api.GetNets():
                return self.nets.listing()
            case api.ConsoleOn():
                return open_console(self._node, request, uid)
            case api.SendNames(in_etc_hosts=wanted):
                return await self.names.send(uid, in_etc_hosts=wanted)
            case api.CheckOn():
                return self._hosts.check(request, uid)
            case api.DomainsOn():
                return self._hosts.domains(request, uid)
            case api.TuneOn():
                return self._hosts.tune(request, uid)
            case api.DownOn():
                return requests.down(request, uid)
            case api.GetJobs(most=most):
                return requests.jobs(most)
            case api.CancelJob(id=id_):
                return requests.cancel(id_)
            case api.GetFailed(job=job):
                return requests.failed(job)
            case api.SetLabels():
                return requests.set_labels(request)
            case api.FollowJob():
                raise TypeError("a job is followed, not answered")
            case api.Shutdown():
                self.ended.set()
                return api.Done()
            case api.Cancel() | api.Typed() | api.InputData():
                raise CtlError("there is nothing on this connection that this could be for", ExitStatus.USAGE)


def _uid_of(writer: asyncio.StreamWriter) -> int:
    """Who is at the other end (unix(7), SO_PEERCRED)."""
    sock: socket.socket = writer.get_extra_info("socket")
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


async def _some(replies: Replies) -> list[api.Reply]:
    """The next replies, up to about _UNREAD bytes of those that are there; none at the end, and again then. Waits for
    one."""
    some: list[api.Reply] = []
    size = 0
    while size < _UNREAD and (not some or replies.more()):
        reply = await replies.get()
        if reply is None:
            replies.put(None)
            break
        some.append(reply)
        size += _size(reply)
    return some


def together(batch: Sequence[api.Reply]) -> list[api.Reply]:
    """The same with outcomes that follow each other in one reply: where all hosts differ, what a reply costs at both
    ends is more than what an outcome does."""
    found: list[api.Reply] = []
    folds: list[Fold] = []
    for reply in batch:
        if isinstance(reply, api.Folded):
            folds += reply.folds
            continue
        if folds:
            found.append(api.Folded(folds=tuple(folds)))
            folds = []
        found.append(reply)
    if folds:
        found.append(api.Folded(folds=tuple(folds)))
    return found


def _size(reply: api.Reply) -> int:
    """About how many bytes it is, of those that may be large."""
    if isinstance(reply, api.Streamed):
        return len(reply.data) + 64
    if isinstance(reply, api.Folded | api.Late):
        return sum(len(fold.output.out) + len(fold.output.err) + 256 for fold in reply.folds)
    return 1_024


async def _receive(reader: asyncio.StreamReader) -> api.Request | None:
    """The next request; None at the end of the connection."""
    try:
        prefix = await reader.readexactly(api.LENGTH_BYTES)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    return api.unpack_request(await reader.readexactly(api.length_of(prefix)))


async def serve(directory: Path, listen: str, advertised: str | None) -> None:
    """Be the service until it is told to end."""
    loop = asyncio.get_running_loop()
    node = RootNode(directory, listen, advertised)
    service = Service(node, directory, listen)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.ended.set)
    path = directory / "client.sock"
    path.unlink(missing_ok=True)
    node.begin()
    node.resume()
    previous = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(service.client, path, limit=1 << 20)
    finally:
        os.umask(previous)
    log.info("the service of fleet %s listens at port %d", node.fleet, node.identity.control_port)
    await service.ended.wait()
    server.close()
    path.unlink(missing_ok=True)
    await asyncio.sleep(0)  # the reply to Shutdown is on its way
    service.names.close()
    service.nets.close()
    service.mover.close()
    node.close()


def main() -> int:
    """`python -m controller.service`, as `ctl up` starts it."""
    parser = argparse.ArgumentParser(prog="service", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the fleet's directory")
    parser.add_argument("--listen", default="0.0.0.0", help="the address to listen at")  # noqa: S104  CURVE guards it
    parser.add_argument("--address", help="the address that hosts are told, instead of the one that routing gives")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    directory: Path = arguments.dir
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    lock = os.open(directory / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"a service runs in {directory} already", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(directory, arguments.listen, arguments.address))
    except (OSError, RuntimeError) as error:
        print(f"service: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
