"""A whole pipeline of diffusers, converted by convert.py: the run draws the same latents and images from prompts."""

import dataclasses
import json

import pytest
import torch

from diffusion.rng import Streams, seed_of
from helpers.public_sd import SD1, SD2, TEXT, UNET, autoencoder_blocks, randomize
from helpers.tiny_runs import call
from models.conditions.text import tokenize
from models.text_encoder import CHUNK
from models.tokenizer import Tokenizer
from train.converters.sd.scheduler import sampling_settings
from train.inference import load

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here: pip install diffusers")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install transformers")

PROCESS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
SCHEDULERS = {
    "DDIMScheduler": LEADING | {"clip_sample": False},
    "PNDMScheduler": LEADING | {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
}
PREDICTIONS = {"SD 1": "epsilon", "SD 2": "v_prediction"}
PROMPTS, STEPS, GUIDANCE = ["a photo of a cat", "a monkey with hat walking"], 6, 7.5


def make_scheduler(name, version):
    return getattr(diffusers, name)(**PROCESS, prediction_type=PREDICTIONS[version], **SCHEDULERS[name])


@pytest.fixture(scope="module", params=[("SD 1", SD1), ("SD 2", SD2)], ids=["sd1", "sd2"])
def converted(request, tmp_path_factory):
    """The version, a random pipeline without a tokenizer, and the run that convert.py makes of its folder."""
    version, options = request.param
    folder = tmp_path_factory.mktemp("pipeline")
    own_ids = {"vocab_size": Tokenizer.vocab_size, "bos_token_id": Tokenizer.start_id, "eos_token_id": Tokenizer.end_id}
    activation = "quick_gelu" if version == "SD 1" else "gelu"
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | own_ids, hidden_act=activation))
    autoencoder = diffusers.AutoencoderKL(**autoencoder_blocks(4), block_out_channels=(32,) * 4, scaling_factor=0.3)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=randomize(autoencoder),
        text_encoder=randomize(text),
        tokenizer=None,
        unet=randomize(diffusers.UNet2DConditionModel(**UNET, **options)),
        scheduler=make_scheduler("DDIMScheduler", version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "weights")
    call("convert.py", f"--from sd --weights {folder}/weights --logs_root {folder} --log_dir run --no_amp")
    return version, pipeline, load(folder / "run", device="cpu", amp=False)


@torch.no_grad()
def draw_theirs(pipeline, prompts, noise, output):
    """Returns what a pipeline draws from prompts, with ids of our tokenizer, which has tests of its own."""
    ids, _ = tokenize([*prompts, ""], CHUNK, Tokenizer(), Tokenizer.end_id)
    tokens = pipeline.text_encoder(ids.squeeze(1))[0]
    embeddings = {"prompt_embeds": tokens[:-1], "negative_prompt_embeds": tokens[-1:].expand(len(prompts), -1, -1)}
    calls = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "output_type": output}
    return pipeline(**embeddings, **calls).images


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_latents_are_those_of_the_scheduler(converted, name, agrees):
    version, pipeline, run = converted
    if (version, name) == ("SD 2", "PNDMScheduler"):
        pytest.skip("diffusers' PNDM extrapolates v, ours eps as in Liu et al. 2022")
    pipeline.scheduler = make_scheduler(name, version)
    settings = json.loads(pipeline.scheduler.to_json_string())
    options = {"sample_steps": STEPS, "guidance": GUIDANCE} | sampling_settings(settings)
    sampler, seeds = run.model.sampler, [3, 4]
    arguments = {"options": dataclasses.replace(run.settings, **options), "batch": {"caption": PROMPTS}}
    got = sampler.sample(sampler.network, Streams(seeds), **arguments)
    start = sampler.process.prior(got.shape, Streams(seeds))
    # Its Euler starts from x / alpha, which it makes from noise of unit variance
    start = start / sampler.process.sigma(torch.tensor(1.0)) if name == "EulerDiscreteScheduler" else start
    wanted = draw_theirs(pipeline, PROMPTS, start.float(), "latent")
    assert agrees(got, wanted, f"diffusers: pipeline of {version}, {name}", relative=True)


def test_images_are_those_of_the_pipeline(converted):
    version, pipeline, run = converted
    pipeline.scheduler = make_scheduler("DDIMScheduler", version)  # of the folder: the run's own settings
    got = run.sample(2, seed=5, caption=PROMPTS, sample_steps=STEPS, guidance=GUIDANCE)
    streams = Streams([seed_of(5, "sample", i) for i in range(2)])
    start = run.model.sampler.process.prior((2, 4, 8, 8), streams)
    wanted = draw_theirs(pipeline, PROMPTS, start, "pt").mul(255).round()
    assert got.shape == wanted.shape == (2, 3, 64, 64) and wanted.std() > 10
    differences = (got.float() - wanted).abs()
    assert differences.max() <= 1 and differences.mean() < 0.01  # numbers near a half may be rounded either way
