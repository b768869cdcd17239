"""ClientRequest: a request as the router takes it from a client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hicache_core.router.affinity import prompt_of

CHARS_PER_TOKEN = 4
MAX_NEW_TOKENS = 1 << 24
_PASSED_ON = ("authorization", "x-request-id")
_ROUTERS_OWN = "bootstrap_"
"""So begin the names of fields that say where prefill and decode meet; only a router sets them."""


def encoded(body: Mapping[str, Any]) -> bytes:
    """A body for a node, as UTF-8. Lone surrogates are passed on: the node refuses them."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request as the client sent it.

    Attributes:
        path: of the call, the same at the node.
        body: the JSON object, without fields that only the router may set.
        headers: that are passed on to the nodes.
        prompt: text by which affinity chooses a node.
        tenant: requests with the same value may share prefixes.
    """

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    prompt: str
    tenant: str

    @classmethod
    def of(cls, path: str, raw: bytes, headers: Mapping[str, str]) -> ClientRequest:
        """Parses a request; drops the fields and headers that clients must not set.

        Args:
            path: of the call.
            raw: the body.
            headers: of the client.

        Raises:
            ValueError: the body is not a JSON object, has NaN in it, or is nested too deeply.
        """
        try:
            body = _without_rooms(_parsed(raw))
            encoded(body)  # what can be read here can be sent on
            tenant = json.dumps([body.get("cache_salt"), body.get("extra_key")])
            return cls(path, body, passed_on(headers), prompt_of(body), tenant)
        except RecursionError as error:
            raise ValueError("it nests too deeply") from error

    @property
    def is_stream(self) -> bool:
        """Whether the answer is streamed."""
        return bool(self.body.get("stream"))

    @property
    def is_single(self) -> bool:
        """One prompt and one answer: a room holds one."""
        prompt = self.body.get("prompt", self.body.get("text", self.body.get("input_ids")))
        many = isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt)
        sampling = self.body.get("sampling_params")
        n = self.body.get("n") or (sampling.get("n") if isinstance(sampling, dict) else 1) or 1
        return not many and n == 1 and not isinstance(sampling, list)

    @property
    def n_tokens(self) -> int:
        """Estimated tokens of the prompt."""
        ids = self.body.get("input_ids")
        return len(ids) if isinstance(ids, list) else len(self.prompt) // CHARS_PER_TOKEN

    @property
    def n_new_tokens(self) -> int:
        """Maximum tokens of the answer; a guess if the client does not say."""
        sampling = self.body.get("sampling_params")
        inner = sampling.get("max_new_tokens") if isinstance(sampling, dict) else None
        asked = self.body.get("max_tokens") or self.body.get("max_completion_tokens") or inner
        return min(max(asked, 0), MAX_NEW_TOKENS) if isinstance(asked, int) else 128


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a client that are passed on to the nodes."""
    return {name: value for name, value in headers.items() if name.lower() in _PASSED_ON}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode(), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError("a number in it is none, or too long") from error
    if not isinstance(body, dict):
        raise ValueError("it is another value")
    return body


def _without_rooms(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a client says of rooms counts for nothing, beside the prompt or among its parameters."""
    own = _clients_own(body)
    match own.get("sampling_params"):
        case dict() as sampling:
            own["sampling_params"] = _clients_own(sampling)
        case list() as several:
            own["sampling_params"] = [
                _clients_own(one) if isinstance(one, dict) else one for one in several
            ]
    return own


def _clients_own(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: at for name, at in fields.items() if not name.lower().startswith(_ROUTERS_OWN)}


def _refuse(constant: str) -> None:
    raise ValueError(constant)
