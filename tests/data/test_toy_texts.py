import pytest

from lit_generative.data.toy_texts import ToyQuestions, ToyTexts, everyday, medical, questions, word_soup
from tests.finetune import tiny_llama


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_llama.build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_texts_are_functions_of_their_seed():
    for world in (everyday, medical, word_soup):
        assert world(5, seed=1) == world(5, seed=1)
        assert world(5, seed=1) != world(5, seed=2)
        assert len(world(7)) == 7


def test_sentences_are_of_their_world():
    assert all(s.endswith(" mg twice a day.") for s in medical(20))
    assert all(s.split()[0] in ("Anna", "Ben", "Clara", "David", "Eva") for s in everyday(20))
    assert len(set(questions())) == 6


def test_the_soup_holds_words_of_every_text():
    words = {word for text in word_soup(300) for word in text.split(" ")}
    assert {"Anna", "Codeine", "Lima"} <= words
    assert {len(text.split(" ")) for text in word_soup(3)} == {12}


def test_medical_texts_are_trained_on_and_everyday_ones_watched(pretrained):
    data = ToyTexts(pretrained=pretrained, num_sentences=40, batch_size=4, replay="everyday:3")
    data.setup("fit")
    assert data.evaluation_sets("val") == ["", "general"]
    assert "mg twice a day." in data.tokenizer.decode(data.splits.train.dataset.tokens[0])
    assert data.documents("everyday:3") == everyday(40, 3)
    assert data.sample_shape == (64,)


def test_questions_are_asked_in_training_and_validation(pretrained):
    data = ToyQuestions(pretrained=pretrained, repeats=3, batch_size=6)
    data.setup("fit")
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [18, 6, 6]
    other = ToyQuestions(pretrained=pretrained, prompt="Tell. {prompt}")
    assert other.read("val")[0] == ("Tell. Question: What is the capital of France?\nAnswer:", " Paris")


@pytest.mark.parametrize("place", ["medical", "medical:x", "legal:1"])
def test_an_unknown_place_is_refused(place):
    with pytest.raises(ValueError, match=rf"ToyTexts: a place reads world:seed, .*'soup'\], got '{place}'"):
        ToyTexts(pretrained="x").read(place)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="ToyTexts: num_sentences must be at least 1, got 0"):
        ToyTexts(pretrained="x", num_sentences=0)
    with pytest.raises(ValueError, match="ToyQuestions: repeats must be at least 1, got 0"):
        ToyQuestions(pretrained="x", repeats=0)
