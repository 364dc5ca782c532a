"""Files that declare an ablation: cells, aliases, and errors that name what is wrong."""

import pytest
import yaml

from experiments.harness.ablation_file import parse_ablation, read_ablation

FLAGS = ("n_images", "measures", "seed", "log_dir")
GRID = {"models": {"one": "run"}, "axes": {"guidance": [1, 3]}}


def parse(**sections):
    return parse_ablation(GRID | sections, FLAGS)


def test_cells_are_the_product_of_the_axes_in_their_order():
    ablation = parse(
        settings={"label": 3},
        axes={"sample_steps": [2, 4], "solver": ["ddim", "heun"], "way": {"a": {"guidance": 1}, "b": {"eta": 0.5}}},
    )
    cells = ablation.cells()
    assert [cell.place for cell in cells[:3]] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)] and len(cells) == 8
    assert cells[-1].labels == ("steps 4", "heun", "b") and cells[-1].model == "one"
    assert cells[-1].settings == {"label": 3, "sample_steps": 4, "solver": "heun", "eta": 0.5}


def test_several_models_are_the_first_axis_unless_one_is_named():
    two = {"models": {"a": "run_a", "b": {"run": "run_b", "load_step": 5}}}
    assert [cell.labels for cell in parse(**two).cells()][1:3] == [("a", "guidance scale 3"), ("b", "guidance scale 1")]
    assert {cell.model for cell in parse(**two, settings={"model": "b"}).cells()} == {"b"}
    last = parse(**two, axes={"guidance": [1, 3], "model": ["b", "a"]})
    assert [cell.model for cell in last.cells()] == ["b", "a", "b", "a"]
    by_label = parse(**two, axes={"way": {"x": {"model": "a", "guidance": 2}, "y": {"model": "b"}}})
    assert [cell.model for cell in by_label.cells()] == ["a", "b"]


def test_labels_say_what_a_value_is():
    axes = {"clip": [True, False], "guidance": [1, 0], "size": [16, [8, 24]], "label": [None, "seven"]}
    axes |= {"image": ["a/b.png"], "guidance_interval": [[0.2, 0.8], None]}
    labels = [[point.label for point in axis.points] for axis in parse(axes=axes).axes]
    assert labels[:3] == [["clip on", "clip off"], ["guidance scale 1", "guidance scale 0"], ["size 16", "size 8x24"]]
    assert labels[3:5] == [["label none", "label seven"], ["b.png"]]
    assert labels[5] == ["guidance interval 0.2 0.8", "guidance interval none"]


def test_names_of_other_programs_are_read():
    ours = parse(settings={"sample_steps": 5, "negative": "dark", "prompt": "sea"}, axes={"guidance": [1, 3]})
    theirs = {"num_inference_steps": 5, "negative_prompt": "dark", "prompt": "sea"}
    assert parse(settings=theirs, axes={"guidance_scale": [1, 3]}) == ours


SD_ALL = """
models:
  - name: "sd2"
    path: "sd21"
  - {name: sat, path: satellite, model_varient: SDEdit}
data:
  ref_image: "before.png"
  output_folder: "out/guidance"
ablation_config:
  inference_steps: 20
  height: 512
  width: 256
  guidance_scale: [0.0, 2.0, 4.0]
  prompt: {source_prompt: "before", target_prompt: "after a hurricane"}
  seed: 0
logging:
  log_file: "log/guidance.log"
"""
NATIVE = """
models: {sd2: sd21, sat: satellite}
settings:
  image: before.png
  sample_steps: 20
  size: [512, 256]
  prompt: after a hurricane
  seed: 0
axes:
  guidance: [1, 2.0, 4.0]
"""


def test_a_file_of_sd_all_declares_the_same_as_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "course.yaml").write_text(SD_ALL)
    (tmp_path / "ours.yaml").write_text(NATIVE)
    course, ours = (read_ablation(name, FLAGS) for name in ("course.yaml", "ours.yaml"))
    assert course.content() == ours.content() and course.cells() == ours.cells()
    assert course.flags == {"log_dir": str(tmp_path / "out" / "guidance")} and not ours.notes
    assert [note.split()[0] for note in course.notes] == ["source_prompt", "guidance", "log_file", "strength"]


def test_each_list_of_sd_all_is_an_axis():
    content = yaml.safe_load(SD_ALL)
    content["ablation_config"] |= {"inference_steps": [10, 20], "height": [256, 512], "width": [256, 512]}
    axes = {axis.name: [point.settings for point in axis.points] for axis in parse_ablation(content, FLAGS).axes}
    assert {*axes} == {"model", "sample_steps", "guidance", "size"}
    assert axes["size"] == [{"size": (256, 256)}, {"size": (512, 512)}]


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("models: {a: run}\naxes: {sigma_min: [2e-3, 1E-2, -1e3]}\nn_images: 2\n")
    ablation = read_ablation(str(path), FLAGS)
    assert [cell.settings["sigma_min"] for cell in ablation.cells()] == [0.002, 0.01, -1000.0]
    assert ablation.flags == {"n_images": 2}


