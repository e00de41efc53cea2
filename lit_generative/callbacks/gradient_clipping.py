"""Gradient clipping that knows several networks, and says how often it acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lit_generative.callbacks.mixed_precision import unscale_gradients
from lit_generative.training.checks import disjoint, find_modules, named_optimizers, unknown_name
from lit_generative.training.clipping import Part, clip_norm_, clip_units_, clip_value_, local, total_norm
from lit_generative.training.run import log_now

Bound = float | dict[str, float] | None
Clip = Callable[[Part, list[Tensor], Tensor], Tensor]


@dataclass
class _Record:
    """What happened since the last log. On the device, so that nothing waits for it."""

    steps: int = 0
    clipped: Tensor | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)


class GradientClipping(L.Callback):
    """Clips gradients before every optimizer step, whatever the precision and the kind of optimization.

    Exactly one of ``max_norm``, ``max_value`` and ``adaptive`` is given. A number holds for each optimizer by itself: a
    GAN's generator never scales its discriminator's gradients. A dictionary gives parts their own numbers and leaves
    the rest alone; its keys are parameter groups' names, as ``"generator"`` in a GAN, or sub-modules' dotted names.
    Where one part lies within another, its parameters are clipped with it alone; parts that overlap otherwise are
    refused. For two kinds at once, list two of these callbacks; on the same part the log shows the later one.

    A norm that is not finite clips nothing: scaling by it would turn every gradient into NaN or zero. It shows in the
    log. Under ``16-mixed`` the loss scaler skips such a step; in other precisions see ``zero_nonfinite``.

    Logs, every ``log_every_n_steps``: ``train/grad_norm/<name>`` and ``train/grad_norm_clipped/<name>``, the norms
    before and after at the last step, and ``train/clipped_share/<name>``, the share of steps since the last log that
    clipped anything. The share starts anew when a run resumes; nothing else depends on the past.

    Works with DDP and FSDP2 (``ModelParallelStrategy``), where norms are those of the whole gradient.

    Args:
        max_norm: Bound of the norm of all gradients of a part together (Pascanu et al. 2013, arXiv:1211.5063), with
            torch's factor ``min(1, max_norm / (norm + 1e-6))``. Infinity only measures.
        max_value: Bound of each entry's magnitude. An infinite entry is clipped too; NaN stays.
        adaptive: Bound of ``|G| / max(|W|, 1e-3)`` for each output unit's weights ``W`` and gradients ``G`` (adaptive
            gradient clipping, Brock et al. 2021, arXiv:2102.06171, Eq. 3); the norms are Euclidean. Biases and gains
            are one unit each. The paper does not clip the last linear layer: name it in ``exclude``.
        norm_type: Order of the norm in ``max_norm`` and in the log; infinity is the largest magnitude.
        exclude: Sub-modules that are never clipped nor counted in a norm: dotted names or patterns (``"*.head"``).
        zero_nonfinite: Whether a step whose norm is not finite gets zero gradients; momentum and decay still act.

    Raises:
        ValueError: If not exactly one kind is given, or a number is not positive; at the start of training, if a name
            is unknown, parts overlap, the Trainer clips too, or the strategy hides gradients (FSDP1, DeepSpeed).
    """

    def __init__(
        self,
        max_norm: float | dict[str, float] | None = None,
        max_value: float | dict[str, float] | None = None,
        adaptive: float | dict[str, float] | None = None,
        norm_type: float = 2.0,
        exclude: list[str] | None = None,
        zero_nonfinite: bool = False,
    ) -> None:
        kinds: dict[str, tuple[Bound, Clip]] = {
            "max_norm": (max_norm, clip_norm_),
            "max_value": (max_value, clip_value_),
            "adaptive": (adaptive, clip_units_),
        }
        given = [name for name, (bound, _) in kinds.items() if bound is not None]
        if len(given) != 1:
            raise ValueError(
                f"GradientClipping: exactly one of {', '.join(kinds)} must be given, got {given or 'none'}. "
                "List the callback twice for two kinds."
            )
        bound, self._clip = kinds[given[0]]
        if bound == {}:
            raise ValueError(f"GradientClipping: {given[0]} must name a part, got {{}}. Leave the callback out.")
        for value in [norm_type, *(bound.values() if isinstance(bound, dict) else [bound])]:
            if not value > 0:  # type: ignore[operator]
                raise ValueError(
                    f"GradientClipping: {given[0]} and norm_type must be positive, got {value}. "
                    "Leave the callback out to clip nothing."
                )
        self.bound: float | dict[str, float] = bound  # type: ignore[assignment]
        self.norm_type = float(norm_type)
        self.exclude = exclude
        self.zero_nonfinite = zero_nonfinite
        self._parts: dict[int, tuple[Any, list[Part]]] = {}
        self._records: dict[str, _Record] = {}

    # ---- what is clipped together

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.gradient_clip_val:
            raise ValueError(
                f"GradientClipping: Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip a second time. "
                "Leave it out."
            )
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"GradientClipping: {type(trainer.strategy).__name__} shows each process a part of the gradients only, "
                "so their norm is unknown. Use DDP, or FSDP2 (ModelParallelStrategy)."
            )
        find_modules("GradientClipping", pl_module, self.exclude or [])

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts, self._records = {}, {}
        for optimizer in trainer.optimizers:
            self._parts_of(trainer, pl_module, optimizer)

    def _parts_of(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> list[Part]:
        # Groups grow when layers are unfrozen, and are new ones when a run resumes.
        seen = [(id(group["params"]), len(group["params"])) for group in optimizer.param_groups]
        known, parts = self._parts.get(id(optimizer), (None, []))
        if known != seen:
            parts = self._divide(trainer, module, optimizer)
            self._parts[id(optimizer)] = (seen, parts)
        return parts

    def _divide(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> list[Part]:
        optimizers = named_optimizers(trainer.optimizers)
        own = {id(p): p for p in _parameters(optimizer)}
        for excluded in find_modules("GradientClipping", module, self.exclude or []).values():
            for p in excluded.parameters():
                own.pop(id(p), None)
        name = next(name for name, other in optimizers.items() if other is optimizer)
        if not isinstance(self.bound, dict):
            return [self._part(module, name, self.bound, list(own.values()))]
        members = disjoint("GradientClipping", self._members(module, list(optimizers.values())))
        parts = []
        for key, bound in self.bound.items():
            split = any(
                id(p) in members[key] for o in optimizers.values() if o is not optimizer for p in _parameters(o)
            )
            parameters = [p for i, p in own.items() if i in members[key]]
            parts.append(self._part(module, f"{key}/{name}" if split else key, bound, parameters))
        return [part for part in parts if part.parameters]

    def _part(self, module: nn.Module, name: str, bound: float, parameters: list[nn.Parameter]) -> Part:
        transposed = {
            id(m.weight)
            for m in module.modules()
            if isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        }
        self._records.setdefault(name, _Record())
        return Part(name, bound, parameters, [int(id(p) in transposed) for p in parameters])

    def _members(self, module: L.LightningModule, optimizers: list[Optimizer]) -> dict[str, set[int]]:
        modules = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
        groups: dict[str, set[int]] = {}
        for group in (g for optimizer in optimizers for g in optimizer.param_groups if "name" in g):
            groups.setdefault(group["name"], set()).update(map(id, group["params"]))
        owned = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
        members = {}
        for name in self.bound:  # type: ignore[union-attr]
            if name not in groups and name not in modules:
                what = f"{type(module).__name__} has no parameter group and no sub-module"
                raise unknown_name("GradientClipping", what, name, [*groups, *modules])
            members[name] = groups[name] if name in groups else {id(p) for p in modules[name].parameters()} & owned
        return members

    # ---- clipping

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        unscale_gradients(trainer, optimizer)
        log = log_now(trainer)
        for part in self._parts_of(trainer, pl_module, optimizer):
            if any(p.grad is not None for p in part.parameters):
                self._act(part, log)

    def _act(self, part: Part, log: bool) -> None:
        record = self._records[part.name]
        grads = [p.grad for p in part.parameters if p.grad is not None]
        before = total_norm(grads, self.norm_type)
        if self.zero_nonfinite:
            for grad in map(local, grads):
                grad.masked_fill_(~before.isfinite(), 0)
        clipped = self._clip(part, grads, before)
        record.steps += 1
        record.clipped = clipped.float() if record.clipped is None else record.clipped.add_(clipped)
        if log:
            record.norms = {"grad_norm": before, "grad_norm_clipped": total_norm(grads, self.norm_type)}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if not log_now(trainer):
            return
        for name, record in self._records.items():
            if record.clipped is not None and record.norms:
                for key, value in record.norms.items():
                    pl_module.log(f"train/{key}/{name}", value)
                pl_module.log(f"train/clipped_share/{name}", record.clipped / record.steps)
                self._records[name] = _Record()


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
