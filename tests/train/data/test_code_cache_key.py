"""The key of codes: everything that made them, and nothing else."""

from train.data.code_cache import cache_key

MADE_OF = {"weights": "abc", "data": "digits", "img_size": 32, "flips": False, "shifts": [0, 1]}


def test_any_change_is_another_key():
    changes = [{"weights": "abd"}, {"data": "mnist"}, {"img_size": 64}, {"flips": True}, {"shifts": [1, 0]}, {"new": 1}]
    keys = [cache_key(**MADE_OF), *(cache_key(**(MADE_OF | change)) for change in changes)]
    assert len(set(keys)) == len(keys)


def test_the_order_of_the_words_is_no_change():
    assert cache_key(**dict(reversed(MADE_OF.items()))) == cache_key(**MADE_OF)
