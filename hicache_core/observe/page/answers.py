"""The answers of the page to each path below ``/hicache/``, for any HTTP server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

from hicache_core.config.redact import masked
from hicache_core.observe.history import History
from hicache_core.observe.on_demand import Aged
from hicache_core.observe.windows import Watch
from hicache_core.radix.picture import TreePicture

PREFIX = "/hicache"
EXPLAIN = "/hicache/explain/"
MAX_REQUESTS = 200
DEFAULT_REQUESTS = 50
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": ("default-src 'self'; frame-ancestors 'none'"),
}
"""Headers for every answer of the page."""

Record = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class PageData:
    """The sources of what the page shows. Several threads of the server call them at once.

    Attributes:
        watch: observes the cache.
        history: its samples; None shows no charts.
        explain: returns the record of a request, as JSON values; None if the id is not known.
        requests: returns the newest ``n`` records, newest first. A record may have ``ttft_s`` and
            ``total_s`` beside the fields of an ``Explanation``.
        tree: returns a picture made on the cache's owner thread; None before its first step.
        engine: returns the state of the engine: ``running`` and ``waiting`` requests,
            ``tokens_per_s``; with ``model`` the title of the page names what is served.
    """

    watch: Watch
    history: History | None = None
    explain: Callable[[str], Record | None] | None = None
    requests: Callable[[int], Sequence[Record]] | None = None
    tree: Callable[[], Aged[TreePicture] | None] | None = None
    engine: Callable[[], Record] | None = None


class Answer(NamedTuple):
    """An HTTP response."""

    status: HTTPStatus
    content_type: str
    body: bytes
    location: str = ""


def page_answer(data: PageData, path: str, query: str = "") -> Answer | None:
    """The answer to ``path``; None if the page has no such path.

    Args:
        data: what to show.
        path: the path of the URL, such as ``/hicache/history``, still quoted.
        query: the query of the URL, without the question mark.
    """
    if path == PREFIX:
        return redirect("hicache/")
    if not path.startswith(f"{PREFIX}/"):
        return None
    if path.startswith(EXPLAIN) and data.explain is not None:
        return _explained(data.explain, unquote(path.removeprefix(EXPLAIN)))
    makers: dict[str, Callable[[], Record | None]] = {
        "/hicache/status": lambda: dataclasses.asdict(data.watch.observe()),
        "/hicache/history": lambda: _history(data.history, _number(query, "after", 0)),
        "/hicache/requests": lambda: _requests(data, _number(query, "limit", DEFAULT_REQUESTS)),
        "/hicache/tree": lambda: _tree(data.tree),
        "/hicache/engine": lambda: {} if data.engine is None else data.engine(),
    }
    if path not in makers:
        return page_file(path.removeprefix(f"{PREFIX}/") or "index.html")
    value = makers[path]()
    return not_found(f"this server has nothing at {path}") if value is None else as_json(value)


def page_names() -> frozenset[str]:
    """The names of the page's own files, which hold no data of a cache."""
    return frozenset(
        file.name
        for file in files("hicache_core.observe.page").joinpath("files").iterdir()
        if "." + file.name.rpartition(".")[2] in TYPES
    )


def page_file(name: str) -> Answer | None:
    """The file ``name`` of the page; None if there is no such file."""
    folder = files("hicache_core.observe.page").joinpath("files")
    for file in folder.iterdir():  # a name is compared, never joined to a path
        suffix = "." + file.name.rpartition(".")[2]
        if file.name == name and suffix in TYPES:
            return Answer(HTTPStatus.OK, TYPES[suffix], file.read_bytes())
    return None


def as_json(value: Record, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    """``value`` as JSON, with whatever looks like a secret masked."""
    text = json.dumps(masked(value), default=str)
    return Answer(status, "application/json", text.encode())


def redirect(location: str) -> Answer:
    """An answer that sends a browser to ``location``, relative to where it asked."""
    return Answer(HTTPStatus.TEMPORARY_REDIRECT, "text/plain", b"", location=location)


def not_found(reason: str) -> Answer:
    """An answer with status 404 and ``reason``."""
    return as_json({"error": reason}, HTTPStatus.NOT_FOUND)


def _explained(explain: Callable[[str], Record | None], request_id: str) -> Answer:
    record = explain(request_id)
    if record is None:
        return not_found(f"no record of request {request_id!r}; only recent requests are kept")
    return as_json(record)


def _history(history: History | None, after: int) -> Record | None:
    if history is None:
        return None
    samples = [dataclasses.asdict(sample) for sample in history.since(after)]
    return {
        "started_s": history.started_s,
        "interval_s": history.interval_s,
        "samples": samples,
    }


def _requests(data: PageData, limit: int) -> Record | None:
    if data.requests is None:
        return None
    return {"requests": list(data.requests(max(0, min(limit, MAX_REQUESTS))))}


def _tree(tree: Callable[[], Aged[TreePicture] | None] | None) -> Record | None:
    if tree is None:
        return None
    made = tree()
    if made is None:
        return {"picture": None, "age_s": None}
    return {"picture": dataclasses.asdict(made.value), "age_s": made.age_s}


def _number(query: str, name: str, default: int) -> int:
    """A whole number from a query; ``default`` if it is absent or not a whole number."""
    text = parse_qs(query).get(name, [""])[0]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else default
