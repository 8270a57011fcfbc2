"""How a stage learns from pairs of answers."""

from __future__ import annotations

from pydantic import Field

from avlm.config.base import Settings


class Dpo(Settings):
    """Direct preference optimization (arXiv:2305.18290): the better answer of a pair is to gain more than the worse.

    What an answer has gained is the logarithm of how much likelier it is than it was when the stage began.
    """

    beta: float = Field(0.1, gt=0)
    """How much a gain counts: small lets the model move far from where it began. 0.1 is the paper's."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round (conservative DPO)."""
