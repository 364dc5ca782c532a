"""The measures of reconstructions, against their formulas written out."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from experiments.calc_VQGAN_FID import plot, report
from experiments.metrics import image_pairs, reconstruction
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.image_pairs import l1, psnr, ssim
from experiments.metrics.reconstruction import choose_lpips, measure_reconstructions, summarize_reconstructions
from train.data.transforms import grey_to_rgb

K, PIXELS = 8, 16 * 16


def images(B=3, C=3, size=16, seed=0):
    return torch.randint(0, 256, (B, C, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("C", [1, 3])
def test_psnr_and_l1_per_image(C):
    real, fake = images(C=C), images(C=C, seed=1)
    for i in range(3):
        difference = real[i].double() - fake[i].double()
        assert psnr(real, fake)[i].item() == pytest.approx(
            10 * math.log10(255**2 / difference.square().mean()), abs=1e-4
        )
        assert l1(real, fake)[i].item() == pytest.approx(difference.abs().mean().item() / 127.5, rel=1e-5)
    assert psnr(real, real).isinf().all() and torch.equal(l1(real, real), torch.zeros(3))
    assert l1(torch.zeros_like(real), torch.full_like(real, 255)).tolist() == [2, 2, 2]
    one_level = real.clone()
    one_level[0, 0, 0, 0] ^= 1
    values = psnr(real, one_level)  # the smallest possible error
    assert values[0].item() == pytest.approx(10 * math.log10(255**2 * C * 256), abs=1e-4) and values[1:].isinf().all()


def ssim_by_hand(a, b):
    """Wang et al. 2004, eq. 13, of one channel (H, W) in float64, image borders reflected."""
    side = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(side**2) / (2 * 1.5**2))
    window = window[:, None] * window / (window[:, None] * window).sum()

    def local(x):
        padded = torch.nn.functional.pad(x[None, None], (5, 5, 5, 5), mode="reflect")
        patches = padded.unfold(2, 11, 1).unfold(3, 11, 1)[0, 0]  # (H, W, 11, 11)
        return (patches * window).sum((-2, -1))

    mean_a, mean_b = local(a), local(b)
    var_a, var_b, covariance = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


@pytest.mark.parametrize(("C", "size"), [(1, 11), (3, 16)])
def test_ssim_matches_its_formula_in_chunks(C, size, monkeypatch):
    real, noise = images(C=C, size=size), images(C=C, size=size, seed=1)
    fake = real // 2 + noise // 4
    real[2], fake[2] = 255, 250  # flat and bright
    expected = [
        sum(ssim_by_hand(x, y) for x, y in zip(a.double(), b.double(), strict=True)).item() / C
        for a, b in zip(real, fake, strict=True)
    ]
    assert ssim(real, fake).tolist() == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(image_pairs, "SSIM_CHUNK", 1)
    assert ssim(real, fake).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(real, real).tolist() == pytest.approx([1, 1, 1], abs=1e-9)  # float32 is off by 8e-4 on white images


def test_psnr_and_ssim_match_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    real, fake = images(size=24).double(), images(size=24, seed=1).double()
    fake = (real / 2 + fake / 4).round()
    pair, kwargs = (real.to(torch.uint8), fake.to(torch.uint8)), {"data_range": 255.0, "reduction": "none"}
    expected = structural_similarity_index_measure(fake, real, **kwargs)
    assert ssim(*pair).tolist() == pytest.approx(expected.tolist(), abs=1e-7) and 0.2 < expected.min() < 0.9
    expected = peak_signal_noise_ratio(fake, real, dim=(1, 2, 3), **kwargs)
    assert psnr(*pair).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match=r"10x10 for SSIM, wanted at least 11x11"):
        ssim(images(size=10), images(size=10))


class First:
    """A VQGAN that returns its images, darker by `less`; its codes are their first pixel values."""

    device = torch.device("cpu")

    def __init__(self, less=0):
        self.less, self.images = less, None

    def encode(self, images):
        self.images = images
        return images[:, 0, :2, :2].long() % K  # (B, 2, 2)

    def decode(self, ids):
        return (self.images.int() - self.less).clamp(min=0).to(torch.uint8)


def extract(images):
    assert images.shape[1] == 3 and images.dtype == torch.uint8
    return images.float().mean((2, 3)) + images[:, :, 0, 0]


FEATURES = SimpleNamespace(extract=lambda images: extract(grey_to_rgb(images)))  # as load_features makes them


def summarize(first, real, batch_size=2, perceptual=None):
    batches = ({"image": part} for part in real.split(batch_size))
    reference = Statistics().update(extract(real.expand(-1, 3, -1, -1)))
    return summarize_reconstructions(
        measure_reconstructions(first, batches, FEATURES, perceptual), reference, K, PIXELS
    )


def test_exact_reconstructions_have_zero_distance_and_no_psnr():
    results, _ = summarize(First(), images(5))
    assert results["rfd"] == pytest.approx(0, abs=1e-6) and results["ssim"] == pytest.approx(1) and results["l1"] == 0
    assert results["psnr"] is None and results["exact_images"] == 5 and results["lpips"] is None
    assert results["n_images"] == 5
    json.dumps(results, allow_nan=False)


def test_exact_images_are_excluded_from_the_mean_psnr():
    real = images(5, C=1).clamp(min=10)
    real[1] = 0  # cannot become darker
    results, _ = summarize(First(less=3), real)
    assert results["exact_images"] == 1 and results["psnr"] == pytest.approx(10 * math.log10(255**2 / 9), abs=1e-4)
    assert results["l1"] == pytest.approx(4 / 5 * 3 / 127.5, rel=1e-5)  # of all five


def test_means_are_over_images_not_over_batches():
    real = images(5)
    real[4] = 128
    by_batch_size = [summarize(First(less=40), real, batch_size)[0] for batch_size in (1, 2, 5)]
    for name in ("rfd", "psnr", "ssim", "l1", "perplexity"):
        assert (
            by_batch_size[0][name]
            == pytest.approx(by_batch_size[1][name], rel=1e-5)
            == pytest.approx(by_batch_size[2][name], rel=1e-5)
        )
    fake = (real.int() - 40).clamp(min=0).to(torch.uint8)
    assert by_batch_size[1]["psnr"] == pytest.approx(psnr(real, fake).mean().item())
    assert by_batch_size[1]["ssim"] == pytest.approx(ssim(real, fake).mean().item())
    expected = frechet_distance(*(Statistics().update(extract(x)) for x in (fake, real)))
    assert by_batch_size[1]["rfd"] == pytest.approx(expected) and expected > 100


def test_the_codes_are_counted_over_all_images():
    real = images(5) % 6  # codes 6 and 7 are unused
    results, code_counts = summarize(First(less=1), real)
    ids = (real[:, 0, :2, :2].long() % K).flatten().tolist()
    shares = [ids.count(k) / len(ids) for k in range(K)]
    assert code_counts.tolist() == [ids.count(k) for k in range(K)]
    assert results["codebook_usage"] == sum(share > 0 for share in shares) / K
    entropy = -sum(share * math.log2(share) for share in shares if share)
    assert results["perplexity"] == pytest.approx(2**entropy)
    assert results["bits_per_pixel"] == 4 * 3 / PIXELS  # four codes of three bits
    assert results["entropy_coded_bits_per_pixel"] == pytest.approx(4 * entropy / PIXELS)


def test_small_images_have_all_metrics_but_ssim():
    results, _ = summarize(First(less=9), images(5, size=8))
    assert results["ssim"] is None and results["psnr"] > 25 and results["l1"] > 0


class Darkness(torch.nn.Module):
    def forward(self, images, others):
        assert images.dtype == others.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
        return images.mean((1, 2, 3)) - others.mean((1, 2, 3))


def test_lpips_gets_images_in_its_range():
    results, _ = summarize(First(less=3), images(5).clamp(min=10), perceptual=Darkness())
    assert results["lpips"] == pytest.approx(3 / 127.5, rel=1e-3)


def run_trained_with(tmp_path, **loss):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"loss": loss}))
    return tmp_path


@pytest.fixture
def load_calls(monkeypatch):
    """The arguments of every call of `load_perceptual`; weights named `broken` cannot be loaded."""
    calls = []

    def load(net, weights=None):
        calls.append((net, weights))
        if weights == "broken":
            raise FileNotFoundError("broken not found")
        return net, None if net == "none" else Darkness()

    monkeypatch.setattr(reconstruction, "load_perceptual", load)
    return calls


def test_auto_lpips_uses_the_network_and_weights_of_the_run(tmp_path, load_calls):
    run = run_trained_with(tmp_path, perceptual_net="squeeze", perceptual_weight=1.0, perceptual_weights="theirs")
    assert choose_lpips("auto", None, run)[0] == "squeeze"
    assert choose_lpips("auto", "mine", run)[0] == "squeeze"
    assert choose_lpips("alex", "mine", run)[0] == "alex"
    assert choose_lpips("none", None, run) == ("none", None)
    assert load_calls == [("squeeze", "theirs"), ("squeeze", "mine"), ("alex", "mine"), ("none", None)]


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"perceptual_net": "none"},
        {"perceptual_net": "resnet50"},  # no LPIPS
        {"perceptual_net": "vgg", "perceptual_weight": 0.0},
        {"perceptual_net": "vgg", "perceptual_weights": "broken"},
    ],
)
def test_auto_lpips_reports_why_it_is_skipped(loss, tmp_path, load_calls, capsys):
    run = run_trained_with(tmp_path, **loss)
    assert choose_lpips("auto", None, run) == ("none", None)
    assert "LPIPS skipped" in capsys.readouterr().out


def test_explicit_lpips_weights_are_required(tmp_path, load_calls):
    with pytest.raises(FileNotFoundError, match="broken"):
        choose_lpips("auto", "broken", run_trained_with(tmp_path, perceptual_net="vgg"))
    with pytest.raises(ValueError, match="--lpips_net"):
        choose_lpips("auto", "mine", run_trained_with(tmp_path, perceptual_net="none"))


@pytest.mark.parametrize("counts", [[5.0, 0, 3, 2, 0, 0, 1, 1], [1.0] * 8, [9.0] + [0] * 7])
def test_code_usage_is_plotted_for_even_and_collapsed_codes(counts, tmp_path):
    results = {"codebook_usage": 0.5, "perplexity": 3.0, "n_images": 4, "split": "val"}
    plot(tmp_path / "codes.png", torch.tensor(counts, dtype=torch.float64), results)
    assert (tmp_path / "codes.png").stat().st_size > 5000


def test_the_table_marks_missing_metrics():
    results, _ = summarize(First(), images(5, size=8))
    rest = {"metric": "FID", "codebook_size": K, "lpips_net": "none", "split": "val", "n_reference": 5}
    rest |= {"features": "inception", "run": {"model": {"dataset": "digits"}}}
    lines = {line.split("  ")[0]: line for line in report(results | rest, Path("/somewhere")).splitlines()}
    assert "rFID" in lines and "without 5 exact reconstructions" in lines["PSNR"]
    assert all(lines[name].split()[1] == "-" for name in ("PSNR", "SSIM", "LPIPS"))
