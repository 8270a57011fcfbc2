"""How many floating-point operations a step takes, from the shapes that go through the model.

A product of matrices is two operations for each number of the weight and each place that it is used at, once forward,
once more where its input gets a gradient, and once more where its weight does. Attention is two such products of
queries and keys, twice as many backward. What is computed a second time (activation checkpointing) is not counted
twice, and what is not computed (a text that has no picture, features that are kept on disk) is not counted at all.
Norms, activations, embeddings, the choice of experts and the attention inside connectors are left out.

Source:
    PaLM, arXiv:2204.02311, appendix B, which counts causal attention as if it were whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row

QUERIES = frozenset({"q_proj", "query", "q", "linear_q", "to_q", "q_lin"})
FUSED = frozenset({"qkv", "qkv_proj", "query_key_value", "Wqkv"})
"""Names that the layers in front of an encoder's attention go by; the second make queries, keys and values at once."""
ATTENTIVE = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


class StepFlops:
    """Counts what goes through a model while a row is computed.

    Args:
        model: The model.
        head: A throwaway layer beside it, if the stage has one.
    """

    def __init__(self, model: AvlmForConditionalGeneration, head: nn.Module | None = None) -> None:
        self.total = 0
        """Operations since the last `take`."""
        self.model = model
        self._row: Row | None = None
        self._counts = False
        self._hooks: list[RemovableHandle] = []
        self._output = model.get_output_embeddings()
        self._answers = head is None
        roots: dict[str, nn.Module] = {"model": model} if head is None else {"model": model, "head": head}
        for prefix, root in roots.items():
            for name, module in root.named_modules():
                self._listen(f"{prefix}.{name}", module)
        self._hook(model.language_model.get_decoder(), self._attend)

    def take(self) -> int:
        """What was counted, which begins anew."""
        total, self.total = self.total, 0
        return total

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Count while the block encodes media of any rows."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    @contextmanager
    def row(self, row: Row) -> Iterator[None]:
        """Count while the block computes a row's losses; its backward pass is counted with it, and not seen."""
        self._row = row
        with self.encoding():
            try:
                yield
            finally:
                self._row = None
        weight = getattr(self._output, "weight", None)
        if self._answers and weight is not None:
            targets = row.num_targets() - sum(map(len, row.words))
            passes = 2 + int(weight.requires_grad) if torch.is_grad_enabled() else 1
            passes += row.teacher is not None
            self.total += 2 * weight.numel() * targets * passes

    def _listen(self, name: str, module: nn.Module) -> None:
        if module is self._output:
            return  # its product is taken at targets only, module or not
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            self._hook(module, self._product)
            attends = self._attention_of(name)
            if attends is not None:
                self._hook(module, attends)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)) and hasattr(module, "num_experts"):
            self._hook(module, self._experts)

    def _hook(self, module: nn.Module, call: Callable[..., None]) -> None:
        self._hooks.append(module.register_forward_hook(call))

    def _attention_of(self, name: str) -> Callable[..., None] | None:
        """What counts the attention behind an encoder's layer of this name."""
        if "_tower." not in name:
            return None
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        return self._queries if last in QUERIES else self._fused if last in FUSED else None

    def _product(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if not self._counts or torch.compiler.is_compiling():
            return
        weight = module.weight
        positions = output.numel() // (output.shape[1] if weight.ndim > 2 else output.shape[-1])
        self.total += 2 * weight.numel() * positions * _passes(args[0], weight)

    def _experts(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Each token goes to some of the experts, whose weights lie in one tensor."""
        if not self._counts or torch.compiler.is_compiling():
            return
        weights = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        routed = len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
        positions = args[1].numel() if routed else args[0].numel() // args[0].shape[-1]
        each = sum(p.numel() * _passes(args[0], p) for p in weights)
        self.total += 2 * each // module.num_experts * positions

    def _queries(self, module: Any, args: Any, output: Tensor) -> None:
        self._encoder_attention(output, output.shape[-1])

    def _fused(self, module: Any, args: Any, output: Tensor) -> None:
        self._encoder_attention(output, output.shape[-1] // 3)

    def _encoder_attention(self, output: Tensor, width: int) -> None:
        """Every place of an item attends to every other, padding included: that is computed too."""
        if not self._counts or output.ndim != 3 or torch.compiler.is_compiling():
            return
        items, places = output.shape[:2]
        self.total += 4 * items * places**2 * width * (1 + 2 * output.requires_grad)

    def _attend(self, module: Any, args: Any, output: Any) -> None:
        """The language model's attention, within each sample."""
        if self._row is None or torch.compiler.is_compiling():
            return
        row = self._row
        if row.teacher is not None and not torch.is_grad_enabled():
            row = row.teacher
        state = output[0] if not isinstance(output, Mapping) else next(iter(output.values()))
        pairs = language_attention(self.model.language_model.config.get_text_config(), row.lengths)
        self.total += pairs * (1 + 2 * (torch.is_grad_enabled() and state.requires_grad))


def language_attention(config: Any, lengths: list[int]) -> int:
    """Operations of one forward pass of all attention layers over samples of these lengths.

    Args:
        config: Of a language model, as transformers names its fields.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0  # a model of states alone, or one whose layers have different numbers of heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, window = heads * head, getattr(config, "sliding_window", None)
    total = 0
    for kind in kinds:
        reach = window if kind == "sliding_attention" and window else max(lengths)
        if kind in ATTENTIVE:
            total += sum(4 * length * min(length, reach) * width for length in lengths)
    return total


def _passes(tensor: Tensor, weight: Tensor) -> int:
    """How often a product is taken: forward, and backward for its input and for its weight."""
    if not torch.is_grad_enabled():
        return 1
    return 1 + int(tensor.requires_grad) + int(weight.requires_grad)
