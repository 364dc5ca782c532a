"""l2-normalised codes: assignment by cosine similarity, unit length, and tangential gradients."""

import torch
import torch.nn.functional as F

from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import l2
from vq.quantizers.l2 import L2Quantizer

K, D, BETA = 13, 4, 0.3


def quantizer_and_vectors(batch=3):
    quantizer = L2Quantizer(K, D, BETA).double()
    quantizer.codebook.weight.data *= 1 + 3 * torch.rand(K, 1)  # lengths as learning leaves them
    return quantizer, (2 * torch.randn(batch, D, 4, 3, dtype=torch.float64)).requires_grad_()


def test_the_code_has_the_largest_cosine():
    quantizer, z = quantizer_and_vectors(50)
    cosines = F.cosine_similarity(z[:, None], quantizer.codebook.weight[:, :, None, None], dim=2)  # (B, K, h, w)
    codes = quantizer(z)
    assert torch.equal(codes.ids, cosines.argmax(1)) and len(codes.ids.unique()) == K
    assert torch.equal(quantizer.assign(z), codes.ids)
    assert torch.equal(quantizer.ids_of(3 * quantizer.vectors(codes.ids)), codes.ids)
    distances = (z[:, None] - quantizer.codebook.weight[:, :, None, None]).square().sum(2)
    assert (distances.argmin(1) != codes.ids).float().mean() > 0.1  # lengths would matter


def test_lengths_do_not_matter():
    quantizer, z = quantizer_and_vectors()
    codes = quantizer(z)
    quantizer.codebook.weight.data *= 1 + torch.rand(K, 1)
    rescaled = quantizer(z * (1 + torch.rand(3, 1, 4, 3)))
    assert torch.equal(rescaled.ids, codes.ids)
    assert torch.allclose(rescaled.vectors, codes.vectors) and torch.allclose(rescaled.loss, codes.loss)


def test_vectors_are_of_unit_length():
    quantizer, z = quantizer_and_vectors()
    codes = quantizer(z)
    for vectors in (codes.vectors, quantizer.vectors(codes.ids)):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3, 4, 3).double())
    assert torch.allclose(codes.vectors, quantizer.vectors(codes.ids))
    expected = quantizer.codebook.weight[codes.ids[1, 2, 0]]
    assert torch.allclose(codes.vectors[1, :, 2, 0], expected / expected.norm())


def test_the_gradient_passes_to_the_unit_vector_and_on_to_z():
    quantizer, z = quantizer_and_vectors()
    g = torch.randn(z.shape).double()
    (grad_z,) = torch.autograd.grad((quantizer(z).vectors * g).sum(), z)
    u, length = F.normalize(z.detach(), dim=1), z.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(grad_z, (g - u * (u * g).sum(1, keepdim=True)) / length)
    assert torch.allclose((grad_z * z).sum(1), torch.zeros(3, 4, 3).double(), atol=1e-12)


def test_the_loss_uses_unit_vectors_and_beta_for_commitment():
    quantizer, z = quantizer_and_vectors()
    codes = quantizer(z)
    weight = quantizer.codebook.weight
    u, e = F.normalize(z, dim=1), F.normalize(weight, dim=1)[codes.ids].movedim(-1, 1)
    distance = (u - e).square().mean((1, 2, 3))
    assert torch.allclose(codes.loss, (1 + BETA) * distance)
    assert torch.allclose(codes.metrics["commitment"], distance.mean())
    grad_z, grad_weight = torch.autograd.grad(codes.loss.sum(), (z, weight))
    gradients = torch.autograd.grad(distance.sum(), (z, weight))
    assert torch.allclose(grad_z, BETA * gradients[0]) and torch.allclose(grad_weight, gradients[1])


def test_codes_start_anywhere_on_the_sphere():
    weight = L2Quantizer(20_000, 3).codebook.weight.detach()
    assert torch.allclose(weight.norm(dim=1), torch.ones(20_000))
    assert weight.mean(0).norm() < 0.02
    assert torch.allclose(weight.T @ weight / 20_000, torch.eye(3) / 3, atol=0.01)
    assert abs(weight[:, 0].abs().mean() - 0.5) < 0.01  # in 3 dimensions each coordinate is uniform


def test_settings_arrive():
    q = make_quantizer(VQGANConfig(quantizer="l2", codebook_size=9, emb_dim=2, quantizer_config=l2.Config(beta=0.5)))
    assert (q.codebook_size, q.dim, q.beta) == (9, 2, 0.5)
