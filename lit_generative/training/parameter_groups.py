"""Groups of parameters whose learning rates differ by a factor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from lit_generative.training.freezing import matching


class RateScale(NamedTuple):
    """A factor on the learning rate of some parameters."""

    patterns: tuple[str, ...]
    """Whose: patterns as :func:`lit_generative.training.freezing.freeze` takes them, on the whole module's names."""
    scale: float


def build_optimizer(
    module: nn.Module,
    name: str,
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    scales: Sequence[RateScale] = (),
) -> Optimizer:
    """An optimizer of one group for each factor that applies, those without a factor first.

    Args:
        module: Holds the parameters, whose names the patterns are of.
        name: Name of the first group; the next are ``<name>-1`` and so on.
        parameters: What is optimized; those that ask for no gradient are left out.
        optimizer: Builds it from groups.
        scales: The first that names a parameter counts.

    Raises:
        ValueError: If a pattern names nothing.
    """
    factors: dict[str, float] = {}
    for patterns, scale in scales:
        for pattern in patterns:
            for key in matching(module, pattern):
                factors.setdefault(key, scale)
    by_id = {id(parameter): factors.get(key, 1.0) for key, parameter in module.named_parameters()}
    parts: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in parameters:
        if parameter.requires_grad:
            parts.setdefault(by_id[id(parameter)], []).append(parameter)
    filled = {scale: part for scale, part in parts.items() if part or len(parts) == 1}
    groups = [{"params": part, "name": f"{name}-{i}" if i else name} for i, part in enumerate(filled.values())]
    built = optimizer(groups)  # type: ignore[arg-type]
    for group, scale in zip(built.param_groups, filled, strict=True):
        group["lr"] *= scale
    return built
