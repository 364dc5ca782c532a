"""The classifier of real images: it learns classes, deterministically, and its augmentation keeps what it should."""

import torch

from experiments.metrics import image_classifier
from experiments.metrics.image_classifier import (
    UNKNOWN,
    classify_fields,
    move_and_scale,
    train_field_classifier,
    train_image_classifier,
)


def stripes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images (n, 3, 16, 16) of horizontal and vertical stripes, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    wave = (torch.arange(16) // 4 % 2 * 120).expand(n, 3, 16, 16)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, wave, wave.mT)
    return (images + torch.randint(0, 100, images.shape, generator=generator)).byte(), labels


def test_it_learns_classes_and_is_deterministic(monkeypatch):
    monkeypatch.setattr(image_classifier, "RECIPE", image_classifier.RECIPE._replace(epochs=4, batch_size=16))
    seen, state = [], torch.random.get_rng_state()
    runs = [train_image_classifier(*stripes(64, 0), 2, True, 0, torch.device("cpu"), seen.append) for _ in range(2)]
    assert sum(seen) == 2 * 4 * 64 and torch.equal(torch.random.get_rng_state(), state)
    images, labels = stripes(40, 1)
    logits = [run(images) for run in runs]
    assert torch.equal(*logits) and not logits[0].requires_grad
    assert (logits[0].argmax(1) == labels).double().mean() >= 0.9
    assert runs[0].features(images).shape == (40, 512)


def test_it_learns_several_fields_of_which_some_are_unknown(monkeypatch):
    recipe = image_classifier.FIELDS_RECIPE._replace(steps=30, batch_size=32)
    monkeypatch.setattr(image_classifier, "FIELDS_RECIPE", recipe)

    def draw(n: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, stripe = stripes(n, seed)
        light = torch.arange(n) // 2 % 3
        return (images * (0.2 + 0.4 * light.view(-1, 1, 1, 1))).byte(), {"light": light, "stripe": stripe}

    images, labels = draw(96, 0)
    labels["stripe"][: 96 // 2] = UNKNOWN
    state, sizes = torch.random.get_rng_state(), {"light": 3, "stripe": 2}
    classifier = train_field_classifier(images, labels, sizes, 0, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    images, labels = draw(60, 1)
    found = classify_fields(classifier, images, sizes)
    assert found.keys() == sizes.keys()
    assert all((found[name] == labels[name]).double().mean() >= 0.9 for name in sizes)


def test_augmentation_mirrors_half_of_the_images():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(200, 1, 64, 64)
    slope = lambda images: (images[..., 40] - images[..., 20]).mean((1, 2))  # noqa: E731
    assert (slope(move_and_scale(ramp, torch.Generator().manual_seed(0), False)) > 0).all()
    share = (slope(move_and_scale(ramp, torch.Generator().manual_seed(0), True)) > 0).double().mean()
    assert 0.4 < share < 0.6
