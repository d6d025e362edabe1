"""Small random Llamas, and the obvious way to score a word with any causal model: the tests' oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_tiny_model(folder: Path, *, vocabulary: int = 97, seed: int = 0, scale: float = 0.3) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=scale, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_byte_model(folder: Path) -> Path:
    """With a tokenizer whose tokens are bytes."""
    save_tiny_model(folder, vocabulary=256)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@torch.inference_mode()
def brute_force(model: Any, prompt: Sequence[int], word: Sequence[int]) -> float:
    """One whole forward pass; log-softmax in double precision, as the single-precision one of torch is off by 1e-4."""
    logits = model(torch.tensor([[*prompt, *word]])).logits[0].double()
    laws = logits.log_softmax(-1)
    return sum(laws[len(prompt) - 1 + i, token].item() for i, token in enumerate(word))


def brute_force_table(
    model: Any, prompts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]
) -> np.ndarray[Any, Any]:
    return np.array([[brute_force(model, prompt, word) for word in words] for prompt in prompts])
