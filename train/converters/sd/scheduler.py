"""Schedulers of diffusers: what a scheduler_config.json says of the process and of sampling.

Keys that are left out have that library's defaults, which are not those of Stable Diffusion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SOLVERS = {  # solver and default spacing, by class
    "DDIMScheduler": ("ddim", "leading"),
    "PNDMScheduler": ("plms", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace"),
    "DDPMScheduler": ("ddpm", "leading"),
}
SPACINGS = {  # by solver and timestep_spacing
    **{(solver, "leading"): "whole_leading" for solver in ("ddim", "plms", "ddpm", "dpmpp_2m")},
    **{(solver, "trailing"): "whole_trailing" for solver in ("ddim", "plms", "ddpm", "dpmpp_2m", "euler")},
    **{(solver, "linspace"): "whole_linspace" for solver in ("ddim", "plms", "ddpm")},
    ("dpmpp_2m", "linspace"): "whole_open",
    ("euler", "linspace"): "linspace",  # not rounded
}
PROCESS_DEFAULTS = {
    **{"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    **{"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
}
BUILT = {  # keys that select parts which are not built here, and the values that mean none
    "trained_betas": (None,),
    "thresholding": (False,),
    "skip_prk_steps": (True,),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "euler_at_final": (False,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "variance_type": (None, "fixed_small", "fixed_large"),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "solver_order": (2,),
    "lower_order_final": (True,),
    "lambda_min_clipped": (None, "-Infinity", float("-inf")),
}
READ = {  # keys that are read, and those of options that are off
    *PROCESS_DEFAULTS,
    *("_class_name", "_diffusers_version", "_name_or_path", "set_alpha_to_one", "steps_offset", "timestep_spacing"),
    *("clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "use_karras_sigmas"),
    *("flow_shift", "base_shift", "max_shift", "time_shift_type", "base_image_seq_len", "max_image_seq_len"),
}


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a scheduler, or a setting of it, that is not built here."""
    name = config.get("_class_name")
    if name not in SOLVERS:
        raise ValueError(f"got the scheduler {name}, wanted one of {', '.join(SOLVERS)}: choose one by --solver")
    for key, value in config.items():
        if key in BUILT and value not in BUILT[key]:
            raise ValueError(
                f"got a scheduler with {key} {value!r}, wanted {BUILT[key][0]!r}: there is no such part here"
            )
        if key not in BUILT and key not in READ:
            raise ValueError(f"got a scheduler with an unknown setting {key} ({value!r}): take it out of its JSON")
    for key, known in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTIONS)):
        if (value := config.get(key, PROCESS_DEFAULTS[key])) not in known:
            raise ValueError(f"got a scheduler with {key} {value!r}, wanted one of {', '.join(known)}")


def process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of the process; ValueError for what is not built here."""
    check_scheduler(config)
    values = PROCESS_DEFAULTS | {key: config[key] for key in PROCESS_DEFAULTS if key in config}
    settings = {
        "process": "gaussian",
        "total_steps": values["num_train_timesteps"],
        "schedule": SCHEDULES[values["beta_schedule"]],
        "prediction": PREDICTIONS[values["prediction_type"]],
        "zero_terminal_snr": values["rescale_betas_zero_snr"],
        "variance": config.get("variance_type") or "fixed_small",
    }
    if settings["schedule"] == "cosine":
        return settings
    return settings | {"first_beta": values["beta_start"], "last_beta": values["beta_end"]}


def sampling_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of sampling; ValueError for what is not built here."""
    check_scheduler(config)
    solver, spacing = SOLVERS[config["_class_name"]]
    spacing = config.get("timestep_spacing", spacing)
    if (solver, spacing) not in SPACINGS:
        raise ValueError(f"got a scheduler with timestep_spacing {spacing!r} for {solver}: choose one by --spacing")
    spacing, offset = SPACINGS[solver, spacing], config.get("steps_offset", 0)
    if config.get("use_karras_sigmas"):
        spacing = "karras"
    settings = {
        "solver": solver,
        "spacing": spacing,
        "steps_offset": offset if spacing == "whole_leading" else 0,
        "clip": solver in ("ddim", "ddpm") and bool(config.get("clip_sample", True)),
        "last_state": "clean",
    }
    if solver in ("ddim", "plms") and not config.get("set_alpha_to_one", solver == "ddim"):
        settings["last_state"] = "first"
    return settings


KEYS = {  # of the schedulers' classes, besides those of all
    "DDIMScheduler": {"clip_sample", "set_alpha_to_one", "rescale_betas_zero_snr"},
    "PNDMScheduler": {"skip_prk_steps", "set_alpha_to_one"},
    "EulerDiscreteScheduler": {"use_karras_sigmas", "rescale_betas_zero_snr"},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas", "rescale_betas_zero_snr"},
    "DDPMScheduler": {"clip_sample", "variance_type", "rescale_betas_zero_snr"},
}


def scheduler_config(process: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scheduler_config.json of flags; the inverse of `process_settings` and `sampling_settings`.

    DDIM stands for solvers that no scheduler has. ValueError for a process that none has.
    """
    if process["process"] != "gaussian" or process["schedule"] not in SCHEDULES.values():
        got = f"got the process {process['process']} with schedule {process['schedule']}"
        raise ValueError(f"{got}, wanted gaussian with {', '.join(SCHEDULES.values())}: no scheduler has another")
    solver = sampling["solver"] if sampling["solver"] in dict(SOLVERS.values()) else "ddim"
    name, default = next((name, spacing) for name, (own, spacing) in SOLVERS.items() if own == solver)
    spacings = {ours: theirs for (own, theirs), ours in SPACINGS.items() if own == solver}
    betas = {"beta_start": process["first_beta"], "beta_end": process["last_beta"]}
    config = {
        **{"num_train_timesteps": process["total_steps"], **{key: beta for key, beta in betas.items() if beta}},
        "beta_schedule": next(theirs for theirs, ours in SCHEDULES.items() if ours == process["schedule"]),
        "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == process["prediction"]),
        **{"timestep_spacing": spacings.get(sampling["spacing"], default), "steps_offset": sampling["steps_offset"]},
        **{"set_alpha_to_one": sampling["last_state"] == "clean", "clip_sample": sampling["clip"]},
        **{"rescale_betas_zero_snr": process["zero_terminal_snr"], "variance_type": process["variance"]},
        **{"use_karras_sigmas": sampling["spacing"] == "karras", "skip_prk_steps": True},
    }
    others = set().union(*KEYS.values()) - KEYS[name]
    return {"_class_name": name} | {key: value for key, value in config.items() if key not in others}


def prediction_hint(output_of: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[str, float]:
    """Returns what a network seems to predict, eps or v, and the cosine between its output and its input.

    `output_of` maps pure noise x (B, C, H, W) to the network's output at the last time, where noise is all there is to
    predict: the cosine is near 1 for eps, and near 0 for v. A hint, not a proof; a network must be trained for it.
    """
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(output_of(noise).flatten(), noise.flatten(), dim=0).item()
    return ("eps" if cosine > 0.5 else "v"), cosine
