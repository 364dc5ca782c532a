"""DiffusionSat's embedders of numbers in a UNet of Stable Diffusion: public outputs, and the way back to a folder."""

import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.harness.images import read_samples
from helpers.sd_fixtures import TokenStub
from helpers.tiny_runs import call
from helpers.tiny_sd import CONFIGS, UNET, tiny_parts
from models.conditions import numbers
from models.conditions.numbers import PRESETS
from models.unet import UNet, UNetConfig
from train.converters.sd.files import Source, read_source, write_folder
from train.converters.sd.metadata import warn_of_nulls
from train.converters.sd.names import to_layout
from train.converters.sd.runs import load_unet, sampler_flags
from train.converters.sd.unet import infer_unet, unet_weights

ROOT = Path(__file__).parents[2] / "fixtures"
CONFIG = CONFIGS["unet"] | {"_class_name": "SatUNet", "use_metadata": True, "num_metadata": 7}


@pytest.fixture(scope="module")
def weights():
    """The tensors of the tiny UNet, with the public embedders of the time and the numbers."""
    return tiny_parts("folder")["unet"] | load_file(ROOT / "diffusionsat/weights.safetensors")


@pytest.fixture
def arrays():
    return {name: torch.from_numpy(each) for name, each in np.load(ROOT / "diffusionsat/numbers.npz").items()}


def build(settings=UNET, device="cpu", fields=()):
    """Builds a UNet with the numbers, and a stand-in for the text encoder."""
    config = UNetConfig(**{name: settings[name] for name in UNetConfig.__dataclass_fields__.keys() & settings.keys()})
    with torch.device(device):
        sat = numbers.build(numbers.Config(numbers_preset="diffusionsat", numbers_fields=fields), config.emb_dim, 0)
        return UNet(config, {"text": TokenStub(settings["text_width"]), "numbers": sat}).eval()


def load(weights, **options):
    """Returns the UNet of the folder with these weights."""
    network = build(**options)
    load_unet(Source(Path("tiny"), "folder", {"unet": weights}, {"unet": CONFIG}), network)
    return network


@pytest.fixture
def network(weights):
    return load(weights)


def vectors(network, values):
    """Returns what numbers (B, 7) add to the embedding of the time, which all blocks read."""
    columns = None if values is None else dict(zip(PRESETS["diffusionsat"], values.unbind(1), strict=True))
    t = torch.tensor([7.0, 981.0, 500.0, 0.0])
    fields = {"text": torch.zeros(4, 1, 64)} | ({} if columns is None else {"numbers": columns})
    with torch.no_grad():
        return network.embed(torch.zeros(4, 4, 4, 4), t, fields)[0] - network.time(t)


def test_embeddings_are_those_of_the_public_unet(network, arrays, agrees):
    dropped = arrays["values"].masked_fill(arrays["drop"], torch.nan)
    for values, expected in ((arrays["values"], "total"), (dropped, "dropped_as_zero_total")):
        got = arrays["time_embedding"] + vectors(network, values)
        assert agrees(got, arrays[expected], f"numbers of DiffusionSat: {expected}")


def test_embedders_belong_to_fields_whatever_their_order(weights, network, arrays):
    other = load(weights, fields=(*PRESETS["diffusionsat"],)[::-1])
    torch.testing.assert_close(vectors(other, arrays["values"]), vectors(network, arrays["values"]))


def test_without_numbers_all_of_them_are_missing(network):
    """As in the unguided half of the public sampling, where all are 0 before the sinusoid."""
    missing = torch.full((4, 7), torch.nan)
    assert torch.equal(vectors(network, None), vectors(network, missing))
    null = network.encoders["numbers"].nulls.detach()
    assert (vectors(network, None) - null.sum(0)).abs().max() < 1e-5
    assert null.norm(dim=1).min() > 0.1


def test_embedders_are_written_back_to_the_bit(network, weights):
    back = to_layout(unet_weights(network, True), network.state_dict(), "folder", torch.float16)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in weights.items())


def test_each_tensor_of_a_real_unet_with_numbers_has_a_place():
    with gzip.open(ROOT / "sd/sd21.json.gz") as file:
        shapes = json.load(file)["unet"]
    for number in range(7):
        linear = {"linear_1.weight": (1280, 320), "linear_2.weight": (1280, 1280)}
        linear |= {"linear_1.bias": (1280,), "linear_2.bias": (1280,)}
        shapes |= {f"metadata_embedding.{number}.{name}": shape for name, shape in linear.items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = build(infer_unet(tensors, "folder") | {"in_channels": 4, "out_channels": 4}, "meta")
    back = to_layout(unet_weights(network, False), network.state_dict(), "folder")
    assert {name: tuple(value.shape) for name, value in back.items()} == {n: tuple(s) for n, s in shapes.items()}


def test_others_than_seven_embedders_are_refused(weights):
    six = {name: value for name, value in weights.items() if not name.startswith("metadata_embedding.6.")}
    for tensors, config, message in (
        (six, CONFIG, "got a UNet with 6 embedders of metadata, and a config with 7"),
        (six, CONFIG | {"num_metadata": 6}, "got a UNet with 6 embedders of metadata, wanted the 7 of DiffusionSat"),
        (weights, CONFIG | {"use_metadata": False}, "with 7 embedders of metadata, and a config with 0"),
        (tiny_parts("folder")["unet"], CONFIG, "with 0 embedders of metadata, and a config with 7"),
    ):
        with pytest.raises(ValueError, match=message):
            infer_unet(tensors, "folder", config)


def test_nulls_that_were_learned_are_named_when_written(network):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_nulls(network)
    network.encoders["numbers"].nulls.data[3] += 0.01
    with pytest.warns(UserWarning, match="the nulls of the numbers were learned and are in no file"):
        warn_of_nulls(network)


def test_a_folder_with_numbers_becomes_a_run_and_is_written_back(weights, tmp_path):
    configs, folder, logs = CONFIGS | {"unet": CONFIG}, tmp_path / "sat", tmp_path / "logs"
    write_folder(folder, tiny_parts("folder") | {"unet": weights}, configs)
    flags = sampler_flags(read_source(folder), {})
    assert flags["conditions"] == ("text", "numbers") and flags["numbers_preset"] == "diffusionsat"
    call("convert.py", f"--from sd --weights {folder} --logs_root {logs} --log_dir sat --no_amp")
    sampling = f"--load_dir sat --logs_root {logs} --n_samples 2 --sample_steps 2 --no_amp --prompt sea"
    for name, metadata in (("unknown", ""), ("known", "--metadata lon=12.5 lat=42 year=2018")):
        call("experiments/get_samples.py", f"{sampling} {metadata} --log_dir {name}")
    unknown, known = (read_samples(logs / name / "samples.npz")["image"] for name in ("unknown", "known"))
    assert len(unknown) == len(known) == 2 and not torch.equal(unknown, known)
    call("convert.py", f"--to diffusers --load_dir sat --logs_root {logs} --output {tmp_path / 'back'}")
    back = read_source(tmp_path / "back")
    assert back.configs == read_source(folder).configs
    assert back.parts["unet"].keys() == weights.keys()
    assert all(torch.equal(back.parts["unet"][name], value) for name, value in weights.items())
