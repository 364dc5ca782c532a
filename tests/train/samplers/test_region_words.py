"""Words of regions in samplers and where batches are loaded: caches, flips, guidance, drop, windows, sources."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffusion.rng import Streams
from experiments.harness.attention_targets import find_targets
from experiments.harness.layout_edits import read_layout_names
from helpers.captioned import write_encoder
from helpers.region_images import NAMES, face_dataset, mirrored_face
from models.conditioning import REGIONS, ConditionConfig, Conditioner
from models.conditions import region_words, text
from models.conditions.region_words import RegionWords, WordRule
from models.experts import experts_of
from models.lora import LoRAOptions, adapt
from train.cli.plugins import merge_configs
from train.condition_source import ConditionSource
from train.config import DataConfig
from train.data.collate import collate
from train.data.loading import ImageSource, TrainingImages
from train.data.streams import TrainingStreams
from train.data.transforms import to_item
from train.data.workers import load_batches
from train.samplers import absorbing, autoregressive, ddpm
from train.samplers._condition_sources import TokenizedWords, with_condition_fields
from train.samplers._conditions import raw_conditions, with_declared_values
from train.samplers._guidance import guidance_chain
from train.text_encoder_file import fill_text_encoder, open_text_cache

SMALL = {"text_width": 16, "text_layers": 1, "text_heads": 2}
CODES = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
UNET = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "heads": 1, "total_steps": 20}
KINDS = pytest.mark.parametrize("kind", ["ddpm", "absorbing", "autoregressive"])
DATA = DataConfig(img_size=8, img_width=12, n_channels=1)
MOUTH = text.TextEncoder.tokenizer.encode("mouth")[0]
RULE = WordRule(mode="all", names=NAMES, classes=NAMES, stuff=frozenset((0,)))


def options_of(*names, **options):
    modules = {"text": text, "region_words": region_words}
    kind = merge_configs([modules[name].Config for name in names], ConditionConfig)
    return kind(**SMALL | options).for_data(4, names=NAMES, things=(False, True, True, True))


def build(kind, names=("region_words", "text"), options=None, **settings):
    """A sampler with random weights of canvases of 8 x 12."""
    torch.manual_seed(0)
    settings |= {"conditions": names, "condition_options": options or options_of(*names)}
    if kind == "ddpm":
        config = ddpm.Config(**UNET, attn_block_type="transformer", **settings)
        sampler = ddpm.build(config, shape=(1, 8, 12), pixels=True, n_classes=0)
    else:
        module = {"absorbing": absorbing, "autoregressive": autoregressive}[kind]
        sampler = module.build(module.Config(**CODES, **settings), codes=7, grid=(8, 12), n_classes=0)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def rows(*changes):
    """Faces 4, with words of their own for some of the parts."""
    item = to_item(face_dataset()[4], (8, 12), 1)
    names = ("panoptic", "segment_id", "segment_class", "box_id", "box_words")
    base = {name: item[name] for name in names} | {"caption": "a face"}
    return [base | each for each in changes]


OTHERS = ({"box_words": ["a blue eye", "", "smile", "left eye"]}, {}, {"caption": "two faces"})


def sample(sampler, kind, batch, seeds=None, **options):
    rng = Streams(list(range(len(batch["panoptic"]))) if seeds is None else seeds)
    kinds = {"ddpm": ddpm, "absorbing": absorbing, "autoregressive": autoregressive}
    options = kinds[kind].Sampling(**({} if kind == "autoregressive" else {"sample_steps": 3}), **options)
    return sampler.sample(sampler.network, rng, options=options, batch=batch).double()


# Batches


class Fixed:
    """A source of the same items at any positions."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, positions):
        return collate([self.items[position % len(self.items)] for position in positions])

    def item_index(self, position):
        return position


def network_of(**options):
    return Conditioner({"region_words": region_words.build(options_of("region_words", **options), 8, 0)})


