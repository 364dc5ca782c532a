"""A condition: its streams, regions and masks."""

import pytest
import torch

from models.conditioning import Condition, Map, Regions, Tokens, Vector

B, WIDTH = 4, 12


def test_vectors_add_up_and_maps_are_joined():
    a, b = torch.randn(2, B, WIDTH)
    first, second = torch.randn(B, 2, 6, 8), torch.randn(B, 1, 6, 8)
    condition = Condition({"a": Vector(a), "first": Map(first), "b": Vector(b), "second": Map(second)})
    assert torch.equal(condition.vector(), a + b) and torch.equal(condition.map(), torch.cat([first, second], 1))
    assert condition.tokens() is None
    assert Condition().vector() is Condition().map() is Condition().tokens() is None


def test_tokens_are_joined_with_their_masks_and_regions():
    a, b = torch.randn(B, 3, 5), torch.randn(B, 2, 5)
    mask, membership = torch.arange(2).bool().expand(B, 2), torch.tensor([[True, False], [True, True]]).expand(B, 2, 2)
    unmasked = Tokens(a)
    assert Condition({"a": unmasked}).tokens() is unmasked
    values, masks, members, everywhere = Condition({"a": unmasked, "b": Tokens(b, mask, membership)}).tokens()
    assert torch.equal(values, torch.cat([a, b], 1))
    assert masks[0].tolist() == [True, True, True, False, True]
    assert members[0].int().tolist() == [[0, 0]] * 3 + [[1, 0], [1, 1]]
    assert everywhere[0].tolist() == [True, True, True, False, False]


BROKEN = {
    r"got stream a: Vector \(4, 1, 2\), wanted Vector \(B, E\)": {"a": Vector(torch.zeros(4, 1, 2))},
    "got stream a: Tensor, wanted": {"a": torch.zeros(4, 2)},
    r"tokens \(4, 3, 2\) and mask \(4, 2\), wanted \(4, 3\)": {"a": Tokens(torch.zeros(4, 3, 2), torch.ones(4, 2))},
    r"and membership \(4, 3\), wanted \(4, 3, 3\)": {"a": Tokens(torch.zeros(4, 3, 2), None, torch.ones(4, 3))},
    "with everywhere and no membership": {"a": Tokens(torch.zeros(4, 3, 2), everywhere=torch.ones(4, 3))},
    r"got streams for batches of \{'a': 4, 'b': 1\}": {
        "a": Vector(torch.zeros(4, 2)),
        "b": Map(torch.zeros(1, 1, 2, 2)),
    },
}


def test_regions_of_another_batch_are_refused():
    regions = full_condition().regions
    with pytest.raises(ValueError, match=r"got streams for batches of \{'a': 2, 'regions': 4\}, wanted one size"):
        Condition({"a": Vector(torch.zeros(2, 2))}, regions)
    assert (Condition({}, regions).batch_size, full_condition().batch_size, Condition().batch_size) == (B, B, None)


@pytest.mark.parametrize("message", BROKEN)
def test_streams_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        Condition(BROKEN[message])


def full_condition(regions=3):
    """A condition with a stream of each kind, and regions."""
    g = torch.Generator().manual_seed(2)
    masks = torch.rand(B, regions, 8, 8, generator=g) < 0.2
    ids, present = torch.arange(B * regions).view(B, regions), torch.rand(B, regions, generator=g) < 0.9
    membership, everywhere = torch.rand(B, 5, regions, generator=g) < 0.3, torch.rand(B, 5, generator=g) < 0.2
    mask = torch.rand(B, 5, generator=g) < 0.7
    return Condition(
        {
            "vector": Vector(torch.randn(B, 6, generator=g)),
            "words": Tokens(torch.randn(B, 5, 7, generator=g), mask, membership, everywhere),
            "plain": Tokens(torch.randn(B, 2, 7, generator=g)),
            "map": Map(torch.randn(B, 2, 8, 8, generator=g)),
        },
        Regions(present=present, masks=masks, class_ids=ids, instance_ids=100 + ids),
    )


def tensors_of(condition):
    tensors = [tensor for stream in condition.streams.values() for tensor in stream if tensor is not None]
    return tensors + ([] if condition.regions is None else [*condition.regions.tensors().values()])


@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([False, True, False, True]), slice(2)], ids=str)
def test_rows_of_every_stream(rows):
    condition = full_condition()
    part = condition[rows]
    assert part.streams.keys() == condition.streams.keys()
    for a, b in zip(tensors_of(part), tensors_of(condition), strict=True):
        assert len(a) == 2 and torch.equal(a, b[rows])
    assert torch.equal(part.attention_mask(4, 4), condition.attention_mask(4, 4)[rows])


def test_cat_is_the_inverse_of_rows():
    condition = full_condition()
    joined = Condition.cat([condition[:1], condition[1:]])
    for a, b in zip(tensors_of(joined), tensors_of(condition), strict=True):
        assert torch.equal(a, b)


