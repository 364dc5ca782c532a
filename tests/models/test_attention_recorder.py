"""The recorder of attention maps on networks: layers, grids, heads, places, and what is refused."""

import pytest
import torch
from torch import nn

from models.attention import DiffAttentionV2, record_maps
from models.attention_recorder import MapRecorder, find_layers, grid_of
from models.conditioning import Condition, ConditionEncoder, Tokens
from models.conditions.boxes import BoxEncoder
from models.conditions.label import LabelEncoder
from models.transformer import AttentionConfig, Transformer
from models.unet import UNet, UNetConfig

SIZE = (8, 12)


class TokenStub(ConditionEncoder):
    """Takes tokens as they are."""

    token_width = 6

    def forward(self, raw, x, drop=None):
        return Tokens(torch.zeros(len(x), 1, 6) if raw is None else raw)


def make_unet(**options):
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=1,
        out_channels=1,
        channels=8,
        channel_mults=(1, 2),
        res_blocks=1,
        attn_factors=(1, 2),
        heads=2,
        attn_block_type="transformer",
        **options,
    )
    return randomized(UNet(config, {"text": TokenStub(), "boxes": BoxEncoder(2, 6, gated=True)}))


def make_transformer(**options):
    torch.manual_seed(0)
    return randomized(Transformer(codes=5, grid=SIZE, width=16, heads=2, layers=2, **options))


def randomized(network):
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def record_codes(network, recorder, ids):
    """Records one unconditional call."""
    recorder.start(network, Condition(), len(ids), 1, SIZE)
    with recorder.record_call(torch.arange(len(ids)), torch.tensor([0.5]), Condition()):
        network(ids)
    return recorder.maps()


def test_layers_are_found_by_what_they_read():
    network = make_unet()
    assert find_layers(network) == [
        *("down_blocks.0.1.cross", "down_blocks.2.1.cross", "middle_blocks.1.cross"),
        *(f"up_blocks.{i}.1.cross" for i in range(4)),
    ]
    gated, own = find_layers(network, "gated"), find_layers(network, "self")
    assert len(gated) == len(own) == 7 and gated[0] == "gated_blocks.down.0.attention.cross"
    assert own[0] == "down_blocks.0.1.attention" and not any(name.startswith("encoders") for name in own)


def test_maps_have_the_grids_of_their_layers():
    network, recorder = make_unet(), MapRecorder()
    x, tokens = torch.randn(2, 1, *SIZE), torch.randn(2, 5, 6)
    condition = network.encode({"text": tokens}, x)
    with record_maps(network) as wanted:
        network(x, torch.tensor([0.1, 0.1]), condition)

    def denoise(x, t, condition):
        return network(x, t, condition)

    recorded, parts = recorder.observe(network, denoise, [condition], x)
    recorded(x, torch.tensor([0.1, 0.1]), parts[0])
    maps = recorder.maps()
    assert maps.spans == {"text": slice(0, 5)} and maps.size == SIZE
    assert maps.layers["down_blocks.0.1.cross"].shape == (2, 2, 8, 12, 5)
    assert maps.layers["middle_blocks.1.cross"].shape == (2, 2, 4, 6, 5)
    for name, layer in maps.layers.items():
        assert torch.equal(layer.flatten(2, 3), wanted[name][0])


