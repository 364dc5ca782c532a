"""From batch fields to the inputs of the condition encoders."""

import pytest
import torch

from train.samplers._conditions import fields_by_condition, raw_conditions


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
    assert fields_by_condition(["image", "label"]) == {"image": ("condition_image",), "label": ("label",)}
