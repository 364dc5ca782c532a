"""Moving-average codes: formulas, several processes and micro-batches, and resets of dead codes."""

import threading

import pytest
import torch

from vq.config import VQGANConfig
from vq.quantizer import count_codes, make_quantizer, perplexity, usage
from vq.quantizers import StepContext, ema
from vq.quantizers.ema import EMAQuantizer

K, D, DECAY, BETA = 6, 3, 0.9, 0.25


def quantizer(codebook_size=K, decay=DECAY, revive_below=0.0):
    return EMAQuantizer(codebook_size, D, BETA, decay, revive_below).double()


def batch(seed, batch_size=4, side=5):
    """(B, D, side, side + 1) float64, with mean 2."""
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(batch_size, D, side, side + 1, dtype=torch.float64, generator=generator)


def flat(z):
    return z.movedim(1, -1).reshape(-1, D)


def step(q, z, number):
    ids = q(z, context := StepContext(number, seed=number)).ids
    q.update_codebook(context)
    return ids


def initialized(*args, **kwargs):
    """A quantizer after its first batch."""
    q = quantizer(*args, **kwargs)
    step(q, batch(100), 0)
    return q


def is_among(codes, vectors):
    """For each code, whether it is one of the vectors."""
    return (codes[:, None] == vectors[None]).all(2).any(1)


def test_codes_are_weighted_means_of_all_they_were_chosen_by():
    """The recursion in closed form: weights decay^age, the initial vectors and their counts included."""
    q, steps = initialized(), 7
    e0, n0 = q.codebook.clone(), batch(100)[:, 0].numel() / K
    assert torch.equal(q.chosen, torch.full((K,), n0).double())
    weight, total = DECAY**steps * n0 * torch.ones(K).double(), DECAY**steps * n0 * e0
    for t in range(steps):
        z = batch(t)
        ids = step(q, z, t + 1).flatten()
        for k in range(K):
            step_weight = (1 - DECAY) * DECAY ** (steps - 1 - t)
            weight[k] += step_weight * (ids == k).sum().double()
            total[k] += step_weight * flat(z)[ids == k].sum(0)
    assert torch.allclose(q.chosen, weight, rtol=1e-12)
    assert torch.allclose(q.codebook, total / weight[:, None], rtol=1e-12)
    assert (q.codebook - e0).abs().amin() > 1e-6


def test_without_memory_codes_are_the_means_of_the_step():
    q, z = initialized(decay=0.0), batch(1)
    ids = step(q, z, 1).flatten()
    for k in ids.unique():
        assert torch.allclose(q.codebook[k], flat(z)[ids == k].mean(0), rtol=1e-12)
    assert torch.equal(q.chosen, count_codes(ids, K).double())


def test_an_unused_code_does_not_move():
    """With smoothed counts it would creep towards zero; with N e divided by a tiny N it would wander."""
    q = EMAQuantizer(K, D, decay=0.5, revive_below=0.0)
    step(q, batch(100).float(), 0)
    q.codebook[2] = 1000.0
    for t in range(200):
        step(q, batch(t).float(), t + 1)
    assert (q.codebook[2] == 1000).all() and q.chosen[2] < 1e-30
    q.codebook[2] = q.codebook[0] + 0.01  # once chosen, it moves to the vectors that chose it
    z = batch(0).float()
    ids = step(q, z, 1).flatten()
    assert torch.allclose(q.codebook[2], flat(z)[ids == 2].mean(0))


def test_the_first_batch_puts_each_code_on_a_vector_of_its_own():
    q, z = quantizer(codebook_size=120), batch(0)  # as many as there are vectors
    before = q.codebook.clone()
    q(z)
    assert torch.equal(q.codebook, before) and not q.chosen.any()
    step(q, z, 0)
    assert is_among(q.codebook, flat(z)).all() and len(q.codebook.unique(dim=0)) == 120
    assert not torch.equal(q.codebook, flat(z)), "the order should be random"
    assert (q.chosen == 1).all() and usage(count_codes(q(z).ids, 120)) == 1


