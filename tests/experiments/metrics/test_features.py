import importlib
import inspect
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from experiments.metrics import features
from experiments.metrics.features import inception, pixels

NAMES = sorted(path.stem for path in Path(features.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_names_its_metric_and_builds(name):
    module = importlib.import_module(f"experiments.metrics.features.{name}")
    assert (module.METRIC == "FID") == (name == "inception")  # other networks have other names
    first, *others = inspect.signature(module.build).parameters.values()
    assert first.name == "device"
    assert all(other.default is not inspect.Parameter.empty for other in others)


def test_pixels_have_their_shape_and_range():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 48, 32), generator=generator, dtype=torch.uint8)
    result = pixels.build("cpu")(images)
    assert result.shape == (4, 768) and result.dtype == torch.float32
    assert 0 <= result.min() and result.max() <= 1
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    torch.testing.assert_close(pixels.build("cpu")(white), torch.ones(1, 768))


def test_pixels_are_antialiased():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::4] = 255  # every fourth row: subsampling by 4 would take all of them or none
    torch.testing.assert_close(pixels.build("cpu")(stripes), torch.full((1, 768), 0.25), atol=0.1, rtol=0)


class Poison:
    """Creates a file when it is unpickled."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_code_in_weights_files_is_not_run(tmp_path):
    weights, victim = tmp_path / "weights.pth", tmp_path / "victim"
    torch.save({"fc.bias": Poison(victim)}, weights)
    with pytest.raises(ValueError, match="weights.pth.*nothing in it was run"):
        inception.build("cpu", weights)
    weights.write_bytes(pickle.dumps(Poison(victim), protocol=2))
    with pytest.raises(ValueError, match="weights.pth.*nothing in it was run"):
        inception.build("cpu", weights)
    assert not victim.exists()
    pickle.loads(weights.read_bytes())
    assert victim.exists()  # the poison was real


def test_invalid_weights_are_reported_by_path(tmp_path):
    weights = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="weights.pth"):
        inception.build("cpu", weights)
    for content in (b"", b"text"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="weights.pth"):
            inception.build("cpu", weights)
    torch.save([torch.zeros(1)], weights)
    with pytest.raises(ValueError, match="weights.pth.*named tensors"):
        inception.build("cpu", weights)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A weights file in torch-fidelity's format with random weights, for loading only: its scores mean nothing."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(extractor, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = extractor.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_reads_a_weights_file(random_inception):
    extract = inception.build("cpu", random_inception)
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = extract(images)
    assert result.shape == (2, 2048) and result.dtype == torch.float32 and not result.requires_grad
    assert torch.equal(extract(images), result)  # random weights shrink the features: no tolerance is small enough


def test_inception_loads_strictly(random_inception, tmp_path):
    state = torch.load(random_inception, weights_only=True)
    del state["fc.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="cut.pth(.|\n)*fc.bias"):
        inception.build("cpu", tmp_path / "cut.pth")


def test_a_failed_download_is_reported(monkeypatch):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def unreachable(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(extractor, "load_state_dict_from_url", unreachable)
    with pytest.raises(FileNotFoundError, match="no route.*path"):
        inception.build("cpu")
