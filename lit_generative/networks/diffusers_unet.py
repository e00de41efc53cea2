"""The default denoiser: diffusers' ``UNet2DModel`` behind the house's call ``network(x_t, t, y)``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lit_generative.networks.checks import check_divisible, check_label
from lit_generative.networks.time_embedding import embeddable_time
from lit_generative.recipe import Recorded

_MATMUL_TOKENS = 144


class DiffusersUNet(Recorded, nn.Module):
    """A U-Net with residual blocks, a sinusoidal time embedding and self-attention (Ho et al. 2020, arXiv:2006.11239).

    Where this departs from diffusers' defaults:

    * The last convolution starts at zero, so that the first prediction is zero (as in Ho et al.'s own code).
    * Float times are multiplied by 1000 before they are embedded: see :func:`.time_embedding.embeddable_time`.
    * Group norm keeps at least 4 channels in a group. diffusers' 32 groups would leave one at width 32, which throws
      away every channel's mean.
    * Attention heads have up to 64 channels (Dhariwal & Nichol 2021, arXiv:2105.05233), not 8.
    * Attention is two plain matrix products where no level has more than 144 tokens (12x12): there a training step
      under bfloat16 on CPU takes about 0.8 of its time with the fused kernel, which wins from 256 tokens on.

    Args:
        image_size: Height and width in pixels.
        channels: Image channels.
        num_classes: How many classes a label may name; None for an unconditional network.
        widths: Channels of each level, from the finest; each level after the first halves the resolution.
        layers_per_block: Residual blocks in each level on the way down; there is one more on the way up.
        attention_levels: Which entries of ``widths`` have self-attention; negative numbers count from the lowest level.
            Attention between the way down and the way up goes with the lowest level's.
        patch_size: Side of the square of pixels that is folded into channels first. With 2 a training step on CPU
            takes 0.6 (8x8 images) to 0.35 (16x16) of its time.
        dropout: Probability in the residual blocks.

    Raises:
        ValueError: If ``image_size`` cannot be folded and halved so often, a level does not exist, or there is none.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        widths: tuple[int, ...] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (-1,),
        patch_size: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or not widths:
            raise ValueError(
                f"DiffusersUNet: needs patch_size of at least 1 and at least one of widths, got {patch_size}, {widths}."
            )
        divisor = patch_size * 2 ** (len(widths) - 1)
        check_divisible("DiffusersUNet", image_size, divisor, "patch_size * 2**(len(widths) - 1)")
        attends = _attends(attention_levels, len(widths))
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.patch_size = patch_size
        # diffusers takes seconds to import; only who builds this network should wait for it.
        from diffusers import UNet2DModel

        self.unet: nn.Module = UNet2DModel(
            sample_size=image_size // patch_size,
            in_channels=channels * patch_size**2,
            out_channels=channels * patch_size**2,
            block_out_channels=tuple(widths),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            add_attention=attends[-1],
            attention_head_dim=_largest_divisor(widths, at_most=64),
            norm_num_groups=_largest_divisor(widths, at_most=32, channels_left=4),
            dropout=dropout,
            num_class_embeds=num_classes,
        )
        longest = (image_size // patch_size // 2 ** attends.index(True)) ** 2 if any(attends) else 0
        if longest <= _MATMUL_TOKENS:
            _use_matmul_attention(self.unet)
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what the parameterization asks for.

        Args:
            x_t: Noisy images, ``(N, C, H, W)``.
            t: int64 steps in ``[0, num_timesteps)``, or float times in ``[0, 1]``, ``(N,)``.
            y: Class labels, ``(N,)`` int64; None if and only if the network is unconditional.

        Returns:
            The prediction, ``(N, C, H, W)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        check_label(self, self.num_classes, y)
        patches = F.pixel_unshuffle(x_t, self.patch_size)
        prediction = self.unet(patches, embeddable_time(t), class_labels=y, return_dict=False)[0]
        return F.pixel_shuffle(prediction, self.patch_size)


def _attends(attention_levels: Sequence[int], num_levels: int) -> list[bool]:
    """Whether each level has attention, from the finest."""
    if not all(-num_levels <= level < num_levels for level in attention_levels):
        raise ValueError(
            f"DiffusersUNet: attention_levels must lie in [{-num_levels}, {num_levels}) as there are {num_levels} "
            f"widths, got {list(attention_levels)}."
        )
    chosen = {level % num_levels for level in attention_levels}
    return [level in chosen for level in range(num_levels)]


def _largest_divisor(widths: Sequence[int], at_most: int, channels_left: int = 1) -> int:
    """The largest number up to ``at_most`` that divides every width and leaves a quotient of ``channels_left``."""
    fits = (n for n in range(1, at_most + 1) if all(w % n == 0 and w // n >= channels_left for w in widths))
    return max(fits, default=1)


def _use_matmul_attention(unet: nn.Module) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
