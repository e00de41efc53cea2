"""What must fit together, checked before it fails deep inside torch: data, checkpoint, module and names."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_generative.recipe import class_path
from lit_generative.types import DescribesData


def check_data(module: nn.Module, data: object) -> None:
    """Networks that state a ``sample_shape`` and ``num_classes`` must state those of the data.

    Args:
        module: Its sub-modules are looked at, at any depth; those that it names as ``latent_modules`` see no examples.
        data: The trainer's data module; one that does not describe itself is not checked.

    Raises:
        ValueError: If a shape or number of classes differs.
    """
    if not isinstance(data, DescribesData):
        return
    for name, network in module.named_modules():
        shape, classes = getattr(network, "sample_shape", None), getattr(network, "num_classes", None)
        on_latents = name.partition(".")[0] in getattr(module, "latent_modules", ())
        who = f"{f'model.{name}' if name else 'model'} ({type(network).__name__})"
        if shape is not None and not on_latents and tuple(shape) != tuple(data.sample_shape):
            raise ValueError(
                f"{who} takes examples of shape {tuple(shape)}, but {type(data).__name__} yields "
                f"{tuple(data.sample_shape)}. Set the network's image_size and channels to those of the data."
            )
        if shape is not None and classes is not None and classes != data.num_classes:
            raise ValueError(
                f"{who} takes labels of {classes} classes, but {type(data).__name__} has "
                f"{data.num_classes or 'no'} classes. Set the network's num_classes to "
                f"{data.num_classes if data.num_classes else 'null'}."
            )


def check_class(module: nn.Module, saved: str | None) -> None:
    """A checkpoint must hold the class it is loaded into.

    Args:
        module: What is loaded into.
        saved: Class path in the checkpoint, if it names one.

    Raises:
        ValueError: If it is another class.
    """
    if saved is None:
        return
    package, _, name = saved.rpartition(".")
    cls = getattr(sys.modules.get(package), name, None)
    if cls is not type(module) and name != type(module).__name__:
        raise ValueError(
            f"The checkpoint holds a {name}, but the model is a {type(module).__name__}. "
            "Give the checkpoint of such a run, or the config that the checkpoint was trained with."
        )


def check_weights(module: L.LightningModule, state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """A checkpoint's weights must fit; if not, say which settings differ instead of listing every tensor.

    Args:
        module: What is loaded into.
        state: The checkpoint's ``state_dict``.
        saved: The checkpoint's hyperparameters.

    Raises:
        ValueError: If a name or shape differs.
    """
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    other = {key: tuple(value.shape) for key, value in state.items()}
    if own == other or not module.strict_loading:
        return
    key = next(k for k in [*own, *other] if own.get(k) != other.get(k))
    changed = [
        f"{name}: {_short(saved[name])} in the checkpoint, {_short(value)} here"
        for name, value in module.hparams.items()
        if name in saved and saved[name] != value and not name.startswith("_")
    ]
    raise ValueError(
        f"The checkpoint's weights do not fit this {type(module).__name__}: {key} has shape {other.get(key)} there, "
        f"{own.get(key)} here. " + ("Different settings: " + "; ".join(changed) if changed else "")
    )


def check_trainer(module: L.LightningModule, trainer: L.Trainer, stage: str) -> None:
    """Refuse a precision or a strategy that the module cannot work with, and training without a callback it needs.

    Args:
        module: Named in the message; a part of it may name the path of a callback as ``needed_callback``.
        trainer: Its settings.
        stage: ``fit`` or another.

    Raises:
        ValueError: If the weights would be of another type than noise and images, the graph may not change, or such a
            callback is missing.
    """
    who, precision = type(module).__name__, str(trainer.precision)
    if precision in ("16-true", "bf16-true", "64-true"):
        raise ValueError(
            f"{who}: noise and images are float32, so precision={precision!r} cannot work. "
            "Use 32-true, bf16-mixed or 16-mixed."
        )
    needed = {name for part in module.modules() if (name := getattr(part, "needed_callback", None)) is not None}
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    missing = needed - {class_path(kind) for callback in callbacks for kind in type(callback).__mro__}
    if stage == "fit" and missing:
        raise ValueError(f"{who}: a part of it cannot be trained without {min(missing)}. Add it to trainer.callbacks.")
    strategy = trainer.strategy
    takes_turns = stage == "fit" and not module.automatic_optimization and isinstance(strategy, DDPStrategy)
    if takes_turns and strategy._ddp_kwargs.get("static_graph"):  # type: ignore[attr-defined]
        raise ValueError(
            f"{who}: optimizers that take turns change the graph, so DDPStrategy must not have static_graph=True. "
            "Leave it out."
        )


def check_gives_logits(who: str, discriminator: nn.Module) -> None:
    """Refuse a discriminator that gives probabilities.

    Args:
        who: Named in the message.
        discriminator: Its last layer is looked at.

    Raises:
        ValueError: If that is a sigmoid.
    """
    *_, last = discriminator.modules()
    if isinstance(last, nn.Sigmoid | nn.LogSigmoid):
        raise ValueError(
            f"{who}: the discriminator must give logits, and {type(discriminator).__name__} ends in a "
            f"{type(last).__name__}. Leave it out: the losses are of logits."
        )


def find_modules(who: str, module: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Sub-modules by dotted name, as in ``"generator.layers.0"``, or by pattern, as in ``"*.norm*"``.

    Args:
        who: Whose argument it is, for the message.
        module: Its sub-modules are looked at, at any depth; itself is not one of them.
        patterns: Names, or patterns as in :mod:`fnmatch`, case-sensitive.

    Returns:
        What was found, by dotted name, each once, in the order of the module.

    Raises:
        ValueError: If a name or pattern finds nothing; the message holds the nearest names.
    """
    known = dict(module.named_modules(remove_duplicate=False))
    known.pop("")
    wanted: set[str] = set()
    for pattern in patterns:
        found = {pattern} & known.keys() or {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise unknown_name(who, f"{type(module).__name__} has no sub-module", pattern, known)
        wanted |= found
    return {name: child for name, child in known.items() if name in wanted}


def unknown_name(who: str, what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of those there are, which lists the nearest.

    Args:
        who: Whose argument it is.
        what: What is missing, as in ``"GAN has no sub-module"``.
        name: What was asked for.
        known: What there is.
    """
    return ValueError(f"{who}: {what} {name!r}. {near_names(name, known)}")


def near_names(wanted: str, known: Iterable[str]) -> str:
    """A sentence with the names most like ``wanted``: whole dotted names, or ends of them."""
    by_end: dict[str, str] = {}
    for name in known:
        parts = name.split(".")
        for i in range(len(parts)):
            by_end.setdefault(".".join(parts[i:]), name)
    near = list(dict.fromkeys(by_end[end] for end in difflib.get_close_matches(wanted, list(by_end), n=5)))
    shown = near or sorted({name.partition(".")[0] for name in by_end.values()})
    return f"{'The nearest are' if near else 'It has'}: {', '.join(shown)}."


def named_optimizers(optimizers: Iterable[Optimizer]) -> dict[str, Optimizer]:
    """Optimizers by the name of their first parameter group, which ``GenerativeModule.optimizer_for`` gives.

    So a name stays when groups are added. One without is ``optimizer``; a name that is taken gets ``-1``, ``-2``.
    """
    named: dict[str, Optimizer] = {}
    for optimizer in optimizers:
        base = name = str(optimizer.param_groups[0].get("name", "optimizer"))
        for number in itertools.count(1):
            if name not in named:
                break
            name = f"{base}-{number}"
        named[name] = optimizer
    return named


def disjoint(who: str, members: dict[str, set[int]]) -> dict[str, set[int]]:
    """Take from each part the smaller parts within it.

    Args:
        who: Whose argument it is.
        members: Ids of parameters by the part's name.

    Returns:
        The same names; no two share a parameter.

    Raises:
        ValueError: If two parts share parameters and neither lies within the other.
    """
    result = {name: set(ids) for name, ids in members.items()}
    for (a, ids), (b, others) in itertools.permutations(members.items(), 2):
        if ids > others:
            result[a] -= others
        elif ids & others and not ids < others:
            raise ValueError(
                f"{who}: {a!r} and {b!r} share parameters, which would be taken twice. "
                "Name parts that are apart, or one within the other."
            )
    return result


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{k}={v}" for k, v in (value.get("init_args") or {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({arguments})"
    return str(value)
