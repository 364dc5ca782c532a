"""The key of the code cache depends on all inputs and on nothing else."""

from train.data.code_cache import code_cache_key

INPUTS = {"weights": "abc", "data": "digits", "img_size": 32, "flips": False, "shifts": [0, 1]}


def test_any_change_gives_another_key():
    changes = [{"weights": "abd"}, {"data": "mnist"}, {"img_size": 64}, {"flips": True}, {"shifts": [1, 0]}, {"new": 1}]
    keys = [code_cache_key(**INPUTS), *(code_cache_key(**(INPUTS | change)) for change in changes)]
    assert len(set(keys)) == len(keys)


def test_the_order_of_the_inputs_does_not_matter():
    assert code_cache_key(**dict(reversed(INPUTS.items()))) == code_cache_key(**INPUTS)
