"""Random streams: independence of the batch, and frequencies of categorical samples."""

import math

import pytest
import torch

from diffusion.rng import Streams, sample_categorical, seed_of


class FixedStreams(Streams):
    """Streams with fixed uniform numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self, shape, dtype=torch.float32):
        return self.numbers.to(dtype).expand(shape)


@pytest.mark.parametrize("method", ["uniform", "normal", "categorical"])
def test_the_numbers_of_a_seed_do_not_depend_on_its_neighbours(method):
    def draw(seeds):
        argument = torch.zeros(len(seeds), 50, 9) if method == "categorical" else (len(seeds), 50)
        return getattr(Streams(seeds), method)(argument)

    batched = draw([3, 7, 8])
    assert torch.equal(batched[1:2], draw([7])) and torch.equal(batched[[2, 0]], draw([8, 3]))
    assert not torch.equal(batched[0], batched[1])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (15,), (16,), (17,), (3, 40), (2, 8, 8)])
def test_numbers_are_those_of_a_generator_per_example(shape):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (4, 9)]

    for dtype in (torch.float32, torch.float64):
        rng, plain = Streams([4, 9]), generators()
        for _ in range(2):
            expected = torch.stack([torch.rand(shape, generator=generator, dtype=dtype) for generator in plain])
            assert torch.equal(rng.uniform((2, *shape), dtype), expected)
    rng, plain = Streams([4, 9]), generators()
    for _ in range(2):
        expected = torch.stack([torch.randn(shape, generator=generator) for generator in plain])
        assert torch.equal(rng.normal((2, *shape)), expected)


def test_numbers_on_the_cpu_are_those_of_the_device():
    rng = Streams([1, 2], "meta")
    assert torch.equal(rng.uniform_on_cpu((2, 5)), Streams([1, 2]).uniform((2, 5)))
    assert rng.uniform((2, 5)).device.type == "meta" and rng.move_uniform(torch.zeros(3)).device.type == "meta"


def test_a_stream_goes_on():
    rng = Streams([1, 2])
    assert not torch.equal(rng.uniform((2, 9)), rng.uniform((2, 9)))
    assert len(rng) == 2


def test_uniform_and_normal_have_their_moments():
    rng = Streams([0])
    u, z = rng.uniform((1, 40_000)), rng.normal((1, 40_000))
    assert 0 <= u.min() and u.max() < 1
    assert u.mean() == pytest.approx(1 / 2, abs=0.01) and u.var() == pytest.approx(1 / 12, abs=0.002)
    assert z.mean() == pytest.approx(0, abs=0.025) and z.var() == pytest.approx(1, abs=0.035)
    assert (z**4).mean() == pytest.approx(3, abs=0.3)


def test_categorical_draws_follow_the_softmax(p_value):
    logits = torch.tensor([3.0, 0.0, -2.0, 1.0, -8.0])
    draws = Streams([0]).categorical(logits.expand(1, 20_000, 5))[0]
    assert p_value(draws, logits.double().softmax(0)) > 1e-4


def test_each_position_is_drawn_from_its_own_logits():
    expected = torch.randint(0, 6, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    certain = torch.nn.functional.one_hot(expected, 6).float().log()
    assert torch.equal(Streams([0, 1]).categorical(certain), expected)


def test_a_rare_class_has_exactly_its_share_of_the_interval():
    logits = torch.tensor([0.5, 1e-9, 0.5], dtype=torch.float64).log()
    u = torch.tensor([0.0, 0.5 - 1e-9, 0.5 + 1e-11, 0.5 + 4.9e-10, 0.5 + 1e-9, 1 - 2**-53], dtype=torch.float64)
    assert FixedStreams(u).categorical(logits.expand(6, 3)).tolist() == [0, 0, 1, 1, 2, 2]


def test_float32_gumbel_noise_would_get_rare_classes_wrong():
    noise = -(-torch.tensor([0.0, 2**-24, 1 - 2**-24]).log()).log()  # u = 0, and the ends of the rest of its range
    rare, common = math.log(1e-9), math.log(1 - 1e-9)
    assert rare + noise[2] < common + noise[1]  # with u > 0 a class of 1e-9 cannot win at all
    assert rare + noise[1] > common + noise[0]  # with u = 0, of probability 6e-8, it always does: 60 times too often


def test_rare_classes_do_not_add_up_to_a_common_one():
    logits = torch.tensor([1.0] + [1e-9] * 999).log()
    assert (Streams([0]).categorical(logits.expand(1, 2000, 1000)) == 0).all()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_class_without_probability_is_never_drawn(u):
    logits = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.7, 0.0, 0.0], dtype=torch.float64).log()
    draw = FixedStreams(torch.tensor(u, dtype=torch.float64)).categorical(logits[None])
    assert draw == (2 if u == 0 else 4)


def test_logits_need_not_be_normalised_and_may_be_half_precision():
    logits, rng = torch.tensor([[300.0, 300.0, -300.0]]), FixedStreams(torch.tensor([0.499]))
    for equivalent in (logits, logits - 1000, logits.bfloat16()):
        assert rng.categorical(equivalent) == 0


def test_selected_streams_share_state_and_others_stand_still():
    rng, single = Streams([1, 2, 3]), Streams([3])
    assert torch.equal(rng.select([2, 0]).uniform((2, 4))[:1], single.uniform((1, 4)))
    assert torch.equal(rng.uniform((3, 4))[2:], single.uniform((1, 4)))  # the selected stream has advanced
    assert torch.equal(rng.select([1]).uniform((1, 4)), Streams([2]).uniform((1, 8))[:, 4:])
    assert len(rng.select([])) == 0 and rng.select([1]).device == rng.device


def test_sample_categorical_inverts_the_cdf():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    u = torch.tensor([[0.0, 0.49, 0.51, 0.74, 0.76], [0.05, 0.15, 0.21, 0.5, 0.999]], dtype=torch.float64)
    assert sample_categorical(logits[:, None].expand(2, 5, 3), u).tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]
    assert sample_categorical(torch.zeros(0, 3), torch.zeros(0)).shape == (0,)
    rng = Streams([5])
    assert torch.equal(
        Streams([5]).categorical(logits[None]), sample_categorical(logits[None], rng.uniform((1, 2), torch.float64))
    )


@pytest.mark.parametrize("method", ["uniform", "normal", "categorical"])
def test_a_batch_of_another_size_is_refused(method):
    argument = torch.zeros(3, 4, 5) if method == "categorical" else (3, 4)
    with pytest.raises(ValueError, match="batch of 3 for 2 random streams"):
        getattr(Streams([1, 2]), method)(argument)


def test_seeds_differ_only_if_their_words_do():
    words = [(seed, purpose, i) for seed in range(10) for purpose in ("mask", "noise") for i in range(100)]
    seeds = {seed_of(*w) for w in words}
    assert len(seeds) == len(words) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "mask", 1) == seed_of(0, "mask", 1)
    assert seed_of(1, 11) != seed_of(11, 1) != seed_of(111)
    torch.Generator().manual_seed(max(seeds))  # accepted as a seed