def test_with_more_codes_than_vectors_repeats_are_jittered():
    q, z = quantizer(codebook_size=50), batch(0, 1, 3)
    step(q, z, 0)
    distance, vector = (q.codebook[:, None] - flat(z)[None]).norm(dim=2).min(1)
    assert len(q.codebook.unique(dim=0)) == 50 and (distance == 0).sum() == len(flat(z)) == 12
    assert sorted(vector.bincount().tolist()) == [4] * 10 + [5] * 2
    noise = (q.codebook - flat(z)[vector])[distance > 0] / flat(z).std(0)
    assert 0.005 < noise.std() < 0.02 and (q.chosen == 12 / 50).all()


def test_the_seed_of_the_step_decides_and_nothing_else():
    def codes(seed):
        torch.manual_seed(torch.seed())
        q = quantizer(codebook_size=50)
        q(batch(0), context := StepContext(0, seed=seed))
        q.update_codebook(context)
        return q.codebook

    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))


def test_dead_codes_come_back_and_the_codebook_is_used():
    size = 32
    centres = 10 * torch.randn(size, D, dtype=torch.float64)

    def clusters(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, size, (4, 8, 8), generator=generator)
        noise = torch.randn(4, 8, 8, D, dtype=torch.float64, generator=generator)
        return (centres[ids] + 0.1 * noise).movedim(-1, 1)

    statistics = {}
    for revive_below in (0.0, 0.05):
        q = quantizer(size, decay=0.5, revive_below=revive_below)
        step(q, clusters(100), 0)
        q.codebook[2:] = 1000 + torch.randn(size - 2, D)
        for t in range(30):
            step(q, clusters(t), t + 1)
        counts = count_codes(torch.cat([q.assign(clusters(t)) for t in range(4)]), size)
        statistics[revive_below] = usage(counts), perplexity(counts)
    assert statistics[0.0][0] == 2 / size
    assert statistics[0.05][0] > 0.95 and statistics[0.05][1] > 15


def test_only_codes_below_the_threshold_are_reset():
    q, z = quantizer(revive_below=0.05), batch(1)
    step(q, batch(100), 0)
    expected_count = z[:, 0].numel() / K
    q.codebook[2:] = 1000.0 + torch.arange(4)[:, None]  # never chosen: their counts only decay
    q.chosen[2:] = torch.tensor([0.049, 0.051, 0.0, 1.0]).double() * expected_count / DECAY
    before = q.codebook.clone()
    step(q, z, 1)
    assert is_among(q.codebook, flat(z)).tolist() == [False, False, True, False, True, False]
    assert torch.equal(q.codebook[[3, 5]], before[[3, 5]])
    assert torch.allclose(q.chosen[2:] / expected_count, torch.tensor([1, 0.051, 1, 1]).double())
    assert (q.codebook[2] != q.codebook[4]).any()


def test_reset_codes_get_the_expected_count():
    q, z = quantizer(revive_below=0.05), batch(2)
    step(q, batch(100), 0)
    q.codebook[4], q.chosen[4] = 1000.0, 0.0
    step(q, batch(1), 1)
    e, expected_count = q.codebook[4].clone(), z[:, 0].numel() / K
    ids = step(q, z, 2).flatten()
    assigned = flat(z)[ids == 4]
    expected = (DECAY * expected_count * e + (1 - DECAY) * assigned.sum(0)) / (
        DECAY * expected_count + (1 - DECAY) * len(assigned)
    )
    assert len(assigned) and torch.allclose(q.codebook[4], expected, rtol=1e-12)


class ThreadProcess:
    """Simulates one of several processes by a thread; `sum` adds up the tensors of all ranks."""

    def __init__(self, rank, size, shared, barrier):
        self.rank, self.size, self.shared, self.barrier = rank, size, shared, barrier

    def sum(self, x):
        self.shared[self.rank] = x
        self.barrier.wait()
        total = torch.stack(self.shared).sum(0)
        self.barrier.wait()
        return total


