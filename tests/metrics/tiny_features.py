"""A feature extractor of a few random numbers: no weights to load, and a thousand images in a millisecond or two."""

import torch
from torch import nn
from torch.nn import functional as F

from lit_generative.metrics.features import FeatureExtractor, Features, check_images


class TinyFeatures(FeatureExtractor):
    """Images of any size, averaged to 4x4 and grey as three channels, then projected at random.

    Args:
        dim: Length of a feature.
        num_classes: Number of logits.
        seed: Seed of the projections; the global generator is left alone.
    """

    name = "tiny"

    def __init__(self, dim: int = 8, num_classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.dim, self.num_classes = dim, num_classes
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.BatchNorm1d(48, affine=False)  # in training mode it would change the features
        self.register_buffer("weight", torch.randn(48, dim, generator=generator) / 48**0.5)
        self.register_buffer("head", torch.randn(dim, num_classes, generator=generator))

    def forward(self, images: torch.Tensor) -> Features:
        check_images(images, "TinyFeatures")
        pixels = images.float().div(127.5).sub(1.0).expand(-1, 3, -1, -1)
        embedding = _rows(self.norm(F.adaptive_avg_pool2d(pixels, 4).flatten(1)), self.weight)
        return Features(embedding, _rows(embedding, self.head))


def _rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight``, a row at a time: on some processors the last bit of a product depends on how many rows it has."""
    return torch.bmm(x.unsqueeze(1), weight.expand(len(x), -1, -1)).squeeze(1)
