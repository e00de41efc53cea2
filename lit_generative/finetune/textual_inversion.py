"""Textual inversion: a new word for what a few pictures show.

Source: Gal et al. 2023, sec. 4 (arXiv:2208.01618).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.weightings import Weighting
from lit_generative.finetune.learned_tokens import add_tokens, token_names
from lit_generative.finetune.options import Memory, Sampling
from lit_generative.finetune.prompted_diffusion import PromptedDiffusion

FORMAT = "textual-inversion"
FILE = "learned_embeds.safetensors"


class TextualInversion(PromptedDiffusion):
    """A text-to-image model that learns a new word, and nothing else: no weight of it changes.

    Captions say where the word stands, as ``{token}`` or ``{}``: "a photo of {token}". Prompts may name it itself, too.

    Args:
        pretrained: A pipeline's folder, or its name on the hub.
        optimizer: Optimizer of the new vectors. Without weight decay, which would draw them to zero.
        token: The new word, which the tokenizer must not know.
        initializer: A known word, one token, that it starts from, as in "dog".
        num_vectors: How many vectors stand for it.
        scheduler: Learning rate, stepped once an update.
        revision: Commit, branch or tag on the hub; a commit stays the same.
        weighting: How much an error counts at each noise level; None for all alike.
        noise: What latents are mixed with; None for independent, standard normal noise.
        memory: How to do with less memory; text cannot be cached.
        sampling: How samples are drawn.

    Attributes:
        embeddings: The text encoders' embeddings with the new rows, by the encoder's name.

    Raises:
        ValueError: If the word exists, what it starts from is not one token, or there is no such pipeline.
    """

    def __init__(
        self,
        pretrained: str,
        optimizer: OptimizerCallable,
        token: str,
        initializer: str,
        num_vectors: int = 1,
        scheduler: LRSchedulerCallable | None = None,
        revision: str | None = None,
        weighting: Weighting | None = None,
        noise: NoiseSource | None = None,
        memory: Memory | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(pretrained, revision, weighting, noise, memory, sampling)
        self.save_hyperparameters()
        if num_vectors < 1:
            raise ValueError(f"TextualInversion: num_vectors must be at least 1, got {num_vectors}.")
        if self.memory.caches_text:
            raise ValueError(
                f"TextualInversion: memory.cache={self.memory.cache!r} would keep what the new word meant at first. "
                "Set it to latents or null."
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.token = token
        self.num_vectors = num_vectors
        self.embeddings = add_tokens("TextualInversion", self.model.prompts, token, initializer, num_vectors)
        self.save_memory()
        self.leave_base_out(pretrained)
        self.train()

    @override
    def trained_parts(self) -> list[nn.Module]:
        return []  # rows of a table have no mode

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("tokens", self.model.parameters(), self.optimizer, self.scheduler)

    @override
    def texts_of(self, captions: Sequence[str]) -> list[str]:
        """Captions with all names of the new word in its place."""
        names = " ".join(token_names(self.token, self.num_vectors))
        given = [caption.replace("{token}", self.token).replace("{}", self.token) for caption in captions]
        return [caption.replace(self.token, names) for caption in given]

    @override
    def examples(self, batch: Mapping[str, Any], prefix: str = "") -> tuple[Tensor, list[str]]:
        images, captions = super().examples(batch, prefix)
        for caption, text in zip(captions, self.texts_of(captions), strict=True):
            if self.token not in text:
                raise ValueError(
                    f"TextualInversion: each caption must say where {self.token!r} stands, got {caption!r}. Write "
                    "'{token}' there, as in 'a photo of {token}'."
                )
        return images, captions

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        images, captions = self.examples(batch)
        losses = self.losses(self.noisy(images), self.encode(self.texts_of(captions)))
        self.log_losses({"loss": losses}, in_bar=("loss",))
        return losses.mean()

    @property
    def export_formats(self) -> tuple[str, ...]:
        """What :meth:`export` can write."""
        return (FORMAT,)

    def export(self, format: str, folder: Path) -> str:
        """Write the new vectors as ``load_textual_inversion`` of diffusers takes them.

        Args:
            format: ``textual-inversion``. For SDXL the file holds ``clip_l`` and ``clip_g``, one for each encoder.
            folder: Where to; made if it is not there.

        Returns:
            How to load it, in Python.

        Raises:
            ValueError: If the format is another.
        """
        if format != FORMAT:
            raise ValueError(
                f"TextualInversion: cannot be written as {format!r}: all that was trained is a word. Take {FORMAT}."
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [embedding.learned.detach().cpu().contiguous() for embedding in self.embeddings.values()]
        if len(rows) == 1:
            vectors = rows[0] if self.num_vectors > 1 else rows[0][0]
            save_file({self.token: vectors}, folder / FILE, metadata={"format": "pt"})
            return f"pipeline.load_textual_inversion({str(folder)!r})"
        save_file(dict(zip(("clip_l", "clip_g"), rows, strict=True)), folder / FILE, metadata={"format": "pt"})
        return self._how_to_load_xl(folder / FILE)

    def _how_to_load_xl(self, file: Path) -> str:
        lines = [f"vectors = safetensors.torch.load_file({str(file)!r})"]
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            lines.append(
                f"pipeline.load_textual_inversion(vectors[{key!r}], token={self.token!r}, "
                f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end})"
            )
        # The pipeline itself would then pool at the new word.
        if self.model.prompts.encoders["text_encoder_2"].config.eos_token_id == 2:
            lines.append("pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id")
        return "; ".join(lines)
