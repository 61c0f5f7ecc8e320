"""What a pod without an allowed key gets, run in a pod: one JSON object of what it reached.

Usage: rogue.py HOST. `open` lists the ports of HOST that accept a connection, `answers` what the control
port said to a client without CURVE and to one whose key is not the release's.
"""

import json
import socket
import sys

import zmq


def is_open(host: str, port: int) -> bool:
    """Whether a connection is accepted."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def answer(host: str, *, curve: bool) -> str | None:
    """What the control port answers within five seconds, if anything."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    if curve:
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = zmq.curve_keypair()[0]
    dealer.connect(f"tcp://{host}:5600")
    dealer.send(b"anybody there?")
    heard = repr(dealer.recv_multipart()) if dealer.poll(5000) else None
    context.destroy()
    return heard


host = sys.argv[1]
ports = [5600, 5601, 8080, *range(20000, 20005)]
found = {"open": [port for port in ports if is_open(host, port)]}
print(json.dumps({**found, "answers": [answer(host, curve=curve) for curve in (False, True)]}))
