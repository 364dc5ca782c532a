"""The logic of the demo page, without the page."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion.edm import EDM
from diffusion.solvers import solvers_for
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.playground import (
    AS_IN_DATA,
    NO_CLASS,
    DenoisingStep,
    Playground,
    Request,
    Runs,
    WatchedSteps,
    describe_choices,
    enlarge_to_picture,
    escape_markdown,
    stream,
)
from helpers.tiny_runs import DDPM, call


def load(logs, **model):
    return load_model(ModelConfig(**model), OutputConfig(logs_root=str(logs), device="cpu", amp=False))


@pytest.fixture(scope="module")
def play(trained):
    from train.samplers.absorbing import Sampling

    model, options = load(trained), Sampling(sample_steps=4)
    return Playground(model, options, model.condition_source(options))


@pytest.fixture(scope="module")
def gaussian(trained_ddpm):
    from train.samplers.ddpm import Sampling

    model, options = load(trained_ddpm, sampler="ddpm"), Sampling(sample_steps=4)
    return Playground(model, options, model.condition_source(options))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A model of captions and numbers."""
    from train.samplers.ddpm import Sampling

    logs = tmp_path_factory.mktemp("captioned")
    data = "--captions templates --digits_rotation 40 --digits_thickness --no_class_conditional --no_amp"
    flags = "--conditions text numbers --text_width 8 --text_layers 1 --text_heads 2 --attn_block_type transformer"
    call("train_sampler.py", f"--logs_root {logs} {DDPM} {data} {flags} --train_steps 1 --steps_per_eval 0")
    model = load(logs, sampler="ddpm")
    options = Sampling(sample_steps=4, guidance=2.0, metadata=("rotation=5",))
    return Playground(model, options, model.condition_source(options))


@pytest.fixture(params=["play", "gaussian"])
def playground(request):
    return request.getfixturevalue(request.param)


def make_request(play, **kwargs):
    options = replace(play.options, **kwargs.pop("options", {}))
    return Request(options=options, **{"count": 3} | kwargs)


def without_classes(play):
    """The same model for data without classes."""
    sampler_without_frequencies = replace(play.trained, class_frequencies=None)
    sampler = type(
        "Unconditional",
        (),
        {
            "n_classes": 0,
            "conditions": (),
            "process": sampler_without_frequencies.sampler.process,
            "network": torch.nn.Identity(),
        },
    )()
    return replace(play, trained=replace(sampler_without_frequencies, sampler=sampler))


def test_the_page_offers_what_the_model_supports(playground):
    controls = {control.name: control for control in playground.controls}
    assert controls["solver"].choices == tuple(sorted(solvers_for(playground.trained.sampler.process)))
    assert ("eta" in controls) is ("top_k" not in controls)  # for Gaussian samplers or samplers of codes
    assert [text for text, _ in playground.classes] == [AS_IN_DATA, NO_CLASS, *"0123456789"]
    unconditional = without_classes(playground)
    assert unconditional.classes == [] and not [
        name for name in unconditional.controls if name.name.startswith("guidance")
    ]


def test_control_values_become_sampling_options(play):
    options = play.settings({"solver": "halton", "top_k": 5, "guidance_interval": "0 0.5"})
    assert options == replace(play.options, solver="halton", top_k=5, guidance_interval=(0.0, 0.5))
    with pytest.raises(ValueError, match="got 0 for steps, wanted at least 1"):
        play.settings({"sample_steps": "0"})


def test_steps_left_out_are_those_of_the_solver(play, gaussian):
    def steps(playground, **values):
        return playground.settings(values).sample_steps

    assert steps(play, sample_steps="") == play.trained.sampler.process.steps == 256
    assert steps(play, sample_steps="7", solver="halton") == 7
    assert steps(play, sample_steps="7", solver="first_hitting") == 16  # one per code
    assert [steps(gaussian, sample_steps=None, solver=each) for each in ("ddpm", "heun")] == [20, 20]
    process = replace(play.trained.sampler.process, steps=None)
    sampler = type("Continuous", (), {"process": process, "conditions": (), "network": torch.nn.Identity()})()
    assert steps(replace(play, trained=replace(play.trained, sampler=sampler)), sample_steps="") == 16


