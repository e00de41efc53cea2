"""The base of every family's LightningModule: honest step counts, exact resume, checks against the data."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import Self, override

from lit_generative.recipe import are_of, class_path, describe
from lit_generative.tensor_ops import Generators, derive_seed, random_labels, sample_generators
from lit_generative.training.checks import check_class, check_data, check_trainer, check_weights
from lit_generative.training.freezing import hold_statistics
from lit_generative.training.gradients import average_gradients
from lit_generative.training.labels import check_batch_labels, check_labels
from lit_generative.training.lr_schedules import PLATEAUS, show_score
from lit_generative.training.parameter_groups import RateScale, build_optimizer
from lit_generative.training.resume import (
    Configured,
    Options,
    apply_changed_options,
    optimization_options,
    resume_validation,
    validation_state,
)
from lit_generative.training.run import global_seed, log_now
from lit_generative.training.schedule_timing import timed, timing_of

OPTIONS_KEY = "optimization_options"
VALIDATION_KEY = "validation"


class GenerativeModule(L.LightningModule, ABC):
    """What GAN, VAE and DDPM share.

    * ``trainer.global_step`` counts one optimizer's updates only: the others step with :meth:`step_uncounted`.
    * All randomness of a step is a function of (seed, batches seen, rank), so a resumed run draws what the
      uninterrupted one would have drawn, ranks differ, and validation or sampling cannot shift training.
    * Hyperparameters hold the whole tree of networks and objects, so ``load_from_checkpoint(path)`` needs no more.
    """

    num_classes: int | None = None
    rate_scales: Sequence[RateScale] = ()
    """Factors on learning rates; a callback may set them before there are optimizers."""
    _options: Options | None = None
    _saved_options: Options | None = None
    _saved_validation: dict[str, Any] | None = None
    _gradients_differ: bool = False
    _num_validations: int = 0

    # ---- hyperparameters

    @override
    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; without arguments it writes every constructor argument as plain data.

        Raises:
            TypeError: If an argument cannot be written down (see :func:`lit_generative.recipe.describe`).
        """
        given = _given_hyperparameters.get()  # of the outermost module that is being built
        if args or kwargs or (given is not None and are_of(given, type(self))):
            super().save_hyperparameters(*args, **kwargs)
            return
        values = sys._getframe(1).f_locals  # the constructor that called
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        hparams = {name: describe(values[name]) for name in names}
        hparams["_class_path"] = class_path(type(self))
        hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        super().save_hyperparameters(hparams)

    # ---- optimization

    def optimizer_for(
        self,
        name: str,
        parameters: Iterable[nn.Parameter],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
    ) -> dict[str, Any]:
        """One entry of ``configure_optimizers``: a named optimizer, and its schedule.

        Args:
            name: Name of the parameter group, which ``LearningRateMonitor`` shows; see :attr:`rate_scales` for more.
            parameters: What is optimized.
            optimizer: Builds the optimizer from a list of parameter groups.
            scheduler: Builds the schedule, stepped once an update or as ``Every`` says; None for a constant rate.

        Returns:
            Lightning's dictionary form.
        """
        entry: dict[str, Any] = {"optimizer": build_optimizer(self, name, parameters, optimizer, self.rate_scales)}
        if scheduler is not None:
            # LearningRateMonitor then looks at each update, where lr_scheduler_step() is called, and decides.
            schedule = timed(scheduler(entry["optimizer"]))
            entry["lr_scheduler"] = {"scheduler": schedule, "interval": "step", "name": f"lr-{name}"}
            if self.automatic_optimization:
                # Lightning would step a plateau at each epoch's end, with a score that may be old or not there yet.
                entry["lr_scheduler"]["reduce_on_plateau"] = False
        return entry

    @override
    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but processes exchange gradients at :meth:`step_counted` and :meth:`step_uncounted`, once.

        ``DistributedDataParallel`` would exchange them here, and would have to look for the network that had no part
        in this loss (``find_unused_parameters``), at every backward pass of an accumulation.
        """
        strategy = self.trainer.strategy
        self._gradients_differ = isinstance(strategy, DDPStrategy)
        with strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else contextlib.nullcontext():
            super().manual_backward(loss, *args, **kwargs)

    def step_counted(self, optimizer: LightningOptimizer) -> None:
        """Average the gradients over processes and step; counts in ``trainer.global_step``."""
        self._average_gradients(optimizer)
        optimizer.step()

    def step_uncounted(self, optimizer: LightningOptimizer) -> None:
        """The same without counting; scaling, hooks and clipping act as in a counted step."""
        self._average_gradients(optimizer)
        self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)

    def _average_gradients(self, optimizer: LightningOptimizer) -> None:
        # Before the loss scale is taken out: an overflow on one process must skip the step on all.
        if isinstance(self.trainer.strategy, DDPStrategy):
            average_gradients(p for group in optimizer.param_groups for p in group["params"])
        self._gradients_differ = False

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._gradients_differ and not self.automatic_optimization:
            raise RuntimeError(
                f"{type(self).__name__}: gradients were not averaged over processes. Step with self.step_counted("
                "optimizer) or self.step_uncounted(optimizer), not with optimizer.step()."
            )

    def step_schedulers(self) -> None:
        """Step every schedule that is due; manual optimization calls it once, after the batch's counted update."""
        for config in self.trainer.lr_scheduler_configs:
            self.lr_scheduler_step(config.scheduler, None)

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        # Automatic optimization calls this once an update. torch's plateau counts validations alone.
        if not isinstance(scheduler, ReduceLROnPlateau) and timing_of(scheduler).due_after_update(self.trainer):
            scheduler.step()

    @override
    def on_validation_epoch_end(self) -> None:
        """Show each plateau schedule its score; what callbacks log in this hook is there already."""
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._num_validations += 1
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, PLATEAUS) and timing_of(config.scheduler).due_at(self._num_validations):
                show_score(config.scheduler, self.trainer.callback_metrics)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Under manual optimization Lightning calls this inside autocast, which would lower regions kept in float32.
        with torch.autocast(self.device.type, enabled=False):
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    # ---- logging

    @property
    def log_now(self) -> bool:
        """Whether the loggers write a row now; logging costs as much as a small update."""
        return log_now(self.trainer)

    def log_losses(self, losses: Mapping[str, Tensor], in_bar: Iterable[str] = ()) -> None:
        """Log means over the batch as ``train/<name>``, on the batches that are logged at all.

        Args:
            losses: Values ``(N,)`` or scalars by name.
            in_bar: Which of them the progress bar shows.
        """
        if self.log_now:
            for name, value in losses.items():
                self.log(f"train/{name}", value.detach().float().mean(), prog_bar=name in in_bar)

    def log_evaluation(self, stage: str, values: Mapping[str, Tensor]) -> None:
        """Log values ``(N,)`` as ``<stage>/<name>``: their mean over the whole data set and all processes."""
        for name, value in values.items():
            count = len(value) * self.trainer.world_size  # Lightning averages it over processes as a whole number
            self.log(f"{stage}/{name}", value.float().mean(), batch_size=count, sync_dist=True)

    # ---- hooks

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        hold_statistics(self)
        return self

    @override
    def setup(self, stage: str) -> None:
        check_data(self, getattr(self.trainer, "datamodule", None))
        # Said at each save under manual optimization, which must be after the update to resume; and of our own hook.
        said = "no pre-optimization state was saved|overridden `on_before_batch_transfer` in"
        warnings.filterwarnings("ignore", message=f".*({said}).*")
        check_trainer(self, self.trainer, stage)
        if not torch.cuda.is_available():
            # Lightning sets this, and torch's optimizers then look for a GPU's driver at every step.
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)

    @override
    def on_train_start(self) -> None:
        configured = cast(Configured, self.configure_optimizers())
        if self._saved_options is not None:
            apply_changed_options(self.trainer, self._saved_options, configured)
        self._options, self._saved_options = optimization_options(configured), None
        saved, self._saved_validation = self._saved_validation, None
        if saved is not None:
            self._num_validations = saved.get("count", 0)
            resume_validation(self.trainer, saved)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[OPTIONS_KEY] = self._options
        if self._trainer is not None:
            checkpoint[VALIDATION_KEY] = validation_state(self.trainer) | {"count": self._num_validations}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:  # resuming; a module that is only loaded shall train with what it was given
            self._saved_options = checkpoint.get(OPTIONS_KEY)
            self._saved_validation = checkpoint.get(VALIDATION_KEY)
        saved = checkpoint.get("hyper_parameters", {})
        check_class(self, saved.get("_class_path"))
        if "state_dict" in checkpoint:  # sharded strategies have loaded the weights by now, and taken them out
            check_weights(self, checkpoint["state_dict"], saved)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.num_classes is not None and isinstance(batch, Mapping) and "label" in batch:
            check_batch_labels(type(self).__name__, batch["label"], self.num_classes)
        return batch

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed("train", self.trainer.fit_loop.total_batch_idx)

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed("val", batch_idx)  # the same noise at every validation: scores then differ by the weights alone

    @override
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed("test", batch_idx)

    def _seed(self, stage: str, batch: int) -> None:
        seed = derive_seed(stage, global_seed(), batch, self.trainer.global_rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed visits every device: 75 us a step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    # ---- sampling

    @abstractmethod
    def sample(self, num: int, label: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Draw ``num`` samples; see :class:`lit_generative.types.SupportsSampling`."""

    def sampling_settings(self) -> dict[str, Any]:
        """What :meth:`sample` depends on beside the weights, as plain data; nothing, unless a family has a choice."""
        return {}

    @override
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Draw the samples whose indices are ``batch``: each has its own seed, whatever the batch or the rank."""
        generators = [g for i in batch.tolist() for g in sample_generators(global_seed(), 1, start=i)]
        return self.sample(len(batch), generator=generators)

    def labels_for(self, num: int, label: Tensor | None, generator: Generators) -> Tensor | None:
        """Labels to sample with: those given, or drawn uniformly, ``(num,)`` here; None for an unconditional model.

        Raises:
            ValueError: If the model has no classes, the count is wrong, or a label is not one of its classes.
        """
        check_labels(type(self).__name__, num, self.num_classes, label)
        if self.num_classes is None:
            return None
        if label is None:
            return random_labels(num, self.num_classes, generator, self.device)
        return label.to(self.device)