def train_distributed(size, steps, **options):
    """Quantizer states of `size` processes after some steps, each on its part of every batch."""
    shared, barrier, states = [None] * size, threading.Barrier(size, timeout=20), [None] * size
    replicas = []
    for _ in range(size):
        torch.manual_seed(0)
        replicas.append(quantizer(**options))

    def work(rank):
        for t in range(steps):
            context = StepContext(t, seed=t, dist=ThreadProcess(rank, size, shared, barrier))
            replicas[rank](batch(t).chunk(size)[rank], context)
            replicas[rank].update_codebook(context)
        states[rank] = replicas[rank].state_dict()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return states


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("codebook_size", [40, 130])  # fewer codes than vectors, and more
def test_several_processes_learn_what_one_learns(size, codebook_size):
    options = {"codebook_size": codebook_size, "decay": 0.3, "revive_below": 0.5}
    (single,), distributed = train_distributed(1, 4, **options), train_distributed(size, 4, **options)
    for name, tensor in single.items():
        assert all(torch.equal(state[name], distributed[0][name]) for state in distributed)
        assert torch.allclose(distributed[0][name], tensor, rtol=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(parts):
    full, split = quantizer(revive_below=0.5), quantizer(revive_below=0.5)
    split.load_state_dict(full.state_dict())
    for t in range(4):
        step(full, batch(t), t)
        for z in batch(t).chunk(parts):
            split(z, StepContext(t, seed=t))
        split.update_codebook(StepContext(t, seed=t))
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor, split.state_dict()[name])


def test_a_skipped_step_is_discarded():
    q = initialized(revive_below=0.05)
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    q(torch.full_like(batch(0), torch.nan), StepContext(1))
    q.update_codebook(None)
    q.update_codebook(StepContext(1))  # without training batches
    assert all(torch.equal(tensor, before[name]) for name, tensor in q.state_dict().items())
    step(q, batch(1), 2)
    assert all(tensor.isfinite().all() for tensor in q.state_dict().values())


def test_validation_is_not_learned_from():
    q = initialized()
    before = q.codebook.clone()
    q(batch(1))
    q.update_codebook(StepContext(1))
    assert torch.equal(q.codebook, before)


def test_buffers_keep_their_place():
    """Averages and optimizers hold on to tensors, not to names."""
    q = initialized()
    addresses = [buffer.data_ptr() for buffer in q.buffers()]
    step(q, batch(1), 1)
    assert [buffer.data_ptr() for buffer in q.buffers()] == addresses


def test_only_the_encoder_gets_a_gradient():
    q, z = initialized(), batch(1).requires_grad_()
    codes = q(z, StepContext(1))
    e = q.vectors(codes.ids)
    assert not list(q.parameters()) and not q.assignments[0][0].requires_grad
    assert torch.allclose(codes.loss, BETA * (z - e).square().mean((1, 2, 3)))
    assert torch.allclose(codes.metrics["commitment"], codes.loss.mean() / BETA)
    (loss_gradient,) = torch.autograd.grad(codes.loss.sum(), z)
    assert torch.allclose(loss_gradient, BETA * 2 * (z - e).detach() / z[0].numel())
    output_gradient = torch.randn(z.shape).double()
    codes.vectors.backward(output_gradient)
    assert torch.equal(z.grad, output_gradient)


def test_settings_arrive():
    options = ema.Config(beta=0.5, codebook_decay=0.7, revive_below=0.2)
    q = make_quantizer(VQGANConfig(quantizer="ema", codebook_size=9, emb_dim=2, quantizer_config=options))
    assert (q.codebook_size, q.dim, q.beta, q.decay, q.revive_below) == (9, 2, 0.5, 0.7, 0.2)
