"""Edits that are asked for: what differs between source and target, and what the judges say of real scenes."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.metrics import edit_tasks
from experiments.metrics.edit_tasks import (
    APART,
    ASKED,
    CHANGES,
    CLASS,
    COLOR,
    MOVE,
    OTHERS,
    SceneJudge,
    plan_edits,
    plan_scene_edits,
    readable_changes,
    thing_regions,
    with_thing,
)
from experiments.metrics.image_classifier import LabelledImages
from experiments.metrics.layout import scene_network
from experiments.metrics.layout.crops import NOTHING_IOU
from experiments.metrics.layout.detections import Detections
from experiments.metrics.layout.judges import load_scenes
from experiments.metrics.layout.layouts import box_iou as tensor_iou
from train.config import DataConfig
from train.data.captions import choose_caption
from train.datasets import shapes
from train.datasets._shapes_scene import BAR, CAMERAS, COLORS, LEAST_VISIBLE, PALETTE, THINGS, box_iou

DATA = DataConfig(dataset="shapes", img_size=32)
READER = shapes.Config(shapes_kinds=("large",))
N, NOTHING = 12, 99
BOXES = ("boxes", "box_class", "box_color")


@pytest.fixture(scope="module")
def planned():
    return plan_scene_edits(READER, N, CHANGES)


def model_with(conditions, captions="own", reader=READER, n_classes=0, **data):
    """A model as far as edits are planned for it."""
    row = lambda item, index: {name: choose_caption(item)[name] for name in conditions}  # noqa: E731
    sampler = SimpleNamespace(conditions=conditions, optional_conditions={}, n_classes=n_classes)
    data = replace(DATA, captions=captions, **data)
    return SimpleNamespace(run="run", sampler=sampler, data=data, reader=reader, conditions_of=row)


# Scenes


def test_one_thing_differs_in_one_way(planned):
    assert [edit.change for edit in planned] == [*CHANGES] * N
    assert all(first.before is third.before for first, third in zip(planned[::3], planned[2::3], strict=True))
    field = {COLOR: "color", CLASS: "kind", MOVE: "box"}
    for change, number, before, after in planned:
        old, new = before.things[number], after.things[number]
        assert getattr(old, field[change]) != getattr(new, field[change])
        assert new == old._replace(**{field[change]: getattr(new, field[change])})
        rest = [[thing for k, thing in enumerate(scene.things) if k != number] for scene in (before, after)]
        assert rest[0] == rest[1]
        others = {each.name for each in fields(before)} - {"things", "visible", "colors"}
        assert all(getattr(before, name) is getattr(after, name) for name in others)
        unchanged = np.arange(len(before.things)) != number if change == COLOR else slice(None)
        assert np.array_equal(before.colors[unchanged], after.colors[unchanged])
        assert after.visible.min() >= LEAST_VISIBLE and before.kind in APART


def test_no_scene_shows_what_is_asked_for(planned):
    for change, number, before, after in planned:
        new = after.things[number]
        if change == COLOR:
            assert new.color not in {thing.color for thing in before.things}
        if change == CLASS:
            assert new.kind not in {thing.kind for thing in before.things}
        if change == MOVE:
            overlaps = [box_iou(new.box, thing.box) for thing in before.things]
            assert overlaps.pop(number) < NOTHING_IOU and not any(overlaps)
            left, right = (BAR * bar for bar in CAMERAS[before.camera])
            assert left <= new.box[0] and new.box[2] <= 1 - right and new.box[1] >= 0 and new.box[3] <= 1


@pytest.mark.parametrize(("change", "field"), [(COLOR, "color"), (CLASS, "kind")])
def test_a_thing_becomes_all_that_the_scene_lacks(planned, change, field):
    for edit in planned:
        there = {getattr(thing, field) for thing in edit.before.things}
        every = range(len(COLORS) if change == COLOR else len(THINGS))
        new = edit_tasks.new_things(edit.before, edit.things[0], change, READER)
        assert [getattr(thing, field) for thing in new] == [each for each in every if each not in there]


def test_a_new_colour_has_the_jitter_of_the_old(planned):
    for change, number, before, after in planned:
        if change == COLOR:
            shift = [scene.colors[number] - PALETTE[scene.things[number].color][1] for scene in (before, after)]
            inside = (after.colors[number] > 0) & (after.colors[number] < 255) & (before.colors[number] < 255)
            inside &= before.colors[number] > 0
            assert np.allclose(shift[0][inside], shift[1][inside])


def test_only_what_occurs_in_validation_is_asked_for():
    held = {"shapes_held_out": ("red-ring", "blue-square"), "shapes_val_pairs": "held_out"}
    reader = shapes.Config(shapes_kinds=("large",), shapes_things=("square", "ring"), **held)
    with pytest.raises(ValueError, match="got n_images 3, but 0 held-out scenes can be changed: pass fewer"):
        plan_scene_edits(reader, 3, (COLOR,))
    reader = shapes.Config(shapes_kinds=("nested", "large"), shapes_things=("square", "ring"))
    kinds = {THINGS[edit.after.things[edit.number].kind] for edit in plan_scene_edits(reader, 8, (CLASS,))}
    assert kinds == {"square", "ring"}
    edits = plan_scene_edits(shapes.Config(shapes_kinds=("nested",)), 3, (COLOR,))
    assert {edit.before.kind for edit in edits} == {"free"}


def test_a_thing_in_front_hides_a_changed_one(planned):
    before = next(edit.before for edit in planned if len(edit.before.things) > 1)
    over = with_thing(before, 1, before.things[1]._replace(box=before.things[0].box, kind=THINGS.index("square")))
    assert over.visible[0] == 0 and over.visible[1] == 1


def test_scenes_change_inside_the_regions_only(planned):
    regions = thing_regions(planned, 32)
    for region, (_, number, before, after) in zip(regions, planned, strict=True):
        pictures = [shapes.item_of(scene, 32)["image"].astype(int) for scene in (before, after)]
        changed = torch.from_numpy(abs(pictures[0] - pictures[1]).any(2))
        assert changed.any() and not (changed & ~region).any()
        mask = shapes.item_of(before, 32)["masks"][number].bool() | shapes.item_of(after, 32)["masks"][number].bool()
        assert region[mask].all() and region.sum() <= 2 * mask.sum()


def test_what_conditions_say_can_be_changed():
    assert readable_changes(("caption",)) == (COLOR, CLASS)
    assert readable_changes(BOXES) == CHANGES
    assert readable_changes(("boxes", "box_class")) == (CLASS, MOVE)
    assert readable_changes(("panoptic", "box_words")) == CHANGES
    assert readable_changes(("light",)) == ()


# Conditions of the targets


def test_captions_are_those_of_the_changed_scenes(planned):
    edits = plan_edits(model_with(("caption",)), N, 3, (), Path("judges"))
    assert (edits.by, edits.changes, len(edits)) == ("caption", (COLOR, CLASS), 2 * N)
    scenes = plan_scene_edits(READER, N, (COLOR, CLASS))
    assert [row["caption"] for row in edits.targets] == [shapes.captions_of(edit.after)[0] for edit in scenes]
    assert [row["caption"] for row in edits.inputs.rows] == [shapes.captions_of(e.before)[0] for e in scenes[::2]]
    for edit, row, text in zip(scenes, edits.targets, edits.texts, strict=True):
        old, new = (f"{COLORS[thing.color]} {THINGS[thing.kind]}" for thing in edit.things)
        assert text == f"{old} to {new}" and new in row["caption"]
    pictures = torch.stack([torch.from_numpy(shapes.item_of(edit.before, 32)["image"]) for edit in scenes])
    assert torch.equal(edits.originals, pictures.permute(0, 3, 1, 2))


def test_layouts_differ_in_one_field_of_one_thing():
    edits = plan_edits(model_with(BOXES), 5, 3, (), Path("judges"))
    assert (edits.by, edits.changes) == ("layout", CHANGES)
    fields_of = {COLOR: "box_color", CLASS: "box_class", MOVE: "boxes"}
    for number, target in enumerate(edits.targets):
        source = edits.inputs.rows[edits.images_of([number])[0]]
        for name in BOXES:
            old, new = (row[name].as_subclass(torch.Tensor) for row in (source, target))
            differing = (old != new).view(len(old), -1).any(1).sum()
            assert differing == (name == fields_of[CHANGES[number % 3]])


def test_captions_by_template_keep_their_sentence():
    edits = plan_edits(model_with(("caption",), "templates"), 6, 3, (), Path("judges"))
    sources = [edits.inputs.rows[image]["caption"] for image in edits.images_of(range(12))]
    targets = [row["caption"] for row in edits.targets]
    assert edits.changes == (COLOR, CLASS) and all(a != b for a, b in zip(sources, targets, strict=True))
    assert all(text.startswith("this is ") for text in (*sources, *targets))


def test_changes_that_a_model_does_not_read_are_refused():
    refusals = {
        "got changes move, which are not seen": (model_with(("caption",)), (MOVE,)),
        "got changes color, which are not seen": (model_with(("light",)), ()),
        "got changes for run, whose images are no drawn scenes": (model_with((), n_classes=10), (MOVE,)),
        "got run, wanted classes, or drawn scenes": (model_with(()), ()),
        "run reads caption beside classes": (model_with(("label", "caption"), n_classes=10, reader=None), ()),
    }
    for message, (model, changes) in refusals.items():
        with pytest.raises(ValueError, match=message):
            plan_edits(model, 2, 3, changes, Path("judges"))


def test_no_image_is_edited_to_its_own_class(monkeypatch):
    labels = (0, 3, 3, 9, 5)
    inputs = edit_tasks.InputImages(torch.zeros(5, 1, 8, 8).byte(), torch.zeros(5, 8, 8).bool(), ("a",) * 5, (), labels)
    monkeypatch.setattr(edit_tasks, "load_input_images", lambda files, n, model: inputs)
    monkeypatch.setattr(edit_tasks, "real_images_of", lambda labels, model: None)
    model = model_with(("label",), reader=None, n_classes=10)
    model.captions = lambda numbers: [f"class {number}" for number in numbers.tolist()]
    edits = plan_edits(model, 5, 4, (), Path("judges"))
    targets = torch.tensor([row["label"] for row in edits.targets]).view(5, 4)
    assert [row["label"] for row in edits.inputs.rows] == [*labels]
    for own, others in zip(labels, targets.tolist(), strict=True):
        assert own not in others and len({*others}) == 4
    assert edits.texts[0] == f"class 0 to class {targets[0, 0]}"
    images = targets.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).byte()
    monkeypatch.setattr(edit_tasks, "classifier_for", lambda data: lambda given: torch.eye(10)[given[:, 0, 0, 0].int()])
    judge = edits.open_judge()
    assert judge(images)[ASKED].all() and not judge((images + 1) % 10)[ASKED].any()
    with pytest.raises(ValueError, match="got classes 10, wanted at most 9"):
        plan_edits(model, 5, 10, (), Path("judges"))


def test_data_without_a_classifier_get_one_of_their_images(monkeypatch):
    labels, rng = np.arange(40) % 2, np.random.RandomState(0)
    pictures = (255 * labels[:, None, None, None] * rng.random_sample((40, 8, 8, 1))).astype(np.uint8)
    data = replace(DATA, img_size=8, n_channels=1)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    monkeypatch.setattr(edit_tasks, "classifier_for", lambda data: None)
    monkeypatch.setattr(edit_tasks, "load_labelled_images", lambda *_: LabelledImages(images, torch.from_numpy(labels)))
    model = SimpleNamespace(data=data, device=torch.device("cpu"), sampler=SimpleNamespace(n_classes=2))
    model.dataset = lambda split: None
    judge = edit_tasks.open_class_judge(model, torch.from_numpy(labels))
    assert judge(images)[ASKED].double().mean() > 0.8


def test_real_images_are_of_the_classes_asked_for(monkeypatch):
    dataset = SimpleNamespace(labels=np.array([0, 1, 1, 2]))
    given = []
    batches = lambda source, size, items: given.append(items) or [{"image": torch.tensor(items)}]  # noqa: E731
    monkeypatch.setattr(edit_tasks, "ImageSource", lambda *_: None)
    monkeypatch.setattr(edit_tasks, "images_in_order", batches)
    model = SimpleNamespace(data=DATA, dataset=lambda split: dataset)
    items = edit_tasks.real_images_of([1, 1, 0, 1, 2], model)
    assert dataset.labels[items].tolist() == [1, 1, 0, 1, 2] and items[0] != items[1]
    assert edit_tasks.real_images_of([1, 3], model) is None


# Judges: networks that know the scenes that images show


@pytest.fixture
def judge_of(monkeypatch):
    """A function to a judge whose networks find what there is in these scenes, whatever the images."""

    def make(edits, shown, placed, colored=True):
        shown = load_scenes(edit_tasks.open_given_scenes(shown, DATA, READER), range(len(edits)), "shown")
        after = [edit.after for edit in edits]
        after = load_scenes(edit_tasks.open_given_scenes(after, DATA, READER), range(len(edits)), "after")
        there = shown.layouts

        def look(classifier, places):
            found = []
            for image, box in zip(*places, strict=True):
                rows = there.rows_of(int(image))
                iou = tensor_iou(box[None], there.boxes[rows])[0]
                found.append(int(there.classes[rows][iou.argmax()]) if iou.max() > 0.5 else NOTHING)
            return torch.tensor(found)

        scores = torch.full((len(there),), 0.9, dtype=torch.float64)
        found = Detections(there.image, there.boxes, there.classes, scores)
        monkeypatch.setattr(edit_tasks, "cut_crops", lambda images, image, boxes: (image, boxes))
        monkeypatch.setattr(edit_tasks, "classify_crops", look)
        monkeypatch.setattr(scene_network, "detect", lambda network, images: found)
        monkeypatch.setattr(scene_network, "segment", lambda network, images: there.pixels)
        judges = SimpleNamespace(crops=None, scenes=None, hashes={})
        return SceneJudge(judges, edits, after.layouts, placed, colored)(shown.images)

    return make


@pytest.mark.parametrize("placed", [True, False])
def test_real_changed_scenes_show_what_is_asked_for(planned, judge_of, placed):
    edits = planned if placed else [edit for edit in planned if edit.change != MOVE]
    shown = judge_of(edits, [edit.after for edit in edits], placed)
    assert all(shown[name].all() for name in (ASKED, CLASS, COLOR))
    assert (shown[OTHERS].nan_to_num(1.0) == 1).double().mean() > 0.9  # but for colours that rain hides
    alone = torch.tensor([len(edit.before.things) == 1 for edit in edits])
    assert torch.equal(shown[OTHERS].isnan(), alone)


@pytest.mark.parametrize("placed", [True, False])
def test_unchanged_scenes_show_nothing_of_it(planned, judge_of, placed):
    edits = planned if placed else [edit for edit in planned if edit.change != MOVE]
    shown = judge_of(edits, [edit.before for edit in edits], placed)
    assert not shown[ASKED].any()
    of_color = torch.tensor([edit.change == COLOR for edit in edits])
    of_class = torch.tensor([edit.change == CLASS for edit in edits])
    assert not shown[COLOR][of_color].any() and not shown[CLASS][of_class].any()
    assert shown[CLASS][of_color].all() and shown[COLOR][of_class].double().mean() > 0.7  # less of it in another shape
    assert (shown[OTHERS].nan_to_num(1.0) == 1).double().mean() > 0.9


def test_colours_that_a_model_does_not_know_do_not_count(planned, judge_of):
    edits = [edit for edit in planned if edit.change == COLOR]
    shown = judge_of(edits, [edit.before for edit in edits], True, colored=False)
    assert shown[ASKED].all() and COLOR not in shown


def test_scenes_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="got images of 32 x 64 of drawn scenes"):
        plan_edits(model_with(("caption",), img_width=64), N, 3, (), Path("judges"))


def test_a_thing_at_both_places_has_not_moved(planned, judge_of):
    edits = [edit for edit in planned if edit.change == MOVE]
    copies = []
    for edit in edits:
        both = (*edit.after.things, edit.things[0])
        colors = np.concatenate([edit.after.colors, edit.before.colors[edit.number, None]])
        copies.append(replace(edit.after, things=both, colors=colors, visible=np.ones(len(both))))
    shown = judge_of(edits, copies, True)
    assert not shown[ASKED].any() and shown[CLASS].all() and shown[COLOR].all()


def test_the_colour_of_another_thing_is_not_what_is_asked_for(planned, judge_of):
    edits = [edit for edit in planned if edit.change == COLOR and len({each.kind for each in edit.before.things}) > 1]
    shown = []
    for edit in edits:
        old, new = edit.things
        other = next(k for k, each in enumerate(edit.before.things) if each.kind != old.kind)
        shown.append(with_thing(edit.before, other, edit.before.things[other]._replace(color=new.color)))
    found = judge_of(edits, shown, False)
    assert edits and found[CLASS].all() and found[COLOR].all() and not found[ASKED].any()


def test_other_things_that_change_are_missed(planned, judge_of):
    edits, shown = [], []
    for edit in planned:
        if edit.change == COLOR and len(edit.before.things) == 2:
            other = 1 - edit.number
            kind = next(k for k in range(len(THINGS)) if k != edit.after.things[other].kind)
            edits.append(edit)
            shown.append(with_thing(edit.after, other, edit.after.things[other]._replace(kind=kind)))
    assert edits and (judge_of(edits, shown, True)[OTHERS] == 0).all()
