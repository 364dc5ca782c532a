"""Everything runs on fake CUDA tensors: a tensor on the wrong device fails here, without a GPU.

Fake tensors have a shape, a dtype and a device, but no values. Autograd does not support fake CUDA tensors without a
GPU, so gradients are computed on "meta", which is distinct from the CPU as well. Code that reads values cannot run on
either: see test_fake_device.py.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams
from helpers.labels import label_encoders
from models.attention import record_maps
from models.transformer import AttentionConfig, Transformer
from vq.augment import Augmentation
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.discriminator import PatchDiscriminator
from vq.losses import ADVERSARIAL_LOSSES, adaptive_weight
from vq.quantizer import count_codes, perplexity, usage

CODES, GRID, BATCH = 16, (4, 4), 2
PROCESS = AbsorbingDiffusion(CODES, steps=3)


def attention(position, **options):
    return AttentionConfig(attention="neighborhood", position=position, **{"na_backend": "tiled"} | options)


@pytest.fixture
def networks():
    """The networks, built on the CPU as users do."""
    config = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=8, codebook_size=CODES)
    shape = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 1}
    return {
        "vqgan": VQGAN(config, (8, 8)),
        "group": PatchDiscriminator(3, ndf=8, layers=1, norm="group"),
        "batch": PatchDiscriminator(3, ndf=8, layers=1, norm="batch"),
        "unconditional": Transformer(**shape),
        "conditional": Transformer(**shape, encoders=label_encoders(3, 16)),
        "neighborhood": Transformer(**shape, attention=attention("rope", kernel_sizes=(3,), attention_type="diff_v1")),
        "hydra": Transformer(**shape, attention=attention("bias", kernel_sizes=(3, 1), attention_type="diff_v2")),
        "dense": Transformer(**shape, attention=attention("bias", kernel_sizes=(1, 3), na_backend="dense")),
        "biased": Transformer(**shape, attention=AttentionConfig(position="bias")),
    }


@pytest.fixture(params=["cuda:0"])
def device(request, networks, monkeypatch):
    """The fake device, with the networks moved to it."""
    if request.param == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not supported on "meta"
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks.values():
            network.to(request.param)
        yield torch.device(request.param)


with_autograd = pytest.mark.parametrize("device", ["meta"], indirect=True)


@pytest.fixture
def images(device):
    return torch.rand(BATCH, 3, 8, 8, device=device)


@pytest.fixture
def codes(device):
    return torch.randint(0, CODES, (BATCH, *GRID), device=device)


@pytest.fixture
def masks(device):
    return torch.full((BATCH, *GRID), PROCESS.mask, device=device)


@pytest.fixture
def rng(device):
    return Streams([1, 2], device)


def all_on(device, *results):
    tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    return len(tensors) > 0 and all(tensor.device == device for tensor in tensors)


@pytest.mark.parametrize("device", ["cuda:0", "meta"], indirect=True)
def test_a_tensor_on_the_wrong_device_is_detected(device, networks, codes):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=device) + torch.zeros(3)
    networks["unconditional"].position = torch.nn.Parameter(torch.zeros(*GRID, 16))
    with pytest.raises(RuntimeError, match="device"):
        networks["unconditional"](codes)


def test_the_autoencoder(device, networks, images, codes):
    vqgan = networks["vqgan"]
    assert all_on(device, list(vqgan.parameters()), vqgan(images), vqgan.encode(images), vqgan.decode(codes))
    counts = count_codes(vqgan(images)[1].ids, CODES)
    assert all_on(device, usage(counts), perplexity(counts))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_discriminator(device, networks, images, norm):
    assert all_on(device, networks[norm](images))


def test_the_transformer(device, networks, masks, codes):
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    plain, conditional = networks["unconditional"], networks["conditional"]
    assert all_on(device, plain(masks), conditional(codes), conditional(masks, {"label": labels}))


@pytest.mark.parametrize("kind", ["neighborhood", "hydra", "dense", "biased"])
def test_every_kind_of_attention(device, networks, codes, kind):
    assert all_on(device, networks[kind](codes))
    with record_maps(networks[kind]) as maps:
        networks[kind](codes)
    assert all_on(device, maps)


@pytest.mark.parametrize("steps", [3, None])
def test_training_on_the_process(device, networks, codes, rng, steps):
    process = AbsorbingDiffusion(CODES, steps)
    t = process.times(rng)
    for corrupt in (process.corrupt, process.corrupt_fixed):
        x_t = corrupt(codes, t, rng)
        logits = networks["unconditional"](x_t)
        losses = [process.loss(logits, codes, x_t, t, kind) for kind in ("elbo", "reweighted_elbo", "mlm")]
        assert all_on(device, t, x_t, losses)


def test_the_streams(device, rng):
    assert all_on(device, rng.uniform((BATCH, 3)), rng.normal((BATCH, 3)))
    assert all_on(device, rng.categorical(torch.zeros(BATCH, 3, device=device)))


def test_the_augmentation(device, images, rng):
    augmentation = Augmentation.draw(images, rng)
    assert all_on(device, augmentation, augmentation(images))


@with_autograd
@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_the_losses_of_the_first_stage_and_their_gradients(device, networks, images, rng, loss):
    vqgan, discriminator = networks["vqgan"], networks["group"]
    discriminator_loss_fn, generator_loss_fn = ADVERSARIAL_LOSSES[loss]
    reconstructions, codes = vqgan(images)
    augmentation = Augmentation.draw(images, rng)
    fake = discriminator(augmentation(reconstructions))
    discriminator_loss = discriminator_loss_fn(discriminator(augmentation(images)), fake.detach())
    reconstruction, adversarial = (reconstructions - images).abs().mean(), generator_loss_fn(fake)
    last_layer = vqgan.decoder.last_layer
    last_layer_gradients = [
        torch.autograd.grad(each, last_layer, retain_graph=True)[0] for each in (reconstruction, adversarial)
    ]
    weight = adaptive_weight(*last_layer_gradients, 1.0)
    (reconstruction + weight * adversarial + codes.loss.mean() + discriminator_loss).backward()
    gradients = [p.grad for network in (vqgan, discriminator) for p in network.parameters()]
    assert None not in gradients and all_on(device, discriminator_loss, weight, gradients)


@with_autograd
@pytest.mark.parametrize("name", ["unconditional", "conditional"])
def test_the_gradients_of_the_second_stage(device, networks, codes, rng, name):
    t = PROCESS.times(rng)
    x_t = PROCESS.corrupt(codes, t, rng)
    PROCESS.loss(networks[name](x_t), codes, x_t, t).per_example.mean().backward()
    assert all_on(device, [p.grad for p in networks[name].parameters()])
