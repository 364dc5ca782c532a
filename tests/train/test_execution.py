"""Activation checkpointing, memory formats, compilation, determinism and TF32 do not change the results."""

import copy
import os

import pytest
import torch
from torch import nn

from helpers.labels import label_encoders
from models.attention import record_maps
from models.blocks import SPADE
from models.conditions.boxes import BoxEncoder
from models.conditions.layout import LayoutEncoder
from models.conditions.objects import ObjectsEncoder
from models.transformer import Transformer
from models.unet import UNet, UNetConfig
from models.unet_attention import GatedBlock, RegionBlock
from train.execution import (
    autocast,
    checkpoint_activations,
    compile_for_sampling,
    compile_network,
    convert_to_channels_last,
    is_checkpointed,
    outermost_blocks,
    set_deterministic,
    set_tf32,
    to_channels_last,
)
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.losses import adaptive_weight

CPU = torch.device("cpu")


def transformer():
    network = Transformer(
        codes=16, grid=(4, 4), width=16, heads=2, layers=2, encoders=label_encoders(3, 16), resid_dropout=0.3
    )
    return network, (torch.randint(0, 16, (2, 4, 4)), {"label": torch.tensor([0, 1])})


def unet():
    shape = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1}
    return UNet(UNetConfig(**shape, dropout=0.3), label_encoders(3, 32)), (
        torch.randn(2, 3, 8, 8),
        torch.rand(2),
        {"label": torch.tensor([0, 1])},
    )


def unet_of_layouts():
    """With region attention, gated attention and a map for the ResBlocks going up."""
    encoders = {
        "objects": ObjectsEncoder(3, 32),
        "boxes": BoxEncoder(3, 32, gated=True),
        "layout": LayoutEncoder(3, into="decoder"),
    }
    boxes = {"boxes": torch.tensor([[[0, 0, 0.5, 1]], [[0.2, 0.3, 1, 1]]]), "box_class": torch.tensor([[0], [2]])}
    shape = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1}
    network = UNet(UNetConfig(**shape, region_attention="v2"), encoders)
    return network, (torch.randn(2, 3, 8, 8), torch.rand(2), dict.fromkeys(encoders, boxes))


def vqgan():
    config = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=8, codebook_size=16)
    return VQGAN(config, (8, 8)), (torch.randn(2, 3, 8, 8),)


def build_network(build):
    torch.manual_seed(0)
    network, inputs = build()
    for p in network.parameters():  # zero-initialised layers would hide the layers before them
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network, inputs


@pytest.fixture(params=[transformer, unet, unet_of_layouts, vqgan])
def case(request):
    return build_network(request.param)


def step(network, inputs, dtype=None):
    """Loss and gradients of one step, with the same dropout masks each time."""
    network.zero_grad()
    torch.manual_seed(1)
    with autocast(CPU, dtype is not None, dtype):
        out = network(*inputs)
    loss = ((out[0] if isinstance(out, tuple) else out).float() - 1).square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def differing(actual, expected):
    return [name for name in actual.keys() | expected.keys() if not torch.equal(actual[name], expected[name])]


