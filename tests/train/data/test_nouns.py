"""English nouns in captions."""

import pytest

from train.data.nouns import count_noun, join_words, pluralize, with_article


@pytest.mark.parametrize(
    ("noun", "article", "plural"),
    [
        ("dog", "a dog", "dogs"),
        ("apple", "an apple", "apples"),
        ("orange disc", "an orange disc", "orange discs"),
        ("red plus", "a red plus", "red pluses"),
        ("bus", "a bus", "buses"),
        ("dress", "a dress", "dresses"),
        ("wine glass", "a wine glass", "wine glasses"),
        ("bench", "a bench", "benches"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
        ("box", "a box", "boxes"),
        ("teddy bear", "a teddy bear", "teddy bears"),
        ("cherry", "a cherry", "cherries"),
        ("toy", "a toy", "toys"),
        ("person", "a person", "people"),
        ("sheep", "a sheep", "sheep"),
        ("knife", "a knife", "knives"),
        ("pants", "pants", "pants"),
        ("scissors", "scissors", "scissors"),
        ("skis", "skis", "skis"),
        ("tennis racket", "a tennis racket", "tennis rackets"),
        ("one", "a one", "ones"),
        ("unicycle", "a unicycle", "unicycles"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("eight", "an eight", "eights"),
    ],
)
def test_articles_and_plurals(noun, article, plural):
    assert (with_article(noun), pluralize(noun)) == (article, plural)


def test_nouns_are_counted_in_words_up_to_twelve():
    counted = [count_noun("dog", count) for count in (0, 1, 2, 12, 13)]
    assert counted == ["no dogs", "a dog", "two dogs", "twelve dogs", "13 dogs"]


def test_lists_end_in_and():
    assert join_words(["a dog"]) == "a dog" and join_words(["a dog", "a cat"]) == "a dog and a cat"
    assert join_words(["a dog", "a cat", "two birds"]) == "a dog, a cat and two birds"
