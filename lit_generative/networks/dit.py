"""The diffusion transformer: a denoiser of patches, for images and for the latents of an autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_generative.networks.checks import check_counts, check_divisible, check_label, check_shape
from lit_generative.networks.diffusers_unet import MATMUL_TOKENS
from lit_generative.networks.time_embedding import embeddable_time, sinusoidal_embedding
from lit_generative.recipe import Recorded

_TIME_FEATURES = 256


class DiT(Recorded, nn.Module):
    """A transformer over patches; time and label scale, shift and gate every block ("adaLN-Zero").

    The gates and the last layer start at zero, so that each block is the identity and the first prediction zero.
    DiT-S/2 is ``patch_size=2, width=384, depth=12, num_heads=6``; B is 768, 12, 12; L is 1024, 24, 16; XL is 1152, 28,
    16.

    Source: Peebles & Xie 2023, sec. 3.2 and table 1 (arXiv:2212.09748). Float times are multiplied by 1000 before they
    are embedded: see :func:`.time_embedding.embeddable_time`. As in
    :class:`~lit_generative.networks.diffusers_unet.DiffusersUNet`, attention to up to 144 tokens is two plain matrix
    products: on CPU a training step takes 0.8 to 0.95 of its time with the fused kernel under bfloat16, 1.03 to 1.1
    under float32.

    Args:
        image_size: Height and width of an image or latent.
        channels: Its channels, C.
        num_classes: How many classes a label may name; None for an unconditional network. The label ``num_classes``
            itself is the null class, which means "no label" to label dropout and classifier-free guidance.
        patch_size: Side of the square that becomes one token.
        width: Length of a token.
        depth: How many blocks.
        num_heads: Of each block's attention.
        mlp_ratio: Width of a block's perceptron, in widths of a token.
        extra_channels: Of what is shown beside ``x_t``: as many as the image's for self-conditioning, say.
        learned_variance: Give twice the image's channels, the second half for the variance of the step down.

    Raises:
        ValueError: If ``patch_size`` does not divide ``image_size``, or ``num_heads`` or 4 the width.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        num_classes: int | None = None,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        extra_channels: int = 0,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        check_counts("DiT", channels=channels, num_classes=num_classes, width=width)
        if min(patch_size, depth, num_heads) < 1 or width < 8 or width % 4 or width % num_heads:
            raise ValueError(
                "DiT: patch_size, depth and num_heads must be at least 1, and width a multiple of 4 and of num_heads, "
                f"at least 8, got {patch_size}, {depth}, {num_heads} and {width}."
            )
        if extra_channels < 0 or not mlp_ratio > 0:
            raise ValueError(
                f"DiT: extra_channels must not be negative and mlp_ratio positive, got {extra_channels} and "
                f"{mlp_ratio}."
            )
        check_divisible("DiT", image_size, patch_size, "patch_size")
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.extra_channels = extra_channels
        self.learned_variance = learned_variance
        num_outputs = (2 if learned_variance else 1) * channels * patch_size**2
        self.patches = nn.Conv2d(channels + extra_channels, width, patch_size, stride=patch_size)
        self.register_buffer("positions", _positions(image_size // patch_size, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        fused = len(self.positions) > MATMUL_TOKENS
        self.blocks = nn.ModuleList(_Block(width, num_heads, int(mlp_ratio * width), fused) for _ in range(depth))
        self.norm = _plain_norm(width)
        self.modulation = _Modulation(width, 2)
        self.out = nn.Linear(width, num_outputs)
        self._initialize()

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
        known = self.time(sinusoidal_embedding(embeddable_time(t), _TIME_FEATURES).to(x_t.dtype))
        if self.labels is not None:
            known = known + self.labels(y)
        maps = self.patches(x_t)
        tokens = maps.flatten(start_dim=2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, known)
        shift, scale = self.modulation(known)
        maps = self.out(_modulated(self.norm(tokens), shift, scale)).transpose(1, 2).unflatten(2, maps.shape[2:])
        return F.pixel_shuffle(maps, self.patch_size)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.flatten(start_dim=1))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, _Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.out.weight)


class _Block(nn.Module):
    """Attention, then a perceptron, each on a norm that time and label shift and scale, behind their gate."""

    def __init__(self, width: int, num_heads: int, hidden_dim: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.norm = _plain_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden_dim), nn.GELU("tanh"), nn.Linear(hidden_dim, width))
        self.modulation = _Modulation(width, 6)

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Tokens ``(N, L, D)`` and what is known of them ``(N, D)`` to tokens."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(known)
        tokens = tokens + gate * self._attend(_modulated(self.norm(tokens), shift, scale))
        return tokens + mlp_gate * self.mlp(_modulated(self.norm(tokens), mlp_shift, mlp_scale))

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        if self.fused:
            values = F.scaled_dot_product_attention(q, k, v)
        else:
            values = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3) @ v
        return self.joined(values.transpose(1, 2).flatten(start_dim=2))


class _Modulation(nn.Module):
    """What is known of an example, ``(N, D)``, to ``num`` vectors ``(N, 1, D)`` for all its tokens."""

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.linear = nn.Linear(width, num * width)

    def forward(self, known: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(known)).unsqueeze(1).chunk(self.num, dim=2)


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale) + shift


def _plain_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _positions(side: int, width: int) -> Tensor:
    """Fixed cosines and sines of row and column, ``(side**2, width)``: half the features for each."""
    axis = sinusoidal_embedding(torch.arange(side), width // 2)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)
