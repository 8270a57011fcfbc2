"""Pictures of 32 by 32 pixels: handwritten digits, and scenes of coloured shapes.

A scene says everything a question may ask about; how it is drawn (place, size, tilt,
shade, background, grain) is chance and must never be asked about. Every function takes
its chance from the generator it is given.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from avlm.data.world.words import NUMBERS, SPLITS, Colour, Shape, Split, count_phrase
from avlm.errors import MissingExtraError

SIZE_PX = 32
SCALE = 4
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""

RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 230),
    "yellow": (238, 208, 30),
}

EVAL_EVERY = 5
"""Of the images of each digit, every fifth is held out."""

Relation = Literal["left of", "above"]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape."""

    colour: Colour
    shape: Shape

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Digit:
    """A handwritten digit, 0 to 9."""

    value: int

    @property
    def caption(self) -> str:
        return f"the digit {NUMBERS[self.value]}"


@dataclass(frozen=True, slots=True)
class Group:
    """One to four equal shapes, anywhere."""

    count: int
    thing: Thing

    @property
    def caption(self) -> str:
        return count_phrase(self.count, self.thing.colour, self.thing.shape)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two things that differ in colour and in shape, ``first`` being left or above."""

    first: Thing
    relation: Relation
    second: Thing

    @property
    def caption(self) -> str:
        return f"a {self.first} {self.relation} a {self.second}"


Scene = Digit | Group | Pair


def draw_scene(scene: Scene, split: Split, rng: Generator) -> np.ndarray:
    """Draw one picture of a scene; another call draws another one.

    Args:
        scene: What is to be seen.
        split: Which handwritten digits may be used; shapes do not depend on it.
        rng: Where chance comes from.

    Returns:
        RGB pixels, uint8, shape (32, 32, 3).

    Raises:
        MissingExtraError: A digit is wanted and scikit-learn is not installed.
    """
    if isinstance(scene, Digit):
        return _draw_digit(scene.value, split, rng)
    canvas = _blank(_background(rng))
    for thing, centre_px, size_px in _arrange(scene, rng):
        paint(canvas, thing, centre_px, size_px, rng)
    return finish(canvas, rng)


def draw_frames(first: Thing, second: Thing, rng: Generator, num_frames: int) -> np.ndarray:
    """Draw a film: one thing drifts about in the first half, the other in the second.

    Returns:
        RGB pixels, uint8, shape (num_frames, 32, 32, 3).
    """
    background = _background(rng)
    frames = []
    for thing in (first, second):
        size_px = rng.uniform(13, 16)
        place_px = rng.uniform(11, 21, size=2)
        step_px = rng.uniform(-0.7, 0.7, size=2)
        shade = _shade(thing.colour, rng)
        tilt_deg = rng.uniform(-10, 10)
        for _ in range(num_frames // 2):
            canvas = _blank(background)
            place_px = np.clip(place_px + step_px + rng.normal(0, 0.2, size=2), 9, 23)
            centre_px = (float(place_px[0]), float(place_px[1]))
            _fill(canvas, outline(thing.shape, centre_px, size_px, tilt_deg), shade)
            # Less grain than in pictures: what the video codec throws away anyway.
            frames.append(finish(canvas, rng, grain=1.0))
    return np.stack(frames)


def paint(canvas: Image.Image, thing: Thing, centre_px: Point, size_px: float, rng: Generator) -> None:
    """Draw a thing on a canvas of SCALE times the picture's size."""
    tilt_deg = rng.uniform(-10, 10)
    _fill(canvas, outline(thing.shape, centre_px, size_px, tilt_deg), _shade(thing.colour, rng))


def outline(shape: Shape, centre_px: Point, size_px: float, tilt_deg: float) -> list[Point]:
    """Give the corners of a shape of a width and height of about ``size_px``."""
    radius = size_px / 2
    if shape == "circle":
        corners = _ring(40, radius)
    elif shape == "square":
        corners = [(x * radius * 0.9, y * radius * 0.9) for x, y in _SQUARE]
    elif shape == "triangle":
        corners = [(x, y + radius * 0.2) for x, y in _ring(3, radius * 1.25)]
    else:
        points, notches = _ring(5, radius * 1.2), _ring(5, radius * 0.5, turn=0.1)
        corners = [corner for both in zip(points, notches, strict=True) for corner in both]
    tilt = math.radians(tilt_deg)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(centre_px[0] + x * cos - y * sin, centre_px[1] + x * sin + y * cos) for x, y in corners]


def finish(canvas: Image.Image, rng: Generator, grain: float = 3.0) -> np.ndarray:
    """Average a canvas down to the picture's size and add grain (levels of 255)."""
    pixels = np.asarray(canvas.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX), dtype=np.float64)
    grainy: np.ndarray = pixels + rng.normal(0, grain, pixels.shape)
    return grainy.clip(0, 255).astype(np.uint8)


