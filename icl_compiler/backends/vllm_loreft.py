"""LoReFT's edits in vLLM: a checkpoint that holds them, and a plug-in of vLLM that reads it (`vllm.general_plugins`).

- vLLM runs any part of a prompt at a time, the beginning from its cache. So the engine's tokens are kept beside its
  keys and values, in the same slots: the tokens before each one, which say whether it is edited, are found there.
- The checkpoint is of a model type of its own. What does not know it refuses it, and no one takes the base model for
  the edited one; and its cached prefixes are those of its own engine.
- Without pipeline parallelism: each rank would need all tokens.
- vLLM and transformers are imported where a class is asked for by its name, which is how vLLM asks for it.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl_compiler.errors import ModelError

if TYPE_CHECKING:
    from icl_compiler.backends.hf_loreft import Edit, EditedTokens

_MODEL = "LoReFTLlamaForCausalLM"
_CONFIG = "LoReFTLlamaConfig"
_MODEL_TYPE = "loreft_llama"


def register() -> None:
    """Tell vLLM of the model; its processes call this when they start."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register(_MODEL_TYPE, _config_class(), exist_ok=True)
    ModelRegistry.register_model(_MODEL, f"{__name__}:{_MODEL}")


def save_checkpoint(network: Any, place: "EditedTokens", edits: "Mapping[int, Edit]", folder: Path) -> None:
    """Write the weights of `network`, a Llama of transformers, with edits into `folder`, for vLLM with this plug-in.

    Raises:
        ModelError: if the network is no Llama.
    """
    if network.config.model_type != "llama":
        raise ModelError(
            f"LoReFT's edits are written for vLLM with Llamas only, and this is a {network.config.model_type!r}; "
            "score the reference with the transformers backend"
        )
    named = {
        f"model.layers.{layer}.loreft.{name}": part.cpu().contiguous()
        for layer, edit in edits.items()
        for name, part in edit._asdict().items()
    }
    network.save_pretrained(folder, state_dict={**network.state_dict(), **named})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    ranks = {str(layer): edit.a.shape[1] for layer, edit in edits.items()}
    config |= {"architectures": [_MODEL], "model_type": _MODEL_TYPE, "loreft": {"place": vars(place), "ranks": ranks}}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def __getattr__(name: str) -> Any:
    if name in (_MODEL, _CONFIG):
        return _model_class() if name == _MODEL else _config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _config_class() -> Any:
    from transformers import LlamaConfig

    return type(_CONFIG, (LlamaConfig,), {"model_type": _MODEL_TYPE, "__module__": __name__})


@cache
def _model_class() -> Any:
    import torch
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
    from vllm.model_executor.models.utils import extract_layer_index

    from icl_compiler.backends.hf_loreft import Edit, EditedTokens

    class EditedLayer(LlamaDecoderLayer):
        loreft: Any
        found: torch.Tensor

        def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
            super().__init__(vllm_config, prefix, config)
            facts = (config or vllm_config.model_config.hf_config).loreft
            self.loreft = None
            rank = facts["ranks"].get(str(extract_layer_index(prefix)))
            if rank is not None:
                groups = EditedTokens(**facts["place"]).groups
                sizes = {"a": (groups, rank, self.hidden_size), "b": (groups, rank)}
                sizes["r"] = sizes["a"]
                self.loreft = torch.nn.ParameterDict(
                    {
                        name: torch.nn.Parameter(torch.zeros(size, dtype=torch.float32), requires_grad=False)
                        for name, size in sizes.items()
                    }
                )

        def forward(self, positions: Any, hidden_states: Any, residual: Any) -> tuple[Any, Any]:
            added, residual = super().forward(positions, hidden_states, residual)
            if self.loreft is None:
                return added, residual
            edit = Edit(self.loreft["a"], self.loreft["b"], self.loreft["r"])
            # A slice would bound the number of tokens by the buffer's size, which vLLM's compiler forbids.
            found = self.found[:, torch.arange(len(added), device=added.device)]
            stream = edit.apply(added + residual, found)
            return stream, torch.zeros_like(stream)

    class EditedLlama(LlamaForCausalLM):
        found: torch.Tensor

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=EditedLayer)
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise ValueError("LoReFT's edits need all layers on one rank; leave --pipeline-parallel-size at 1")
            self._block_size = vllm_config.cache_config.block_size
            facts = vllm_config.model_config.hf_config.loreft["place"]
            self._place = EditedTokens(**{**facts, "end": tuple(facts["end"])})
            most = vllm_config.scheduler_config.max_num_batched_tokens
            self.register_buffer("found", torch.zeros(self._place.groups, most, dtype=torch.bool), persistent=False)
            for layer in self.model.layers:
                layer.register_buffer("found", self.found, persistent=False)
            self._tokens = torch.empty(0, dtype=torch.long)

        def forward(
            self, input_ids: Any, positions: Any, intermediate_tensors: Any = None, inputs_embeds: Any = None
        ) -> Any:
            self.found.zero_()
            metadata: Any = get_forward_context().attn_metadata
            if metadata:  # none while vLLM measures its memory
                windows = self._windows(next(iter(metadata.values())), input_ids, positions)
                self.found[:, : len(windows)] = self._place.find(windows, positions[: len(windows)])
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

        def _windows(self, metadata: Any, tokens: Any, positions: Any) -> Any:
            """Each token after those before it, from the slots of its request."""
            size, width = metadata.num_actual_tokens, max(1, len(self._place.end))
            slots = metadata.slot_mapping[:size].long()
            if (missing := int(slots.max()) + 1 - len(self._tokens)) > 0:
                self._tokens = torch.cat([self._tokens.to(tokens.device), tokens.new_zeros(missing).long()])
            self._tokens[slots] = tokens[:size].long()
            requests = torch.searchsorted(
                metadata.query_start_loc[1:].contiguous(),
                torch.arange(size, device=tokens.device, dtype=metadata.query_start_loc.dtype),
                right=True,
            )
            before = positions[:size, None] + torch.arange(1 - width, 1, device=tokens.device)
            within = before.clamp(min=0)
            blocks = metadata.block_table[requests[:, None], within // self._block_size].long()
            found = self._tokens[blocks * self._block_size + within % self._block_size]
            return torch.where(before >= 0, found, -1)

    EditedLlama.__name__ = EditedLlama.__qualname__ = _MODEL
    return EditedLlama
