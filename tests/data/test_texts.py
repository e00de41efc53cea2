import json

import pytest
import torch

from lit_generative.data.batches import BatchKey
from lit_generative.data.texts import CompletionData, TextData
from lit_generative.data.tokenizers import encode_prompt
from lit_generative.types import DescribesData
from tests.finetune import tiny_llama

SENTENCES = tiny_llama.everyday(40, seed=3)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_llama.build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sentences(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(SENTENCES))
    return str(tmp_path / "train.txt")


@pytest.fixture
def pairs(tmp_path):
    records = [{"prompt": p, "completion": c, "hint": f"hint {i}"} for i, (p, c) in enumerate(tiny_llama.questions())]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(tmp_path / "train.jsonl")


def texts(pretrained, train, **kwargs) -> TextData:
    options = {"block_size": 16, "batch_size": 3, "one_per_line": True} | kwargs
    data = TextData(pretrained=pretrained, train=train, **options)
    data.setup("fit")
    return data


def completions(pretrained, train, **kwargs) -> CompletionData:
    data = CompletionData(pretrained=pretrained, train=train, **({"block_size": 40, "batch_size": 2} | kwargs))
    data.setup("fit")
    return data


def told(data, rows) -> str:
    """All real tokens of a set, as text."""
    return data.tokenizer.decode([t for row, n in zip(rows.tokens, rows.length, strict=True) for t in row[:n].tolist()])


def test_documents_are_written_one_after_another_with_their_ends(pretrained, sentences):
    data = texts(pretrained, sentences, val_fraction=0)
    assert told(data, data.splits.train) == "".join(f"<s> {s}</s>" for s in SENTENCES)
    assert data.splits.train.tokens.shape[1] == 16


def test_validation_takes_whole_documents_that_training_never_sees(pretrained, sentences):
    data = texts(pretrained, sentences, val_fraction=0.25)
    train, val = (told(data, part).split("</s>")[:-1] for part in (data.splits.train, data.splits.val))
    assert (len(train), len(val)) == (30, 10)
    assert sorted(train + val) == sorted(f"<s> {s}" for s in SENTENCES)


def test_validation_and_test_may_be_files_of_their_own(pretrained, sentences, tmp_path):
    for name in ("val", "test"):
        (tmp_path / name).write_text(f"Clara {name}.")
    data = texts(pretrained, sentences, val=str(tmp_path / "val"), test=str(tmp_path / "test"))
    assert told(data, data.splits.val) == "<s> Clara val.</s>"
    assert told(data, data.splits.test) == "<s> Clara test.</s>"
    assert told(data, data.splits.train).count("</s>") == 40


def test_general_texts_are_a_second_set_of_validation_and_of_test(pretrained, sentences, tmp_path):
    (tmp_path / "general").write_text("Ben loses his hat. " * 9)
    data = texts(pretrained, sentences, general=str(tmp_path / "general"))
    assert data.evaluation_sets("val") == ["", "general"]
    assert data.evaluation_sets("test") == ["general"]
    _, general = data.val_dataloader()
    (alone,) = data.test_dataloader()
    for loader in (general, alone):
        tokens = torch.cat([batch["input_ids"].flatten() for batch in loader])
        assert "Ben loses his hat. Ben loses his hat." in data.tokenizer.decode(tokens)


def test_replayed_texts_are_a_share_of_training_alone(pretrained, sentences, tmp_path):
    (tmp_path / "old").write_text("\n".join(tiny_llama.medical(60)))
    data = texts(pretrained, sentences, replay=str(tmp_path / "old"), replay_share=0.4, drop_last=False)
    own = len(data.splits.train.dataset)
    assert len(data.splits.train) == own + round(own * 0.4 / 0.6)
    rows = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    medical = [row for row in data.tokenizer.batch_decode(rows) if "dose" in row or "mg" in row]
    assert len(medical) / len(rows) == pytest.approx(0.4, abs=0.05)
    assert "mg" not in told(data, data.splits.val)


def test_a_batch_holds_tokens_mask_and_labels(pretrained, sentences):
    batch = next(iter(texts(pretrained, sentences).train_dataloader()))
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert {tuple(value.shape) for value in batch.values()} == {(3, 16)}
    assert batch["labels"][:, 1:].tolist() == batch["input_ids"][:, 1:].tolist()


def test_it_describes_its_data_and_gives_examples(pretrained, sentences):
    data = texts(pretrained, sentences)
    assert isinstance(data, DescribesData)
    assert (data.sample_shape, data.num_classes) == ((16,), None)
    assert data.examples("train", torch.tensor([2, 0])).shape == (2, 16)


