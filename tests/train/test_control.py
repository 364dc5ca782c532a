"""Runs with a control branch: what learns, what is saved, and how files of branches are sampled with."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.edit import Target, make_sides
from experiments.harness.edit_methods import EditingConfig
from experiments.harness.editing import InputImages
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.run_asserts import saved_state, weights
from helpers.tiny_runs import DDPM, call
from models.control import HintConfig
from train.config import FineTuningConfig, TrainingConfig
from train.control_file import HEADER, add_start_of_branch, with_hint_of_file
from train.data.hints import HINTS, HintMaker, HintsConfig
from train.files import sha256
from train.finetuning import START_OF_BRANCH, find_base
from train.hint_files import combine_rows
from train.inference import load
from train.runs import read_run
from train.samplers.ddpm import Sampling

RUN = f"{DDPM} --dataset digits --no_amp --lr 1e-2 --steps_per_eval 0 --keep_last 0 --steps_per_log 1"
CONTROL = "--control grey --hint_widths 4 6"
SAMPLING = {"sample_steps": 2, "seed": 1}


def train(logs, name, flags):
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} {RUN} --steps_per_checkpoint 1 {flags}")
    return logs / name


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `base`, 3 steps, and `grey`, a branch that was trained beside it for 3 steps."""
    logs = tmp_path_factory.mktemp("control")
    train(logs, "base", "--train_steps 3 --warmup_iters 0 --lr 0.1")  # its last layer is far from 0
    train(logs, "grey", f"--train_steps 3 --load_dir base {CONTROL}")
    return logs


@pytest.fixture(scope="module")
def strong(logs):
    """A file of the branch of `grey` with more weight of the hint than it learns in 3 steps."""
    tensors, generator = load_file(logs / "grey/control.safetensors"), torch.Generator().manual_seed(0)
    for key, value in tensors.items():
        if "hint." in key or "zero_conv" in key:
            value += torch.randn(value.shape, generator=generator)
    with safe_open(logs / "grey/control.safetensors", "pt") as content:
        save_file(tensors, logs / "strong.safetensors", content.metadata())
    return logs / "strong.safetensors"


def opened(logs, name, **keywords):
    return load(logs / name, amp=False, device="cpu", **keywords)


def state_of(run):
    return run.model.sampler.network.state_dict()


def near(one, other):
    """Whether images are equal, up to the rounding of pixels."""
    return (one.int() - other.int()).abs().max() <= 1


HINTS_OF_TWO = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_checkpoints_hold_the_branch_alone(logs, file):
    saved = weights(logs / "grey", 3, file)
    assert saved and all(key.startswith("network.control.hint.") for key in saved)
    assert any(value.any() for key, value in saved.items() if "zero_conv" in key)  # it has learned


def test_the_base_is_unchanged_to_the_bit(logs, tmp_path):
    train(tmp_path, "full", f"--train_steps 3 --load_dir {logs}/base {CONTROL} --save full")
    base, apart = weights(logs / "base", 3, "ema.safetensors"), weights(logs / "grey", 3)
    for file in ("model.safetensors", "ema.safetensors"):
        saved = weights(tmp_path / "full", 3, file)
        assert saved.keys() == base.keys() | apart.keys()
        assert all(torch.equal(saved[key], value) for key, value in base.items())
    loaded = state_of(opened(logs, "grey"))
    assert {f"network.{key}" for key in loaded} == saved.keys()
    assert all(torch.equal(loaded[key.removeprefix("network.")], value) for key, value in base.items())


