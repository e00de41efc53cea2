"""What a code holds, as pictures: reconstructions, ways from one image to another, and single units turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.callbacks.media import log_image
from lit_generative.pictures import grid, save_png
from lit_generative.tensor_ops import expand_like
from lit_generative.types import SupportsLatents, SupportsReconstruction


class LatentPictures(L.Callback):
    """Draws three grids of the first validation images after each validation, to ``samples/`` and to the loggers.

    * ``reconstructions``: an image above, and below it what its code gives. Of a VQ-VAE these alone.
    * ``interpolations``: a row from one image to the next, along the straight line between their codes; where there
      are classes, with the first one's label all along.
    * ``traversals``: a row for each of the units with the largest KL from a standard normal, with all others at the
      first image's code and this one from -3 to 3, whatever the prior. Left out where the code is a map: there, a
      single number belongs to one place.

    Codes are posterior means, or what a flow makes of them; weights the averaged ones where there are any. Training's
    random numbers are untouched.

    Args:
        num_images: Images, and rows of interpolations.
        num_columns: Steps of an interpolation and of a traversal.
        num_units: Units that are turned; fewer if the code has fewer.

    Raises:
        ValueError: If a number is below 1, or ``num_columns`` below 2.
        TypeError: If the module does not encode and decode.
    """

    def __init__(self, num_images: int = 8, num_columns: int = 9, num_units: int = 10) -> None:
        least = {"num_images": (num_images, 1), "num_columns": (num_columns, 2), "num_units": (num_units, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"LatentPictures: {name} must be at least {bound}, got {value}.")
        self.num_images, self.num_columns, self.num_units = num_images, num_columns, num_units
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._folder = Path()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Asked of all processes: Lightning broadcasts it, and only the first one draws.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        if not isinstance(pl_module, SupportsLatents | SupportsReconstruction):
            raise TypeError(f"LatentPictures: {type(pl_module).__name__} does not encode and decode images.")

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            self._images = batch["image"][: self.num_images]
            self._labels = None if pl_module.num_classes is None else batch["label"][: self.num_images]

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self._images is None:
            return
        with torch.no_grad(), isolate_rng(), averaged_weights(trainer), trainer.precision_plugin.forward_context():
            pictures = self.draw(pl_module, self._images, self._labels)  # type: ignore[arg-type]
        for name, picture in pictures.items():
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                save_png(picture, self._folder / f"{name}_{trainer.global_step:07d}.png")
            log_image(trainer, name, picture, trainer.global_step)

    def draw(self, model: SupportsLatents | SupportsReconstruction, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """The pictures.

        Args:
            model: Encodes and decodes.
            x: Images, ``(N, C, H, W)``.
            y: Labels, ``(N,)``, if the model has classes.

        Returns:
            uint8 pictures ``(height, width, 3)`` by name; ``traversals`` where the codes are vectors.
        """
        if not isinstance(model, SupportsLatents):  # codes that are numbers of vectors have no straight line
            return {"reconstructions": grid(torch.cat([x, model.reconstruct(x, y)]), columns=len(x))}
        code = model.encode(x, y)
        pairs = torch.cat([x, model.decode(code, y)])
        steps = expand_like(torch.linspace(0, 1, self.num_columns, device=x.device), code)
        along = torch.stack([torch.lerp(a, b, steps) for a, b in zip(code, code.roll(-1, dims=0), strict=True)])
        rows = {"interpolations": (along, y)}
        if code.ndim == 2:
            turned = self._turned(code[0], *model.posterior(x, y))
            rows["traversals"] = (turned, None if y is None else y[:1].expand(len(turned)))
        pictures = {"reconstructions": grid(pairs, columns=len(x))}
        for name, (z, labels) in rows.items():
            repeated = None if labels is None else labels.repeat_interleave(self.num_columns)
            pictures[name] = grid(model.decode(z.flatten(0, 1), repeated), columns=self.num_columns)
        return pictures

    def _turned(self, code: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        """The code ``(D,)``, with one unit turned in each row: ``(num_units, num_columns, D)``."""
        kl = (mean.square() + logvar.exp() - logvar).mean(dim=0)
        units = kl.topk(min(self.num_units, mean.shape[1])).indices
        turned = code.repeat(len(units), self.num_columns, 1)
        turned[torch.arange(len(units)), :, units] = torch.linspace(-3, 3, self.num_columns, device=mean.device)
        return turned