def count_saved_elements(network, inputs):
    """The number of elements saved for the backward pass, without parameters."""
    sizes, parameters = {}, {p.data_ptr() for p in network.parameters()}

    def pack(x):
        if x.data_ptr() not in parameters:
            sizes[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = network(*inputs)
    return sum(sizes.values()), out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputation_gives_bitwise_equal_gradients(case, dtype):
    network, inputs = case
    recomputed = copy.deepcopy(network)
    assert checkpoint_activations(recomputed) == len(list(outermost_blocks(network))) > 1
    assert differing(step(recomputed, inputs, dtype), step(network, inputs, dtype)) == []


def test_blocks_beside_the_lists_are_recomputed():
    network = build_network(unet_of_layouts)[0]
    checkpoint_activations(network)
    beside = [m for m in network.modules() if isinstance(m, RegionBlock | GatedBlock)]
    assert len(beside) == 3 + 4 and all(map(is_checkpointed, beside))
    assert not any(is_checkpointed(m) for m in network.modules() if isinstance(m, SPADE))  # parts of their ResBlocks


@pytest.mark.parametrize("build", [transformer, unet, vqgan])
def test_fewer_activations_are_stored(build):
    network, inputs = build_network(build)
    plain = count_saved_elements(network, inputs)[0]
    checkpoint_activations(network)
    assert count_saved_elements(network, inputs)[0] < 0.5 * plain


def test_names_and_values_do_not_change(case):
    network, _ = case
    before = {name: value.clone() for name, value in network.state_dict().items()}
    types = [type(m) for m in network.modules()]
    checkpoint_activations(network)
    assert list(network.state_dict()) == list(before) and differing(network.state_dict(), before) == []
    assert [type(m) for m in network.modules()] == types


def test_a_deep_copy_computes_with_its_own_weights(case):
    network, inputs = case
    expected = step(network, inputs)
    checkpoint_activations(network)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(7.0)
    assert differing(step(copied, inputs), expected) == []


def test_maps_are_recorded_once_per_forward():
    network, inputs = build_network(transformer)
    with record_maps(network) as maps:
        expected = step(network, inputs)
    checkpoint_activations(network)
    with record_maps(network) as recorded:
        assert differing(step(network, inputs), expected) == []
    assert recorded.keys() == maps.keys()
    assert all(len(recorded[name]) == 1 and torch.equal(recorded[name][0], maps[name][0]) for name in maps)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_maps_can_be_recorded_during_forward_alone(forward):
    network, inputs = build_network(transformer)
    expected = step(network, inputs)
    checkpoint_activations(network)
    network.zero_grad()
    torch.manual_seed(1)
    with record_maps(network) if forward else record_maps(network, []) as maps:
        loss = (network(*inputs) - 1).square().mean()
    with record_maps(network) if not forward else record_maps(network, []) as late:
        loss.backward()
    assert [len(recorded) for recorded in maps.values()] == [1] * len(maps)
    assert [len(recorded) for recorded in late.values()] == [0] * len(late)
    actual = {"loss": loss.detach()} | {name: p.grad for name, p in network.named_parameters()}
    assert differing(actual, expected) == []


def test_an_earlier_partial_backward_is_allowed():
    """The adaptive weight takes gradients of the last layer twice before the graph is used again."""
    network, (images,) = build_network(vqgan)
    gradients = []
    for _ in range(2):
        network.zero_grad()
        reconstructions, codes = network(images)
        fake = reconstructions.detach().requires_grad_()
        losses = [(images - fake).abs().mean(), fake.square().mean()]
        at_images = [torch.autograd.grad(loss, fake)[0] for loss in losses]
        last_layer = network.decoder.last_layer
        at_last_layer = [torch.autograd.grad(reconstructions, last_layer, g, retain_graph=True)[0] for g in at_images]
        weight = adaptive_weight(*at_last_layer, 1e4)
        torch.autograd.backward([reconstructions, codes.loss.mean()], [at_images[0] + weight * at_images[1], None])
        gradients.append({"weight": weight} | {n: p.grad.clone() for n, p in network.named_parameters()})
        if len(gradients) == 1:
            checkpoint_activations(network)
    assert differing(*gradients) == []


def test_networks_that_cannot_be_recomputed_are_refused():
    with pytest.raises(ValueError, match="Linear has no blocks"):
        checkpoint_activations(nn.Linear(2, 2))
    block = nn.Module()
    block.norm = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="statistics twice"):
        checkpoint_activations(nn.Sequential(block))
    network, _ = build_network(transformer)
    checkpoint_activations(network)
    with pytest.raises(ValueError, match="they already are"):
        checkpoint_activations(network)


