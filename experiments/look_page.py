"""The tab Look of the demo page: where an image attends to words, objects and codes while it is generated.

models/attention_recorder.py records the maps, harness/attention_targets.py finds the words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ImageDraw
from torch import Tensor

from experiments.harness.attention_targets import Target, find_targets
from experiments.metrics.heat_pictures import draw_heat
from experiments.page_components import SIDE, Settings, fill_on, show_errors
from experiments.playground import Playground, Request, enlarge_to_picture
from models.attention_recorder import AttentionMaps, MapRecorder, Reads
from models.heat_maps import heat_maps
from train.loop import Batch
from train.samplers._codes import CodeSampler
from train.samplers.autoregressive import AutoregressiveSampler

COLUMNS = 4  # of the gallery
MOST_STEPS = 50  # whose maps are kept
FRAME = (255, 255, 255)  # of the place that was clicked
WORDS, CODES = "words, objects and fields", "codes"
MEAN = "mean of layers"
KINDS: dict[str, Reads] = {WORDS: "tokens", "gated boxes": "gated", CODES: "self"}
HELP = (
    "Samples one image, the first of the seed, and shows where it attends to each word or object: blue little, red "
    "much. Over a step is what the network predicts there, over the mean the final image."
)
OF_CODES = "Of codes: click a place of the image to see which places it attends to."


Place = tuple[float, float]  # x and y of an image, in [0, 1]
CENTRE = (0.5, 0.5)


class Moment(NamedTuple):
    """What an image attends to in a step of sampling."""

    step: int  # from 1; 0: the mean of all steps
    image: Tensor  # uint8 (C, H, W): what the network predicts in this step; the final image for the mean
    heats: dict[str, Tensor]  # by layer and MEAN: (M, h, w) of M tokens, or (h w, h, w) of each code, over the codes


@dataclass(frozen=True)
class Attention:
    """The attention of an image while it was sampled, without its model."""

    run: Path
    checkpoint: int
    kind: str  # of KINDS
    conditions: Batch | None
    spans: dict[str, slice]  # of the tokens of each condition
    moments: list[Moment]  # the mean first

    def nearest(self, step: float) -> Moment:
        """Returns the moment whose step is nearest."""
        return min(self.moments, key=lambda each: abs(each.step - step))

    def maps(self, play: Playground, words: Sequence[str], heat: Tensor) -> list[tuple[str, Tensor]]:
        """Returns names and their heat (h, w): of these words or, without any, of all words, objects and fields.

        ValueError for words that the caption does not have.
        """
        targets = targets_of(play, self.conditions, self.kind, words)
        return [(target.name, heat[target.keys(self.spans)].mean(0)) for target in targets]


def targets_of(play: Playground, conditions: Batch | None, kind: str, words: Sequence[str]) -> list[Target]:
    """Returns these words of an image's caption, or what there is of a kind. ValueError: the caption has none."""
    gated = KINDS[kind] == "gated"
    (targets,) = find_targets(play.trained, conditions or {}, 1, () if gated else words, gated)
    return targets


def kinds_of(play: Playground) -> list[str]:
    """Returns which of KINDS a model has attention to; [] if it has none that can be recorded."""
    sampler = play.trained.sampler
    if isinstance(sampler, AutoregressiveSampler):
        return []
    encoders = sampler.network.encoders
    has = {"tokens": encoders.token_width, "gated": encoders.gated_width, "self": isinstance(sampler, CodeSampler)}
    return [kind for kind, reads in KINDS.items() if has[reads]]


def reason_against(play: Playground) -> str:
    """Returns in Markdown why there is nothing to look at in a model; "" if there is."""
    if kinds_of(play):
        return ""
    sampler = play.trained.sampler
    if isinstance(sampler, AutoregressiveSampler):
        reason = "The network of this run sees one code at a time, which makes no map."
    else:
        conditions = ", ".join(sampler.conditions) or "none"
        reason = f"The network of this run attends to none of its conditions ({conditions}): they are vectors or maps, "
        reason += "which are added or joined to features."
    return f"{reason} Choose a run with `--conditions text`, `objects` or `boxes`, or one of absorbing codes."


def cell_at(place: Place, grid: tuple[int, int]) -> tuple[int, int]:
    """Returns row and column in a grid (h, w) of a place."""
    (x, y), (h, w) = place, grid
    return min(int(y * h), h - 1), min(int(x * w), w - 1)


