"""The client: one streamed request to an OpenAI-compatible server, or to SGLang's ``/generate``."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hicache_core.errors import ConfigError

if TYPE_CHECKING:
    import httpx

PATHS = {
    "generate": "/generate",
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}
TIERS = ("device", "host", "storage")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer.
        ttft_s: seconds until the first piece of text; None if there was none.
        latency_s: seconds until the end.
        prompt_tokens, output_tokens, cached_tokens: as counted by the server; 0 if not reported.
        cached: cached tokens by tier; empty if not reported.
        error: the error of a failed request; otherwise empty.
    """

    text: str = ""
    ttft_s: float | None = None
    latency_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass
class _Reading:
    """A stream as far as it has been read."""

    text: str = ""
    first_s: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Client:
    """Sends prompts; several at once on one event loop. Use it in ``async with``."""

    def __init__(
        self,
        url: str,
        *,
        api: str = "completions",
        model: str = "default",
        api_key: str | None = None,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Connects on the first request.

        Args:
            url: address of the server, such as ``http://127.0.0.1:30000``.
            api: which API to call, a key of ``PATHS``.
            model: model name in the requests.
            api_key: API key of the server; None sends none.
            timeout_s: seconds that a request may take.
            clock: seconds, increasing; times of replies are measured with it.

        Raises:
            ConfigError: httpx is not installed.
        """
        try:
            self._httpx = importlib.import_module("httpx")
        except ImportError as error:
            raise ConfigError(
                "hicache bench needs httpx: pip install 'hicache-core[bench]'"
            ) from error
        self._path = PATHS[api]
        self._api = api
        self._model = model
        self._clock = clock
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http: httpx.AsyncClient = self._httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=timeout_s,
            trust_env=False,  # a server under test is on loopback or in the cluster
            limits=self._httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Client:
        """Itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def send(self, prompt: str, output_length: int) -> Reply:
        """Sends one prompt and reads the whole answer; a failure is a reply with its error."""
        began = self._clock()
        reading = _Reading()
        try:
            request = self._http.stream("POST", self._path, json=self._body(prompt, output_length))
            async with request as response:
                if response.status_code != 200:
                    await response.aread()
                    reading.error = f"HTTP {response.status_code}: {response.text[:200]}"
                else:
                    await self._read(response.aiter_lines(), reading, began)
        except (self._httpx.HTTPError, ValueError) as error:
            reading.error = f"{type(error).__name__}: {error}"
        return _reply(reading, self._clock() - began)

    async def figures(self) -> dict[str, Any]:
        """The snapshot of the server's cache; empty if it has no ``/hicache/status``."""
        try:
            response = await self._http.get("/hicache/status")
            snapshot = response.json()["snapshot"] if response.status_code == 200 else {}
        except (self._httpx.HTTPError, ValueError, KeyError, TypeError):
            return {}
        return snapshot if isinstance(snapshot, dict) else {}

    async def flush_cache(self) -> bool:
        """Asks the server to empty its cache; returns whether it did."""
        try:
            response = await self._http.post("/flush_cache")
        except self._httpx.HTTPError:
            return False
        return bool(response.status_code == 200)

    def _body(self, prompt: str, output_length: int) -> dict[str, Any]:
        if self._api == "generate":
            sampling = {"temperature": 0.0, "max_new_tokens": output_length, "ignore_eos": True}
            return {"text": prompt, "sampling_params": sampling, "stream": True}
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": output_length,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._api == "chat":
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}

    async def _read(self, lines: AsyncIterator[str], reading: _Reading, began: float) -> None:
        async for line in lines:
            payload = line.removeprefix("data:").strip()
            if not line.startswith("data:") or payload == "[DONE]":
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                reading.error = str(chunk["error"])[:200]
                return
            before = reading.text
            if self._api == "generate":  # its text grows; the others send what is new
                reading.text = chunk.get("text") or before
                reading.usage = chunk.get("meta_info") or reading.usage
            else:
                reading.text += _piece(chunk)
                reading.usage = chunk.get("usage") or reading.usage
            if reading.first_s is None and reading.text != before:
                reading.first_s = self._clock() - began


def _piece(chunk: Mapping[str, Any]) -> str:
    """The new text in a chunk of a completion or of a chat."""
    choices = chunk.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return str(choices[0].get("text") or delta.get("content") or "")


def _reply(reading: _Reading, latency_s: float) -> Reply:
    usage = reading.usage
    details = usage.get("prompt_tokens_details") or {}
    tiers = usage.get("cached_tokens_details") or details.get("cached_tokens_details") or details
    cached = {tier: int(tiers[tier]) for tier in TIERS if tiers.get(tier) is not None}
    total = usage.get("cached_tokens", details.get("cached_tokens"))
    return Reply(
        text=reading.text,
        ttft_s=reading.first_s,
        latency_s=latency_s,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(total or sum(cached.values())),
        cached=cached,
        error=reading.error,
    )