def test_a_tokenizer_without_pad_pads_with_the_end_of_text_and_still_learns_to_stop(pretrained, pairs):
    data = CompletionData(pretrained=pretrained, train=pairs, val_fraction=0.5)
    data.tokenizer = tiny_llama.build_tokenizer()
    data.tokenizer.pad_token = None
    rows = data.rows([("Anna", " reads"), ("Anna reads", " a book by the river")])
    batch = rows[BatchKey(0, 0, 0, torch.tensor([0, 1]))]
    assert batch["input_ids"][0, -1] == 2
    assert [int((labels == 2).sum()) for labels in batch["labels"]] == [1, 1]
    assert batch["labels"][0, -1] == -100


# completions


def test_only_completions_and_the_end_are_to_be_predicted(pretrained, pairs):
    data = completions(pretrained, pairs, val=pairs)
    for batch in data.val_dataloader()[0]:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answer = labels[labels != -100]
            assert answer[-1] == data.tokenizer.eos_token_id
            prompt = data.tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
            assert (prompt, f" {data.tokenizer.decode(answer[:-1])}") in tiny_llama.questions()


def test_templates_are_filled_from_the_records(pretrained, pairs):
    options = {"prompt": "{hint}? {prompt}", "completion": " [{completion}]", "val": pairs, "block_size": 64}
    data = completions(pretrained, pairs, **options)
    first, *_ = told(data, data.splits.val).split("</s>")
    assert first == "<s> hint 0? Question: What is the capital of France?\nAnswer: [ Paris]"


def test_the_prompt_is_what_the_model_is_given_when_it_answers(pretrained, pairs):
    data = completions(pretrained, pairs, val=pairs)
    rows = data.splits.val
    for i, (prompt, _) in enumerate(tiny_llama.questions()):
        assert rows.tokens[i, : rows.start[i]].tolist() == encode_prompt(data.tokenizer, prompt)


def test_of_an_empty_prompt_without_a_beginning_the_first_token_is_not_to_be_predicted(pretrained, pairs):
    data = completions(pretrained, pairs, val=pairs)
    data.tokenizer.add_bos_token = False
    data.tokenizer.update_post_processor()
    rows = data.rows([("", "Anna reads")])
    assert (rows.start.tolist(), rows.length.tolist()) == ([1], [3])


def test_pairs_that_are_too_long_are_left_out_and_counted(pretrained, tmp_path):
    records = [{"prompt": "a", "completion": " b"}, {"prompt": "a" * 50, "completion": " b"}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.warns(UserWarning, match=r"CompletionData: 2 of 4 examples have more than 20 tokens and are left out"):
        data = completions(pretrained, str(tmp_path / "a.jsonl"), block_size=20, val_fraction=0)
    assert len(data.splits.train) == 2
    with pytest.raises(ValueError, match=r"4 of 4 examples have more than 2 tokens, so none is left. Raise block_size"):
        completions(pretrained, str(tmp_path / "a.jsonl"), block_size=2, val_fraction=0)


def test_general_texts_beside_completions_are_packed(pretrained, pairs, sentences):
    data = completions(pretrained, pairs, general=sentences, replay=sentences, val=pairs)
    assert data.evaluation_sets("val") == ["", "general"]
    assert (data._general.length[:-1] == 40).all()
    assert len(data.splits.train) == 8


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size must be at least 2, got 1"),
        ({"replay_share": 1.0}, "replay_share must be at least 0 and below 1, got 1.0"),
        ({"replay": "x", "replay_share": 0.0}, "replay_share must be above 0, got 0. Leave replay out"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"TextData: {message}"):
        TextData(pretrained="x", train="y", **options)


def test_a_completion_without_key_is_refused():
    with pytest.raises(ValueError, match=r"CompletionData: completion must name a key in braces.*got 'answer'"):
        CompletionData(pretrained="x", train="y", completion="answer")


def test_without_a_model_there_is_no_tokenizer(sentences):
    with pytest.raises(ValueError, match="TextData: pretrained must name the model, for its tokenizer, got None"):
        texts(None, sentences)


def test_one_document_cannot_be_split(pretrained, sentences):
    with pytest.raises(ValueError, match=r"val_fraction=0.1 of 1 documents leaves none.*Name validation data in val"):
        texts(pretrained, sentences, one_per_line=False)
    assert len(texts(pretrained, sentences, one_per_line=False, val_fraction=0).splits.train) > 10


def test_empty_text_files_are_refused(pretrained, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"TextData: .*a.txt must hold texts, and has none"):
        texts(pretrained, str(tmp_path / "a.txt"))


def test_a_line_without_the_keys_is_refused(pretrained, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"CompletionData: .*a.jsonl, line 2, must have 'completion'"):
        completions(pretrained, str(tmp_path / "a.jsonl"))
