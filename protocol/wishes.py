"""What whoever sends files wants kept of them beside their bytes."""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol.limits import MAX_TEXT

OwnerName = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of the files is to be kept beside their bytes.

    `mode` replaces that of files. `user` and `group` (names or numbers; empty: not to change) replace all owners.
    `times` keeps files' times of change; `preserve` all times, users and groups. `sparse` leaves holes out.
    """

    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] | None = None
    user: OwnerName = ""
    group: OwnerName = ""
    times: bool = True
    preserve: bool = False
    xattrs: bool = False
    sparse: bool = True
    compress: bool = True
