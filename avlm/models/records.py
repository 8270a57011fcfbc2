"""What the tables of vision and of audio encoders have in common."""

from __future__ import annotations

from avlm.errors import ConfigError


def unknown_family(sense: str, model_type: str, known: list[str]) -> str:
    article = {"vision": "a vision", "audio": "an audio"}[sense]
    return (
        f"{model_type} is not {article} encoder that avlm has a record of, so its tokens cannot be counted. "
        f"Use one of {', '.join(known)}, or give avlm a record of it with avlm.models.{sense}_encoders.add_family"
    )


def check_layer(sense: str, layer: int | None, layers: int) -> None:
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise ConfigError(
            f"model.{sense}.layer={layer}: the encoder has {layers} layers, so its hidden states are 0 to {layers}, or "
            f"{-layers - 1} to -1 from behind. Use one of them"
        )
