import math
import warnings

import pytest
import torch

from lit_generative.networks.quantizer import VectorQuantizer

CODES = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]]).double()


def quantizer(**options) -> VectorQuantizer:
    """Three codes of two numbers in float64, placed already, with counts 2, 5 and 1."""
    module = VectorQuantizer(3, 2, **({"decay": 0.9, "restart_below": None} | options)).double()
    counts = torch.tensor([2.0, 5.0, 1.0]).double()
    module.codebook.copy_(CODES)
    module.counts.copy_(counts)
    module.sums.copy_(counts[:, None] * CODES)
    module.initialized.fill_(True)
    return module


def maps(num: int = 4, dim: int = 2, height: int = 3, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(module: VectorQuantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- quantizing


def test_each_vector_becomes_its_nearest_code():
    z_e = 3 * maps()
    quantized = quantizer().eval()(z_e)
    distances = torch.cdist(z_e.movedim(1, -1), CODES.expand(4, 3, 3, 2))
    assert_same(quantized.codes, distances.argmin(dim=-1))
    assert len(quantized.codes.unique()) == 3
    torch.testing.assert_close(quantized.z_q, CODES[quantized.codes].movedim(-1, 1))
    assert_same(quantizer().lookup(quantized.codes), CODES[quantized.codes].movedim(-1, 1))
    assert quantized.codes.dtype == torch.int64


def test_the_commitment_is_the_summed_squared_distance_of_an_example():
    z_e = torch.tensor([[[1.0, 4.0]], [[1.0, -2.0]]]).double()[None].repeat(2, 1, 1, 1)  # vectors (1, 1) and (4, -2)
    z_e[1, :, 0, 0] = torch.tensor([0.0, 2.0])
    quantized = quantizer().eval()(z_e)
    assert quantized.codes.tolist() == [[[0, 1]], [[2, 1]]]
    torch.testing.assert_close(quantized.commitment, torch.tensor([2.0 + 4.0, 1.0 + 4.0]).double())


def test_the_gradient_of_the_codes_goes_to_the_maps_unchanged():
    z_e, weight = maps().requires_grad_(), maps(seed=1)
    (quantizer()(z_e).z_q * weight).sum().backward()
    assert_same(z_e.grad, weight)


def test_the_gradient_of_the_commitment_pulls_the_maps_alone():
    z_e, module = maps().requires_grad_(), quantizer()
    quantized = module(z_e)
    quantized.commitment.sum().backward()
    torch.testing.assert_close(z_e.grad, 2 * (z_e - quantized.z_q).detach())
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("training", [True, False])
def test_uniform_use_of_all_codes_has_their_number_as_perplexity(training):
    z_e = CODES.T.reshape(1, 2, 1, 3).repeat(2, 1, 4, 1)
    torch.testing.assert_close(quantizer().train(training)(z_e).perplexity, torch.tensor(3.0).double())
    one = quantizer().train(training)(z_e[:, :, :, :1])
    torch.testing.assert_close(one.perplexity, torch.tensor(1.0).double())


# ---- learning


def test_two_steps_of_the_running_averages_are_those_computed_by_hand():
    module = quantizer(decay=0.9, epsilon=0.1)
    counts, sums, codes = module.counts.clone(), module.sums.clone(), CODES
    for seed in (0, 1):
        z_e = 3 * maps(seed=seed)
        vectors = z_e.movedim(1, -1).reshape(-1, 2)
        one_hot = torch.nn.functional.one_hot(torch.cdist(vectors, codes).argmin(dim=1), 3).double()
        counts = 0.9 * counts + 0.1 * one_hot.sum(dim=0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ vectors
        smoothed = (counts + 0.1) / (counts.sum() + 0.3) * counts.sum()
        quantized = module(z_e)
        torch.testing.assert_close(quantized.z_q, (one_hot @ codes).view(4, 3, 5, 2).movedim(-1, 1))  # not yet moved
        codes = sums / smoothed[:, None]
        torch.testing.assert_close(module.counts, counts)
        torch.testing.assert_close(module.sums, sums)
        torch.testing.assert_close(module.codebook, codes)
    assert (codes - CODES).abs().min(dim=1).values.max() > 0.1, "they hardly moved, so equality says nothing"


def test_the_first_batch_places_every_code_on_a_vector_of_its_own():
    module, z_e = VectorQuantizer(20, 3).double(), maps(dim=3)
    module(z_e)
    vectors = z_e.movedim(1, -1).reshape(-1, 3)
    assert module.initialized
    distances = torch.cdist(module.sums / module.counts[:, None], vectors)
    # By now each code has taken one step, towards the vectors nearest to it.
    assert distances.min(dim=1).values.max() < 0.1
    assert len(distances.argmin(dim=1).unique()) == 20
    torch.testing.assert_close(module.counts.sum(), torch.tensor(60.0).double())


def test_later_batches_do_not_place_the_codes_again():
    module = VectorQuantizer(5, 2, restart_below=None).double()
    module(maps())
    before = module.codebook.clone()
    module(100 + maps(seed=1))
    assert (module.codebook - before).abs().max() < 10


def test_a_code_that_is_no_longer_used_is_placed_on_a_vector_of_the_batch():
    z_e = 3 * maps(num=6)
    module, other = quantizer(restart_below=1.0), quantizer()
    for each in (module, other):
        each.codebook[2] = 1000.0
        each.counts[2] = 1.05  # 0.945 after the batch
    module(z_e)
    other(z_e)
    vectors = z_e.movedim(1, -1).reshape(-1, 2)
    assert torch.cdist(module.codebook[2:], vectors).min() == 0
    assert_same(module.counts[2], torch.tensor(90 / 3).double())
    assert_same(module.sums[2], 30 * module.codebook[2])
    for name in ("codebook", "counts", "sums"):
        assert_same(getattr(module, name)[:2], getattr(other, name)[:2])


def test_a_placed_code_has_the_time_that_the_docstring_says():
    module = quantizer(decay=0.9, restart_below=1.0)
    module.codebook[2], module.counts[2] = 1000.0, 1.05
    far = CODES[:2].T.reshape(1, 2, 1, 2).repeat(6, 1, 1, 1)
    vectors = [torch.cat([far, far.new_full((6, 2, 1, 1), 50.0)], dim=-1), far]  # the first alone offers another place
    steps = 0
    module(vectors[0])
    module.codebook[2], module.sums[2] = 1000.0, 1000.0 * module.counts[2]
    while module.codebook[2].min() > 900:
        module(vectors[1])
        steps += 1
    assert steps == math.ceil(math.log(6 / 1.0) / -math.log(0.9))


def test_torchs_generator_draws_what_codes_are_placed_on():
    codebooks = []
    for seed in (3, 3, 4):
        module = VectorQuantizer(7, 2).double()
        torch.manual_seed(seed)
        module(maps())
        codebooks.append(module.codebook.clone())
    assert_same(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])


def test_evaluation_changes_no_buffer_and_draws_nothing():
    module = quantizer(restart_below=10.0).eval()
    before, random = state(module), torch.get_rng_state()
    module(maps())
    assert_same(state(module), before)
    assert_same(torch.get_rng_state(), random)


@pytest.mark.parametrize("restart_below", [None, 8.0])
def test_a_reloaded_codebook_goes_on_as_it_would_have(restart_below):
    module = VectorQuantizer(6, 2, decay=0.7, restart_below=restart_below).double()
    module(maps())
    loaded = VectorQuantizer(6, 2, decay=0.7, restart_below=restart_below).double()
    loaded(maps(seed=5))
    loaded.load_state_dict(module.state_dict())
    for each in (module, loaded):
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            each(maps(seed=seed))
    assert set(module.state_dict()) == {"codebook", "counts", "sums", "initialized"}
    assert_same(state(loaded), state(module))


def test_a_codebook_that_no_batch_has_placed_is_placed_also_after_a_reload():
    untrained, module = VectorQuantizer(6, 2).double(), VectorQuantizer(6, 2).double()
    state_dict = state(untrained)
    module(maps())
    module.load_state_dict(state_dict)
    torch.manual_seed(0)
    module(maps(seed=1))
    torch.manual_seed(0)
    untrained(maps(seed=1))
    assert_same(state(module), state(untrained))


def test_under_autocast_codes_and_averages_stay_float32():
    module = VectorQuantizer(50, 3)
    z_e = (5 + maps(num=20, dim=3)).bfloat16().requires_grad_()  # in bfloat16 the nearest code is often another
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            quantized = module(z_e)
    assert {quantized.z_q.dtype, quantized.commitment.dtype, quantized.perplexity.dtype} == {torch.float32}
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32, torch.bool}
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    exact = VectorQuantizer(50, 3).eval()
    exact.load_state_dict(module.state_dict())
    expected = exact(z_e.float()).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(module.eval()(z_e).codes, expected)


# ---- warnings and refusals


@pytest.mark.parametrize(("restart_below", "least"), [(None, 61), (0.5, 61), (2.0, 122)])
def test_too_few_vectors_for_the_codes_are_said_once_and_only_in_training(restart_below, least):
    module = VectorQuantizer(61, 2, restart_below=restart_below).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.eval()(maps())
    with pytest.warns(UserWarning, match=rf"61 codes .* want at least {least} vectors .* got 60\. .* Take fewer codes"):
        module.train()(maps())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(maps())


def test_as_many_vectors_as_codes_are_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VectorQuantizer(60, 2).double()(maps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"decay": 1.0}, r"decay must be at least 0 and below 1, got 1\.0"),
        ({"epsilon": 0.0}, r"epsilon must be positive, got 0\.0"),
        ({"restart_below": 0.0}, r"restart_below must be positive, got 0\.0\. Set it to null"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"VectorQuantizer: {message}"):
        VectorQuantizer(**({"num_codes": 4, "dim": 2} | options))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 2, 2)])
def test_maps_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs maps of shape \(N, 2, h, w\), got \(4, "):
        quantizer()(torch.zeros(shape))