@pytest.mark.parametrize("build", [unet, vqgan])
def test_channels_last_computes_the_same(build):
    network, inputs = build_network(build)
    converted = copy.deepcopy(network.eval())  # dropout draws in memory order
    assert convert_to_channels_last(converted) is converted
    images = to_channels_last(inputs[0])
    assert images.shape == inputs[0].shape and images.is_contiguous(memory_format=torch.channels_last)
    expected, actual = step(network, inputs), step(converted, (images, *inputs[1:]))
    scale = max(g.abs().max() for g in expected.values())
    assert max((actual[name] - expected[name]).abs().max() for name in expected) < 1e-5 * scale
    assert differing(converted.state_dict(), network.state_dict()) == []
    kernels = [p for p in converted.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_only_images_change_their_memory_format():
    ids = torch.zeros(2, 3, 4)
    assert to_channels_last(ids) is ids


def test_compiling_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch.compiler.reset()
    network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not work here on cpu.*install them, or leave --compile out"):
        compile_network(network)
    assert torch.equal(network(torch.ones(2)), nn.functional.linear(torch.ones(2), network.weight, network.bias))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # accessed by torch's tracer
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_compiled_network_computes_the_same(checkpointed):
    torch.compiler.reset()
    network = Transformer(codes=16, grid=(4, 4), width=16, heads=2, layers=2)
    compiled, ids = copy.deepcopy(network), torch.randint(0, 16, (2, 4, 4))
    if checkpointed:
        checkpoint_activations(compiled)
    compile_network(compiled)
    expected, actual = step(network, (ids,)), step(compiled, (ids,))
    assert list(compiled.state_dict()) == list(network.state_dict())
    scale = max(g.abs().max() for g in expected.values())
    assert max((actual[name] - expected[name]).abs().max() for name in expected) < 1e-5 * scale


@pytest.fixture
def fresh_compiler():
    """torch's compiler as in a new process."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.slow
def test_a_network_compiled_for_sampling_computes_the_same(fresh_compiler, capsys):
    network = Transformer(codes=16, grid=(4, 4), width=16, heads=2, layers=2).eval().requires_grad_(False)
    compiled = copy.deepcopy(network)
    compile_for_sampling(compiled)
    assert list(compiled.state_dict()) == list(network.state_dict()) and capsys.readouterr().out == ""
    for size, says in (
        (2, "compiled in "),
        (2, ""),
        (3, "compiled in "),
        (5, ""),
    ):  # 3 and 5 share one
        ids = torch.randint(0, 17, (size, 4, 4))
        logits = network(ids)
        assert (compiled(ids) - logits).abs().max() < 1e-5 * logits.abs().max()
        out = capsys.readouterr().out
        assert out.startswith(says) and bool(out) == bool(says)


@pytest.mark.slow
def test_every_block_of_a_unet_is_compiled_whole(fresh_compiler, monkeypatch):
    compile_block = nn.Module.compile
    monkeypatch.setattr(  # a graph break, or a block too many for the limit of versions, raises an error
        nn.Module, "compile", lambda block, **_: compile_block(block, backend="eager", fullgraph=True)
    )
    shape = {"channels": 8, "channel_mults": (1, 2, 3), "res_blocks": 1, "attn_factors": (2,), "heads": 1}
    network = UNet(UNetConfig(**shape), label_encoders(3, 32)).eval().requires_grad_(False)
    compiled = copy.deepcopy(network)
    compile_network(compiled)
    assert len(list(outermost_blocks(network))) > 16
    for size in (1, 2, 3):
        x = (torch.randn(size, 3, 8, 8), torch.rand(size), {"label": torch.zeros(size, dtype=torch.int64)})
        assert torch.equal(compiled(*x), network(*x))


def test_region_attention_is_not_compiled(fresh_compiler, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(nn.Module, "compile", lambda block, **_: compiled.append(type(block)))
    compile_network(unet_of_layouts()[0])
    assert compiled.count(GatedBlock) == 4 and not {RegionBlock, SPADE} & {*compiled}


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


def test_determinism_holds_until_it_is_reset(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    set_deterministic(False)
    assert settings() == before
    with set_deterministic(True):
        assert settings()[:4] == (True, False, False, ":4096:8")
        x = torch.zeros(3)
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            x.put_(torch.tensor([0, 0]), torch.ones(2))
    assert settings() == before


def test_the_users_cublas_workspace_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with set_deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_holds_on_cuda_until_it_is_reset(enabled):
    before = settings()
    with set_tf32(torch.device("cuda"), enabled):
        assert settings()[4:] == (enabled, enabled)
        assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")  # as compilers see it
    assert settings() == before
    with set_tf32(CPU, enabled):
        assert settings() == before
