"""The master's HTTP port: the keys of the store and the sizes of its objects."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from itertools import islice
from urllib.parse import quote

from hicache_core.errors import BackendCorrupt, BackendError, BackendTimeout, BackendUnavailable
from hicache_mooncake.config import MooncakeConfig, split_address

_KEYS_AT_ONCE = 64  # they are in the URL
_ADVICE = "set master_metrics_port to the master's --metrics_port, and let it listen for this host"


class Admin:
    """Requests to a master's HTTP port. Any thread; each request has its own connection."""

    def __init__(self, config: MooncakeConfig) -> None:
        """Connects to nothing."""
        self._config = config
        # None of the environment's proxies: the master is on our own network.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def keys(self, prefix: str) -> Iterator[str]:
        """Returns the keys that start with ``prefix`` now; leases none of them.

        Raises:
            BackendError: the master cannot be asked.
        """
        found = [line.decode().strip() for line in self._ask("/get_all_keys").splitlines()]
        return (key for key in found if key and key.startswith(prefix))

    def sizes(self, keys: Iterator[str]) -> Iterator[tuple[str, int]]:
        """Returns the sizes of the objects that are present, one copy each; leases none.

        Raises:
            BackendError: the master cannot be asked, or answers something else.
        """
        while part := list(islice(keys, _KEYS_AT_ONCE)):
            yield from self._sizes(part)

    def _sizes(self, keys: Sequence[str]) -> Iterator[tuple[str, int]]:
        answer = self._ask(f"/batch_query_keys?keys={','.join(map(quote, keys))}")
        try:
            for key, found in json.loads(answer)["data"].items():
                if found["values"]:  # none: it is gone, or not in memory
                    yield key, int(found["values"][0]["size_"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendCorrupt(
                f"mooncake master at {self._url()} answers {answer[:80]!r} where sizes were due"
            ) from error

    def _ask(self, question: str) -> bytes:
        url = self._url()
        try:
            answer: HTTPResponse
            with self._opener.open(url + question, timeout=self._config.rpc_timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise BackendError(
                    f"mooncake master at {url} answers {error.code}; {_ADVICE}"
                ) from None
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise BackendTimeout(f"mooncake master at {url} did not answer in time") from error
            raise BackendUnavailable(
                f"mooncake master at {url} does not answer ({cause}); {_ADVICE}"
            ) from error

    def _url(self) -> str:
        config = self._config
        address = split_address(config.master_server_address)
        if address is None or config.tenant_id != "default":
            raise BackendError(
                "keys are listed for one master and its default tenant only; this store has "
                f"master {config.master_server_address} and tenant {config.tenant_id}"
            )
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"http://{host}:{config.master_metrics_port}"