def test_gated_tokens_have_their_own_maps():
    network, x = make_unet(), torch.randn(1, 1, *SIZE)
    raw = {"text": torch.randn(1, 3, 6), "boxes": {"boxes": torch.rand(1, 2, 4).sort(-1).values[..., [0, 1, 2, 3]]}}
    raw["boxes"] |= {"boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1]]]), "box_class": torch.tensor([[0, 1]])}
    condition, recorder = network.encode(raw, x), MapRecorder("gated")
    recorded, parts = recorder.observe(network, network, [condition], x)
    recorded(x, torch.tensor([0.1]), parts[0])
    maps = recorder.maps()
    assert maps.spans == {"boxes": slice(0, 3)}  # the null, then two boxes
    assert len(maps.layers) == 7 and not maps.layers["gated_blocks.up.3.attention.cross"][..., 0].any()
    assert [*network.encoders["boxes"].tokens_of_region(1)] == [2]


def test_heads_are_averaged_on_request():
    network, ids = make_transformer(), torch.randint(0, 5, (2, *SIZE))
    every, mean = (record_codes(network, MapRecorder("self", per_head=each), ids) for each in (True, False))
    for name, layer in every.layers.items():
        assert layer.shape == (2, 2, *SIZE, 96) and mean.layers[name].shape == (2, 1, *SIZE, 96)
        assert torch.allclose(layer.mean(1, keepdim=True), mean.layers[name], atol=1e-6)


def test_a_box_keeps_what_its_places_attend_to():
    network, ids = make_transformer(), torch.randint(0, 5, (2, *SIZE))
    box = (0.3, 0.25, 0.5, 0.3)  # of 12 columns those from 3 to 5, of 8 rows the one from 2 on
    some = record_codes(network, MapRecorder("self", box=box), ids)
    every = record_codes(network, MapRecorder("self"), ids)
    for name, layer in every.layers.items():
        wanted = layer[:, :, 2, 3:6].mean(2)  # (B, heads, N)
        assert torch.allclose(some.layers[name][..., 0].flatten(2), wanted, atol=1e-6)


def test_rows_of_a_chain_are_added_to_their_images():
    """Rows 3 to 5 are those of the recorded condition of images 0 to 2."""
    network, ids = make_transformer(), torch.randint(0, 5, (4, *SIZE))
    recorder = MapRecorder("self", per_step=True)
    recorder.start(network, Condition(), 3, 2, SIZE)
    with record_maps(network) as wanted:
        for rows, t in (([0, 1, 4, 5], [0.9, 0.8, 0.5, 0.25]), ([4], [0.1]), ([2], [0.1])):
            with recorder.record_call(torch.tensor(rows), torch.tensor(t), Condition()):
                network(ids[: len(rows)])
    assert [step.images.tolist() for step in recorder.steps] == [[1, 2], [1]]
    assert [step.times.tolist() for step in recorder.steps] == [[0.5, 0.25], [pytest.approx(0.1)]]
    maps = recorder.maps()
    assert maps.counts.tolist() == [0, 2, 1]
    for name, layer in maps.layers.items():
        first, second, _ = wanted[name]
        assert torch.allclose(layer[1].flatten(1, 2), (first[2] + second[0]) / 2, atol=1e-6)
        assert torch.equal(layer[2].flatten(1, 2), first[3]) and not layer[0].any()


def test_differential_maps_keep_their_signs():
    network = make_transformer(attention=AttentionConfig(attention_type="diff_v2"))
    assert isinstance(network.blocks[0].attention, DiffAttentionV2)
    maps = record_codes(network, MapRecorder("self"), torch.randint(0, 5, (1, *SIZE)))
    assert min(layer.min() for layer in maps.layers.values()) < 0


def test_maps_do_not_depend_on_the_rest_of_the_batch():
    network, ids = make_transformer(), torch.randint(0, 5, (3, *SIZE))
    whole, alone = (record_codes(network, MapRecorder("self"), each) for each in (ids, ids[1:2]))
    for name, layer in whole.layers.items():
        assert torch.allclose(layer[1:2], alone.layers[name], atol=1e-6)


def test_classes_that_are_no_tokens_are_refused_with_the_reason():
    network = Transformer(codes=5, grid=SIZE, width=16, heads=2, layers=1, encoders={"label": LabelEncoder(3, 16)})
    with pytest.raises(ValueError, match="of the conditions label, whose values are vectors or maps: .* such as text"):
        record_codes(network, MapRecorder(), torch.zeros(1, *SIZE, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reads": "words"}, "got reads 'words', wanted one of tokens, gated, self"),
        ({"box": (0, 0, 1, 1)}, "got the box 0 0 1 1 of attention to tokens, wanted .* for reads='self'"),
        ({"reads": "self", "box": (0.5, 0, 0.5, 1)}, "wanted left < right"),
    ],
)
def test_senseless_recorders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MapRecorder(**arguments)


def test_parts_and_layers_that_are_not_there_are_refused():
    network, ids = make_transformer(), torch.zeros(1, *SIZE, dtype=torch.int64)
    with pytest.raises(ValueError, match="got part 1 of a chain of 1 conditions, wanted -1 to 0"):
        record_codes(network, MapRecorder("self", part=1), ids)
    with pytest.raises(ValueError, match="got layers blocks.7.attention, wanted some of blocks.0.attention, blocks.1"):
        record_codes(network, MapRecorder("self", layers=["blocks.7.attention"]), ids)
    with pytest.raises(ValueError, match="got no attention maps, nothing was sampled"):
        MapRecorder().maps()


def test_grids_are_the_size_by_a_whole_number():
    assert grid_of(96, (8, 12)) == (8, 12) and grid_of(24, (8, 12)) == (4, 6) and grid_of(6, (8, 12)) == (2, 3)
    with pytest.raises(ValueError, match="got 20 places of an input of 8x12"):
        grid_of(20, (8, 12))