def test_cat_pads_tokens_and_regions_and_changes_no_mask():
    conditions = [full_condition(3), Condition({"words": Tokens(torch.randn(2, 1, 7))}), full_condition(4)]
    conditions = [Condition({"words": each.streams["words"]}, each.regions) for each in conditions]
    joined, words = Condition.cat(conditions), slice(B, B + 2)
    assert joined.streams["words"].values.shape == (2 * B + 2, 5, 7)
    assert joined.streams["words"].mask[words].tolist() == [[True, False, False, False, False]] * 2
    assert joined.regions.masks.shape == (2 * B + 2, 4, 8, 8) and not joined.regions.present[words].any()
    assert (joined.regions.class_ids[words] == -1).all() and (joined.regions.class_ids[:B, 3] == -1).all()
    mask = joined.attention_mask(2, 2)
    assert torch.equal(mask[:B], conditions[0].attention_mask(2, 2))
    assert torch.equal(mask[B + 2 :], conditions[2].attention_mask(2, 2))
    assert mask[words, :, 0].all() and not mask[words, :, 1:].any()


def test_cat_of_different_streams_is_refused():
    with pytest.raises(ValueError, match="wanted the same in all"):
        Condition.cat([Condition({"a": Vector(torch.zeros(1, 2))}), Condition({"b": Vector(torch.zeros(1, 2))})])


def test_spans_are_where_the_tokens_of_a_stream_lie():
    condition = full_condition()
    assert condition.spans() == {"words": slice(0, 5), "plain": slice(5, 7)}
    for name, span in condition.spans().items():
        assert torch.equal(condition.tokens().values[:, span], condition.streams[name].values)


def test_an_attention_mask_follows_the_coverage_of_cells():
    masks = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    masks[0, 0, 3, 4], masks[0, 2, 7, :6] = True, True  # a pixel of the cell (0, 1) of 2 x 2; 4 and 2 of two more cells
    words = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]]).bool()
    mask, everywhere = torch.tensor([[1, 1, 1, 1, 0, 1]]).bool(), torch.tensor([[1, 0, 0, 0, 1, 0]]).bool()
    regions = Regions(present=torch.ones(1, 3).bool(), masks=masks)
    condition = Condition({"t": Tokens(torch.randn(1, 6, 3), mask, words, everywhere)}, regions)
    seen = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0]]
    assert condition.attention_mask(2, 2).int().tolist() == [seen]
    for size in [(1, 1), (3, 5), (8, 8), (16, 16)]:  # one pixel counts at every resolution
        assert condition.attention_mask(*size)[..., 1].any() and not condition.attention_mask(*size)[..., 2].any()
    assert condition.attention_mask(2, 2) is condition.attention_mask(2, 2)
    assert not condition.attention_mask(2, 2, "half")[..., 1].any()
    assert Condition({"t": Tokens(torch.randn(1, 4, 3))}).attention_mask(2, 2) is None


def test_a_window_crops_maps_and_regions_and_keeps_tokens():
    condition = full_condition()
    part = condition.window(1, 2, 3, 2, (4, 4))
    assert torch.equal(part.streams["map"].values, condition.streams["map"].values[:, :, 2:8, 4:8])
    assert torch.equal(part.regions.masks, condition.regions.masks[:, :, 2:8, 4:8])
    assert all(part.streams[name] is condition.streams[name] for name in ("vector", "words", "plain"))
    cells = condition.attention_mask(4, 4).view(B, 4, 4, 7)[:, 1:, 2:].flatten(1, 2)
    assert torch.equal(part.attention_mask(3, 2), cells)
    with pytest.raises(ValueError, match=r"a window of 3 x 2 cells at \(2, 2\) of 4 x 4 cells"):
        condition.window(2, 2, 3, 2, (4, 4))


def test_a_context_is_the_tokens_and_their_mask_at_a_size():
    condition = full_condition()
    context = condition.context(2, 4)
    assert torch.equal(context.values, condition.tokens().values)
    assert torch.equal(context.mask, condition.attention_mask(2, 4)) and context.mask.shape == (B, 8, 7)
    assert torch.equal(context.at_positions(slice(3, 5)).mask, context.mask[:, 3:5])
    words = condition.streams["words"]._replace(membership=None, everywhere=None)
    context = Condition({"words": words}).context(2, 4)
    assert torch.equal(context.mask, words.mask) and context.at_positions(slice(3, 5)) is context
    assert Condition().context(2, 4) is None


def test_tokens_of_regions_without_regions_are_refused():
    with pytest.raises(ValueError, match="tokens of regions, and no regions"):
        Condition({"t": Tokens(torch.zeros(1, 1, 2), None, torch.ones(1, 1, 1).bool())}).attention_mask(2, 2)


def test_row_ids_are_equal_for_equal_conditions_alone():
    condition = full_condition()
    rows = torch.tensor([0, 1, 0, 2, 1])
    ids = condition[rows].row_ids()
    assert torch.equal(ids[:, None] == ids, rows[:, None] == rows)
    assert condition.row_ids().unique().numel() == B
    for name in condition.streams:  # any single stream distinguishes them
        single = Condition({name: condition.streams[name]})
        assert single.row_ids().unique().numel() == B
    same = Condition({"vector": Vector(torch.ones(B, 2))}, condition.regions)
    assert same.row_ids().unique().numel() == B
    assert Condition().row_ids() is None


def test_a_condition_moves_to_a_device():
    on_meta = full_condition().to("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors_of(on_meta))
