"""The text encoders of Stable Diffusion: CLIP's in version 1 and all folders, OpenCLIP's in single files of version 2.

In the table, names of OpenCLIP are those of a single file, names of CLIP those of a folder. Folders of version 2 leave
the last layer out, which is not read; single files have all layers, of which tokens are those of the last but one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from models.text_encoder import TextEncoder
from models.tokenizer import Tokenizer
from train.converters.sd.names import Layout, Weight, layer

LAYER = (  # ours, OpenCLIP's, CLIP's
    ("norm1", "ln_1", "layer_norm1"),
    ("attention.proj", "attn.out_proj", "self_attn.out_proj"),
    ("norm2", "ln_2", "layer_norm2"),
    ("feed_forward.expand", "mlp.c_fc", "mlp.fc1"),
    ("feed_forward.contract", "mlp.c_proj", "mlp.fc2"),
)
PREFIXES = ("transformer.text_model.", "text_model.", "model.", "")  # the first that a name has
TOKENS = {"single": "token_embedding.weight", "folder": "embeddings.token_embedding.weight"}
NOT_WEIGHTS = ("embeddings.position_ids", "logit_scale", "attn_mask")  # a buffer, and a number of CLIP's loss
HEAD_WIDTH = 64  # of all released CLIPs
BUILT = {  # keys of config.json whose values are built here, and which ones
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "layer_norm_eps": (1e-5,),
    "hidden_act": ("gelu", "quick_gelu"),
    "max_position_embeddings": (77,),
    "model_type": ("clip_text_model", "clip"),
}
OBEYED = {  # keys that are read, follow from the weights, or do not change what is computed
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "initializer_factor", "initializer_range"),
    *("torch_dtype", "dtype", "transformers_version", "_name_or_path", "return_dict", "output_hidden_states"),
}


class TextTensors(NamedTuple):
    """The tensors of a text encoder, as its table names them."""

    weights: dict[str, Tensor]
    layout: Layout  # "single": OpenCLIP's names
    prefix: str  # that the names had
    rest: dict[str, Tensor]  # no weights, with their prefix


def split_text(tensors: Mapping[str, Tensor]) -> TextTensors:
    """Takes the prefix off the names of a file, and what is no weight out of it."""
    prefixes = {next(prefix for prefix in PREFIXES if name.startswith(prefix)) for name in tensors}
    prefix = min(prefixes - {""}, key=PREFIXES.index, default="")
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    rest = {prefix + name: tensor for name, tensor in own.items() if name in NOT_WEIGHTS}
    weights = {name: tensor for name, tensor in own.items() if name not in NOT_WEIGHTS}
    layout = next((layout for layout, name in TOKENS.items() if name in weights), None)
    if layout is None:
        raise ValueError("the text encoder has no embedding of tokens: wanted CLIP's or OpenCLIP's")
    return TextTensors(weights, layout, prefix, rest)


def text_weights(encoder: TextEncoder) -> list[Weight]:
    """Returns the table of a text encoder, for names without prefix."""
    weights = [
        Weight("token.weight", (TOKENS["single"],), (TOKENS["folder"],)),
        Weight("position", ("positional_embedding",), ("embeddings.position_embedding.weight",)),
    ]
    for index in range(encoder.config.layers):
        ours, single, folder = (f"{name}.{index}" for name in ("blocks", "transformer.resblocks", "encoder.layers"))
        for leaf in ("weight", "bias"):
            inputs = tuple(f"{folder}.self_attn.{each}_proj.{leaf}" for each in "qkv")
            weights.append(Weight(f"{ours}.attention.qkv.{leaf}", (f"{single}.attn.in_proj_{leaf}",), inputs))
        for own, inside, outside in LAYER:
            weights += layer(f"{ours}.{own}", f"{single}.{inside}", f"{folder}.{outside}")
    weights += layer("norm", "ln_final", "final_layer_norm")
    if encoder.config.projection:
        names = (("text_projection",), ("text_projection.weight",))
        weights.append(Weight("projection.weight", *names, single_transposed=True))
    return weights


def infer_text(text: TextTensors, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings of a `TextEncoderConfig` from the shapes of its tensors, and the `config` of a folder.

    Without a config, CLIP's activation is quick_gelu and its tokens are those of the last layer; OpenCLIP's are gelu
    and the last layer but one. Heads are 64 wide. ValueError for settings that are not built here.
    """
    config = config or {}
    for key, value in config.items():
        if key in BUILT and value not in BUILT[key]:
            raise ValueError(f"got a text encoder with {key} {value!r}, wanted {BUILT[key][0]!r}: there is none here")
        if key not in BUILT and key not in OBEYED:
            raise ValueError(f"got a text encoder with an unknown setting {key} ({value!r}): take it out of its JSON")
    is_open, tokens = text.layout == "single", text.weights[TOKENS[text.layout]]
    projection = text.weights.get("text_projection" if is_open else "text_projection.weight")
    ending = ".ln_1.bias" if is_open else ".layer_norm1.bias"
    vocab_size, width = tokens.shape
    end_id = config.get("eos_token_id", Tokenizer.end_id)
    return {
        "width": width,
        "layers": sum(name.endswith(ending) for name in text.weights),
        "heads": config.get("num_attention_heads", max(1, width // HEAD_WIDTH)),
        "vocab_size": vocab_size,
        "end_id": Tokenizer.end_id if end_id == 2 else end_id,  # 2: files made before ids of their own were kept
        "activation": config.get("hidden_act", "gelu" if is_open else "quick_gelu"),
        "clip_skip": 2 if is_open else 1,
        "projection": 0 if projection is None else projection.shape[1 if is_open else 0],
    }