@pytest.mark.parametrize("flags", [CONTROL, f"{CONTROL} --no_control_lock", f"{CONTROL} --train_only conv_out"])
def test_a_resumed_run_is_an_uninterrupted_one(logs, tmp_path, flags):
    names = ("stopped", "whole")
    for name, steps in zip((*names, names[0]), (1, 3, 3), strict=True):
        train(tmp_path, name, f"--train_steps {steps} --lr_schedule constant --load_dir {logs}/base {flags}")
    for file in ("model.safetensors", "ema.safetensors"):
        one, other = (weights(tmp_path / name, 3, file) for name in names)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    moments = [saved_state(tmp_path / name, 3)["optimizers"]["network"]["state"] for name in names]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[1])
    learned = {"network.conv_out.weight", "network.conv_out.bias"} if "train_only" in flags else set()
    others = {key for key in one if not key.startswith("network.control.")}
    assert others == learned or "no_control_lock" in flags and others == weights(logs / "base", 3).keys()
    assert (tmp_path / "whole" / "control.safetensors").is_file() is (flags == CONTROL)  # it is for its base alone


def test_the_settings_of_the_hint_are_saved_and_taken_over(logs, tmp_path, capsys):
    train(tmp_path, "grey", f"--train_steps 1 --load_dir {logs}/base --control grey")
    call("train_sampler.py", f"--logs_root {tmp_path} --log_dir grey --train_steps 2 --change lr")
    branch = opened(tmp_path, "grey").model.sampler.network.control["hint"]
    assert branch.hint_config == HintConfig(hint_channels=1, hint_widths=(16, 32), hint_factor=1)


def test_a_file_beside_its_base_samples_as_its_run(logs):
    run, file = opened(logs, "grey"), logs / "grey/control.safetensors"
    both = opened(logs, "base", control={file: 1.0})
    assert both.conditions == run.conditions == ("label", "hint_image")
    assert all(torch.equal(value, state_of(run)[key]) for key, value in state_of(both).items())
    images = [each.sample(2, hint_image=HINTS_OF_TWO, label=3, **SAMPLING) for each in (run, both)]
    assert near(*images)
    assert near(both.sample(2, label=3, **SAMPLING), run.sample(2, label=3, **SAMPLING))  # held-out hints


def test_strengths_multiply_what_branches_add(logs, strong):
    file, given = strong, {"hint_image": HINTS_OF_TWO, "label": 3}
    plain = opened(logs, "base").sample(2, label=3, **SAMPLING)
    assert near(opened(logs, "base", control={file: 0.0}).sample(2, **given, **SAMPLING), plain)
    strong = opened(logs, "base", control={file: 4.0}).sample(2, **given, **SAMPLING)
    assert not near(strong, plain)
    run = opened(logs, "base", control={file: 2.0})
    assert near(run.sample(2, **given, **SAMPLING, control_strength=[2.0]), strong)
    assert near(run.sample(2, **given, **SAMPLING, control_strength=[2.0] * 5), strong)
    middle = run.sample(2, **given, **SAMPLING, control_strength=[2.0], control_middle_only=True)
    assert near(middle, run.sample(2, **given, **SAMPLING, control_strength=[0, 0, 0, 0, 2.0]))
    assert not near(middle, strong)


def test_two_files_have_a_hint_each(logs, strong, tmp_path):
    file, copy = strong, tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    one, two = (opened(logs, "base", control=files) for files in ({file: 2.0}, {file: 1.0, copy: 1.0}))
    assert two.conditions == ("label", "hint_image", "hint_2_image")
    single = one.sample(2, hint_image=HINTS_OF_TWO, label=3, **SAMPLING)
    hints = {"hint_image": HINTS_OF_TWO, "hint_2_image": HINTS_OF_TWO}
    same = two.sample(2, **hints, label=3, **SAMPLING)
    assert near(same, single)
    others = two.sample(2, **hints | {"hint_2_image": 255 - HINTS_OF_TWO}, label=3, **SAMPLING)
    assert not near(others, same)
    assert len({opened(logs, "base").model.weights, one.model.weights, two.model.weights}) == 3


