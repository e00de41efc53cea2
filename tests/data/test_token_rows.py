import pytest
import torch

from lit_generative.data.batches import BatchKey
from lit_generative.data.token_rows import Replay, TokenRows, pack

PAD = 9


def batch_of(rows, *indices, epoch=0):
    return rows[BatchKey(epoch, 0, 0, torch.tensor(indices))]


def test_labels_leave_out_prompts_and_pads():
    rows = TokenRows([[1, 5, 6, 2], [1, 7, 2], [1, 2]], starts=[2, 1, 1], pad=PAD)
    batch = batch_of(rows, 0, 1)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2], [1, 7, 2, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 7, 2, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_batch_is_as_long_as_its_longest_row():
    rows = TokenRows([[1, 5, 6, 2], [1, 7, 2], [1, 2]], starts=[1, 1, 1], pad=PAD)
    assert batch_of(rows, 2, 1)["input_ids"].tolist() == [[1, 2, PAD], [1, 7, 2]]


def test_a_pad_token_that_also_ends_texts_still_has_its_label():
    batch = batch_of(TokenRows([[1, 5, 2], [1, 2]], starts=[1, 1], pad=2), 0, 1)
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]]


def test_packing_loses_no_token_and_keeps_the_order():
    rows = pack([[1, 3, 2], [1, 4, 5, 6, 2], [1, 7, 2]], block_size=4, pad=PAD)
    assert len(rows) == 3
    batch = batch_of(rows, 0, 1, 2)
    assert batch["input_ids"].tolist() == [[1, 3, 2, 1], [4, 5, 6, 2], [1, 7, 2, PAD]]
    assert batch["labels"].tolist() == [[-100, 3, 2, 1], [-100, 5, 6, 2], [-100, 7, 2, -100]]


def test_a_last_block_of_one_token_is_left_out():
    assert len(pack([[1, 3, 2, 4, 5]], block_size=4, pad=PAD)) == 1
    assert len(pack([], block_size=4, pad=PAD)) == 0


@pytest.fixture
def mixed():
    own = TokenRows([[10 + i, 2, 3] for i in range(6)], starts=[1] * 6, pad=PAD)
    other = TokenRows([[20 + i, 2, 3, 4, 5] for i in range(5)], starts=[1] * 5, pad=PAD)
    return Replay(own, other, share=0.25)


def first_tokens(rows, epoch):
    return batch_of(rows, *range(len(rows)), epoch=epoch)["input_ids"][:, 0].tolist()


def test_the_share_is_that_of_an_epoch(mixed):
    assert len(mixed) == 8
    assert 2 / len(mixed) == 0.25


def test_each_epoch_has_all_its_own_rows_and_takes_further_ones_of_the_others(mixed):
    own = [10, 11, 12, 13, 14, 15]
    assert first_tokens(mixed, 0) == [*own, 20, 21]
    assert first_tokens(mixed, 1) == [*own, 22, 23]
    assert first_tokens(mixed, 2) == [*own, 24, 20]


def test_rows_of_both_stand_in_the_order_asked_for_and_are_padded_to_one_length(mixed):
    batch = batch_of(mixed, 7, 2, 6, 0)
    assert batch["input_ids"][:, 0].tolist() == [21, 12, 20, 10]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3, 5, 3]
    assert batch["labels"][1].tolist() == [-100, 2, 3, -100, -100]
    assert batch_of(mixed, 4, 1)["input_ids"].shape == (2, 3)
    assert batch_of(mixed, 6)["input_ids"].shape == (1, 5)


def test_a_small_share_is_one_row_at_least():
    rows = TokenRows([[1, 2], [1, 3]], starts=[1, 1], pad=PAD)
    assert len(Replay(rows, rows, share=0.01)) == 3