_SQUARE = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def _ring(num_corners: int, radius: float, turn: float = 0.0) -> list[Point]:
    """Corners evenly on a circle, clockwise from the top, turned by a share of a full turn."""
    angles = [2 * math.pi * (index / num_corners + turn) for index in range(num_corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _arrange(scene: Group | Pair, rng: Generator) -> list[tuple[Thing, Point, float]]:
    """Choose place and size in pixels of everything in a scene, nothing touching."""
    if isinstance(scene, Group):
        return [(scene.thing, centre_px, size_px) for centre_px, size_px in _scatter(scene.count, rng)]
    near, far = rng.uniform(7.2, 9.2), rng.uniform(22.8, 24.8)
    # Nearly level, so that "left of" is never as true as "above".
    across = rng.uniform(11, 21) + rng.uniform(-2.5, 2.5, size=2)
    sizes_px = rng.uniform(11, 14), rng.uniform(11, 14)
    if scene.relation == "left of":
        centres = (near, float(across[0])), (far, float(across[1]))
    else:
        centres = (float(across[0]), near), (float(across[1]), far)
    return [(scene.first, centres[0], sizes_px[0]), (scene.second, centres[1], sizes_px[1])]


def _scatter(count: int, rng: Generator) -> list[tuple[Point, float]]:
    """Places for equal shapes: one has the whole picture, more take a quarter each."""
    if count == 1:
        return [((rng.uniform(9, 23), rng.uniform(9, 23)), rng.uniform(12, 16))]
    size_px = rng.uniform(10, 12)
    slack_px = (SIZE_PX / 2 - size_px * 1.25) / 2
    quarters = rng.permutation(4)[:count]
    places = []
    for quarter in quarters:
        dx, dy = rng.uniform(-slack_px, slack_px, size=2)
        places.append(((8 + 16 * (quarter % 2) + dx, 8 + 16 * (quarter // 2) + dy), size_px))
    return places


def _draw_digit(value: int, split: Split, rng: Generator) -> np.ndarray:
    """Handwriting in light ink on a dark ground, at a place and size of chance."""
    choices = handwriting()[split][value]
    strokes = Image.fromarray(choices[rng.integers(len(choices))])
    width, height = (int(side) for side in rng.integers(26, SIZE_PX + 1, size=2))
    strokes = strokes.resize((width, height), Image.Resampling.BICUBIC)
    strokes = strokes.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    left = int(rng.integers(0, SIZE_PX - width + 1))
    top = int(rng.integers(0, SIZE_PX - height + 1))
    cover = np.zeros((SIZE_PX, SIZE_PX, 1))
    cover[top : top + height, left : left + width, 0] = np.asarray(strokes) / 240
    ground = _tint(rng.uniform(10, 45), rng)
    ink = _tint(rng.uniform(200, 250), rng)
    pixels: np.ndarray = ground + cover * (ink - ground) + rng.normal(0, 3.0, (SIZE_PX, SIZE_PX, 3))
    return pixels.clip(0, 255).astype(np.uint8)


@functools.cache
def handwriting() -> dict[Split, list[list[np.ndarray]]]:
    """scikit-learn's 1,797 digits (UCI optdigits), by split and value, as 10 by 10 uint8.

    The split is by index and the same for every seed: no world trains on another's
    held-out digits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "Drawing handwritten digits") from error
    images, values = load_digits(return_X_y=True)
    by_split: dict[Split, list[list[np.ndarray]]] = {split: [[] for _ in NUMBERS] for split in SPLITS}
    seen = [0] * len(NUMBERS)
    for image, value in zip(images, values, strict=True):
        split: Split = "eval" if seen[value] % EVAL_EVERY == EVAL_EVERY - 1 else "train"
        seen[value] += 1
        # The strokes reach the edge of the 8 by 8; with a margin they do not look cut off.
        by_split[split][value].append(np.pad(image.reshape(8, 8) * 15, 1).astype(np.uint8))
    return by_split


def _background(rng: Generator) -> tuple[int, int, int]:
    """A plain ground, dark or light: mid greys would swallow the darker colours."""
    level = rng.uniform(12, 55) if rng.random() < 0.6 else rng.uniform(215, 245)
    red, green, blue = (int(channel) for channel in _tint(level, rng))
    return red, green, blue


def _tint(level: float, rng: Generator) -> np.ndarray:
    """A grey of that level, a little off."""
    tint: np.ndarray = level + rng.uniform(-6, 6, size=3)
    return tint.clip(0, 255)


def _shade(colour: Colour, rng: Generator) -> tuple[int, int, int]:
    """A colour, a little lighter or darker and a little off, as paint would be."""
    shade = np.array(RGB[colour]) * rng.uniform(0.88, 1.08) + rng.uniform(-10, 10, size=3)
    red, green, blue = (int(channel) for channel in np.clip(shade, 0, 255))
    return red, green, blue


def _blank(background: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (SIZE_PX * SCALE, SIZE_PX * SCALE), background)


def _fill(canvas: Image.Image, corners_px: list[Point], shade: tuple[int, int, int]) -> None:
    ImageDraw.Draw(canvas).polygon([(x * SCALE, y * SCALE) for x, y in corners_px], fill=shade)
