"""Old dotted paths of public classes are errors that name the new paths."""

import importlib
import re
import sys

import pytest

import train.datasets
from helpers.tiny_runs import DDPM, ROOT, call
from models.blocks import EmbedBlock
from models.registry import MOVED, resolve_class
from train import registry
from train.identity import run_identity
from train.registry import import_callable


@pytest.mark.parametrize("new", sorted(set(MOVED.values())))
def test_moved_names_exist_at_their_new_paths(new):
    module, _, name = new.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_an_error_that_names_the_new_one(old):
    with pytest.raises(ValueError, match=re.escape(MOVED[old])):
        import_callable(old, "--hooks")
    with pytest.raises(ValueError, match=re.escape(MOVED[old])):
        resolve_class(old, {}, (EmbedBlock,), "res_block_type")


def test_importing_an_old_module_names_the_new_ones(tmp_path, monkeypatch):
    (tmp_path / "my_blocks.py").write_text("from models.attention_block import SelfAttentionBlock\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imports models.attention_block.*models.unet_attention.SelfAttentionBlock"):
        resolve_class("my_blocks.Mine", {}, (EmbedBlock,), "res_block_type")


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("from train.data import ImageSource", "train.data.loading.ImageSource"),
        ("from models.blocks import AttentionBlock", "vq.autoencoder.AttentionBlock"),
        ("from train.images import decode", "train.datasets._decode.decode"),
    ],
)
def test_importing_a_moved_name_names_the_new_path(line, new, tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_hooks", raising=False)
    with pytest.raises(ValueError, match=rf"my_hooks.Mine', which imports .*{re.escape(new)}.* now"):
        import_callable("my_hooks.Mine", "--hooks")


def test_a_data_set_importing_an_old_module_names_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "birds.py").write_text("from train.images import decode\n")
    monkeypatch.setattr(registry, "plugin_names", lambda package: ["birds"])
    monkeypatch.setattr(train.datasets, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match="data set 'birds', which imports train.images.*train.datasets._decode.decode"):
        registry.load_plugin("train.datasets", "birds", "data set")


def test_other_import_errors_are_not_changed(tmp_path, monkeypatch):
    (tmp_path / "their_hooks.py").write_text("from math import no_such_function\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no_such_function"):
        import_callable("their_hooks.Mine", "--hooks")


def test_a_run_with_an_old_path_resumes_with_the_new_one():
    old, new = "models.attention_block.SelfAttentionBlock", "models.unet_attention.SelfAttentionBlock"
    assert run_identity({"sampler": {"attn_block_type": old}}) == run_identity({"sampler": {"attn_block_type": new}})
    assert run_identity({"sampler": {"attn_block_type": old}}) != run_identity({"sampler": {"attn_block_type": "my.B"}})


def test_a_flag_with_an_old_path_is_a_one_line_error(tmp_path, capfd):
    flags = f"--logs_root {tmp_path} {DDPM} --attn_block_type models.attention_block.SelfAttentionBlock"
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", flags)
    message = capfd.readouterr().err
    assert stop.value.code == 2 and "which is models.unet_attention.SelfAttentionBlock now" in message


def test_the_documentation_has_the_same_list():
    text = (ROOT / "docs" / "moved.md").read_text()
    assert dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text, re.M)) == MOVED
