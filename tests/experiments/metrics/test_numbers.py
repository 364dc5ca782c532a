"""Agreement and spread of numbers, on a line and on a circle, and the regressor that measures them."""

import math

import pytest
import torch

from experiments.metrics import numbers
from experiments.metrics.numbers import compare_numbers, fit_line, from_outputs, spread_of, to_outputs
from models.conditions.numbers import NumberField

NAN = math.nan
LINEAR, CYCLIC = NumberField(0, 10), NumberField(-180, 180, cyclic=True)


def test_agreement_is_that_of_the_images_with_both_numbers():
    given = torch.tensor([1.0, 2, 3, 6, NAN, 5])
    measured = torch.tensor([1.0, 3, 1, 7, 9, NAN])
    agreement = compare_numbers(given, measured, LINEAR)
    assert agreement.n == 4 and agreement.error == pytest.approx(4 / 4)
    assert agreement.r2 == pytest.approx(1 - (0 + 1 + 4 + 1) / (4 + 1 + 0 + 9))
    assert compare_numbers(given, torch.full((6,), 3.4), LINEAR).r2 == pytest.approx(0, abs=1e-6)
    assert compare_numbers(measured, given, LINEAR).r2 != pytest.approx(agreement.r2)  # it is no correlation


def test_numbers_that_are_alike_or_missing_have_no_r2():
    assert compare_numbers(torch.full((3,), 2.0), torch.tensor([2.0, 3, 4]), LINEAR) == (3, None, 1.0)
    assert compare_numbers(torch.full((3,), NAN), torch.ones(3), LINEAR) == (0, None, None)
    assert spread_of(torch.full((3,), NAN), LINEAR) == (None, None)


def test_cyclic_numbers_are_compared_the_shorter_way_round():
    given = torch.tensor([179.0, -90, 0, 90])
    measured = torch.tensor([-179.0, -92, 2, 88])
    agreement = compare_numbers(given, measured, CYCLIC)
    assert agreement.error == pytest.approx(2) and agreement.r2 > 0.99
    assert compare_numbers(given, measured + 360, CYCLIC) == pytest.approx(agreement)
    opposite = compare_numbers(torch.tensor([-180.0, -90, 0, 90]), torch.tensor([0.0, 90, 180, -90]), CYCLIC)
    assert opposite == pytest.approx((4, 1 - 4 / 1, 180))  # twice the radius from the points, once from their mean


def test_the_spread_of_cyclic_numbers_is_that_of_directions():
    assert spread_of(torch.tensor([1.0, 3, NAN, 5]), LINEAR) == pytest.approx((3, math.sqrt(8 / 3)))
    mean, deviation = spread_of(torch.tensor([170.0, -170, 175, -175]), CYCLIC)
    assert abs(mean) == pytest.approx(180) and deviation == pytest.approx(math.sqrt((2 * 100 + 2 * 25) / 4), rel=0.01)
    wide = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 60  # wraps round
    assert spread_of(wide, CYCLIC) == pytest.approx((0, 60), abs=1)
    assert math.isfinite(spread_of(torch.tensor([0.0, 180]), CYCLIC).deviation)


def test_outputs_hold_the_numbers():
    fields = {"angle": CYCLIC, "size": LINEAR}
    values = {"angle": torch.tensor([-180.0, -20, 179, NAN]), "size": torch.tensor([3.0, NAN, 11, 4])}
    outputs = to_outputs(values, fields)
    assert outputs.shape == (4, 3) and outputs.isnan().sum() == 3
    for name, read in from_outputs(outputs, fields).items():
        assert torch.allclose(read, values[name].double(), equal_nan=True)


def test_a_line_changes_the_unit_of_a_quantity():
    quantity = torch.tensor([1.0, 2, NAN, 4, 5])
    line = fit_line(quantity, torch.tensor([2.5, 3, 9, 4, NAN]))
    assert line == pytest.approx((0.5, 2)) and line(torch.tensor([10.0])).item() == pytest.approx(7)
    with pytest.raises(ValueError, match="wanted a quantity that differs"):
        fit_line(torch.tensor([1.0, 1, NAN]), torch.tensor([1.0, 2, 3]))


def ramps(n: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images (n, 1, 8, 8) of a brightness that rises in a direction, and these two numbers."""
    generator = torch.Generator().manual_seed(seed)
    angle = 360 * torch.rand(n, generator=generator) - 180
    level = 60 + 130 * torch.rand(n, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    slope = x * torch.deg2rad(angle).cos()[:, None, None] + y * torch.deg2rad(angle).sin()[:, None, None]
    return (level[:, None, None] + 40 * slope).byte().unsqueeze(1), {"angle": angle, "level": level}


def test_a_regressor_learns_from_the_numbers_that_are_known(monkeypatch):
    monkeypatch.setattr(numbers, "RECIPE", numbers.RECIPE._replace(steps=60, batch_size=32))
    fields = {"angle": CYCLIC, "level": NumberField(0, 255), "constant": LINEAR, "nowhere": LINEAR}
    images, values = ramps(200, 0)
    values["level"][::2] = NAN
    values |= {"constant": torch.full((200,), 3.0), "nowhere": torch.full((200,), NAN)}
    state = torch.random.get_rng_state()
    regressor = numbers.train_number_regressor(images, values, fields, 0, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    images, values = ramps(300, 1)
    measured = regressor.measure(images)
    assert all(compare_numbers(values[name], measured[name], fields[name]).r2 > 0.9 for name in values)
    assert (measured["constant"] - 3).abs().max() < 0.5 and measured["nowhere"].isfinite().all()
