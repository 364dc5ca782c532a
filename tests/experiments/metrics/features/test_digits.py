import pytest
import torch

from experiments.metrics.features import digits as digit_features
from train.datasets import digits

pytestmark = pytest.mark.slow  # these train the classifier


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def classifier(cache):
    """Trained once, in the inference mode and autocast that a caller may have entered."""
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        network = digit_features.load_classifier("cpu", cache)
    assert torch.equal(torch.get_rng_state(), before)
    return network


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_classifier_generalises_to_held_out_digits(classifier):
    assert digit_features.accuracy(classifier, "val") >= 0.97
    assert digit_features.accuracy(classifier, "train") >= 0.99


def test_the_second_load_reads_the_cache(classifier, cache, images, monkeypatch):
    def train_again(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(digit_features, "train_classifier", train_again)
    assert len(list(cache.iterdir())) == 1
    reloaded = digit_features.load_classifier("cpu", cache)
    assert torch.equal(reloaded(images), classifier(images))
    monkeypatch.setattr(digit_features, "VERSION", 0)
    with pytest.raises(AssertionError, match="trained again"):
        digit_features.load_classifier("cpu", cache)


def test_other_training_digits_give_another_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_features, "RECIPE", digit_features.RECIPE._replace(epochs=1))
    digit_features.load_classifier("cpu", tmp_path)
    real_build, other_split = digits.build, digits.Config(split_seed=1)
    monkeypatch.setattr(digits, "build", lambda config, split: real_build(other_split, split))
    digit_features.load_classifier("cpu", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_is_reported_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_features, "RECIPE", digit_features.RECIPE._replace(epochs=1))
    digit_features.load_classifier("cpu", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it"):
        digit_features.load_classifier("cpu", tmp_path)


def test_features_are_those_under_the_logits(classifier, cache, images):
    features = digit_features.build("cpu", cache)(images)
    assert features.shape == (6, 84) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(classifier.head(features), classifier(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(digit_features.build("cpu", cache)(images), features)


def test_grey_images_and_other_sizes(classifier):
    item = digit_features.to_item(digits.build(digits.Config(), "val")[0], (32, 32), 1)
    grey = item["image"].as_subclass(torch.Tensor)[None]
    torch.testing.assert_close(classifier(grey), classifier(grey.expand(1, 3, 32, 32)))
    coloured = torch.cat([torch.zeros_like(grey), grey // 2 * 2, grey // 2], 1)
    torch.testing.assert_close(classifier(coloured), classifier(grey // 2))
    doubled = grey.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert classifier(doubled).argmax() == classifier(grey).argmax()


def test_training_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr(digit_features, "RECIPE", digit_features.RECIPE._replace(epochs=1))
    images = torch.randint(0, 256, (70, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(70) % 10
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)  # another state of the global generator each time
        with torch.no_grad():  # which a caller may have entered
            weights.append(digit_features.train_classifier(images, labels, seed).head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_augmented_digits_stay_close_to_the_original():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(500, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 14:18, 14:18] = 255
    augmented = digit_features.augment(images, generator)
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    assert 0 <= augmented.min() and augmented.max() <= 255.001
    mass = augmented.sum((1, 2, 3)) / images[0].sum()
    assert 0.75 < mass.min() and mass.max() < 1.3  # scales of 0.9 to 1.1, squared
    columns = (augmented.sum((1, 2)) * torch.arange(32)).sum(1) / augmented.sum((1, 2, 3)) - 15.5
    assert 1.8 < columns.abs().max() < 2.6  # shifts of two pixels, and the effect of rotation and scaling
