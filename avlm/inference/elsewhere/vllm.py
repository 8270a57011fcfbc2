"""vLLM finds avlm here, by the entry point `vllm.general_plugins`, in each of its processes.

    vllm serve runs/demo/model

Importing this file imports nothing of vLLM.
"""

from __future__ import annotations

ARCHITECTURE = "AvlmForConditionalGeneration"
CLASS = "avlm.inference.elsewhere.vllm_model:AvlmForVllm"


def register() -> None:
    """Tell vLLM where the class of our model directories is; once more changes nothing.

    That transformers reads their config.json and their processor is seen to by the import of avlm itself.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, CLASS)
