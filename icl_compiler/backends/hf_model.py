"""A frozen language model of `transformers`: from tokens to hidden states, from hidden states to log-probabilities.

What a model loses in bfloat16 is kept small where that is cheap:

- The residual stream stays in float32; only the weights, and what is multiplied with them, are bfloat16. How far that
  is from the same model in float32: `python -m benchmarks agreement`.
- A logit near 20 is rounded to the nearest 0.125. The logits that matter (the likeliest tokens, and those that are
  asked for) are therefore computed again in float32 from the same hidden state.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from icl_compiler.errors import ModelError
from icl_compiler.models import load_causal_lm

_REFINED_TOKENS = 32
_HEAD_ROWS = 128
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class FrozenModel:
    """A causal language model on one device, every layer of which attends to the whole prompt.

    Args:
        name: an embedded model (`icl models list`), a folder, or a name on the model hub.
        dtype: `auto` is bfloat16 where the processor computes in it, else float32.
        network: the model itself, where it is loaded already; `name` then is what messages call it.

    Raises:
        ModelError: if there is no such model, or it has layers that see a part of the prompt only.
    """

    def __init__(self, name: str, dtype: str = "auto", *, network: Any = None) -> None:
        self.on_gpu = torch.cuda.is_available()
        self._dtype = _choose_dtype(dtype, gpu=self.on_gpu)
        self._device = torch.device("cuda" if self.on_gpu else "cpu")
        self.network: Any = load_causal_lm(name, self._dtype) if network is None else network
        self.network.to(self._device, self._dtype).eval()
        config = self.network.config.get_text_config()
        _require_full_attention(name, config)
        self.max_tokens: int = config.max_position_embeddings
        self._head: Any = self.network.get_output_embeddings()
        self._plain_head = self._logits_are_head_of_hidden()
        kept = self._dtype != torch.float32 and self._keep_residual_in_float32()
        number = str(self._dtype).removeprefix("torch.")
        self.device = f"{self._device.type}, {number}" + (" (residual float32)" if kept else "")

    @property
    def cache_bytes_per_token(self) -> int:
        """Memory for the keys and values of a token."""
        config = self.network.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * int(config.num_hidden_layers * heads * size) * self._dtype.itemsize

    @torch.inference_mode()
    def run(
        self,
        tokens: Int[np.ndarray, "*rows n"],
        positions: Int[np.ndarray, "*rows n"],
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """One forward pass that continues `cache`, of one row or of several: hidden states `(*rows, n, width)`.

        Args:
            mask: `(rows, 1, n, cached + n)`, true where a token may be seen; `None` is causal.
        """
        shape = tokens.shape
        output = self.network.base_model(
            input_ids=torch.from_numpy(tokens.reshape(-1, shape[-1])).to(self._device),
            position_ids=torch.from_numpy(positions.reshape(-1, shape[-1])).to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.reshape(*shape, -1)

    @torch.inference_mode()
    def logprobs_at(
        self, states: torch.Tensor, rows: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Log-probability of `tokens[i]` after the hidden state `states[rows[i]]`, in nats."""
        result = np.empty(len(tokens))
        for begin in range(0, len(states), _HEAD_ROWS):
            inside = (rows >= begin) & (rows < begin + _HEAD_ROWS)
            local = torch.from_numpy(rows[inside] - begin).to(self._device)
            wanted = torch.from_numpy(tokens[inside]).to(self._device)
            logits = self._logits(states[begin : begin + _HEAD_ROWS], local, wanted)
            found = logits[local, wanted] - logits.logsumexp(dim=-1)[local]
            result[inside] = found.cpu().numpy()
        return result

    @torch.inference_mode()
    def next_logprobs(self, states: torch.Tensor) -> Float[np.ndarray, "states vocabulary"]:
        """Log-probability of every token after each hidden state, in nats."""
        none = torch.empty(0, dtype=torch.long, device=self._device)
        return torch.log_softmax(self._logits(states, none, none), dim=-1).cpu().double().numpy()

    def pick(self, hidden: torch.Tensor, rows: Int[np.ndarray, " n"]) -> torch.Tensor:
        """The hidden states of some rows."""
        return hidden[torch.from_numpy(rows).to(self._device)]

    def _logits(self, states: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits in float32; the likeliest tokens and `(rows, tokens)` are exact for the given states."""
        logits: torch.Tensor = self._head(states.to(self._dtype)).float()
        if self._dtype == torch.float32 or not self._plain_head:
            return logits
        weight, bias = self._head.weight, self._head.bias
        exact = states.float()
        likely = logits.topk(min(_REFINED_TOKENS, logits.shape[-1]), dim=-1).indices
        refined = torch.einsum("nd,nkd->nk", exact, weight[likely].float())
        wanted = (exact[rows] * weight[tokens].float()).sum(-1)
        if bias is not None:
            refined += bias[likely].float()
            wanted += bias[tokens].float()
        logits.scatter_(1, likely, refined)
        logits[rows, tokens] = wanted
        return logits

    @torch.inference_mode()
    def _logits_are_head_of_hidden(self) -> bool:
        """Whether the logits are the output layer on the last hidden state, without scaling or capping."""
        ids = torch.arange(4, device=self._device)[None]
        hidden = self.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return bool(torch.equal(self._head(hidden), self.network(input_ids=ids, use_cache=False).logits))

    def _keep_residual_in_float32(self) -> bool:
        """Whether the layers' sums are kept in float32 from now on.

        The embeddings are turned to float32, and each matrix product takes its input in the format of its weights, so
        that what a layer adds to the stream is all that is rounded. Where a model is built otherwise (its products
        are not `nn.Linear`, its positions not rotary), nothing is changed.
        """
        base = self.network.base_model
        rotary = [module for name, module in base.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
        if not rotary:
            return False

        def as_weights(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (inputs[0].to(module.weight.dtype), *inputs[1:])

        def float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.float()

        def as_model(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(part.to(self._dtype) for part in output)

        hooks = [base.get_input_embeddings().register_forward_hook(float32)]
        hooks += [module.register_forward_hook(as_model) for module in rotary]
        for module in base.modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(as_weights))
        try:
            states = self.run(np.arange(4), np.arange(4), None, None)
            if states.dtype == torch.float32:
                return True
        except RuntimeError:
            pass
        for hook in hooks:
            hook.remove()
        return False


def _choose_dtype(name: str, *, gpu: bool) -> torch.dtype:
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise ModelError(f"unknown dtype {name!r}; expected auto, {', '.join(_DTYPES)}")
    fast = torch.cuda.is_bf16_supported() if gpu else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def _require_full_attention(model: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"the transformers backend scores models whose every layer attends to the whole prompt; "
            f"{model!r} has layers of the kinds {', '.join(sorted(kinds))}"
        )
