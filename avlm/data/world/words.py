"""The words of the made-up world, shared by what is drawn, said, asked and answered.

A tiny language model learns this vocabulary from scratch, so every new word here costs
training time. Plain strings only.
"""

from typing import Literal, get_args

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Colour = Literal["red", "green", "blue", "yellow"]
COLOURS: tuple[Colour, ...] = get_args(Colour)

Shape = Literal["circle", "square", "triangle", "star"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

Sound = Literal["siren", "bell", "drum", "rain", "whistle", "buzzer", "bird", "clock"]
SOUNDS: tuple[Sound, ...] = get_args(Sound)

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)

MAX_COUNT = 4
"""Most shapes in one picture: four still fit 32 pixels without touching."""


def plural(shape: Shape) -> str:
    return f"{shape}s"


def count_phrase(count: int, colour: Colour, shape: Shape) -> str:
    """Say some equal shapes: "a red circle", "three red circles"."""
    if count == 1:
        return f"a {colour} {shape}"
    return f"{NUMBERS[count]} {colour} {plural(shape)}"
