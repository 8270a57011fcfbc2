"""transformers' own pipelines on our model directories: the answers are the chat's."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

import avlm
from avlm.convert.weights import save_model
from avlm.inference.sampling import Sampling


@pytest.fixture
def directory(make_model, tmp_path):
    save_model(*make_model(), tmp_path / "model")
    return str(tmp_path / "model")


def messages(**media):
    parts = [{"type": kind, kind: value} for kind, value in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


ANY = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="transformers' any-to-any pipeline needs torchvision"
)


@pytest.mark.parametrize("task", ["image-text-to-text", pytest.param("any-to-any", marks=ANY)])
def test_a_question_about_a_picture(task, directory):
    wanted = avlm.load(directory).chat(avlm.Image(picture()), "What is it?", sampling=Sampling(max_tokens=6))
    pipe = pipeline(task, model=directory)
    (found,) = pipe(messages(image=picture()), max_new_tokens=6, do_sample=False, return_full_text=False)
    assert found["generated_text"].strip() == wanted


@ANY
def test_a_question_about_a_sound(directory):
    wave = (np.sin(np.arange(8000) / 9) * 0.3).astype(np.float32)
    wanted = avlm.load(directory).chat(avlm.Audio(wave), "What is it?", sampling=Sampling(max_tokens=6))
    pipe = pipeline("any-to-any", model=directory)
    (found,) = pipe(messages(audio=wave), max_new_tokens=6, do_sample=False, return_full_text=False)
    assert found["generated_text"].strip() == wanted
