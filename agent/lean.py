"""Imported first of all by an agent's process: keeps out what an idle agent would carry for nothing.

asyncio imports ssl where there is one and does without where there is none, as in a Python that was built without it.
The agent's links are CURVE's, and ssl with libssl and libcrypto costs 4 MB of memory on each host.
"""

from __future__ import annotations

import sys

# None makes `import ssl` an ImportError (The Python Language Reference, 5.3.1: the module cache).
sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # typeshed knows modules alone
