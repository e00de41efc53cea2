"""A discriminator whose layers are scaled to a spectral norm of one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import full_precision


class SpectralNorm(Recorded, nn.Module):
    """Divides the weight of each convolution, linear layer and embedding by its largest singular value.

    That value is followed by power iteration, once a forward pass in training mode: an update on data, samples and a
    penalty's points makes three. Evaluation mode leaves the iteration where it is. The vectors are buffers, so a
    checkpoint holds them; whole modules can be copied, not pickled.

    Source: Miyato et al. 2018, alg. 1 (arXiv:1802.05957); the embedding: Miyato & Koyama 2018 (arXiv:1802.05637). As
    there, a convolution's weight is taken as a matrix with a row for each output channel.

    Args:
        discriminator: Any network ``discriminator(x, y)``; its layers are changed in place. Batch norm in it would undo
            the bound.
        num_iterations: Power iterations in each forward pass.
        embeddings: Whether embeddings are scaled, too.

    Raises:
        ValueError: If ``num_iterations`` is below 1, there is nothing to scale, or a weight is zero or scaled already.
    """

    def __init__(self, discriminator: nn.Module, num_iterations: int = 1, embeddings: bool = True) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(
                f"SpectralNorm: num_iterations must be at least 1, got {num_iterations}. The paper uses 1."
            )
        kinds = (_ConvNd, nn.Linear, nn.Embedding) if embeddings else (_ConvNd, nn.Linear)
        layers = {name: layer for name, layer in discriminator.named_modules() if isinstance(layer, kinds)}
        if not layers:
            raise ValueError(
                f"SpectralNorm: {type(discriminator).__name__} has no convolution, linear layer or embedding to "
                "normalize. Wrap the network that holds them."
            )
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"SpectralNorm: the weight of {name!r} is parametrized already. Wrap it only once.")
            if not layer.weight.any():
                raise ValueError(
                    f"SpectralNorm: the weight of {name!r} is zero, and no factor makes it 1. Initialize it."
                )
            spectral_norm(layer, n_power_iterations=num_iterations)
        self.num_classes: int | None = getattr(discriminator, "num_classes", None)
        self.num_packed: int = getattr(discriminator, "num_packed", 1)
        self.sample_shape: tuple[int, ...] | None = getattr(discriminator, "sample_shape", None)
        self.discriminator = discriminator

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """As the wrapped discriminator: samples and their labels to logits."""
        # Autocast would take the norm in half precision, and on a GPU fail at it; the layers still run in half.
        with parametrize.cached():
            with full_precision(x.device):
                for layer in self.discriminator.modules():
                    if parametrize.is_parametrized(layer, "weight"):
                        _ = layer.weight
            logits: Tensor = self.discriminator(x, y)
        return logits
