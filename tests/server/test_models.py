"""Which model a command line means, and by which names clients find it and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
import torch

from hicache_core.cli.main import main
from hicache_core.engine.model import LoadedModel
from hicache_core.errors import ConfigError
from hicache_core.server.models import load_model, served_name, tokenizer_path
from tests.server.tiny import ROOM, parsed, tiny_server
from tests.server.world import server
from tests.servers.process import free_port

HUB_ID = "somebody/tiny-chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache that has one model."""
    kept = tmp_path / "hub" / "models--somebody--tiny-chat"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / COMMIT).symlink_to(tiny_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return kept


def test_a_name_of_a_hub_is_found_in_its_cache(hub: Path, tiny_chat: LoadedModel) -> None:
    loaded = load_model(HUB_ID, "cpu")
    assert loaded.folder == hub / "snapshots" / COMMIT
    for own, same in zip(loaded.model.parameters(), tiny_chat.model.parameters(), strict=True):
        assert torch.equal(own, same)


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_cache_lacks_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--model-path", "somebody/else", "--port", "0"])
    error = capsys.readouterr().err
    assert "nothing is downloaded: run `hf download somebody/else` before" in error


def test_the_dtype_is_the_one_that_is_asked(tiny_folder: Path) -> None:
    for name, dtype in (
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("float", torch.float32),
    ):
        assert load_model(str(tiny_folder), "cpu", name).model.dtype == dtype


def test_a_chat_template_takes_the_place_of_the_models_own(
    tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }} library")
    tokenizer = load_model(str(tiny_folder), "cpu", chat_template=str(file)).tokenizer
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the library"


def test_a_chat_template_that_is_not_there_is_one_line(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--port", "0", "--chat-template", "/nowhere.jinja"]
    with pytest.raises(SystemExit):
        main(["serve", "--model-path", str(tiny_folder), *flags])
    assert "--chat-template /nowhere.jinja" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Jinja template"):
        load_model(str(tiny_folder), "cpu", chat_template=str(tiny_folder))


@pytest.mark.usefixtures("hub")
def test_clients_find_the_tokenizer_by_what_they_are_told(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    relative = tiny_folder.name
    gguf = LoadedModel("a-file", None, None, tiny_folder)
    of_folder = LoadedModel(tiny_folder.name, None, None, Path(relative))
    for path, loaded, name, where in (
        (relative, of_folder, relative, str(tiny_folder.resolve())),
        (HUB_ID, of_folder, HUB_ID, HUB_ID),
        ("smollm2", gguf, "a-file", str(tiny_folder.resolve())),
        ("a-file.gguf", LoadedModel("a-file", None, None), "a-file", "a-file.gguf"),
    ):
        settings = parsed(["--model-path", path])
        assert served_name(settings, loaded) == name
        assert tokenizer_path(settings, loaded) == where
        named = parsed(["--model-path", path, "--served-model-name", "x"])
        assert served_name(named, loaded) == "x"


@pytest.mark.anyio
async def test_every_call_that_names_the_model_says_the_same(
    tiny_chat: LoadedModel, tiny_folder: Path
) -> None:
    flags = ["--model-path", str(tiny_folder), *ROOM]
    async with tiny_server(tiny_chat, flags) as s:
        (card,) = (await s.client.get("/v1/models")).json()["data"]
        assert card["id"] == card["root"] == str(tiny_folder)
        for name in (card["id"], tiny_folder.name):
            assert (await s.client.get(f"/v1/models/{name}")).json() == card
        for path in ("/get_model_info", "/server_info"):
            info = (await s.client.get(path)).json()
            assert info["served_model_name"] == info["tokenizer_path"] == card["id"]
        body = {"prompt": [3, 4, 5], "max_tokens": 1}
        answer: httpx.Response = await s.client.post("/v1/completions", json=body)
        assert answer.json()["model"] == card["id"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, None),
        ({"endpoint": "tcp://127.0.0.1:*"}, None),
        (
            {"endpoint": "tcp://127.0.0.1:{}", "topic": "kv"},
            {"endpoint_host": "127.0.0.1", "topic": "kv", "block_size": 4, "dp_size": 1},
        ),
    ],
)
async def test_the_server_says_where_its_events_are(
    config: dict[str, Any], told: dict[str, Any] | None
) -> None:
    port = free_port()
    events = {key: value.format(port) for key, value in config.items()}
    async with server(cache={"kv_events_config": events} if events else None) as s:
        found = (await s.client.get("/server_info")).json()["kv_events"]
    if told is not None:
        told |= {"publisher": "zmq", "endpoint_port_base": port}
    assert found == told
