"""Explanations at random: a model, its autoencoders, images, a question and settings, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from drawn_vit import DrawnViT, Read, Shape, What
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from own_vit import FORMS
from torch import Tensor

from fga_fast import Difference, Explainer, Explanation, Gate, SparseAutoencoder
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import flatten
from fga_fast.result.fields import nested
from fga_fast.settings import Settings

# Functions of the logits whose gradients do not cancel.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log of the sum": lambda logits: logits.logsumexp(-1),
    "squares": lambda logits: logits.square().mean(-1),
    "two": lambda logits: torch.stack([2 * logits[:, 0], -logits[:, 1]], 1),
}


@dataclass(frozen=True)
class Coder:
    """A random autoencoder."""

    activation: str = "relu"
    normalize: str | None = None
    features: int = 8
    wide: bool = False  # in float32 beside a 16-bit model

    @property
    def jumps(self) -> bool:
        """Whether its codes are no continuous function of the tokens."""
        return self.activation != "relu"

    def build(self, width: int, seed: int) -> SparseAutoencoder:
        """In float64."""
        generator, features = torch.Generator().manual_seed(seed), self.features

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        gated = {name: random(features) for name in ("b_gate", "r_mag", "b_mag")}
        return SparseAutoencoder(
            random(width, features), random(features), random(features, width), random(width),
            activation=self.activation, normalize=self.normalize,
            k=max(1, features // 3) if "topk" in self.activation else None,
            threshold=0.5 if self.activation in ("jumprelu", "batch_topk") else None,
            **(gated if self.activation == "gated" else {}),
        )  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """Targets: of `kind`, and the classes that they name."""

    kind: Literal["predicted", "int", "list", "array", "difference", "function"] = "int"
    classes: tuple[tuple[int, ...], ...] = ((0,),)  # [4][K], of which B rows are asked for; for an int, one
    function: str = "squares"  # a key of FUNCTIONS
    tensor: bool = False  # as a tensor, not as a list

    def targets(self, batch: int) -> Any:
        """As users write them."""
        if self.kind == "predicted":
            return None
        if self.kind == "function":
            return FUNCTIONS[self.function]
        if self.kind == "int":
            return self.classes[0][0]
        picked = torch.tensor(self.classes)[:batch] + (self.kind == "difference")  # [B, K]
        picked = picked[:, 0] if self.kind == "list" else picked
        found = picked if self.tensor or not batch else picked.tolist()  # no list has the shape [0, K]
        return Difference(0, found) if self.kind == "difference" else found

    def values(self, logits: Tensor, image: int, picked: Tensor) -> list[Tensor]:  # [1, classes], [K] -> K of []
        """What is explained of one image; `picked` are the classes that the library named."""
        if self.kind == "function":
            return list(FUNCTIONS[self.function](logits).flatten())
        columns = picked.tolist() if self.kind == "predicted" else self.classes[0 if self.kind == "int" else image]
        if self.kind == "difference":
            return [logits[0, 0] - logits[0, column + 1] for column in columns]
        return [logits[0, column] for column in columns]


@dataclass(frozen=True)
class Case:
    """A whole explanation; its repr builds it again."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 1
    ask: Ask = field(default_factory=Ask)
    saes: dict[int, Coder] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    dtype: torch.dtype = torch.float64
    graph: Literal["", "traced", "folded"] = ""
    seed: int = 0  # of images and autoencoders

    def model(self) -> DrawnViT:
        return DrawnViT(self.shape).to(self.dtype)

    def images(self, batch: int | None = None) -> Tensor:
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed)
        size = (self.batch if batch is None else batch, shape.channels, 2 * shape.grid[0], 2 * shape.grid[1])
        return torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype)

    def autoencoders(self) -> dict[int, SparseAutoencoder]:
        def dtype(coder: Coder) -> torch.dtype:
            return torch.float32 if coder.wide and self.dtype == torch.bfloat16 else self.dtype

        width = self.shape.width
        return {n: coder.build(width, self.seed + n).to(dtype(coder)) for n, coder in self.saes.items()}

    def explainer(self, backend: str, model: DrawnViT) -> Explainer:
        s = self.settings
        return Explainer(
            model, self.autoencoders(), layout=model.layout(), gate=s.gate, method=s.method, backward=s.backward,
            backend=backend, top_features=s.top_features, start_block=s.start_block, signed=s.signed,
            per_block=s.per_block, target_chunk=s.target_chunk, preset="published",
        )  # fmt: skip


def traced(case: Case, explainer: Explainer, images: Tensor) -> Explanation:
    """The explanation by its graph, without a compiler."""
    targets = case.ask.targets(case.batch)
    given = targets is not None
    flat = flatten(explainer.plan, images, "given" if given else "predicted")
    if case.graph == "folded":
        fold_biases(flat.module)
    picked = [torch.as_tensor(targets).expand(len(images)).contiguous()] if given else []
    with torch.no_grad():
        found = dict(zip(flat.outputs, flat.module(images, *picked), strict=True))
    size = (images.shape[-2], images.shape[-1])
    return Explanation(**nested(found), grid=explainer.layout.grid, image_size=size, backend="graph")


WHAT: list[What] = ["token", "patches", "all", "first two"]


def mostly(usual: Any, *others: Any) -> SearchStrategy[Any]:
    """The usual value in about half of the cases; it is also what a failing case shrinks to."""
    return st.just(usual) | st.sampled_from((usual, *others))


