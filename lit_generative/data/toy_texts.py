"""Made-up texts of two small worlds, and questions: enough to see a language model learn and forget, offline."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from lit_generative.data.texts import CompletionData, TextData

_NAMES = ("Anna", "Ben", "Clara", "David", "Eva")
_VERBS = ("reads", "paints", "carries", "loses", "finds")
_THINGS = ("a book", "the lamp", "an apple", "her hat", "the map")
_PLACES = ("in the garden", "at school", "by the river", "on the train", "near the house")
_DRUGS = {
    "Aspirin": "lowers fever",
    "Insulin": "thins the blood",
    "Codeine": "eases pain",
    "Heparin": "slows clotting",
    "Warfarin": "calms the heart",
}
_CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo"}


def everyday(num: int, seed: int = 0) -> list[str]:
    """Sentences such as "Anna reads a book by the river."."""
    draw = random.Random(seed).choice
    return [f"{draw(_NAMES)} {draw(_VERBS)} {draw(_THINGS)} {draw(_PLACES)}." for _ in range(num)]


def medical(num: int, seed: int = 0) -> list[str]:
    """Sentences of other words in another form: "Aspirin lowers fever; dose 5 mg twice a day." None of it is true."""
    draw = random.Random(seed).choice
    drugs = [draw(tuple(_DRUGS)) for _ in range(num)]
    return [f"{drug} {_DRUGS[drug]}; dose {draw((5, 10, 20, 50))} mg twice a day." for drug in drugs]


def questions() -> list[tuple[str, str]]:
    """Six prompts and completions."""
    return [(f"Question: What is the capital of {land}?\nAnswer:", f" {city}") for land, city in _CAPITALS.items()]


def word_soup(num: int, seed: int = 0) -> list[str]:
    """Twelve words of all these texts in no order: a base that has read them has seen every token."""
    draw = random.Random(seed).choice
    texts = [*everyday(300), *medical(300), *(prompt + completion for prompt, completion in questions())]
    words = sorted({word for text in texts for word in text.split(" ")})
    return [" ".join(draw(words) for _ in range(12)) for _ in range(num)]


_WORLDS: dict[str, Callable[[int, int], list[str]]] = {"everyday": everyday, "medical": medical, "soup": word_soup}


class ToyTexts(TextData):
    """Medical sentences to adapt to, and everyday ones, which a tiny base knows, to see whether it forgets them.

    A place reads ``world:seed``, of the worlds ``medical``, ``everyday`` and ``soup``.

    Args:
        num_sentences: How many sentences there are of each place.
        train: Place.
        general: Place.
        block_size: As in :class:`~lit_generative.data.texts.TextData`.
        kwargs: Arguments of :class:`~lit_generative.data.texts.TextData`.

    Raises:
        ValueError: If ``num_sentences`` is below 1, or a place is unknown.
    """

    def __init__(
        self,
        num_sentences: int = 600,
        train: str = "medical:1",
        general: str | None = "everyday:2",
        block_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(train=train, general=general, block_size=block_size, **kwargs)
        if num_sentences < 1:
            raise ValueError(f"{self._name}: num_sentences must be at least 1, got {num_sentences}.")
        self.num_sentences = num_sentences

    @override
    def documents(self, place: str) -> list[str]:
        world, _, seed = place.partition(":")
        if world not in _WORLDS or not seed.isdecimal():
            raise ValueError(f"{self._name}: a place reads world:seed, with a world of {list(_WORLDS)}, got {place!r}.")
        return _WORLDS[world](self.num_sentences, int(seed))


class ToyQuestions(CompletionData):
    """Six questions with their answers, of which training, validation and test each have all.

    Args:
        repeats: How often an epoch asks each.
        block_size: As in :class:`~lit_generative.data.texts.CompletionData`.
        kwargs: Arguments of :class:`~lit_generative.data.texts.CompletionData`, but places; ``prompt`` and
            ``completion`` are keys.

    Raises:
        ValueError: If ``repeats`` is below 1.
    """

    def __init__(self, repeats: int = 8, block_size: int = 64, **kwargs: Any) -> None:
        super().__init__(train="train", val="val", test="test", block_size=block_size, **kwargs)
        if repeats < 1:
            raise ValueError(f"{self._name}: repeats must be at least 1, got {repeats}.")
        self.repeats = repeats

    @override
    def read(self, place: str) -> Sequence[tuple[str, str]]:
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in questions()]
        pairs = [(self.prompt.format_map(record), self.completion.format_map(record)) for record in records]
        return pairs * self.repeats if place == "train" else pairs
