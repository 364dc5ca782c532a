"""The frozen list of flags: it changes only on purpose."""

import yaml

from helpers.tiny_runs import ROOT
from models.conditions import boxes, layout, numbers
from train.cli import parse as cli
from train.cli.plugins import PLUGIN_GROUPS
from train.config import DataConfig, FineTuningConfig, LoggingConfig, TrainingConfig
from train.control import ControlSampling
from train.data.hints import HintsConfig
from train.datasets import DatasetConfig
from train.registry import plugin_names
from train.samplers import absorbing, ddpm
from train.samplers._transformer import TransformerConfig
from vq.config import VQGANConfig, VQGANLossConfig
from vq.quantizers import QuantizerConfig

QUANTIZERS = PLUGIN_GROUPS[QuantizerConfig]


def test_the_flags_of_data_and_stage_one_are_frozen():
    """Flags are a public interface: this list changes only on purpose."""
    assert cli.flag_names(DataConfig) == {
        *("dataset", "reader", "img_size", "img_width", "n_channels", "horizontal_flip", "shift", "crop_margin"),
        *("in_memory", "cache_images", "num_workers", "prefetch", "data_range", "patches"),
        *("captions", "subset"),
    }
    assert cli.flag_names(DatasetConfig) == {"data_dir", "val_fraction", "split_seed", "max_pixels", "class_names"}
    assert cli.flag_names(VQGANConfig) == {
        *("nf", "ch_mult", "res_blocks", "attn_resolutions", "quantizer", "codebook_size", "emb_dim", "unit_range"),
    }
    entropies = {"beta", "entropy_weight", "entropy_temperature"}
    assert {name: cli.flag_names(QUANTIZERS.config_of(name)) for name in plugin_names("vq.quantizers")} == {
        **{"nearest": {"beta", "legacy_beta"}, "ema": {"beta", "codebook_decay", "revive_below"}, "l2": {"beta"}},
        **{"fsq": {"fsq_levels"}, "lfq": entropies, "ibq": entropies},
        "gumbel": {"gumbel_kl_weight", "gumbel_straight_through", "gumbel_decay_steps"},
    }
    assert cli.flag_names(VQGANLossConfig) == {
        *("recon_loss", "recon_weight", "perceptual_net", "perceptual_weights", "perceptual_weight"),
        *("disc_start_step", "disc_warmup_steps", "disc_ramp_steps", "disc_loss", "disc_weight", "adaptive_weight"),
        *("disc_weight_max", "lecam_weight", "disc_layers", "ndf", "disc_norm", "disc_spectral_norm", "disc_blur"),
        "diff_aug",
    }


