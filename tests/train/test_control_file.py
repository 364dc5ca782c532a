"""Control branches as files: read as they were written, and damaged ones refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny_sd import UNET, tiny_control, write_control_folder
from models.conditioning import Condition, Tokens
from train.config import FineTuningConfig
from train.control_file import HEADER, read_control, read_control_header, save_control, with_hint_of_file
from train.converters.sd.files import read_source
from train.converters.sd.runs import load_control
from train.data.hints import HintsConfig


@pytest.fixture
def file(tmp_path):
    write_control_folder(tmp_path / "folder")
    save_control(*load_control(read_source(tmp_path / "folder")), tmp_path / "control.safetensors")
    return tmp_path / "control.safetensors"


def read_header(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()[HEADER])


def write(file, header=None, tensors=None):
    """Writes the file again with another header, or other tensors."""
    tensors, header = tensors or load_file(file), read_header(file) if header is None else header
    save_file(tensors, file, {HEADER: json.dumps(header)})


def test_training_may_start_from_a_converted_branch(file):
    """Its settings of the hint are taken over; it knows no kind of hints, and no base."""
    config = FineTuningConfig(control="edges", load_control=str(file))
    settings, _ = read_control_header(file)
    hint = with_hint_of_file(config, HintsConfig()).hint
    assert (hint.hint_channels, hint.hint_factor) == (3, settings["hint_factor"])
    assert hint.hint_widths == settings["hint_widths"]
    with pytest.raises(ValueError, match="got hint_channels 1 .* whose branch has 3: leave --hint_channels out"):
        with_hint_of_file(replace(config, hint_channels=1), HintsConfig())


@torch.no_grad()
def test_a_branch_is_read_as_it_was_written(file):
    branch, (settings, origin) = read_control(file), read_control_header(file)
    assert branch.config.channel_mults == UNET["channel_mults"] and branch.config.heads == 4
    assert not branch.training and {p.dtype for p in branch.parameters()} == {torch.float32}
    assert (origin.layout, origin.dtype, origin.prefixed) == ("folder", "float16", False)
    assert settings["text_width"] == 64
    x, hint = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 32, 32)
    condition = Condition({"text": Tokens(torch.randn(2, 5, 64))})
    residuals = branch(x, torch.ones(2), condition, hint)
    assert len(residuals) == branch.outputs == 5 and all(each.std() > 0 for each in residuals)
    weight = tiny_control("folder")["controlnet_mid_block.weight"].float()
    assert torch.equal(branch.middle_zero_conv.weight, weight)


def test_settings_that_name_code_are_refused(file):
    header = read_header(file)
    header["settings"]["attn_block_type"] = "os.system"
    write(file, header)
    with pytest.raises(ValueError, match="no settings of a control branch in its header"):
        read_control(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["settings"].pop("channels"), "no settings of a control branch"),
        (lambda header: header["settings"].update(channels="32"), "no settings of a control branch"),
        (lambda header: header["settings"].update(channels=64), "does not fit its own settings, in conv_in.bias"),
        (lambda header: header["origin"].pop("dtype"), "does not say what it was converted from"),
        (lambda header: header.clear(), "no settings of a control branch"),
    ],
)
def test_damaged_headers_are_refused(file, change, message):
    header = read_header(file)
    change(header)
    write(file, header)
    with pytest.raises(ValueError, match=message):
        read_control(file)


def test_other_files_are_refused(file, tmp_path):
    tensors = load_file(file)
    tensors["extra"] = torch.ones(1)
    write(file, tensors=tensors)
    with pytest.raises(ValueError, match="does not fit its own settings, in extra"):
        read_control(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        read_control(file)
    with pytest.raises(FileNotFoundError, match="not found: pass the file that convert.py"):
        read_control(tmp_path / "gone.safetensors")
