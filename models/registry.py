"""Lookup of classes, functions and plug-ins by name: built-in ones, and the user's own by dotted path."""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType

from torch import nn

# Old and new dotted paths of classes and functions that users may import; docs/moved.md has the same list.
MOVED = {
    "diffusion.Drawing": "diffusion.LogitsWarper",
    "diffusion.absorbing.MASKINGS": "diffusion.absorbing.MASK_SCHEDULES",
    "diffusion.absorbing.Masking": "diffusion.absorbing.MaskSchedule",
    "diffusion.absorbing.forgotten": "diffusion.absorbing.mask_at_random",
    "diffusion.absorbing_solvers.dealt": "diffusion.absorbing_solvers.conf_remask_probs",
    "diffusion.absorbing_solvers.surest": "diffusion.absorbing_solvers.unmask_most_confident",
    "diffusion.absorbing_solvers.tempered": "diffusion.logits_warper.LogitsWarper",
    "diffusion.denoisers.known": "diffusion.denoisers.with_known_pixels",
    "diffusion.discrete_solvers.Answer": "diffusion.discrete_solvers.Evaluation",
    "diffusion.discrete_solvers.ask": "diffusion.discrete_solvers.evaluate",
    "diffusion.discrete_solvers.step_times": "diffusion.discrete_solvers.even_times",
    "diffusion.drawing.AS_PREDICTED": "diffusion.logits_warper.NO_WARP",
    "diffusion.drawing.Drawing": "diffusion.logits_warper.LogitsWarper",
    "diffusion.drawing.greedy": "diffusion.logits_warper.greedy_logits",
    "diffusion.drawing.likeliest": "diffusion.logits_warper.filter_top_k_top_p",
    "diffusion.gaussian_solvers.Denoise": "diffusion.gaussian_solvers.ContinuousDenoiser",
    "diffusion.gaussian_solvers.Leg": "diffusion.gaussian_solvers.StepCoefficients",
    "diffusion.gaussian_solvers.SPACINGS": "diffusion.spacing.SPACINGS",
    "diffusion.gaussian_solvers.begun_at": "diffusion.spacing.from_strength",
    "diffusion.gaussian_solvers.from_strength": "diffusion.spacing.from_strength",
    "diffusion.gaussian_solvers.leg": "diffusion.gaussian_solvers.step_coefficients",
    "diffusion.gaussian_solvers.remaining_steps": "diffusion.spacing.remaining_steps",
    "diffusion.gaussian_solvers.step_times": "diffusion.spacing.step_times",
    "diffusion.gaussian_solvers.steps_left": "diffusion.spacing.remaining_steps",
    "diffusion.gaussian_solvers.toward": "diffusion.gaussian_solvers.x0_step",
    "diffusion.guidance.Denoiser": "diffusion.types.Denoiser",
    "diffusion.guidance.GUIDANCE_SCHEDULES": "diffusion.denoisers.GUIDANCE_SCHEDULES",
    "diffusion.guidance.guided": "diffusion.denoisers.guided",
    "diffusion.guidance.thresholded": "diffusion.denoisers.thresholded",
    "diffusion.halton.halton_order": "diffusion.absorbing_solvers.halton_order",
    "diffusion.kernels.Gaussian": "diffusion.process.ContinuousProcess",
    "diffusion.kernels.Normal": "diffusion.types.Normal",
    "diffusion.kernels.Prediction": "diffusion.types.Prediction",
    "diffusion.kernels.Variance": "diffusion.process.Variance",
    "diffusion.known.known": "diffusion.denoisers.with_known_pixels",
    "diffusion.likelihood.BIN": "diffusion.likelihood.BIN_WIDTH",
    "diffusion.likelihood.Bound": "diffusion.types.Bound",
    "diffusion.likelihood.dequantized": "diffusion.likelihood.dequantize",
    "diffusion.likelihood.visits": "diffusion.likelihood.stratified_terms",
    "diffusion.loss.Loss": "diffusion.types.Loss",
    "diffusion.low_discrepancy": "diffusion.low_discrepancy_times",
    "diffusion.masking.MASKINGS": "diffusion.absorbing.MASK_SCHEDULES",
    "diffusion.masking.Masking": "diffusion.absorbing.MaskSchedule",
    "diffusion.probability_flow.Likelihood": "diffusion.types.Likelihood",
    "diffusion.probability_flow.flow_bits_per_dimension": "diffusion.likelihood.flow_bits_per_dimension",
    "diffusion.process.Gaussian": "diffusion.process.ContinuousProcess",
    "diffusion.process.at": "diffusion.process.expand",
    "diffusion.process.full": "diffusion.process.upcast",
    "diffusion.process.like": "diffusion.process.append_dims",
    "diffusion.process.weighted": "diffusion.process.apply_loss_weight",
    "diffusion.rng.drawn": "diffusion.rng.sample_categorical",
    "diffusion.schedules.SCHEDULES": "diffusion.gaussian.SCHEDULES",
    "diffusion.schedules.cosine": "diffusion.gaussian.cosine",
    "diffusion.schedules.from_betas": "diffusion.gaussian.from_betas",
    "diffusion.schedules.linear": "diffusion.gaussian.linear",
    "diffusion.schedules.scaled_linear": "diffusion.gaussian.scaled_linear",
    "diffusion.schedules.sigmoid": "diffusion.gaussian.sigmoid",
    "diffusion.schedules.with_zero_terminal_snr": "diffusion.gaussian.with_zero_terminal_snr",
    "diffusion.solver": "diffusion.get_solver",
    "diffusion.solvers.one_per_place": "diffusion.solvers.one_per_code",
    "diffusion.solvers.options_of": "diffusion.solvers.solver_options_for",
    "diffusion.solvers.solver": "diffusion.solvers.get_solver",
    "diffusion.solvers.solvers_of": "diffusion.solvers.solvers_for",
    "diffusion.solvers_of": "diffusion.solvers_for",
    "diffusion.tempering.tempered": "diffusion.logits_warper.LogitsWarper",
    "diffusion.timesteps.Times": "diffusion.timesteps.WeightedTimes",
    "diffusion.timesteps.low_discrepancy": "diffusion.timesteps.low_discrepancy_times",
    "diffusion.timesteps.uniform": "diffusion.timesteps.uniform_times",
    "diffusion.uniform": "diffusion.uniform_times",
    "diffusion.windows.windowed": "diffusion.denoisers.windowed",
    "models.attend.attend": "models.sdpa.attend",
    "models.attend.attention_map": "models.sdpa.attention_map",
    "models.attend.masked_softmax": "models.sdpa.masked_softmax",
    "models.attention_block.ATTENTION_BLOCKS": "models.unet_attention.ATTENTION_BLOCKS",
    "models.attention_block.AttentionOptions": "models.unet_attention.AttentionOptions",
    "models.attention_block.FeatureTransformerBlock": "models.unet_attention.SpatialTransformer",
    "models.attention_block.NoAttention": "models.unet_attention.NoAttention",
    "models.attention_block.SELF_ATTENTION": "models.unet_attention.SELF_ATTENTION",
    "models.attention_block.SelfAttentionBlock": "models.unet_attention.SelfAttentionBlock",
    "models.blocks.AttentionBlock": "vq.autoencoder.AttentionBlock",
    "models.blocks.zeroed": "models.blocks.zero_module",
    "models.causal_transformer.CausalTransformer": "models.transformer.CausalTransformer",
    "models.condition.Condition": "models.conditioning.Condition",
    "models.condition.ConditionEncoder": "models.conditioning.ConditionEncoder",
    "models.condition.Map": "models.conditioning.Map",
    "models.condition.Regions": "models.conditioning.Regions",
    "models.condition.Tokens": "models.conditioning.Tokens",
    "models.condition.Vector": "models.conditioning.Vector",
    "models.feed_forward.FEED_FORWARDS": "models.blocks.FEED_FORWARDS",
    "models.feed_forward.FeedForward": "models.blocks.FeedForward",
    "models.feed_forward.GEGLU": "models.blocks.GEGLU",
    "models.full_attention.FullAttention": "models.attention.FullAttention",
    "models.hydra.HydraAttention": "models.neighborhood.HydraAttention",
    "models.hydra.hydra_attention": "models.neighborhood.hydra_attention",
    "models.kv_cache.Cache": "models.kv_cache.LayerCache",
    "models.kv_cache.Memory": "models.kv_cache.KVCache",
    "models.memory.Cache": "models.kv_cache.LayerCache",
    "models.memory.Memory": "models.kv_cache.KVCache",
    "models.unet_attention.FeatureTransformerBlock": "models.unet_attention.SpatialTransformer",
    "models.unet_config.UNetConfig": "models.unet.UNetConfig",
    "train.absorbing.AbsorbingSampler": "train.samplers.absorbing.AbsorbingSampler",
    "train.assembly.assemble": "train.trainer.build_train_state",
    "train.assembly.make_hooks": "train.trainer.make_hooks",
    "train.autoregressive.AutoregressiveSampler": "train.samplers.autoregressive.AutoregressiveSampler",
    "train.bad_steps.BadSteps": "train.optim.BadStepRecorder",
    "train.cli.from_dict": "train.cli.parse.from_dict",
    "train.cli.run_script": "train.cli.parse.run_script",
    "train.clock.Clock": "train.loop.Timer",
    "train.code_file.CodeFile": "train.data.code_file.CodeFile",
    "train.data.Draws": "train.data.streams.TrainingStreams",
    "train.data.ImageSource": "train.data.loading.ImageSource",
    "train.data.InOrder": "train.data.loading.ImageBatches",
    "train.data.Positions": "train.data.loading.BatchSource",
    "train.data.TrainingCodes": "train.data.codes.TrainingCodes",
    "train.data.TrainingImages": "train.data.loading.TrainingImages",
    "train.data.build_dataset": "train.data.loading.build_dataset",
    "train.data.code_cache.CodeFile": "train.data.code_file.CodeFile",
    "train.data.code_cache.CodeTable": "train.data.code_file.CodeTable",
    "train.data.code_cache.cache_key": "train.data.code_cache.code_cache_key",
    "train.data.loading.Annotations": "train.data.codes.Annotations",
    "train.data.loading.CodeGrids": "train.data.codes.CodeGrids",
    "train.data.loading.Draws": "train.data.streams.TrainingStreams",
    "train.data.loading.EpochShuffle": "train.data.shuffle.EpochShuffle",
    "train.data.loading.Grids": "train.data.codes.CodeGrids",
    "train.data.loading.InOrder": "train.data.loading.ImageBatches",
    "train.data.loading.Order": "train.data.shuffle.EpochShuffle",
    "train.data.loading.Positions": "train.data.loading.BatchSource",
    "train.data.loading.TrainingCodes": "train.data.codes.TrainingCodes",
    "train.data.loading.TrainingStreams": "train.data.streams.TrainingStreams",
    "train.datasets.held_out": "train.datasets.train_val_split",
    "train.decoder_likelihood.TrainedHead": "experiments.metrics.decoder_likelihood.TrainedHead",
    "train.distributed.World": "train.distributed.DistContext",
    "train.flops.count_flops": "train.perf.count_flops",
    "train.flops.matmul_peak": "train.perf.matmul_peak",
    "train.gaussian.GaussianSampler": "train.samplers.ddpm.GaussianSampler",
    "train.gaussian.make_encoders": "train.samplers._conditions.make_encoders",
    "train.gaussian.make_network": "train.samplers.ddpm.make_network",
    "train.gaussian.make_process": "train.samplers._process.make_process",
    "train.generate.TrainedSampler": "train.trained_sampler.TrainedSampler",
    "train.generate.load_sampler": "train.sampler_loading.load_sampler",
    "train.images.decode": "train.datasets._decode.decode",
    "train.images.to_grey_or_rgb": "train.datasets._decode.to_grey_or_rgb",
    "train.inference.TrainedSampler": "train.trained_sampler.TrainedSampler",
    "train.inference.load_sampler": "train.sampler_loading.load_sampler",
    "train.loop.Clock": "train.loop.Timer",
    "train.loop.State": "train.loop.TrainState",
    "train.loop.Tally": "train.loop.RunningSums",
    "train.meter.Meter": "train.perf.PerfMonitor",
    "train.optim.BadSteps": "train.optim.BadStepRecorder",
    "train.optim.update": "train.optim.clip_and_step",
    "train.optimizers.make_optimizer": "train.optim.make_optimizer",
    "train.order.Order": "train.data.shuffle.EpochShuffle",
    "train.perf.Meter": "train.perf.PerfMonitor",
    "train.perf.Profile": "train.perf.StepProfiler",
    "train.posthoc_ema.Fit": "train.posthoc_ema.ProfileFit",
    "train.posthoc_ema.PowerEMA": "train.posthoc_ema.PosthocEMA",
    "train.posthoc_ema.Snapshot": "train.posthoc_ema.EMASnapshot",
    "train.posthoc_ema.reconstruct": "train.posthoc_ema.reconstruct_ema",
    "train.power_ema.Fit": "train.posthoc_ema.ProfileFit",
    "train.power_ema.PowerEMA": "train.posthoc_ema.PosthocEMA",
    "train.power_ema.Snapshot": "train.posthoc_ema.EMASnapshot",
    "train.power_ema.reconstruct": "train.posthoc_ema.reconstruct_ema",
    "train.precision.LossScale": "train.execution.LossScale",
    "train.precision.autocast": "train.execution.autocast",
    "train.profiling.Profile": "train.perf.StepProfiler",
    "train.registry.dotted": "train.registry.import_callable",
    "train.samplers.Told": "train.samplers.ConditionInput",
    "train.samplers.chosen_solver": "train.samplers.select_solver",
    "train.samplers.ddpm.make_encoders": "train.samplers._conditions.make_encoders",
    "train.saving.Saver": "train.trainer.Checkpointer",
    "train.schedule.learning_rate": "train.lr_schedule.learning_rate",
    "train.second_stage.SamplerReports": "train.sampler.SamplerReports",
    "train.second_stage.SamplerStep": "train.sampler.SamplerStep",
    "train.session.Reports": "train.trainer.Reports",
    "train.session.train": "train.trainer.train",
    "train.spaces.Codes": "train.spaces.CodeSpace",
    "train.spaces.Latents": "train.spaces.LatentSpace",
    "train.spaces.Pixels": "train.spaces.PixelSpace",
    "train.spaces.Start": "train.spaces.EditInput",
    "train.spaces.filled_in": "train.spaces.fill_masked",
    "train.spaces.measure_latent_scale": "train.space_opening.measure_latent_scale",
    "train.spaces.measured_scale": "train.space_opening.measure_latent_scale",
    "train.spaces.open_space": "train.space_opening.open_space",
    "train.spaces.reopen_space": "train.space_opening.reopen_space",
    "train.spaces.reopened_space": "train.space_opening.reopen_space",
    "train.start.Start": "train.spaces.EditInput",
    "train.stopping.StopSignals": "train.distributed.StopSignals",
    "train.tally.Tally": "train.loop.RunningSums",
    "train.trained_sampler.StoredSamplerConfig": "train.sampler_loading.StoredSamplerConfig",
    "train.trained_sampler.check_allowed": "train.sampler_loading.check_allowed",
    "train.trained_sampler.load_posthoc_ema": "train.sampler_loading.load_posthoc_ema",
    "train.trained_sampler.load_sampler": "train.sampler_loading.load_sampler",
    "train.trained_sampler.load_space": "train.sampler_loading.load_space",
    "train.trained_sampler.load_trained_sampler": "train.sampler_loading.load_trained_sampler",
    "train.trained_sampler.read_stored_config": "train.sampler_loading.read_stored_config",
    "train.trained_sampler.resolve_snapshot_step": "train.sampler_loading.resolve_snapshot_step",
    "train.trainer.Saver": "train.trainer.Checkpointer",
    "train.trainer.assemble": "train.trainer.build_train_state",
    "train.transformer_config.TransformerConfig": "train.samplers._transformer.TransformerConfig",
    "train.transformer_config.make_network": "train.samplers._transformer.make_network",
    "train.transforms.View": "train.data.transforms.View",
    "train.transforms.to_float": "train.data.transforms.to_float",
    "train.transforms.to_item": "train.data.transforms.to_item",
    "train.transforms.to_uint8": "train.data.transforms.to_uint8",
    "train.transforms.training_views": "train.data.transforms.training_views",
    "train.update.update": "train.optim.clip_and_step",
    "train.vqgan_config.VQGANRunConfig": "train.config.VQGANRunConfig",
    "train.vqgan_config.VQGANTrainingConfig": "train.config.VQGANTrainingConfig",
    "vq.Codes": "vq.Quantized",
    "vq.Training": "vq.StepContext",
    "vq.codes.CodeTable": "train.data.code_file.CodeTable",
    "vq.codes.Grids": "train.data.codes.CodeGrids",
    "vq.codes.cache_key": "train.data.code_cache.code_cache_key",
    "vq.entropy.whole_batch": "vq.entropy.mean_over_processes",
    "vq.lecam.LeCAM": "vq.losses.LeCAM",
    "vq.plain_tensors.read_tensors": "vq.weights.read_tensors",
    "vq.quantize.Codes": "vq.quantizers.Quantized",
    "vq.quantize.OneProcess": "vq.quantizers.SingleProcess",
    "vq.quantize.Processes": "vq.quantizers.Collectives",
    "vq.quantize.Quantizer": "vq.quantizers.Quantizer",
    "vq.quantize.Training": "vq.quantizers.StepContext",
    "vq.quantize.make_quantizer": "vq.quantizer.make_quantizer",
    "vq.quantize.nearest": "vq.quantizer.nearest",
    "vq.quantize.per_example": "vq.quantizer.mean_square_per_example",
    "vq.quantize.perplexity": "vq.quantizer.perplexity",
    "vq.quantize.straight_through": "vq.quantizer.straight_through",
    "vq.quantize.usage": "vq.quantizer.usage",
    "vq.quantizer.Codes": "vq.quantizers.Quantized",
    "vq.quantizer.OneProcess": "vq.quantizers.SingleProcess",
    "vq.quantizer.Processes": "vq.quantizers.Collectives",
    "vq.quantizer.Quantizer": "vq.quantizers.Quantizer",
    "vq.quantizer.Training": "vq.quantizers.StepContext",
    "vq.quantizer.count": "vq.quantizer.count_codes",
    "vq.quantizer.highest": "vq.quantizer.argmax_linear",
    "vq.quantizer.looked_up": "vq.quantizer.lookup",
    "vq.quantizer.per_example": "vq.quantizer.mean_square_per_example",
    "vq.quantizer.promoted": "models.sdpa.upcast",
    "vq.quantizers.Codes": "vq.quantizers.Quantized",
    "vq.quantizers.OneProcess": "vq.quantizers.SingleProcess",
    "vq.quantizers.Processes": "vq.quantizers.Collectives",
    "vq.quantizers.Training": "vq.quantizers.StepContext",
}