def test_the_flags_of_samplers_and_training_are_frozen():
    assert cli.flag_names(LoggingConfig) == {
        *("log_dir", "logs_root", "steps_per_log", "steps_per_checkpoint", "steps_per_save_output", "steps_per_eval"),
        *("checkpoint_minutes", "keep_last", "keep_every", "steps_per_FD", "FD_samples", "FD_features", "profile"),
        *("FD_measures", "clip_dir", "logger"),
    }
    assert cli.flag_names(TransformerConfig) == {
        *("sampler", "bert_n_emb", "bert_n_head", "bert_n_layers", "mlp_ratio", "attention", "kernel_sizes"),
        *("dilations", "na_backend", "attention_type", "position", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("qk_norm", "zero_init", "tied_head", "vectors_into", "class_conditional", "label_drop"),
        *("conditions", "condition_drop", "foreground", "foreground_weight", "foreground_norm"),
        *("experts", "expert_rule", "router_experts", "router_top", "router_rate"),
    }
    assert cli.flag_names(absorbing.Config) - cli.flag_names(TransformerConfig) == {
        *("loss_type", "mask_schedule", "schedule", "total_steps", "time_sampler"),
    }
    assert cli.flag_names(ddpm.Config) == {
        *("sampler", "process", "total_steps", "schedule", "first_beta", "last_beta", "zero_terminal_snr"),
        *("prediction", "variance", "loss_type", "min_snr_gamma", "time_sampler", "time_embedding", "time_scale"),
        *(
            "sigma_data",
            "time_mean",
            "time_deviation",
            "time_shift",
            "channels",
            "channel_mults",
            "res_blocks",
            "attn_factors",
        ),
        *("heads", "head_width", "dropout", "resblock_updown", "scale_shift", "scale_skip"),
        *("res_block_type", "attn_block_type", "middle_attn_block_type"),
        *("kernel_sizes", "dilations", "na_backend", "transformer_attention", "feed_forward"),
        *("qkv_bias", "transformer_eps", "attn_places"),
        *("region_attention", "overlap", "region_places"),
        *("class_conditional", "label_drop", "conditions", "condition_drop", "adapt"),
        *("foreground", "foreground_weight", "foreground_norm"),
        *("experts", "expert_rule", "router_experts", "router_top", "router_rate"),
    }
    control = {"hint", "hint_ready", "control_strength", "control_guess", "control_middle_only"}
    assert cli.flag_names(ControlSampling) == control
    assert cli.flag_names(absorbing.Sampling) - control == {
        *("solver", "sample_steps", "guidance", "condition_file", "metadata", "class_sampling", "guidance_schedule"),
        *("guidance_interval", "image_guidance", "region_guidance", "reveal"),
        *("temp", "last_temp", "top_k", "top_p", "choice_temp", "remasking", "remask_eta"),
    }
    assert cli.flag_names(ddpm.Sampling) - control == {
        *(
            "solver",
            "sample_steps",
            "guidance",
            "image_guidance",
            "region_guidance",
            "condition_file",
            "metadata",
            "class_sampling",
            "spacing",
            "rho",
            "sigma_min",
            "sigma_max",
            "eta",
            "s_churn",
            "s_tmin",
            "s_tmax",
            "s_noise",
            "guidance_interval",
            *("guidance_rescale", "guidance_rescale_of", "steps_offset", "last_state"),
            "clip",
        ),
        *(
            "dynamic_threshold",
            "guidance_rescale_of",
            "last_state",
            "steps_offset",
            "repaint_jump",
            "repaint_resamplings",
        ),
    }
    assert cli.flag_names(TrainingConfig) == {
        *("train_steps", "batch_size", "accumulate", "lr", "warmup_iters", "weight_decay", "grad_clip", "amp"),
        *("ema", "ema_beta", "seed", "device", "load_dir", "load_step", "load_optim"),
        *("load_partial", "train_only", "balance_classes"),
        *("optimizer", "betas", "lr_schedule", "decay_steps", "lr_end", "amp_dtype", "max_bad_steps", "ema_profiles"),
        *("steps_per_ema_snapshot", "parallel", "timeout_minutes", "compile", "channels_last", "tf32"),
        *("activation_checkpointing", "deterministic", "hooks", "resume", "change"),
    }
    assert cli.flag_names(FineTuningConfig) == {
        *("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "dora", "lora_trigger_words", "lr_scale", "save"),
        *("differential", "differential_in", "lora_rank_of", "text_new_tokens"),
        *("control", "control_lock", "load_control", "hint_channels", "hint_widths", "hint_factor"),
    }
    assert cli.flag_names(HintsConfig) == {"condition_image", "edge_sigma", "edge_thresholds", "small_factor"}


def test_the_flags_of_boxes_and_layouts_are_frozen():
    options = ("classes", "colors", "frequencies", "everywhere", "gated", "width")
    assert cli.flag_names(boxes.Config) == {f"boxes_{name}" for name in options}
    options = ("fields", "ranges", "preset", "field_drop", "width")
    assert cli.flag_names(numbers.Config) == {f"numbers_{name}" for name in options}
    options = ("classes", "regions", "places", "colors", "into")
    assert cli.flag_names(layout.Config) == {f"layout_{name}" for name in options}


def test_registries_list_plugin_files():
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "folder", "lsun"} <= set(plugin_names("train.datasets"))
    regions = {"coco", "visual_genome", "nuimages", "celebamask", "panoptic_folder", "semantic", "yolo", "layout_lines"}
    assert regions | {"captions", "xbd", "fmow", "pairs"} <= set(plugin_names("train.datasets"))
    assert plugin_names("train.samplers") == ["absorbing", "autoregressive", "ddpm"]
    assert set(yaml.safe_load((ROOT / "datasets.yaml").read_text())) >= {"ffhq", "churches", "bedrooms", "faces140k"}
