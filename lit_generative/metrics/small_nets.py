"""Feature extractors for small grey pictures: classifiers of 75 and 130 KB that come with the package.

Scores of digits with an ImageNet network say little; the usual way out is a classifier of the domain, and a score that
is compared within the domain only (the advice of Heusel et al. 2017's authors). ``benchmarks/train_feature_nets.py``
made the weights; they are files that stay as they are, since another training run is another quantity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_generative.metrics.features import FeatureExtractor, Features, check_images, full_precision
from lit_generative.metrics.resizing import AntialiasResize

WEIGHTS = Path(__file__).with_name("weights")


class SmallNet(nn.Module):
    """Two convolutions and two linear layers; features are the means of the second convolution and the hidden layer.

    The means see texture (blur, noise, contrast), the hidden layer sees classes. Each block is scaled so that its
    variances on the training images sum to 1/2: a Frechet distance is then in units of the data's variance.

    Args:
        image_size: 8 or 28, height and width in pixels.
        num_classes: Number of logits.

    Raises:
        ValueError: If ``image_size`` is another.
    """

    num_means, num_hidden = 32, 64

    def __init__(self, image_size: int, num_classes: int = 10) -> None:
        super().__init__()
        if image_size not in (8, 28):
            raise ValueError(f"SmallNet: image_size must be 8 or 28, got {image_size}. Resize the images.")
        kernel, padding, self.early_pool, last = (3, 1, 1, 4) if image_size == 8 else (5, 2, 2, 5)
        self.conv1 = nn.Conv2d(1, 16, kernel, padding=padding)
        self.conv2 = nn.Conv2d(16, self.num_means, kernel, padding=1 if image_size == 8 else 0)
        self.hidden = nn.Linear(self.num_means * last * last, self.num_hidden)
        self.classify = nn.Linear(self.num_hidden, num_classes)
        self.scale = nn.Buffer(torch.ones(2))

    @override
    def forward(self, x: Tensor) -> Features:
        """Features ``(N, 96)`` and logits of grey images ``(N, 1, image_size, image_size)`` in ``[0, 255]``."""
        x = F.max_pool2d(self.conv1(x / 127.5 - 1).relu(), self.early_pool)
        x = self.conv2(x).relu()
        means = x.mean(dim=(2, 3))
        hidden = self.hidden(F.max_pool2d(x, 2).flatten(start_dim=1)).relu()
        embedding = torch.cat([means * self.scale[0], hidden * self.scale[1]], dim=1)
        return Features(embedding, self.classify(hidden))


class SmallFeatures(FeatureExtractor):
    """What :class:`DigitsFeatures` and :class:`FashionFeatures` share; colours become their mean.

    Args:
        name: Name of the extractor and of its file in ``weights/``.
        image_size: Height and width the images are brought to, bilinear and antialiased.
    """

    dim = SmallNet.num_means + SmallNet.num_hidden
    num_classes = 10

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        self.name, self.image_size, self.resize = name, image_size, AntialiasResize()
        with torch.device("meta"):  # draws no random numbers
            self.net = SmallNet(image_size)
        state = {key: value.float() for key, value in load_file(WEIGHTS / f"{name}.safetensors").items()}
        self.net.load_state_dict(state, assign=True)
        self.eval().requires_grad_(False)

    @override
    def forward(self, images: Tensor) -> Features:
        check_images(images, type(self).__name__)
        with full_precision(images.device):
            x = self.resize(images, self.image_size).mean(dim=1, keepdim=True)
            return self.net(x)

    @override
    def record(self) -> dict[str, Any]:
        return {**super().record(), "resize": self.resize.name, "image_size": self.image_size}


class DigitsFeatures(SmallFeatures):
    """For scikit-learn's handwritten digits, or what is stretched from or to 8 x 8 pixels: 96 features, 10 logits."""

    def __init__(self) -> None:
        super().__init__("digits", image_size=8)


class StackedDigitsFeatures(SmallFeatures):
    """For three digits as red, green and blue: the features of each, 288 in all, and a logit for each of 1000 triples.

    A triple's logit is the sum of its digits' log-probabilities. The net is right on 0.994 of single digits held out.
    """

    dim = 3 * SmallFeatures.dim
    num_classes = 1000

    def __init__(self) -> None:
        super().__init__("digits", image_size=8)
        self.name = "stacked_digits"

    @override
    def forward(self, images: Tensor) -> Features:
        check_images(images, "StackedDigitsFeatures")
        if images.shape[1] != 3:
            raise ValueError(f"StackedDigitsFeatures: need 3 channels, got {images.shape[1]}. Use DigitsFeatures.")
        with full_precision(images.device):
            x = self.resize(images, self.image_size).flatten(0, 1).unsqueeze(1)
            single = self.net(x)
            red, green, blue = single.logits.log_softmax(dim=1).unflatten(0, (len(images), 3)).unbind(dim=1)
            triples = red[:, :, None, None] + green[:, None, :, None] + blue[:, None, None, :]
            return Features(single.embedding.reshape(len(images), -1), triples.flatten(start_dim=1))


class FashionFeatures(SmallFeatures):
    """For Fashion-MNIST at 28 x 28 pixels, also padded to 32 x 32: 96 features, 10 logits."""

    def __init__(self) -> None:
        super().__init__("fashion", image_size=28)
