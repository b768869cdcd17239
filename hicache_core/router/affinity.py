"""Affinity: the node that has probably computed the beginning of a prompt before."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

BLOCK_CHARS = 256
MAX_BLOCKS = 256
MAX_ENTRIES = 1 << 16


def prompt_of(body: Mapping[str, Any]) -> str:
    """The prompt of a request as text; prompts with a common beginning give texts with one."""
    for name in ("messages", "prompt", "text", "input_ids"):
        if (value := body.get(name)) is not None:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return ""


class Affinity:
    """Remembers, for each beginning of a prompt, the node that computed it last.

    It compares characters, not tokens: it chooses a node and never decides what is reused.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        """Starts empty; above ``max_entries`` beginnings the oldest are dropped."""
        self._nodes: OrderedDict[int, str] = OrderedDict()
        self._max_entries = max_entries

    def remember(self, prompt: str, tenant: str, node: str) -> None:
        """Records that a node computes a prompt.

        Args:
            prompt: as from ``prompt_of``.
            tenant: who shares prefixes with whom.
            node: the node.
        """
        for key in _beginnings(prompt, tenant):
            self._nodes[key] = node
            self._nodes.move_to_end(key)
        while len(self._nodes) > self._max_entries:
            self._nodes.popitem(last=False)

    def lookup(self, prompt: str, tenant: str) -> str | None:
        """The node that computed the longest beginning of this prompt, if that is most of it.

        Otherwise a shared system prompt would send every request to one node.
        """
        found, n_known = None, 0
        keys = list(_beginnings(prompt, tenant))
        for key in keys:
            if (node := self._nodes.get(key)) is None:
                break
            found, n_known = node, n_known + 1
        return found if 2 * n_known >= len(keys) else None


def _beginnings(prompt: str, tenant: str) -> Iterator[int]:
    """A key for each beginning of whole blocks; a short prompt has none."""
    digest = xxhash.xxh3_64(tenant.encode("utf-8", "surrogatepass"))
    n_blocks = min(len(prompt) // BLOCK_CHARS, MAX_BLOCKS)
    for start in range(0, n_blocks * BLOCK_CHARS, BLOCK_CHARS):
        digest.update(prompt[start : start + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        yield digest.intdigest()
