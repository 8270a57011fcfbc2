"""How an audio encoder learns to tell what is said by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from avlm.config.base import Settings


class Ctc(Settings):
    """Connectionist temporal classification (Graves et al., ICML 2006) through one linear layer, thrown away after."""

    units: Literal["tokens", "characters"] = "tokens"
    """What is told: the tokens of the language model, or the text's bytes in UTF-8, of which English has one for each
    character: 256 units for any language."""
    pool: int = Field(1, ge=1)
    """Neighbouring embeddings that are averaged first. Every unit needs one of what is left, and one more where it
    comes twice in a row."""
