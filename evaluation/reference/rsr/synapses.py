"""Connections of a model in units, and linear layers of which a few units move.

- A *unit* is `size` neighbouring numbers along the model's width: of a matrix that reads the residual stream (q, k, v,
  gate, up) a piece of a row, of one that writes to it (o, down) a piece of a column. So every unit of a model has the
  same size, and the state of any set of units is one array. `size` may be the width (whole rows and columns), a part
  of it, or 1 (single entries).
- Units are numbered through all matrices; which of them move is a sorted array of numbers.
- The gradient is computed for the units that move, those of each piece of the rows in one product, or of a whole matrix
  where that costs less, and nothing is kept of it otherwise. A pass through the whole gradient, matrix by matrix, is a
  *probe* (`importance.py`).
- The matrices themselves hold base + change, rounded to their format; the change is kept in float32 beside them, so
  that steps too small for the format add up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import nn

from icl_compiler.errors import TrainingError

_ROWS_STEP = 16  # a kernel is made for every new shape of a product

Probe = Callable[[int, torch.Tensor], object]
"""Called in the backward pass with the number of a matrix and its gradient, oriented, in float32."""


@dataclass(frozen=True)
class Matrix:
    """One linear layer, oriented: its rows run along the model's width.

    Attributes:
        name: of the layer in the model, such as `model.layers.20.mlp.up_proj`.
        layer: number of the transformer layer that it stands in.
        kind: its name within that layer, such as `mlp.up_proj`.
        rows: units of width 1 row each; the matrix has `rows` times the model's width numbers.
        transposed: whether a row is a column of the weight as it is stored.
        first: number of its first unit.
    """

    name: str
    layer: int
    kind: str
    rows: int
    transposed: bool
    first: int


class Synapses:
    """The linear layers of a model from `frontier` on, of which a set of units moves.

    The model's layers are replaced in place. Nothing of the model has a gradient of its own afterwards.

    Args:
        model: a causal language model of `transformers`.
        frontier: the lowest layer in which units may move.
        size: numbers in a unit; divides the model's width, which it is by default.

    Raises:
        TrainingError: if the model has no such layer, has no linear layers that fit its width, or the size does not.

    Attributes:
        matrices: the linear layers, in the order of their units.
        active: the units that move, ascending.
        change: what was added to each active unit, float32; `show` writes it into the model.
        gradient: of the loss by each active unit, summed over backward passes until it is set to zero.
    """

    def __init__(self, model: Any, *, frontier: int = 0, size: int | None = None) -> None:
        model.requires_grad_(False)
        layers = model.base_model.layers
        if not 0 <= frontier < len(layers):
            raise TrainingError(f"the frontier should be a layer from 0 to {len(layers) - 1}, is now {frontier}")
        width = model.get_input_embeddings().embedding_dim
        self.size = size or width
        if width % self.size:
            raise TrainingError(f"a unit should be a divisor of the model's width {width} long, is now {self.size}")
        self._blocks = width // self.size
        self.matrices: list[Matrix] = []
        self._linears: list[_SynapticLinear] = []
        self._places: list[tuple[nn.Module, str, nn.Linear]] = []
        for number in range(frontier, len(layers)):
            for kind, linear in list(layers[number].named_modules()):
                if isinstance(linear, nn.Linear):
                    self._take(layers[number], number, kind, linear, width)
        if not self._linears:
            raise TrainingError("this model's layers hold no linear layers that read or write its residual stream")
        device = self._linears[0].weight.device
        self.count: int = self.matrices[-1].first + self.matrices[-1].rows * self._blocks
        self._starts = torch.tensor([matrix.first for matrix in self.matrices] + [self.count], device=device)
        none = torch.empty(0, self.size, device=device)
        self.active: Int[torch.Tensor, " active"] = torch.empty(0, dtype=torch.long, device=device)
        self.change: Float[torch.Tensor, "active size"] = none
        self.gradient: Float[torch.Tensor, "active size"] = none
        self._base = none
        self._touched = _Touched(self.active, none.clone(), none.clone())

    def __len__(self) -> int:
        """How many units there are."""
        return self.count

    def matrix_of(self, units: Int[torch.Tensor, " units"]) -> Int[torch.Tensor, " units"]:
        """The number of the matrix in which each unit stands."""
        return torch.searchsorted(self._starts, units, right=True) - 1

    def select(self, units: Int[torch.Tensor, " active"]) -> None:
        """Let `units` (ascending) move from now on, each going on from what was added to it before.

        Units that move no more keep what was added to them.
        """
        self._store()
        known = self._touched
        new = units[~torch.isin(units, known.units)]
        self._choose(new, torch.zeros(len(new), self.size, device=units.device))
        base = torch.cat([linear.read().float() for linear in self._linears])
        order = torch.argsort(torch.cat([known.units, new]))
        self._touched = known = _Touched(
            torch.cat([known.units, new])[order],
            torch.cat([known.base, base])[order],
            torch.cat([known.change, torch.zeros_like(base)])[order],
        )
        slots = torch.searchsorted(known.units, units)
        self.active, self.change, self._base = units, known.change[slots], known.base[slots]
        self.gradient = torch.zeros_like(self.change)
        self._choose(units, self.gradient)

    def changes(self) -> tuple[Int[torch.Tensor, " touched"], Float[torch.Tensor, "touched size"]]:
        """All units to which something was added, ascending, and what."""
        self._store()
        moved = self._touched.change.any(dim=1)
        return self._touched.units[moved], self._touched.change[moved]

    @property
    def touched(self) -> Int[torch.Tensor, " touched"]:
        """All units that ever could move."""
        return self._touched.units

    def add(self, units: Int[torch.Tensor, " units"], change: Float[torch.Tensor, "units size"]) -> None:
        """Add `change` to `units` (ascending), and let the model be an ordinary one again."""
        self.select(units)
        self.change += change
        self.show()
        for layer, kind, linear in self._places:
            parent, _, name = kind.rpartition(".")
            setattr(layer.get_submodule(parent), name, linear)

    def forget(self, units: Int[torch.Tensor, " units"]) -> None:
        """Give `units`, which are active, their base back."""
        self.change[torch.isin(self.active, units)] = 0
        self.show()

    def show(self) -> None:
        """Write base + change of the active units into the model."""
        whole = self._base + self.change
        for linear in self._linears:
            linear.write(whole[linear.part])

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Show `probe` the whole gradient of every matrix, in each backward pass; none is summed meanwhile."""
        for number, linear in enumerate(self._linears):
            linear.probe = lambda gradient, number=number: probe(number, gradient)
        try:
            yield
        finally:
            for linear in self._linears:
                linear.probe = None

    def weight(self, number: int) -> Float[torch.Tensor, "rows width"]:
        """A matrix as it is now, oriented."""
        return self._linears[number].oriented

    def per_unit(self, oriented: Float[torch.Tensor, "rows width"]) -> Float[torch.Tensor, "units size"]:
        """What stands in an oriented matrix, a row per unit."""
        return oriented.reshape(-1, self.size)

    def _store(self) -> None:
        self._touched.change[torch.searchsorted(self._touched.units, self.active)] = self.change

    def _choose(self, units: torch.Tensor, gradient: torch.Tensor) -> None:
        bounds = torch.searchsorted(units, self._starts).tolist()
        for number, linear in enumerate(self._linears):
            linear.part = slice(bounds[number], bounds[number + 1])
            local = units[linear.part] - self.matrices[number].first
            linear.choose(local // self._blocks, local % self._blocks, gradient[linear.part])

    def _take(self, layer: nn.Module, number: int, kind: str, linear: nn.Linear, width: int) -> None:
        reads, writes = linear.in_features == width, linear.out_features == width
        if not reads and not writes:
            raise TrainingError(
                f"layer {number}: {kind} is {linear.out_features} x {linear.in_features}; expected one side to be the "
                f"model's width {width}"
            )
        # Square ones on the way out of a block (attention's o) are columns: they write.
        transposed = not reads or (writes and kind.rpartition(".")[2] in ("o_proj", "out_proj", "dense", "c_proj"))
        rows = linear.in_features if transposed else linear.out_features
        first = self.matrices[-1].first + self.matrices[-1].rows * self._blocks if self.matrices else 0
        replaced = _SynapticLinear(linear, transposed, self.size)
        parent, _, name = kind.rpartition(".")
        setattr(layer.get_submodule(parent), name, replaced)
        self.matrices.append(Matrix(f"layers.{number}.{kind}", number, kind, rows, transposed, first))
        self._linears.append(replaced)
        self._places.append((layer, kind, linear))


class _Touched(NamedTuple):
    """All units that ever moved: their base, and what was added to it."""

    units: torch.Tensor
    base: torch.Tensor
    change: torch.Tensor


class _Grouped(NamedTuple):
    """The units of a matrix by the piece of the row that they are: those of a piece are one product.

    Attributes:
        rows: of the units of each piece, as many for each; what is too much is row 0.
        places: of each unit among them, counted through all pieces.
    """

    rows: Int[torch.Tensor, "pieces most"]
    places: Int[torch.Tensor, " units"]

    @classmethod
    def of(cls, rows: torch.Tensor, pieces: torch.Tensor, count: int) -> "_Grouped":
        """Units by row and piece, of which there are `count` in a row."""
        sizes = torch.bincount(pieces, minlength=count)
        most = -(-int(sizes.max()) // _ROWS_STEP) * _ROWS_STEP
        order = torch.argsort(pieces, stable=True)
        place = torch.empty_like(rows)
        place[order] = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[pieces[order]]
        table = torch.zeros(count, most, dtype=torch.long, device=rows.device)
        table[pieces, place] = rows
        return cls(table, pieces * most + place)


class _SynapticLinear(nn.Module):
    """A linear layer whose gradient is computed for some of its units only."""

    def __init__(self, linear: nn.Linear, transposed: bool, size: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.transposed = transposed
        self.part = slice(0, 0)
        self.probe: Callable[[torch.Tensor], object] | None = None
        self._size = size
        # Something must ask for a gradient, or autograd does not come by where the input has none.
        self._call = torch.zeros((), requires_grad=True)
        none = torch.empty(0, dtype=torch.long, device=linear.weight.device)
        self.choose(none, none, torch.empty(0, size, device=linear.weight.device))

    @property
    def oriented(self) -> torch.Tensor:
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    def choose(self, rows: torch.Tensor, blocks: torch.Tensor, gradient: torch.Tensor) -> None:
        """Units by row and block; what their gradients are added to."""
        self._rows, self._blocks, self._gradient = rows, blocks, gradient
        self._grouped = _Grouped.of(rows, blocks, self.oriented.shape[1] // self._size)

    def read(self) -> torch.Tensor:
        return self._pieces(self.oriented)[self._rows, self._blocks]

    def write(self, values: torch.Tensor) -> None:
        if len(self._rows):
            self._pieces(self.oriented)[self._rows, self._blocks] = values.to(self.weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not len(self._rows) and self.probe is None:
            return nn.functional.linear(inputs.to(self.weight.dtype), self.weight, self.bias)
        result: torch.Tensor = _Product.apply(inputs.to(self.weight.dtype), self._call, self)  # type: ignore[no-untyped-call]
        return result

    def collect(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add up what a backward pass found: the layer's inputs, and the gradient by its outputs."""
        inputs, outputs = inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
        left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
        if self.probe is not None:
            self.probe((left.T @ right).float())
            return
        groups = self._grouped
        if groups.rows.numel() <= len(self.oriented):
            chosen = left.T.contiguous()[groups.rows]
            found = torch.bmm(chosen, self._pieces(right).transpose(0, 1))
            self._gradient += found.flatten(0, 1)[groups.places]
        else:
            self._gradient += self._pieces(left.T @ right)[self._rows, self._blocks]

    def _pieces(self, oriented: torch.Tensor) -> torch.Tensor:
        """The same matrix, each row in units: a whole unit is then found by one index, not each of its numbers."""
        return oriented.view(len(oriented), -1, self._size)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, call: torch.Tensor, linear: _SynapticLinear) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.linear = linear
        return nn.functional.linear(inputs, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.linear.collect(inputs, outputs)
        return (outputs @ ctx.linear.weight if ctx.needs_input_grad[0] else None), None, None
