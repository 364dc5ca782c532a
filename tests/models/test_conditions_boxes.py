"""Box tokens and location words: recorded features and indices, members, padding, any number of boxes, the null."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.metrics.cost import count_launches
from helpers.fake_device import DEVICE, FakeDeviceMode
from models.conditioning import Condition, Conditioner
from models.conditions import boxes, location_words
from models.conditions.boxes import BoxEncoder, fourier_features
from models.conditions.location_words import LocationWords, location_index, location_table
from train.cli.plugins import merge_configs

SPATIAL = Path(__file__).parents[1] / "fixtures" / "spatial"
WORDS = np.load(SPATIAL / "location_words.npz")
GRIDS = [(256, 256), (512, 512), (4, 3), (16, 16), (100, 57)]
BUILD = {"boxes": lambda: BoxEncoder(5, 12), "location_words": lambda: LocationWords(5, (8, 6), 12)}


def layouts(counts, seed=0):
    """Boxes and classes of images with these numbers of boxes, padded."""
    rng = torch.Generator().manual_seed(seed)
    shape, most = (len(counts), max(counts)), max(counts)
    corners = torch.rand(*shape, 2, 2, generator=rng).sort(2).values
    return {
        "boxes": corners.flatten(2),
        "boxes_mask": torch.arange(most) < torch.tensor(counts)[:, None],
        "box_class": torch.randint(5, shape, generator=rng),
    }


def blank(fields):
    return torch.zeros(len(fields["boxes"]), 1, 6, 8)


def encode(encoder, fields, drop=None, name="boxes"):
    """The condition of raw fields."""
    return Conditioner({name: encoder})({name: fields}, blank(fields), None if drop is None else {"regions": drop})


def test_fourier_features_equal_the_recorded_ones():
    recorded = np.load(SPATIAL / "fourier_of_boxes.npz")
    features = fourier_features(torch.from_numpy(recorded["boxes"]), 8).numpy()
    np.testing.assert_allclose(features, recorded["features"], atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_location_indices_equal_the_recorded_ones(grid):
    points, recorded = torch.from_numpy(WORDS["points_xy"]), WORDS[f"index_{grid[0]}x{grid[1]}"]
    inside = ((points >= 0) & (points <= 1)).all(1).numpy()
    indices = location_index(points, grid).numpy()
    assert (~inside).sum() == 3 and (indices[inside] == recorded[inside]).all()
    nearest = location_index(points.clamp(0, 1), grid).numpy()  # where the recorded ones are in another row, or beyond
    assert (indices == nearest).all() and indices.max() < grid[0] * grid[1]
    columns, rows = indices[~inside] % grid[0], indices[~inside] // grid[0]
    assert columns[0] == grid[0] - 1 and columns[1] == 0 and rows[2] == grid[1] - 1  # x 1.2, x -0.01, y 1.2


def test_halves_are_rounded_to_even():
    centres = torch.tensor([[0.5, 0], [0, 0.5], [1 / 6, 0], [0, 1 / 6], [0.5, 0.5]], dtype=torch.float64)
    assert location_index(centres, (4, 4)).tolist() == [2, 8, 0, 0, 10]


def test_the_table_of_places_equals_the_recorded_one():
    np.testing.assert_allclose(location_table((4, 3), 16).numpy(), WORDS["table_4x3_d16"], atol=1e-5)
    rows = location_table((256, 256), 768)[torch.from_numpy(WORDS["rows"]).long()].numpy()
    np.testing.assert_allclose(rows, WORDS["rows_256x256_d768"], atol=2e-5)
    with pytest.raises(ValueError, match="width 10, wanted a multiple of 4: pass --location_words_width N"):
        location_table((4, 3), 10)


def test_places_start_at_the_norm_of_the_classes():
    encoder = LocationWords(300, (32, 32), 64)
    norms = encoder.places.norm(dim=1)
    assert torch.allclose(norms, encoder.classes.norm(dim=1).mean().expand_as(norms), rtol=1e-4)
    assert encoder.places.shape == (32 * 32, 64)


@pytest.mark.parametrize("name", BUILD)
def test_a_batch_equals_each_image_alone(name):
    encoder, counts = BUILD[name]().double(), [0, 1, 5, 100]
    fields = layouts(counts)
    tokens = encode(encoder, fields, name=name).tokens()
    per_box = 3 if name == "location_words" else 1
    for i, count in enumerate(counts):
        alone = {key: value[i : i + 1, :count] for key, value in fields.items()}
        single = encode(encoder, alone, name=name).tokens()
        seen = tokens.values[i][tokens.mask[i]]
        assert seen.shape == (per_box * count, 12) and single.mask.sum() == per_box * count
        torch.testing.assert_close(seen, single.values[0][single.mask[0]], atol=1e-12, rtol=0)
    assert tokens.values[~tokens.mask].view(-1, 12).unique(dim=0).shape[0] == 2  # padding, and the null


@pytest.mark.parametrize("name", BUILD)
def test_padding_does_not_matter(name):
    encoder, fields = BUILD[name](), layouts([2, 4])
    noisy = fields | {key: fields[key].clone() for key in ("boxes", "box_class")}
    noisy["boxes"][0, 2:], noisy["box_class"][0, 2:] = torch.tensor([0.1, 0.2, 0.3, 0.4]), 4
    first, second = (encode(encoder, each, name=name).tokens() for each in (fields, noisy))
    assert torch.equal(first.values, second.values) and torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("name", BUILD)
def test_only_dropped_images_read_the_null(name):
    encoder, fields = BUILD[name](), layouts([3, 3, 0])
    tokens = encode(encoder, fields, torch.tensor([True, False, False]), name).tokens()
    assert torch.equal(tokens.values[0][tokens.mask[0]], encoder.null[None])
    assert tokens.mask[1, 0].item() is False and tokens.mask[1, 1:].all() and not tokens.mask[2].any()


def test_class_colour_and_place_are_told():
    encoder, fields = BoxEncoder(5, 12, colors=4), layouts([2])
    fields |= {"box_color": torch.tensor([[1, 2]])}
    before = encode(encoder, fields).tokens().values
    changes = {"box_class": 4 - fields["box_class"], "box_color": torch.tensor([[1, 3]])}
    changes |= {"boxes": fields["boxes"] * torch.tensor([1, 1, 1, 0.99])}
    changed = {key: encode(encoder, fields | {key: value}).tokens().values[0] for key, value in changes.items()}
    moved = {key: (value - before[0]).abs().amax(1) > 1e-4 for key, value in changed.items()}
    assert moved["box_color"].tolist() == [False, False, True] and moved["boxes"].tolist() == [False, True, True]
    assert torch.equal(moved["box_class"][1:], changes["box_class"][0] != fields["box_class"][0])
    assert encoder.fields == ("boxes", "box_class", "box_color") and encoder.limits == {"box_class": 5, "box_color": 4}


def test_words_are_a_class_and_two_corners_in_order():
    encoder, grid = LocationWords(5, (4, 3), 12, layers=0), (4, 3)
    fields = {"boxes": torch.tensor([[[0, 0, 1, 1], [0.3, 0.5, 0.7, 1]]]), "box_class": torch.tensor([[2, 4]])}
    words = encode(encoder, fields, name="location_words").tokens().values[0, 1:]
    words = words - location_words.sinusoidal_embedding(torch.arange(6), 12)
    expected = [encoder.classes[2], *encoder.places[[0, 11]], encoder.classes[4]]
    corners = location_index(fields["boxes"][0, 1].view(2, 2), grid)
    torch.testing.assert_close(words, torch.stack([*expected, *encoder.places[corners]]), atol=1e-5, rtol=0)


def test_a_colour_is_added_to_the_word_of_its_class():
    encoder = LocationWords(5, (4, 3), 12, layers=0, colors=3)
    fields = {"boxes": torch.tensor([[[0, 0, 1, 1], [0.3, 0.5, 0.7, 1]]]), "box_class": torch.tensor([[2, 4]])}
    plain, shown = (
        encode(encoder, fields | {"box_color": torch.tensor([colors])}, name="location_words").tokens().values[0, 1:]
        for colors in ((0, 0), (0, 2))
    )
    expected = torch.zeros(6, 12)
    expected[3] = (encoder.colors[2] - encoder.colors[0]).detach()
    torch.testing.assert_close(shown - plain, expected, atol=1e-5, rtol=0)
    assert encoder.fields == ("boxes", "box_class", "box_color") and encoder.limits == {"box_class": 5, "box_color": 3}
    built = location_words.build(location_words.Config(location_words_classes=5, location_words_colors=3), 12, 0)
    assert built.colors.shape == (3, 12)


def test_a_layer_tells_words_which_belong_together():
    """What a class word says depends on the corners that follow it."""
    fields = layouts([2])
    moved = fields | {"boxes": fields["boxes"].clone()}
    moved["boxes"][0, 0] = torch.tensor([0.0, 0.0, 0.1, 0.1])
    for layers in (0, 1):
        encoder = LocationWords(5, (8, 6), 12, layers)
        first, second = (encode(encoder, each, name="location_words").tokens().values[0, 1] for each in (fields, moved))
        assert torch.equal(first, second) == (layers == 0)


def test_tokens_everywhere_are_seen_by_every_cell():
    condition = encode(BoxEncoder(5, 12), layouts([2, 1]))
    assert condition.attention_mask(6, 8) is None and condition.context(6, 8).mask.tolist() == [
        [False, True, True],
        [False, True, False],
    ]


def test_tokens_of_regions_are_seen_inside_them():
    encoder, fields = BoxEncoder(5, 12, everywhere=False), layouts([2, 1])
    drop = torch.tensor([False, True])
    condition = encode(encoder, fields, drop)
    mask = condition.context(6, 8).mask  # (B, N, M)
    inside = condition.regions.at(6, 8).flatten(2).mT
    assert torch.equal(mask[0, :, 1:], inside[0]) and not mask[0, :, 0].any()
    assert mask[1, :, 0].all() and not mask[1, :, 1:].any()
    null = Conditioner({"boxes": encoder})({}, blank(fields))
    both = Condition.cat([null, condition]).context(6, 8).mask
    assert both[:2, :, 0].all() and not both[:2, :, 1:].any() and torch.equal(both[2:], mask)


def test_the_data_set_tells_the_number_of_classes():
    kind = merge_configs([boxes.Config, location_words.Config], boxes.ConditionConfig)
    resolved = kind(boxes_classes=4).for_data(4)
    assert (resolved.boxes_classes, resolved.location_words_classes) == (4, 4)
    with pytest.raises(ValueError, match="got location_words_classes 3, the data set has 4: leave --location_words_cl"):
        kind(location_words_classes=3).for_data(4)
    for module in (boxes, location_words):
        with pytest.raises(ValueError, match="got no classes .*: pass --.*_classes N"):
            module.build(module.Config(), 12, 0)


def test_widths_are_those_of_embeddings_unless_given():
    for module, name in ((boxes, "boxes"), (location_words, "location_words")):
        options = {f"{name}_classes": 2}
        assert module.build(module.Config(**options), 16, 0).token_width == 16
        assert module.build(module.Config(**options, **{f"{name}_width": 8}), 16, 0).token_width == 8


@pytest.mark.parametrize("name", BUILD)
def test_encoding_never_waits_for_the_device(name):
    conditioner, fields, drop = Conditioner({name: BUILD[name]()}).train(), layouts([2, 1]), torch.tensor([False, True])
    expected = conditioner({name: fields}, blank(fields), {"regions": drop}).tokens().values
    with FakeDeviceMode():
        canvas, drop = blank(fields).to(DEVICE), drop.to(DEVICE)
        fields = {key: value.to(DEVICE) for key, value in fields.items()}
        conditioner.to(DEVICE)
        with count_launches(DEVICE) as launches:
            tokens = conditioner({name: fields}, canvas, {"regions": drop}).tokens()
        assert torch.allclose(tokens.values.detach().cpu(), expected, atol=1e-5)
    assert launches.waits == 0, launches.waiting


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_encoding_is_compiled_as_one_graph(name):
    conditioner, fields = Conditioner({name: BUILD[name]()}).train(), layouts([2, 1])
    encode = torch.compile(lambda *args: conditioner(*args).tokens().values, fullgraph=True, backend="eager")
    arguments = ({name: fields}, blank(fields), {"regions": torch.tensor([False, True])})
    torch.testing.assert_close(encode(*arguments), conditioner(*arguments).tokens().values)
