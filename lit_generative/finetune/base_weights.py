"""Weights on disk without the pretrained ones beside them: what no training changes is left out of a ``state_dict``."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = 8


class LeavesBaseOut(nn.Module):
    """Mixin of modules that hold a pretrained network, most of which is not trained.

    After :meth:`leave_base_out`, ``state_dict()`` holds what was trainable then, and a fingerprint of the rest;
    ``load_state_dict`` takes such a one, strictly, and leaves the rest as it is. Checkpoints, averages and loading then
    need nothing more. Sub-modules' own ``state_dict`` is whole.
    """

    _left_out: tuple[str, ...] = ()
    _base: str = ""
    _fingerprint: Tensor | None = None

    def leave_base_out(self, base: str) -> int:
        """Decide what is left out: parameters that are not trained now, and buffers of modules without trained ones.

        Args:
            base: Where the pretrained weights come from, for messages.

        Returns:
            How many values are left out.
        """
        state = self.state_dict()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        owners = {name.rpartition(".")[0] for name in trained}
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        buffers = {name for name, _ in self.named_buffers() if name.rpartition(".")[0] not in owners}
        self._left_out = tuple(sorted((frozen | buffers) & state.keys()))
        self._base = base
        self._fingerprint = fingerprint({name: state[name] for name in self._left_out})
        self.register_state_dict_post_hook(_take_out)
        self.register_load_state_dict_pre_hook(_put_in)
        return sum(state[name].numel() for name in self._left_out)

    def get_extra_state(self) -> Tensor:
        """The fingerprint of what is left out, ``(32,)`` uint8."""
        return torch.zeros(0, dtype=torch.uint8) if self._fingerprint is None else self._fingerprint

    def set_extra_state(self, state: Tensor) -> None:
        """Compare fingerprints.

        Raises:
            ValueError: If the rest, which ``state_dict`` left out, was another.
        """
        if self._fingerprint is not None and not torch.equal(state.cpu(), self._fingerprint):
            raise ValueError(
                f"{type(self).__name__}: these weights were trained on top of others than {self._base} holds. Give the "
                "pretrained weights that they were trained on."
            )


def fingerprint(state: dict[str, Tensor]) -> Tensor:
    """A digest of names, shapes and some values, the same after rounding to bfloat16: ``(32,)`` uint8."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if value.is_floating_point():  # quantized weights are packed in ways of their own
            flat = value.detach().flatten()
            some = flat[:: max(1, flat.numel() // _VALUES)][: _VALUES + 1]
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(some.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _take_out(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in module._left_out:
        state.pop(prefix + name, None)


def _put_in(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name in module._left_out:
        state.setdefault(prefix + name, own[name].detach())