@pytest.mark.parametrize("cached", [False, True])
def test_words_follow_flips_caches_and_workers(tmp_path, cached):
    """The words of each part of a mirrored face are those of the face that a mirror shows."""
    data = replace(DATA, horizontal_flip=True, cache_images=cached)
    images = TrainingImages(ImageSource(face_dataset(), data, tmp_path), seed=1)
    network = network_of()
    source, positions = with_condition_fields(images, network, 1), list(range(40))
    (batch,) = load_batches(source, [positions], 1)
    flipped = [images.views[images.view_index(position)].flip for position in positions]
    assert 0 < sum(flipped) < 40
    encoder = network["region_words"]
    for row, position in enumerate(positions):
        index = images.order[position]
        item = to_item((mirrored_face if flipped[row] else face_dataset().__getitem__)(index), (8, 12), 1)
        alone = encoder.tokenize(collate([item]))
        own, mask = batch[region_words.WORDS][row, ..., 1:-1], batch[f"{region_words.WORDS}_mask"][row]
        for region, number in enumerate(alone[region_words.NUMBERS][0].tolist()):
            words = alone[region_words.WORDS][0, number, ..., 1:-1]
            expected = words[alone[f"{region_words.WORDS}_mask"][0, number]]
            place = batch[region_words.NUMBERS][row, region]
            assert torch.equal(own[place][mask[place]], expected) and len(expected) == (
                1 if expected[0] == MOUTH else 2
            )
    assert batch["box_words"] != [item["box_words"] for item in (face_dataset()[images.order[p]] for p in positions)]


@KINDS
def test_words_of_the_loader_are_the_same_as_texts(kind):
    sampler, items = build(kind), rows(*OTHERS)
    raw = collate(items)
    loaded = with_condition_fields(Fixed(items), sampler.network)[[0, 1, 2]]
    assert isinstance(loaded["caption"], Tensor) and isinstance(loaded[region_words.WORDS], Tensor)
    one, other = (sample(sampler, kind, batch) for batch in (raw, loaded))
    assert torch.equal(one, other)


def test_without_the_condition_text_captions_are_not_tokenized():
    loaded = with_condition_fields(Fixed(rows({})), network_of())[[0]]
    assert loaded["caption"] == ["a face"] and loaded[region_words.WORDS].ndim == 4


def test_embeddings_of_a_cache_act_as_texts(tmp_path):
    """Each different text is encoded once, by the text encoder of a file; both conditions read the same cache."""
    path = write_encoder(tmp_path / "encoder.safetensors")
    for names in (("text", "region_words"), ("region_words",)):
        options = options_of(*names, text_width=8, text_encoder=str(path), text_activation="quick_gelu")
        sampler = build("ddpm", names, options)
        keys = fill_text_encoder(sampler.network, path)
        assert len(keys) and all(key in sampler.network.state_dict() for key in keys)
        cache = open_text_cache(options, str(tmp_path), sampler.network)
        items = rows(*OTHERS)
        loaded = with_condition_fields(Fixed(items), sampler.network, None, cache)[[0, 1, 2]]
        assert loaded[region_words.WORDS].is_floating_point() and loaded[region_words.WORDS].ndim == 4
        assert isinstance(loaded["caption"], Tensor) == ("text" in names)
        one, other = (sample(sampler, "ddpm", batch) for batch in (collate(items), loaded))
        assert torch.allclose(one, other, rtol=0, atol=1e-4) and not torch.allclose(one[0], one[1], atol=1e-2)


def test_wrong_words_name_their_image():
    item = rows({"box_words": ["one"]})[0] | {"file_name": "a/b.png"}
    with pytest.raises(ValueError, match="a/b.png: got 1 texts as box_words, wanted a text for each of 4 instances"):
        TokenizedWords(Fixed([item]), RULE, 77, text.TextEncoder.tokenizer)[[0]]


# Samplers


@KINDS
def test_fields_of_words_are_optional(kind):
    sampler = build(kind)
    assert sampler.conditions == ("panoptic", "segment_id", "segment_class", "caption")
    assert sampler.optional_conditions == dict.fromkeys(("box_id", "box_words"), "panoptic")
    batch = collate(rows(*OTHERS))
    plain = {name: value for name, value in batch.items() if not name.startswith("box_")}
    raw, full = (raw_conditions(sampler.fields_of, each, sampler.optional_of) for each in (plain, batch))
    assert {*raw["region_words"]} == {*plain} - {"caption"}
    assert {*full["region_words"]} == {*batch} - {"caption", "box_words_mask"}


