"""Settings and older names of autoencoders in folders of diffusers."""

import pytest
import torch

from train.converters.sd.autoencoder import autoencoder_weights, infer_autoencoder, with_new_names
from train.converters.sd.names import to_layout
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1}


def folder_tensors(**options):
    """Returns the tensors of a small random autoencoder, by their names in a folder."""
    network = AutoencoderKL(AutoencoderKLConfig(**SMALL, **options))
    return to_layout(autoencoder_weights(network), network.state_dict(), "folder")


def test_each_older_name_stands_for_its_own_layer():
    tensors, old = folder_tensors(), {}
    for name, tensor in tensors.items():
        for former, new in OLD_NAMES.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{former}.")
        old[name] = tensor
    assert len(old.keys() - tensors.keys()) == 16
    read = with_new_names(old)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("options", [{}, {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 16}])
@pytest.mark.parametrize("quant_conv", [True, False])
def test_scale_and_shift_are_those_of_the_config(options, quant_conv):
    config = AutoencoderKLConfig(**SMALL, **options, quant_conv=quant_conv)
    written = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    settings = infer_autoencoder(folder_tensors(**options, quant_conv=quant_conv), "folder", written)
    assert AutoencoderKLConfig(**settings) == config


def test_a_config_without_them_scales_as_stable_diffusion():
    settings = infer_autoencoder(folder_tensors(), "folder", {"shift_factor": None})
    assert (settings["scaling_factor"], settings["shift_factor"]) == (0.18215, 0.0)
