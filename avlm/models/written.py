"""A decoder of Llama's shape, written out: the same weights, without what a call of a module costs.

One token of a small language model takes a processor far longer to ask for than to compute: every layer goes through
some thirty modules and calls. Most families share one shape (norm, four projections, turned by position, norm, a gated
feed-forward network), and for these the step over slots is written out here. Nothing is assumed of a family: its
modules must be of that shape, and what they make of made-up tokens must be what comes out here; else it is left to its
own code.

Shapes in this file:
    T  tokens of a step    D  language-model width    H  heads    K  key/value heads    W  head width    P  positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from avlm.models.single import Single
from avlm.models.slots import Run, SlotLayer, Slots, Step
from avlm.models.softmax import How
from avlm.models.vectors import Product

LARGEST = 2**28
"""Bytes of weights from which on reading them takes so long that nothing else counts."""
CLOSE = 1e-4
"""Largest difference that counts as equal, relative to the largest value."""

Norm = tuple[nn.Parameter, float]
"""Weight of a root-mean-square norm, and what is added below the root."""
Turns = tuple[Tensor, Tensor]
"""Cosine and signed sine (T, 1, W) of each token's position."""


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The tokens of a step that have something behind them that is wanted now."""

    index: Tensor
    """int64; which of the step's they are."""
    turns: Turns
    step: Step


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one layer."""

    first: Norm
    query: Product
    key: Product
    value: Product
    query_norm: Norm | None
    key_norm: Norm | None
    out: Product
    second: Norm
    gate: Product
    up: Product
    down: Product
    act: nn.Module
    how: How
    width: int
    """Of a head."""

    def read(self, x_TD: Tensor, turns: Turns, step: Step, slots: SlotLayer, ends: Ends | None = None) -> Tensor:
        """What the layer makes of a step's tokens, or of its ends alone; the keys and values of all are written."""
        h = _normed(x_TD, self.first)
        k, v = (made(h).view(len(h), -1, self.width) for made in (self.key, self.value))
        k = k if self.key_norm is None else _normed(k, self.key_norm)
        keys, values = slots.write(_turned(k, turns), v)
        if ends is not None:
            if not ends.step.tokens:
                return x_TD[:0]
            x_TD, h, turns, step = x_TD[ends.index], h[ends.index], ends.turns, ends.step
        q = self.query(h).view(len(h), -1, self.width)
        q = q if self.query_norm is None else _normed(q, self.query_norm)
        seen = step.attend_tokens(_turned(q, turns), keys, values, self.how)
        x_TD = self.out(seen.flatten(1)).add_(x_TD)
        h = _normed(x_TD, self.second)
        inner = self.act(self.gate(h))
        return self.down(inner.mul_(self.up(h))).add_(x_TD)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return F.rms_norm(x, norm[0].shape, *norm)


def _turned(x_THW: Tensor, turns: Turns) -> Tensor:
    """Heads turned by position: x cos + (-second half, first half) sin, the sign being in the sine here.

    Source:
        RoFormer (arXiv:2104.09864, section 3.4.2), halves instead of neighbours.
    """
    cos, sin = turns
    first, second = x_THW.chunk(2, -1)
    return torch.addcmul(x_THW * cos, torch.cat((second, first), -1), sin)


class Written:
    """A language model's decoder, written out.

    Args:
        language: Of the shape that `layers_of` looks for.
        layers: Its weights.
    """

    def __init__(self, language: PreTrainedModel, layers: Sequence[Layer]) -> None:
        decoder = language.get_decoder()
        last = _norm(decoder.norm)
        assert last is not None
        self.layers, self.last, self.rotary = layers, last, decoder.rotary_emb
        self._single = Single(layers, last)
        self._table: Turns | None = None

    def read(self, embeds_TD: Tensor, step: Step, slots: Slots) -> Tensor:
        """Hidden states of `step.ends` (their number, D), as in the decoder's `last_hidden_state`.

        What the last layer makes of other tokens is asked for by nobody, so it makes nothing of them.
        """
        cos, sin = self._turns(step.device, slots.room)
        if step.single() and all(t.is_cpu and t.dtype == torch.float32 for t in (embeds_TD, slots.own[0].keys)):
            place = step.pasts[0]
            turned = cos[place, 0].numpy(), sin[place, 0].numpy()
            return self._single.read(embeds_TD[0], turned, place, slots)[None]
        turns = cos.index_select(0, step.places_T), sin.index_select(0, step.places_T)
        *before, last = zip(self.layers, slots.own, strict=True)
        for layer, own in before:
            embeds_TD = layer.read(embeds_TD, turns, step, own)
        ends = None
        if len(step.ends) < step.tokens:
            index = torch.tensor(step.ends, dtype=torch.long, device=step.device)
            ends = Ends(index, (turns[0][index], turns[1][index]), step.of_ends())
        return _normed(last[0].read(embeds_TD, turns, step, last[1], ends), self.last)

    def _turns(self, device: torch.device, room: int) -> Turns:
        """Cosine and signed sine (P, 1, W) of all positions, from a table that the model's own module makes."""
        if self._table is None or len(self._table[0]) < room or self._table[0].device != device:
            at = torch.arange(room, device=device)[None]
            cos, sin = self.rotary(torch.zeros(1, 1, device=device), at)
            first, second = sin[0].chunk(2, -1)
            self._table = cos[0][:, None], torch.cat((-first, second), -1)[:, None]
        return self._table


