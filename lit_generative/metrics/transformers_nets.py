"""Feature extractors from the Hugging Face hub or a local folder: DINOv2 and CLIP.

Their Frechet distances follow human judgement of images better than FID does: Stein et al. 2023 (arXiv:2306.04675) for
DINOv2, Jayasumana et al. 2024 (arXiv:2401.09603) for CLIP.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.metrics.features import FeatureExtractor, Features, check_images, full_precision
from lit_generative.metrics.resizing import BicubicResize, CleanResize, Resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class HubFeatures(FeatureExtractor):
    """What :class:`DINOv2` and :class:`CLIP` share: resize, standardise, take the embedding; grey is repeated.

    Args:
        net: Network of transformers, in float32.
        image_size: Height and width the images are brought to.
        resize: How.
        mean: Of the three channels, images in ``[0, 1]``.
        std: Likewise.
    """

    def __init__(
        self, net: nn.Module, image_size: int, resize: Resize, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.net, self.image_size, self.resize = net, image_size, resize
        self.mean = nn.Buffer(torch.tensor(mean).reshape(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(std).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Embedding ``(N, D)`` of standardised images ``(N, 3, image_size, image_size)``."""

    @override
    def forward(self, images: Tensor) -> Features:
        check_images(images, type(self).__name__)
        with full_precision(images.device):
            x = self.resize(images, self.image_size).expand(-1, 3, -1, -1)
            return Features(self.embed((x / 255 - self.mean) / self.std).float(), None)

    @override
    def record(self) -> dict[str, Any]:
        return {
            **super().record(),
            "resize": self.resize.name,
            "image_size": self.image_size,
            "grey_images": "repeated to 3 channels",
        }


class DINOv2(HubFeatures):
    """Class token of DINOv2 (Oquab et al. 2023, arXiv:2304.07193) at 224 x 224 pixels.

    Resize and standardisation are those of EDM2's FD-DINOv2 (Karras et al. 2024, arXiv:2312.02696).

    Args:
        model: Name on the hub, or a local folder.
        revision: Commit, branch or tag on the hub; None for its main branch. A commit stays the same.

    Raises:
        ValueError: If transformers is not installed, the model is not to be had, or it is another kind of model.
    """

    name = "dinov2"

    def __init__(self, model: str = "facebook/dinov2-large", revision: str | None = None) -> None:
        net = _pretrained("DINOv2", "Dinov2Model", model, revision)
        super().__init__(net, 224, BicubicResize(), IMAGENET_MEAN, IMAGENET_STD)
        self.dim = int(net.config.hidden_size)

    @override
    def embed(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).pooler_output


class CLIP(HubFeatures):
    """Projected image embedding of CLIP (Radford et al. 2021, arXiv:2103.00020), not normalised to length 1.

    The whole image is resized to the model's square with Pillow's bicubic filter; nothing is cropped.

    Args:
        model: Name on the hub, or a local folder.
        revision: Commit, branch or tag on the hub; None for its main branch. A commit stays the same.

    Raises:
        ValueError: If transformers is not installed, the model is not to be had, or it is another kind of model.
    """

    name = "clip"

    def __init__(self, model: str = "openai/clip-vit-base-patch32", revision: str | None = None) -> None:
        net = _pretrained("CLIP", "CLIPVisionModelWithProjection", model, revision)
        super().__init__(net, int(net.config.image_size), CleanResize(), CLIP_MEAN, CLIP_STD)
        self.dim = int(net.config.projection_dim)

    @override
    def embed(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).image_embeds


def _pretrained(who: str, class_name: str, model: str, revision: str | None) -> Any:
    """A network of transformers in float32, whatever the file's dtype."""
    try:
        import transformers  # an optional dependency, and slow to import
    except ImportError as error:
        raise ValueError(f"{who}: needs transformers. Install it: pip install 'lit-generative[finetune]'.") from error
    try:
        net, info = getattr(transformers, class_name).from_pretrained(
            model, revision=revision or "main", dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{who}: {model!r} could not be loaded: {str(error).splitlines()[0]} "
            "Give the name of a model on the hub, or a folder that holds config.json and model.safetensors."
        ) from error
    # transformers fills what a file lacks with random numbers and only warns.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{who}: {model!r} must hold every weight of {class_name}, and {len(missing)} are missing, "
            f"{missing[0]} among them. It is another kind of model."
        )
    return net
