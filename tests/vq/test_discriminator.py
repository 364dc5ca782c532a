"""The PatchGAN discriminator: its size, what a logit sees, what its norms mix."""

import pytest
import torch

from models.blocks import count_parameters
from vq.discriminator import PatchDiscriminator


def images(batch=4, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_size_is_the_published_one():
    with torch.device("meta"):
        assert count_parameters(PatchDiscriminator(3, ndf=64, layers=3, norm="batch")) == 2_765_633


@pytest.mark.parametrize("layers, side, patches, sees", [(1, 32, 14, 16), (2, 64, 14, 34), (3, 128, 14, 70)])
def test_each_logit_judges_one_patch(layers, side, patches, sees):
    discriminator = PatchDiscriminator(3, ndf=2, layers=layers, norm="batch").eval()
    x = images(1, side).requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (1, 1, patches, patches)
    logits[0, 0, patches // 2, patches // 2].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == sees


def test_widths_double_up_to_eight_times_the_first():
    with torch.device("meta"):
        discriminator = PatchDiscriminator(1, ndf=4, layers=5)
    convs = [m for m in discriminator if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [4, 8, 16, 32, 32, 32, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 2, 2, 1, 1]
    assert [c.bias is None for c in convs] == [False, True, True, True, True, True, False]  # a norm has its own


def test_group_norm_does_not_depend_on_the_other_images_and_batch_norm_does():
    for norm, alike in [("group", True), ("batch", False)]:
        discriminator = PatchDiscriminator(3, ndf=8, layers=2, norm=norm)
        together, alone = discriminator(images()), discriminator(images()[:1])
        assert torch.allclose(together[:1], alone, atol=1e-5) == alike


@pytest.mark.parametrize(
    "wrong, message", [({"norm": "layer"}, "'layer', wanted one of group, batch"), ({"layers": 0}, "got 0")]
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**wrong)
