"""Opening a pretrained model for training part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lit_generative.training.freezing import count_trained, hold_statistics, matching, release_statistics
from lit_generative.training.module import GenerativeModule
from lit_generative.training.parameter_groups import RateScale


class GradualUnfreezing(L.Callback):
    """Trains the first stage alone, then the first two, and so on; with lower rates for later stages if wanted.

    Every stage is in the optimizer from the start, so schedules see one set of groups; a frozen parameter has no
    gradient, and optimizers pass it by. What is open depends on the epoch or step alone, so a resumed run has the same
    stages open. What no stage names stays as the module has it. Batch norms that are frozen keep their statistics.

    Source: Howard & Ruder 2018, sec. 3.3 (arXiv:1801.06146); rates by stage ("discriminative"): sec. 3.2, with 1/2.6.

    Args:
        stages: Of each stage, patterns of what it opens, as :func:`lit_generative.training.freezing.freeze` takes them;
            the first is open from the start, usually the head.
        every: Epochs or steps from one stage to the next.
        milestones: In place of ``every``, when each stage but the first opens.
        unit: What both count: ``epoch``, or ``step`` for updates (``trainer.global_step``).
        rate_decay: Factor on the learning rate from one stage to the next.

    Raises:
        ValueError: If numbers do not fit, or a stage names nothing, weights of an earlier stage, or weights that the
            module does not train; under ``ddp`` with automatic optimization, which needs
            ``ddp_find_unused_parameters_true``.
        TypeError: If ``rate_decay`` is used with a module that is none of ours.
    """

    def __init__(
        self,
        stages: list[list[str]],
        every: int | None = None,
        milestones: list[int] | None = None,
        unit: Literal["epoch", "step"] = "epoch",
        rate_decay: float = 1.0,
    ) -> None:
        if len(stages) < 2 or not all(stages):
            raise ValueError(f"GradualUnfreezing: stages must be at least two lists of patterns, got {stages}.")
        if (every is None) == (milestones is None):
            raise ValueError(
                f"GradualUnfreezing: give every or milestones, got every={every}, milestones={milestones}."
            )
        if every is not None and every < 1:
            raise ValueError(f"GradualUnfreezing: every must be at least 1, got {every}.")
        if milestones is not None and (
            len(milestones) != len(stages) - 1 or milestones != sorted(set(milestones)) or min(milestones) < 1
        ):
            raise ValueError(
                f"GradualUnfreezing: {len(stages)} stages need {len(stages) - 1} rising milestones from 1 on, got "
                f"{milestones}."
            )
        if unit not in ("epoch", "step"):
            raise ValueError(f"GradualUnfreezing: unit must be epoch or step, got {unit!r}.")
        if not 0 < rate_decay <= 1:
            raise ValueError(f"GradualUnfreezing: rate_decay must lie in (0, 1], got {rate_decay}.")
        self.stages = stages
        self.opens = [0, *(milestones or [(every or 1) * i for i in range(1, len(stages))])]
        self.unit = unit
        self.rate_decay = rate_decay
        self._parameters: list[list[nn.Parameter]] = []
        self._open: int | None = None

    def num_open(self, now: int) -> int:
        """How many stages are open after ``now`` epochs or steps."""
        return sum(now >= start for start in self.opens)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._open = None
        self._parameters = self._find(pl_module)
        strategy = trainer.strategy
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters", False)
        if waits and pl_module.automatic_optimization:
            raise ValueError(
                "GradualUnfreezing: ddp waits for gradients of frozen weights. Use the strategy "
                "ddp_find_unused_parameters_true."
            )
        if self.rate_decay < 1:
            if not isinstance(pl_module, GenerativeModule):
                raise TypeError(
                    f"GradualUnfreezing: rate_decay needs a GenerativeModule, got {type(pl_module).__name__}. Give its "
                    "optimizer groups with rates of their own."
                )
            scales = [RateScale(tuple(p), self.rate_decay**i) for i, p in enumerate(self.stages)]
            pl_module.rate_scales = [*pl_module.rate_scales, *scales[1:]]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = self.num_open(trainer.current_epoch if self.unit == "epoch" else trainer.global_step)
        if now == self._open:
            return
        self._open = now
        for i, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(i < now)
                if i >= now:
                    parameter.grad = None
        release_statistics(pl_module, (p for part in self._parameters[:now] for p in part))
        hold_statistics(pl_module)
        count = count_trained(pl_module)
        rank_zero_info(f"GradualUnfreezing: {now} of {len(self.stages)} stages are open, {count:,} weights train.")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _find(self, module: nn.Module) -> list[list[nn.Parameter]]:
        by_name = dict(module.named_parameters())
        taken: dict[str, int] = {}
        found = []
        for i, patterns in enumerate(self.stages):
            names = list(dict.fromkeys(name for pattern in patterns for name in matching(module, pattern)))
            self._check(i, names, taken, [name for name in names if not by_name[name].requires_grad])
            taken |= dict.fromkeys(names, i)
            found.append([by_name[name] for name in names])
        return found

    def _check(self, i: int, names: Sequence[str], taken: dict[str, int], frozen: Sequence[str]) -> None:
        for name in names:
            if name in taken:
                raise ValueError(
                    f"GradualUnfreezing: stage {i} names {name}, which stage {taken[name]} opens already. Name it once."
                )
        if frozen:
            raise ValueError(
                f"GradualUnfreezing: stage {i} names {frozen[0]}, which the module never trains. Let the module train "
                "it (its freeze, train or adapter), or leave it out."
            )
