"""Canvases larger than the grid: windows cover them, and their probabilities are averaged."""

import pytest
import torch

from diffusion.windows import window_starts, windowed

CODES = 5


def denoise(x, t):
    """Logits that depend on the time, on every code of the window and on the place in it."""
    places = torch.arange(x[0].numel() * CODES).view(*x.shape[1:], CODES)  # (h, w, K)
    content = x.flatten(1).float() @ torch.arange(x[0].numel()).float().cos()  # (B,)
    return 2 * torch.sin(places * (content + t)[:, None, None, None])


def canvas(*shape):
    return torch.randint(0, CODES + 1, shape, generator=torch.Generator().manual_seed(0))


def test_the_windows_cover_the_canvas_and_stay_inside():
    for length in range(1, 13):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                starts = window_starts(length, window, stride)
                assert {i + j for i in starts for j in range(window)} == set(range(length))
                assert len(set(starts)) == len(starts) and set(range(0, length - window + 1, stride)) <= set(starts)


def test_a_canvas_of_one_window_is_the_plain_denoiser():
    x, t = canvas(3, 4, 6), torch.rand(3)
    assert torch.allclose(windowed(denoise, (4, 6))(x, t).exp(), denoise(x, t).softmax(-1), atol=1e-6)


def test_two_windows_over_three_codes_by_hand():
    p = {0: [[0.2, 0.8], [0.4, 0.6]], 1: [[0.1, 0.9], [0.9, 0.1]]}  # by the first code of the crop

    def by_first(x, t):
        return torch.tensor([[p[int(row[0])] for row in crop] for crop in x]).log()

    logits = windowed(by_first, (1, 2))(torch.tensor([[[0, 1, 2]]]), torch.ones(1))
    assert torch.allclose(logits[0, 0].exp(), torch.tensor([[0.2, 0.8], [0.25, 0.75], [0.9, 0.1]]))
    averaged_logits = ((torch.tensor(p[0][1]).log() + torch.tensor(p[1][0]).log()) / 2).softmax(0)
    assert not torch.allclose(logits[0, 0, 1].exp(), averaged_logits, atol=0.01)  # probabilities, not logits


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_mixture_against_a_loop(stride):
    x, t, (h, w) = canvas(2, 5, 7), torch.tensor([0.2, 0.9]), (3, 4)
    total, count = torch.zeros(2, 5, 7, CODES), torch.zeros(5, 7)
    for i in window_starts(5, h, stride):
        for j in window_starts(7, w, stride):
            total[:, i : i + h, j : j + w] += denoise(x[:, i : i + h, j : j + w], t).softmax(-1)
            count[i : i + h, j : j + w] += 1
    wanted = total / count[..., None]
    assert torch.allclose(windowed(denoise, (h, w), stride)(x, t).exp(), wanted, atol=1e-6)
    assert torch.allclose(wanted.sum(-1), torch.ones(2, 5, 7))


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_windows_come_in_whole_copies_of_the_batch(batch):
    x, t, sizes = canvas(2, 4, 5), torch.tensor([0.25, 0.75]), []

    def recording(crops, times):
        sizes.append(len(crops))
        assert torch.equal(times, t.repeat(len(crops) // 2))  # row i belongs to canvas i mod B
        return denoise(crops, times)

    together = windowed(recording, (2, 3), batch=batch)(x, t)
    assert sum(sizes) == 2 * 3 * 3 and max(sizes) <= max(2, batch) and all(size % 2 == 0 for size in sizes)
    alone = torch.cat([windowed(denoise, (2, 3))(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("stride", [0, -1, 4])
def test_strides_that_leave_gaps_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride {stride}, wanted 1..3"):
        window_starts(9, 3, stride)


def test_a_canvas_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="canvas of 3 is smaller than the window of 4"):
        windowed(denoise, (2, 4))(canvas(1, 5, 3), torch.ones(1))
