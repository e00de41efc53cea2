"""Optimizer and schedule settings on resume: what the config changed since the checkpoint wins.

Torch's optimizers restore their learning rate and betas from the checkpoint, so a changed config would be ignored
without a word. And a validation that a checkpoint was written just before must still be run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_generative.recipe import constructor_arguments, describe
from lit_generative.training.lr_schedules import PLATEAUS, monitored

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
        if isinstance(schedule, ReduceLROnPlateau) and any(was.get(k) != now.get(k) for k in ("monitor", "mode")):
            _forget_best(schedule)


def validation_state(trainer: L.Trainer) -> dict[str, Any]:
    """What a checkpoint must hold for plateau schedules to see every score, as plain data.

    Args:
        trainer: Just writing the checkpoint.

    Returns:
        ``is_due``: whether a validation follows the batch that just ended; ``scores``: the last of those watched.
    """
    keys = [monitored(schedule) for schedule in _plateaus(trainer)]
    scores = {key: float(trainer.callback_metrics[key]) for key in keys if key in trainer.callback_metrics}
    return {"is_due": _validation_is_due(trainer), "scores": scores}


def resume_validation(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    """Run the validation that followed the checkpoint, before training goes on, if a plateau schedule watches.

    Lightning skips it, so the schedule would miss a score.

    Args:
        trainer: About to go on.
        saved: From :func:`validation_state`.
    """
    if not _plateaus(trainer):
        return
    trainer.callback_metrics.update({key: torch.tensor(score) for key, score in saved["scores"].items()})
    if saved["is_due"]:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True


def _plateaus(trainer: L.Trainer) -> list[Any]:
    return [c.scheduler for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, PLATEAUS)]


def _validation_is_due(trainer: L.Trainer) -> bool:
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    progress: Any = loop.batch_progress.current
    if fetcher is None or progress.completed == progress.processed:  # not in training, or after the validation
        return False
    stops, trainer.should_stop = trainer.should_stop, False  # the validation before an early end is none of the run's
    try:
        return loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stops


def _forget_best(schedule: ReduceLROnPlateau) -> None:
    """The best of another score says nothing of this one."""
    schedule._init_is_better(schedule.mode, schedule.threshold, schedule.threshold_mode)
    schedule._reset()


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
    names |= {"min_lrs"}  # what ReduceLROnPlateau makes of min_lr
    return {
        name: _plain(value) for name, value in vars(schedule).items() if name in names and _plain(value) is not None
    }


def _plain(value: Any) -> Any:
    try:
        return describe(value)
    except TypeError:  # a tensor learning rate, a closure: nothing a config can change
        return None