def heats_of(maps: AttentionMaps, reads: Reads) -> dict[str, Tensor]:
    """Returns the heat of the tokens of an image, (M, h, w), by layer and MEAN; of its codes (h w, h, w), which take
    more memory, MEAN alone. Differential attention keeps its sign."""
    if reads == "self":
        mean = torch.stack([layer[0].mean(0) for layer in maps.layers.values()]).mean(0).cpu()  # (h, w, h w)
        return {MEAN: mean.flatten(0, 1).unflatten(1, mean.shape[:2])}
    signed = any((layer < 0).any() for layer in maps.layers.values())
    choices = {MEAN: None} | {name: [name] for name in maps.layers}
    return {name: heat_maps(maps, layers, signed=signed)[0].cpu() for name, layers in choices.items()}


def look(play: Playground, request: Request, kind: str, words: Sequence[str] = ()) -> Attention:
    """Samples the first image of a request, and records its attention of one of KINDS, checking `words` before.

    Of more than MOST_STEPS steps, evenly spaced ones are kept. ValueError: the model has no such attention, or the
    caption no such words.
    """
    if kind not in kinds_of(play):
        raise ValueError(reason_against(play) or f"got {kind!r}, wanted one of: {', '.join(kinds_of(play))}")
    request, reads = replace(request, count=1), KINDS[kind]
    conditions = play.conditions(request)
    if reads != "self":
        targets_of(play, conditions, kind, words)
    recorder, moments, stride = MapRecorder(reads, per_head=False, per_step=True), [], 1

    def on_step(i: int, t: float, s: float, x: Tensor, predicted: Tensor) -> Tensor:
        nonlocal moments, stride
        if recorder.steps and i % stride == 0:  # a step that changes no code calls no network
            image = play.trained.space.preview(x, predicted)[1][0].cpu()
            moments.append(Moment(i + 1, image, heats_of(mean_of_calls(recorder), reads)))
        if len(moments) > MOST_STEPS:
            stride *= 2
            moments = [each for each in moments if (each.step - 1) % stride == 0]
        recorder.steps.clear()
        return x

    image = play.draw(request, on_step=on_step, recorder=recorder)[0]
    mean, trained = Moment(0, image, heats_of(recorder.maps(), reads)), play.trained
    return Attention(trained.run, trained.step, kind, conditions, recorder.spans, [mean, *moments])


def mean_of_calls(recorder: MapRecorder) -> AttentionMaps:
    """Returns the mean of the maps of one image over the calls in `steps`."""
    calls = [call.layers for call in recorder.steps]
    layers = {name: torch.stack([call[name] for call in calls]).mean(0) for name in calls[0]}
    return AttentionMaps(layers, recorder.spans, recorder.size, torch.tensor([len(calls)]))


def draw_maps(
    play: Playground, attention: Attention, words: Sequence[str], place: Place, step: float, layer: str = MEAN
) -> list:
    """Returns the picture of a step, and a list of maps over it with their names: of words, or of the codes of a place,
    which has a frame in the picture."""
    moment = attention.nearest(step)
    heat = moment.heats[layer]
    picture = enlarge_to_picture(moment.image, SIDE).convert("RGB")
    size = picture.height, picture.width
    if KINDS[attention.kind] == "self":
        h, w = heat.shape[1:]
        row, column = cell_at(place, (h, w))
        maps = [(f"row {row + 1}, column {column + 1}", heat[row * w + column])]
        box = (column * size[1] // w, row * size[0] // h, (column + 1) * size[1] // w, (row + 1) * size[0] // h)
        ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=3)
    else:
        maps = attention.maps(play, words, heat)
    return [picture, [(draw_heat(moment.image, each, size), name) for name, each in maps]]


