"""Convert weights of other code to a run, or a run back. `python convert.py --from sd --weights PATH --help`"""

import sys
from typing import Any

from train.cli.errors import one_line_errors
from train.cli.parse import BaseSettings, run_script
from train.cli.values import peek_flag
from train.conversions import ConversionConfig, Layout, NetworkConversion, SamplerConversion, VQGANConversion
from train.converters.sd.export import ExportConfig, export_run
from train.registry import load_plugin


def find_layout(name: str) -> Layout:
    """Returns the file of train/conversions for a layout."""
    return load_plugin("train.conversions", name, "layout")


def config_class(argv: list[str]) -> type:
    """Returns the config class for the kind of network of the weights, or of an export."""
    if peek_flag(argv, "to") is not None:
        return ExportConfig
    if peek_flag(argv, "weights") is None:
        return SamplerConversion
    return find_layout(peek_flag(argv, "from") or ConversionConfig.source).config_class(argv)


def flags_from_weights(argv: list[str], section: str) -> BaseSettings:
    """Returns the flags that follow from the weights and their JSON; typed flags override them."""
    values: dict[str, Any] = {}
    if peek_flag(argv, "to") is None:
        layout = find_layout(peek_flag(argv, "from") or ConversionConfig.source)
        named = peek_flag(argv, "weights") is not None
        values = layout.flags_from_weights(argv, section) if named else {"sampler": "ddpm"}
    return BaseSettings(values, "the weights")


def main(config: SamplerConversion | VQGANConversion | NetworkConversion | ExportConfig) -> None:
    if isinstance(config, ExportConfig):
        export_run(config)
    elif config.conversion.weights is None:
        raise ValueError("got no weights: pass --weights PATH.pt, and their flags as --config_json PATH.json")
    else:
        find_layout(config.conversion.source).make_runs(config)


if __name__ == "__main__":
    with one_line_errors("convert.py"):
        config = config_class(sys.argv[1:])
    run_script(main, config, section="convert", base_values=flags_from_weights)
