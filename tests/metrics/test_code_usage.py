import torch

from lit_generative.metrics.code_usage import CodePerplexity


def test_the_perplexity_is_that_of_all_batches_together():
    metric = CodePerplexity(4)
    metric.update(torch.tensor([[[0, 0], [0, 0]]]))
    torch.testing.assert_close(metric.compute(), torch.tensor(1.0))
    metric.update(torch.tensor([[[1, 1], [1, 1]]]))
    torch.testing.assert_close(metric.compute(), torch.tensor(2.0))
    metric.update(torch.tensor([2, 3]))
    p = torch.tensor([0.4, 0.4, 0.1, 0.1])
    torch.testing.assert_close(metric.compute(), (-(p * p.log()).sum()).exp())
    metric.reset()
    metric.update(torch.arange(4))
    torch.testing.assert_close(metric.compute(), torch.tensor(4.0))


def test_the_codes_of_all_processes_count_alike():
    metric, other = CodePerplexity(3), CodePerplexity(3)
    for code in (0, 0, 1):
        metric.update(torch.tensor([code]))
    other.update(torch.tensor([1, 2, 2]))
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), torch.tensor(3.0))


def test_it_adds_nothing_to_a_state_dict():
    assert CodePerplexity(4).state_dict() == {}
