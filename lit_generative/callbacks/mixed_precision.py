"""What mixed precision needs beside the Trainer's switch: regions in float32, and an eye on the loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lit_generative.tensor_ops import full_precision, to_float32
from lit_generative.training.checks import find_modules, named_optimizers
from lit_generative.training.run import log_now

CHECK_EVERY = 10
"""Batches between two looks at the loss scale: each look makes the host wait for the GPU."""


class MixedPrecision(L.Callback):
    """Keeps chosen layers in float32, and watches the loss scale of float16 training.

    The switch is ``Trainer(precision="bf16-mixed" | "16-mixed")``; this callback stands beside it, and under
    ``32-true`` only sets ``matmul_precision``. Prefer ``bf16-mixed``, which needs no loss scale. Under ``16-mixed`` one
    scale serves every optimizer, so each must do its backward pass and its step before the next one's backward pass. A
    step whose gradients overflow is skipped but counts in ``trainer.global_step``.

    Logs ``train/loss_scale`` and, for each optimizer, ``train/skipped_steps/<name>``: its skipped steps since the start
    of training, resumed runs included. Names are those of the parameter groups, as :func:`named_optimizers` gives them.

    Args:
        float32_modules: Sub-modules that run outside autocast with inputs cast to float32, in training and in
            evaluation: dotted names (``"discriminator.head"``) or patterns (``"*.norm*"``). Their results are float32.
            The backward pass of such a layer is float32 too if it runs outside autocast, as
            :meth:`GenerativeModule.backward <lit_generative.training.module.GenerativeModule.backward>` does.
        matmul_precision: As in ``torch.set_float32_matmul_precision``: "high" allows TF32 on GPUs, "medium" bfloat16.
            Set for the run and set back after it; None leaves it.
        log_scale: Whether to log; without it steps are still counted.
        min_scale: Training stops when the loss scale falls below; 0 never stops. Looked at every 10 batches.

    Raises:
        ValueError: If ``min_scale`` is negative or ``matmul_precision`` is unknown; at the start of a run, if
            ``float32_modules`` holds a name that the module has not.
        RuntimeError: During training, if the loss scale falls below ``min_scale``.
    """

    def __init__(
        self,
        float32_modules: list[str] | None = None,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        log_scale: bool = True,
        min_scale: float = 1.0,
    ) -> None:
        if not min_scale >= 0:
            raise ValueError(f"MixedPrecision: min_scale must be at least 0, got {min_scale}. Use 0 to never stop.")
        if matmul_precision not in ("highest", "high", "medium", None):
            raise ValueError(
                f"MixedPrecision: matmul_precision must be 'highest', 'high', 'medium' or None, got "
                f"{matmul_precision!r}. See torch.set_float32_matmul_precision."
            )
        self.float32_modules = float32_modules
        self.matmul_precision = matmul_precision
        self.log_scale = log_scale
        self.min_scale = min_scale
        self._skipped: dict[str, int] = {}
        self._found: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        self._previous_precision: str | None = None

    # ---- regions and matrix products

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()
        modules = find_modules("MixedPrecision", pl_module, self.float32_modules or [])
        if "mixed" in str(trainer.precision):
            for module in modules.values():
                self._handles += keep_float32(module, trainer.strategy.root_device.type)
        if self.matmul_precision is not None:
            self._previous_precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.matmul_precision)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()  # Lightning does not tear callbacks down after an exception

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._previous_precision is not None:
            torch.set_float32_matmul_precision(self._previous_precision)
            self._previous_precision = None

    # ---- loss scale

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names = {id(optimizer): name for name, optimizer in named_optimizers(trainer.optimizers).items()}

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        scaler = loss_scaler(trainer)
        if scaler is None:
            return
        unscale_gradients(trainer, optimizer)
        # What the scaler found for this optimizer: 1 on each device with an inf or NaN. Kept there, so nothing waits.
        found = list(scaler._found_inf_per_device(optimizer).values())
        if not found:  # a training_step that returned None has no gradients and no step
            return
        flag = found[0] if len(found) == 1 else torch.stack([f.to(found[0].device) for f in found]).amax()
        name = self._names[id(optimizer)]
        if name in self._found:
            self._found[name].add_(flag)
        else:
            self._found[name] = flag.clone()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        scaler = loss_scaler(trainer)
        log = self.log_scale and log_now(trainer)
        if scaler is None or not (log or (trainer.fit_loop.total_batch_idx + 1) % CHECK_EVERY == 0):
            return
        recent = self._settle()
        scale = scaler.get_scale()
        if scale < self.min_scale:
            raise RuntimeError(self._advice(scale, trainer.global_step, recent))
        if log:
            pl_module.log("train/loss_scale", scale)
            for name, number in self._skipped.items():
                pl_module.log(f"train/skipped_steps/{name}", float(number))

    def _settle(self) -> list[str]:
        """Move counts from the device to the host; returns whose steps were skipped since the last time."""
        recent = {name: int(found) for name, found in self._found.items()}
        for name, number in recent.items():
            self._skipped[name] = self._skipped.get(name, 0) + number
        self._found = {}
        return [name for name, number in recent.items() if number]

    def _advice(self, scale: float, step: int, recent: list[str]) -> str:
        counts = ", ".join(f"{name} {number}" for name, number in self._skipped.items())
        return (
            f"MixedPrecision: the loss scale must stay at or above min_scale={self.min_scale:g}, but fell to {scale:g} "
            f"at step {step}: float16 gradients keep overflowing, lately those of {', '.join(recent) or 'none'}. "
            f"Skipped steps so far: {counts}. Use Trainer(precision='bf16-mixed'), name the layers that overflow in "
            "float32_modules, or lower the learning rate; if the loss itself is inf or NaN, precision is not the cause."
        )

    # ---- checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"skipped_steps": dict(self._skipped)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._found = dict(state_dict["skipped_steps"]), {}


def keep_float32(module: nn.Module, device_type: str) -> list[RemovableHandle]:
    """Run ``module`` outside autocast, its half-precision inputs cast to float32, until the handles are removed.

    Args:
        module: Its call, not its parameters, is changed; float32 parameters are assumed.
        device_type: Where it runs, as in ``"cuda"``.

    Returns:
        Handles of the hooks.
    """
    region = _Float32Region(device_type)
    return [
        # First in, last out: what other hooks compute, as that of spectral_norm, is part of the layer.
        module.register_forward_pre_hook(region.enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(region.leave, always_call=True),
    ]


class _Float32Region:
    """The hooks of one module. A class, so that a module that has them can still be copied and pickled."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.open: list[Any] = []  # a module may call itself

    def enter(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        context = full_precision(self.device_type)
        context.__enter__()
        self.open.append(context)
        return to_float32(args), to_float32(kwargs)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)


def loss_scaler(trainer: L.Trainer) -> GradScaler | None:
    """The loss scaler of ``16-mixed``; None in every other precision."""
    return cast("GradScaler | None", getattr(trainer.precision_plugin, "scaler", None))


def unscale_gradients(trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Divide gradients by the loss scale where Lightning has left that to a fused optimizer.

    Costs nothing more: the scaler then leaves out its own pass over the gradients.

    Args:
        trainer: Its scaler is used; without one nothing is done.
        optimizer: The optimizer that is about to step.
    """
    scaler = loss_scaler(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    state: Mapping[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    has_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    if has_gradients and state["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