def parse_words(text: str) -> list[str]:
    """Returns the words and phrases of a text, which commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


def kind_boxes(play: Playground) -> list:
    """Returns the choice of KINDS, the box of words and the note on codes, or the updates of them."""
    import gradio as gr

    kinds = kinds_of(play)
    kind = kinds[0] if kinds else None
    about = "Words or phrases of the prompt, separated by commas. Empty: all."
    return [
        gr.Radio(kinds, value=kind, label="attention to", visible=len(kinds) > 1),
        gr.Textbox("", label="words", info=about, visible=kind == WORDS and play.reads_prompts, min_width=320),
        gr.Markdown(OF_CODES, visible=kind == CODES),
    ]


@dataclass(frozen=True)
class Handlers:
    """What the parts of the tab do, and what another run does to it: updates of components."""

    settings: Settings

    def look(self, kind: str, words: str, layer: str, *values: Any) -> list:
        """Returns the attention, the place, and what the slider, the choice of layers, the picture and the maps show,
        and the seed."""
        import gradio as gr

        with show_errors():
            play, request = self.settings.read(*values)
            attention = look(play, request, kind, parse_words(words))
            last = attention.moments[-1].step
            slider, layers = gr.Slider(maximum=max(1, last), value=0), list(attention.moments[0].heats)
            layer = layer if layer in layers else MEAN
            choice = gr.Dropdown(layers, value=layer, visible=len(layers) > 2)  # one layer alone is the mean
            return [attention, CENTRE, slider, choice, *self.show(attention, words, CENTRE, 0, layer), request.seed]

    def show(self, attention: Attention | None, words: str, place: Place, step: float | None, layer: str) -> list:
        """Returns the picture and the maps of a step."""
        import gradio as gr

        if attention is None:
            return [gr.skip(), gr.skip()]
        with show_errors():
            runs = self.settings.runs
            play = runs.open(runs.name(attention.run), attention.checkpoint)
            return draw_maps(play, attention, parse_words(words), place, step or 0, layer)

    def show_kind(self, kind: str, run: str, step: int | str) -> list:
        """Returns updates of the box of words and of the note on codes."""
        import gradio as gr

        reads_prompts = self.settings.runs.open(run, step).reads_prompts
        return [gr.update(visible=kind == WORDS and reads_prompts), gr.update(visible=kind == CODES)]

    def pick_run(self, run: str, last_choice: str) -> list:
        """Returns updates of the area, the message, the results, the attention and `kind_boxes`, and the run."""
        import gradio as gr

        if run == last_choice:
            return [gr.skip()] * 8
        play = self.settings.runs.open(run)
        reason = reason_against(play)
        areas = [gr.update(visible=not reason), gr.update(value=reason, visible=bool(reason)), gr.update(visible=False)]
        return [*areas, None, *kind_boxes(play), run]


def add_look_tab(settings: Settings, loaded: Any) -> None:
    """Adds the tab; `loaded` is the event of another run."""
    import gradio as gr

    play = settings.runs.current
    reason = reason_against(play)
    with gr.Tab("Look"):
        message = gr.Markdown(reason, visible=bool(reason))
        with gr.Column(visible=not reason) as area:
            gr.Markdown(HELP)
            with gr.Row():
                kind, words, note = kind_boxes(play)
            button = gr.Button("Look", variant="primary")
            with gr.Column(visible=False) as results:
                with gr.Row():
                    step = gr.Slider(0, 1, value=0, step=1, label="step", info="0: the mean of all steps.", scale=2)
                    about = "Single layers may find things that the mean hides."
                    layer = gr.Dropdown([MEAN], value=MEAN, label="layer", info=about, min_width=200)
                with gr.Row():
                    style = {"show_label": False, "format": "png", "interactive": False, "buttons": []}
                    picture = gr.Image(**style, min_width=200)
                    maps = gr.Gallery(columns=COLUMNS, object_fit="contain", scale=2, **style)
        attention, place, last_choice = gr.State(None), gr.State(CENTRE), gr.State(settings.run.value)
    handlers = Handlers(settings)

    def click_place(
        attention: Attention | None, words: str, step: float | None, layer: str, event: gr.SelectData
    ) -> list:
        x, y = event.index
        width, height = enlarge_to_picture(attention.moments[0].image, SIDE).size
        place = (x / width, y / height)
        return [place, *handlers.show(attention, words, place, step, layer)]

    outputs, quietly = [picture, maps], {"show_progress": "hidden", "api_visibility": "private"}
    inputs, show = [kind, words, layer, *settings.inputs], [attention, words, place, step, layer]
    changed = [attention, place, step, layer, *outputs, settings.seed]
    fill_on([button.click], handlers.look, inputs, changed, results, attention, show_progress_on=outputs)
    gr.on([words.submit, step.input, layer.input], handlers.show, show, outputs, trigger_mode="always_last", **quietly)
    picture.select(click_place, [attention, words, step, layer], [place, *outputs], **quietly)
    kind.input(handlers.show_kind, [kind, *settings.inputs[:2]], [words, note], **quietly)
    switched = [area, message, results, attention, kind, words, note, last_choice]
    loaded.success(handlers.pick_run, [settings.run, last_choice], switched, **quietly)
