"""The default denoiser: diffusers' ``UNet2DModel`` behind the house's call ``network(x_t, t, y)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lit_generative.networks.checks import check_counts, check_divisible, check_label, check_shape
from lit_generative.networks.pretrained import (
    Source,
    build_from_text,
    forget_source,
    load_pretrained,
    read_settings,
    settings_of,
)
from lit_generative.networks.time_embedding import embeddable_time
from lit_generative.recipe import Recorded

MATMUL_TOKENS = 144
"""Attention to more tokens is left to the fused kernel."""

_MEANING = {
    "in_channels": "channels, extra_channels, patch_size",
    "out_channels": "channels, learned_variance, patch_size",
    "block_out_channels": "widths",
    "down_block_types": "attention_levels",
    "up_block_types": "attention_levels",
    "add_attention": "mid_attention",
    "num_class_embeds": "num_classes, and one for the null class",
    "resnet_time_scale_shift": "scale_shift",
}


class DiffusersUNet(Recorded, nn.Module):
    """A U-Net with residual blocks, a sinusoidal time embedding and self-attention (Ho et al. 2020, arXiv:2006.11239).

    The paper's network for CIFAR-10, with its 35,746,307 parameters, has the widths 128, 256, 256, 256, two layers a
    block, ``attention_levels=[1]``, ``mid_attention=True`` and a dropout of 0.1. That of improved DDPM (Nichol &
    Dhariwal 2021, arXiv:2102.09672) has the same widths, three layers a block, ``attention_levels=[1, 2]``,
    ``mid_attention=True``, ``scale_shift=True`` and ``learned_variance=True``.

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
        channels: Image channels, C.
        num_classes: How many classes a label may name; None for an unconditional network. The label ``num_classes``
            itself is the null class, which means "no label" to label dropout and classifier-free guidance.
        widths: Channels of each level, from the finest; each level after the first halves the resolution.
        layers_per_block: Residual blocks in each level on the way down; there is one more on the way up.
        attention_levels: Which entries of ``widths`` have self-attention; negative numbers count from the lowest level.
        patch_size: Side of the square of pixels that is folded into channels first. With 2 a training step on CPU
            takes 0.6 (8x8 images) to 0.2 (32x32) of its time; digits of 16x16 and clothes of 32x32 are better for it
            after the same minutes (``benchmarks/results/patches.md``).
        dropout: Probability in the residual blocks.
        extra_channels: Of what is shown beside ``x_t``: as many as the image's for self-conditioning, say.
        learned_variance: Give twice the image's channels, the second half for the variance of the step down.
        mid_attention: Attention between the way down and the way up; None has it if the lowest level has.
        scale_shift: Time and label scale and shift the norms, as in improved DDPM, and are not only added.
        pretrained: Start from a ``UNet2DModel`` of diffusers: a folder, or a name on the hub; safetensors only. What
            the arguments say must hold there, but for ``image_size`` and ``dropout``; norms and heads are as there.
        subfolder: Of that folder, as in ``"unet"`` of a pipeline's.
        revision: Commit, branch or tag on the hub.
        config: Instead of ``pretrained``, for checkpoints, which hold the weights: its architecture as JSON text.

    Attributes:
        unet: diffusers' ``UNet2DModel``, which ``unet.save_pretrained(folder)`` writes for others to read.

    Raises:
        ValueError: If ``image_size`` cannot be folded and halved so often, a level does not exist, there is none, or
            the pretrained network is not to be had or does not fit.
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
        extra_channels: int = 0,
        learned_variance: bool = False,
        mid_attention: bool | None = None,
        scale_shift: bool = False,
        pretrained: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        config: str | None = None,
    ) -> None:
        super().__init__()
        check_counts("DiffusersUNet", channels=channels, num_classes=num_classes, layers_per_block=layers_per_block)
        if patch_size < 1 or not widths or min(widths) < 1 or extra_channels < 0 or not 0 <= dropout < 1:
            raise ValueError(
                "DiffusersUNet: needs patch_size of at least 1 and at least one of widths, all of them positive, "
                f"extra_channels not negative and dropout in [0, 1), got {patch_size}, {widths}, {extra_channels} and "
                f"{dropout}."
            )
        divisor = patch_size * 2 ** (len(widths) - 1)
        check_divisible("DiffusersUNet", image_size, divisor, "patch_size * 2**(len(widths) - 1)")
        attends = _attends(attention_levels, len(widths))
        mid_attends = attends[-1] if mid_attention is None else mid_attention
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.extra_channels = extra_channels
        self.learned_variance = learned_variance
        wanted = {
            "in_channels": (channels + extra_channels) * patch_size**2,
            "out_channels": (2 if learned_variance else 1) * channels * patch_size**2,
            "block_out_channels": list(widths),
            "layers_per_block": layers_per_block,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "add_attention": mid_attends,
            "num_class_embeds": None if num_classes is None else num_classes + 1,
            "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        }
        source = None if pretrained is None else Source(pretrained, subfolder, revision)
        free = {"sample_size": image_size // patch_size, "dropout": dropout}
        self.unet: nn.Module = _build(wanted, free, source, config)
        if source is not None:
            forget_source(self, self.unet)
        attends[-1] |= mid_attends
        longest = (image_size // patch_size // 2 ** attends.index(True)) ** 2 if any(attends) else 0
        if longest <= MATMUL_TOKENS:
            _use_matmul_attention(self.unet)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what the parameterization asks for.

        Args:
            x_t: Noisy images and what is shown beside them, ``(N, C + extra_channels, H, W)``.
            t: int64 steps in ``[0, num_timesteps)``, or float times in ``[0, 1]``, ``(N,)``.
            y: Class labels in ``[0, num_classes]``, the last of which is the null class, ``(N,)`` int64; None if and
                only if the network is unconditional.

        Returns:
            The prediction, ``(N, C, H, W)``; with ``learned_variance`` ``(N, 2C, H, W)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``x_t`` has another shape.
        """
        check_label(self, self.num_classes, y)
        channels, *size = self.sample_shape
        check_shape(self, x_t, (channels + self.extra_channels, *size))
        patches = F.pixel_unshuffle(x_t, self.patch_size)
        prediction = self.unet(patches, embeddable_time(t), class_labels=y, return_dict=False)[0]
        return F.pixel_shuffle(prediction, self.patch_size)


def _build(wanted: dict[str, Any], free: dict[str, Any], source: Source | None, config: str | None) -> nn.Module:
    """A ``UNet2DModel``: new, or as it was saved, which must fit what is ``wanted``."""
    from diffusers import UNet2DModel  # takes seconds; only who builds this network should wait for it

    if source is not None and config is not None:
        raise ValueError("DiffusersUNet: give pretrained or config, not both.")
    if source is not None:
        _check_fit(repr(source.pretrained), read_settings("DiffusersUNet", UNet2DModel, source), wanted)
        return load_pretrained("DiffusersUNet", UNet2DModel, source, **free)
    if config is not None:
        unet = build_from_text("DiffusersUNet", UNet2DModel, config, **free)
        _check_fit("config", settings_of(unet), wanted)
        return unet
    widths = wanted["block_out_channels"]
    groups = _largest_divisor(widths, at_most=32, channels_left=4)
    unet = UNet2DModel(
        **wanted,
        **free,
        attention_head_dim=_largest_divisor(widths, at_most=64),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def _check_fit(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    always = {"time_embedding_type": "positional", "class_embed_type": None, "center_input_sample": False}
    differ = [
        f"{name} is {found[name]!r} there, {value!r} here" + (f" ({_MEANING[name]})" if name in _MEANING else "")
        for name, value in {**wanted, **always}.items()
        if found[name] != value
    ]
    if differ:
        raise ValueError(f"DiffusersUNet: {what} does not fit the arguments: {'; '.join(differ)}.")


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
