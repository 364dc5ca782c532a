"""The text encoders of Stable Diffusion: CLIP's in version 1 and all folders, OpenCLIP's in single files of version 2.

In the table, names of OpenCLIP are those of a single file, names of CLIP those of a folder. Folders of version 2 leave
the last layer out, which is not read; single files have all layers, of which tokens are those of the last but one.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.text_encoder import CHUNK, TextEncoder
from models.tokenizer import Tokenizer, load_vocabulary
from train.converters.sd.names import Layout, Weight, layer

LAYER = (  # ours, OpenCLIP's, CLIP's
    ("norm1", "ln_1", "layer_norm1"),
    ("attention.proj", "attn.out_proj", "self_attn.out_proj"),
    ("norm2", "ln_2", "layer_norm2"),
    ("feed_forward.expand", "mlp.c_fc", "mlp.fc1"),
    ("feed_forward.contract", "mlp.c_proj", "mlp.fc2"),
)
PREFIXES = ("transformer.text_model.", "text_model.", "model.", "")  # the first that a name has
CLIP_SINGLE, CLIP_FOLDER, OPENCLIP = PREFIXES[:3]  # CLIP's in single files and in folders; OpenCLIP's in single files
TOKENS = {"single": "token_embedding.weight", "folder": "embeddings.token_embedding.weight"}
NOT_WEIGHTS = ("embeddings.position_ids", "logit_scale", "attn_mask")  # a buffer, and a number of CLIP's loss
START, END = "<|startoftext|>", "<|endoftext|>"
HEAD_WIDTH = 64  # of all released CLIPs
BUILT = {  # keys of config.json whose values are built here, and which ones
    "attention_dropout": (0.0,),
    "dropout": (0.0,),
    "layer_norm_eps": (1e-5,),
    "hidden_act": ("gelu", "quick_gelu"),
    "max_position_embeddings": (77,),
    "model_type": ("clip_text_model", "clip"),
    **{key: (False,) for key in ("add_cross_attention", "is_decoder", "is_encoder_decoder")},
    "pruned_heads": ({},),
}
OBEYED = {  # keys that are read, follow from the weights, or do not change what is computed
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "initializer_factor", "initializer_range"),
    *("torch_dtype", "dtype", "transformers_version", "_name_or_path", "return_dict", "output_hidden_states"),
}
OF_OTHER_MODELS = {  # keys that older files of CLIP repeat for all models: of generation, classification and training
    *("bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label"),
    *("label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_attentions", "output_scores", "prefix", "problem_type", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params"),
    *("temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k"),
    *("top_p", "torchscript", "typical_p", "use_bfloat16", "use_cache"),
}


class TextTensors(NamedTuple):
    """The tensors of a text encoder, as its table names them."""

    weights: dict[str, Tensor]
    layout: Layout  # "single": OpenCLIP's names
    prefix: str  # that the names had
    rest: dict[str, Tensor]  # no weights, by their names in the file
    bare: tuple[str, ...] = ()  # names that had no prefix, beside others with one

    @property
    def naming(self) -> dict[str, Any]:
        """The arguments of `name_as_in_file` besides the tensors, and the layout."""
        return {"layout": self.layout, "prefix": self.prefix, "bare": list(self.bare)}


def name_as_in_file(tensors: Mapping[str, Tensor], prefix: str, bare: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns tensors by their names in a file, with a prefix except for those in `bare`."""
    return {name if name in bare else prefix + name: tensor for name, tensor in tensors.items()}


