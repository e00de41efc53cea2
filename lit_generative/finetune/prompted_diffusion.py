"""What fine-tuning of text-to-image models shares: the loss, its evaluation, and samples of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.weightings import Uniform, Weighting
from lit_generative.finetune.base_weights import LeavesBaseOut
from lit_generative.finetune.caches import RowCache, content_keys
from lit_generative.finetune.options import Memory, Sampling
from lit_generative.finetune.prompts import Encoded
from lit_generative.finetune.stable_diffusion import Noisy, StableDiffusion
from lit_generative.tensor_ops import Generators, evaluating, generators_of, randn, uniform
from lit_generative.training.module import GenerativeModule
from lit_generative.types import MODELS_OWN, PromptOptions

NUM_BINS = 4


class PromptedDiffusion(LeavesBaseOut, GenerativeModule):
    """A pretrained Stable Diffusion of which something is trained.

    A checkpoint holds what is trained alone; the rest is read from ``pretrained`` again.

    Args:
        pretrained: A pipeline's folder, or its name on the hub.
        revision: Commit, branch or tag on the hub.
        weighting: How much an error counts at each noise level; None for all alike.
        noise: What latents are mixed with; None for independent, standard normal noise.
        memory: How to do with less; None for no such way.
        sampling: How samples are drawn; None for the defaults, which name no prompts.

    Raises:
        ValueError: If there is no such pipeline.
    """

    prompt_options: tuple[str, ...] = ("negative", "guidance_scale", "num_steps")

    def __init__(
        self,
        pretrained: str,
        revision: str | None,
        weighting: Weighting | None,
        noise: NoiseSource | None,
        memory: Memory | None,
        sampling: Sampling | None,
    ) -> None:
        super().__init__()
        self.model = StableDiffusion(type(self).__name__, pretrained, revision)
        self.weighting = Uniform() if weighting is None else weighting
        self.noise = NoiseSource() if noise is None else noise
        self.memory = Memory() if memory is None else memory
        self.sampling = Sampling() if sampling is None else sampling
        self.num_classes = len(self.sampling.prompts) or None
        self._latents = RowCache() if self.memory.caches_latents else None
        self._texts = RowCache() if self.memory.caches_text else None

    @property
    def sampling_modules(self) -> list[str]:
        """The module itself, whose ``state_dict`` holds what is trained."""
        return [""]

    @override
    def sampling_settings(self) -> dict[str, Any]:
        return self.sampling.settings()

    def trained_parts(self) -> Iterable[nn.Module]:
        """Networks that something is trained in; the others stay in evaluation mode."""
        candidates = (self.model.unet, *self.model.prompts.encoders.values())
        return [part for part in candidates if any(p.requires_grad for p in part.parameters())]

    @override
    def train(self, mode: bool = True) -> PromptedDiffusion:
        super().train(mode)
        self.model.eval()
        for part in self.trained_parts():
            part.train(mode)
        return self

    def save_memory(self, keep: Iterable[nn.Module] = ()) -> None:
        """Do what ``memory`` says, once it is settled what is trained.

        Args:
            keep: Networks whose weights are trained themselves: they are of one type throughout.
        """
        whole = {id(part) for part in keep}
        for part in (self.model.unet, *self.model.prompts.encoders.values()):
            if id(part) not in whole:
                for parameter in part.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(self.memory.dtype)
        if self.memory.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            for encoder in self.model.prompts.encoders.values():
                if any(p.requires_grad for p in encoder.parameters()):
                    _recompute_activations(encoder)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")  # as they shall be

    # ---- the loss

    def examples(self, batch: Mapping[str, Any], prefix: str = "") -> tuple[Tensor, list[str]]:
        """Pictures ``(N, 3, H, W)`` and their captions.

        Args:
            batch: With ``image`` and ``caption``.
            prefix: Before both names.

        Raises:
            ValueError: If one is missing, or the pictures do not fit.
        """
        for key in (f"{prefix}image", f"{prefix}caption"):
            if key not in batch:
                raise ValueError(
                    f"{type(self).__name__}: a batch must hold {key!r}, but this one holds {sorted(batch)}. Take data "
                    f"of captioned pictures{' that has a class, too' if prefix else ''}: see "
                    "lit_generative.data.captioned_images."
                )
        images = batch[f"{prefix}image"]
        self.model.check_images(images)
        return images, list(batch[f"{prefix}caption"])

    def noisy(self, images: Tensor) -> Noisy:
        """Noisy latents of pictures ``(N, 3, H, W)`` at times of their own."""
        if self._latents is None:
            posterior: tuple[Tensor, ...] = self.model.posterior(images)
        else:
            posterior = self._latents.rows(
                content_keys(images), lambda rows: self.model.posterior(images[rows]), images.device
            )
        z = self.model.latents(posterior)
        eps = self.noise.draw(z)
        t = self.model.schedule.random_times(len(z), z.device)
        return self.model.noised(z, t, eps, self.noise.shown(eps))

    def encode(self, texts: Sequence[str | None]) -> Encoded:
        """What the U-Net sees of prompts, from the cache if there is one."""
        if self._texts is None:
            return cast(Encoded, self.model.prompts(texts))
        keys: list[Hashable] = list(texts)
        with torch.no_grad():
            return Encoded(*self._texts.rows(keys, lambda rows: self._encoded([texts[i] for i in rows]), self.device))

    def _encoded(self, texts: Sequence[str | None]) -> tuple[Tensor, ...]:
        return tuple(part for part in self.model.prompts(texts) if part is not None)

    def losses(self, noisy: Noisy, prompts: Encoded, target: Tensor | None = None) -> Tensor:
        """Weighted squared error of each example, the mean over its values, ``(N,)``.

        Args:
            noisy: What the U-Net sees.
            prompts: ``N`` of them.
            target: What it shall predict; None for what is known of the picture and the noise.
        """
        output = self.model.predict(noisy.x_t, noisy.t, prompts)
        target = self.model.target(noisy) if target is None else target
        alpha, sigma = self.model.schedule.alpha_sigma(noisy.t)
        weight = self.weighting.weight(alpha, sigma, self.model.parameterization.output_scale(alpha, sigma))
        return weight * (output - target).square().flatten(start_dim=1).mean(dim=1)

    @override
    def on_train_epoch_end(self) -> None:
        cache = self._latents
        if cache is not None and cache.useless:
            rank_zero_warn(
                f"{type(self).__name__}: no picture of this epoch was seen before, so a cache of latents only fills "
                "the memory; it is off now. Turn random crops and flips off, or set memory.cache to text or null."
            )
            cache.clear()
            self._latents = None
        elif cache is not None:
            cache.start_epoch()

    # ---- evaluation

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Mapping[str, Any]) -> None:
        """The loss at one time in each quarter; a picture's noise and times are its own, the same at each validation.

        The training loss cannot show progress: it changes more with the times than with the weights.
        """
        images, captions = self.examples(batch)
        prompts = self.encode(self.texts_of(captions))
        generators = generators_of(images, "prompted diffusion")
        z = self.model.latents(self.model.posterior(images), generators)
        total = self.model.schedule.num_timesteps
        values = {}
        for start, stop in [(i * total // NUM_BINS, (i + 1) * total // NUM_BINS) for i in range(NUM_BINS)]:
            t = start + (uniform((len(z),), generators, z.device) * (stop - start)).long()
            noisy = self.model.noised(z, t, randn(z.shape, generators, z.device))
            values[f"loss_t{start}_{stop}"] = self.losses(noisy, prompts)
        self.log_evaluation(stage, {"loss": torch.stack(list(values.values())).mean(dim=0), **values})

    def texts_of(self, captions: Sequence[str]) -> list[str]:
        """Captions as the tokenizers take them."""
        return list(captions)

    # ---- samples

    @override
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw pictures of the prompts that ``sampling`` names.

        Args:
            num: How many.
            label: Indices of prompts, ``(num,)``; None draws them uniformly.
            generator: Source of all noise, see :func:`lit_generative.tensor_ops.randn`.

        Returns:
            ``(num, 3, H, W)`` in ``[-1, 1]``, float32.

        Raises:
            ValueError: If it names none.
        """
        labels = self.labels_for(num, label, generator)
        if labels is None:
            raise ValueError(
                f"{type(self).__name__}: sample() draws the prompts of `sampling`, which names none. Give "
                "sampling.prompts, or call sample_prompts."
            )
        return self.sample_prompts([self.sampling.prompts[i] for i in labels.tolist()], generator=generator)

    @torch.no_grad()
    def sample_prompts(
        self, prompts: Sequence[str], options: PromptOptions = MODELS_OWN, generator: Generators = None
    ) -> Tensor:
        """Draw one picture of each prompt, whatever the others are.

        Args:
            prompts: ``N`` of them.
            options: How to draw; what it leaves open is as ``sampling`` says.
            generator: One for all, or one for each.

        Returns:
            ``(N, 3, H, W)`` in ``[-1, 1]``, float32.
        """
        options = self.sampling.completed(options)
        size = self.sampling.image_size
        sides = self.model.image_size if size is None else (size, size)
        shape = (len(prompts), self.model.unet.config.in_channels, *(side // self.model.factor for side in sides))
        scale, num_steps = cast(float, options.guidance_scale), cast(int, options.num_steps)
        with evaluating(self.model):
            towards = self.model.prompts(self.texts_of(prompts))
            away = None
            if scale > 1:
                none = [options.negative] if options.negative is None else self.texts_of([options.negative])
                away = self.model.prompts(none * len(prompts))
            z = self.model.draw(randn(shape, generator, self.device), towards, away, scale, num_steps)
            return self.model.decode(z)


def _recompute_activations(encoder: Any) -> None:
    """Transformers renamed it in the course of version 5."""
    new = getattr(encoder, "activation_checkpointing_enable", None)
    (new or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
