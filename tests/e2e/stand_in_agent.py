"""An agent that keeps the contract with the seed and does nothing else: the bootstrap's tests need no service.

It takes the place of agent/__main__.py in their bundles.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path

import zmq

parser = argparse.ArgumentParser()
parser.add_argument("action", choices=("enrol", "run"))
parser.add_argument("--dir", type=Path)
parser.add_argument("--address")
arguments = parser.parse_args()
identity = arguments.dir / "identity.json"

if arguments.action == "enrol":
    if not identity.exists():
        public, secret = zmq.curve_keypair()
        ports = [server.getsockname()[1] for server in [socket.create_server(("", 0)) for _ in range(2)]]
        identity.touch(mode=0o600)
        identity.write_text(json.dumps([public.decode(), secret.decode(), *ports]))
    key, _, control, bulk = json.loads(identity.read_text())
    print(json.dumps({"key": key, "control_port": control, "bulk_port": bulk}))
else:
    lock = os.open(arguments.dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    welcome = (arguments.dir / "welcome").read_bytes()
    if welcome == b"no good":
        sys.exit("the welcome is no good")
    (arguments.dir / "agent.pid").write_text(f"{os.getpid()}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    signal.pause()
