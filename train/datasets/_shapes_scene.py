"""Scenes of the data set `shapes`: what is where, without pixels.

A scene is a pure function of (seed, split, index) and what may occur. `RandomState.random_sample` is its only source of
randomness, since numpy keeps that stream for ever, and everything else is arithmetic: scenes are the same on every
machine. Geometry is in the unit square, x to the right and y down, so that a scene is the same at every size in pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

THINGS = ("disc", "square", "triangle", "plus", "ring", "bow")
GROUNDS = ("sky", "grass", "sand", "water")
PALETTE = (
    ("red", (222, 30, 38)),
    ("orange", (252, 130, 14)),
    ("yellow", (255, 226, 40)),
    ("green", (22, 158, 62)),
    ("blue", (26, 78, 226)),
    ("purple", (160, 44, 206)),
)
COLORS = tuple(name for name, _ in PALETTE)
PAIRS = tuple(f"{color}-{thing}" for color in COLORS for thing in THINGS)
KINDS = {"free": 0.4, "neighbours": 0.2, "occlusion": 0.2, "small": 0.1, "nested": 0.1}  # shares of the scenes
MORE_KINDS = {"large": 0.4}  # shares of kinds that occur only where they are named, beside those above
SPLIT_NUMBERS = {"train": 0, "val": 1, "judge": 2}  # part of the seed
CAMERAS = {  # and whether a dark bar stands at the left, at the right
    **{"CAM_FRONT": (False, False), "CAM_FRONT_LEFT": (True, False), "CAM_FRONT_RIGHT": (False, True)},
    "CAM_BACK": (True, True),
}
BAR = 2 / 32  # width of a bar
NIGHT = 0.45  # factor of all colours at night
JITTER = 14  # largest deviation of a thing's colour from the palette, per channel
LEAST_VISIBLE = 0.36  # share of a thing; above 0.3 at any size
MOST_OVERLAP = 0.1  # IoU of two boxes that are placed freely
PLUS_ARM = 0.36  # half the width of a plus's arms, in half sides of its box
RING_HOLE = 0.5  # inner radius of a ring, in outer ones
N_STREAKS = 10  # of rain
N_GRAINS = 16  # of grass, along each side
GRID = 64  # samples along each side by which visible shares are measured
TRIES = 40  # to place a thing; then the scene goes without it

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Array = NDArray[np.floating]


class Thing(NamedTuple):
    """An object of a scene: numbers of its class in THINGS and of its colour in PALETTE, and its whole extent."""

    kind: int
    color: int
    box: Box


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene without pixels; later things stand in front of earlier ones."""

    split: str
    index: int
    kind: str  # of PLACE
    things: tuple[Thing, ...]
    visible: Array  # (n,) share of each thing that no later one covers, in [0, 1]
    colors: Array  # (n, 3) in [0, 255]: the palette's, with jitter
    grounds: tuple[int, ...]  # numbers in GROUNDS: above and below the horizon, or one everywhere
    horizon: float
    camera: str  # of CAMERAS
    weather: str  # "sunny" or "rain"
    light: str  # "daytime" or "night"
    grains: Array  # (N_GRAINS, N_GRAINS) in [0, 1): brightness of grass
    streaks: Array  # (N_STREAKS, 2): upper ends (x, y) of streaks of rain
    phase: float  # of water, in [0, 1)

    @property
    def location(self) -> str:
        """The grounds from top to bottom, such as "sky-sand"."""
        return "-".join(GROUNDS[number] for number in self.grounds)

    @property
    def time(self) -> str:
        """A time stamp: the number of the scene."""
        return f"{self.index:06d}"

    @property
    def file_name(self) -> str:
        """A path in the manner of nuImages, whose parts say what the picture shows."""
        parts = (f"scene-{self.time}", self.camera, self.time, self.weather, self.light, self.location)
        return f"samples/{self.camera}/{'__'.join(parts)}.png"


