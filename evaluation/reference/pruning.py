"""What a task does not need of a model, and the model without it.

- A layer is judged by the loss on held-out examples when it is skipped, exactly. What is below it is computed once
  for all of them, which halves the work. Block influence, 1 - cos(what enters, what leaves), averaged over tokens
  (ShortGPT, arXiv 2403.03853), is measured in the same pass and reported beside it.
- A neuron j of an MLP is judged by mean_t |a_tj| * |W_down[:, j]|_2, the size of what it adds to the stream; a_t is
  what enters `down_proj` at token t. (Minitron, arXiv 2407.14679, aggregates the activations alone.)
- Attention heads that share keys and values are a group, and go together; every layer keeps as many. A group is judged
  by mean_t |W_o[:, g] a_tg|_2, again the size of what it adds to the stream.
- A pruned model is built anew from its configuration, so that it is an ordinary one; the model given is left alone.
- A token that several examples of a batch share (the instruction) counts once a batch.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

from evaluation.reference.objective import AnswerLoss, TrainingExample
from icl_compiler.errors import ModelError, TrainingError
from icl_compiler.prefix_tree import PrefixTree

_BATCH = 64
_MULTIPLE = 16
_LISTS_OF_LAYERS = ("layer_types", "no_rope_layers")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LayerLosses(NamedTuple):
    """What each layer is worth on some examples.

    Attributes:
        whole: mean negative log-likelihood of an answer with all layers, in nats.
        skipped: the same without each layer, one after the other.
        influence: 1 - cos(what enters, what leaves) of each layer, in [0, 2].
    """

    whole: float
    skipped: tuple[float, ...]
    influence: tuple[float, ...]


class Shape(NamedTuple):
    """What of a model pruning changes, and what that weighs in parameters.

    Attributes:
        width: neurons of each MLP.
        heads: of attention, in each layer.
        groups: of heads that share keys and values; 1 where the attention is built in another way, and stays.
        per_layer: parameters of a layer, its MLP included.
        per_neuron: parameters of a neuron in one layer.
        per_group: parameters of a group in one layer.
    """

    parameters: int
    layers: int
    width: int
    heads: int
    groups: int
    per_layer: int
    per_neuron: int
    per_group: int

    @classmethod
    def of(cls, model: Any) -> "Shape":
        """The shape of a causal language model built as Llama is.

        Raises:
            ModelError: if its layers are built otherwise.
        """
        layers = getattr(model.base_model, "layers", None)
        mlp = getattr(layers[0], "mlp", None) if layers else None
        if any(not isinstance(getattr(mlp, name, None), torch.nn.Linear) for name in _MLP):
            raise ModelError(
                f"a {type(model).__name__} is not built as Llama is, with layers[i].mlp of {', '.join(_MLP)}; "
                "such models cannot be pruned yet"
            )
        assert layers is not None and mlp is not None
        rows = sum(mlp.get_submodule(name).bias is not None for name in _MLP[:2])
        config, attention = model.config.get_text_config(), getattr(layers[0], "self_attn", None)
        usual = all(isinstance(getattr(attention, name, None), torch.nn.Linear) for name in _ATTENTION)
        groups = config.num_key_value_heads if usual else 1
        tied = 0  # what goes with the heads: all of the attention but norms and the bias of the way out
        if usual:
            assert attention is not None
            tied = sum(_count(attention.get_submodule(name)) for name in _ATTENTION[:3])
            tied += attention.o_proj.weight.numel()
        return cls(
            _count(model), len(layers), mlp.down_proj.in_features, config.num_attention_heads, groups,
            _count(layers[0]), 3 * mlp.down_proj.out_features + rows, tied // groups,
        )  # fmt: skip

    def pruned(self, share: float, *, depth: float, fewer_groups: int = 0) -> "Shape":
        """The shape with about `share` of the parameters, in (0, 1); `depth` of what goes is in whole layers.

        Args:
            fewer_groups: how many groups of heads go from each layer; the rest is neurons.

        Raises:
            TrainingError: if that leaves fewer than two layers, hardly an MLP, or no attention.

        >>> Shape(1000, 10, 24, 4, 2, 80, 2, 10).pruned(0.7, depth=0.5)
        Shape(parameters=712, layers=8, width=16, heads=4, groups=2, per_layer=64, per_neuron=2, per_group=10)
        """
        gone = (1 - share) * self.parameters
        layers = self.layers - round(depth * gone / self.per_layer)
        if layers < 2:
            raise TrainingError(
                f"keeping {share:g} of the {self.parameters:,} parameters leaves {max(0, layers)} of {self.layers} "
                "layers, expected at least 2; use a larger --share, or fewer --generations"
            )
        if fewer_groups >= self.groups:
            raise TrainingError(f"of {self.groups} groups of heads {fewer_groups} cannot go; expected that one is left")
        rest = gone - (self.layers - layers) * self.per_layer - layers * fewer_groups * self.per_group
        width = _MULTIPLE * round((self.width - rest / (layers * self.per_neuron)) / _MULTIPLE)
        if width < _MULTIPLE:
            raise TrainingError(
                f"keeping {share:g} of the {self.parameters:,} parameters leaves {layers} layers without an MLP, "
                f"expected at least {_MULTIPLE} of its {self.width} neurons; use a larger --share, or fewer "
                "--generations"
            )
        width = min(width, self.width)
        per_layer = self.per_layer - (self.width - width) * self.per_neuron - fewer_groups * self.per_group
        parameters = self.parameters - self.layers * self.per_layer + layers * per_layer
        groups = self.groups - fewer_groups
        heads = self.heads // self.groups * groups
        return Shape(parameters, layers, width, heads, groups, per_layer, self.per_neuron, self.per_group)


@torch.no_grad()
def layer_losses(model: Any, examples: Sequence[TrainingExample], *, bfloat16: bool) -> LayerLosses:
    """The loss of `model` on `examples` without each of its layers, and the influence of each.

    Args:
        bfloat16: whether products are computed in bfloat16.
    """
    objective = AnswerLoss(model, (), examples, bfloat16=bfloat16)
    layers = list(model.base_model.layers)
    losses = torch.zeros(len(layers) + 1, dtype=torch.float64)
    influence = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0
    for rows, size in _batches(examples):
        with _recorded(layers) as seen:
            losses[-1] += objective.losses(rows, held_out=True).sum().item()
        for i, (entered, left) in enumerate(seen):
            cosine = torch.nn.functional.cosine_similarity(entered[0, :size].float(), left[0, :size].float(), dim=-1)
            influence[i] += (1 - cosine).sum().item()
        tokens += size
        for i in range(len(layers)):
            with _skipped_to(layers[: i + 1], seen[i][0]):
                losses[i] += objective.losses(rows, held_out=True).sum().item()
    losses /= len(examples)
    return LayerLosses(losses[-1].item(), tuple(losses[:-1].tolist()), tuple((influence / tokens).tolist()))


@torch.no_grad()
def neuron_importance(
    model: Any, examples: Sequence[TrainingExample], *, bfloat16: bool
) -> Float[torch.Tensor, "layers width"]:
    """mean_t |a_tj| * |W_down[:, j]|_2 of each neuron j of each MLP, on `examples`."""
    downs = [layer.mlp.down_proj for layer in model.base_model.layers]
    sums = torch.zeros(len(downs), downs[0].in_features)

    def see(layer: int, entering: torch.Tensor) -> None:
        sums[layer] += entering.abs().sum(0).cpu()

    tokens = _watch(model, downs, examples, see, bfloat16=bfloat16)
    return sums / tokens * torch.stack([down.weight.float().norm(dim=0).cpu() for down in downs])


@torch.no_grad()
def group_importance(
    model: Any, examples: Sequence[TrainingExample], *, bfloat16: bool
) -> Float[torch.Tensor, "layers groups"]:
    """mean_t |W_o[:, g] a_tg|_2 of each group g of heads that share keys and values, on `examples`."""
    outs = [layer.self_attn.o_proj for layer in model.base_model.layers]
    groups = model.config.num_key_value_heads
    sums = torch.zeros(len(outs), groups)

    def see(layer: int, entering: torch.Tensor) -> None:
        parts = zip(entering.chunk(groups, dim=1), outs[layer].weight.float().chunk(groups, dim=1), strict=True)
        sums[layer] += torch.stack([(part @ weight.T).norm(dim=1).sum() for part, weight in parts]).cpu()

    return sums / _watch(model, outs, examples, see, bfloat16=bfloat16)


def _watch(
    model: Any,
    modules: Sequence[Any],
    examples: Sequence[TrainingExample],
    see: Callable[[int, torch.Tensor], object],
    *,
    bfloat16: bool,
) -> int:
    """Show what enters each of `modules` at the tokens of `examples`, in float32; how many tokens there were."""
    objective = AnswerLoss(model, (), examples, bfloat16=bfloat16)
    tokens, size = 0, 0

    def shown_as(number: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            see(number, inputs[0][0, :size].float())

        return hook

    hooks = [module.register_forward_pre_hook(shown_as(number)) for number, module in enumerate(modules)]
    try:
        for rows, size in _batches(examples):  # the hooks read `size`
            objective.losses(rows, held_out=True)
            tokens += size
    finally:
        for hook in hooks:
            hook.remove()
    return tokens


def drop_layers(model: Any, layers: Sequence[int]) -> Any:
    """An ordinary model like `model`, without `layers` (counted from 0).

    Raises:
        TrainingError: if there is no such layer, or fewer than two would be left.
    """
    count = len(model.base_model.layers)
    kept = [layer for layer in range(count) if layer not in layers]
    if not set(layers) <= set(range(count)) or len(kept) < 2:
        raise TrainingError(
            f"of {count} layers, numbered from 0, {list(layers)} cannot be dropped; expected such that two are left"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in _LISTS_OF_LAYERS:
        if isinstance(values := getattr(config, name, None), list):
            setattr(config, name, [values[layer] for layer in kept])
    place = {str(old): str(new) for new, old in enumerate(kept)}
    begin = f"{model.base_model_prefix}.layers."
    weights = {}
    for name, weight in model.state_dict().items():
        number, _, rest = name.removeprefix(begin).partition(".")
        if not name.startswith(begin):
            weights[name] = weight
        elif number in place:
            weights[f"{begin}{place[number]}.{rest}"] = weight
    return _built(model, config, weights)


def narrow(model: Any, importance: Float[torch.Tensor, "layers width"], width: int) -> Any:
    """An ordinary model like `model` that keeps the `width` most important neurons of each MLP, in their order."""
    config = copy.deepcopy(model.config)
    config.intermediate_size = width
    weights = model.state_dict()
    for layer, scores in enumerate(importance):
        kept = scores.topk(width).indices.sort().values
        begin = f"{model.base_model_prefix}.layers.{layer}.mlp."
        for name in [name for name in weights if name.startswith(begin)]:
            weight = weights[name]
            if "down_proj" not in name:
                weights[name] = weight[kept.to(weight.device)]
            elif name.endswith("weight"):
                weights[name] = weight[:, kept.to(weight.device)]
    return _built(model, config, weights)


def drop_groups(model: Any, importance: Float[torch.Tensor, "layers groups"], groups: int) -> Any:
    """An ordinary model like `model` that keeps the `groups` most important groups of heads of each layer, in order."""
    config = copy.deepcopy(model.config)
    attention = model.base_model.layers[0].self_attn
    config.head_dim = attention.head_dim  # else it would be the width by the number of heads
    config.num_key_value_heads, config.num_attention_heads = groups, groups * attention.num_key_value_groups
    weights = model.state_dict()
    for layer, scores in enumerate(importance):
        kept = scores.topk(groups).indices.sort().values
        begin = f"{model.base_model_prefix}.layers.{layer}.self_attn."
        for name in [name for name in weights if name.startswith(begin)]:
            weight, place = weights[name], kept.to(weights[name].device)
            kind = name.removeprefix(begin).partition(".")[0]
            if kind in _ATTENTION[:3]:
                weights[name] = weight.unflatten(0, (len(scores), -1))[place].flatten(0, 1)
            elif kind == "o_proj" and name.endswith("weight"):
                weights[name] = weight.unflatten(1, (len(scores), -1))[:, place].flatten(1, 2)
    return _built(model, config, weights)


def _built(model: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    built = type(model)(config).to(model.device, model.dtype)
    built.load_state_dict(weights)
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.train(model.training)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _batches(examples: Sequence[TrainingExample]) -> Iterator[tuple[range, int]]:
    """Rows, and how many nodes their tree has; the nodes behind these are padding."""
    for first in range(0, len(examples), _BATCH):
        rows = range(first, min(first + _BATCH, len(examples)))
        sequences = [[*examples[row].prompt, *examples[row].answer[:-1]] for row in rows]
        yield rows, len(PrefixTree.build(sequences).tokens)


@contextmanager
def _recorded(layers: Sequence[Any]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What enters and what leaves each layer."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((inputs[0], output))

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _skipped_to(layers: Sequence[Any], stream: torch.Tensor) -> Iterator[None]:
    """The first layers give `stream`, without computing anything."""

    def forward(*inputs: Any, **more: Any) -> torch.Tensor:
        return stream

    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
