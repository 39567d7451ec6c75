"""eval/common/models.py: a folder's own quantization is read, or refused with what to install.

Turns red where load_model passes quantization_config=None on (tried): AutoModel then forgets what config.json says, and
8-bit floats are taken for weights without their scales. Found on an FP8 model of llm-compressor, whose perplexity was
2.8 times that of its source and is 1.003 times since.
"""

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_prep.common.errors import UsageError
from eval.common.models import load_model

FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8_WEIGHTS}},
    "ignore": ["lm_head"],
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model in 16-bit floats."""
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_an_unread_quantization_is_refused(folder, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_compressed_tensors.is_compressed_tensors_available", bool)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": FP8}))
    with pytest.raises(UsageError, match="does not load as a causal language model: compressed-tensors.* is required"):
        load_model(folder, [], torch.float32, "cpu")


def test_a_plain_folder_is_loaded_in_the_type_asked_for(folder):
    assert load_model(folder, [], torch.float32, "cpu").dtype == torch.float32
