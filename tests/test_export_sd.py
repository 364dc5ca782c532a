"""Runs from Stable Diffusion written in the layout that they did not come from, and control branches in both."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.tiny_runs import call
from helpers.tiny_sd import (
    CONFIGS,
    assert_same_tensors,
    tiny_control,
    write_control_folder,
    write_pipeline,
    write_single_file,
)
from train.control_file import read_branch, read_control, read_control_header, save_control
from train.converters.sd.export import files_of_run, find_source_run, pipeline_config
from train.converters.sd.files import read_source
from train.files import new_folders
from train.sampler_loading import load_trained_sampler

FLAGS = {1: "--heads 4 --prediction eps", 2: "--heads 4 --prediction v"}
CPU = torch.device("cpu")


def convert(weights, logs, name, flags=""):
    call("convert.py", f"--from sd --weights {weights} --logs_root {logs} --log_dir {name} {flags}")


def export(to, logs, name, output):
    call("convert.py", f"--to {to} --load_dir {name} --logs_root {logs} --output {output}")
    return output


@pytest.fixture(scope="module", params=[1, 2], ids=["version 1", "version 2"])
def exported(request, tmp_path_factory):
    """A folder with single.safetensors and what was made of it: a folder of diffusers and, of that, again.safetensors;
    the run logs/one is from the first, logs/two from the folder."""
    folder, version = tmp_path_factory.mktemp("exported"), request.param
    write_single_file(folder / "single.safetensors", version, control=True)
    convert(folder / "single.safetensors", folder / "logs", "one", f"{FLAGS[version]} --img_size 32 --no_amp")
    export("diffusers", folder / "logs", "one", folder / "folder")
    convert(folder / "folder", folder / "logs", "two", "--no_amp")
    export("sd", folder / "logs", "two", folder / "again.safetensors")
    return folder


def test_a_single_file_comes_back_from_a_folder_to_the_bit(exported):
    assert_same_tensors(load_file(exported / "single.safetensors"), load_file(exported / "again.safetensors"))


def test_a_folder_says_what_was_typed_for_its_single_file(exported):
    one, two = ((exported / f"logs/{name}/config.yaml").read_text().split("\norigin:")[0] for name in ("one", "two"))
    same = {line for line in one.splitlines() if "sd_ae" not in line} & {*two.splitlines()}
    for key in ("heads", "prediction", "schedule", "first_beta", "solver", "spacing", "steps_offset", "img_size"):
        assert any(line.strip().startswith(f"{key}:") for line in same), key


@torch.no_grad()
def test_both_runs_compute_the_same(exported):
    outputs = []
    for name in ("one", "two"):
        logs = exported / "logs"
        model = load_trained_sampler(logs / name, None, CPU, ema=None, amp=False, logs_roots=(str(logs),))
        network, x = model.sampler.network, torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        outputs.append(network(x, torch.ones(2), network.encode({"text": ["a dog", ""]}, x)))
    assert torch.equal(*outputs) and outputs[0].std() > 0.01


def test_a_folder_written_again_is_the_same(exported):
    export("diffusers", exported / "logs", "two", exported / "folder_again")
    first, again = exported / "folder", exported / "folder_again"
    names = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert names == sorted(path.relative_to(again) for path in again.rglob("*.*")) and len(names) > 10
    for name in names:
        if name.suffix == ".safetensors":
            assert_same_tensors(load_file(first / name), load_file(again / name))
        else:
            assert (first / name).read_text() == (again / name).read_text(), name


@torch.no_grad()
def test_diffusers_reads_each_part_of_a_folder(exported):
    diffusers, transformers = (pytest.importorskip(name) for name in ("diffusers", "transformers"))
    folder, logs = exported / "folder", exported / "logs"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    model = load_trained_sampler(logs / "one", None, CPU, ema=None, amp=False, logs_roots=(str(logs),))
    network, stage = model.sampler.network, model.space.first_stage.network
    ids = pipeline.tokenizer(["a photo of a dog"], padding="max_length", return_tensors="pt").input_ids
    tokens = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)(ids)[0]
    own = network.encoders["text"].encoder(ids).tokens
    assert (tokens - own).abs().max() < 1e-5
    x, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([301])
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    condition = network.encode({"text": ["a photo of a dog"]}, x)
    public = unet(x, t, condition.streams["text"].values).sample
    assert (network(x, t.float(), condition) - public).abs().max() < 1e-4
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    assert (vae.decode(x).sample - stage.decode(x)).abs().max() < 1e-4
    control = diffusers.ControlNetModel.from_pretrained(folder / "controlnet")
    branch = read_control(logs / "one/control.safetensors")
    hint = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    down, middle = control(x, t, condition.streams["text"].values, hint, return_dict=False)
    for public, ours in zip((*down, middle), branch(x, t.float(), condition, hint), strict=True):
        assert (public - ours).abs().max() < 1e-5


def test_a_warning_names_the_file_of_new_words(exported):
    run, roots = exported / "logs/one", (str(exported / "logs"),)
    model = load_trained_sampler(run, None, CPU, ema=None, amp=False, logs_roots=roots)
    before = files_of_run(model, run, "single").parts["text"]
    model.sampler.network.encoders["text"].encoder.add_words({"<toy>": torch.ones(64)})
    with pytest.warns(UserWarning, match=r"new words are not written: .*learned_embeds\.safetensors"):
        assert_same_tensors(files_of_run(model, run, "single").parts["text"], before)


def test_a_folder_comes_back_from_a_single_file(tmp_path):
    parts = write_pipeline(tmp_path / "folder", autoencoder=CONFIGS["autoencoder"] | {"scaling_factor": 0.18215})
    convert(tmp_path / "folder", tmp_path, "one")
    export("sd", tmp_path, "one", tmp_path / "single.safetensors")
    convert(tmp_path / "single.safetensors", tmp_path, "two", f"{FLAGS[2]} --img_size 32")
    export("diffusers", tmp_path, "two", tmp_path / "again")
    again = read_source(tmp_path / "again")
    for part, tensors in parts.items():
        assert_same_tensors(tensors, again.parts[part])


@pytest.mark.parametrize(
    "scale, shift, message",
    [
        (0.2, None, "scaling_factor 0.2 and shift_factor 0.0; a single file means 0.18215"),
        (0.18215, 0.1, "scaling_factor 0.18215 and shift_factor 0.1"),
    ],
)
def test_scales_that_a_single_file_cannot_hold_are_refused(tmp_path, capsys, scale, shift, message):
    latents = {"scaling_factor": scale, "shift_factor": shift}
    write_pipeline(tmp_path / "folder", autoencoder=CONFIGS["autoencoder"] | latents)
    convert(tmp_path / "folder", tmp_path, "one")
    with pytest.raises(SystemExit):
        export("sd", tmp_path, "one", tmp_path / "single.safetensors")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "single.safetensors").exists()


def test_a_control_branch_alone_is_written_in_both_layouts(tmp_path):
    wanted = {"folder": write_control_folder(tmp_path / "folder"), "single": tiny_control("single")}
    convert(tmp_path / "folder", tmp_path, "canny")
    assert [path.name for path in (tmp_path / "canny").iterdir()] == ["control.safetensors"]
    outputs = {"diffusers": tmp_path / "back", "sd": tmp_path / "single.safetensors"}
    back, single = (export(to, tmp_path, "canny", path) for to, path in outputs.items())
    assert_same_tensors(wanted["folder"], load_file(back / "diffusion_pytorch_model.safetensors"))
    assert_same_tensors(wanted["single"], load_file(single))
    assert json.loads((back / "config.json").read_text()) == json.loads((tmp_path / "folder/config.json").read_text())


def test_a_prefix_of_names_says_nothing_about_folders(tmp_path):
    write_control_folder(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path, "canny")
    path = tmp_path / "canny/control.safetensors"
    settings, origin = read_control_header(path)
    save_control(read_control(path), settings, replace(origin, layout="single", prefixed=True), path)
    assert (export("diffusers", tmp_path, "canny", tmp_path / "back") / "config.json").is_file()
    names = load_file(export("sd", tmp_path, "canny", tmp_path / "back.safetensors"))
    assert all(name.startswith("control_model.") for name in names)


def test_configs_follow_what_was_typed_at_conversion(tmp_path):
    write_pipeline(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path, "one", "--prediction eps")
    scheduler = read_source(export("diffusers", tmp_path, "one", tmp_path / "back")).configs["scheduler"]
    assert scheduler["prediction_type"] == "epsilon" and scheduler["beta_schedule"] == "scaled_linear"
    assert read_source(tmp_path / "folder").configs["scheduler"]["prediction_type"] == "v_prediction"


def test_a_single_file_has_a_name_that_readers_know(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export("sd", tmp_path, "one", tmp_path / "back.ckpt")
    assert "pass a name that ends in .safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_control_branch_is_written_as_a_controlnet(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    write_single_file(tmp_path / "single.safetensors")
    convert(tmp_path / "single.safetensors", tmp_path, "one", f"{FLAGS[1]} --img_size 32 --no_amp")
    data = "--dataset shapes --shapes_count 20 --img_size 32 --captions templates --no_amp"
    flags = f"--sampler ddpm {data} --load_dir one --log_dir tuned --logs_root {tmp_path} --control grey"
    training = "--train_steps 2 --batch_size 2 --warmup_iters 0 --lr 1e-3 --sample_steps 2 --hint_widths 4 6 8 10"
    call("train_sampler.py", f"{flags} --hint_channels 3 {training}")
    folder = export("diffusers", tmp_path, "tuned", tmp_path / "folder")
    roots = {"ema": None, "amp": False, "logs_roots": (str(tmp_path),)}
    network = load_trained_sampler(tmp_path / "tuned", None, CPU, **roots).sampler.network
    x, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([301])
    hint, condition = torch.rand(1, 3, 32, 32), network.encode({"text": ["a dog"]}, x)
    public = diffusers.ControlNetModel.from_pretrained(folder / "controlnet")
    with torch.no_grad():
        down, middle = public(x, t, condition.streams["text"].values, hint, return_dict=False)
        ours = network.control["hint"](x, t.float(), condition, hint)
    assert max(residual.abs().max() for residual in ours) > 1e-4
    for theirs, own in zip((*down, middle), ours, strict=True):
        assert (theirs - own).abs().max() < 1e-3 * own.abs().max() + 1e-5  # the files are float16
    output = export("sd", tmp_path, "tuned", tmp_path / "back.safetensors")
    convert(output, tmp_path, "again", f"{FLAGS[1]} --img_size 32 --no_amp")
    base = load_trained_sampler(tmp_path / "again", None, CPU, **roots).sampler.network
    branch, facts = read_branch(tmp_path / "again/control.safetensors", base)
    assert facts is None and branch.hint_config == network.control["hint"].hint_config
    for theirs, own in zip(branch(x, t.float(), condition, hint), ours, strict=True):
        assert (theirs - own).abs().max() < 1e-3 * own.abs().max() + 1e-5


def test_a_second_control_branch_does_not_replace_the_first(tmp_path, capsys):
    write_control_folder(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path, "canny")
    before = (tmp_path / "canny/control.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        convert(tmp_path / "folder", tmp_path, "canny")
    assert "control.safetensors is there already: pass another --log_dir" in capsys.readouterr().err
    assert (tmp_path / "canny/control.safetensors").read_bytes() == before


def test_heads_of_a_control_branch_are_not_guessed(tmp_path, capsys):
    write_control_folder(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path, "canny")
    export("sd", tmp_path, "canny", tmp_path / "single.safetensors")
    with pytest.raises(SystemExit):
        convert(tmp_path / "single.safetensors", tmp_path, "other")
    assert "attention heads of the control branch do not follow from" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_as_a_whole_is_deleted(tmp_path, monkeypatch, capsys):
    write_pipeline(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path, "one")

    def fail(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("train.converters.sd.files.write_text", fail)
    with pytest.raises(SystemExit):
        export("diffusers", tmp_path, "one", tmp_path / "back")
    assert "No space left on device" in capsys.readouterr().err and not (tmp_path / "back").exists()
    monkeypatch.undo()
    assert export("diffusers", tmp_path, "one", tmp_path / "back").is_dir()


def test_new_folders_are_kept_whole_or_deleted(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(KeyboardInterrupt), new_folders(one, two, remedy="leave it"):
        one.mkdir()
        (one / "file").write_text("")
        raise KeyboardInterrupt
    assert not one.exists() and not two.exists()
    with new_folders(one, two, remedy="leave it"):
        one.mkdir()
        (one / "file").write_text("")
    with pytest.raises(ValueError, match="one is not empty: leave it"), new_folders(two, one, remedy="leave it"):
        two.mkdir()
    assert (one / "file").exists() and not two.exists()


def test_the_source_is_found_through_predecessors(tmp_path):
    """By --load_dir, the base of a fine-tuned run, and the run that a merged one was; not by --load_partial."""
    base = {"path": "tuned", "step": 1, "file": "model.safetensors", "sha256": "0"}
    for name, content in {
        "sd": {},
        "tuned": {"training": {"load_dir": "sd"}},
        "adapted": {"origin": {"base": base}, "training": {"load_dir": "elsewhere"}},
        "merged": {"origin": {"merged_from": "adapted"}},
        "part": {"training": {"load_dir": "sd", "load_partial": True}},
        "a": {"training": {"load_dir": "b"}},
        "b": {"training": {"load_dir": "a"}},
        "lost": {"training": {"load_dir": "gone"}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(content))
    assert find_source_run(tmp_path / "merged") is None
    (tmp_path / "sd" / "source").mkdir()
    (tmp_path / "sd" / "source" / "facts.json").write_text("{}")
    for name in ("sd", "tuned", "adapted", "merged"):
        assert find_source_run(tmp_path / name) == tmp_path / "sd", name
    for name in ("part", "a", "lost"):
        assert find_source_run(tmp_path / name) is None, name


@pytest.mark.parametrize("channels, name", [(4, ""), (8, "InstructPix2Pix"), (9, "Inpaint")])
def test_the_pipeline_follows_from_the_input_channels(channels, name):
    configs = {"unet": {"in_channels": channels}, "scheduler": {"_class_name": "DDIMScheduler"}}
    assert pipeline_config(configs)["_class_name"] == f"StableDiffusion{name}Pipeline"
