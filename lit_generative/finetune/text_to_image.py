"""Fine-tuning of Stable Diffusion on captioned pictures: DreamBooth, styles, whole domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.weightings import Weighting
from lit_generative.finetune.adapters import inject
from lit_generative.finetune.exports import export, formats_of
from lit_generative.finetune.options import Memory, Sampling
from lit_generative.finetune.prior import Prior, adapters_off
from lit_generative.finetune.prompted_diffusion import PromptedDiffusion
from lit_generative.finetune.stable_diffusion import Noisy
from lit_generative.training.freezing import freeze as freeze_weights
from lit_generative.training.freezing import report
from lit_generative.training.parameter_groups import RateScale


class TextToImage(PromptedDiffusion):
    """A text-to-image model that learns a subject, a style or a domain from captioned pictures.

    With ``adapter`` an adapter of PEFT is trained within the U-Net: LoRA (Hu et al. 2021, arXiv:2106.09685) and others.
    Without, the U-Net itself. With ``prior`` it is DreamBooth (Ruiz et al. 2023, arXiv:2208.12242).

    In SDXL, the last layer of the first text encoder has no part in the pictures. Under DDP, training it needs
    ``strategy: ddp_find_unused_parameters_true``.

    Args:
        pretrained: A pipeline's folder, or its name on the hub.
        optimizer: Optimizer of what is trained.
        scheduler: Learning rate, stepped once an update.
        revision: Commit, branch or tag on the hub; a commit stays the same.
        adapter: Of the U-Net, as in ``peft.LoraConfig`` with ``target_modules: [to_q, to_k, to_v, to_out.0]``; None
            trains the U-Net's own weights.
        text_adapter: Of each text encoder, with ``[q_proj, k_proj, v_proj, out_proj]``; None for no adapter.
        train_text_encoder: Train the text encoders' own weights.
        text_lr_scale: Learning rate of what is trained of the text encoders, in units of the U-Net's.
        train: Patterns of the U-Net's weights that are trained alone, as in :func:`.freezing.freeze`; without an
            adapter.
        freeze: Patterns of the U-Net's weights that are not trained; without an adapter.
        prior: Holds the class where it was; None for no such loss.
        weighting: How much an error counts at each noise level; None for all alike.
        noise: What latents are mixed with; None for independent, standard normal noise.
        caption_dropout: Probability that training hides a caption, so that guidance may leave it out.
        memory: How to do with less memory; None for no such way.
        sampling: How samples are drawn.

    Attributes:
        adapters: Configs of the adapters by network, ``unet``, ``text_encoder``, ``text_encoder_2``.

    Raises:
        ValueError: If settings contradict each other, there is no such pipeline, or an adapter does not fit.
        TypeError: If an adapter is of prompt, prefix or p-tuning.
    """

    def __init__(
        self,
        pretrained: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        revision: str | None = None,
        adapter: PeftConfig | None = None,
        text_adapter: PeftConfig | None = None,
        train_text_encoder: bool = False,
        text_lr_scale: float = 1.0,
        train: Sequence[str] = (),
        freeze: Sequence[str] = (),
        prior: Prior | None = None,
        weighting: Weighting | None = None,
        noise: NoiseSource | None = None,
        caption_dropout: float = 0.0,
        memory: Memory | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(pretrained, revision, weighting, noise, memory, sampling)
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.prior = prior
        self.caption_dropout = caption_dropout
        self.trains_text = train_text_encoder or text_adapter is not None
        self._check(adapter, text_adapter, train_text_encoder, bool(train or freeze))
        if text_lr_scale != 1:
            self.rate_scales = [RateScale(("model.prompts",), self._checked(text_lr_scale))]
        self.adapters: dict[str, PeftConfig] = {}
        self._choose_unet(adapter, train, freeze)
        self._choose_encoders(text_adapter, train_text_encoder)
        encoders = self.model.prompts.encoders.values()
        self.save_memory(keep=[*([] if adapter else [self.model.unet]), *(encoders if train_text_encoder else ())])
        self.leave_base_out(pretrained)
        self.train()

    def _check(
        self, adapter: PeftConfig | None, text_adapter: PeftConfig | None, train_text_encoder: bool, patterns: bool
    ) -> None:
        if adapter is not None and patterns:
            raise ValueError(
                "TextToImage: train and freeze choose among the U-Net's own weights, and an adapter was given too. "
                "Choose its layers by its target_modules."
            )
        if text_adapter is not None and train_text_encoder:
            raise ValueError(
                "TextToImage: got both text_adapter and train_text_encoder=True. Train the text encoders themselves, "
                "or an adapter of theirs."
            )
        if self.trains_text and self.memory.caches_text:
            raise ValueError(
                f"TextToImage: memory.cache={self.memory.cache!r} would keep what the text encoders gave before "
                "they were trained. Set it to latents or null."
            )
        if self.prior is not None and self.prior.source == "teacher" and (adapter is None or train_text_encoder):
            raise ValueError(
                "TextToImage: a teacher is the model without its adapters, but the networks' own weights are trained. "
                "Give an adapter, or take prior.source=images."
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"TextToImage: caption_dropout must lie in [0, 1), got {self.caption_dropout}.")

    def _checked(self, text_lr_scale: float) -> float:
        if not (text_lr_scale > 0 and self.trains_text):
            raise ValueError(
                f"TextToImage: text_lr_scale must be positive, and something of the text encoders trained, got "
                f"{text_lr_scale}. Give text_adapter or train_text_encoder, or leave text_lr_scale out."
            )
        return text_lr_scale

    def _choose_unet(self, adapter: PeftConfig | None, train: Sequence[str], freeze: Sequence[str]) -> None:
        if adapter is not None:
            self.adapters["unet"] = inject("TextToImage", self.model.unet, adapter)
            rank_zero_info(f"TextToImage, U-Net: {report(self.model.unet)}.")
            return
        self.model.unet.requires_grad_(True)
        rank_zero_info(f"TextToImage, U-Net: {freeze_weights(self.model.unet, freeze, train)}.")

    def _choose_encoders(self, text_adapter: PeftConfig | None, whole: bool) -> None:
        for name, encoder in self.model.prompts.encoders.items():
            if text_adapter is not None:
                self.adapters[name] = inject("TextToImage", encoder, text_adapter)
            elif whole:
                encoder.requires_grad_(True)

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("trained", self.model.parameters(), self.optimizer, self.scheduler)

    # ---- training

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        images, captions = self.examples(batch)
        noisy = self.noisy(images)
        losses = self.losses(noisy, self.encode(self._dropped(captions)))
        if self.prior is None:
            self.log_losses({"loss": losses}, in_bar=("loss",))
            return losses.mean()
        prior = self._prior_losses(self.prior, batch, noisy)
        loss = losses.mean() + self.prior.weight * prior.mean()
        self.log_losses({"loss": loss, "instance_loss": losses, "prior_loss": prior}, in_bar=("loss",))
        return loss

    def _prior_losses(self, prior: Prior, batch: Mapping[str, Any], noisy: Noisy) -> Tensor:
        if prior.source == "images":
            if prior.prompt is not None and "class_image" in batch and "class_caption" not in batch:
                batch = {**batch, "class_caption": [prior.prompt] * len(batch["class_image"])}
            images, captions = self.examples(batch, "class_")
            return self.losses(self.noisy(images), self.encode(captions))
        prompts = [prior.prompt] * len(noisy.x_t)
        with torch.no_grad(), adapters_off(self.model):
            target = self.model.predict(noisy.x_t, noisy.t, self.encode(prompts))
        return self.losses(noisy, self.encode(prompts), target)

    def _dropped(self, captions: list[str]) -> list[str | None]:
        """Captions, some of them hidden."""
        if self.caption_dropout == 0:
            return list(captions)
        hidden = (torch.rand(len(captions)) < self.caption_dropout).tolist()
        return [None if gone else caption for gone, caption in zip(hidden, captions, strict=True)]

    # ---- export

    @property
    def export_formats(self) -> tuple[str, ...]:
        """What :meth:`export` can write: whole pipelines always, adapters if nothing else is trained."""
        return formats_of(self.adapters, whole="unet" not in self.adapters or self.trains_whole_text)

    @property
    def trains_whole_text(self) -> bool:
        """Whether the text encoders' own weights are trained."""
        return self.trains_text and "text_encoder" not in self.adapters

    def export(self, format: str, folder: Path) -> str:
        """Write for other libraries.

        Args:
            format: ``diffusers`` or ``merged``: a whole pipeline, the adapters within its weights. ``diffusers-lora``:
                the file that ``load_lora_weights`` takes. ``peft``: the adapters as PEFT writes them.
            folder: Where to; made if it is not there.

        Returns:
            How to load it, in Python.

        Raises:
            ValueError: If the model cannot be written so.
        """
        return export(self.model, self.adapters, self.export_formats, format, Path(folder))
