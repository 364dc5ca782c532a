"""From batch fields to the inputs of the condition encoders."""

import pytest
import torch

from train.samplers._conditions import ConditionsConfig, check_nulls, fields_by_condition, raw_conditions


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


def test_each_condition_needs_its_own_null():
    fields, batch = ["condition_image", "label"], {"label": torch.tensor([0, 3])}
    drops = ConditionsConfig(label_drop=0.1, condition_drop=0.0)
    check_nulls(drops, ["label"], guidance=3, batch=None, n_classes=3)
    check_nulls(drops, fields, guidance=1, batch=batch, n_classes=3)
    for guidance, given, remedy in ((3, batch, "--guidance 1"), (1, None, "a condition_image")):
        with pytest.raises(ValueError, match=f"condition_drop 0, .* null of condition_image untrained: pass {remedy}"):
            check_nulls(drops, fields, guidance, given, 3)
    with pytest.raises(ValueError, match="got no label, .* label_drop 0, .*: pass a label"):
        check_nulls(ConditionsConfig(label_drop=0.0), ["label"], 1, batch, n_classes=3)
