import pytest
import torch
from torch import nn

from lit_generative.training.clipping import Part, clip_norm_, clip_units_, clip_value_, total_norm


def part(grads: list[torch.Tensor], bound: float, weights: list[torch.Tensor] | None = None, axes=None) -> Part:
    parameters = [nn.Parameter(w.clone()) for w in weights or grads]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.clone()
    return Part("part", bound, parameters, axes or [0] * len(parameters))


def clip(function, grads, bound, weights=None, axes=None, norm_type=2.0):
    """What the function returns, and the gradients after it."""
    made = part(grads, bound, weights, axes)
    held = [p.grad for p in made.parameters]
    changed = function(made, held, total_norm(held, norm_type))
    return bool(changed), held


def some(scale: float = 1.0, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [scale * torch.randn(3, 4, dtype=dtype), scale * torch.randn(5, dtype=dtype)]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
def test_the_norm_is_that_of_one_long_vector(norm_type):
    vector = torch.cat([g.flatten() for g in some()])
    torch.testing.assert_close(total_norm(some(), norm_type), torch.linalg.vector_norm(vector, norm_type))


def test_the_norm_of_half_precision_does_not_overflow():
    grads = [torch.full((100,), 60_000.0, dtype=torch.float16)]
    torch.testing.assert_close(total_norm(grads, 2.0), torch.tensor(600_000.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_by_norm_it_agrees_with_torch(norm_type, scale):
    grads = some(scale)
    expected = [nn.Parameter(g) for g in grads]
    for p in expected:
        p.grad = p.detach().clone()
    nn.utils.clip_grad_norm_(expected, 0.5, norm_type)
    changed, clipped = clip(clip_norm_, grads, 0.5, norm_type=norm_type)
    torch.testing.assert_close(clipped, [p.grad for p in expected])
    assert changed == (scale > 1)


def test_by_norm_the_direction_stays_and_the_norm_is_the_bound():
    _, clipped = clip(clip_norm_, [torch.tensor([3.0, 4.0])], 0.5)
    torch.testing.assert_close(clipped[0], torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_clips_nothing(bad):
    grads = [torch.tensor([30.0, bad]), torch.tensor([40.0])]
    changed, clipped = clip(clip_norm_, grads, 0.5)
    assert not changed
    torch.testing.assert_close(clipped, grads, equal_nan=True, rtol=0, atol=0)


def test_an_infinite_bound_only_measures():
    changed, clipped = clip(clip_norm_, some(), torch.inf)
    assert not changed
    torch.testing.assert_close(clipped, some(), rtol=0, atol=0)


def test_by_value_each_entry_is_clamped_on_both_sides():
    grads = [torch.tensor([[-3.0, 0.2]]), torch.tensor([0.7, -0.1])]
    changed, clipped = clip(clip_value_, grads, 0.5)
    assert changed
    torch.testing.assert_close(clipped, [torch.tensor([[-0.5, 0.2]]), torch.tensor([0.5, -0.1])])
    assert not clip(clip_value_, grads, 3.5)[0]


def test_by_value_infinity_is_clamped_and_nan_stays():
    _, clipped = clip(clip_value_, [torch.tensor([torch.inf, torch.nan, 2.0])], 1.0)
    torch.testing.assert_close(clipped[0], torch.tensor([1.0, torch.nan, 1.0]), equal_nan=True)


def test_adaptively_each_output_unit_is_bounded_by_its_own_weights():
    """Rows of norm 5 and 0.1 with gradients of norm 1 and 1: at 0.1 the bounds are 0.5 and 0.01."""
    weights = [torch.tensor([[3.0, 4.0], [0.1, 0.0]])]
    changed, clipped = clip(clip_units_, [torch.tensor([[0.0, 1.0], [1.0, 0.0]])], 0.1, weights)
    assert changed
    torch.testing.assert_close(clipped[0], torch.tensor([[0.0, 0.5], [0.01, 0.0]]))


def test_adaptively_zero_weights_count_as_a_thousandth_and_a_vector_is_one_unit():
    changed, clipped = clip(clip_units_, [torch.tensor([3.0, 4.0])], 0.5, [torch.zeros(2)])
    assert changed
    torch.testing.assert_close(clipped[0], torch.tensor([3e-4, 4e-4]))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 4), 0), ((3, 4, 5), 0), ((3, 4, 5), 1), ((3, 4, 2, 5), 1), ((3, 4, 2, 5, 2), 1), ((7,), 0), ((), 0)],
)
def test_adaptively_no_unit_exceeds_the_bound_and_those_below_it_stay(shape, axis):
    torch.manual_seed(0)
    weight, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    _, (clipped,) = clip(clip_units_, [grad], 1.0, [weight], [axis])

    def units(t):
        return t.movedim(axis, 0).flatten(1).norm(dim=1) if t.ndim > 1 else t.norm().reshape(1)

    below = units(grad) <= units(weight)
    torch.testing.assert_close(units(clipped), torch.minimum(units(grad), units(weight)))
    if below.any() and grad.ndim > 1:
        torch.testing.assert_close(clipped.movedim(axis, 0)[below], grad.movedim(axis, 0)[below], rtol=0, atol=0)


def test_adaptively_a_unit_that_is_not_finite_is_left_alone_and_the_others_are_not():
    grads = [torch.tensor([[1.0, torch.inf], [1.0, 0.0]])]
    _, (clipped,) = clip(clip_units_, grads, 0.1, [torch.eye(2)])
    torch.testing.assert_close(clipped, torch.tensor([[1.0, torch.inf], [0.1, 0.0]]))
    assert not clip(clip_units_, some(1e-3), 0.1, some())[0]


@pytest.mark.parametrize("function", [clip_norm_, clip_value_, clip_units_])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_keep_their_dtype(function, dtype):
    changed, clipped = clip(function, some(10, dtype), 0.5, some(1, dtype))
    assert changed
    assert {grad.dtype for grad in clipped} == {dtype}


def test_adaptively_parameters_without_a_gradient_are_passed_over():
    made = part(some(10), 0.1, some())
    made.parameters[0].grad = None
    held = [made.parameters[1].grad]
    assert clip_units_(made, held, total_norm(held, 2.0))
    torch.testing.assert_close(held[0].norm(), 0.1 * made.parameters[1].detach().norm())
