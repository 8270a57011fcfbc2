"""The package's face: names that stay, an import that costs nothing, and transformers that knows avlm afterwards."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import avlm
from avlm.convert.weights import save_model

NAMES = {
    "load", "Chat", "Image", "Audio", "Video", "Sampling", "recipe", "train", "compose",
    "import_model", "export_model", "AvlmConfig",
    "AvlmForConditionalGeneration", "AvlmProcessor", "AvlmError",
}  # fmt: skip


def test_public_names_are_there_and_listed() -> None:
    assert set(avlm.__all__) >= NAMES
    assert set(dir(avlm)) >= NAMES
    for name in avlm.__all__:
        assert getattr(avlm, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'avlm' has no attribute 'lod'"):
        avlm.lod  # noqa: B018


def test_registering_twice_changes_nothing() -> None:
    from transformers import AutoConfig

    avlm.register()
    avlm.register()
    assert type(AutoConfig.for_model("avlm")) is avlm.AvlmConfig


LOADS = """
import json
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({folder!r})
processor = AutoProcessor.from_pretrained({folder!r})
content = [{{"type": "image", "path": {picture!r}}}, {{"type": "text", "text": "What?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
names = [type(x).__name__ for x in (AutoConfig.from_pretrained({folder!r}), model, processor)]
print(json.dumps([names, output[0].tolist()]))
"""
ORDERS = {
    "avlm first": "import avlm",
    "transformers first": "import transformers, avlm",
    "a model file first": "import avlm.models.modeling",
    "the processor first": "import avlm.data.processor",
    "a library that asks for transformers in between": (
        "import avlm, importlib.util; assert importlib.util.find_spec('transformers'); import accelerate"
    ),
}


@pytest.mark.parametrize(
    "orders", [["transformers first", "the processor first"], pytest.param([*ORDERS], marks=pytest.mark.slow)]
)
def test_a_model_directory_loads_after_any_order_of_imports(
    make_model: Callable[..., Any], picture: Callable[..., Path], tmp_path: Path, orders: list[str]
) -> None:
    made = make_model()
    save_model(*made, tmp_path / "model")
    path = picture()
    script = LOADS.format(folder=str(tmp_path / "model"), picture=str(path))
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"{ORDERS[name]}\n{script}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in orders
    }
    messages = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "What?"}]}]
    inputs = made.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = made.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    for name, process in running.items():
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {error.decode()[-2000:]}"
        names, ids = json.loads(out)
        assert names == ["AvlmConfig", "AvlmForConditionalGeneration", "AvlmProcessor"], name
        assert ids == expected, name


def test_importing_avlm_and_its_recipes_loads_neither_torch_nor_transformers() -> None:
    script = (
        "import avlm, sys, avlm.recipes, avlm.layout, avlm.cli\n"
        "avlm.AvlmError, avlm.recipe, dir(avlm)\n"
        "heavy = {'torch', 'transformers', 'peft', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
