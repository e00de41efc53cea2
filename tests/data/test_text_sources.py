import json
import sys

import datasets
import pytest

from lit_generative.data.text_sources import fields, read_documents, read_records


def lines(path, *records):
    texts = [json.dumps(r, ensure_ascii=False) if isinstance(r, dict) else r for r in records]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def test_a_text_file_is_one_document_or_one_each_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Änna reads.\n\n  \nBen paints.\n", encoding="utf-8")
    assert read_documents("T", str(path)) == ["Änna reads.\n\n  \nBen paints.\n"]
    assert read_documents("T", str(path), one_per_line=True) == ["Änna reads.", "Ben paints."]


def test_a_folder_gives_its_text_files_at_any_depth_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        (tmp_path / name).write_text(name)
    assert read_documents("T", str(tmp_path)) == ["a.txt", "b.txt", "deep/c.txt"]


def test_documents_may_be_a_key_of_records(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "one", "body": "two"}, {"text": " ", "body": "three"})
    assert read_documents("T", path) == ["one"]
    assert read_documents("T", path, column="body") == ["two", "three"]


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_empty_texts_are_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    for place in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(ValueError, match=r"TextData: .* must hold texts, and has none that is not blank"):
            read_documents("TextData", str(place))


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold texts, and has none .*Give \*.txt or a JSONL file"):
        read_documents("TextData", str(tmp_path))


def test_another_encoding_is_refused_with_the_files_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("Ä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt must be a text in UTF-8: .*Convert it"):
        read_documents("TextData", str(tmp_path))


@pytest.mark.parametrize("place", ["/no/such", "nothing", "nothing.jsonl"])
def test_a_place_that_is_not_there_is_refused(place):
    with pytest.raises(FileNotFoundError, match=f"TextData: there is no '{place}'. Give a file"):
        read_documents("TextData", place)


# records


def test_records_are_read_and_blank_lines_passed_by(tmp_path):
    first = {"prompt": "1\u2028", "completion": "2", "more": 3}
    path = lines(tmp_path / "a.jsonl", first, "", {"prompt": "4", "completion": "5"})
    records = read_records("T", path, ["prompt", "completion"])
    assert [record["prompt"] for record in records] == ["1\u2028", "4"]


def test_a_line_without_the_keys_is_named_by_file_and_number(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, "", {"prompt": "a", "answer": "b"})
    with pytest.raises(ValueError, match=r"T: .*a.jsonl, line 3, must have 'completion', but has 'prompt', 'answer'"):
        read_records("T", path, ["prompt", "completion"])


@pytest.mark.parametrize(("line", "message"), [("[1]", r"object, got '\[1\]'"), ("{'a': 1}", "object: Expecting")])
def test_a_line_that_is_no_object_is_named_by_file_and_number(tmp_path, line, message):
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, line)
    with pytest.raises(ValueError, match=f"T: .*a.jsonl, line 2, must be a JSON {message}"):
        read_records("T", path, ["text"])


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"T: .*a.jsonl must hold records, and is empty"):
        read_records("T", lines(tmp_path / "a.jsonl"), ["text"])


def test_a_template_names_its_keys_once():
    assert fields("### {instruction}\n{input} {{no}} {instruction}") == ["instruction", "input"]
    assert fields("no key") == []


# Hugging Face data sets


def saved(folder, **splits):
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    (datasets.DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))).save_to_disk(str(folder))
    return str(folder)


def test_a_saved_data_set_is_read(tmp_path):
    assert read_documents("T", saved(tmp_path / "one", train=["a", "b"])) == ["a", "b"]


def test_of_a_saved_data_set_with_splits_one_is_named(tmp_path):
    place = saved(tmp_path / "two", train=["a"], test=["b", "c"])
    assert read_documents("T", place) == ["a"]
    assert read_documents("T", f"{place}:test") == ["b", "c"]
    with pytest.raises(ValueError, match=r"must have the split 'val', but has 'train', 'test'. Name"):
        read_documents("T", f"{place}:val")


def test_a_record_of_a_data_set_without_the_key_is_named(tmp_path):
    place = saved(tmp_path / "one", train=["a", "b"])
    with pytest.raises(ValueError, match=r"T: record 0 of .*one must have 'body', but has 'text'"):
        read_documents("T", place, column="body")


def test_a_data_set_of_the_hub_is_asked_for_by_name_config_and_split(monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        return {"train": [{"text": "a"}], "test": [{"text": "b"}]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("T", "owner/name") == ["a"]
    assert read_documents("T", "owner/name:test") == ["b"]
    assert read_documents("T", "owner/name:small-v1:test") == ["b"]
    assert asked == [("owner/name", None), ("owner/name", None), ("owner/name", "small-v1")]


def test_a_data_set_that_cannot_be_had_is_refused(monkeypatch):
    def load(name, config):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="T: the data set 'owner/name' could not be loaded: Couldn't reach"):
        read_documents("T", "owner/name")


def test_without_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="T: owner/name is a Hugging Face data set, and the package datasets is not"):
        read_documents("T", "owner/name")