def split_text(tensors: Mapping[str, Tensor]) -> TextTensors:
    """Takes the prefix off the names of a file, and what is no weight out of it.

    ValueError for names of two prefixes, and for one name with and without the prefix.
    """
    prefixes = {next(prefix for prefix in PREFIXES if name.startswith(prefix)) for name in tensors} - {""}
    if len(prefixes) > 1:
        names = " and ".join(sorted(prefixes))
        raise ValueError(f"got a text encoder with names of two kinds, {names}: pass the file of one encoder")
    prefix = next(iter(prefixes), "")
    if both := sorted(name for name in tensors if prefix and prefix + name in tensors):
        raise ValueError(f"got a text encoder with {both[0]} and {prefix}{both[0]}: take one of them out of the file")
    own = {name.removeprefix(prefix): name for name in tensors}
    rest = {name: tensors[name] for short, name in own.items() if short in NOT_WEIGHTS}
    weights = {short: tensors[name] for short, name in own.items() if short not in NOT_WEIGHTS}
    bare = tuple(sorted(short for short in weights if prefix and own[short] == short))
    layout = next((layout for layout, name in TOKENS.items() if name in weights), None)
    if layout is None:
        raise ValueError("the text encoder has no embedding of tokens: wanted CLIP's or OpenCLIP's")
    return TextTensors(weights, layout, prefix, rest, bare)


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
    if "text_config" in config:  # CLIP with both of its encoders
        config = {**config["text_config"], **(config.get("text_config_dict") or {})}
    for key, value in config.items():
        if key in BUILT and value not in BUILT[key]:
            raise ValueError(f"got a text encoder with {key} {value!r}, wanted {BUILT[key][0]!r}: there is none here")
        if key not in BUILT and key not in OBEYED and key not in OF_OTHER_MODELS:
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


def unread_weights(encoder: TextEncoder, table: Sequence[Weight]) -> list[Weight]:
    """Returns the weights that no token depends on, which folders of Stable Diffusion leave out: those of the last
    layers, if the tokens are of one before, and of the projection."""
    read = encoder.config.layers + 1 - encoder.config.clip_skip
    starts = ("projection.", *(f"blocks.{index}." for index in range(read, encoder.config.layers)))
    return [weight for weight in table if weight.ours.startswith(starts)]


def single_naming(encoder: TextEncoder) -> dict[str, Any]:
    """Returns the names (see `TextTensors.naming`) of an encoder in a single file of the version that it is of."""
    if encoder.config.activation == "quick_gelu":
        return {"layout": "folder", "prefix": CLIP_SINGLE, "bare": []}
    return {"layout": "single", "prefix": OPENCLIP, "bare": []}


def with_last_layer(tensors: Mapping[str, Tensor], prefix: str, layers: int) -> dict[str, Tensor]:
    """Returns tensors of OpenCLIP's names with one more layer, of zeros, which changes nothing: programs that read a
    single file of version 2 take the tokens of the last layer but one."""
    first, last = (f"{prefix}transformer.resblocks.{index}." for index in (0, layers))
    own = {last + name.removeprefix(first): value for name, value in tensors.items() if name.startswith(first)}
    return {**tensors, **{name: torch.zeros_like(value) for name, value in own.items()}}


def text_config(encoder: TextEncoder) -> dict[str, Any]:
    """Returns the config.json of an encoder in a folder, without its unread weights."""
    config = encoder.config
    return {
        **{"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": config.activation},
        **{"hidden_size": config.width, "intermediate_size": encoder.blocks[0].feed_forward.expand.out_features},
        **{"num_hidden_layers": config.layers + 1 - config.clip_skip, "num_attention_heads": config.heads},
        **{"vocab_size": config.vocab_size, "max_position_embeddings": config.length, "layer_norm_eps": 1e-5},
        **{"bos_token_id": config.end_id - 1, "eos_token_id": config.end_id, "projection_dim": config.width},
    }


def tokenizer_config(pad: str) -> dict[str, Any]:
    """Returns the tokenizer_config.json of a folder; `pad` is the word that fills chunks."""
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CHUNK, "do_lower_case": True}
    return config | {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}


def tokenizer_texts() -> dict[str, str]:
    """Returns the files of CLIP's vocabulary in a folder, by path."""
    vocabulary = load_vocabulary()
    merges = [f"{first} {second}" for first, second in vocabulary.ranks]
    ids = {**vocabulary.ids, START: Tokenizer.end_id - 1, END: Tokenizer.end_id}
    return {
        "tokenizer/vocab.json": json.dumps(ids, ensure_ascii=False),
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }
