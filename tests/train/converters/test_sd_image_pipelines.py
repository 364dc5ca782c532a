"""Pipelines of diffusers that read an image: InstructPix2Pix and inpainting, converted, draw the same latents."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.rng import Streams
from helpers.public_sd import SD1, TEXT, UNET, autoencoder_blocks, randomize
from helpers.tiny_runs import call
from models.conditions.text import tokenize
from models.text_encoder import CHUNK
from models.tokenizer import Tokenizer
from train.inference import load

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here: pip install diffusers")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install transformers")

SCHEDULER = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    **{"steps_offset": 1, "set_alpha_to_one": False},
}
PROMPTS, STEPS, SIZE = ["make it night", "a monkey with hat walking"], 4, 64
CLASSES = {"instruct": "StableDiffusionInstructPix2PixPipeline", "inpainting": "StableDiffusionInpaintPipeline"}
CHANNELS = {"instruct": 8, "inpainting": 9}
SCALES = {"instruct": [(7.5, 1.5), (2.0, 4.0)], "inpainting": [(7.5, 1.0), (3.0, 1.0)]}  # of text, of image


@torch.no_grad()
def make_autoencoder():
    """A random one whose distribution of latents is almost a point: the pipeline of inpainting draws from it."""
    autoencoder = diffusers.AutoencoderKL(**autoencoder_blocks(4), block_out_channels=(32,) * 4, scaling_factor=0.3)
    randomize(autoencoder)
    autoencoder.quant_conv.weight[4:], autoencoder.quant_conv.bias[4:] = 0, -30
    return autoencoder


@pytest.fixture(scope="module", params=CLASSES)
def converted(request, tmp_path_factory):
    """The kind, a random pipeline without a tokenizer, its folder, and the run that convert.py makes of it."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    own_ids = {"vocab_size": Tokenizer.vocab_size, "bos_token_id": Tokenizer.start_id, "eos_token_id": Tokenizer.end_id}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | own_ids, hidden_act="quick_gelu"))
    unet = diffusers.UNet2DConditionModel(**UNET, **SD1, in_channels=CHANNELS[kind])
    pipeline = getattr(diffusers, CLASSES[kind])(
        vae=make_autoencoder(),
        text_encoder=randomize(text),
        tokenizer=None,
        unet=randomize(unet),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "weights")
    call("convert.py", f"--from sd --weights {folder}/weights --logs_root {folder} --log_dir run --no_amp")
    return kind, pipeline, folder, load(folder / "run", device="cpu", amp=False)


def pictures():
    """Two images in [0, 1], and masks of them, 1 where they are to be painted."""
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[0, :, 12:50, :30], masks[1, :, :, 33:] = 1, 1
    return images, masks


@torch.no_grad()
def draw_theirs(kind, pipeline, noise, scale, image_scale):
    """Returns the latents that a pipeline draws, with ids of our tokenizer, which has tests of its own."""
    ids, _ = tokenize([*PROMPTS, ""], CHUNK, Tokenizer(), Tokenizer.end_id)
    tokens = pipeline.text_encoder(ids.squeeze(1))[0]
    images, masks = pictures()
    calls = {"prompt_embeds": tokens[:-1], "negative_prompt_embeds": tokens[-1:].expand(2, -1, -1), "latents": noise}
    calls |= {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "latent", "image": images}
    calls |= {"image_guidance_scale": image_scale} if kind == "instruct" else {"mask_image": masks, "strength": 1.0}
    return pipeline(**calls).images


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
@pytest.mark.parametrize("case", [0, 1])
@torch.no_grad()
def test_latents_are_those_of_the_pipeline(converted, case, agrees):
    kind, pipeline, _, run = converted
    scale, image_scale = SCALES[kind][case]
    options = {"sample_steps": STEPS, "guidance": scale, "image_guidance": image_scale}
    sampler, seeds, (images, masks) = run.model.sampler, [3, 4], pictures()
    batch = {"caption": PROMPTS, "condition_image": images * 2 - 1}
    batch |= {"mask_image": masks * 2 - 1} if kind == "inpainting" else {}
    batch = run.model.with_encoded_images(batch)
    arguments = {"options": dataclasses.replace(run.settings, **options), "batch": batch}
    got = sampler.sample(sampler.network, Streams(seeds), **arguments)
    wanted = draw_theirs(kind, pipeline, sampler.process.prior(got.shape, Streams(seeds)), scale, image_scale)
    assert agrees(got, wanted, f"diffusers: pipeline of {kind}, scales {scale} and {image_scale}", relative=True)


def test_the_settings_of_a_run_are_those_of_its_kind(converted):
    kind, _, _, run = converted
    assert run.settings.guidance == 7.5 and run.settings.image_guidance == {"instruct": 1.5, "inpainting": 1.0}[kind]
    fields = {"instruct": {"condition_image"}, "inpainting": {"condition_image", "mask_image"}}[kind]
    assert {*run.conditions} == {"caption", *fields}


def test_a_run_samples_from_a_source_in_python_and_by_command(converted):
    kind, _, folder, run = converted
    images, masks = ((each * 255).byte() for each in pictures())
    own = {"condition_image": images[0]} | ({"mask_image": masks[0]} if kind == "inpainting" else {})
    out = run.sample(2, caption="a cat", sample_steps=1, **own)
    others = own | {"condition_image": images[1]}
    assert out.shape == (2, 3, SIZE, SIZE)
    assert not torch.equal(run.sample(2, caption="a cat", sample_steps=1, **others), out)
    (folder / "sources").mkdir()
    for i, (picture, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"sources/{i}.png")
        Image.fromarray(mask[0].numpy()).save(folder / f"mask_{i}.png")
    flags = f"--load_dir run --logs_root {folder} --prompt dog --sample_steps 1 --no_amp --log_dir results"
    if kind == "instruct":
        call("experiments/get_samples.py", f"{flags} --source {folder}/sources --n_samples 3")
        results = json.loads((folder / "results/results.json").read_text())
        assert [each["source"] for each in results["images"]] == ["0.png", "1.png", "0.png"]
    else:
        call("experiments/inpaint.py", f"{flags} --image {folder}/sources/0.png --mask {folder}/mask_0.png --results 1")
        (file,) = (folder / "results/images").iterdir()
        filled, visible = np.asarray(Image.open(file)), masks[0, 0].numpy() == 0
        assert np.array_equal(filled[visible], images[0].permute(1, 2, 0).numpy()[visible])


def test_a_converted_run_is_written_back_to_the_bit(converted):
    _, _, folder, _ = converted
    call("convert.py", f"--to diffusers --load_dir run --logs_root {folder} --output {folder}/back")
    for name in ("unet", "vae", "text_encoder"):
        first, back = (next((folder / each / name).glob("*.safetensors")) for each in ("weights", "back"))
        first, back = load_file(first), load_file(back)
        assert first.keys() == back.keys() and all(torch.equal(back[key], value) for key, value in first.items())