@KINDS
def test_images_follow_their_words_whatever_the_batch(kind):
    sampler, items = build(kind), rows(*OTHERS)
    together = sample(sampler, kind, collate(items))
    alone = sample(sampler, kind, collate(items[:1]), seeds=[0])
    assert torch.allclose(together[0], alone[0], atol=1e-4)
    raw = raw_conditions(sampler.fields_of, collate(items), sampler.optional_of)
    if kind == "ddpm":
        outputs = sampler.predict(sampler.network, torch.ones(3, 1, 8, 12), torch.full((3,), 0.5), raw)
    else:
        outputs = sampler.network(torch.ones(3, 8, 12, dtype=torch.long), raw)  # few codes change if their logits do
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 and (outputs[1] - outputs[2]).abs().max() > 1e-3


@KINDS
def test_the_chain_is_the_null_the_prompt_and_the_regions(kind):
    sampler, batch = build(kind), collate(rows(*OTHERS))
    kinds = {"ddpm": ddpm, "absorbing": absorbing, "autoregressive": autoregressive}
    options = kinds[kind].Sampling(guidance=3.0, region_guidance=2.0)
    chain = guidance_chain(sampler.config, sampler.network.encoders, sampler.fields_of, batch, options, 0)
    assert [{*raw} for raw in chain.raw] == [set(), {"text"}, {"text", "region_words"}] and chain.scales == [3.0, 2.0]
    assert "box_words" in chain.raw[2]["region_words"]
    without = sample(sampler, kind, batch, seeds=[1, 1, 1], guidance=3.0, region_guidance=0.0)
    assert torch.equal(without[0], without[1]) and not torch.equal(without[1], without[2])  # words, and a prompt


@KINDS
def test_training_drops_regions_and_their_words_together(kind):
    """With all regions dropped, the words of none get a gradient, and experts see no region."""
    for drop, learns in ((0.0, True), (0.9999, False)):
        sampler = build(kind, experts=("1,2", "3"), condition_drop=drop)
        batch = with_condition_fields(Fixed(rows(*OTHERS)), sampler.network)[[0, 1]]
        data = {"x0": torch.randn(2, 1, 8, 12)} if kind == "ddpm" else {"codes": torch.randint(7, (2, 8, 12))}
        batch |= data | {"position": torch.arange(2)}
        loss = sampler.loss(sampler.network.train(), batch, TrainingStreams(0, batch, 2, torch.device("cpu")))
        loss.per_example.mean().backward()
        encoder = sampler.network.encoders["text"]
        (smile,), (face,) = encoder.tokenizer.encode("smile"), encoder.tokenizer.encode("face")
        gradients = encoder.encoder.token.weight.grad.abs().sum(1)
        assert bool(gradients[smile]) == bool(gradients[face]) == learns
        own = sum(layer.rows[:2].sum() for layer in experts_of(sampler.network).values())
        assert bool(own) == learns
        assert REGIONS in sampler.network.encoders.drop_names.values()


def test_adapters_are_in_the_one_text_encoder():
    sampler = build("ddpm")
    names = adapt(sampler.network, "mine", LoRAOptions(rank=2), ["text"])
    assert names and all(name.startswith("encoders.text.encoder.") for name in names)
    alone = build("ddpm", ("region_words",))
    names = adapt(alone.network, "mine", LoRAOptions(rank=2), ["text"])
    assert names and all(name.startswith("encoders.region_words.own.encoder.") for name in names)


def test_a_named_text_encoder_is_read_whatever_the_order():
    keys = []
    for names in (("text", "region_words"), ("region_words", "text")):
        network = build("ddpm", names).network
        assert [*network.encoders] == [*names]
        assert network.encoders["region_words"].captions is network.encoders["text"]
        keys.append({*network.state_dict()})
    assert keys[0] == keys[1] == {*build("ddpm", ("text",)).network.state_dict()}