def test_options_of_other_solvers_have_no_control_and_no_value(play):
    names = {each.name for each in play.controls_of(solver="remask") if each.visible}
    assert {"remasking", "remask_eta", "sample_steps", "top_k"} <= names and "choice_temp" not in names
    options = play.settings({"solver": "remask", "remask_eta": "0.5", "choice_temp": "3"})
    assert (options.remask_eta, options.choice_temp) == (0.5, None)


def test_settings_of_another_process_or_spacing_have_no_control(gaussian):
    of_edm = {"sigma_min", "sigma_max", "s_churn", "s_tmin", "s_tmax", "s_noise", "rho"}
    sampler = type("Edm", (), {"process": EDM(), "conditions": (), "network": torch.nn.Identity()})()
    edm = replace(gaussian, trained=replace(gaussian.trained, sampler=sampler))
    cases = [
        (gaussian, {}, set()),
        (gaussian, {"solver": "heun"}, set()),
        (gaussian, {"spacing": "karras"}, {"rho"}),
        (edm, {}, {"sigma_min", "sigma_max", "rho"}),
        (edm, {"solver": "heun"}, of_edm),
        (edm, {"spacing": "uniform"}, {"sigma_min", "sigma_max"}),
    ]
    for playground, choices, wanted in cases:
        assert {each.name for each in playground.controls_of(**choices) if each.visible} & of_edm == wanted, choices
    values = {"sigma_max": "80", "s_churn": "1", "rho": "5", "solver": "heun"}
    options = gaussian.settings(values)
    assert options.sigma_max is options.s_churn is options.rho is None
    assert gaussian.settings(values | {"spacing": "karras"}).rho == 5 and edm.settings(values).sigma_max == 80


def test_classes_are_named_in_choices_requests_and_captions(play):
    names = ("7", "hat", *"23456", "shoe", "8", "9")  # a name may be the number of another class
    named = replace(play, trained=replace(play.trained, class_names=names))
    assert named.classes[2:] == [(name, number) for number, name in enumerate(names)]
    requested = {label: named.conditions(make_request(named, label=label))["label"][0] for label in ("hat", "7", 7)}
    assert requested == {"hat": 1, "7": 0, 7: 7}
    assert named.captions(named.sample(make_request(named, label=7))) == ["shoe"] * 3
    assert named.captions(named.sample(make_request(named, label=NO_CLASS))) == [None] * 3


def test_runs_are_those_with_a_sampler_and_a_checkpoint(play, trained, tmp_path):
    logs = tmp_path / "logs"
    for name in ("absorbing_digits", "vqgan_digits"):
        shutil.copytree(trained / name, logs / name)
    shutil.copytree(trained / "absorbing_digits", logs / "unfinished", ignore=shutil.ignore_patterns("step_*"))
    first, loaded = trained / "absorbing_digits", []

    def load_run(folder, step):
        loaded.append((folder, step))
        return replace(play, trained=replace(play.trained, run=folder))

    runs = Runs(logs, load_run, play)
    assert [*runs.folders] == [str(first), "absorbing_digits"] and runs.name(first) == str(first)
    assert runs.open(str(first), 3) is play and loaded == []
    other = runs.open("absorbing_digits")
    assert loaded == [(logs / "absorbing_digits", 3)]
    assert all(runs.open("absorbing_digits", step) is other for step in (3, "3", None)) and len(loaded) == 1
    assert runs.open(str(first)) is not other and len(loaded) == 2
    with pytest.raises(ValueError, match="got run '/etc', wanted one of: "):
        runs.open("/etc")
    for wrong in (2, "two"):
        with pytest.raises(ValueError, match=f"got step {wrong} of absorbing_digits, wanted one of: 3"):
            runs.open("absorbing_digits", wrong)


