"""An autoregressive distribution over grids of codes: what a VQ-VAE samples from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_generative.networks.checks import check_label
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import Generators, evaluating, uniform


class PixelCNNPrior(Recorded, nn.Module):
    """Gated PixelCNN: each code given those before it in raster order, by masked convolutions.

    Two stacks of layers see everything before a position, without a blind spot: one the rows above, the other the row
    up to it. With L layers they reach ``L + 1`` rows up, and in its own row as many columns to the left, so
    ``num_layers`` should be at least ``grid_size - 2``.

    Source: van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders" (arXiv:1606.05328), sec. 2.1
    to 2.3, with 3x3 kernels. Not in the paper: codes are embedded, the head has one hidden layer, and dropout (Salimans
    et al. 2017, arXiv:1701.05517, sec. 2.5), without which a small data set's codes are soon learned by heart.

    Args:
        num_codes: How many codes there are, K.
        grid_size: Height and width of the grid.
        width: Channels of each stack.
        num_layers: Gated layers, L.
        num_classes: How many classes a label may name; None for an unconditional prior.
        dropout: Probability that a layer's output in the stack that is read is set to zero, in training.

    Raises:
        ValueError: If a number is below 1, or ``dropout`` is not in ``[0, 1)``.
    """

    def __init__(
        self,
        num_codes: int,
        grid_size: int,
        width: int = 64,
        num_layers: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"num_codes": num_codes, "grid_size": grid_size, "width": width, "num_layers": num_layers}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"PixelCNNPrior: {name} must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"PixelCNNPrior: dropout must be at least 0 and below 1, got {dropout}.")
        self.num_codes, self.grid_size, self.num_classes = num_codes, grid_size, num_classes
        self.embedding = nn.Embedding(num_codes, width)
        self.layers = nn.ModuleList(_GatedLayer(width, num_classes, dropout, first=i == 0) for i in range(num_layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, num_codes, 1))

    def forward(self, codes: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-odds of each code, given the codes before it.

        Args:
            codes: ``(N, h, w)`` int64 in ``[0, K)``, with ``w = grid_size``; the first rows of the grid are enough.
            y: Class labels, ``(N,)`` int64; None if and only if the prior is unconditional.

        Returns:
            Logits ``(N, K, h, w)``: those at a position depend on no code there or after it.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or the grid has another size.
        """
        check_label(self, self.num_classes, y)
        if codes.ndim != 3 or codes.shape[1] > self.grid_size or codes.shape[2] != self.grid_size:
            raise ValueError(
                f"PixelCNNPrior: needs codes of shape (N, {self.grid_size}, {self.grid_size}), got "
                f"{tuple(codes.shape)}. Set grid_size to that of the encoder."
            )
        vertical = horizontal = self.embedding(codes).movedim(-1, 1)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, y)
        logits: Tensor = self.head(horizontal)
        return logits

    @torch.no_grad()
    def sample(self, num: int, y: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw grids of codes, one position after the other: ``grid_size**2`` forward passes.

        Each code is where a uniform number falls in the cumulative distribution, so a grid depends on its numbers and
        label alone.

        Args:
            num: How many.
            y: Class labels, ``(num,)`` int64; None if and only if the prior is unconditional.
            generator: Source of the uniform numbers, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, grid_size, grid_size)`` int64.
        """
        size, device = self.grid_size, self.embedding.weight.device
        numbers = uniform((num, size, size), generator, device)
        codes = torch.zeros(num, size, size, dtype=torch.int64, device=device)
        with evaluating(self):
            for row in range(size):
                for column in range(size):
                    logits = self(codes[:, : row + 1], y)[:, :, row, column].float()
                    # Without the last step of the distribution: rounding may leave it below a number near 1.
                    steps = logits.softmax(dim=1).cumsum(dim=1)[:, :-1]
                    codes[:, row, column] = (numbers[:, row, column, None] >= steps).sum(dim=1)
        return codes


class _GatedLayer(nn.Module):
    """One layer of both stacks, fig. 2 of the paper; ``first`` hides a position from itself."""

    def __init__(self, width: int, num_classes: int | None, dropout: float, first: bool) -> None:
        super().__init__()
        self.first = first
        # What the mask leaves of 3x3: two rows of three, and in the row itself two columns.
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 2))
        self.down = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, width, 1))
        self.label = None if num_classes is None else nn.Embedding(num_classes, 4 * width)

    def forward(self, vertical: Tensor, horizontal: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        # Padding on one side shifts what a position sees; in the first layer by one more, past itself.
        shift = int(self.first)
        v = self.vertical(F.pad(vertical, (1, 1, 1 + shift, -shift)))
        h = self.horizontal(F.pad(horizontal, (1 + shift, -shift, 0, 0)))
        if self.label is not None:
            bias_v, bias_h = self.label(y)[:, :, None, None].chunk(2, dim=1)
            v, h = v + bias_v, h + bias_h
        out = self.out(_gate(h + self.down(v)))
        return _gate(v), out if self.first else horizontal + out


def _gate(x: Tensor) -> Tensor:
    """``tanh(a) * sigmoid(b)`` of the two halves of the channels, eq. 2."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