def test_names_of_data_are_saved_with_the_run():
    class Data:
        region_classes, region_things = NAMES, (False, True, True, True)

    config = ddpm.Config(conditions=("region_words",), condition_options=region_words.Config(**SMALL))
    options = with_declared_values(config, Data()).condition_options
    assert options.region_words_names == options.region_words_classes == NAMES and options.region_words_stuff == (0,)


# Sources of conditions


def test_words_come_with_their_regions():
    """Rows with regions and no words have those of classes; without regions both are those of held-out images."""
    sampler = build("ddpm")
    held_out = Fixed(rows({"box_words": ["held", "out", "", ""]}))
    source = ConditionSource(sampler.conditions, held_out=held_out, optional=sampler.optional_conditions)
    drawn = source.with_rows([{"caption": "mine"}]).draw(0, [0, 1])
    assert drawn["caption"] == ["mine"] * 2 and drawn["box_words"] == [["held", "out", "", ""]] * 2
    assert "box_id_mask" in drawn and "panoptic" in drawn
    drawn = source.with_rows([{"box_words": ["a", "b", "c", "d"]}]).draw(0, [0])
    assert drawn["box_words"] == [["a", "b", "c", "d"]]  # of the instances of the held-out map
    assert torch.equal(drawn["box_id"], held_out[[0]]["box_id"]) and torch.equal(
        drawn["panoptic"], held_out[[0]]["panoptic"]
    )
    assert sample(sampler, "ddpm", drawn, seeds=[0]).isfinite().all()
    names = ("panoptic", "segment_id", "segment_class")
    assert "box_words" not in source.with_rows([{"box_id": rows({})[0]["box_id"]}]).draw(0, [0])
    row = {name: value for name, value in rows({})[0].items() if name in names}
    drawn = source.with_rows([row]).draw(0, [0])
    assert "box_words" not in drawn and drawn["caption"] == ["a face"]
    drawn = source.with_rows([row | {"box_id": rows({})[0]["box_id"], "box_words": ["a", "b", "c", "d"]}]).draw(0, [0])
    assert drawn["box_words"] == [["a", "b", "c", "d"]]
    with pytest.raises(ValueError, match="got the condition words, this sampler takes: panoptic"):
        source.with_rows([row | {"words": ["a"]}])


def test_a_workers_copy_of_the_rule_has_no_weights():
    network = network_of()
    source = with_condition_fields(Fixed(rows({})), network)
    assert isinstance(source, TokenizedWords) and isinstance(network["region_words"], RegionWords)
    assert not [each for each in vars(source).values() if isinstance(each, nn.Module | Tensor)]


def test_maps_of_attention_are_of_the_texts_of_regions():
    """By name, equal ones once; or of words, where a text has them; beside those of the prompt."""
    sampler, batch = build("ddpm"), collate(rows(*OTHERS))
    model = SimpleNamespace(sampler=sampler, run="run", region_classes=NAMES)
    targets = find_targets(model, batch, 3)
    names = [[target.name for target in own if target.condition == "region_words"] for own in targets]
    assert names[0] == ["a blue eye", "right eye", "smile", "left eye"]
    assert names[1] == names[2] == ["left eye", "right eye", "mouth"]
    batch["caption"] = ["a blue eye"] * 3
    (first, second, _) = find_targets(model, batch, 3, ["eye"])
    assert [target.condition for target in first] == ["region_words", "text"]
    texts = sampler.network.encoders["region_words"].tokens_of_texts(batch)
    assert second[0].tokens == (texts[1]["left eye"][1], texts[1]["right eye"][1])


def test_edits_of_boxes_refuse_words():
    network = Conditioner(
        {"region_words": region_words.build(options_of("region_words", region_words_regions="boxes"), 8, 0)}
    )
    with pytest.raises(ValueError, match="run reads words of regions, which edits do not know: pass a run without"):
        read_layout_names(network, face_dataset(), "run")