def test_a_press_lists_no_runs_unless_one_is_new(play, trained, monkeypatch):
    logs, listings = trained, []
    runs = Runs(logs, lambda *_: play, replace(play, trained=replace(play.trained, run=logs / "absorbing_digits")))
    monkeypatch.setattr(
        Path, "glob", lambda path, pattern, glob=Path.glob: listings.append(pattern) or glob(path, pattern)
    )
    runs.open("absorbing_digits", 3)
    assert listings == []
    with pytest.raises(ValueError, match="got run 'new', wanted one of: absorbing_digits"):
        runs.open("new", 3)
    assert "*/config.yaml" in listings


def test_of_many_choices_a_message_names_the_nearest():
    assert describe_choices("x", ["a", "b"]) == "one of: a, b"
    names = [f"class {i}" for i in range(1000)]
    message = describe_choices("clas 123", names)
    assert message.startswith("one of 1000, such as: class 123, class ") and message.count(",") == 5
    assert describe_choices("??", names).startswith("one of 1000, such as: ")


def test_images_are_those_that_the_experiments_draw(playground):
    sample = playground.trained.draw([0, 1, 2], 5, playground.options, playground.source.draw(5, [0, 1, 2]))
    assert torch.equal(playground.draw(make_request(playground, seed=5)), sample["image"])
    assert torch.equal(playground.draw(make_request(playground, seed=5, count=2)), sample["image"][:2])
    assert not torch.equal(playground.draw(make_request(playground, seed=6)), sample["image"])


def test_a_chosen_class_applies_to_all_images(playground):
    source_conditions = playground.source.draw(0, [0, 1, 2])
    assert torch.equal(playground.conditions(make_request(playground))["label"], source_conditions["label"])
    assert playground.conditions(make_request(playground, label=NO_CLASS)) is None
    assert playground.conditions(make_request(playground, label="7"))["label"].tolist() == [7, 7, 7]
    seven = playground.trained.draw([0, 1, 2], 0, playground.options, {"label": torch.tensor([7, 7, 7])})
    assert torch.equal(playground.draw(make_request(playground, label="7")), seven["image"])
    with pytest.raises(ValueError, match="got class '10', wanted one of: random .*, none .*, 0, 1"):
        playground.conditions(make_request(playground, label="10"))


def test_conditions_other_than_the_class_are_unchanged(play):
    class HeldOut:
        def __len__(self):
            return 5

        def __getitem__(self, positions):
            return {"condition_image": torch.tensor(positions), "label": torch.tensor([1, 2, 3])}

    source = replace(play.source, fields=("condition_image", "label"), held_out=HeldOut())
    conditioned = replace(play, source=source)
    four = conditioned.conditions(make_request(conditioned, label="4"))
    assert {name: value.tolist() for name, value in four.items()} == {"condition_image": [0, 1, 2], "label": [4, 4, 4]}
    assert conditioned.conditions(make_request(conditioned, label=NO_CLASS))["label"].tolist() == [
        10,
        10,
        10,
    ]  # the null
    assert conditioned.conditions(make_request(conditioned))["label"].tolist() == [1, 2, 3]


def test_a_prompt_and_metadata_apply_to_all_images(captioned):
    metadata = {"rotation": -20.5, "thickness": "unknown"}
    batch = captioned.conditions(make_request(captioned, prompt="a seven", metadata=metadata))
    assert batch["caption"] == ["a seven"] * 3 and batch["rotation"].tolist() == [-20.5] * 3
    assert batch["thickness"].isnan().all()
    held_out = captioned.conditions(make_request(captioned))
    assert len({*held_out["caption"]}) > 1 and held_out["rotation"].tolist() == [5.0] * 3  # that of the options
    with pytest.raises(ValueError, match="got rotation 'left', wanted a finite number"):
        captioned.conditions(make_request(captioned, metadata={"rotation": "left"}))


def test_a_negative_prompt_reaches_every_image(captioned, monkeypatch):
    drawn = []
    monkeypatch.setattr(type(captioned.trained), "draw", lambda *args, **kwargs: drawn.append(kwargs))
    captioned.sample(make_request(captioned))
    captioned.sample(make_request(captioned, negative="a zero"))
    assert drawn == [{}, {"negative": {"caption": ["a zero"] * 3}}]
    with pytest.raises(ValueError, match="negative prompt with --guidance 1, which ignores it"):
        captioned.sample(make_request(captioned, negative="a zero", options={"guidance": 1.0}))


