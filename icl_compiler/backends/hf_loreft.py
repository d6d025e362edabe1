"""LoReFT (arXiv 2404.03592) in a model of `transformers`: which tokens are edited, and how.

    h' = h + R^T (W h + b - R h) = h + R^T (A h + b),   A = W - R, the rows of R orthonormal

- A token is edited if it is one of the first of its prompt, or one of the last tokens of the template's fixed end,
  such as `\\nLabel:`. So the edit follows from a token and those before it: it is the same in a tree, after a cache,
  in a batch, and in another engine, and nobody has to say where a prompt ends. Tokens of an answer are not edited.
- The same end inside a text is edited too, each token as soon as it matches. The templates of `prompts/` make that
  impossible: their end begins with a newline or a special token, which they write nowhere in a text.
- Edits are computed in float32, whatever the model computes in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int

from icl_compiler.errors import ModelError


@dataclass(frozen=True)
class EditedTokens:
    """Which tokens are edited.

    Attributes:
        first: how many tokens from the beginning of a prompt.
        last: how many tokens from the end of `end`.
        start: where the instruction, in which nothing is an end, is over.
        end: the fixed end of all prompts.
        tied: whether first and last tokens share their edits.
    """

    first: int
    last: int
    start: int
    end: tuple[int, ...]
    tied: bool

    @property
    def groups(self) -> int:
        """How many edits a layer has."""
        return 1 if self.tied else 2

    def find(
        self, windows: Int[torch.Tensor, "... width"], positions: Int[torch.Tensor, "..."]
    ) -> Bool[torch.Tensor, "groups ..."]:
        """Which edit is made at which token.

        Args:
            windows: each token after the `len(end) - 1` before it; -1 where there is none.

        >>> place = EditedTokens(first=1, last=2, start=1, end=(7, 8, 9), tied=False)
        >>> tokens = torch.tensor([5, 6, 8, 7, 8, 9, 3])
        >>> place.find(windows_of(tokens[None], 3)[0], torch.arange(7)).int().tolist()
        [[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]]
        """
        begins = positions < self.first
        ends = torch.zeros_like(begins)
        for length in range(len(self.end) - self.last + 1, len(self.end) + 1):
            matches = (windows[..., -length:] == windows.new_tensor(self.end[:length])).all(-1)
            ends |= matches & (positions >= self.start + length - 1)
        ends &= ~begins
        return (begins | ends)[None] if self.tied else torch.stack([begins, ends])


class Edit(NamedTuple):
    """The edits of one layer, float32."""

    a: Float[torch.Tensor, "groups rank width"]
    b: Float[torch.Tensor, "groups rank"]
    r: Float[torch.Tensor, "groups rank width"]

    def apply(
        self, stream: Float[torch.Tensor, "... width"], found: Bool[torch.Tensor, "groups ..."]
    ) -> Float[torch.Tensor, "... width"]:
        """The stream with each group's edit at its tokens."""
        with torch.autocast(stream.device.type, enabled=False):
            edited = exact = stream.float()
            for a, b, r, here in zip(self.a, self.b, self.r, found, strict=True):
                edited = torch.where(here[..., None], exact + torch.nn.functional.linear(exact, a, b) @ r, edited)
        return edited.to(stream.dtype)


class Editor:
    """The edits of a network: `see` the tokens of a pass, and the layers give what is edited.

    Args:
        edits: for each edited layer what gives its edits on a device.
    """

    def __init__(self, place: EditedTokens, edits: Mapping[int, Callable[[torch.device], Edit]]) -> None:
        self._place = place
        self._edits = edits
        self._found: torch.Tensor | None = None
        self._cached: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()

    def see(
        self, tokens: Int[torch.Tensor, "batch all"], positions: Int[torch.Tensor, "batch n"], mask: torch.Tensor | None
    ) -> None:
        """Find what is edited in the next pass.

        Args:
            tokens: those in the cache, then the `n` of the pass.
            mask: `(batch, 1, n, all)`, true where a token may be seen, which are its ancestors; `None` is causal.
        """
        windows = windows_of(tokens, max(1, len(self._place.end)), mask)[:, -positions.shape[-1] :]
        self._found = self._place.find(windows, positions)

    def edit_layers(self, network: Any) -> None:
        """From now on, the layers of `network` give what is edited."""
        for layer, edit in self._edits.items():
            network.base_model.layers[layer].register_forward_hook(self._after(edit))

    def watch(self, network: Any) -> None:
        """From now on, `see` the tokens of every pass of `network`."""
        network.base_model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _after(self, edit: Callable[[torch.device], Edit]) -> Callable[..., torch.Tensor]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            assert self._found is not None
            return edit(output.device).apply(output, self._found)

        return hook

    def _before(self, module: Any, inputs: Any, given: Mapping[str, Any]) -> None:
        tokens, mask, cache = (given.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if tokens is None or (mask is not None and mask.dim() != 4):
            raise ModelError(
                "a model with LoReFT's edits takes input_ids, and an attention_mask of 4 dimensions or none"
            )
        size = tokens.shape[1]
        if cache is not None:  # one that was filled elsewhere says by `tokens` with what
            known = self._cached.get(cache, getattr(cache, "tokens", tokens[:, :0]).to(tokens.device))
            tokens = torch.cat([known[:, : cache.get_seq_length()], tokens], dim=1)
            if tokens.shape[1] != cache.get_seq_length() + size:
                raise ModelError("a model with LoReFT's edits takes no cache that was filled without them")
            self._cached[cache] = tokens
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1] - size, tokens.shape[1], device=tokens.device)
        self.see(tokens, positions.expand(len(tokens), size), mask)


def edit_network(network: Any, place: EditedTokens, edits: Mapping[int, Edit]) -> None:
    """Edit the residual stream of `network` after the layers of `edits`, for good.

    The edits are no parameters of the network: they stay in float32 when its weights are turned to another format.
    """
    editor = Editor(place, {layer: _Fixed(edit) for layer, edit in edits.items()})
    editor.edit_layers(network)
    editor.watch(network)


def windows_of(
    tokens: Int[torch.Tensor, "batch all"], width: int, mask: torch.Tensor | None = None
) -> Int[torch.Tensor, "batch n width"]:
    """Each token after the `width - 1` before it, -1 where there is none.

    Args:
        mask: `(batch, 1, n, all)`, true at the ancestors of each of the last `n` tokens, and itself; `None`: all
            tokens, each the child of the one before it.

    >>> windows_of(torch.tensor([[5, 6, 7]]), 2).tolist()
    [[[-1, 5], [5, 6], [6, 7]]]
    >>> tree = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    >>> windows_of(torch.tensor([[5, 6, 7]]), 2, tree[None, None]).tolist()
    [[[-1, 5], [5, 6], [5, 7]]]
    """
    padded = torch.nn.functional.pad(tokens, (width, 0), value=-1)
    if mask is None:
        return padded.unfold(1, width, 1)[:, 1:]
    columns = torch.arange(width, padded.shape[1], device=tokens.device, dtype=torch.int32)
    nearest = torch.nn.functional.pad(torch.where(mask[:, 0], columns, 0), (width, 0)).topk(width, dim=-1).values
    rows = torch.arange(len(padded), device=tokens.device)[:, None, None]
    return padded[rows, nearest.flip(-1).long()]


class _Fixed:
    def __init__(self, edit: Edit) -> None:
        self._edit = edit

    def __call__(self, device: torch.device) -> Edit:
        if self._edit.a.device != device:
            self._edit = Edit(*(part.to(device) for part in self._edit))
        return self._edit
