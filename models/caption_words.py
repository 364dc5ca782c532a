"""The words of a caption among the tokens of the text condition: which keys of an attention map are theirs.

Words are found as a whole, so that "hat" is not in "hatter".
"""

from models.conditions.text import CaptionEncoder
from models.prompts import PromptTokenizer


def find_words(text: str, phrase: str, tokenizer: PromptTokenizer) -> list[range]:
    """Returns where a word, or several in a row, occurs in a text: the ids of each occurrence in `encode(text)`.

    Case and spaces do not matter. ValueError for a phrase without words, and for one that the text does not have.
    """
    words, wanted = tokenizer.words(text), [word for word, _ in tokenizer.words(phrase)]
    if not wanted:
        raise ValueError(f"got the word {phrase!r}, wanted letters, digits or signs")
    starts = range(len(words) - len(wanted) + 1)
    found = [i for i in starts if [word for word, _ in words[i : i + len(wanted)]] == wanted]
    if not found:
        raise ValueError(f"got the word {phrase!r}, wanted one of {text!r}: {', '.join(word for word, _ in words)}")
    return [range(words[i][1].start, words[i + len(wanted) - 1][1].stop) for i in found]


def distinct_words(text: str, tokenizer: PromptTokenizer) -> list[str]:
    """Returns the words of a text in their order, each once, without signs such as commas."""
    words = (word for word, _ in tokenizer.words(text))
    return [word for word in dict.fromkeys(words) if any(map(str.isalnum, word))]


def token_of_id(place: int, encoder: CaptionEncoder) -> int:
    """Returns the token of the condition that is id number `place` of a caption in `encode(caption)`.

    Tokens of the null come first if padding is not read; each chunk has a start and an end. Where there are several,
    all have the encoder's full length.
    """
    chunk, rest = divmod(place, encoder.length - 2)
    return encoder.null_length + chunk * encoder.length + 1 + rest


def tokens_of_words(caption: str, phrase: str, encoder: CaptionEncoder) -> list[int]:
    """Returns the tokens of all occurrences of a word or phrase in a caption, by their numbers in the condition.

    They are of captions that were given as texts. ValueError as in `find_words`.
    """
    places = [place for occurrence in find_words(caption, phrase, encoder.tokenizer) for place in occurrence]
    return [token_of_id(place, encoder) for place in places]


def tokens_of_caption(caption: str, encoder: CaptionEncoder) -> list[int]:
    """Returns the tokens of a caption without start, end and padding, by their numbers in the condition."""
    return [token_of_id(place, encoder) for place in range(len(encoder.tokenizer.encode(caption)))]