def test_images_of_a_prompt_are_those_that_the_experiments_draw(captioned):
    request = make_request(
        captioned, prompt="a seven", negative="a zero", metadata={"rotation": "unknown", "thickness": 3}
    )
    texts, missing = {"caption": ["a seven"] * 3}, torch.full((3,), torch.nan)
    conditions = texts | {"rotation": missing, "thickness": torch.full((3,), 3.0)}
    negative = {"caption": ["a zero"] * 3}
    expected = captioned.trained.draw([0, 1, 2], 0, captioned.options, conditions, negative=negative)["image"]
    assert torch.equal(captioned.draw(request), expected)


def test_fields_of_prompts_are_there_for_models_that_read_them(captioned, gaussian):
    assert captioned.reads_prompts and not gaussian.reads_prompts
    assert captioned.initial_metadata == {"rotation": "5", "thickness": "unknown"} and gaussian.initial_metadata == {}


def test_without_a_class_there_is_no_guidance(playground):
    images = [
        playground.draw(make_request(playground, label=NO_CLASS, options={"guidance": scale})) for scale in (1.0, 2.0)
    ]
    assert torch.equal(*images)


def test_a_name_in_markdown_is_shown_as_it_is():
    assert escape_markdown("run_1 <img src=x> **$$a$$** ä") == (r"run\_1 \<img src\=x\> \*\*\$\$a\$\$\*\* ä")


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seed": -1}])
def test_a_request_without_images_or_a_seed_is_refused(play, wrong):
    with pytest.raises(ValueError, match="wanted at least 1 image and a seed of 0 or more"):
        make_request(play, **wrong)


@pytest.mark.parametrize("solver", ["ancestral", "first_hitting", "halton", "confidence", "remask"])
def test_absorbing_steps_end_with_the_sampled_images(play, solver):
    steps = None if solver == "first_hitting" else 4
    request = make_request(play, options={"solver": solver, "sample_steps": steps}, seed=2)
    moments = list(play.watch(request))
    assert [moment.step for moment in moments] == list(range(1, (steps or 16) + 1))
    assert [moment.t for moment in moments] == sorted((moment.t for moment in moments), reverse=True)
    assert all(moment.current.shape == moment.predicted.shape == (3, 1, 16, 16) for moment in moments)
    grey = [(moment.current == 128).float().mean() for moment in moments]
    assert grey[0] > 0.5 and grey[-1] < 0.1  # not 0: images may be grey somewhere
    assert torch.equal(moments[-1].current, play.draw(request))


def test_gaussian_steps_end_with_the_sampled_images(gaussian):
    request = make_request(gaussian)
    moments = list(gaussian.watch(request))
    assert [moment.step for moment in moments] == [1, 2, 3, 4] and moments[-1].t == 0
    assert torch.equal(moments[-1].current, gaussian.draw(request))
    assert not torch.equal(moments[0].current, moments[0].predicted)


def test_errors_while_watching_are_raised(play):
    with pytest.raises(ValueError, match="got eta"):
        list(stream(lambda put: (_ for _ in ()).throw(ValueError("got eta"))))
    with pytest.raises(ValueError, match="first_hitting takes 16 steps"):
        list(play.watch(make_request(play, options={"solver": "first_hitting"})))  # not made by `settings`


def test_at_most_a_hundred_watched_steps_are_kept():
    watched, image = WatchedSteps(), torch.zeros(1, 1, 1, 1)
    for step in range(1, 1001):
        watched.add(DenoisingStep(step, 0.0, image, image))
        assert len(watched.steps) <= 100 and watched.steps[-1].step == step and watched.steps[0].step == 1
    assert watched.stride == 16 and [watched.nearest(number).step for number in (1, 20, 999)] == [1, 17, 1000]


