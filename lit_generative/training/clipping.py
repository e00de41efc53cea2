"""The arithmetic of gradient clipping: in place, without waiting for the device, on whole and on sharded gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Part:
    """Parameters of one optimizer that share a bound."""

    name: str
    bound: float
    parameters: list[nn.Parameter]
    unit_axes: list[int]
    """The axis of each parameter that counts output units; AGC's units."""


def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Norm of all entries of ``tensors`` together, a scalar of float32 or wider; of shards (DTensor), of the whole."""
    if norm_type == torch.inf:
        return _largest(tensors)
    if sharded := [t for t in tensors if hasattr(t, "full_tensor")]:
        plain = [t for t in tensors if not hasattr(t, "full_tensor")]
        norms = [nn.utils.get_total_norm(sharded, norm_type).full_tensor()]  # type: ignore[attr-defined]
        norms += [total_norm(plain, norm_type)] if plain else []
    else:
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        norms = [n.to(tensors[0].device) for n in torch._foreach_norm(tensors, norm_type, dtype)]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _largest(tensors: list[Tensor]) -> Tensor:
    # torch's infinity norm refuses the empty shards of small parameters, and is ten times slower on a CPU.
    held = [part for part in map(local, tensors) if part.numel()]
    dtype, device = torch.promote_types(tensors[0].dtype, torch.float32), tensors[0].device
    zero = torch.zeros((), dtype=dtype, device=device)
    largest = torch.stack([zero, *(part.abs().amax().to(zero) for part in held)]).amax()
    for mesh in {t.device_mesh for t in tensors if hasattr(t, "device_mesh")}:
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))
    return largest


def clip_norm_(part: Part, grads: list[Tensor], norm: Tensor) -> Tensor:
    """Scale all gradients by ``min(1, bound / norm)``; by 1 if ``norm`` is not finite."""
    finite = norm.nan_to_num(nan=0.0, posinf=0.0)
    if norm.device.type == "cpu" and finite <= part.bound:  # which is known here without waiting
        return finite > part.bound
    factor = (part.bound / (finite + 1e-6)).clamp_(max=1.0)
    for device in {grad.device for grad in grads}:
        torch._foreach_mul_([local(grad) for grad in grads if grad.device == device], factor.to(device))
    return finite > part.bound


def clip_value_(part: Part, grads: list[Tensor], _: Tensor) -> Tensor:
    """Clamp each entry to ``[-bound, bound]``."""
    largest = total_norm(grads, torch.inf)
    held = [local(grad) for grad in grads]
    torch._foreach_clamp_min_(held, -part.bound)
    torch._foreach_clamp_max_(held, part.bound)
    return largest > part.bound


def clip_units_(part: Part, grads: list[Tensor], _: Tensor) -> Tensor:
    """Scale each unit's gradient to at most ``bound`` times the norm of its weights (Brock et al. 2021, Eq. 3)."""
    pairs = [(p, axis) for p, axis in zip(part.parameters, part.unit_axes, strict=True) if p.grad is not None]
    weight_norms = torch.cat([_unit_norms(p, axis) for p, axis in pairs]).clamp_(min=1e-3)
    norms = [_unit_norms(grad, axis) for grad, (_, axis) in zip(grads, pairs, strict=True)]
    norm = torch.cat(norms)
    over = (norm > part.bound * weight_norms) & norm.isfinite()
    factors = torch.where(over, part.bound * weight_norms / norm, 1.0).split([len(n) for n in norms])
    for grad, factor, (_, axis) in zip(grads, factors, pairs, strict=True):
        shape = [1] * grad.ndim
        if grad.ndim > 1:
            shape[axis] = -1
        local(grad).mul_(_shard_like(factor.view(shape), grad))
    return over.any()


def local(tensor: Tensor) -> Tensor:
    """What this process holds, to change in place."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _unit_norms(tensor: Tensor, axis: int) -> Tensor:
    """Euclidean norm of each unit, ``(units,)``; a vector is one unit."""
    norms = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if axis:  # in two steps, the first over neighbours in memory, which is twice as fast
        norms = torch.linalg.vector_norm(norms, 2, list(range(2, tensor.ndim)))
    norms = torch.linalg.vector_norm(norms, 2, 0 if axis else list(range(1, tensor.ndim)) or None)
    return (norms.full_tensor() if hasattr(norms, "full_tensor") else norms).reshape(-1)


def _shard_like(factor: Tensor, grad: Tensor) -> Tensor:
    """The entries of ``factor`` that this process needs to multiply its shard of ``grad``."""
    if not hasattr(grad, "device_mesh"):
        return factor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate() for _ in range(grad.device_mesh.ndim)]
    whole = DTensor.from_local(factor.expand(grad.shape), grad.device_mesh, everywhere, run_check=False)
    return local(whole.redistribute(placements=grad.placements))  # type: ignore[attr-defined]
