"""Adapters of language models: within the layers, or learned words before the text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from peft import PeftConfig, PrefixTuningConfig, TaskType, get_peft_model

from lit_generative.finetune.adapters import inject


def adapt(who: str, model: Any, adapter: PeftConfig, pretrained: str, revision: str | None) -> tuple[Any, PeftConfig]:
    """Put an adapter on a causal language model; nothing but the adapter is trained then.

    Args:
        who: Named in messages.
        model: Of transformers; changed in place.
        adapter: Which adapter; not changed. With prompt tuning (Lester et al. 2021, arXiv:2104.08691), prefix tuning
            (Li & Liang 2021, arXiv:2101.00190) or p-tuning (Liu et al. 2021, arXiv:2103.10385) the model is wrapped.
        pretrained: Where the model came from, for whoever loads the adapter.
        revision: Likewise.

    Returns:
        The model to call, and the config as used.

    Raises:
        ValueError: If the config does not fit the model.
    """
    adapter = copy.deepcopy(adapter)
    adapter.task_type = TaskType.CAUSAL_LM
    adapter.base_model_name_or_path, adapter.revision = pretrained, revision
    if not adapter.is_prompt_learning:
        used = inject(who, model, adapter)
        for parameter in model.parameters():
            if parameter.requires_grad:  # PEFT gives it the frozen weights' dtype, too coarse for small steps
                parameter.data = parameter.data.float()
        return model, used
    try:
        return get_peft_model(model, adapter), adapter
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{who}: {type(adapter).__name__} does not fit: {str(error).splitlines()[0]}") from error


def check_adapter(who: str, adapter: PeftConfig | None, patterns: Sequence[str], gradient_checkpointing: bool) -> None:
    """Refuse an adapter that could not be trained so.

    Args:
        who: Named in messages.
        adapter: Which; None is fine.
        patterns: Those that choose among the model's own weights.
        gradient_checkpointing: Whether activations are computed twice.

    Raises:
        ValueError: If weights are chosen beside an adapter, or prefix tuning is to keep no activations.
        TypeError: If the adapter is of another task.
    """
    if adapter is None:
        return
    if adapter.task_type not in (None, TaskType.CAUSAL_LM):
        raise TypeError(f"{who}: the adapter's task_type must be CAUSAL_LM, got {adapter.task_type}. Leave it out.")
    if patterns:
        raise ValueError(
            f"{who}: train and freeze, here {list(patterns)}, choose among the base's weights, which an adapter leaves "
            "frozen. Name its layers in target_modules, and layers to train whole in modules_to_save."
        )
    if gradient_checkpointing and isinstance(adapter, PrefixTuningConfig):
        raise ValueError(
            f"{who}: prefix tuning keeps its prefix in the cache, which gradient checkpointing empties. Set "
            "gradient_checkpointing to false."
        )


def virtual_tokens(adapter: PeftConfig | None) -> int:
    """How many positions of the model the adapter takes for itself."""
    return int(adapter.num_virtual_tokens) if adapter is not None and adapter.is_prompt_learning else 0
