"""From batch fields to the inputs of the condition encoders."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion.rng import Streams, seed_of
from helpers.tiny_minilm import VOCABULARY, tiny_bert, use_vocabulary
from models.conditioning import ConditionConfig, Conditioner
from models.conditions import boxes, location_words, metadata, objects
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from models.conditions.layout import Config as LayoutConfig
from models.conditions.layout import LayoutEncoder
from models.conditions.metadata import Config as MetadataConfig
from models.conditions.metadata import MetadataEncoder
from models.conditions.text import CaptionEncoder, tokenize
from models.text_encoder import TextEncoder, TextEncoderConfig
from train.cli.plugins import merge_configs
from train.data.streams import TrainingStreams
from train.registry import load_plugin
from train.samplers import ddpm
from train.samplers._condition_sources import with_condition_fields
from train.samplers._conditions import (
    ConditionsConfig,
    draw_drops,
    fields_by_condition,
    make_encoders,
    raw_conditions,
    with_declared_values,
)


def test_several_or_ragged_fields_become_a_dict():
    batch = {name: torch.zeros(2) for name in ("label", "boxes", "boxes_mask", "ids", "size", "position")}
    raw = raw_conditions({"label": ("label",), "boxes": ("boxes", "ids"), "size": ("size",)}, batch)
    assert raw["label"] is batch["label"] and raw["size"] is batch["size"]
    assert raw["boxes"].keys() == {"boxes", "ids", "boxes_mask"}
    assert raw_conditions({"boxes": ("boxes",)}, batch)["boxes"].keys() == {"boxes", "boxes_mask"}


def test_a_condition_of_nones_is_null():
    fields_of, batch = {"label": ("label",), "boxes": ("boxes", "ids")}, {"label": torch.zeros(2)}
    raw = raw_conditions(fields_of, {**batch, "boxes": None, "ids": None, "boxes_mask": None})
    assert raw.keys() == {"label"} and raw["label"] is batch["label"]
    with pytest.raises(ValueError, match="conditions need ids"):
        raw_conditions(fields_of, {**batch, "boxes": torch.zeros(2)})


def test_a_missing_batch_field_is_named():
    with pytest.raises(ValueError, match="conditions need ids"):
        raw_conditions({"boxes": ("boxes", "ids")}, {"boxes": torch.zeros(2)})


def test_conditions_name_their_fields():
    encoders = {"image": ImageEncoder(2), "label": LabelEncoder(3, 4), "layout": LayoutEncoder(3, "segments")}
    fields = {"image": ("condition_image",), "label": ("label",), "layout": ("panoptic", "segment_id", "segment_class")}
    assert fields_by_condition(encoders) == fields


COMMON = {
    "got the field year in the conditions metadata and numbers, wanted it in one.*out of --metadata_fields": (
        ("metadata", "numbers"),
        {"metadata_values": ("light=day", "year=new"), "numbers_ranges": ("year=0:9", "lon=0:9")},
    ),
    "got the field label in the conditions numbers and label, wanted it in one.*out of --numbers_fields": (
        ("numbers",),
        {"numbers_ranges": ("label=0:9",)},
    ),
    "got the field caption in the conditions metadata and text": (
        ("text", "metadata"),
        {"metadata_values": ("caption=a",), "text_width": 8, "text_layers": 1},
    ),
}


@pytest.mark.parametrize("message", COMMON)
def test_a_named_field_is_read_by_one_condition(message):
    names, options = COMMON[message]
    kinds = [load_plugin("models.conditions", name, "condition").Config for name in names]
    config = ConditionsConfig(conditions=names, condition_options=merge_configs(kinds, ConditionConfig)(**options))
    with pytest.raises(ValueError, match=message):
        make_encoders(config, 8, 3)


def test_conditions_of_regions_read_the_same_fields():
    """Without a field that only one of them may read."""
    names = ("layout", "objects", "metadata", "numbers")
    kinds = [load_plugin("models.conditions", name, "condition").Config for name in names]
    options = {"layout_classes": 2, "objects_classes": 2, "metadata_values": ("a=b",), "numbers_ranges": ("c=0:1",)}
    config = ConditionsConfig(conditions=names, condition_options=merge_configs(kinds, ConditionConfig)(**options))
    assert [*make_encoders(config, 8, 3)] == [*names, "label"]


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
    checked = with_condition_fields(source, network)
    assert len(checked) == 9 and checked.item_index(3) == 30
    assert checked[[1, 2]].keys() == source[[1, 2]].keys()
    with pytest.raises(ValueError, match="^b.png: got box_class 3 as region 0, wanted 0 to 2"):
        checked[[2, 3]]
    with pytest.raises(ValueError, match="^image 0 of the batch: got box_class 5"):
        with_condition_fields(Batches(), network)[[5]]
    assert with_condition_fields(source, encoders()) is source


def test_a_run_keeps_the_number_of_classes_of_regions():
    config = ConditionsConfig(conditions=("layout",))
    shapes = SimpleNamespace(region_classes=("disc", "square"))
    assert with_declared_values(config, shapes).condition_options == LayoutConfig(layout_classes=2)
    assert with_declared_values(config, SimpleNamespace()) == config
    assert with_declared_values(ConditionsConfig(), shapes) == ConditionsConfig()


def test_a_run_keeps_the_values_of_metadata():
    config = ConditionsConfig(conditions=("metadata",))
    train = SimpleNamespace(metadata_values={"light": ("day", "night"), "camera": ("front",)})
    val = SimpleNamespace(metadata_values={"camera": ("back", "front")})
    expected = MetadataConfig(
        metadata_fields=("light", "camera"),
        metadata_values=("light=day", "light=night", "camera=front", "camera=back"),
    )
    assert with_declared_values(config, train, val).condition_options == expected
    assert with_declared_values(config, SimpleNamespace()) == config
    assert with_declared_values(ConditionsConfig(), train, val) == ConditionsConfig()


class Scenes(Batches):
    """Words of two fields, which follow from the position."""

    def __len__(self):
        return 4000

    def __getitem__(self, positions):
        light = [("day", "night", "unknown")[position % 3] for position in positions]
        camera = [("front", "back")[position % 2] for position in positions]
        return {"light": light, "camera": camera, "file_name": [f"{position}.png" for position in positions]}


def metadata_network(field_drop=0.0, **values):
    values = {"light": ("day", "night"), "camera": ("front", "back")} | values
    return nn.Sequential(nn.Linear(1, 1), Conditioner({"metadata": MetadataEncoder(values, 4, "vector", field_drop)}))


def test_metadata_are_numbers_where_batches_are_loaded():
    source = Scenes()
    numbered = with_condition_fields(source, metadata_network(field_drop=0.9))
    batch = numbered[[3, 4, 5]]
    assert len(numbered) == 4000 and numbered.item_index(3) == 30 and batch.keys() == source[[3]].keys()
    assert batch["light"].tolist() == [1, 2, 0] and batch["camera"].tolist() == [2, 1, 2]
    assert with_condition_fields(source, encoders()) is source
    with pytest.raises(ValueError, match="^4.png: got light 'night', wanted one of day, dusk, or unknown"):
        with_condition_fields(source, metadata_network(light=("day", "dusk")))[[3, 4]]


def test_fields_of_metadata_become_null_independently():
    positions = list(range(4000))
    whole = with_condition_fields(Scenes(), metadata_network())[positions]
    numbered = with_condition_fields(Scenes(), metadata_network(field_drop=0.3), seed=5)
    batch, present = numbered[positions], whole["light"] > 0
    light, camera = ((batch[name] == 0)[present] for name in ("light", "camera"))
    for rate, expected in ((light, 0.3), (camera, 0.3), (light & camera, 0.09)):
        assert abs(rate.float().mean().item() - expected) < 0.03
    assert ((batch["light"] == whole["light"]) | (batch["light"] == 0)).all()
    some = positions[100:200]  # null by their positions, not by their places in the batch
    assert torch.equal(numbered[some]["camera"], batch["camera"][some])
    other = with_condition_fields(Scenes(), metadata_network(field_drop=0.3), seed=6)[positions]
    assert not torch.equal(other["camera"], batch["camera"])


def test_metadata_have_a_drop_of_their_own():
    network = metadata_network()[1]
    network["layout"] = LayoutEncoder(3)
    config = ConditionsConfig(condition_drop=0.5)
    drops = draw_drops(config, network, lambda name: Streams([seed_of(1, name, i) for i in range(400)]), 400)
    assert [*drops] == ["metadata", "regions"] and not torch.equal(drops["metadata"], drops["regions"])


def text_network():
    encoder = TextEncoder(TextEncoderConfig(width=8, layers=1, heads=1, vocab_size=8, length=20))
    return nn.Sequential(nn.Linear(1, 1), Conditioner({"text": CaptionEncoder(encoder)}))


def test_captions_are_dropped_by_their_positions():
    """Each by itself, whatever the batch that it is in."""

    def drops(positions):
        streams = TrainingStreams(1, {"position": torch.tensor(positions)}, len(positions), torch.device("cpu"))
        return draw_drops(ConditionsConfig(condition_drop=0.5), text_network()[1], streams, len(positions))["text"]

    together, some = drops(range(400)), [311, 7, 42, 8, 399, 0, 43, 12]
    assert abs(together.float().mean() - 0.5) < 0.1
    assert torch.equal(drops(some), together[some])


def test_captions_are_ids_where_batches_are_loaded():
    captions = ["a red star", "many words " * 20]
    source, network = Batches(caption=captions), text_network()
    tokenized = with_condition_fields(source, network)
    batch, (ids, mask) = tokenized[[1, 2]], tokenize(captions, 20)
    assert len(tokenized) == 9 and tokenized.item_index(3) == 30
    assert torch.equal(batch["caption"], ids) and torch.equal(batch["caption_mask"], mask) and ids.shape == (2, 3, 20)
    assert batch["box_class"].tolist() == [[1], [2]]
    assert raw_conditions({"text": ("caption",)}, batch)["text"].keys() == {"caption", "caption_mask"}
    assert with_condition_fields(source, encoders()) is source
    with pytest.raises(ValueError, match="the conditions need caption"):
        raw_conditions({"text": ("caption",)}, with_condition_fields(Batches(), network)[[1]])


def test_captions_are_ids_of_the_encoder_s_own_tokenizer(monkeypatch):
    use_vocabulary(monkeypatch)
    network = Conditioner({"text": CaptionEncoder(tiny_bert(), pretrained=True)})
    batch = with_condition_fields(Batches(caption=["a red star"]), network)[[0]]
    assert batch["caption"].flatten().tolist() == [
        101,
        *(VOCABULARY[word] for word in ("a", "red", "star")),
        102,
        0,
        0,
        0,
    ]


def test_tokens_that_no_attention_block_reads_are_refused():
    options = boxes.Config(boxes_classes=2, boxes_everywhere=False)
    config, space = {"conditions": ("boxes",), "condition_options": options}, (3, 8, 8)
    with pytest.raises(
        ValueError, match="conditions boxes, whose tokens attn_block_type softmax ignores: pass --attn_b"
    ):
        ddpm.build(ddpm.Config(**config), shape=space, pixels=True, n_classes=0)
    small = {"channels": 32, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,)}
    for kinds in ({"attn_block_type": "transformer"}, {"middle_attn_block_type": "transformer"}):
        ddpm.build(ddpm.Config(**config, **small, **kinds), shape=space, pixels=True, n_classes=0)
    config["condition_options"] = boxes.Config(boxes_classes=2, boxes_gated=True)  # read by blocks of their own
    sampler = ddpm.build(ddpm.Config(**config, **small), shape=space, pixels=True, n_classes=0)
    assert len(sampler.network.gated_blocks["up"]) == 2


def test_region_attention_reads_tokens_of_regions_alone():
    modules = {"boxes": boxes, "location_words": location_words, "metadata": metadata, "objects": objects}
    unread = {
        "boxes": {"boxes_classes": 2},
        "location_words": {"location_words_classes": 2},
        "metadata": {"metadata_values": ("light=day",), "metadata_as": "tokens"},
    }
    small = {"channels": 32, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "region_attention": "v2"}

    def build(name, changes):
        options = merge_configs([objects.Config, modules[name].Config], ConditionConfig)
        config = options(objects_classes=2, **unread[name] | changes)
        config = ddpm.Config(conditions=("objects", name), condition_options=config, **small)
        return ddpm.build(config, shape=(3, 8, 8), pixels=True, n_classes=0)

    for name in unread:
        with pytest.raises(ValueError, match=f"conditions {name}, whose tokens attn_block_type softmax ignores"):
            build(name, {})
    assert len(build("boxes", {"boxes_everywhere": False}).network.region_blocks["up"]) == 2


def test_places_are_refused_without_transformer_blocks():
    with pytest.raises(ValueError, match="got attn_places with attn_block_type softmax, whose blocks have none: pass"):
        ddpm.Config(attn_places=True)
    ddpm.Config(attn_places=True, middle_attn_block_type="transformer")


def test_options_of_region_attention_are_refused_without_it():
    for options, message in (
        (
            {"overlap": "front"},
            "got overlap front for region_attention none: pass --region_attention v2, or --overlap mean",
        ),
        ({"region_places": False}, "got no_region_places for region_attention none: .* v2, or --region_places"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpm.Config(**options)
        ddpm.Config(**options, region_attention="v2")
