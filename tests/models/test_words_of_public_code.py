"""Words of regions against arrays of public code (MaMoE): which place sees which words, and attention to them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.mamoe_attention import load_masked_attention
from models.conditioning import Condition, Tokens
from models.conditions import text
from models.conditions.region_words import RegionWords, WordRule, arrange, different_texts
from models.regions import Regions
from models.text_encoder import TextEncoder, TextEncoderConfig

SPATIAL = Path(__file__).parents[1] / "fixtures" / "spatial"


def recorded(name):
    return {key: torch.from_numpy(value) for key, value in np.load(SPATIAL / f"{name}.npz").items()}


GLOBAL = "global_prompt_tokens"
KNOWN = {0: "road", 2: "building", 10: "sky", 11: "person", 13: "car", 17: "motorcycle"}
CLASSES = tuple(KNOWN.get(number, str(number)) for number in range(18))
SPOKEN = {12: "an old building", 24001: "a man", 26001: "a red car"}  # stand for the instances' prompts, by id


def recorded_words(mode, instances=False, name=""):
    """The panoptic map of public code, and its prompts as tokens by this mode: a condition of one image."""
    prompts, levels = recorded("mamoe_words"), recorded("prompts_of_segments")
    ids = levels["instance_ids"].unique()
    ids = ids[ids != 0].long()
    classes = torch.stack([levels["class_ids"][levels["instance_ids"] == each][0].long() for each in ids])
    fields = {"panoptic": levels["instance_ids"][None], "segment_id": ids[None], "segment_class": classes[None]}
    if instances:
        fields |= {"box_id": torch.tensor([[*SPOKEN]]), "box_words": [[*SPOKEN.values()]]}
    rule = WordRule(mode=mode, names=CLASSES, classes=CLASSES, stuff=frozenset(range(11)), everywhere=name)
    torch.manual_seed(0)
    captions = text.CaptionEncoder(TextEncoder(TextEncoderConfig(width=12, layers=1, heads=2)), "empty")
    found = rule.read(fields)
    places = different_texts(found)
    known = {words: f"class_prompt_tokens.{number}" for number, words in KNOWN.items()}
    known |= {words: f"instance_prompt_tokens.{key}" for key, words in SPOKEN.items()} | {name: "name_tokens"}
    rows = [prompts[known[each]] if each else torch.zeros(0, 12) for each in places]
    values = torch.stack([torch.cat([row, torch.zeros(4 - len(row), 12)]) for row in rows])
    mask = torch.arange(4) < torch.tensor([len(row) for row in rows])[:, None]
    encoder = RegionWords(captions, rule).eval()
    raw, x = fields | arrange(found, values, mask, places), torch.zeros(1, 3, 64, 128)
    return Condition({"words": encoder(raw, x, None, Regions.from_fields(raw))}, Regions.from_fields(raw)), prompts


def sort_tokens(tokens, seen):
    """The tokens that any place sees, each with where it is seen, in an order that does not depend on theirs."""
    return torch.tensor(
        sorted((*t.tolist(), *places.tolist()) for t, places in zip(tokens, seen.T, strict=True) if places.any())
    )


@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (2, 4), (1, 2)])
@pytest.mark.parametrize("mode", ["all", "all_instances", "all_name", "all_name_instances", "background", "things"])
def test_words_are_seen_where_public_code_shows_them(mode, grid, agrees):
    """All its modes that run. The image's prompt is a stream of its own; published `things` hides it from things, and
    needs maps without stuff."""
    plain = mode.partition("_")[0]
    condition, prompts = recorded_words(plain, "instances" in mode, "cityscapes" if "name" in mode else "")
    seen, values, count = condition.attention_mask(*grid, "nearest")[0], condition.tokens().values[0], grid[0] * grid[1]
    tokens, expected = prompts[f"{mode}.tokens.{count}"], prompts[f"{mode}.seen.{count}"]
    if mode in ("background", "things"):
        everywhere = prompts[GLOBAL]
        assert torch.equal(tokens[:5], everywhere) and expected[:, :5].all() == (mode == "background")
        tokens, expected = tokens[5:], expected[:, 5:]
    own, theirs = (sort_tokens(*each) for each in ((values, seen), (tokens, expected)))
    assert agrees(own, theirs, f"mamoe words and where they are seen, {mode}", 0)


def test_masked_attention_to_words_is_that_of_public_code(agrees):
    """Two images in a batch, one with the image's prompt and words of instances; blind places as they should be."""
    layer, f = load_masked_attention()
    one, prompts = recorded_words("all", instances=True)
    other, _ = recorded_words("all")
    whole = Tokens(prompts[GLOBAL][None])
    one = Condition({"text": whole, **one.streams}, one.regions)
    other = Condition({"text": Tokens(whole.values, torch.zeros(1, 5).bool()), **other.streams}, other.regions)
    condition = Condition.cat([one, other])
    out = layer(f["x"], condition.tokens().values, condition.attention_mask(8, 16, "nearest"))
    for row in range(2):
        blind, right = f[f"blind_{row}"], f[f"right_out_{row}"]
        assert agrees(out[row], right, "mamoe attention to words, right_out")
        assert agrees(out[row][~blind], f["out"][row][~blind], "mamoe attention to words, out, not blind")
    assert f["blind_1"].any() and not torch.allclose(out[1][f["blind_1"]], f["out"][1][f["blind_1"]], atol=0.1)