def draw_scene(
    seed: int,
    split: str,
    index: int,
    kinds: Sequence[str] = tuple(KINDS),
    things: Sequence[str] = THINGS,
    grounds: Sequence[str] = GROUNDS,
    pairs: Sequence[str] = PAIRS,
) -> Scene:
    """Draws one scene. `kinds` are those that occur, in any order: a scene of another kind is replaced by one of these,
    while scenes of these kinds are the same for any `kinds`. Likewise `things` and `grounds` are the classes that
    occur: each of another class is replaced by one of these. With one ground, every scene has just that one. `pairs` of
    a colour and a class, such as "red-disc", are those that occur: other colours are replaced, and with a class that
    has none left also the class."""
    rng = np.random.RandomState([seed, SPLIT_NUMBERS[split], index])
    of_kind, camera, weather, light, upper, lower, horizon, phase = map(float, rng.random_sample(8))
    grains, streaks = rng.random_sample((N_GRAINS, N_GRAINS)), rng.random_sample((N_STREAKS, 2))
    jitter = rng.random_sample((8, 3))  # more rows than a scene has things
    camera = pick(camera, tuple(CAMERAS))
    kind = choose_kind(of_kind, kinds)
    left, right = CAMERAS[camera]
    colors = colors_by_thing(tuple(pairs))
    allowed = [number for number in find_numbers(things, THINGS) if colors[number]]
    placer = Placer(rng, BAR * left, 1 - BAR * right, allowed, colors)
    PLACE[kind](placer)
    palette = np.array([PALETTE[thing.color][1] for thing in placer.things], float)
    return Scene(
        split=split,
        index=index,
        kind=kind,
        things=tuple(placer.things),
        visible=placer.visible_shares(),
        colors=np.clip(palette + JITTER * (2 * jitter[: len(palette)] - 1), 0, 255),
        grounds=choose_grounds(upper, lower, find_numbers(grounds, GROUNDS)),
        horizon=0.25 + 0.5 * horizon,
        camera=camera,
        weather="rain" if weather < 0.25 else "sunny",
        light="night" if light < 0.25 else "daytime",
        grains=grains,
        streaks=streaks * (1.1, 0.9) + (0.0, -0.1),
        phase=phase,
    )


def pick(u: float, options: Sequence) -> object:
    """Returns the option at a uniform number in [0, 1)."""
    return options[int(u * len(options))]


def choose_kind(u: float, kinds: Sequence[str]) -> str:
    """Returns the kind at a uniform number in [0, 1); one that is not in `kinds` is chosen anew, by shares."""
    kept = {each: share for each, share in (KINDS | MORE_KINDS).items() if each in kinds}
    if MORE_KINDS.keys() & kept.keys():
        return find_share(u * sum(kept.values()), kept)[0]
    kind, place = find_share(u, KINDS)
    return kind if kind in kinds else find_share(place * sum(kept.values()), kept)[0]


def find_share(u: float, shares: dict[str, float]) -> tuple[str, float]:
    """Returns the name whose share contains a number in [0, sum of the shares), and where in the share, in [0, 1)."""
    *names, last = shares
    for name in names:
        if u < shares[name]:
            return name, u / shares[name]
        u -= shares[name]
    return last, u / shares[last]


