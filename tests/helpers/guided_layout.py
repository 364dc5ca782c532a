"""Write weights of our UNet in the layout of guided-diffusion, for tests of the converter."""

import torch

from helpers.labels import label_encoders
from models.blocks import Downsample, ResBlock, Upsample
from models.unet import UNet, UNetConfig

FLAGS = {  # of the reference's scripts, for `build_unet`
    "image_size": 8,
    "num_channels": 8,
    "num_res_blocks": 1,
    "num_heads": 2,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "4",
    "channel_mult": "1,2",
    "dropout": 0.0,
    "class_cond": True,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": True,
    "use_new_attention_order": False,
    "learn_sigma": True,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "cosine",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": True,
    "rescale_learned_sigmas": True,
}


def build_unet(flags, n_classes=10):
    """Our network for reference flags, with all weights nonzero."""
    sizes = [int(size) for size in flags["attention_resolutions"].split(",")]
    mults = tuple(float(mult) for mult in flags["channel_mult"].split(","))
    width = flags["num_head_channels"]
    config = UNetConfig(
        in_channels=1,
        out_channels=2 if flags["learn_sigma"] else 1,
        channels=flags["num_channels"],
        channel_mults=mults,
        res_blocks=flags["num_res_blocks"],
        attn_factors=tuple(8 // size for size in sizes if 8 // size < 2 ** len(mults)),
        heads=flags["num_heads"],
        head_width=None if width == -1 else width,
        resblock_updown=flags["resblock_updown"],
        scale_shift=flags["use_scale_shift_norm"],
    )
    torch.manual_seed(0)
    network = UNet(config, label_encoders(n_classes if flags["class_cond"] else 0, config.emb_dim)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def prefixed_weights(prefix, **modules):
    """State dict of modules under the reference's names; underscores stand for dots."""
    return {
        f"{prefix}{name.replace('_', '.')}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()
    }


def guided_block_weights(prefix, block, num_heads, new_order):
    """One block with the reference's names and shapes."""
    if isinstance(block, Downsample):
        return prefixed_weights(prefix, op=block.conv)
    if isinstance(block, Upsample):
        return prefixed_weights(prefix, conv=block.conv)
    if isinstance(block, ResBlock):
        weights = {f"{prefix}skip_connection.{k}": v for k, v in block.skip.state_dict().items()}
        weights |= {
            f"{prefix}in_layers.{k}": v for k, v in prefixed_weights("", **{"0": block.norm1, "2": block.conv1}).items()
        }
        weights |= {
            f"{prefix}out_layers.{k}": v
            for k, v in prefixed_weights("", **{"0": block.norm2, "3": block.conv2}).items()
        }
        return weights | {f"{prefix}emb_layers.1.{k}": v for k, v in block.embed.state_dict().items()}
    qkv, proj = block.attention.qkv, block.attention.proj
    width = qkv.in_features
    heads = num_heads(width)
    part, head, row = torch.meshgrid(torch.arange(3), torch.arange(heads), torch.arange(width // heads), indexing="ij")
    index = (part * heads + head if new_order else head * 3 + part) * (width // heads) + row  # row in the reference
    weight, bias = torch.empty(3 * width, width, 1), torch.empty(3 * width)
    weight[index.flatten()], bias[index.flatten()] = qkv.weight.detach()[..., None], qkv.bias.detach()
    out = {f"{prefix}qkv.weight": weight, f"{prefix}qkv.bias": bias}
    out |= {f"{prefix}proj_out.weight": proj.weight.detach()[..., None], f"{prefix}proj_out.bias": proj.bias.detach()}
    return out | prefixed_weights(prefix, norm=block.norm)


def to_guided_weights(network, new_order=False):
    """The state dict of the reference for our network."""
    out = prefixed_weights("time_embed.", **{"0": network.time.expand, "2": network.time.contract})
    if "label" in network.encoders:
        out["label_emb.weight"] = network.encoders["label"].embedding.weight.detach()[:-1]
    out |= prefixed_weights("input_blocks.0.", **{"0": network.conv_in})
    stages = {f"input_blocks.{i + 1}": blocks for i, blocks in enumerate(network.down_blocks)}
    stages |= {"middle_block": network.middle_blocks}
    stages |= {f"output_blocks.{i}": blocks for i, blocks in enumerate(network.up_blocks)}
    for prefix, blocks in stages.items():
        for i, block in enumerate(blocks):
            out |= guided_block_weights(f"{prefix}.{i}.", block, network.config.num_heads, new_order)
    return out | prefixed_weights("out.", **{"0": network.norm, "2": network.conv_out})
