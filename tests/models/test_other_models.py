"""Models of transformers that are no causal language models are refused with the reason."""

from __future__ import annotations

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from hicache_core.errors import SpecError
from tests.models.tiny import tiny_fields
from tests.models.ways import Way, in_cached_model, in_engine

READS = "the KV of its decoder depends on what its encoder has read"
OTHER = "it is not a causal language model of transformers"

MODELS = {
    "BertForMaskedLM": ("bert", OTHER),
    "LlamaForSequenceClassification": ("llama", OTHER),
    "LlamaModel": ("llama", OTHER),
    "T5ForConditionalGeneration": ("t5", READS),
    "WhisperForConditionalGeneration": ("whisper", READS),
}


@pytest.mark.parametrize("way", [in_cached_model, in_engine])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_no_causal_language_model_is_refused(name: str, way: Way) -> None:
    architecture, reason = MODELS[name]
    config_class = CONFIG_MAPPING[architecture]
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    model = getattr(transformers, name)(config_class(**tiny_fields(config_class, {})))
    hf_logging.set_verbosity(before)
    with pytest.raises(SpecError, match=f"{name} cannot be cached: {reason}"), way(model, "none"):
        pass
