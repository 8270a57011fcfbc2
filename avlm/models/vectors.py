"""A matrix times a few vectors, which is what one token of an answer costs: as fast as memory hands the matrix over.

torch leaves such products to MKL, which reads at half of that speed on processors that are not of its own maker.
NumPy's library has kernels for all of them, and reads the very same memory, so no weight is there twice. For one vector
it is as fast on MKL's own processors, too; for two and three MKL is the faster there. It has threads of its own that
torch's settings do not reach, so it is asked where both compute in one thread, and torch elsewhere.

Shapes in this file:
    T  tokens    D  width of what goes in    N  width of what comes out
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.models.products import half_used, processor

FEW = 3
"""Vectors up to which a product for each is faster than one for all of them, where MKL uses half of a processor."""
LARGE = 2**17
"""Weights from which on reading them takes longer than asking for it."""
ASKED = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
"""Where NumPy's library learns in how many threads it computes; the first that is set."""


def one_thread() -> bool:
    """Whether NumPy's library was told to compute in one thread, or there is but one processor."""
    told = next((os.environ[name] for name in ASKED if os.environ.get(name)), str(os.cpu_count()))
    return told == "1"


class Seen:
    """A parameter as NumPy sees it, in the same memory, wherever that is at the moment.

    Args:
        parameter: On the processor.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._array: np.ndarray | None = None
        self._at = -1

    def array(self) -> np.ndarray:
        """What it is now; not to be written to."""
        if self._array is None or self.parameter.data_ptr() != self._at:
            # Not by `numpy()`, after which a tensor can never again give its memory back while it lives.
            self._array, self._at = np.from_dlpack(self.parameter.detach()), self.parameter.data_ptr()
        return self._array


class Product:
    """What a linear layer does, with the parameters that it has at that moment.

    Args:
        weight: float32 (N, D).
        bias: float32 (N,), or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.weight, self.bias = weight, bias
        self._alone = one_thread()
        self._few = FEW if half_used(*processor()) else 1
        self._large = weight.numel() >= LARGE and weight.is_contiguous()
        self._weight, self._bias = Seen(weight), None if bias is None else Seen(bias)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The layer's output (T, N); nothing learns from it."""
        if self._large and len(x_TD) <= self._few and x_TD.is_cpu and self._by_numpy():
            made = torch.from_numpy(self._times(x_TD.numpy()))
            return made if self.bias is None else made.add_(self.bias)
        return F.linear(x_TD, self.weight, self.bias)

    def one(self, x_D: np.ndarray, out_N: np.ndarray | None = None) -> np.ndarray:
        """As a call, for one vector on the processor: (N,), which may be written to what is there already."""
        if self._by_numpy():
            made_N = np.matmul(self._weight.array(), x_D, out=out_N)
        else:
            out = None if out_N is None else torch.from_numpy(out_N)
            made_N = torch.mv(self.weight.detach(), torch.from_numpy(x_D), out=out).numpy()
        if self._bias is not None:
            made_N += self._bias.array()
        return made_N

    def _by_numpy(self) -> bool:
        return self._alone and torch.get_num_threads() == 1

    def _times(self, vectors_TD: np.ndarray) -> np.ndarray:
        weight_ND = self._weight.array()
        made_TN = np.empty((len(vectors_TD), len(weight_ND)), np.float32)
        for vector, own in zip(vectors_TD, made_TN, strict=True):
            np.matmul(weight_ND, vector, out=own)
        return made_TN
