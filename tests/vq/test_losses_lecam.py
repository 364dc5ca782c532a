"""LeCAM regularisation against its formula, and its moving averages."""

import pytest
import torch

from vq.losses import LeCAM

CPU = torch.device("cpu")


def lecam_with(real, fake, decay=0.9):
    lecam = LeCAM(CPU, decay)
    lecam.real, lecam.fake = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    return lecam


def test_the_penalty_by_hand():
    lecam = lecam_with(real=2.0, fake=-1.0)
    real = torch.tensor([[1.0, -3.0]])  # above the fake average by 2 and by nothing
    fake = torch.tensor([0.0, 5.0, 1.0])  # below the real average by 2, nothing and 1
    assert lecam(real, fake) == pytest.approx((4 + 0) / 2 + (4 + 0 + 1) / 3)


def test_its_gradient_pulls_real_logits_down_and_fake_ones_up():
    lecam = lecam_with(real=2.0, fake=-1.0)
    real = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([0.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lecam, (real, fake))
    lecam(real, fake).backward()
    assert real.grad.tolist() == [2.0, 0.0] and fake.grad.tolist() == [-2.0, 0.0]


def test_parts_of_a_batch_have_the_whole_ones_penalty():
    lecam, real, fake = lecam_with(0.5, -0.5), *torch.randn(2, 8)
    parts = [lecam(r, f) for r, f in zip(real.split(2), fake.split(2), strict=True)]
    assert torch.stack(parts).mean() == pytest.approx(lecam(real, fake).item())
    from_means = torch.stack([lecam(r.mean(), f.mean()) for r, f in zip(real.split(2), fake.split(2), strict=True)])
    assert abs(from_means.mean() - lecam(real.mean(), fake.mean())) > 1e-2  # the penalty of means would differ


def test_the_averages_begin_at_zero_and_forget_geometrically():
    lecam = LeCAM(CPU, decay=0.75)
    for real, fake in [(16.0, -32.0), (8.0, 0.0)]:
        lecam.update_averages(torch.tensor(real), torch.tensor(fake))
    assert lecam.real.item() == 0.25 * (0.75 * 16 + 8) and lecam.fake.item() == 0.25 * 0.75 * -32
    assert LeCAM(CPU).decay == 0.999


def test_the_averages_carry_no_graph():
    lecam = LeCAM(CPU)
    lecam.update_averages(*torch.ones(2, requires_grad=True))
    assert not lecam.real.requires_grad and not lecam.fake.requires_grad


def test_a_run_goes_on_from_its_averages(tmp_path):
    lecam, restored = LeCAM(CPU), LeCAM(CPU)
    lecam.update_averages(torch.tensor(3.0), torch.tensor(-2.0))
    torch.save(lecam.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for instance in (lecam, restored):
        instance.update_averages(torch.tensor(0.5), torch.tensor(0.25))
    assert (
        torch.equal(restored.real, lecam.real) and torch.equal(restored.fake, lecam.fake) and lecam.real != lecam.fake
    )


def test_what_was_saved_does_not_move_with_the_run():
    lecam = LeCAM(CPU)
    saved = lecam.state_dict()
    lecam.update_averages(torch.tensor(3.0), torch.tensor(-2.0))
    assert saved["real"] == 0 and saved["fake"] == 0


def test_a_wrong_decay_is_refused():
    with pytest.raises(ValueError, match="got decay 1.0"):
        LeCAM(CPU, 1.0)
