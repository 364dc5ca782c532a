"""Schedulers of diffusers as flags: each key obeyed, without effect, or refused."""

import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, scaled_linear
from train.converters.sd.scheduler import prediction_hint, process_settings, sampling_settings, scheduler_config

SD1 = {  # that of Stable Diffusion 1.5
    **{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085},
    **{"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False},
    **{"skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False},
}
SD2 = SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
CLEAN = {"last_state": "clean"}  # whatever set_alpha_to_one says: only DDIM and PNDM have it
SD_PROCESS = {
    **{"process": "gaussian", "total_steps": 1000, "schedule": "scaled_linear", "first_beta": 0.00085},
    **{"last_beta": 0.012, "prediction": "eps", "zero_terminal_snr": False, "variance": "fixed_small"},
}


def test_the_schedulers_of_stable_diffusion():
    assert process_settings(SD1) == SD_PROCESS and process_settings(SD2) == SD_PROCESS | {"prediction": "v"}
    common = {"spacing": "whole_leading", "steps_offset": 1, "clip": False, "last_state": "first"}
    assert sampling_settings(SD1) == {"solver": "plms"} | common
    assert sampling_settings(SD2) == {"solver": "ddim"} | common


def test_keys_that_are_left_out_have_the_defaults_of_the_library():
    config = {"_class_name": "DDIMScheduler"}
    wanted = {"schedule": "linear", "first_beta": 0.0001, "last_beta": 0.02}
    assert process_settings(config) == SD_PROCESS | wanted
    clipped = {"spacing": "whole_leading", "steps_offset": 0, "clip": True, "last_state": "clean"}
    assert sampling_settings(config) == {"solver": "ddim"} | clipped
    assert sampling_settings({"_class_name": "PNDMScheduler"})["last_state"] == "first"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, {"solver": "dpmpp_2m", "spacing": "whole_open"} | CLEAN),
        ({"_class_name": "EulerDiscreteScheduler"}, {"solver": "euler", "spacing": "linspace"} | CLEAN),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, {"spacing": "karras"}),
        ({"timestep_spacing": "trailing"}, {"spacing": "whole_trailing", "steps_offset": 0}),
    ],
)
def test_other_schedulers_and_spacings(changes, wanted):
    settings = sampling_settings(SD1 | changes)
    assert wanted.items() <= settings.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "EulerAncestralDiscreteScheduler"},
            "got the scheduler EulerAncestralDiscreteScheduler, wanted",
        ),
        ({"thresholding": True}, "thresholding True, wanted False"),
        ({"skip_prk_steps": False}, "skip_prk_steps False, wanted True"),
        ({"trained_betas": [0.1]}, r"trained_betas \[0.1\], wanted None"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace', wanted one of linear"),
        ({"new_key": 1}, "unknown setting new_key"),
        ({"timestep_spacing": "new"}, "timestep_spacing 'new'"),
    ],
)
def test_what_is_not_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sampling_settings(SD1 | changes)


def test_zero_terminal_snr_is_obeyed():
    assert process_settings(SD2 | {"rescale_betas_zero_snr": True})["zero_terminal_snr"]


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


@pytest.mark.parametrize(
    "config",
    [
        *(SD1, SD2, SD2 | ZERO_SNR, SD1 | {"timestep_spacing": "linspace"}, COSINE),
        *(SD1 | {"_class_name": f"{name}Scheduler"} for name in ("EulerDiscrete", "DPMSolverMultistep", "DDPM")),
        SD1 | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
        SD2 | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    ],
    ids=lambda config: "-".join(str(config.get(key)) for key in ("_class_name", "timestep_spacing")),
)
def test_a_config_made_of_flags_says_the_same(config):
    process, sampling = process_settings(config), sampling_settings(config)
    flags = {"last_state": "clean", "first_beta": None, "last_beta": None}  # which not all of them have
    made = scheduler_config(flags | process, flags | sampling)
    assert made["_class_name"] == config["_class_name"]
    assert process_settings(made) == process and sampling_settings(made) == sampling


def test_a_config_made_of_flags_has_the_keys_of_its_scheduler():
    diffusers = pytest.importorskip("diffusers")
    for name in ("DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "DDPM"):
        config = SD1 | {"_class_name": f"{name}Scheduler"}
        flags = {"last_state": "clean"} | process_settings(config) | sampling_settings(config)
        made = scheduler_config(flags, flags)
        scheduler = getattr(diffusers, made.pop("_class_name")).from_config(made)
        assert made.keys() <= scheduler.config.keys()
        assert {key: scheduler.config[key] for key in made} == made


def test_processes_that_no_scheduler_has_are_refused():
    flags = process_settings(SD1) | sampling_settings(SD1)
    with pytest.raises(ValueError, match="got the process flow with schedule scaled_linear, wanted gaussian"):
        scheduler_config(flags | {"process": "flow"}, flags)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_hint_tells_perfect_networks_of_both_kinds_apart(prediction):
    """The best predictions for data N(0, 1), at the last time."""
    process, t = GaussianDiffusion(scaled_linear(1000), prediction, "fixed_small"), torch.ones(2)

    def output_of(x):
        alpha, sigma = process.scales_like(t, x)
        return process.target(alpha * x, sigma * x, t)  # E[x0 | x], E[eps | x]

    assert prediction_hint(output_of, (2, 4, 8, 8))[0] == prediction