def test_closing_the_stream_stops_the_work():
    put_so_far, more, ended = [], threading.Event(), threading.Event()

    def work(put):
        try:
            for number in range(3):
                put(number)
                put_so_far.append(number)
                more.wait(20)
        finally:
            ended.set()

    reading = stream(work)
    assert next(reading) == 0
    threading.Timer(0.2, more.set).start()  # while the reader is closing, the work continues
    reading.close()
    assert ended.is_set() and put_so_far == [0]


def brush(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_unmasked_pixels_are_kept(playground):
    side = playground.trained.data.size[0]
    image = playground.draw(make_request(playground, seed=9, count=1))[0]
    picture = enlarge_to_picture(image, 4 * side)
    mask = brush(picture.size, (0, 0, 4 * side, 2 * side))  # the upper half
    inpainted = playground.inpaint(make_request(playground, count=4), picture, mask)
    half = side // 2
    assert inpainted.masked_input[:, :half].unique().tolist() == [128]
    assert torch.equal(inpainted.masked_input[:, half:], image[:, half:])
    assert inpainted.results["image"].shape == (4, *image.shape)
    assert len(inpainted.results["image"][:, :, :half].flatten(1).unique(dim=0)) == 4  # several results
    repeated = playground.inpaint(make_request(playground, count=2), picture, mask)
    assert torch.equal(repeated.results["image"], inpainted.results["image"][:2])
    start = playground.trained.space.encode_masked(
        image[None], torch.arange(side).lt(half)[None, :, None].expand(1, side, side)
    )
    assert start.keep.float().mean() == 0.5
    if playground.trained.space.first_stage is None:
        assert torch.equal(inpainted.results["image"][:, :, half:], image[None, :, half:].expand(4, -1, -1, -1))


def test_kept_codes_never_change(play, monkeypatch):
    calls, original_draw = [], type(play.trained).draw

    def draw(*args, **kwargs):
        calls.append((original_draw(*args, **kwargs), kwargs | {"conditions": args[4]}))
        return calls[-1][0]

    monkeypatch.setattr(type(play.trained), "draw", draw)
    picture = enlarge_to_picture(torch.arange(256, dtype=torch.uint8).view(1, 16, 16))
    inpainted = play.inpaint(make_request(play, label="3"), picture, brush(picture.size, (0, 0, 80, 80)))
    assert (inpainted.masked_input == 128).sum() >= 64 and inpainted.masked_input[:, :8, :8].unique().tolist() == [
        128
    ]  # whole cells
    output, kwargs = calls[0]
    start, codes = kwargs["edit"], output["codes"]
    assert start.strength == 1 and (~start.keep).sum((1, 2)).tolist() == [
        4,
        4,
        4,
    ]  # five of 16 pixels touch two cells per side
    assert torch.equal(codes[start.keep], start.x0[start.keep])
    assert kwargs["conditions"]["label"].tolist() == [3, 3, 3]
    assert play.captions(inpainted.results) == ["3"] * 3


def test_random_classes_mean_none_when_inpainting(playground, monkeypatch):
    requests = []
    monkeypatch.setattr(Playground, "sample", lambda self, request, **kwargs: requests.append(request))
    picture = Image.new("L", playground.trained.data.size)
    options = {"guidance": 3.0}
    playground.inpaint(make_request(playground, options=options), picture, brush(picture.size, (0, 0, 4, 4)))
    assert (requests[0].label, requests[0].options.guidance) == (NO_CLASS, 1.0)
    playground.inpaint(make_request(playground, options=options, label="1"), picture, brush(picture.size, (0, 0, 4, 4)))
    assert (requests[1].label, requests[1].options.guidance) == ("1", 3.0)


def test_an_empty_mask_is_refused(play):
    with pytest.raises(ValueError, match="nothing is masked"):
        play.inpaint(make_request(play), Image.new("L", (16, 16)), Image.new("L", (16, 16)))
    with pytest.raises(ValueError, match="wanted the same size"):
        play.inpaint(make_request(play), Image.new("L", (16, 16)), Image.new("L", (8, 8)))
