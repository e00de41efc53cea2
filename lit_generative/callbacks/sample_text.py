"""How prompts go on, during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.callbacks.media import logger_step
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import PromptOptions, SupportsPrompts

KEY = "samples"


class SampleText(L.Callback):
    """Lets a language model go on with prompts, every n updates, before the first one and at the end.

    The texts go to ``samples/step_0000500.txt`` in the run's folder, and to loggers that take texts. Draws are the same
    each time, so that what differs comes from training. Training's own random numbers are untouched; with averaged
    weights the texts are theirs.

    Args:
        prompts: What to go on with.
        every_n_steps: Updates between two times.
        max_new_tokens: Most tokens of a continuation; None leaves it to the model.
        temperature: Of the draws of tokens, 0 takes the most likely one; None leaves it to the model.
        seed: Seed of the draws.

    Raises:
        ValueError: If there is no prompt, or ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 500,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise ValueError("SampleText: needs at least one prompt, got none.")
        if every_n_steps < 1:
            raise ValueError(f"SampleText: every_n_steps must be at least 1, got {every_n_steps}.")
        self.prompts = prompts
        self.every_n_steps = every_n_steps
        self.options = PromptOptions(max_new_tokens=max_new_tokens, temperature=temperature)
        self.seed = seed
        self._last_step = -1
        self._folder = Path()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Asked of all processes: Lightning broadcasts it, and only the first one draws.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        # Of pictures the options are others, as the number of steps.
        if not isinstance(pl_module, SupportsPrompts) or "max_new_tokens" not in pl_module.prompt_options:
            raise TypeError(f"SampleText: {type(pl_module).__name__} does not go on with texts. Use it with CausalLM.")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        # Weights that are sharded over the processes draw with all of them at once.
        if not (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)):
            return
        model = cast(SupportsPrompts, pl_module)  # setup() made sure of it
        with isolate_rng(), averaged_weights(trainer), trainer.precision_plugin.forward_context():
            texts = model.sample_prompts(self.prompts, self.options, sample_generators(self.seed, len(self.prompts)))
        if trainer.is_global_zero:
            self._show(trainer, cast("list[str]", texts))

    def _show(self, trainer: L.Trainer, texts: Sequence[str]) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._folder.mkdir(parents=True, exist_ok=True)
            parts = [f">>> {prompt}\n{text}\n" for prompt, text in zip(self.prompts, texts, strict=True)]
            path = self._folder / f"step_{trainer.global_step:07d}.txt"
            path.write_text("\n".join(parts), encoding="utf-8")
        log_texts(trainer, KEY, self.prompts, texts, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]


@rank_zero_only
def log_texts(trainer: L.Trainer, key: str, prompts: Sequence[str], texts: Sequence[str], step: int) -> None:
    """Show prompts and how they go on in every logger that takes texts: W&B as a table, TensorBoard as text.

    Args:
        trainer: Its loggers are used. Every process may call it, or the first one alone.
        key: Name of the texts.
        prompts: ``N`` texts.
        texts: What follows each.
        step: ``trainer.global_step``, the updates made so far.
    """
    pairs = list(zip(prompts, texts, strict=True))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard renders Markdown, where indented text stays as it is.
            shown = "\n\n".join(_indented(f">>> {prompt}\n{text}") for prompt, text in pairs)
            logger.experiment.add_text(key, shown, logger_step(step))
        elif isinstance(logger, WandbLogger):
            logger.log_text(key, columns=["prompt", "text"], data=[list(p) for p in pairs], step=logger_step(step))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