def test_models_may_be_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("small: ddpm_small\nlarge: /runs/large\n")
    assert parse(models=str(path)).models == {"small": {"run": "ddpm_small"}, "large": {"run": "/runs/large"}}


REFUSED = {  # sections -> words of the message
    "key": ({"axis": {}}, "got the key 'axis', did you mean 'axes'?"),
    "setting": ({"settings": {"guidence": 1}}, "got the key 'guidence' in settings, did you mean 'guidance'?"),
    "axis": ({"axes": {"sample_step": [1]}}, "got the key 'sample_step' in axes, did you mean 'sample_steps'?"),
    "labelled": ({"axes": {"way": {"a": {"etta": 1}}}}, "got the key 'etta' in way: a, did you mean 'eta'?"),
    "twice": ({"settings": {"guidance": 2}}, "got guidance twice"),
    "on two axes": ({"axes": {"guidance": [1], "way": {"a": {"guidance": 2}}}}, "got guidance twice"),
    "two names": ({"settings": {"negative": "a", "negative_prompt": "b"}}, "got negative twice in settings"),
    "value twice": ({"axes": {"guidance": [1, 1]}}, "got guidance scale 1 twice on the axis guidance"),
    "empty axis": ({"axes": {"guidance": []}}, r"got \[\] as the axis guidance, wanted a list of values"),
    "scalar axis": ({"axes": {"guidance": 3}}, "got 3 as the axis guidance"),
    "no axes": ({"axes": {}}, "got one model and no axes"),
    "no models": ({"models": {}}, "got no models"),
    "model": ({"settings": {"model": "oen"}}, "got model 'oen', did you mean 'one'., wanted one of one"),
    "model of an axis": ({"axes": {"model": ["one", "two"]}}, "got model 'two'"),
    "label without a model": ({"axes": {"way": {"a": {"model": "one"}, "b": {}}}}, "got no model for b"),
    "model's key": (
        {"models": {"a": {"run": "x", "load_stp": 1}}},
        "'load_stp' in the model a, did you",
    ),
    "no run": ({"models": {"a": {"load_step": 1}}}, "got None as the run of the model a"),
    "pipeline": ({"models": {"a": "diffusers:/sd"}}, "convert.py --from sd --weights /sd"),
    "strength": ({"settings": {"strength": 1.5}}, r"got strength 1.5, wanted a number in \(0, 1\]"),
    "seed": ({"axes": {"seed": [1, -1]}}, "got seed -1, wanted at least 0"),
    "prompt": ({"settings": {"prompt": 3}}, "got prompt 3, wanted a string"),
    "size": ({"settings": {"size": [1, 2, 3]}}, r"got size \[1, 2, 3\], wanted 2 values"),
    "syntax": ({"settings": {"prompt_syntax": "a111"}}, "got prompt_syntax 'a111', did you mean 'a1111'?"),
    "too many": ({"axes": {"seed": [*range(200)], "sample_steps": [*range(1, 101)]}}, "got a grid of 20000 cells"),
    "list of models": ({"models": ["a"]}, r"got \['a'\] as models, wanted lines of `key: value`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case):
    sections, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        parse(**sections)


REFUSED_OF_SD_ALL = {  # section, key, value -> words of the message
    "technique": (("models", [{"name": "a", "path": "b", "model_varient": "CycleDiffusion"}]), "wanted SDEdit"),
    "name": (("models", [{"name": "a", "path": "b"}] * 2), "got the model a twice"),
    "key": (
        ("ablation_config", {"inference_step": 3}),
        "'inference_step' in ablation_config, did",
    ),
    "height": (("ablation_config", {"height": 3}), "got height 3 and width None"),
    "lists": (("ablation_config", {"height": [1, 2], "width": [1]}), r"got height \[1, 2\] and width \[1\]"),
    "data": (("data", {"image": "x"}), "got the key 'image' in data"),
}


@pytest.mark.parametrize("case", REFUSED_OF_SD_ALL)
def test_what_is_wrong_in_a_file_of_sd_all_is_named(case):
    (section, value), message = REFUSED_OF_SD_ALL[case]
    with pytest.raises(ValueError, match=message):
        parse_ablation(yaml.safe_load(SD_ALL) | {section: value}, FLAGS)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("models: {a: run}\n")
    with pytest.raises(ValueError, match="grid.yaml: got one model and no axes"):
        read_ablation(str(path), FLAGS)
    with pytest.raises(FileNotFoundError, match="other.yaml not found"):
        read_ablation(str(tmp_path / "other.yaml"), FLAGS)
