import sys

import huggingface_hub.constants
import pytest

from lit_generative.data.tokenizers import (
    check_place,
    encode_completions,
    encode_documents,
    encode_prompt,
    is_hub_name,
    load_tokenizer,
)
from tests.finetune import tiny_llama

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_llama.build_tokenizer()


def test_a_prompt_begins_the_text_and_does_not_end_it(tokenizer):
    ids = encode_prompt(tokenizer, "Insulin thins the blood;")
    assert ids[0] == BOS
    assert EOS not in ids
    assert tokenizer.decode(ids[1:]) == "Insulin thins the blood;"


def test_a_document_ends_with_the_end_of_text_token_once(tokenizer):
    (ids,) = encode_documents(tokenizer, ["Anna reads a book."])
    assert ids == [*encode_prompt(tokenizer, "Anna reads a book."), EOS]


def test_a_tokenizer_that_ends_texts_itself_does_not_end_them_twice_and_ends_no_prompt(tokenizer, monkeypatch):
    class Ends:
        eos_token_id = EOS

        def __call__(self, texts, **options):
            return {"input_ids": [[*ids, EOS] for ids in tokenizer(texts, **options)["input_ids"]]}

    assert encode_prompt(Ends(), "Anna") == encode_prompt(tokenizer, "Anna")
    assert list(encode_documents(Ends(), ["Anna"])) == list(encode_documents(tokenizer, ["Anna"]))


def test_special_tokens_in_a_text_are_letters(tokenizer):
    ids = encode_prompt(tokenizer, "a </s> b <s>")
    assert EOS not in ids
    assert BOS not in ids[1:]
    assert tokenizer("a </s> b").input_ids.count(EOS) == 1  # what would happen


def test_many_documents_keep_their_order(tokenizer):
    texts = [f"dose {i}" for i in range(1003)]
    encoded = list(encode_documents(tokenizer, texts))
    assert len(encoded) == 1003
    assert encoded[1002] == next(encode_documents(tokenizer, ["dose 1002"]))


def test_a_completion_follows_the_very_tokens_of_its_prompt(tokenizer):
    pairs = [("Question: Peru?\nAnswer:", " Lima"), ("Question: Peru?\nAns", "wer: Lima"), ("", "Anna")]
    assert encode_prompt(tokenizer, "".join(pairs[1]))[:9] != encode_prompt(tokenizer, pairs[1][0])[:9]
    for (prompt, completion), (ids, start) in zip(pairs, encode_completions(tokenizer, pairs), strict=True):
        assert ids[:start] == encode_prompt(tokenizer, prompt)
        assert ids[-1] == EOS
        assert EOS not in ids[:-1]
        assert tokenizer.decode(ids[start:-1]).strip() == completion.strip()


def test_a_completion_is_cut_as_in_the_whole_text_where_that_keeps_the_prompt(tokenizer):
    ((ids, _),) = encode_completions(tokenizer, [("The map is", " near the house")])
    assert ids[:-1] == encode_prompt(tokenizer, "The map is near the house")


def test_names_on_the_hub_read_owner_and_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name-1.0")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert not is_hub_name("owner/name")
    for name in ("name", "/a/b", "a/b/c", ""):
        assert not is_hub_name(name)


@pytest.mark.parametrize("path", ["/no/such/folder", "nothing", ""])
def test_a_folder_that_is_not_there_is_refused(path):
    with pytest.raises(ValueError, match=f"TextData: there is no folder '{path}', and names .* holds b and c"):
        check_place("TextData", path, "b and c")


def test_a_saved_tokenizer_is_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert encode_prompt(load_tokenizer("TextData", str(tmp_path)), "Anna") == encode_prompt(tokenizer, "Anna")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"TextData: .* holds no tokenizer that could be loaded: .*Give the folder"):
        load_tokenizer("TextData", str(tmp_path))


def test_a_name_on_the_hub_without_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="TextData: 'nobody/nothing' holds no tokenizer"):
        load_tokenizer("TextData", "nobody/nothing")


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer, tmp_path):
    other = tiny_llama.build_tokenizer()
    other.eos_token = None
    other.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(text.replace("LlamaTokenizer", "PreTrainedTokenizerFast"))
    with pytest.raises(ValueError, match=r"TextData: .* must have an end-of-text token \(eos_token\)"):
        load_tokenizer("TextData", str(tmp_path))


def test_without_transformers_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers, which is not installed. Install lit-generative\[finetune\]"):
        load_tokenizer("TextData", str(tmp_path))
