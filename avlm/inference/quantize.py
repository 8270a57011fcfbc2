"""Weights of the language model in eight bits: a quarter of the memory, and of what is read for a token."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

from torch import nn

from avlm.errors import ConfigError, MissingExtraError
from avlm.models.modeling import AvlmForConditionalGeneration

Quant = Literal["none", "int8"]


def check_quant(how: str) -> None:
    """Refuse what cannot be done, before a model is loaded.

    Raises:
        ConfigError: There is no such way.
        MissingExtraError: torchao is not installed.
    """
    if how not in get_args(Quant):
        raise ConfigError(
            f"quant={how} is no way to keep weights that avlm knows. Use one of {', '.join(get_args(Quant))}"
        )
    if how != "none" and find_spec("torchao") is None:
        raise MissingExtraError("torchao", "quant", f"quant={how}")


def quantize(model: AvlmForConditionalGeneration, how: Quant) -> None:
    """Keep the linear layers of the language model in eight bits, a scale for each row; sums are as precise as before.

    Encoders, connectors, embeddings and the head stay as they are: they are small beside it, or all hangs on them.

    Args:
        model: Changed in place.

    Raises:
        ConfigError: There is no such way.
        MissingExtraError: torchao is not installed.
    """
    check_quant(how)
    if how == "none":
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    quantize_(model.language_model, Int8WeightOnlyConfig(), filter_fn=chosen)
