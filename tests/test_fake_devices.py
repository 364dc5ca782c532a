"""Everything runs on fake CUDA tensors: one left on the wrong device fails here, without a GPU.

Fake tensors have a shape, a type and a device, and no numbers. Without a GPU autograd does not run on fake CUDA tensors,
so what needs a gradient runs on "meta", which is just as far from the CPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.solvers import solvers_of
from models.transformer import Transformer
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.discriminator import PatchDiscriminator

CODES, GRID, BATCH = 16, (4, 4), 2
PROCESS = AbsorbingDiffusion(CODES, steps=3)
SOLVERS = solvers_of(PROCESS)


@pytest.fixture(params=["cuda:0"])
def device(request):
    """Networks are built on the CPU, as users build them, and then moved to this device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device(request.param)


with_autograd = pytest.mark.parametrize("device", ["cuda:0" if torch.cuda.is_available() else "meta"], indirect=True)


def all_on(device, *results):
    tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    return len(tensors) > 0 and all(tensor.device == device for tensor in tensors)


@pytest.fixture(scope="module")
def networks():
    config = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=8, codebook_size=CODES)
    shape = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 1}
    return {
        "vqgan": VQGAN(config, img_size=8),
        "group": PatchDiscriminator(3, ndf=8, layers=1, norm="group"),
        "batch": PatchDiscriminator(3, ndf=8, layers=1, norm="batch"),
        "unconditional": Transformer(**shape),
        "conditional": Transformer(**shape, n_classes=3),
    }
