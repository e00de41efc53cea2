"""Optimizer and schedule settings on resume: what the config changed since the checkpoint wins.

Torch's optimizers restore their learning rate and betas from the checkpoint, so a changed config would be ignored
without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LRScheduler

from lit_generative.recipe import constructor_arguments, describe

Options = list[dict[str, Any]]
Configured = Sequence[dict[str, Any]] | dict[str, Any]
"""What ``configure_optimizers`` gives, in Lightning's dictionary form."""


def optimization_options(configured: Configured) -> Options:
    """Settings of freshly configured optimizers and schedules, as plain data, one dictionary an optimizer."""
    return [
        {
            "groups": [_group_options(group) for group in entry["optimizer"].param_groups],
            "schedule": None if schedule is None else _schedule_options(schedule),
        }
        for entry in _entries(configured)
        for schedule in [_schedule(entry)]
    ]


def apply_changed_options(trainer: L.Trainer, saved: Options, configured: Configured) -> None:
    """Set what changed since the checkpoint on the restored optimizers and schedules.

    A changed learning rate scales the current one, so that a schedule keeps its place.

    Args:
        trainer: Its optimizers and schedules are restored already.
        saved: Settings that the checkpoint was written with.
        configured: What the config of now gives.
    """
    entries = _entries(configured)
    for optimizer, old, new, entry in zip(
        trainer.optimizers, saved, optimization_options(configured), entries, strict=True
    ):
        schedule = next((c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer), None)
        for index, (group, was, now) in enumerate(
            zip(optimizer.param_groups, old["groups"], new["groups"], strict=True)
        ):
            for key in [k for k in now if was.get(k) != now[k]]:
                _announce(f"{now.get('name', 'optimizer')}.{key}", was.get(key), now[key])
                if key == "lr" and was.get("lr"):
                    _scale_rate(group, schedule, index, now["lr"] / was["lr"])
                else:
                    group[key] = tuple(now[key]) if isinstance(now[key], list) else now[key]
            if schedule is None and old["schedule"] is not None:
                group["lr"] = now["lr"]  # the schedule that lowered it is gone
        was, now = old["schedule"] or {}, new["schedule"] or {}
        for key in [k for k in now if was.get(k) != now[k]]:
            _announce(f"schedule.{key}", was.get(key), now[key])
            setattr(schedule, key, getattr(_schedule(entry), key))


def _entries(configured: Configured) -> list[dict[str, Any]]:
    return [configured] if isinstance(configured, dict) else list(configured)


def _schedule(entry: dict[str, Any]) -> Any:
    return entry["lr_scheduler"]["scheduler"] if "lr_scheduler" in entry else None


def _announce(name: str, was: Any, now: Any) -> None:
    rank_zero_info(f"Resuming with {name}={now} from the config; the checkpoint had {was}.")


def _scale_rate(group: dict[str, Any], schedule: LRScheduler | None, index: int, factor: float) -> None:
    group["lr"] *= factor
    if "initial_lr" in group:
        group["initial_lr"] *= factor
    if schedule is not None and hasattr(schedule, "base_lrs"):
        schedule.base_lrs[index] *= factor


def _group_options(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: _plain(value) for key, value in group.items() if key not in ("params", "initial_lr")}
    options["lr"] = float(group.get("initial_lr", group["lr"]))
    return options


def _schedule_options(schedule: Any) -> dict[str, Any]:
    names = set(constructor_arguments(type(schedule))) - {"optimizer", "last_epoch"}
    return {
        name: _plain(value) for name, value in vars(schedule).items() if name in names and _plain(value) is not None
    }


def _plain(value: Any) -> Any:
    try:
        return describe(value)
    except TypeError:  # a tensor learning rate, a closure: nothing a config can change
        return None
