"""Canvases larger than the grid: windows cover them, and their probabilities are averaged."""

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.denoisers import window_starts, windowed
from diffusion.solvers import solvers_for
from helpers.solving import solve_in_steps

CODES = 5
PROCESS = AbsorbingDiffusion(CODES)
SOLVERS = solvers_for(PROCESS)


def denoise(x, t, rows=None):
    """Logits that depend on the time, every code of the window and the position; in float64, since the sine of a large
    number would reveal the order of summation."""
    positions = torch.arange(x[0].numel() * CODES).view(*x.shape[1:], CODES)  # (h, w, K)
    content = x.flatten(1).double() @ torch.arange(x[0].numel()).double().cos()  # (B,)
    return (2 * torch.sin(positions * (content + t)[:, None, None, None])).float()


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

    def denoise_by_first(x, t, rows=None):
        return torch.tensor([[p[int(row[0])] for row in crop] for crop in x]).log()

    logits = windowed(denoise_by_first, (1, 2))(torch.tensor([[[0, 1, 2]]]), torch.ones(1))
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
    expected = total / count[..., None]
    assert torch.allclose(windowed(denoise, (h, w), stride)(x, t).exp(), expected, atol=1e-6)
    assert torch.allclose(expected.sum(-1), torch.ones(2, 5, 7))


def denoise_by_row(x, t, rows):
    """Like `denoise`, but also depends on the row."""
    return denoise(x, t + 10 * rows)


@pytest.mark.parametrize("batch", [1, 5, 1000])
@pytest.mark.parametrize("rows", [None, [4, 1]])
def test_windows_are_batched_with_their_own_times_and_rows(batch, rows):
    x, t, sizes = canvas(2, 4, 5), torch.tensor([0.25, 0.75]), []
    row_ids = torch.arange(2) if rows is None else torch.tensor(rows)

    def recording(crops, times, rows):
        sizes.append(len(crops))
        assert torch.equal(times, t[(rows[:, None] == row_ids).int().argmax(1)])
        return denoise_by_row(crops, times, rows)

    batched = windowed(recording, (2, 3), batch=batch)(x, t, rows if rows is None else row_ids)
    assert sum(sizes) == 2 * 3 * 3 and len(sizes) == -(-18 // batch)
    assert all(size == batch for size in sizes[:-1])
    separate = [windowed(denoise_by_row, (2, 3))(x[i : i + 1], t[i : i + 1], row_ids[i : i + 1]) for i in range(2)]
    assert torch.allclose(batched, torch.cat(separate), atol=1e-5)


# Windows in which nothing is masked


def masked(x):
    return x == CODES


def partly_known(*shape):
    """Masked in the first columns only; the second canvas is complete."""
    x = canvas(*shape).clamp(max=CODES - 1)
    x[:, :, :3] = torch.where(canvas(*shape)[:, :, :3] > 1, CODES, x[:, :, :3])
    x[1] = x[1].clamp(max=CODES - 1)
    return x


@pytest.mark.parametrize("stride", [1, 2])
def test_complete_windows_are_skipped_without_changing_others(stride):
    x, t, calls = partly_known(3, 5, 8), torch.rand(3), []

    def recording(crops, times, rows):
        calls.append((crops, rows))
        return denoise_by_row(crops, times, rows)

    full, skipped = (
        windowed(denoise_by_row, (3, 4), stride)(x, t),
        windowed(recording, (3, 4), stride, may_change=masked)(x, t),
    )
    assert torch.allclose(skipped[x == CODES], full[x == CODES], atol=1e-6)
    crops, rows = (torch.cat(parts) for parts in zip(*calls, strict=True))
    assert (crops == CODES).flatten(1).any(1).all() and 1 not in rows
    windows = len(window_starts(5, 3, stride)) * len(window_starts(8, 4, stride))
    assert 0 < len(crops) < 2 * windows


def test_one_window_of_a_complete_canvas_is_evaluated():
    x, sizes = canvas(2, 4, 6).clamp(max=CODES - 1), []
    pred = windowed(lambda x, t, rows: sizes.append(len(x)) or denoise(x, t), (2, 3), may_change=masked)(
        x, torch.ones(2)
    )
    assert pred.shape == (2, 4, 6, CODES) and sizes == [1]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_drawn_does_not_depend_on_leaving_them_out(name, known, streams):
    x = partly_known(3, 4, 6) if known else torch.full((3, 4, 6), CODES)
    draws = [
        solve_in_steps(
            SOLVERS[name].solve,
            windowed(denoise_by_row, (2, 3), 2, may_change=may_change),
            PROCESS,
            x,
            steps=24,
            rng=streams(3),
        )
        for may_change in (None, masked)
    ]
    assert torch.equal(*draws) and (draws[0] < CODES).all() and torch.equal(draws[0][x < CODES], x[x < CODES])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [3, 24])
def test_a_canvas_of_one_window_is_sampled_as_without_windows(name, steps, streams):
    if name == "first_hitting" and steps != 24:
        return
    x = torch.cat([torch.full((2, 4, 6), CODES), partly_known(2, 4, 6)])

    def plain(x, t, rows=None):
        return denoise_by_row(x, t, torch.arange(4) if rows is None else rows)

    draws = [
        solve_in_steps(SOLVERS[name].solve, denoiser, PROCESS, x, steps=steps, rng=streams(4))
        for denoiser in (plain, windowed(denoise_by_row, (4, 6), 2, may_change=masked))
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("stride", [0, -1, 4])
def test_strides_that_leave_gaps_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride {stride}, wanted 1..3"):
        window_starts(9, 3, stride)


def test_a_canvas_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="canvas of 3 is smaller than the window of 4"):
        windowed(denoise, (2, 4))(canvas(1, 5, 3), torch.ones(1))
