"""Which weights are trained, by patterns on their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_generative.training.checks import unknown_name


class Trainable(NamedTuple):
    """How many weights are trained."""

    trained: int
    total: int
    by_pattern: dict[str, int]
    """Weights that each pattern names."""

    def __str__(self) -> str:
        share = 100 * self.trained / max(self.total, 1)
        told = "".join(f"; {pattern}: {count:,}" for pattern, count in self.by_pattern.items())
        return f"trains {self.trained:,} of {self.total:,} weights ({share:.{2 if share < 99.5 else 3}g} %){told}"


def freeze(module: nn.Module, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> Trainable:
    """Train nothing but what ``train`` names, and of that nothing that ``freeze`` names.

    A pattern is a dotted name of a sub-module or a parameter, where ``*`` stands for any letters: ``mapping``,
    ``layers.0``, ``*.bias``. It names all parameters below.

    Args:
        module: Its parameters get ``requires_grad``.
        freeze: What is not trained.
        train: What is trained; empty for everything that is now.

    Returns:
        What that leaves.

    Raises:
        ValueError: If a pattern names nothing, or nothing is left to train.
    """
    named = {pattern: matching(module, pattern) for pattern in (*train, *freeze)}
    everything = [name for name, _ in module.named_parameters()]
    kept = {name for pattern in train for name in named[pattern]} if train else set(everything)
    kept -= {name for pattern in freeze for name in named[pattern]}
    sizes = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in kept and (bool(train) or parameter.requires_grad))
        sizes[name] = parameter.numel()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{type(module).__name__}: freeze={list(freeze)} and train={list(train)} leave nothing to train."
        )
    hold_statistics(module)
    return report(module)._replace(
        by_pattern={pattern: sum(sizes[name] for name in names) for pattern, names in named.items()}
    )


def report(module: nn.Module) -> Trainable:
    """How many weights of a module ask for a gradient now."""
    return Trainable(count_trained(module), sum(parameter.numel() for parameter in module.parameters()), {})


def matching(module: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that a pattern of :func:`freeze` names.

    Raises:
        ValueError: If there are none; the message lists near names.
    """
    names = [name for name, _ in module.named_parameters() if _matches(name, pattern)]
    if names:
        return names
    known = [".".join(n.split(".")[:i]) for n, _ in module.named_parameters() for i in range(1, n.count(".") + 2)]
    raise unknown_name(type(module).__name__, "no parameter is named by the pattern", pattern, known)


def count_trained(module: nn.Module) -> int:
    """How many weights ask for a gradient."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def hold_statistics(module: nn.Module) -> None:
    """Put batch norms whose own weights are all frozen into evaluation mode, or their statistics would follow the data.

    Those without weights are left alone. To be called after each ``module.train()``.
    """
    for part in module.modules():
        own = list(part.parameters(recurse=False)) if isinstance(part, _BatchNorm) else []
        if own and not any(parameter.requires_grad for parameter in own):
            part.eval()


def release_statistics(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let the batch norms that own some of these parameters follow the data again."""
    released = {id(parameter) for parameter in parameters}
    for part in module.modules():
        if isinstance(part, _BatchNorm) and any(id(p) in released for p in part.parameters(recurse=False)):
            part.train()


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern fits a parameter's name, or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
