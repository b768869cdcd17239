"""``hicache size``: bytes a token, what a host tier holds, and what a page costs where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hicache_core.errors import ConfigError, SpecError
from hicache_core.kv.model_config import read_model_config, spec_of_config, spec_of_numbers
from hicache_core.pools.limits import host_pages
from hicache_core.storage.file.records import capacity_for
from tests.unit.cli.test_cli import in_process

Capsys = pytest.CaptureFixture[str]
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
NUMBERS = ["--layers", "32", "--kv-heads", "8", "--head-dim", "128"]
PAGE_NBYTES = 32 * 2 * 8 * 128 * 2 * 64


def config(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)


def sized(capsys: Capsys, *words: str) -> dict[str, dict[str, dict[str, int]]]:
    status, out, err = in_process(capsys, "size", *words, "--json")
    assert status == 0, err
    return dict(json.loads(out))


def test_a_folder_and_its_numbers_give_the_same(tmp_path: Path, capsys: Capsys) -> None:
    folder = sized(capsys, "--model", config(tmp_path), "--backend", "file")
    assert folder == sized(capsys, *NUMBERS, "--backend", "file")
    assert folder["groups"]["full"]["token_nbytes"] == 131_072
    assert folder["stored_nbytes"] == {"file": {"full": capacity_for(64 + PAGE_NBYTES)}}


def test_the_host_tier_holds_as_many_pages_as_the_pool_would_have(capsys: Capsys) -> None:
    host = sized(capsys, *NUMBERS, "--hicache-size", "100", "--length", "8192")["host"]
    pages = host_pages(ratio=0, size_gb=100, device_pages=1, page_nbytes=PAGE_NBYTES)
    assert host == {"nbytes": 100 * 10**9, "tokens": 64 * pages, "conversations": pages // 128}


def test_the_text_says_what_a_page_costs_in_each_backend(capsys: Capsys) -> None:
    words = [*NUMBERS, "--backend", "file", "--backend", "redis", "--hicache-size", "100"]
    status, out, _ = in_process(capsys, "size", *words)
    assert status == 0
    assert "full   all tokens  32      131,072        8,388,608" in out
    assert "A host tier of 100 GB holds 762,880 tokens: 186 such conversations." in out
    assert "redis    10,485,760 (1.25 ×)" in out


def test_a_conversation_needs_of_a_window_only_its_last_pages(capsys: Capsys) -> None:
    windows = ["--layers", "26", "--kv-heads", "1", "--head-dim", "256"]
    said = sized(capsys, *windows, "--window", "512", "--window-layers", "22")
    full, window = said["groups"]["full"], said["groups"]["swa"]
    assert (full["layers"], full["units"], window["layers"], window["units"]) == (4, 64, 22, 8)
    needed = 64 * full["unit_nbytes"] + 8 * window["unit_nbytes"]
    assert said["conversation"] == {"tokens": 4096, "nbytes": needed}


def test_ranks_share_heads_but_not_a_latent(tmp_path: Path, capsys: Capsys) -> None:
    assert sized(capsys, *NUMBERS, "--tp", "4")["groups"]["full"]["token_nbytes"] == 32_768
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    folder = ["--model", config(tmp_path, **latent)]
    one, many = (sized(capsys, *folder, "--tp", tp)["groups"]["full"] for tp in ("1", "4"))
    assert one == many
    assert one["token_nbytes"] == 32 * 576 * 2
    status, _, err = in_process(capsys, "size", *NUMBERS, "--tp", "3")
    assert (status, "8 KV heads cannot be divided" in err) == (2, True)


def test_a_model_of_the_hub_is_found_in_its_cache(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--some--llama" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    config(folder)
    assert sized(capsys, "--model", "some/llama")["groups"]["full"]["layers"] == 32
    status, _, err = in_process(capsys, "size", "--model", "some/other")
    assert (status, "there is no such folder" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --model, or --layers, --kv-heads and --head-dim"),
        (NUMBERS[:4], "give --model, or --layers, --kv-heads and --head-dim"),
        ([*NUMBERS, "--model", "."], "give --model, or --layers, --kv-heads and --head-dim"),
        ([*NUMBERS, "--window", "512"], "give both"),
        ([*NUMBERS, "--backend", "rediss"], "rediss"),
        (["--model", "/dev/null"], "as a model's config"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    capsys: Capsys, words: list[str], said: str
) -> None:
    status, out, err = in_process(capsys, "size", *words)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window": 128}, range(32)),
        ({"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 28}, ()),
        (
            {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 28},
            range(28, 32),
        ),
        ({"sliding_window": 128, "sliding_window_pattern": 16}, {*range(32)} - {15, 31}),
        ({"sliding_window": 128, "model_type": "gemma2"}, range(0, 32, 2)),
        ({"sliding_window": None}, ()),
    ],
)
def test_older_configs_say_in_other_ways_which_layers_have_a_window(
    tmp_path: Path, changes: dict[str, object], windowed: object
) -> None:
    spec = spec_of_config(read_model_config(Path(config(tmp_path, **changes))))
    found = {
        layer
        for group in spec.groups
        for one in group.spec.components
        for layer in group.spec.layers_of(one)
    }
    assert found == set(windowed)  # type: ignore[call-overload]


def test_a_wrong_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read /nowhere as a model's config"):
        read_model_config(Path("/nowhere"))
    with pytest.raises(SpecError, match="3 layer_types for 2 layers"):
        spec_of_config(
            type("Config", (), {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 3})
        )
    with pytest.raises(SpecError, match="need a positive integer"):
        spec_of_numbers(layers=0, kv_heads=1, head_dim=1, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**12}, "at most 100,000 are possible"),
        ({"layer_types": 5}, "layer_types = 5; need a list"),
    ],
)
def test_layers_that_no_model_has_are_said(
    tmp_path: Path, capsys: Capsys, changes: dict[str, object], said: str
) -> None:
    status, _, err = in_process(capsys, "size", "--model", config(tmp_path, **changes))
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_more_layers_than_any_model_has_are_refused(capsys: Capsys) -> None:
    words = ["--layers", str(10**20), *NUMBERS[2:]]
    status, _, err = in_process(capsys, "size", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert "at most 100,000 are possible" in err
