"""As much of vLLM's public interface as a model's plug-in touches, with its names and arguments. Nothing runs here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn

T = TypeVar("T")


class ModelRegistry:
    archs: dict[str, str] = {}

    @classmethod
    def get_supported_archs(cls):
        return cls.archs.keys()

    @classmethod
    def register_model(cls, model_arch, model_cls):
        assert isinstance(model_cls, str) and model_cls.count(":") == 1  # told by name, so nothing is imported yet
        assert model_arch not in cls.archs
        cls.archs[model_arch] = model_cls


class MultiModalRegistry:
    def register_processor(self, processor, *, info, dummy_inputs):
        def wrap(model_cls):
            model_cls.parts = SimpleNamespace(processor=processor, info=info, dummy_inputs=dummy_inputs)
            return model_cls

        return wrap


class BaseProcessingInfo:
    def __init__(self, ctx):
        self.ctx = ctx

    def get_hf_processor(self, **kwargs):
        return self.ctx.processor

    def _get_expected_hidden_size(self):
        return None


class BaseDummyInputsBuilder(Generic[T]):
    def __init__(self, info):
        self.info = info

    def _get_dummy_images(self, *, width, height, num_images, overrides=None):
        from PIL import Image

        return [Image.new("RGB", (width, height), color=255)] * num_images


class BaseMultiModalProcessor(Generic[T]):
    def __init__(self, info, dummy_inputs):
        self.info, self.dummy_inputs = info, dummy_inputs


class MultiModalFieldConfig(SimpleNamespace):
    @staticmethod
    def flat_from_sizes(modality, size_per_item):
        return MultiModalFieldConfig(modality=modality, sizes=size_per_item.tolist())

    @staticmethod
    def batched(modality):
        return MultiModalFieldConfig(modality=modality, sizes=None)


class PromptUpdateDetails(SimpleNamespace):
    @staticmethod
    def select_token_id(seq, embed_token_id):
        return PromptUpdateDetails(full=seq, embed=[token == embed_token_id for token in seq])


class PromptReplacement(SimpleNamespace):
    pass


class MultiModalDataParser(SimpleNamespace):
    pass


class SupportsMultiModal:
    def configure_mm_token_handling(self, vocab_size, mm_token_ids):
        self.handled = (vocab_size, mm_token_ids)

    def _mark_tower_model(self, vllm_config, modalities):
        from contextlib import nullcontext

        return nullcontext()

    def _mark_language_model(self, vllm_config):
        from contextlib import nullcontext

        return nullcontext()


class SupportsPP:
    pass


class WeightsMapper(SimpleNamespace):
    def name(self, given):
        for old, new in self.orig_to_new_prefix.items():
            if given.startswith(old):
                return None if new is None else new + given[len(old) :]
        return given


class AutoWeightsLoader:
    def __init__(self, module):
        self.module = module

    def load_weights(self, weights, *, mapper):
        own, loaded = dict(self.module.named_parameters(remove_duplicate=False)), set()
        own |= dict(self.module.named_buffers())
        for given, value in weights:
            name = mapper.name(given)
            if name is None:
                continue
            with torch.no_grad():
                own[name].copy_(value)
            loaded.add(name)
        return loaded


class FakeLanguage(nn.Module):
    """A language model in its own names, which are those of transformers."""

    def __init__(self, config):
        super().__init__()
        from transformers import AutoModelForCausalLM

        inner = AutoModelForCausalLM.from_config(config)
        self.model, self.lm_head = inner.model, inner.lm_head
        self.make_empty_intermediate_tensors = None


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the modules where they are imported from, until the test is over."""
    here = globals()
    wanted = {
        "vllm": ("ModelRegistry",),
        "vllm.model_executor": (),
        "vllm.model_executor.models": (),
        "vllm.model_executor.models.interfaces": ("SupportsMultiModal", "SupportsPP"),
        "vllm.model_executor.models.utils": ("AutoWeightsLoader", "WeightsMapper"),
        "vllm.multimodal": (),
        "vllm.multimodal.inputs": ("MultiModalFieldConfig",),
        "vllm.multimodal.parse": ("MultiModalDataParser",),
        "vllm.multimodal.processing": (
            "BaseDummyInputsBuilder", "BaseMultiModalProcessor", "BaseProcessingInfo", "PromptReplacement",
            "PromptUpdateDetails",
        ),
    }  # fmt: skip
    for name, members in wanted.items():
        module = ModuleType(name)
        for member in members:
            setattr(module, member, here[member])
        monkeypatch.setitem(sys.modules, name, module)
    utils = sys.modules["vllm.model_executor.models.utils"]
    utils.maybe_prefix = lambda prefix, name: f"{prefix}.{name}" if prefix else name
    utils.init_vllm_registered_model = lambda vllm_config, hf_config, prefix: FakeLanguage(hf_config)
    sys.modules["vllm.multimodal"].MULTIMODAL_REGISTRY = MultiModalRegistry()
    monkeypatch.setattr(ModelRegistry, "archs", {})
    monkeypatch.delitem(sys.modules, "avlm.inference.elsewhere.vllm_model", raising=False)