@st.composite
def reads(draw: DrawFn, depth: int, tokens: int, final_norm: str) -> tuple[Read, ...]:
    """The last block, an earlier one, or a sum over several, whose weights no norm of each token changes."""
    one = Read(draw(mostly(depth, *range(1, depth))), draw(st.sampled_from(WHAT if tokens > 1 else WHAT[:3])))
    if final_norm == "tokens" or depth == 1 or draw(st.booleans()):
        return (one,)
    what = draw(st.sampled_from(WHAT[:2]))
    depths = draw(st.lists(st.integers(1, depth), min_size=2, max_size=3, unique=True))
    return tuple(Read(at, what, draw(st.sampled_from([0.25, 1.0, 3.0]))) for at in sorted(depths))


@st.composite
def shapes(draw: DrawFn, dtype: torch.dtype) -> Shape:
    depth, prefix = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    tokens = prefix + grid[0] * grid[1]
    heads, head_width = draw(
        st.sampled_from([(1, 8), (2, 4), (2, 8), (1, 16), (4, 4), (2, 16), (4, 8), (1, 9), (3, 5), (2, 7), (3, 3)])
    )
    final_norm = draw(mostly("tokens", "vector", ""))
    forms = [form for form in FORMS if form != "upcast" or dtype != torch.float64]  # it is to float32
    form = draw(mostly("sdpa", "mha", *forms))
    pool = draw(mostly("", "all", "patches"))
    read = draw(reads(depth, tokens, final_norm))
    # A block that changes its input in place would change what the head reads of it.
    last = pool != "" or read[0].depth == depth
    return Shape(
        depth, heads, head_width, prefix, grid,
        classes=draw(st.integers(2, 6)), channels=draw(mostly(1, 3)),
        reads=read,
        token=0 if prefix and draw(st.booleans()) else draw(st.integers(0, tokens - 1)),
        pool=pool,
        form=form, bias=draw(mostly(True, False)), mask=draw(mostly(False, True)), qk_norm=draw(mostly(False, True)),
        norm=draw(mostly("layer", "rms")),
        placement=draw(
            mostly("before", "after", "after the branch", "around the branch", "before and after", "parallel")
        ),
        final_norm=final_norm,
        layer_scale=draw(mostly(False, True)),
        mlp=draw(mostly("gelu", "silu", "relu", "swiglu", "geglu")),
        dropout=draw(mostly(False, True)), tokens_first=draw(mostly(False, True)),
        returns_tuple=draw(mostly(False, True)), in_place=last and draw(mostly(False, True)),
        frozen=draw(mostly(False, True)),
        logit_scale=draw(mostly(1.0, 1e-6, 1e-12, 1e3)), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def asks(draw: DrawFn, classes: int) -> Ask:
    kind = draw(st.sampled_from(["int", "predicted", "list", "array", "difference", "function"]))
    if kind == "function":
        return Ask(kind, function=draw(st.sampled_from(list(FUNCTIONS))))
    # As many as there are classes, all 0 or 1, would look like one-hot rows.
    count = draw(st.integers(1, min(3, classes - 1))) if kind in ("array", "difference") else 1
    row = st.tuples(*[st.integers(0, classes - (2 if kind == "difference" else 1))] * count)
    rows = draw(st.lists(row, min_size=1 if kind == "int" else 4, max_size=1 if kind == "int" else 4))
    return Ask(kind, tuple(rows), tensor=draw(st.booleans()))


@st.composite
def how(draw: DrawFn, read: int, features: int) -> Settings:
    """Settings; `read` is the first block that is read, counted from 1, and `features` 0 without autoencoders."""
    mode = draw(mostly("combined", "activation_only", "gradient_only", "no_sae", "shuffled"))
    return Settings(
        Gate(mode, draw(mostly(10.0, 2.0, 1.0, 0.5)), draw(mostly(1.0, 0.3, 3.0, -1.0))),
        method=draw(mostly("rollout", "input_x_gradient", "block_x_gradient")),
        backward=draw(mostly("exact", "conservative")),
        start_block=draw(st.integers(0, read - 1)),
        top_features=draw(st.integers(0, min(features, 5))) if mode not in ("gradient_only", "no_sae") else 0,
        signed=draw(mostly(False, True)), per_block=draw(mostly(False, True)), target_chunk=draw(mostly(8, 2, 1)),
    )  # fmt: skip


@st.composite
def cases(draw: DrawFn) -> Case:
    """Any explanation that must work."""
    dtype = draw(mostly(torch.float64, torch.float32, torch.bfloat16))
    shape, batch = draw(shapes(dtype)), draw(mostly(1, 2, 3, 4, 0))
    coder = st.builds(
        Coder, mostly("relu", "topk", "topk_signed", "batch_topk", "jumprelu", "gated"),
        mostly(None, "layer_norm", "constant_norm"), st.integers(1, 20), st.booleans(),
    )  # fmt: skip
    saes = draw(st.just({}) | st.dictionaries(st.integers(0, shape.depth - 1), coder, max_size=2))
    first = shape.depth if shape.pool else min(read.depth for read in shape.reads)
    settings = draw(how(first, min((coder.features for coder in saes.values()), default=0)))
    saes = {block: saes[block] for block in sorted(saes) if block >= settings.start_block}
    settings = settings if saes else Settings(**{**vars(settings), "top_features": 0})
    ask = draw(asks(shape.classes))
    one = batch and ask.kind in ("int", "predicted", "list")
    return Case(
        shape, batch, ask, saes, settings, dtype,
        graph=draw(st.sampled_from([*[""] * 22, "traced", "folded"])) if one else "", seed=draw(st.integers(0, 999)),
    )  # fmt: skip
