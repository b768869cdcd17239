"""Where a decode node is told that KV is: never at a loopback address of another machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from hicache_core.router.nodes import DECODE, PREFILL, Node, Nodes, RouterSettings


@pytest.mark.parametrize(
    ("prefill", "decode", "faced_from", "host"),
    [
        ("http://10.0.0.1:1", "http://10.0.0.2:2", "10.0.0.9", "10.0.0.1"),
        ("http://127.0.0.1:1", "http://127.0.0.1:2", "127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1:1", "http://localhost:2", "127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1:1", "http://10.0.0.2:2", "10.0.0.9", "10.0.0.9"),
        ("http://localhost:1", "http://node2:2", "10.0.0.9", "10.0.0.9"),
        ("http://[::1]:1", "http://[fd00::2]:2", "fd00::9", "fd00::9"),
        ("http://10.0.0.1:1", "http://127.0.0.1:2", "127.0.0.1", "10.0.0.1"),
    ],
)
def test_a_prefill_node_on_the_routers_machine_is_told_as_others_reach_it(
    prefill: str, decode: str, faced_from: str, host: str
) -> None:
    one = Node(prefill, PREFILL, 1, transfer_address="0.0.0.0:77")
    other = Node(decode, DECODE, 1, faced_from=faced_from)
    assert one.bootstrap_for(other) == (host, 77)


class _Healthy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A server at 127.0.0.2."""
    server = ThreadingHTTPServer(("127.0.0.2", 0), _Healthy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.2:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_router_learns_its_own_address_from_health_checks(url: str) -> None:
    async def learned() -> str:
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.3")
        async with httpx.AsyncClient(transport=transport) as client:
            nodes = Nodes(client, RouterSettings([], [url]))
            await nodes.check_all()
            return nodes.all[0].faced_from

    assert asyncio.run(learned()) == "127.0.0.3"
