"""SGLang's HTTP server over our store: the flags of docs/engines.md, attach, detach and clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines import options
from tests.engines.child import ANSWER_S, Group
from tests.engines.environments import SGLANG, program, variables
from tests.engines.scene import N_NEW, PROMPTS, wait_until
from tests.engines.stores import running_store
from tests.servers.process import free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ADMIN = {"Authorization": "Bearer an-admin-key"}
STORAGE = "/hicache/storage-backend"


class Server:
    """SGLang's server, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=ANSWER_S, headers=ADMIN)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def serves(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/model_info").is_success
        except httpx.TransportError:
            return False

    def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer of the admin API, which must be one of success."""
        answer = self._client.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer

    def found(self, expected: list[list[int]] | None = None) -> list[int]:
        """How many tokens of each prompt come from the store, when nothing else has them."""
        wait_until(lambda: self._client.post("/flush_cache").is_success, "the server is idle")
        sampling = {"temperature": 0, "max_new_tokens": N_NEW, "ignore_eos": True}
        answers = [
            self.admin("POST", "/generate", {"input_ids": ids, "sampling_params": sampling}).json()
            for ids in PROMPTS
        ]
        self.tokens = [answer["output_ids"] for answer in answers]
        assert expected is None or self.tokens == expected
        details = [answer["meta_info"]["cached_tokens_details"] for answer in answers]
        return [(one or {}).get("storage", 0) for one in details]


def test_the_server_hits_detaches_attaches_and_clears(model: Path, tmp_path: Path) -> None:
    nothing, everything = [0, 0], [960, 960]
    with running_store("file", tmp_path / "store") as store:
        ours = {
            "backend_name": "hicache",
            "module_path": "hicache_core.integrations.sglang",
            "class_name": "HiCacheBackend",
            "interface_v1": 1,
            **store.named,
        }
        arguments = options.sglang(
            model,
            hicache_mem_layout="page_first",
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=ours,
        )
        port = free_port()
        command = [
            program(SGLANG[0]), "-m", "sglang.launch_server", *options.as_flags(arguments),
            "--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup",
            "--admin-api-key", "an-admin-key",
        ]  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}")
        process = Group(command, variables(SGLANG[0], {}), tmp_path / "server.log")
        try:
            process.wait(server.serves)
            assert server.found() == nothing
            expected = server.tokens
            wait_until(lambda: server.found(expected) == everything, "every page is stored")

            server.admin("DELETE", STORAGE)
            assert server.found(expected) == nothing

            config = json.dumps(ours)
            attached = {
                "hicache_storage_backend": "dynamic",
                "hicache_storage_backend_extra_config_json": config,
            }
            server.admin("PUT", STORAGE, attached)
            assert server.found(expected) == everything
            assert server.admin("GET", STORAGE).json()["hicache_storage_backend"] == "dynamic"

            server.admin("POST", f"{STORAGE}/clear")
            assert store.pages() == []
            assert server.found(expected) == nothing
        finally:
            server.close()
            process.kill()
