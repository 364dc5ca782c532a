"""Condition images as their condition reads them: unscaled latents, masks with what they leave, and random masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments.harness.images import save_held_out_images
from helpers.tiny_runs import call
from models.conditions import image
from models.conditions.image import ImageEncoder
from train.condition_images import encode_condition_images, make_adapt, random_mask, with_random_masks
from train.config import DataConfig
from train.continuous_stage import save_autoencoder
from train.data.loading import temporary_seed
from train.data.patches import ImageSubset
from train.data.transforms import as_uint8
from train.inference import load
from train.sampler_loading import read_stored_config
from train.samplers import absorbing, ddpm
from train.samplers.ddpm import Config
from train.spaces import LatentSpace, PixelSpace
from train.trained_sampler import TrainedSampler
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

FACTOR, SCALE, SHIFT = 2, 5.0, 0.25


def encode_latents(images):
    """Four channels: the mean of each cell, and of its corners."""
    cells = images.unfold(2, FACTOR, FACTOR).unfold(3, FACTOR, FACTOR)  # (B, C, h, w, 2, 2)
    return torch.cat([cells.mean((1, 4, 5)).unsqueeze(1), cells[..., 0, 0]], 1)


def latent_space():
    stage = SimpleNamespace(factor=FACTOR, n_channels=3, encode_latents=encode_latents)
    stage.latent_shape = lambda size: (4, size[0] // FACTOR, size[1] // FACTOR)
    return LatentSpace(stage, SCALE, (8, 12), SHIFT)


def network(channels, reads):
    return nn.ModuleDict({"image": ImageEncoder(channels, reads)})


def pictures(size=(8, 12), channels=3):
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def half_mask(size=(8, 12)):
    mask = -torch.ones(2, 1, *size)
    mask[:, :, :, : size[1] // 2] = 1
    return mask


def test_latents_of_instructions_are_unscaled():
    batch = {"condition_image": pictures(), "caption": ["a", "b"]}
    out = encode_condition_images(network(4, "latents"), latent_space(), batch)
    assert torch.equal(out["condition_image"], encode_latents(pictures())) and out["caption"] == batch["caption"]
    assert torch.equal(batch["condition_image"], pictures())  # the batch itself stays


def test_latents_of_inpainting_are_scaled_and_without_the_white():
    batch = {"condition_image": pictures(), "mask_image": half_mask()}
    out = encode_condition_images(network(5, "inpainting"), latent_space(), batch)
    visible = pictures()
    visible[..., :6] = 0  # grey
    assert torch.equal(out["condition_image"], (encode_latents(visible) - SHIFT) * SCALE)
    assert torch.equal(out["mask_image"], half_mask())


def test_pixels_of_inpainting_are_grey_where_the_mask_is_white():
    space = PixelSpace(DataConfig(img_size=8, img_width=12))
    out = encode_condition_images(
        network(4, "inpainting"), space, {"condition_image": pictures(), "mask_image": half_mask()}
    )
    assert not out["condition_image"][..., :6].any()
    assert torch.equal(out["condition_image"][..., 6:], pictures()[..., 6:])


def test_images_are_resized_to_the_canvas():
    batch = {"condition_image": pictures((16, 24))}
    for shape, size in ((None, (4, 6)), ((5, 7), (5, 7))):
        out = encode_condition_images(network(4, "latents"), latent_space(), batch, shape)
        assert out["condition_image"].shape == (2, 4, *size)
    small = encode_condition_images(network(4, "latents"), latent_space(), batch)["condition_image"]
    assert (small - encode_latents(pictures((16, 24)))[:, :, ::2, ::2]).abs().mean() < 0.5


def test_grey_images_are_read_as_colour():
    grey = pictures(channels=1)
    out = encode_condition_images(network(4, "latents"), latent_space(), {"condition_image": grey})
    assert torch.equal(out["condition_image"], encode_latents(grey.expand(-1, 3, -1, -1)))


def test_other_conditions_and_pixels_stay_as_they_are():
    batch = {"condition_image": pictures()}
    assert encode_condition_images(network(3, "pixels"), latent_space(), batch) is batch
    assert encode_condition_images(nn.Linear(2, 2), latent_space(), batch) is batch
    assert encode_condition_images(network(4, "latents"), latent_space(), None) is None
    nothing = {"caption": ["a"]}
    assert encode_condition_images(network(4, "latents"), latent_space(), nothing) is nothing


@pytest.mark.parametrize(
    ("channels", "reads", "message"),
    [
        (3, "latents", "got condition_channels 3 for image_input latents, wanted 4: pass --condition_channels 4"),
        (4, "inpainting", "got condition_channels 4 for image_input inpainting, wanted 5: pass --condition_channels 5"),
    ],
)
def test_channels_that_do_not_fit_are_refused(channels, reads, message):
    batch = {"condition_image": pictures(), "mask_image": half_mask()}
    with pytest.raises(ValueError, match=message):
        encode_condition_images(network(channels, reads), latent_space(), batch)
    with pytest.raises(ValueError, match="got condition images of 2 channels, wanted 3"):
        encode_condition_images(network(4, "latents"), latent_space(), {"condition_image": pictures(channels=2)})


def test_samplers_refuse_what_they_cannot_encode():
    tiny = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (), "heads": 1}
    for reads in ("latents", "inpainting"):
        options = {"conditions": ("image",), "condition_options": image.Config(condition_channels=4, image_input=reads)}
        with pytest.raises(ValueError, match=f"got image_input {reads} for a sampler of codes, wanted pixels"):
            config = absorbing.Config(bert_n_emb=8, bert_n_head=2, bert_n_layers=1, **options)
            absorbing.build(config, codes=4, grid=(2, 2), n_classes=0)
        ddpm.build(Config(**tiny | options), shape=(4, 4, 4), pixels=False, n_classes=0)
    with pytest.raises(ValueError, match="image_input latents for a sampler of pixels, wanted pixels, inpainting"):
        options["condition_options"] = image.Config(image_input="latents")
        ddpm.build(Config(**tiny | options), shape=(3, 4, 4), pixels=True, n_classes=0)


# Random masks


def masks(count=400, size=(16, 24)):
    drawn = []
    for seed in range(count):
        with temporary_seed(seed):
            drawn.append(random_mask(*size))
    return torch.stack(drawn)


def test_random_masks_cover_the_image_in_a_quarter_of_cases():
    drawn = masks()
    assert {*drawn.unique().tolist()} == {0, 255} and drawn.shape == (400, 1, 16, 24)
    shares = (drawn == 255).float().mean((1, 2, 3))
    assert abs((shares == 1).float().mean() - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert 0.2 < shares[shares < 1].mean() < 0.6 and shares.min() > 0
    assert torch.equal(drawn, masks())
    visible = (drawn[shares < 1] == 0).float().mean(0)
    assert visible.min() > 0.2  # no pixel is always painted


def test_items_get_an_image_and_a_mask_unless_they_have_them():
    item = {"image": torch.zeros(3, 8, 12, dtype=torch.uint8), "label": 3}
    out = with_random_masks(None)(item)
    assert out["condition_image"] is item["image"] and out["mask_image"].shape == (1, 8, 12) and out["label"] == 3
    own = {"mask_image": torch.zeros(1, 8, 12), "condition_image": torch.ones(3, 8, 12)}
    out = with_random_masks(lambda given: {**given, **own})(item)
    assert out["mask_image"] is own["mask_image"] and out["condition_image"] is own["condition_image"]
    with pytest.raises(ValueError, match="the function of --adapt returned NoneType, wanted a dict with an image"):
        with_random_masks(lambda given: None)(item)


def test_masks_are_for_the_condition_of_inpainting_alone():
    assert make_adapt(Config()) is None
    assert make_adapt(Config(conditions=("image",))) is None
    options = image.Config(condition_channels=4, image_input="inpainting")
    assert make_adapt(Config(conditions=("image",), condition_options=options)) is not None


# Whole runs

SMALL = (
    "--sampler ddpm --dataset digits --img_size 8 --n_channels 1 --channels 8 --channel_mults 1 --res_blocks 1 "
    "--attn_factors 1 --heads 1 --total_steps 8 --batch_size 4 --num_workers 0 --warmup_iters 0 --sample_steps 2 "
    "--no_amp --train_steps 2 --steps_per_save_output 2 --steps_per_eval 2 --conditions image"
)
RUNS = {  # by name: pixels, latents, and instructions on latents
    "pixels": "--image_input inpainting --condition_channels 2",
    "latents": "--image_input inpainting --condition_channels 5 --ae_load_dir kl",
    "instruct": "--image_input latents --condition_channels 4 --ae_load_dir kl --adapt my_pairs.with_source",
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    config = AutoencoderKLConfig(in_channels=1, channels=32, channel_mults=(1, 1), res_blocks=1, scaling_factor=0.5)
    save_autoencoder(folder / "kl", AutoencoderKL(config), {})
    adapt = 'def with_source(item):\n    return item | {"condition_image": 255 - item["image"]}\n'
    (folder / "my_pairs.py").write_text(adapt)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, flags in RUNS.items():
            call("train_sampler.py", f"{SMALL} {flags} --logs_root {folder} --log_dir {name}")
        yield folder


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_model_of_inpainting_trains_and_fills_in_images(logs, name):
    flags = f"--load_dir {name} --logs_root {logs} --n_images 3 --results 2 --sample_steps 2 --no_amp"
    call("experiments/inpaint.py", f"{flags} --hide left --log_dir filled_{name}")
    folder = logs / f"filled_{name}"
    assert (folder / "inpainted.png").is_file() and len([*(folder / "images").iterdir()]) == 6


def test_samples_follow_their_source(logs):
    for i, level in enumerate((0, 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(logs / f"source_{i}.png")
    flags = f"--load_dir instruct --logs_root {logs} --allow my_pairs.with_source --sample_steps 2 --no_amp"
    for i in range(2):
        flags_of_one = f"{flags} --label 3 --image_guidance 2 --n_samples 2 --save_individually"
        call("experiments/get_samples.py", f"{flags_of_one} --source {logs}/source_{i}.png --log_dir from_{i}")
    first, second = (np.asarray(Image.open(logs / f"from_{i}/images/000000.png")) for i in range(2))
    assert not np.array_equal(first, second)
    run = load(logs / "instruct", device="cpu", amp=False, allow=["my_pairs.with_source"])
    source = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    same = run.sample(1, label=3, condition_image=source, sample_steps=2, image_guidance=2.0)
    assert np.array_equal(same[0, 0].numpy(), second if second.ndim == 2 else second[..., 0])


def test_inpaint_gives_the_model_what_is_hidden_in_white(logs, monkeypatch):
    drawn, draw = [], TrainedSampler.draw

    def record(self, indices, seed, options, conditions, **keywords):
        drawn.append((conditions, keywords))
        return draw(self, indices, seed, options, conditions, **keywords)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    flags = f"--load_dir pixels --logs_root {logs} --n_images 2 --results 1 --sample_steps 1 --no_amp"
    call("experiments/inpaint.py", f"{flags} --hide left --log_dir recorded")
    conditions, keywords = drawn[0]
    hidden = conditions["mask_image"][:, 0]
    assert (hidden[..., :4] == 1).all() and (hidden[..., 4:] == -1).all()
    assert conditions["condition_image"].shape == (2, 1, 8, 8) and keywords["edit"] is None
    assert (drawn[-1][0]["mask_image"] == 1).all()  # of the chance level


def test_a_source_without_a_mask_is_refused(logs, capsys):
    with pytest.raises(SystemExit) as error:
        call("experiments/get_samples.py", f"--load_dir pixels --logs_root {logs} --source {logs} --n_samples 1")
    assert error.value.code == 2
    assert "which fills in masks: use experiments/inpaint.py --image FILE --mask FILE" in capsys.readouterr().err


def test_the_saved_masks_are_those_of_the_samples(logs, monkeypatch, tmp_path):
    """Of an item that comes twice, too: random masks depend on the position in the shuffle."""
    dataset = TrainedSampler.dataset
    monkeypatch.setattr(TrainedSampler, "dataset", lambda self, split: ImageSubset(dataset(self, split), [7, 3, 5]))
    model = load(logs / "pixels", device="cpu", amp=False).model
    numbers, names = range(4), [f"{i}.png" for i in range(4)]
    source = model.condition_source(read_stored_config(model.run).sampling)
    batch, items = source.draw(0, numbers), source.held_out_items(numbers)
    save_held_out_images(tmp_path, model, items.tolist(), names)
    for folder, field in (("mask_image", "mask_image"), ("held_out", "condition_image")):
        saved = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / folder / name))) for name in names])
        assert torch.equal(saved[..., 0], as_uint8(batch[field])[:, 0])
    assert len(batch["mask_image"].unique(dim=0)) > 1
