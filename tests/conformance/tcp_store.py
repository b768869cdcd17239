"""A small real server of objects over TCP, and the backend for it: for the rules about servers.

``python tcp_store.py PORT`` serves. A request is ``op key-length value-length key value``, an
answer ``found value-length value``.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import subprocess
import sys

REQUEST = struct.Struct("<cHI")
ANSWER = struct.Struct("<?I")
OBJECTS: dict[bytes, bytes] = {}


def receive(sock: socket.socket, nbytes: int) -> bytes:
    """Exactly ``nbytes`` bytes."""
    parts = bytearray()
    while len(parts) < nbytes:
        part = sock.recv(nbytes - len(parts))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        parts += part
    return bytes(parts)


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    def handle(self) -> None:
        """Answers until the client goes."""
        try:
            while True:
                op, n_key, n_value = REQUEST.unpack(receive(self.request, REQUEST.size))
                key, value = receive(self.request, n_key), receive(self.request, n_value)
                found, answer = self.answer(op, key, value)
                self.request.sendall(ANSWER.pack(found, len(answer)) + answer)
        except ConnectionError:
            return

    @staticmethod
    def answer(op: bytes, key: bytes, value: bytes) -> tuple[bool, bytes]:
        """What one request comes to."""
        if op == b"s":
            OBJECTS[key] = value
            return True, b""
        if op == b"d":
            return OBJECTS.pop(key, None) is not None, b""
        return key in OBJECTS, OBJECTS.get(key, b"") if op == b"g" else b""


class Server(socketserver.ThreadingTCPServer):
    """Many connections."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64  # a client of a frozen server connects anew for each of its calls


def start(port: int) -> subprocess.Popen[bytes]:
    """A server in a process of its own, once it takes connections."""
    process = subprocess.Popen([sys.executable, "-S", __file__, str(port)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