def find_numbers(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Returns the numbers of the classes that are in `names`, in ascending order."""
    return [number for number, name in enumerate(classes) if name in names]


@cache
def colors_by_thing(pairs: tuple[str, ...]) -> list[list[int]]:
    """Returns the numbers of the colours that each class of things has in pairs such as "red-disc"."""
    return [find_numbers([pair.removesuffix(f"-{thing}") for pair in pairs], COLORS) for thing in THINGS]


def choose_number(u: float, numbers: Sequence[int], allowed: Sequence[int]) -> int:
    """Returns the one of `numbers` at a uniform u in [0, 1); one that is not in `allowed` is chosen anew, from these.

    All of `allowed`, which are some of `numbers`, are equally likely.
    """
    place = u * len(numbers)
    number = numbers[int(place)]
    return number if number in allowed else allowed[int((place - int(place)) * len(allowed))]


def choose_grounds(upper: float, lower: float, allowed: Sequence[int]) -> tuple[int, ...]:
    """Returns one of the allowed grounds in 1 of 5 scenes, or if there is no other, otherwise two different ones."""
    first = choose_number(upper, range(len(GROUNDS)), allowed)
    allowed = [number for number in allowed if number != first]
    if lower < 0.2 or not allowed:
        return (first,)
    others = [number for number in range(len(GROUNDS)) if number != first]
    return first, choose_number((lower - 0.2) / 0.8, others, allowed)


def mask_in_window(kind: int, box: Box, n: int) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Returns the rows and columns of a grid of n x n cells that a thing may cover, and which centres it covers."""
    x1, y1, x2, y2 = (n * side for side in box)
    left, top, right, bottom = (int(np.ceil(side - 0.5)) for side in (x1, y1, x2, y2))
    u = (np.arange(left, right) + (0.5 - (x1 + x2) / 2)) * (2 / (x2 - x1))  # in [-1, 1]
    v = ((np.arange(top, bottom) + (0.5 - (y1 + y2) / 2)) * (2 / (y2 - y1)))[:, None]
    return slice(top, bottom), slice(left, right), is_inside(kind, u, v)


def is_inside(kind: int, u: Array, v: Array) -> NDArray[np.bool_]:
    """Returns which points (v, u) of a box [-1, 1] x [-1, 1] a thing covers."""
    name = THINGS[kind]
    if name == "square":
        return np.ones((v.shape[0], u.shape[0]), bool)
    if name == "triangle":
        return 2 * np.abs(u) <= v + 1
    if name == "plus":
        return (np.abs(u) <= PLUS_ARM) | (np.abs(v) <= PLUS_ARM)
    if name == "bow":
        return np.abs(v) <= np.abs(u)
    square = u * u + v * v
    return (square <= 1) & (square >= RING_HOLE**2) if name == "ring" else square <= 1


def box_iou(a: Box, b: Box) -> float:
    """Returns the intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


class Placer:
    """Places things of the classes `allowed` between the bars of a scene, each in front of those before it.

    `colors` are the numbers of the colours that each class may have.
    """

    def __init__(
        self, rng: np.random.RandomState, left: float, right: float, allowed: list[int], colors: list[list[int]]
    ):
        self.rng, self.left, self.right, self.allowed, self.colors = rng, left, right, allowed, colors
        self.things: list[Thing] = []
        self.masks: list[NDArray[np.bool_]] = []  # (GRID, GRID) each, its whole extent

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self.rng.random_sample())

    def integer(self, low: int, high: int) -> int:
        """Returns a whole number in [low, high]."""
        return low + int(self.uniform() * (high - low + 1))

    def anywhere(self, side: float) -> Box:
        """Returns a box of a side at a random place."""
        x, y = self.uniform(self.left, self.right - side), self.uniform(0, 1 - side)
        return x, y, x + side, y + side

    def scatter(self, low: float, high: float, exclude: int | None = None) -> bool:
        """Places a thing, of a class as `kind_except` chooses, with sides in [low, high], nearly apart from others."""
        for _ in range(TRIES):
            box = self.anywhere(self.uniform(low, high))
            if all(box_iou(box, other.box) <= MOST_OVERLAP for other in self.things):
                if self.add(self.kind_except(exclude), box):
                    return True
        return False

    def kind_except(self, exclude: int | None) -> int:
        """Returns the number of a random allowed class other than `exclude`, or `exclude` if it alone is allowed."""
        if exclude is None:
            return choose_number(self.uniform(), range(len(THINGS)), self.allowed)
        others = [(exclude + step) % len(THINGS) for step in range(1, len(THINGS))]
        allowed = [kind for kind in self.allowed if kind != exclude]
        u = self.uniform()
        return choose_number(u, others, allowed) if allowed else exclude

    def add(self, kind: int, box: Box) -> bool:
        """Adds a thing of a random colour, which things under its box do not have; returns False, and adds nothing, if
        it leaves the space between the bars, covers too much of another thing, or no colour is left."""
        x1, y1, x2, y2 = box
        if x1 < self.left or y1 < 0 or x2 > self.right or y2 > 1:
            return False
        mask = np.zeros((GRID, GRID), bool)
        rows, columns, inside = mask_in_window(kind, box, GRID)
        mask[rows, columns] = inside
        under = [thing for thing in self.things if box_iou(thing.box, box) > 0]
        if under and self.visible_shares(mask).min() < LEAST_VISIBLE:
            return False
        taken = {thing.color for thing in under}
        colors = [color for color in range(len(PALETTE)) if color not in taken]
        allowed = [color for color in colors if color in self.colors[kind]]
        if not allowed:
            return False
        self.things.append(Thing(kind, choose_number(self.uniform(), colors, allowed), box))
        self.masks.append(mask)
        return True

    def visible_shares(self, *front: NDArray[np.bool_]) -> Array:
        """Returns the visible share of each thing, behind the masks of further things."""
        return visible_shares(np.array([*self.masks, *front]))


def visible_shares(masks: NDArray[np.bool_]) -> Array:
    """Returns the visible share (n,) of things with these masks (n, GRID, GRID), each behind those after it."""
    masks = masks.reshape(-1, GRID * GRID)
    covered = np.zeros(GRID * GRID, bool)
    shares = np.ones(len(masks))
    for i in range(len(masks) - 1, -1, -1):
        shares[i] = 1 - np.count_nonzero(masks[i] & covered) / np.count_nonzero(masks[i])
        covered |= masks[i]
    return shares


def place_scattered(placer: Placer, fewest: int, most: int, low: float, high: float) -> None:
    """Places things nearly apart from each other."""
    for _ in range(placer.integer(fewest, most)):
        placer.scatter(low, high)


def place_neighbours(placer: Placer) -> None:
    """Places 2 or 3 things of one class in a row or column, and in half of the scenes another of any other class."""
    n, upright = placer.integer(2, 3), placer.uniform() < 0.5
    kind = placer.kind_except(None)
    sides = [placer.uniform(0.2, 0.26 if n == 3 else 0.36) for _ in range(n)]
    gaps = [placer.uniform(0, 0.04) for _ in range(n - 1)]
    left, right = (0, 1) if upright else (placer.left, placer.right)
    start = placer.uniform(left, right - sum(sides) - sum(gaps))
    left, right = (placer.left, placer.right) if upright else (0, 1)
    middle = placer.uniform(left + max(sides) / 2, right - max(sides) / 2)
    for side, gap in zip(sides, [*gaps, 0], strict=True):
        across = middle - side / 2
        x, y = (across, start) if upright else (start, across)
        placer.add(kind, (x, y, x + side, y + side))
        start += side + gap
    if placer.uniform() < 0.5:
        placer.scatter(0.18, 0.34, exclude=kind)


def place_occlusion(placer: Placer) -> None:
    """Places a stack of 2 or 3 things, each in front of the one before, and in 1 of 3 scenes another beside it."""
    placer.add(placer.kind_except(None), placer.anywhere(placer.uniform(0.34, 0.5)))
    for _ in range(placer.integer(1, 2)):
        back = placer.things[-1].box
        for box in boxes_over(placer, back):
            if placer.add(placer.kind_except(None), box):
                break
    if placer.uniform() < 1 / 3:
        placer.scatter(0.18, 0.34)


def boxes_over(placer: Placer, back: Box) -> Iterator[Box]:
    """Yields boxes about as large as `back`, their centres 20 to 45 % of its side from its own."""
    side = back[2] - back[0]
    for _ in range(2 * TRIES):
        dx, dy = placer.uniform(-0.5, 0.5), placer.uniform(-0.5, 0.5)
        if 0.2**2 <= dx * dx + dy * dy <= 0.45**2:
            half = side * placer.uniform(0.85, 1.1) / 2
            x, y = (back[0] + back[2]) / 2 + dx * side, (back[1] + back[3]) / 2 + dy * side
            yield x - half, y - half, x + half, y + half


def place_nested(placer: Placer) -> None:
    """Places a small thing inside a large one of another class, and in half of the scenes another beside them."""
    kind = placer.kind_except(None)
    placer.add(kind, placer.anywhere(placer.uniform(0.42, 0.6)))
    x1, y1, x2, _ = placer.things[0].box
    for _ in range(TRIES):
        side = (x2 - x1) * placer.uniform(0.36, 0.5)
        x, y = (start + placer.uniform(0.15, 0.85) * (x2 - x1 - side) for start in (x1, y1))
        if placer.add(placer.kind_except(kind), (x, y, x + side, y + side)):
            break
    if placer.uniform() < 0.5:
        placer.scatter(0.18, 0.34)


PLACE = {
    "free": partial(place_scattered, fewest=1, most=5, low=0.22, high=0.5),
    "neighbours": place_neighbours,
    "occlusion": place_occlusion,
    "small": partial(place_scattered, fewest=3, most=6, low=0.15, high=0.22),
    "nested": place_nested,
    "large": partial(place_scattered, fewest=1, most=3, low=0.34, high=0.5),
}
