"""lmms-eval finds avlm here, by the entry point `lmms_eval.models`: ``lmms-eval --model avlm``."""

from __future__ import annotations

from typing import Any

WHERE = "avlm.inference.elsewhere.lmms_models"


def manifest() -> Any:
    """What lmms-eval wants to know: the name, and the classes for its two kinds of tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("avlm", simple_class_path=f"{WHERE}.AvlmSimple", chat_class_path=f"{WHERE}.AvlmChat")