def written_out(language: PreTrainedModel, layers: Sequence[Layer]) -> Written | None:
    """A language model's decoder written out, or None where that does not make what its own code makes.

    Args:
        layers: As `layers_of` found them.
    """
    try:
        written = Written(language, layers)
        return written if _same(language, written) else None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return None  # not of that shape after all


def same_weights(some: Sequence[Layer], others: Sequence[Layer]) -> bool:
    """Whether layers have the very same parameters; those that learn change in place."""
    return list(map(_parameters, some)) == list(map(_parameters, others))


def _parameters(layer: Layer) -> list[int]:
    """Which parameters a layer has, by identity."""
    products = (layer.query, layer.key, layer.value, layer.out, layer.gate, layer.up, layer.down)
    norms = (layer.first, layer.second, layer.query_norm, layer.key_norm)
    found = [part for product in products for part in (product.weight, product.bias)]
    return [id(part) for part in found] + [id(norm[0]) for norm in norms if norm is not None]


def layers_of(language: PreTrainedModel) -> list[Layer] | None:
    """The weights of each layer; None where one is of another shape, or they are large, or not in float32.

    Where anybody listens in on a module, or has changed what it does, it is left to go its own way.
    """
    config, decoder = language.config.get_text_config(), language.get_decoder()
    if decoder.training:  # what drops something is never the same twice
        return None
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in decoder.modules()):
        return None
    found = dict(decoder.named_children())
    if set(found) != {"embed_tokens", "layers", "norm", "rotary_emb"} or _norm(decoder.norm) is None:
        return None
    if getattr(config, "sliding_window", None) is not None or language.device.type == "meta":
        return None
    if sum(p.numel() * p.element_size() for p in decoder.parameters()) > LARGEST:
        return None
    layers = [_layer(layer) for layer in decoder.layers]
    return None if None in layers else [layer for layer in layers if layer is not None]


def _layer(layer: nn.Module) -> Layer | None:
    """The weights of a layer; None where its modules are others."""
    parts: dict[str, Any] = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return None
    attends, feeds = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    normed = set(attends) == projections | {"q_norm", "k_norm"}
    if not (normed or set(attends) == projections) or set(feeds) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    norms = [_norm(parts["input_layernorm"]), _norm(parts["post_attention_layernorm"])]
    norms += [_norm(attends[name]) for name in ("q_norm", "k_norm") if normed]
    linear = {name: product_of(module) for name, module in {**attends, **feeds}.items() if name.endswith("_proj")}
    first, second, *of_heads = norms
    if first is None or second is None or None in of_heads or None in linear.values():
        return None
    w: dict[str, Any] = linear
    attention = parts["self_attn"]
    width, scale = int(attention.head_dim), float(attention.scaling)
    return Layer(
        first=first, query=w["q_proj"], key=w["k_proj"], value=w["v_proj"],
        query_norm=of_heads[0] if normed else None, key_norm=of_heads[1] if normed else None,
        out=w["o_proj"], second=second, gate=w["gate_proj"], up=w["up_proj"], down=w["down_proj"],
        act=feeds["act_fn"], how=How(True, None, scale, 0.0, None, None), width=width,
    )  # fmt: skip


def product_of(module: nn.Module) -> Product | None:
    """What a linear layer does, as torch has it, in float32; None for any other, or where anybody listens in on it."""
    plain = type(module) is nn.Linear and type(module.weight.data) is Tensor and module.weight.dtype == torch.float32
    heard = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return Product(module.weight, module.bias) if plain and not heard else None  # type: ignore[arg-type]


def _norm(module: nn.Module) -> Norm | None:
    """Of a root-mean-square norm; None of what has other parameters."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    parameters = dict(module.named_parameters())
    if eps is None or set(parameters) != {"weight"} or parameters["weight"].dtype != torch.float32:
        return None
    return parameters["weight"], float(eps)


@torch.inference_mode()
def _same(language: PreTrainedModel, written: Written) -> bool:
    """Whether made-up tokens, of answers in three steps, come out as from the decoder itself."""
    decoder, device = language.get_decoder(), language.device
    width = language.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    sides = Slots(len(written.layers)), Slots(len(written.layers))
    for pasts, runs in (([], [Run(0, 0, 3), Run(1, 0, 5, ends=False)]), ([3], [Run(1, 5, 2), Run(2, 0, 2)]), ([4], [])):
        found = []
        embeds = torch.randn(len(pasts) + sum(run.count for run in runs), width, generator=generator).to(device)
        for slots, ours in zip(sides, (True, False), strict=True):
            step = slots.step = Step(pasts, runs, device)
            slots.reserve(3, step.needed)
            if ours:
                found.append(written.read(embeds, step, slots))
                continue
            states = decoder(inputs_embeds=embeds[None], return_dict=True, **step.kwargs(embeds, slots))
            found.append(states.last_hidden_state[0][step.ends])
        largest = found[1].abs().max()
        if not bool(largest > 0) or not bool((found[0] - found[1]).abs().max() <= CLOSE * largest):
            return False
    return True
