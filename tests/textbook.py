"""A second definition of an explanation, for `DrawnViT` only: it shares no line with the library but the SAE's codes.

The model itself writes down its maps and residual streams, autograd differentiates it, R is a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from drawn_vit import Book, DrawnViT, Part
from torch import Tensor

from fga_fast import SparseAutoencoder
from fga_fast.settings import Gate, Settings


@dataclass
class Sum:
    """A result, and the sum of the absolute values of its summands: rounding is on the scale of these."""

    value: Tensor
    scale: Tensor


@dataclass
class Page:
    """What the textbook says of one image and one value."""

    relevance: list[Sum] = field(default_factory=list)  # [P], at the entry of block start_block, of the next, ...
    units: dict[int, float] = field(default_factory=dict)  # block -> what gates measure its scores in
    scores: dict[int, Sum] = field(default_factory=dict)  # block -> [P]
    contributions: dict[int, Sum] = field(default_factory=dict)  # block -> [P, F], whose sum is the score


class Textbook:
    """One forward pass of the model, which is in float64, on one image."""

    def __init__(self, model: DrawnViT, image: Tensor, settings: Settings) -> None:  # image [channels, H, W]
        self.model, self.settings, self.book = model, settings, Book(settings.backward == "conservative")
        parts = [part for part in model.modules() if isinstance(part, Part)]
        for part in parts:
            part.book = self.book
        self.logits = model(image.double()[None])  # [1, classes]
        for part in parts:
            part.book = None

    def page(
        self, value: Tensor, saes: Mapping[int, SparseAutoencoder], gates: Mapping[int, Tensor]
    ) -> Page:  # value [], SAEs in float64, gates block -> [P]
        """The explanation of one scalar of the logits, given the gates."""
        book, shape = self.book, self.model.shape
        blocks = range(self.settings.start_block, shape.depth)
        d_maps, d_attended, d_inputs, d_outputs = self._gradients(value)
        page = Page()
        for block in saes:
            x, g = self._patches(book.outputs[block]), self._patches(d_outputs[block])
            read = shape.pool or block < max(read.depth for read in shape.reads)
            self._score(page, block, x if read else 0 * x, g, saes[block], bool(read))
        for entry in blocks if self.settings.per_block else blocks[:1]:
            if self.settings.method == "rollout":
                page.relevance.append(self._rollout(d_maps, d_attended, gates, entry))
                continue
            last = shape.depth if shape.pool else max(read.depth for read in shape.reads)
            later = range(entry, max(entry + 1, last) if self.settings.method == "block_x_gradient" else entry + 1)
            found = [self._product(d_inputs, gates, block) for block in later]
            mean = (torch.stack([getattr(one, name) for one in found]).mean(0) for name in ("value", "scale"))
            page.relevance.append(Sum(*mean))
        return page

    def _product(self, d_inputs: list[Tensor], gates: Mapping[int, Tensor], entry: int) -> Sum:
        """x . g at the entry of a block, times the gates from there on."""
        products = self._patches(self.book.inputs[entry]) * self._patches(d_inputs[entry])  # [P, C]
        factor = math.prod((gate for block, gate in gates.items() if block >= entry), start=torch.ones(()).double())
        return Sum(products.sum(-1) * factor, products.abs().sum(-1) * factor)

    def _gradients(self, value: Tensor) -> list[list[Tensor]]:
        """Of the value, with respect to maps, attended, inputs and outputs; zeros where it does not depend on them."""
        kinds = (self.book.maps, self.book.attended, self.book.inputs, self.book.outputs)
        wanted = [tensor for kind in kinds for tensor in kind]
        found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        rest = iter(found)
        return [[next(rest) for _ in kind] for kind in kinds]

    def _patches(self, stream: Tensor) -> Tensor:  # [1, N, C] or [N, 1, C] -> [P, C]
        return stream.detach().squeeze(1 if self.model.shape.tokens_first else 0)[self.model.shape.prefix :]

    @torch.no_grad()
    def _rollout(self, d_maps: list[Tensor], d_attended: list[Tensor], gates: Mapping[int, Tensor], entry: int) -> Sum:
        """TransMM: R = (I + Cbar_L) ... (I + Cbar_entry), and its row for what the head reads."""
        book, signed = self.book, self.settings.signed
        products = [maps * d for maps, d in zip(book.maps, d_maps, strict=True)]
        kept = [(product if signed else product.clamp(min=0))[0].mean(0) for product in products]  # Cbar [N, N]
        inner = [d.abs() @ v.abs().mT for d, v in zip(d_attended, book.values, strict=True)]  # of dA = dO V^T
        sizes = [(maps * size)[0].mean(0) for maps, size in zip(book.maps, inner, strict=True)]
        return Sum(self._row(kept, gates, entry), self._row(sizes, gates, entry))

    def _row(self, relevance: list[Tensor], gates: Mapping[int, Tensor], entry: int) -> Tensor:  # [N, N] each -> [P]
        shape = self.model.shape
        whole = sum(read.weight for read in shape.reads)
        R, row = torch.eye(shape.tokens, dtype=torch.float64), torch.zeros(shape.tokens, dtype=torch.float64)
        for block in range(shape.depth):
            if block >= entry:
                C = relevance[block].clone()
                if block in gates:
                    C[:, shape.prefix :] *= gates[block]
                R = R + C @ R
            for read in () if shape.pool else shape.reads:
                if read.depth == block + 1 > entry:
                    start, stop = shape.span(read.what)
                    row = row + read.weight / whole * R[start:stop].mean(0)
        if shape.pool:
            start, stop = shape.span(shape.pool)
            row = relevance[-1][0] @ R[start:stop]
        return row[shape.prefix :]

    @torch.no_grad()
    def _score(
        self, page: Page, block: int, x: Tensor, g: Tensor, sae: SparseAutoencoder, read: bool
    ) -> None:  # [P, C]; what is not read has no score
        gate = self.settings.gate
        ratio = min(1.0, max(float(g.abs().max()) * 2**10, 2.0**-100))
        page.units[block] = 1.0 if gate.mode == "activation_only" else 2.0 ** math.floor(math.log2(ratio))
        if gate.mode == "no_sae":
            page.scores[block] = Sum((x * g).sum(-1), (x * g).abs().sum(-1))
            return
        codes = sae.encode(x) * read  # [P, F]
        order = gate.decoder_permutation(sae.d_sae, x.device)
        decoder = sae.W_dec if order is None else sae.W_dec[order]
        h, size = g @ decoder.T, g.abs() @ decoder.abs().T  # [P, F]
        largest = (codes != 0) * codes.abs().amax(-1, keepdim=True)
        c, scale = {
            "activation_only": (codes, largest), "gradient_only": (h, size),
        }.get(gate.mode, (codes * h, codes.abs() * size))  # fmt: skip
        page.scores[block], page.contributions[block] = Sum(c.sum(-1), scale.sum(-1)), Sum(c, scale)


def gate_of(scores: Tensor, gate: Gate) -> Tensor:  # [..., P]
    """base ** tanh(slope z), z = (s - med) / (1.4826 (MAD + 1e-8)), with lower medians."""
    middle = (scores.shape[-1] - 1) // 2
    s = scores - scores.sort(-1).values[..., middle : middle + 1]
    mad = s.abs().sort(-1).values[..., middle : middle + 1]
    return gate.bound ** torch.tanh(gate.slope * s / (1.4826 * (mad + 1e-8)))
