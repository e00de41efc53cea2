import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from lit_generative.data.batches import BatchKey, InMemoryExamples, RandomFlip, ResumableBatches


def examples(num: int) -> InMemoryExamples:
    """Images that all differ, also from their mirror image; the label is the index."""
    image = torch.randint(256, (num, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return InMemoryExamples(image, torch.arange(num))


def indices(num: int, *args, **kwargs) -> list[list[int]]:
    return [key.indices.tolist() for key in ResumableBatches(examples(num), *args, **kwargs)]


def test_a_batch_holds_the_examples_of_its_key_in_order():
    dataset = examples(7)
    batch = dataset[BatchKey(0, 0, 0, torch.tensor([5, 2, 2]))]
    torch.testing.assert_close(batch["image"], dataset.image[[5, 2, 2]])
    assert batch["label"].tolist() == [5, 2, 2]


def test_images_without_their_labels_are_refused():
    with pytest.raises(ValueError, match="one label for each image, got 3 and 2"):
        InMemoryExamples(torch.zeros(3, 2), torch.zeros(2))


def test_an_epoch_covers_every_example_once():
    assert sorted(itertools.chain(*indices(12, 4, shuffle_seed=3))) == list(range(12))


def test_the_order_is_a_function_of_seed_and_epoch():
    first = indices(50, 5, shuffle_seed=3, epoch=2)
    assert first == indices(50, 5, shuffle_seed=3, epoch=2)
    assert first != indices(50, 5, shuffle_seed=4, epoch=2)
    assert first != indices(50, 5, shuffle_seed=3, epoch=1)


def test_set_epoch_changes_the_order_as_the_constructor_does():
    sampler = ResumableBatches(examples(50), 5, shuffle_seed=3)
    sampler.set_epoch(2)
    assert [key.indices.tolist() for key in sampler] == indices(50, 5, shuffle_seed=3, epoch=2)


def test_without_a_seed_the_order_is_that_of_the_data():
    assert indices(7, 3, drop_last=False) == [[0, 1, 2], [3, 4, 5], [6]]


def test_drop_last_leaves_out_what_is_incomplete_over_all_processes():
    assert indices(7, 2, 2, 1) == [[2, 3]]


def test_the_tail_is_split_over_the_processes():
    assert [indices(11, 4, 2, rank, drop_last=False)[-1] for rank in (0, 1)] == [[8, 9], [10]]


def test_a_tail_shorter_than_the_processes_is_filled_up_from_the_start():
    assert [indices(9, 2, 4, rank, drop_last=False)[-1] for rank in range(4)] == [[8], [0], [1], [2]]
    assert [indices(2, 2, 5, rank, drop_last=False) for rank in range(5)] == [[[0]], [[1]], [[0]], [[1]], [[0]]]


@pytest.mark.parametrize("num", [16, 17, 19, 23])
@pytest.mark.parametrize("drop_last", [True, False])
def test_two_processes_see_the_batches_of_one_of_twice_the_size(num, drop_last):
    one = indices(num, 4, shuffle_seed=0, drop_last=drop_last)
    ranks = [indices(num, 2, 2, rank, shuffle_seed=0, drop_last=drop_last) for rank in (0, 1)]
    joined = [left + right for left, right in zip(*ranks, strict=True)]
    if num == 17 and not drop_last:  # the tail is a single example: one process gets a filled-up batch
        assert (len(one[-1]), len(joined[-1])) == (1, 2)
        one, joined = one[:-1], joined[:-1]
    assert joined == one


@pytest.mark.parametrize("num", [0, 3, 8, 11])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_length_is_the_number_of_batches(num, drop_last):
    sampler = ResumableBatches(examples(num), 2, 2, 1, drop_last=drop_last)
    assert len(sampler) == len(list(sampler))


def test_a_start_in_the_middle_yields_exactly_the_remaining_batches():
    whole = list(ResumableBatches(examples(20), 3, shuffle_seed=0, epoch=4))
    rest = list(ResumableBatches(examples(20), 3, shuffle_seed=0, epoch=4, start_batch=2))
    assert [key.batch for key in rest] == [2, 3, 4, 5]
    assert [key.indices.tolist() for key in rest] == [key.indices.tolist() for key in whole[2:]]
    assert {key.epoch for key in rest} == {4}


def test_only_the_first_iteration_starts_in_the_middle_and_the_length_is_that_of_the_epoch():
    sampler = ResumableBatches(examples(20), 3, shuffle_seed=0, start_batch=2)
    assert [len(sampler), len(list(sampler)), len(list(sampler))] == [6, 4, 6]


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ResumableBatches(examples(3), 0)


def test_flips_mirror_whole_images_and_some_of_them_only():
    dataset = examples(40)
    batch = RandomFlip(dataset, seed=0)[BatchKey(0, 0, 0, torch.arange(40))]
    same = (batch["image"] == dataset.image).flatten(1).all(dim=1)
    mirrored = (batch["image"] == dataset.image.flip(3)).flatten(1).all(dim=1)
    assert torch.equal(same, ~mirrored)
    assert 10 < mirrored.sum() < 30


def test_flips_depend_on_seed_epoch_batch_and_rank_and_on_nothing_else():
    dataset, everything = examples(40), torch.arange(40)

    def flipped(seed: int, *key: int) -> torch.Tensor:
        torch.rand(1)  # whatever the global state is
        return RandomFlip(dataset, seed)[BatchKey(*key, everything)]["image"]

    reference = flipped(0, 1, 2, 3)
    assert torch.equal(reference, flipped(0, 1, 2, 3))
    for other in ((1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 0, 3), (0, 1, 2, 0)):
        assert not torch.equal(reference, flipped(*other))


def test_workers_do_not_change_the_batches():
    dataset = RandomFlip(examples(20), seed=0)
    runs = []
    for num_workers in (0, 2):
        sampler = ResumableBatches(dataset, 3, shuffle_seed=5, start_batch=1)
        runs.append(list(DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)))
    for without, with_workers in zip(*runs, strict=True):
        torch.testing.assert_close(without, with_workers)
