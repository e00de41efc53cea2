"""Networks of a trained model as the start of another: transfer learning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Self, override

from lit_generative.loading import load_part
from lit_generative.recipe import Recorded, class_path
from lit_generative.training.checks import unknown_name
from lit_generative.training.freezing import freeze as freeze_parameters
from lit_generative.training.freezing import hold_statistics

_STATED = ("latent_dim", "num_classes", "sample_shape", "num_packed")


class CheckpointPart(Recorded, nn.Module):
    """A network of a trained model, with its weights, to be trained on: the generator of a GAN, say.

    A checkpoint of what it becomes part of names its architecture instead of the file, and so needs it no more.

    FreezeD (Mo, Cho & Shin 2020, arXiv:2002.10964) is ``part="discriminator"`` with the first layers, from the image
    on, in ``freeze``: ``[from_colours, blocks.0, blocks.1]`` of a
    :class:`~lit_generative.networks.stylegan2_discriminator.StyleGAN2Discriminator`. What is frozen keeps its weights
    bit for bit, and still passes gradients on to the generator.

    Args:
        checkpoint: A checkpoint, or a folder of runs: its newest ``last.ckpt`` is taken.
        part: Dotted name of the network in the checkpoint's module.
        ema: As in :func:`~lit_generative.loading.load_module`: None takes averaged weights if there are any. A GAN's
            average is of its generator alone.
        freeze: What of it is not trained, as in :func:`lit_generative.training.freezing.freeze`.
        train: What alone is trained; empty for all.
        network: Instead of ``checkpoint``, for checkpoints, which hold the weights: the network.

    Attributes:
        loaded: The network.
        source: How to get the network again from the file, as a config says it; None if it came from none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If both or none of ``checkpoint`` and ``network`` are given, there is no such part, a pattern names
            nothing, nothing is left to train, or as :func:`~lit_generative.loading.load_module`.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        part: str = "generator",
        ema: bool | str | None = None,
        freeze: Sequence[str] = (),
        train: Sequence[str] = (),
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (network is None):
            raise ValueError(
                f"CheckpointPart: give a checkpoint or a network, got checkpoint={checkpoint!r} and "
                f"{'no network' if network is None else type(network).__name__}."
            )
        self.loaded = self._read(checkpoint, part, ema) if network is None else network  # type: ignore[arg-type]
        if freeze or train:
            freeze_parameters(self.loaded, freeze, train)
        for name in _STATED:
            if hasattr(self.loaded, name):
                setattr(self, name, getattr(self.loaded, name))
        self.train()  # not in evaluation mode, in which Lightning would leave it
        named = {"checkpoint": checkpoint, "part": part, "ema": ema}
        self.source = None if checkpoint is None else {"class_path": class_path(type(self)), "init_args": named}
        # So that a checkpoint can be built again without the file.
        self._recipe["init_args"] |= {"checkpoint": None, "ema": None, "network": self.loaded}

    def _read(self, checkpoint: str, part: str, ema: bool | str | None) -> nn.Module:
        module = load_part(self, checkpoint, ema)
        networks = dict(module.named_modules())
        if part not in networks:
            what = f"{checkpoint} holds a {type(module).__name__} without the part"
            raise unknown_name("CheckpointPart", what, part, [name for name in networks if name])
        network = networks[part]
        return network.loaded.requires_grad_(True) if isinstance(network, CheckpointPart) else network

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """As the network's own."""
        output: Tensor = self.loaded(*inputs)
        return output

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        hold_statistics(self)
        return self
