"""From batch fields to the inputs of the condition encoders."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion.rng import Streams, seed_of
from models.conditioning import Conditioner
from models.conditions import boxes
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from models.conditions.layout import Config as LayoutConfig
from models.conditions.layout import LayoutEncoder
from train.samplers import ddpm
from train.samplers._conditions import (
    ConditionsConfig,
    draw_drops,
    fields_by_condition,
    raw_conditions,
    with_checked_regions,
    with_region_classes,
)


def test_several_or_ragged_fields_become_a_dict():
    batch = {name: torch.zeros(2) for name in ("label", "boxes", "boxes_mask", "ids", "size", "position")}
    raw = raw_conditions({"label": ("label",), "boxes": ("boxes", "ids"), "size": ("size",)}, batch)
    assert raw["label"] is batch["label"] and raw["size"] is batch["size"]
    assert raw["boxes"].keys() == {"boxes", "ids", "boxes_mask"}
    assert raw_conditions({"boxes": ("boxes",)}, batch)["boxes"].keys() == {"boxes", "boxes_mask"}


def test_a_missing_batch_field_is_named():
    with pytest.raises(ValueError, match="conditions need ids"):
        raw_conditions({"boxes": ("boxes", "ids")}, {"boxes": torch.zeros(2)})


def test_conditions_name_their_fields():
    encoders = {"image": ImageEncoder(2), "label": LabelEncoder(3, 4), "layout": LayoutEncoder(3, "segments")}
    fields = {"image": ("condition_image",), "label": ("label",), "layout": ("panoptic", "segment_id", "segment_class")}
    assert fields_by_condition(encoders) == fields


def encoders(*layouts):
    return Conditioner(
        {"label": LabelEncoder(3, 4), "image": ImageEncoder(2)} | {name: LayoutEncoder(3) for name in layouts}
    )


def test_conditions_of_regions_are_dropped_together():
    drawn, config = [], ConditionsConfig(label_drop=0.25, condition_drop=0.5)

    def streams(name):
        drawn.append(name)
        return Streams([seed_of(1, name, i) for i in range(400)])

    drops = draw_drops(config, encoders("layout", "more"), streams, 400)
    assert drawn == [*drops] == ["label", "image", "regions"]
    expected = streams("regions").uniform((400,)) < 0.5
    assert torch.equal(drops["regions"], expected) and not torch.equal(drops["regions"], drops["image"])
    assert torch.equal(drops["label"], streams("label").uniform((400,)) < 0.25)
    assert [*draw_drops(config, encoders(), streams, 400)] == ["label", "image"]


class Batches:
    """A box in each image, of the class of its position."""

    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return 9

    def item_index(self, position):
        return 10 * position

    def __getitem__(self, positions):
        boxes = torch.tensor([[[0, 0, 1, 1.0]]] * len(positions))
        return {
            "boxes": boxes,
            "boxes_mask": boxes[..., 0] < 1,
            "box_class": torch.tensor(positions)[:, None],
        } | self.fields


def test_regions_are_checked_where_batches_are_loaded():
    network, source = nn.Sequential(nn.Linear(1, 1), encoders("layout")), Batches(file_name=["a.png", "b.png"])
    checked = with_checked_regions(source, network)
    assert len(checked) == 9 and checked.item_index(3) == 30
    assert checked[[1, 2]].keys() == source[[1, 2]].keys()
    with pytest.raises(ValueError, match="^b.png: got box_class 3 as region 0, wanted 0 to 2"):
        checked[[2, 3]]
    with pytest.raises(ValueError, match="^image 0 of the batch: got box_class 5"):
        with_checked_regions(Batches(), network)[[5]]
    assert with_checked_regions(source, encoders()) is source


def test_a_run_keeps_the_number_of_classes_of_regions():
    config = ConditionsConfig(conditions=("layout",))
    shapes = SimpleNamespace(region_classes=("disc", "square"))
    assert with_region_classes(config, shapes).condition_options == LayoutConfig(layout_classes=2)
    assert with_region_classes(config, SimpleNamespace()) == config
    assert with_region_classes(ConditionsConfig(), shapes) == ConditionsConfig()


def test_tokens_that_no_attention_block_reads_are_refused():
    config, space = {"conditions": ("boxes",), "condition_options": boxes.Config(boxes_classes=2)}, (3, 8, 8)
    with pytest.raises(
        ValueError, match="conditions boxes, whose tokens attn_block_type softmax ignores: pass --attn_b"
    ):
        ddpm.build(ddpm.Config(**config), shape=space, pixels=True, n_classes=0)
    small = {"channels": 32, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,)}
    read = ({"attn_block_type": "transformer"}, {"middle_attn_block_type": "transformer"}, {"region_attention": "v2"})
    for kinds in read:
        ddpm.build(ddpm.Config(**config, **small, **kinds), shape=space, pixels=True, n_classes=0)
    config["condition_options"] = boxes.Config(boxes_classes=2, boxes_gated=True)  # read by blocks of their own
    sampler = ddpm.build(ddpm.Config(**config, **small), shape=space, pixels=True, n_classes=0)
    assert len(sampler.network.gated_blocks["up"]) == 2
