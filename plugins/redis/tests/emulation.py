"""An emulation of a server, for what no real one can be made to say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence


def emulated(replies: Sequence[bytes]) -> tuple[socket.socket, threading.Thread]:
    """Answers each message with the next reply and then hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            for reply in replies:
                if not peer.recv(1 << 16):
                    return
                peer.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return listener, thread
