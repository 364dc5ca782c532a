"""CLIP features against transformers' own model and image processor, from folders with tiny random weights."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.metrics.distances import features_version
from experiments.metrics.features import choose_features, clip, load_features
from train.config import DataConfig

tiny_clip = pytest.importorskip("helpers.tiny_clip")
CPU = torch.device("cpu")
CAPTIONS = ["the cat", "a dog", "x", "the dog and the cat on the mat"]


@pytest.fixture(scope="module")
def model():
    return tiny_clip.make_clip()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"), model)


def images_of(height, width, count=3):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").to(torch.uint8)


@torch.no_grad()
def embeddings(model, folder, images):
    """The features by transformers alone, from PIL images."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


@pytest.mark.parametrize("size", [(20, 20), (31, 20), (64, 100), (8, 12), (3, 40)])
def test_image_features_equal_those_of_transformers(model, folder, size):
    images = images_of(*size)
    features = clip.build("cpu", folder)(images)
    expected = embeddings(model, folder, images)
    assert features.shape == (3, 8) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)
    assert expected.norm(dim=1).sub(1).abs().min() > 0.1  # they keep their lengths: FD and KID are of these
    assert torch.cdist(expected, expected).max() > 0.01  # else any image would have these features


def test_images_are_prepared_as_published(folder):
    """Shorter side to the network's by an antialiased bicubic filter, centre crop, CLIP's mean and deviation."""
    processor = clip.load_processor(folder, 0)
    (image,) = images_of(64, 100, 1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((31, 20), Image.BICUBIC)
    expected = np.asarray(picture.crop((5, 0, 25, 20))) / 255
    expected = (expected - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels = processor([image], input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() < 1.01 / 255 / 0.26  # to a level of 8 bits


def test_a_folder_without_preprocessor_has_clips_own(model, folder, tmp_path):
    model.save_pretrained(tmp_path)
    images = images_of(40, 30)
    torch.testing.assert_close(clip.build("cpu", tmp_path)(images), clip.build("cpu", folder)(images))


def test_a_folder_of_the_vision_part_is_enough(model, folder, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = model.config.vision_config.to_dict() | {"projection_dim": 8}
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    state = model.state_dict()
    vision.load_state_dict({name: state[name] for name in vision.state_dict()})
    vision.half().save_pretrained(tmp_path)
    tiny_clip.save_processor(tmp_path)
    images = images_of(20, 20)
    features = clip.build("cpu", tmp_path)(images)
    assert features.dtype == torch.float32  # of weights in float16 too
    torch.testing.assert_close(features, embeddings(model, folder, images), atol=5e-3, rtol=0)


def test_features_do_not_depend_on_autocast_or_the_batch(folder):
    extract, images = clip.build("cpu", folder), images_of(20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(images), extract(images).float())
        torch.testing.assert_close(extract(images), torch.cat([extract(image[None]) for image in images]))


def test_loading_draws_no_global_random_numbers(folder):
    state = torch.get_rng_state()
    clip.build("cpu", folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_caption_features_equal_those_of_transformers(model, folder):
    features, cut = clip.build_captions("cpu", folder)(CAPTIONS)
    tokens = clip.load_tokenizer(folder)(CAPTIONS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(features[:3], expected, atol=1e-6, rtol=1e-6)
    assert cut.tolist() == [False, False, False, True]
    alone, _ = clip.build_captions("cpu", folder)(CAPTIONS[1:2])
    torch.testing.assert_close(features[1:2], alone)  # padding does not count


def test_a_long_caption_keeps_its_end_token(folder, model):
    ids = clip.load_tokenizer(folder)([CAPTIONS[3]], truncation=True, max_length=tiny_clip.LENGTH)["input_ids"][0]
    assert len(ids) == tiny_clip.LENGTH and ids[-1] == len(tiny_clip.VOCABULARY) - 1
    features, _ = clip.build_captions("cpu", folder)([CAPTIONS[3]])
    with torch.no_grad():
        expected = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)


def test_grey_images_have_the_features_of_three_equal_channels(folder):
    features = load_features("clip", CPU, clip_dir=str(folder))
    grey = images_of(20, 20)[:, :1]
    assert torch.equal(features.extract(grey), features.extract(grey.expand(-1, 3, -1, -1)))


def test_a_given_folder_chooses_clip(folder):
    data = DataConfig(dataset="digits")
    assert choose_features("auto", data, CPU, clip_dir=str(folder)).name == "clip"
    with pytest.raises(ValueError, match="--clip_dir goes with --features clip, got --features pixels"):
        choose_features("pixels", data, CPU, clip_dir=str(folder))
    with pytest.raises(ValueError, match="--inception_weights goes with --features inception, got --features clip"):
        choose_features("clip", data, CPU, "weights.pth", str(folder))


def test_other_weights_are_another_version(folder, tmp_path):
    other = tiny_clip.save_clip(tmp_path, tiny_clip.make_clip(seed=1))
    versions = [features_version(load_features("clip", CPU, clip_dir=str(each)), None) for each in (folder, other)]
    assert versions[0] != versions[1]
    assert features_version(SimpleNamespace(module=clip, clip_hash=None), None) == [clip.VERSION, None]


def test_folders_without_a_model_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="got no folder for CLIP.*--clip_dir DIR"):
        clip.build("cpu")
    with pytest.raises(FileNotFoundError, match=r"config.json not found.*--clip_dir DIR"):
        clip.build("cpu", tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be read"):
        clip.build("cpu", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        clip.build("cpu", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="it holds bert, wanted clip or clip_vision_model"):
        clip.build("cpu", tmp_path)
    for content in ("{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be read"):
            clip.build("cpu", tmp_path)
    with pytest.raises(FileNotFoundError, match="vocab.json not found"):
        clip.load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_tensors_are_never_drawn_at_random(model, tmp_path, change):
    """transformers would only log that they are."""
    state, name = model.state_dict(), "visual_projection.weight"
    weights = {} if change == "missing" else {name: torch.zeros(8, 4)}
    model.save_pretrained(tmp_path, state_dict={key: state[key] for key in state.keys() - {name}} | weights)
    with pytest.raises(ValueError, match=f"{name}|cannot be read"):
        clip.build("cpu", tmp_path)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        clip.build("cpu", folder)
