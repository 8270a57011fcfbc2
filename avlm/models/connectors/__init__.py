"""Connectors: from an encoder's embeddings to the language model's.

`base` says what every connector is, `sequences` and `squares` hold those that join neighbours, `queries` those whose
learned queries read. How many tokens each makes is `layout`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from avlm.config import connectors as settings
from avlm.models.connectors.base import Connector
from avlm.models.connectors.queries import Perceiver, Qformer
from avlm.models.connectors.sequences import Conv, Pool, Prefix, Stack, Swiglu
from avlm.models.connectors.squares import PixelShuffle

_SETTINGS: TypeAdapter[Any] = TypeAdapter(settings.Connector)
_MODULES: dict[type[settings.ConnectorSettings], Callable[[Any, int, int], Connector]] = {
    settings.LinearConnector: Stack,
    settings.MlpConnector: Stack,
    settings.SwigluConnector: Swiglu,
    settings.PrefixConnector: Prefix,
    settings.PoolConnector: Pool,
    settings.ConvConnector: Conv,
    settings.PixelShuffleConnector: PixelShuffle,
    settings.QformerConnector: Qformer,
    settings.WindowQformerConnector: Qformer,
    settings.PerceiverConnector: Perceiver,
}


def build_connector(config: dict[str, Any], width: int, out_width: int, *, newline: bool = False) -> Connector:
    """Build a connector with fresh weights.

    Args:
        config: Its settings as they stand in a model's `config.json`.
        width: C, of the encoder.
        out_width: D, of the language model.
        newline: With a learned vector `image_newline` (D), which ends each row of a picture's grid.
    """
    wanted = _SETTINGS.validate_python(config)
    connector = _MODULES[type(wanted)](wanted, width, out_width)
    if newline:
        connector.register_parameter("image_newline", nn.Parameter(torch.randn(out_width) / out_width**0.5))
    return connector