# Old and new names of weights in a state_dict.
RENAMED_WEIGHTS = {"label.weight": "encoders.label.embedding.weight"}  # of transformers
FEED_FORWARD = re.compile(r"(.*\.)((?:expand|contract)\.(?:weight|bias))")  # a block's own layers, without experts


def current_names(stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Maps the name of each stored weight to its current name: the new name if the network has it and not the old one.

    A user's own network may still use an old name.
    """
    moved = {name: FEED_FORWARD.sub(r"\1feed_forward.\2", name) for name in stored} | RENAMED_WEIGHTS
    renamed = {old: new for old, new in moved.items() if old not in wanted and new in wanted}
    return {name: renamed.get(name, name) for name in stored}


def resolve_class(
    name: str, registered: Mapping[str, Callable], bases: tuple[type, ...], option: str
) -> Callable[..., nn.Module]:
    """Returns the entry of `registered` of that name, or the class at the dotted path `package.module.Class`.

    A user's class must be a concrete subclass of one of `bases`. ValueError lists the choices, or what is wrong.
    """
    if name in registered:
        return registered[name]
    wanted = " or ".join(cls.__name__ for cls in bases)
    choices = f"there are {', '.join(registered)}, and any subclass of {wanted} as package.module.Class"
    if "." not in name:
        raise ValueError(f"got {option} {name!r}: {choices}")
    cls = import_attribute(name, option, choices)
    if not inspect.isclass(cls) or not issubclass(cls, bases):
        reason = "has no such name" if cls is None else f"has {cls!r}, which is no subclass of {wanted}"
        raise ValueError(f"got {option} {name!r}: {name.rpartition('.')[0]} {reason}; {choices}")
    if inspect.isabstract(cls):
        raise ValueError(f"got {option} {name!r}: {cls.__name__} does not define {', '.join(cls.__abstractmethods__)}")
    return cls


def import_attribute(path: str, option: str, remedy: str) -> object | None:
    """Imports `package.module.name`; returns None if the module has no such name.

    ValueError, ending in `remedy`, if there is no such module; for a path that moved it gives the new one.
    """
    if path in MOVED:
        raise ValueError(f"got {option} {path!r}, which is {MOVED[path]} now: use that, also in a run's config.yaml")
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(import_user_module(module_name, f"{option} {path!r}"), name, None)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a dependency of the user's module
        raise ValueError(f"got {option} {path!r}: there is no module {error.name}; {remedy}") from error


def import_user_module(module_name: str, got: str) -> ModuleType:
    """Imports a module that a user may have written; if it imports something that moved, ValueError names the new path.

    `got` is the flag and its value, for the message.
    """
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        name = re.match(r"cannot import name '(\w+)'", str(error))
        missing = f"{error.name}.{name[1]}" if name else str(error.name)
        moved = [new for old, new in MOVED.items() if missing in (old, old.rpartition(".")[0])]
        if not moved:
            raise
        raise ValueError(f"got {got}, which imports {missing}: that is {', '.join(moved)} now") from error


def plugin_names(package: str) -> list[str]:
    """Lists the plug-ins of a package by file name: `--dataset birds` is train/datasets/birds.py."""
    files = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(file.name for file in files if not file.name.startswith("_"))


def load_plugin(package: str, name: str, flag: str) -> ModuleType:
    """Imports the module `<package>.<name>`; ValueError lists the plug-ins if there is none of that name."""
    names = plugin_names(package)
    if name not in names:
        raise ValueError(f"unknown {flag} {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}")
    return import_user_module(f"{package}.{name}", f"{flag} {name!r}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Returns ", did you mean ...?" with the closest of `words`, or "" if none is close."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
