"""avlm gives any language model eyes and ears.

    import avlm
    model = avlm.load("runs/demo/model")
    answer = model.chat("What is said, and does it match the picture?", avlm.Image("a.png"), avlm.Audio("b.wav"))

After ``import avlm``, transformers' `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` load avlm's model
directories. Importing avlm loads neither torch nor transformers: the names below are fetched when they are used, and
the registration happens when transformers itself is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load": "avlm.inference.chat",
    "Chat": "avlm.inference.chat",
    "Image": "avlm.inference.chat",
    "Audio": "avlm.inference.chat",
    "Video": "avlm.inference.chat",
    "Sampling": "avlm.inference.sampling",
    "recipe": "avlm.recipes",
    "train": "avlm.eval.examining",
    "compose": "avlm.convert.compose",
    "import_model": "avlm.convert.importing",
    "export_model": "avlm.convert.exporting",
    "AvlmConfig": "avlm.models.configuration",
    "AvlmForConditionalGeneration": "avlm.models.modeling",
    "AvlmProcessor": "avlm.data.processor",
    "AvlmError": "avlm.errors",
}

__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'avlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


def register() -> None:
    """Register avlm's classes with transformers' `Auto*` classes. Calling it twice changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    from avlm.data.processor import AvlmProcessor
    from avlm.models import attention
    from avlm.models.beats import BeatsConfig, BeatsEncoder
    from avlm.models.configuration import AvlmConfig
    from avlm.models.modeling import AvlmForConditionalGeneration, AvlmModel
    from avlm.models.whale import WhaleConfig, WhaleEncoder

    AutoConfig.register("avlm", AvlmConfig, exist_ok=True)
    AutoModel.register(AvlmConfig, AvlmModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(AvlmConfig, AvlmForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(AvlmConfig, AvlmProcessor, exist_ok=True)
    for config, encoder in ((WhaleConfig, WhaleEncoder), (BeatsConfig, BeatsEncoder)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, encoder, exist_ok=True)
    attention.register()


class _WhenTransformersComes(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers avlm right after transformers' own package has been imported, and is gone.

    Listing recipes must not cost an import of torch, and whoever imports transformers must find avlm registered.
    Parts of avlm that build on transformers import it before anything else, so none of them is half loaded then.
    Libraries that only ask whether transformers is there (accelerate does) must not use up the occasion.
    """

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        register()


if "transformers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _WhenTransformersComes())
