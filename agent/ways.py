"""The way to one source of a push: its bulk link, and beside it a conduit where much is to come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from agent.conduits import Conduit, dial
from agent.keyring import Keyring
from agent.links import Uplink
from agent.traffic import Traffic
from protocol import codec
from protocol.commands import Hop, Member
from protocol.messages import Conduit as Offer
from protocol.messages import ConduitWanted
from protocol.stream import Blob

log = logging.getLogger("canopy")

#: So long (s) what is to be sent waits for a conduit that was asked for. What goes by the bulk link before is answered
#: there, a window of chunks beside those of the conduit, and the two hold each other up: in one of ten pushes at 80
#: Mbit/s that cost half a second. Half of the time after which a source is taken for silent (BULK_SILENT).
_CONDUIT_WITHIN = 1.0


class Way:
    """`heard` gets messages as they come, several at a time; `lost(why)` is called once, when the way fails or ends."""

    def __init__(
        self,
        keyring: Keyring,
        there: Hop | Member,
        *,
        much: bool,
        heard: Callable[[Sequence[Sequence[Blob]]], None],
        lost: Callable[[str], None],
        traffic: Traffic,
    ) -> None:
        """Begins to connect. With `much` to come a conduit is asked for as well."""
        self._traffic = traffic
        self._there = there
        self._heard, self._lost = heard, lost
        self._link = Uplink(
            keyring, there.address, there.bulk_port, there.key, heard=lambda frames: heard((frames,)), lost=self._end
        )
        self._conduit: Conduit | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._asked = self._wanted = False
        #: What waits for the conduit, None where nothing has to; and how long it waits.
        self._held: list[Sequence[Blob]] | None = None
        self._holding: asyncio.TimerHandle | None = None
        self._over = False
        if much:
            self.want()

    def want(self) -> None:
        """Much is to come: ask for a conduit, once."""
        if not self._asked:
            self._asked = self._wanted = True
            self._link.send(codec.encode(ConduitWanted()))
            self._held = []
            self._holding = asyncio.get_running_loop().call_later(_CONDUIT_WITHIN, self._release)

    def _release(self) -> None:
        """Send what has waited."""
        if self._holding is not None:
            self._holding.cancel()
        held, self._held = self._held or (), None
        for frames in held:
            self.send(frames)
        self._traffic.flush()

    def send(self, frames: Sequence[Blob]) -> None:
        """Send to the source."""
        if self._held is not None:
            self._held.append(frames)
        elif self._conduit is not None:
            self._conduit.send(frames)
        else:
            self._link.send(frames)

    def offered(self, offer: Offer) -> None:
        """The source offers a conduit. One that was not asked for is not looked at."""
        if self._wanted:
            self._wanted = False
            self._dialling = asyncio.get_running_loop().create_task(self._dial(offer))

    async def _dial(self, offer: Offer) -> None:
        try:
            sock = await dial(self._there.address, offer)
        except (OSError, asyncio.TimeoutError) as error:
            # All goes by the bulk link then.
            log.info("no conduit to port %d of %s: %s", offer.port, self._there.address, str(error) or "no answer")
        else:
            self._conduit = Conduit(
                sock, offer.up, offer.down, heard=self._heard, lost=self._end, traffic=self._traffic
            )
        self._release()

    def _end(self, why: str) -> None:
        self.close()
        self._lost(why)

    def close(self) -> None:
        """Close all of it."""
        if self._over:
            return
        self._over = True
        if self._holding is not None:
            self._holding.cancel()
        if self._dialling is not None:
            self._dialling.cancel()
        if self._conduit is not None:
            self._conduit.close()
        self._link.close()
