"""A fake of an OpenAI-compatible server, with a cache that is a set of prefixes of words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PAGE_WORDS = 8


class FakeServer:
    """Answers ``w0 w1 …``; counts words as tokens and hits whole pages of words it has seen."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pages: set[tuple[str, ...]] = set()
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = self.hits = self.flushes = 0
        self.fail_after: int | None = None
        self.reports_tiers = True

    def begin(self, body: dict[str, Any], prompt: str) -> int:
        """Takes a request; how many words of its prompt were cached."""
        words = tuple(prompt.split())
        with self.lock:
            self.bodies.append(body)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            prefixes = [words[:n] for n in range(PAGE_WORDS, len(words) + 1, PAGE_WORDS)]
            cached = max((len(p) for p in prefixes if p in self.pages), default=0)
            self.pages.update(prefixes)
            self.hits += cached
            return cached


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]
        hits = {"device": fake.hits, "host": 0, "storage": 0}
        self._json(200, {"snapshot": {"hit_tokens": hits}})

    def do_POST(self) -> None:
        fake: FakeServer = self.server.fake  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/flush_cache":
            fake.flushes += 1
            self._json(200, {})
            return
        prompt = body.get("text") or body.get("prompt") or body["messages"][0]["content"]
        cached = fake.begin(body, prompt)
        if fake.fail_after is not None and len(fake.bodies) > fake.fail_after:
            self._json(503, {"error": "the queue is full"})
        else:
            reported = cached if fake.reports_tiers else None
            self._stream(list(chunks(self.path, body, len(prompt.split()), reported)))
        with fake.lock:
            fake.running -= 1

    def _json(self, status: int, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, found: list[dict[str, Any]]) -> None:
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in found) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def chunks(
    path: str, body: dict[str, Any], n_prompt: int, cached: int | None
) -> Iterator[dict[str, Any]]:
    """What the server streams, in the form of its path; with ``cached``, where from."""
    tiers: dict[str, Any] = {"cached_tokens": 0}
    if cached is not None:
        split = {"device": cached, "host": 0, "storage": 0}
        tiers = {"cached_tokens": cached, "cached_tokens_details": split}
    if path == "/generate":
        n = body["sampling_params"]["max_new_tokens"]
        for k in range(1, n + 1):
            text = "".join(f" w{i}" for i in range(k))
            usage = {"prompt_tokens": n_prompt, "completion_tokens": k}
            yield {"text": text, "meta_info": usage | tiers}
        return
    for i in range(body["max_tokens"]):
        is_chat = path.endswith("chat/completions")
        piece = {"delta": {"content": f" w{i}"}} if is_chat else {"text": f" w{i}"}
        yield {"choices": [piece]}
    usage = {"prompt_tokens": n_prompt, "completion_tokens": body["max_tokens"]}
    yield {"choices": [], "usage": usage | {"prompt_tokens_details": tiers}}


@contextmanager
def serving() -> Iterator[tuple[FakeServer, str]]:
    """The fake and its URL."""
    fake = FakeServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.fake = fake  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield fake, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
