"""How near to held-out images is what a model makes of them: reconstructions, or samples by super-resolution."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.example_evaluation import ExampleEvaluation
from lit_generative.metrics.fidelity import SSIM_WINDOW, mean_squared_error, psnr, ssim
from lit_generative.types import SupportsReconstruction, draws_from_images


class FidelityEvaluation(ExampleEvaluation):
    """Logs ``val/psnr`` (dB), ``val/ssim`` and ``val/mse`` (in ``[-1, 1]``), and ``test/...``: means over the images.

    An autoencoder is asked for reconstructions. A model that draws from images is asked for a sample of each, and what
    it was shown, as in bicubic enlargement, is scored beside it as ``val/psnr_shown`` and the like, if it has the
    image's shape. Values outside ``[-1, 1]`` are clamped, and not rounded to 8 bits, so that a figure has no end only
    where an image is met exactly. Images with a side below 11 pixels have no SSIM, whose window they do not hold.

    Weights are the averaged ones where there are any; training's random numbers are untouched. PSNR does not tell sharp
    from blurred: by it, the mean over many samples is better than each of them.

    Args:
        max_batches: As in :class:`~lit_generative.callbacks.example_evaluation.ExampleEvaluation`.
        on_validation: Likewise; each costs as much as drawing so many samples.
        seed: Likewise.

    Raises:
        TypeError: If the module gives no images back.
        ValueError: If ``max_batches`` is below 1.
    """

    def __init__(self, max_batches: int | None = None, on_validation: bool = True, seed: int = 0) -> None:
        super().__init__(max_batches, on_validation, seed)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not (draws_from_images(pl_module) or isinstance(pl_module, SupportsReconstruction)):
            raise TypeError(
                f"FidelityEvaluation: {type(pl_module).__name__} neither encodes and decodes images nor draws from "
                "some. Leave the callback out; FIDEvaluation scores its samples."
            )

    @override
    @torch.no_grad()
    def figures(self, module: Any, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        if not draws_from_images(module):
            return self._compare(module.reconstruct(x, y), x)
        shown, samples = module.samples_of(x, y, self.generators(x))
        found = self._compare(samples, x)
        if shown.shape == x.shape:
            found |= {f"{name}_shown": value for name, value in self._compare(shown, x).items()}
        return found

    def _compare(self, found: Tensor, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            found, x = found.float().clamp(-1, 1), x.float()
            values = {"psnr": psnr(found, x), "mse": mean_squared_error(found, x)}
            if min(x.shape[-2:]) >= SSIM_WINDOW:
                values["ssim"] = ssim(found, x)
        return values
