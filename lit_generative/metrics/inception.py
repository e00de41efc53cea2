"""Inception-V3 as FID, KID, IS and precision and recall are defined with, run faster.

The architecture is torch-fidelity's ``FeatureExtractorInceptionV3``, a copy of the TensorFlow graph of 2015. Batch norm
is folded into the convolutions, memory is laid out channels last, the resize is a matrix product and batches are small;
in float32 the features differ from torch-fidelity's by rounding only.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import override

from lit_generative.metrics.features import FeatureExtractor, Features, check_images, full_precision
from lit_generative.metrics.resizing import Resize, TF1Resize

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the converted TensorFlow weights of 2015-12-05 that published FIDs are computed with."""
WEIGHTS_VARIABLE = "LITGEN_INCEPTION_WEIGHTS"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class InceptionV3(FeatureExtractor):
    """2048 pooled features and 1008 logits without bias, which Inception Score is defined with.

    The weights are a file; nothing is downloaded. It is looked for in this order: ``weights``, the environment variable
    ``LITGEN_INCEPTION_WEIGHTS``, torch hub's folder of checkpoints. A grey image is repeated to three channels.

    Sources: Szegedy et al. 2016 (arXiv:1512.00567); Heusel et al. 2017 (arXiv:1706.08500).

    Args:
        weights: File of the weights; None looks for it.
        resize: How images come to 299 x 299 pixels; None for that of published FIDs,
            :class:`~lit_generative.metrics.resizing.TF1Resize`.
        dtype: Of the convolutions. "bfloat16" is several times as fast on a CPU that has it; scores in it compare with
            each other only.

    Raises:
        FileNotFoundError: If there is no such file; says which one, and where to put it.
        ValueError: If the file does not hold the weights of this network, or ``dtype`` is unknown.
    """

    name = "inception"
    dim = 2048
    num_classes = 1008
    image_size = 299

    def __init__(
        self,
        weights: str | None = None,
        resize: Resize | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"InceptionV3: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        content = find_weights(weights).read_bytes()
        self.weights_hash = hashlib.sha256(content).hexdigest()
        self.resize = TF1Resize() if resize is None else resize
        self.dtype = dtype
        layers = dict(_loaded(content).named_children())
        del layers["AvgPool"]  # the pool is taken in float32, whatever the dtype
        self.classify = layers.pop("fc")
        self.trunk = nn.Sequential(*layers.values())
        _fold_batch_norm(self.trunk)
        self.trunk.to(dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    @property
    def published(self) -> bool:
        """Whether the weights are the ones published FIDs are computed with."""
        return self.weights_hash == PUBLISHED_SHA256

    @property
    @override
    def frechet_name(self) -> str:
        return "FID" if self.published else "FID with unpublished weights"

    @property
    @override
    def frechet_key(self) -> str:
        return "fid"

    @override
    def forward(self, images: Tensor) -> Features:
        check_images(images, "InceptionV3")
        # On two cores with AMX, 8 images were faster than 16 or 32: what a layer writes stays in the cache.
        num = 8 if images.device.type == "cpu" else 64
        with full_precision(images.device):
            parts = [self._extract(part) for part in images.split(num)]
        return Features(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.resize(images, self.image_size).sub(128).div(128).expand(-1, 3, -1, -1)
        x = self.trunk(x.to(DTYPES[self.dtype], memory_format=torch.channels_last))
        embedding = x.float().mean(dim=(2, 3))
        return embedding, embedding @ self.classify.weight.T

    @override
    def record(self) -> dict[str, Any]:
        return {
            "extractor": self.name,
            "extractor_sha256": self.weights_hash,
            "published_weights": self.published,
            "dim": self.dim,
            "layer": "pool3 (2048), logits without bias",
            "resize": self.resize.name,
            "dtype": self.dtype,
            "grey_images": "repeated to 3 channels",
        }


def find_weights(weights: str | None = None) -> Path:
    """The file given, else the one that ``LITGEN_INCEPTION_WEIGHTS`` names, else the one in torch hub's folder.

    Raises:
        FileNotFoundError: If the first of them that is given does not exist, or none is there.
    """
    url = _published_file()
    name = url.rpartition("/")[2]
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    given, source = weights or os.environ.get(WEIGHTS_VARIABLE), "weights" if weights else WEIGHTS_VARIABLE
    path = Path(given).expanduser() if given else hub
    if path.is_file():
        return path
    what = f"{source} names {path}, which is no file" if given else "the weights are not on this machine"
    raise FileNotFoundError(
        f"InceptionV3: {what}, and nothing is downloaded by itself. Get {name} from {url} (sha256 "
        f"{PUBLISHED_SHA256}) and put it at {hub}, or say where it is: argument weights, or variable "
        f"{WEIGHTS_VARIABLE}."
    )


def _published_file() -> str:
    """Address of the published weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # slow to import

    return str(URL_INCEPTION_V3)


def _loaded(content: bytes) -> nn.Module:
    """The network of torch-fidelity with the weights of a file."""
    state = _read_state(content)
    net = _blank()
    own = net.state_dict()
    # Files from before torch 0.4.1 do not count batches, and nothing here does.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    other = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or other or wrong:
        raise ValueError(
            f"InceptionV3: the file must hold the weights of torch-fidelity's Inception-V3; {_some(missing)} missing, "
            f"{_some(other)} unknown, {_some(wrong)} of another shape. torchvision's Inception is another network."
        )
    nn.Module.load_state_dict(net, {**own, **{key: value.float() for key, value in state.items()}}, assign=True)
    return net


def _read_state(content: bytes) -> Mapping[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind shows in many ways
        raise ValueError(
            f"InceptionV3: the file of weights cannot be read, or holds code: {str(error).splitlines()[0]} "
            "Get the published file again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"InceptionV3: the file must hold a state dict of tensors, got {type(state).__name__}.")
    return state


def _blank() -> nn.Module:
    """torch-fidelity's network on the meta device; its own constructor downloads or unpickles a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Load nothing."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    # On the meta device no numbers are drawn: the run's random numbers stay what they are without an extractor.
    with torch.device("meta"):
        return Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)


def _some(keys: list[str]) -> str:
    return f"{len(keys)}" + (f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "")


def _fold_batch_norm(trunk: nn.Module) -> None:
    """Replace each convolution and batch norm by one convolution; in float64, so that float32 rounds once."""
    for block in list(trunk.modules()):
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(conv.double(), norm.double()).float()
            block.bn = nn.Identity()