def test_branches_of_other_weights_are_refused(logs, tmp_path):
    file = logs / "grey/control.safetensors"
    with pytest.raises(ValueError, match="was trained on weights with SHA-256"):
        opened(logs, "base", ema=False, control={file: 1.0})
    with pytest.raises(FileNotFoundError, match="gone.safetensors not found"):
        opened(logs, "base", control={tmp_path / "gone.safetensors": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["settings"].update(hint_widths=[4, 8]), "does not fit the network, in hint.convs"),
        (lambda header: header["settings"].update(code="os.system"), "has a damaged header"),
        (lambda header: header["trained"].pop("base"), "has a damaged header"),
        (lambda header: header["trained"].update(kind="depth"), "got hints of kind 'depth', there are: edges"),
        (
            lambda header: header["trained"]["hint_options"].update(edge_sigma=-1),
            "has a damaged header .got edge_sigma",
        ),
        (lambda header: header.update(settings=None), "has a damaged header"),
        (lambda header: header.clear(), "no settings of a control branch"),
    ],
)
def test_damaged_files_are_refused(logs, tmp_path, change, message):
    source, file = logs / "grey/control.safetensors", tmp_path / "damaged.safetensors"
    with safe_open(source, "pt") as content:
        header = json.loads(content.metadata()[HEADER])
    change(header)
    save_file(load_file(source), file, {HEADER: json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        opened(logs, "base", control={file: 1.0})


def test_pictures_become_hints_in_turn(logs, strong, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(HINTS_OF_TWO):
        Image.fromarray(picture[0].numpy()).save(tmp_path / f"pictures/{i}.png")
    run = opened(logs, "base", control={strong: 1.0})
    expected = run.sample(3, hint_image=HINTS_OF_TWO[[0, 1, 0]], label=3, **SAMPLING)
    for ready in (False, True):  # a grey picture is its own grey hint
        given = {"hint": [str(tmp_path / "pictures")], "hint_ready": ready}
        assert near(run.sample(3, **given, label=3, **SAMPLING), expected)
    Image.fromarray(HINTS_OF_TWO[0, 0].numpy()).convert("RGB").save(tmp_path / "colour.png")  # for a grey hint
    colour = run.sample(1, hint=[str(tmp_path / "colour.png")], hint_ready=True, label=3, **SAMPLING)
    assert near(colour, expected[:1])
    with pytest.raises(ValueError, match="got 2 paths as --hint for 1 control branches, wanted one for each"):
        run.sample(1, hint=[str(tmp_path)] * 2)
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        run.sample(1, hint=[str(logs)])
    with pytest.raises(ValueError, match="got hint for a model without a control branch: leave --hint out"):
        opened(logs, "base").sample(1, hint=[str(tmp_path / "pictures")])


def test_rows_and_hints_are_both_used_in_turn():
    rows, hints = [{"label": i} for i in range(2)], [{"hint_image": i} for i in range(3)]
    both = combine_rows(rows, hints)
    assert [(row["label"], row["hint_image"]) for row in both] == [(0, 0), (1, 1), (0, 2), (1, 0), (0, 1), (1, 2)]
    assert combine_rows(rows, []) == rows and combine_rows([], hints) == hints


def test_a_null_source_of_an_edit_keeps_the_hint(logs, tmp_path):
    Image.fromarray(HINTS_OF_TWO[0, 0].numpy()).save(tmp_path / "hint.png")
    model = load_model(ModelConfig(sampler="ddpm", load_dir="grey"), OutputConfig(logs_root=str(logs), amp=False))
    inputs = InputImages(HINTS_OF_TWO, torch.zeros(2, 8, 8, dtype=torch.bool), ("a", "b"))
    options = Sampling(hint=(str(tmp_path / "hint.png"),), guidance=2.0)
    settings, targets = EditingConfig(method="flowedit", label=(3,)), [Target("3", "as_3", ({"label": 3},), 3)]
    source, target = make_sides(inputs, targets, settings, options, model, [0, 1])
    assert source.conditions["label"].tolist() == [10, 10] and target.conditions["label"].tolist() == [3, 3]
    assert torch.equal(source.conditions["hint_image"], target.conditions["hint_image"])
    assert source.options.guidance == 1


def test_experiments_sample_with_files_of_branches(logs, strong, tmp_path):
    Image.fromarray(HINTS_OF_TWO[0, 0].numpy()).save(tmp_path / "hint.png")
    images, file = [], strong
    for flags in ("", f"--control_files {file}=0", f"--control_files {file}", f"--control_files {file} --hint"):
        flags += f" {tmp_path}/hint.png" if flags.endswith("--hint") else ""
        out = tmp_path / f"samples{len(images)}"
        common = f"--logs_root {logs} --sampler ddpm --load_dir base --log_dir {out} --n_samples 2 --sample_steps 2"
        call("experiments/get_samples.py", f"{common} --no_amp --class_sampling data {flags}")
        images.append(np.load(out / "samples.npz")["arr_0"])
    assert not np.array_equal(images[1], images[2]) and not np.array_equal(images[2], images[3])
    run = opened(logs, "base", control={file: 1.0})
    labels = np.load(out / "samples.npz")["labels"]
    again = run.sample(2, hint_image=HINTS_OF_TWO[0], label=labels.tolist(), sample_steps=2)
    assert near(again.permute(0, 2, 3, 1), torch.from_numpy(images[3]))


def test_a_file_says_how_its_hints_are_made(logs, tmp_path):
    source, file = logs / "grey/control.safetensors", tmp_path / "edges.safetensors"
    with safe_open(source, "pt") as content:
        header = json.loads(content.metadata()[HEADER])
    assert header["trained"]["kind"] == "grey" and header["trained"]["hint_options"]["small_factor"] == 4
    header["trained"] |= {"kind": "edges", "hint_options": {"edge_sigma": 2.0, "edge_thresholds": [0.2, 0.3]}}
    save_file(load_file(source), file, {HEADER: json.dumps(header)})
    model = opened(logs, "base", control={source: 1.0, file: 1.0}).model
    options = HintsConfig(edge_sigma=2.0, edge_thresholds=(0.2, 0.3))
    assert model.hint_makers == {"hint_image": HintMaker("grey"), "hint_2_image": HintMaker("edges", options)}
    batch = model.batches("val")[[0, 1]]
    assert torch.equal(batch["hint_image"], batch["image"]) and batch["hint_2_image"].unique().tolist() == [-1, 1]


def one_line(text):
    """An error as one line, without the frame around errors of the command line."""
    return " ".join(text.replace("│", " ").split())


def test_a_branch_starts_from_the_weights_of_a_file(logs, strong, tmp_path):
    copy = tmp_path / "strong.safetensors"
    copy.write_bytes(strong.read_bytes())
    run = train(
        tmp_path, "more", f"--train_steps 1 --lr 1e-300 --load_dir {logs}/base --control grey --load_control {copy}"
    )
    for file in ("model.safetensors", "ema.safetensors"):
        saved = {key.removeprefix("network.control.hint."): each for key, each in weights(run, 1, file).items()}
        assert saved.keys() == load_file(strong).keys()
        assert all(torch.equal(saved[key], value) for key, value in load_file(strong).items())
    content = read_run(run)
    assert content["fine_tuning"]["hint_widths"] == [4, 6] and content["origin"][START_OF_BRANCH] == sha256(strong)
    copy.unlink()  # the checkpoint has the branch
    moved = "--load_control moved.safetensors"
    call("train_sampler.py", f"--logs_root {tmp_path} --log_dir more --train_steps 3 --change lr --lr 1e-2 {moved}")
    learned = weights(run, 3)["network.control.hint.middle_zero_conv.weight"]
    assert not torch.equal(learned, load_file(strong)["middle_zero_conv.weight"])
    assert opened(tmp_path, "more").sample(1, hint_image=HINTS_OF_TWO[0], label=3, **SAMPLING).shape == (1, 1, 8, 8)


def test_a_file_to_start_from_is_for_its_base_and_its_hints(logs, tmp_path):
    """Of files whose kind of hints is known; hints of other options are other hints."""
    source, edges = logs / "grey/control.safetensors", tmp_path / "edges.safetensors"
    with safe_open(source, "pt") as content:
        header = json.loads(content.metadata()[HEADER])
    header["trained"] |= {"kind": "edges", "hint_options": {"edge_sigma": 2.0, "edge_thresholds": [0.2, 0.3]}}
    save_file(load_file(source), edges, {HEADER: json.dumps(header)})
    own = HintsConfig(edge_sigma=2.0, edge_thresholds=(0.2, 0.3))
    config = FineTuningConfig(control="edges", load_control=str(edges))
    assert with_hint_of_file(config, own).hint == HintConfig(hint_channels=1, hint_widths=(4, 6), hint_factor=1)
    for wrong, hints, message in (
        (config, replace(own, edge_sigma=1.0), "got edge_sigma 1.0 with --load_control .* have edge_sigma 2.0"),
        (replace(config, control="grey"), own, "got --control grey .* whose hints are edges: pass --control edges"),
        (replace(config, hint_channels=3), own, "got hint_channels 3 .* whose branch has 1: leave --hint_channels out"),
    ):
        with pytest.raises(ValueError, match=message):
            with_hint_of_file(wrong, hints)
    network = opened(logs, "base").model.sampler.network
    with pytest.raises(ValueError, match="was trained on weights with SHA-256 .*, got 0000"):
        add_start_of_branch(network, str(source), "0" * 64)
    assert not network.control


REFUSED = {
    "--control grey": "got --control grey without trained weights: pass --load_dir RUN",
    "--load_dir base --control grey --lora_rank 2": "got --control grey with --lora_rank: train one after the other",
    "--load_dir base --control grey --load_partial": "which change a whole network",
    "--load_dir grey --train_only conv_in": "is itself fine-tuned, with a control branch: train that run on by",
    "--load_dir base --hint_widths 4 6": "got hint_widths without --control",
    "--load_dir base --no_control_lock": "got no_control_lock without --control",
    "--load_dir base --control grey --hint_factor 3": "wanted a power of 2",
    "--load_dir base --control depth": "edges",
    "--load_dir base --control_strength 0.5": "got control_strength for a model without a control branch",
    "--load_dir base --control grey --control_strength 1 2": "got 2 numbers as control_strength, wanted one, or 5",
    "--load_dir base --control grey --hint_ready": "got hint_ready without pictures",
    "--load_dir base --control boxes": "no boxes",
    "--load_dir base --load_control x": "got load_control without --control",
    "--load_dir base --control grey --load_control gone.safetensors": "gone.safetensors not found",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_flags_are_refused(logs, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        train(logs, "refused", f"--train_steps 1 {flags}")
    assert stop.value.code == 2 and REFUSED[flags] in one_line(capfd.readouterr().err)
    assert not (logs / "refused").exists()


def test_the_flag_names_every_kind_of_hint():
    (kinds,) = [field.type for field in FineTuningConfig.__dataclass_fields__.values() if field.name == "control"]
    assert {*kinds.__args__} == {"", *HINTS}


def test_a_branch_learns_apart_from_other_layers(tmp_path):
    for other in ({"lora_rank": 2}, {"differential": "diff_v2"}, {"text_new_tokens": ("<toy>",)}):
        with pytest.raises(ValueError, match="got --control edges with --"):
            find_base(tmp_path, TrainingConfig(load_dir="base"), FineTuningConfig(control="edges", **other), "logs")


@pytest.mark.parametrize(
    ("factor", "widths"), [(1, (16, 32)), (2, (16, 32)), (8, (16, 32, 96, 256)), (16, (16, 32, 96, 256, 256))]
)
def test_widths_of_hints_follow_from_their_factor(factor, widths):
    config = FineTuningConfig(control="edges").with_hint(1, factor)
    assert config.hint == HintConfig(hint_channels=1, hint_widths=widths, hint_factor=factor)
    assert FineTuningConfig(control="edges", hint_channels=3).with_hint(1, factor).hint_channels == 3
    assert FineTuningConfig().with_hint(1, factor) == FineTuningConfig()
