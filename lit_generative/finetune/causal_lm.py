"""Fine-tuning of pretrained causal language models: all weights, some, an adapter's, or learned words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig, PrefixTuningConfig, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_generative.data.token_rows import IGNORED, TokenBatch
from lit_generative.data.tokenizers import encode_prompt, load_tokenizer
from lit_generative.finetune.adapters import merged, save_adapter
from lit_generative.finetune.base_weights import LeavesBaseOut
from lit_generative.finetune.lm_adapters import adapt, check_adapter, virtual_tokens
from lit_generative.finetune.lm_loading import FrozenDtype, Quantization, load_causal_lm, positions_of
from lit_generative.finetune.lm_sampling import continue_tokens, end_tokens
from lit_generative.tensor_ops import Generators, evaluating
from lit_generative.training.freezing import freeze as freeze_weights
from lit_generative.training.module import GenerativeModule
from lit_generative.types import MODELS_OWN, PromptOptions

_NON_REENTRANT = {"use_reentrant": False}


class CausalLM(LeavesBaseOut, GenerativeModule):
    """A language model that learns to go on as its new texts do.

    A checkpoint holds what is trained, and names ``pretrained``, which must stay there. Validation logs, of each set of
    the data, the mean over all its tokens: ``val/loss`` (nats) and ``val/perplexity``, and of a set with a name
    ``val_<name>/loss`` and so on.

    Args:
        pretrained: A folder as ``save_pretrained`` of transformers writes it, or the name of one on the hub.
        optimizer: Optimizer of what is trained.
        scheduler: Learning rate, stepped once an update.
        revision: Commit, branch or tag on the hub; None for its main branch.
        adapter: A config of PEFT. LoRA, DoRA, IA3 and others change the layers in ``target_modules``; prompt tuning,
            prefix tuning and p-tuning learn words before the text. None trains the weights themselves.
        train: Without adapter: which weights are trained, as patterns (:mod:`lit_generative.training.freezing`); None
            for all.
        freeze: Without adapter: which are not, of those.
        gradient_checkpointing: Compute activations twice, to keep fewer; not with prefix tuning.
        frozen_dtype: Of a base that is not trained: "bfloat16" halves its memory. An adapter stays in float32.
        quantization: "4bit" for QLoRA (Dettmers et al. 2023, arXiv:2305.14314); needs a GPU and bitsandbytes.
        max_new_tokens: Most tokens of a continuation.
        temperature: Of the draws of tokens; 0 takes the most likely one.

    Raises:
        ValueError: If the model cannot be loaded, or the parts do not fit each other.
        TypeError: If the adapter is of an unsupported kind.
    """

    prompt_options = ("max_new_tokens", "temperature")

    def __init__(
        self,
        pretrained: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        revision: str | None = None,
        adapter: PeftConfig | None = None,
        train: list[str] | None = None,
        freeze: list[str] | None = None,
        gradient_checkpointing: bool = False,
        frozen_dtype: FrozenDtype = "float32",
        quantization: Quantization | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_adapter("CausalLM", adapter, [*(train or ()), *(freeze or ())], gradient_checkpointing)
        if adapter is None and (frozen_dtype != "float32" or quantization is not None):
            raise ValueError(
                f"CausalLM: frozen_dtype={frozen_dtype!r} and quantization={quantization!r} are for a base that is not "
                "trained. Give an adapter."
            )
        self.pretrained, self.optimizer, self.scheduler = pretrained, optimizer, scheduler
        self.max_new_tokens, self.temperature = _checked(max_new_tokens, temperature)
        self.tokenizer = load_tokenizer("CausalLM", pretrained, revision)
        self.model: Any = load_causal_lm("CausalLM", pretrained, revision, frozen_dtype, quantization)
        if quantization is not None:
            self.model = prepare_model_for_kbit_training(self.model, gradient_checkpointing, _NON_REENTRANT)
        elif gradient_checkpointing:
            self.model.gradient_checkpointing_enable(_NON_REENTRANT)
        self.quantization = quantization
        self.adapter: PeftConfig | None = None
        if adapter is not None:
            self.model, self.adapter = adapt("CausalLM", self.model, adapter, pretrained, revision)
        trained = freeze_weights(self.model, freeze or (), train or ())
        rank_zero_info(f"CausalLM {trained}.")
        self.leave_base_out(pretrained)
        self.register_state_dict_post_hook(_drop_packing)

    @property
    def sampling_modules(self) -> list[str]:
        """The module itself, whose ``state_dict`` holds what is trained."""
        return [""]

    @override
    def sampling_settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_for("model", self.model.parameters(), self.optimizer, self.scheduler)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if (block_size := getattr(data, "block_size", None)) is not None:
            self._check_length(f"{type(data).__name__}'s block_size", block_size)
        tokens, known = len(getattr(data, "tokenizer", None) or ()), self.model.get_input_embeddings().num_embeddings
        if tokens > known:
            raise ValueError(
                f"CausalLM: the data's tokenizer must have at most the model's {known} tokens, got {tokens}. Give the "
                "data the same `pretrained` as the model."
            )

    def _check_length(self, what: str, length: int) -> None:
        positions, virtual = positions_of(self.model), virtual_tokens(self.adapter)
        if positions is not None and length + virtual > positions:
            learned = f" and {virtual} learned words" if virtual else ""
            raise ValueError(
                f"CausalLM: {self.pretrained!r} was built for texts of at most {positions} tokens, got {what} of "
                f"{length}{learned}. Lower it."
            )

    # ---- training

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        total, count = self.loss_sum(batch)
        loss = total / count.clamp(min=1)
        self.log_losses({"loss": loss}, in_bar=("loss",))
        return loss

    @override
    def validation_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch, dataloader_idx)

    @override
    def test_step(self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_perplexities("val")
        super().on_validation_epoch_end()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_perplexities("test")

    def loss_sum(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the tokens that are to be predicted.

        Args:
            batch: As ``TokenBatch`` says, ``(N, T)``. A row's first token is never predicted.

        Returns:
            The sum, nats, and the number of tokens, int64.
        """
        ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        # Only a prefix lives in the cache, which else would take memory for nothing.
        options = {} if isinstance(self.adapter, PrefixTuningConfig) else {"use_cache": False}
        logits = self.model(input_ids=ids, attention_mask=batch["attention_mask"], **options).logits
        logits = logits[:, -ids.shape[1] : -1].float()  # learned words come first
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (labels != IGNORED).sum()

    def _evaluate(self, stage: str, batch: TokenBatch, index: int) -> None:
        total, count = self.loss_sum(batch)
        # Lightning averages counts over processes as whole numbers: multiples of their number stay exact.
        weight = int(count) * self.trainer.world_size
        options: dict[str, Any] = {"batch_size": weight, "sync_dist": True, "add_dataloader_idx": False}
        self.log(f"{self._prefix(stage, index)}/loss", total / count.clamp(min=1), **options)

    def _prefix(self, stage: str, index: int) -> str:
        sets = getattr(getattr(self.trainer, "datamodule", None), "evaluation_sets", None)
        name = ("" if index == 0 else str(index)) if sets is None else sets(stage)[index]
        return f"{stage}_{name}" if name else stage

    def _log_perplexities(self, stage: str) -> None:
        for key, loss in list(self.trainer.callback_metrics.items()):
            prefix, _, name = key.partition("/")
            if name == "loss" and (prefix == stage or prefix.startswith(f"{stage}_")):
                self.log(f"{prefix}/perplexity", loss.exp())

    # ---- sampling

    @override
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Refuses: there is nothing to draw without a prompt.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "CausalLM: a language model draws texts, of prompts. Call sample_prompts(prompts), or give litgen sample a "
            "--prompt."
        )

    def sample_prompts(
        self, prompts: Sequence[str], options: PromptOptions = MODELS_OWN, generator: Generators = None
    ) -> list[str]:
        """How each prompt goes on, without the prompt.

        Args:
            prompts: ``N`` texts.
            options: ``max_new_tokens`` and ``temperature`` replace the model's own; the rest has no effect.
            generator: One for all, or one for each, so that none depends on the others.

        Raises:
            ValueError: If a number is out of range, a prompt has no token, or it gets longer than the model can read.
        """
        length, temperature = _checked(
            self.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
            self.temperature if options.temperature is None else options.temperature,
        )
        single = generator is None or isinstance(generator, torch.Generator)
        generators = [generator] * len(prompts) if single else list(generator)  # type: ignore[arg-type]
        if len(generators) != len(prompts):
            raise ValueError(f"generator: need one for each of {len(prompts)} prompts, got {len(generators)}.")
        ends, texts = end_tokens(self.model, self.tokenizer), []
        with evaluating(self.model), torch.no_grad():
            for prompt, source in zip(prompts, generators, strict=True):
                ids = encode_prompt(self.tokenizer, prompt)
                if not ids:
                    raise ValueError("CausalLM: a prompt must have at least one token, got an empty one.")
                whole = f"a prompt of {len(ids)} tokens with max_new_tokens={length}, a length"
                self._check_length(whole, len(ids) + length)
                drawn = continue_tokens(self.model, ids, ends, length, temperature, source)
                texts.append(self.tokenizer.decode(drawn, skip_special_tokens=True))
        return texts

    # ---- export

    @property
    def export_formats(self) -> tuple[str, ...]:
        """``peft``: the adapter; ``merged``: a whole model with it; ``transformers``: the trained model."""
        if self.adapter is None:
            return ("transformers",)
        return ("peft",) if self.adapter.is_prompt_learning or self.quantization else ("peft", "merged")

    def export(self, format: str, folder: Path) -> str:
        """Write into an empty folder in one of the :attr:`export_formats`; tells how to load it, in Python.

        Raises:
            ValueError: If it cannot be written in that form.
        """
        if format not in self.export_formats:
            learned = " Learned words cannot be merged into weights." if format == "merged" else ""
            raise ValueError(
                f"CausalLM: format must be one of {list(self.export_formats)} for this model, got {format!r}.{learned}"
            )
        if format == "peft":
            return self._export_adapter(folder)
        model: Any = self.model if self.adapter is None else merged(self.model)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"

    def _export_adapter(self, folder: Path) -> str:
        if self.adapter is not None and not self.adapter.is_prompt_learning:
            save_adapter(self.model, self.adapter, folder)
        else:
            self.model.save_pretrained(folder, save_embedding_layers=False)
        base = f"AutoModelForCausalLM.from_pretrained({self.pretrained!r})"
        return f"PeftModel.from_pretrained({base}, {str(folder)!r})"


def _drop_packing(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out what bitsandbytes writes beside each frozen weight: how it is packed."""
    frozen = {f"{prefix}{name}" for name, p in module.named_parameters() if not p.requires_grad}
    for key in list(state):
        parts = key.split(".")
        if any(".".join(parts[:i]) in frozen for i in range(1, len(parts))):
            del state[key]


def _checked(max_new_tokens: int, temperature: float) -> tuple[int, float]:
    if max_new_tokens < 1:
        raise ValueError(f"CausalLM: max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(f"CausalLM: temperature must not be negative, got {temperature}. 0 takes the likeliest token.")
    return max_new_tokens, temperature
