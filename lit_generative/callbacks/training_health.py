"""Failures of training, told by name and update while they happen, or made to stop it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, cast

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.callbacks.mixed_precision import loss_scaler, unscale_gradients
from lit_generative.metrics.processes import num_processes
from lit_generative.tensor_ops import sample_generators
from lit_generative.training.checks import named_optimizers
from lit_generative.training.clipping import local, total_norm
from lit_generative.training.run import log_now
from lit_generative.types import SupportsSampling

VANISHED = 1e-3
"""Share of its largest logged norm below which the generator's gradient has vanished."""
LOST = 0.5
"""Share of the highest coverage below which modes were lost."""
CALM = "Lower the learning rate, or clip gradients; log_every_n_steps=1 shows where it begins."
SPREAD = "Use packing, a relativistic loss, or a penalty on the discriminator's gradient."
Findings = dict[str, tuple[str, str]]
"""By kind: what happened, and what to do."""


class TrainingHealth(L.Callback):
    """Warns of a failure when it begins, and stops training if asked; a healthy run hears nothing.

    * **Not a number**: a loss, penalty or other ``train/<name>``, or an optimizer's gradient, is NaN or infinite.
    * **Explosion**: an optimizer's gradient norm is ``explosion`` times the median of its first ``window`` logged ones.
    * **Saturation**: the discriminator is sure of data and samples (``train/real_logits`` and ``train/fake_logits``
      beyond ``saturation`` on their sides) and the generator's gradient has vanished, ``window`` logged updates in a
      row. The optimizer whose group is named ``generator`` is the generator's.
    * **Collapse**: the mean distance of pairs among ``num_samples`` samples of fixed noise, as a share of that among as
      many images of the batch, falls below ``collapse`` of its highest, where more than 1 counts as 1; or it is below
      ``collapse`` at ``window`` samplings in a row, having never risen. Or ``coverage`` falls below half its highest.

    Losses and norms are read at every ``log_every_n_steps``-th update, and nothing waits for the device between them.
    There, the norms of the first and last gradient of each optimizer are kept on the device: what is not a number
    spreads to the weights and so to all, and their update is named afterwards. So the update is right to within one,
    while the first loss to fail is named for certain only with ``log_every_n_steps=1``. Under ``16-mixed`` overflowing
    gradients are the loss scaler's business (see MixedPrecision), and losses alone are looked at.

    Logs ``train/unhealthy``, the number of failures there are now, and ``train/sample_distance``, that share of the
    data's distance. Samples come from the averaged weights where there are any; training's random numbers are
    untouched. Put it before GradientClipping, which would hide an explosion. Any process's failure is every process's.

    Args:
        stop: Whether a failure raises an error, in every process, before a checkpoint is written.
        window: Logged updates, or samplings, in a row that confirm what may pass.
        saturation: Mean logit beyond which the discriminator is sure; None leaves the check out.
        explosion: Factor of the first norms; None leaves the check out.
        collapse: Share of the highest distance below which variety is lost.
        coverage: Key of a metric that is high when all modes are drawn, as ``val/modes``; read after each validation.
        every_n_steps: Updates between two samplings; None draws none, which suits models that are slow to sample.
        num_samples: How many are drawn.

    Raises:
        ValueError: If a number is out of range, the trainer never logs, or ``coverage`` is not there after validation.
        TypeError: If samples are wanted and the module draws none, or a batch has no ``image``.
        RuntimeError: During training, if ``stop`` and something failed.
    """

    def __init__(
        self,
        stop: bool = False,
        window: int = 10,
        saturation: float | None = 5.0,
        explosion: float | None = 1000.0,
        collapse: float = 0.1,
        coverage: str | None = None,
        every_n_steps: int | None = 1000,
        num_samples: int = 64,
    ) -> None:
        for name, count in (("window", window), ("every_n_steps", every_n_steps), ("num_samples", num_samples - 1)):
            if count is not None and count < 1:
                least, got = (2, num_samples) if name == "num_samples" else (1, count)
                raise ValueError(f"TrainingHealth: {name} must be at least {least}, got {got}.")
        for name, value in (("saturation", saturation), ("explosion", explosion)):
            if value is not None and not value > 0:
                raise ValueError(f"TrainingHealth: {name} must be positive, got {value}. None leaves the check out.")
        if not 0 < collapse < 1:
            raise ValueError(f"TrainingHealth: collapse must lie between 0 and 1, got {collapse}.")
        self.stop = stop
        self.window = window
        self.saturation = saturation
        self.explosion = explosion
        self.collapse = collapse
        self.coverage = coverage
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self._names: dict[int, str] = {}
        self._norms: dict[str, Tensor] = {}
        self._probes: list[tuple[str, int, Tensor]] = []
        self._nonfinite: dict[str, int] = {}
        self._first: dict[str, list[float]] = {}
        self._largest: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._in_a_row = {"saturation": 0, "collapse": 0}
        self._active: dict[str, list[str]] = {}
        self._distance: float | None = None
        self._last_step = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            raise ValueError("TrainingHealth: log_every_n_steps must be at least 1, got 0: it reads what is logged.")
        if self.every_n_steps is not None and not isinstance(pl_module, SupportsSampling):
            who = type(pl_module).__name__
            raise TypeError(f"TrainingHealth: {who} has no sample() and num_classes. Set every_n_steps to null.")

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names = {id(optimizer): name for name, optimizer in named_optimizers(trainer.optimizers).items()}
        self._norms, self._probes = {}, []

    # ---- every update

    @override
    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        name, overflows = self._names[id(optimizer)], loss_scaler(trainer) is not None
        norms: Iterable[Tensor] = ()
        if log_now(trainer):
            unscale_gradients(trainer, optimizer)
            norms = [total_norm(gradients, 2.0)]
            self._norms[name] = norms[0]
        elif not overflows:
            norms = torch._foreach_norm([local(gradients[0]), local(gradients[-1])])
        if not overflows:
            self._probes += [(name, trainer.global_step + 1, norm) for norm in norms]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if every is not None and step % every == 0 and step != self._last_step:
            self._last_step = step
            self._tell(trainer, "samples", self._check_samples(trainer, pl_module, batch))
        if log_now(trainer) and self._norms:  # no norm: gradients are being accumulated
            self._tell(trainer, "update", self._check_update(trainer))
            pl_module.log("train/unhealthy", float(sum(map(len, self._active.values()))))
            if self._distance is not None:
                pl_module.log("train/sample_distance", self._distance)

    # ---- losses and gradients

    def _check_update(self, trainer: L.Trainer) -> Findings:
        metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/") and k.count("/") == 1}
        names, norms = list(self._norms), list(self._norms.values())
        values = _read([*metrics.values(), *norms])
        terms = dict(zip(metrics, values, strict=False))
        sizes = dict(zip(names, values[len(terms) :], strict=True))
        self._norms = {}
        self._read_probes()
        findings = {key: (f"{key} is {value}", CALM) for key, value in terms.items() if not math.isfinite(value)}
        for name, step in self._nonfinite.items():
            findings[f"gradient of {name}"] = (f"the gradient of {name} is not finite since update {step}", CALM)
        self._nonfinite = {}
        for name, size in sizes.items():
            findings |= self._check_norm(name, size)
        return findings | self._check_saturation(terms, sizes)

    def _read_probes(self) -> None:
        values = _read([norm for _, _, norm in self._probes])
        for (name, step, _), value in zip(self._probes, values, strict=True):
            if not math.isfinite(value):
                self._nonfinite.setdefault(name, step)
        self._probes = []

    def _check_norm(self, name: str, size: float) -> Findings:
        if not math.isfinite(size):
            return {}
        self._largest[name] = max(size, self._largest.get(name, 0.0))
        first = self._first.setdefault(name, [])
        if len(first) < self.window:
            first.append(size)
            return {}
        usual = statistics.median(first)
        if self.explosion is None or size <= self.explosion * usual:
            return {}
        return {f"norm of {name}": (f"the gradient norm of {name} is {size:.3g}, and was {usual:.3g} at first", CALM)}

    def _check_saturation(self, terms: Mapping[str, float], sizes: Mapping[str, float]) -> Findings:
        real, fake = terms.get("train/real_logits"), terms.get("train/fake_logits")
        if self.saturation is None or real is None or fake is None or "generator" not in sizes:
            return {}
        vanished = sizes["generator"] < VANISHED * self._largest.get("generator", 0.0)
        sure = real > self.saturation and fake < -self.saturation
        if not self._confirmed("saturation", sure and vanished):
            return {}
        text = (
            f"the discriminator is sure (logits {real:.3g} and {fake:.3g}) and the generator's gradient has vanished "
            f"(norm {sizes['generator']:.3g})"
        )
        return {"saturation": (text, "Use R1, a gradient penalty or instance noise.")}

    # ---- variety

    def _check_samples(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Findings:
        if not isinstance(batch, Mapping) or "image" not in batch:
            raise TypeError("TrainingHealth: a batch has no batch['image'] to compare. Set every_n_steps to null.")
        # Weights that are sharded over the processes draw with all of them at once.
        if not (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)):
            return {}
        sampler = cast(SupportsSampling, pl_module)  # setup() made sure of it
        labels = None if sampler.num_classes is None else torch.arange(self.num_samples) % sampler.num_classes
        with isolate_rng(), averaged_weights(trainer), trainer.precision_plugin.forward_context(), torch.no_grad():
            samples = sampler.sample(self.num_samples, labels, sample_generators(0, self.num_samples))
        usual = mean_distance(batch["image"][: self.num_samples])
        if not usual > 0:  # a last batch of one image says nothing
            return {}
        self._distance = mean_distance(samples) / usual
        text = f"samples have collapsed: their mean distance is {self._distance:.3g} of the data's"
        fell = self._distance < self.collapse * self._highest_of("distance", min(self._distance, 1.0))
        never_rose = self._confirmed("collapse", self._distance < self.collapse)
        return {"collapse": (text, SPREAD)} if fell or never_rose else {}

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.coverage is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.coverage not in trainer.callback_metrics:
            known = sorted(trainer.callback_metrics)
            raise ValueError(f"TrainingHealth: coverage must be one of {known}, got {self.coverage!r}. Name one.")
        value = float(trainer.callback_metrics[self.coverage])
        highest = self._highest_of(self.coverage, value)
        text = f"{self.coverage} is {value:.3g}, and was {highest:.3g}: modes were lost"
        self._tell(trainer, "coverage", {self.coverage: (text, SPREAD)} if value < LOST * highest else {})

    def _highest_of(self, name: str, value: float) -> float:
        self._highest[name] = max(self._highest.get(name, 0.0), value)
        return self._highest[name]

    def _confirmed(self, name: str, holds: bool) -> bool:
        self._in_a_row[name] = self._in_a_row[name] + 1 if holds else 0
        return self._in_a_row[name] >= self.window

    # ---- what follows

    def _tell(self, trainer: L.Trainer, source: str, findings: Findings) -> None:
        """Warn of what is new, or stop; all processes tell at once, and each hears all."""
        if num_processes() > 1:
            told: list[Findings] = [{} for _ in range(num_processes())]
            torch.distributed.all_gather_object(told, findings)
            findings = {kind: found for one in reversed(told) for kind, found in one.items()}
        known = [] if self.stop else self._active.get(source, [])
        new = [found for kind, found in findings.items() if kind not in known]
        self._active[source] = list(findings)
        if not new:
            return
        what, advice = "; ".join(text for text, _ in new), " ".join(dict.fromkeys(advice for _, advice in new))
        message = f"TrainingHealth: at update {trainer.global_step}, {what}. {advice}"
        if self.stop:
            raise RuntimeError(message)
        rank_zero_warn(message)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._read_probes()
        return {key: copy.deepcopy(getattr(self, f"_{key}")) for key in _STATE}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in _STATE:
            setattr(self, f"_{key}", copy.deepcopy(state_dict[key]))


_STATE = ("nonfinite", "first", "largest", "highest", "in_a_row", "active", "distance", "last_step")


def mean_distance(x: Tensor) -> float:
    """Mean Euclidean distance over all pairs of ``(N, ...)``; NaN for one alone."""
    return float(torch.pdist(x.detach().flatten(start_dim=1).float().cpu()).mean())


def _read(scalars: list[Tensor]) -> list[float]:
    """Their values, waiting for the device once."""
    if not scalars:
        return []
    return torch.stack([scalar.detach().float().to(scalars[0].device) for scalar in scalars]).tolist()
