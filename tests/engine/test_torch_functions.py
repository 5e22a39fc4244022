"""Every name of every function in the table is explained alike, or refused alike, by the engine and the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast import Explainer, ModelLayout
from fga_fast.engine.torch_functions import OPERATIONS, Kind, Operation

Function = Callable[..., Any]
Outcome = Tensor | tuple[str, str]
BACKENDS = ("native", "composite", "reference")
BACKWARDS = ("exact", "conservative")


class Block(nn.Module):
    def __init__(self, mlp: Function, attend: Function) -> None:
        super().__init__()
        self.norm, self.qkv, self.ab, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(8, 8)
        self.mlp, self.attend = mlp, attend

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(self.mlp(*self.ab(self.norm(x)).chunk(2, -1)))  # type: ignore[no-any-return]


class TinyViT(nn.Module):
    """Two blocks of width 8, a class token and 2 x 2 patches."""

    def __init__(
        self, mlp: Function = lambda a, b: F.gelu(a), attend: Function = F.scaled_dot_product_attention
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches, self.token = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(Block(mlp, attend) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:  # [B, 1, 4, 4] -> [B, 3]
        x = torch.cat([self.token.expand(len(images), -1, -1), self.patches(images).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


IMAGES = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()


def outcome(model: nn.Module, backend: Any, backward: Any) -> Outcome:
    """The relevance, or the error."""
    layout = ModelLayout(model.blocks, 1, (2, 2), in_chans=1)  # type: ignore[arg-type]
    try:
        return Explainer(model.double().eval(), layout=layout, backend=backend, backward=backward, preset="published")(
            IMAGES, [0, 1]
        ).relevance
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__, str(error)


def same(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def wide(t: Tensor) -> Tensor:
    return t.unsqueeze(-1) if t.dim() == 2 else t


def scaled(*args: Any) -> Function:
    """f of positive numbers times a."""
    return lambda f, a, b: a * wide(f(a.square() + 1, *args))


# Ways to use a function (a and b are [B, N, C]); the first that runs is taken, since not all names take the same.
USES: dict[Kind, list[Function]] = {
    Kind.LINEAR: [lambda f, a, b: f(a, torch.eye(8).double() + 1)],
    Kind.DROPOUT: [lambda f, a, b: f(a, 0.5, True), lambda f, a, b: f(a, 0.5, True)[0]],
    Kind.RANDOM: [
        *(lambda f, a, b: a * f(a.sigmoid()), lambda f, a, b: a * f(a.sigmoid(), 0.5), lambda f, a, b: a * f([8])),
        *(lambda f, a, b: a * f(8), lambda f, a, b: a * f(5, [8]), lambda f, a, b: a * f(0, 5, [8])),
        *(lambda f, a, b: a * f(a, 5), lambda f, a, b: a * f(a, 0, 5), lambda f, a, b: a * f(a, torch.tensor(5))),
        *(lambda f, a, b: a * f(a.square(), a.sigmoid()), lambda f, a, b: a * f(0.0, a.square())),
        *(lambda f, a, b: a * f(0.0, 1.0, [8]), lambda f, a, b: a * f(a.sigmoid().flatten(0, 1), 8, True).view_as(a)),
    ],
    Kind.ADDITION: [lambda f, a, b: f(a, b) * b],
    Kind.LAYER_NORM: [lambda f, a, b: f(a, [8])],
    Kind.NATIVE_LAYER_NORM: [lambda f, a, b: f(a, [8], None, None, 1e-5)[0]],
    Kind.RMS_NORM: [lambda f, a, b: f(a, [8])],
    Kind.FUSED_RMS_NORM: [lambda f, a, b: f(a, [8], None, 1e-5)[0]],
    Kind.ACTIVATION: [lambda f, a, b: f(a) + f(b) * a],
    Kind.RELU: [lambda f, a, b: f(a) + f(b) * a],
    Kind.CONSTANT: [
        *(scaled(2, [-1], True), scaled("fro", [-2, -1], True), scaled(2), scaled(), scaled([-1])),
        *(scaled(2, [-1], True, torch.float64), scaled(2, torch.float64)),
    ],
    Kind.FACTOR: [scaled(), scaled([-1]), scaled([-1], 1, True)],
    Kind.STD_MEAN: [lambda f, a, b: (a - wide(f(a, [-1])[1])) / wide(f(a, [-1])[0])],
    Kind.POWER: [
        lambda f, a, b: a * f(a.square() + 1, 0.5) * f(b.square() + 1, -0.5),
        lambda f, a, b: a * f(a.square() + 1, b),
        lambda f, a, b: f(2.0, a),
    ],
    Kind.NORMALIZE: [lambda f, a, b: f(a, 2.0, -1)],
    Kind.COSINE: [lambda f, a, b: a * f(a, b, -1).unsqueeze(-1)],
    Kind.GLU: [lambda f, a, b: f(torch.cat([a, b], -1), -1)],
    Kind.PRODUCT: [
        lambda f, a, b: f(F.gelu(a), b) + f(b + 0, F.silu(a)) + f(a + 0, a.sigmoid()) * b + f(F.mish(a), 2.0) * b,
        lambda f, a, b: f(F.gelu(a), b) + f(b + 0, F.silu(a)) + f(a + 0, a.sigmoid()) * b,
        lambda f, a, b: f(F.gelu(a), 2.0) * b,
    ],
    Kind.QUOTIENT: [
        lambda f, a, b: f(F.gelu(a), 3.0) * b + f(F.gelu(a), b.square() + 1) * b,
        lambda f, a, b: f(F.gelu(a), b.square() + 1) * b,
        lambda f, a, b: f(F.gelu(a), 3.0) * b,
    ],
}
ATTENDING: dict[Kind, list[Function]] = {
    Kind.ATTENTION: [lambda f, q, k, v: f(q, k, v)],
    Kind.HIDDEN_ATTENTION: [lambda f, q, k, v: f(q, k, v)],
    Kind.SOFTMAX: [lambda f, q, k, v: f(q @ k.mT, -1) @ v, lambda f, q, k, v: f(q @ k.mT, -1, False) @ v],
}


def called(function: Function, operation: Operation) -> Function:
    """The function, as a model would call this name: in place on a copy, into `out`, with all that it must be given."""
    schema = getattr(function, "_schema", None)
    given = (
        {} if schema is None else {a.name: a for a in schema.arguments if a.kwarg_only and not a.has_default_value()}
    )

    def call(x: Any, *args: Any) -> Any:
        outs = {name: torch.empty(0).double() for name in given if name.startswith("out")}
        if (
            operation.in_place and isinstance(x, Tensor) and operation.kind not in (Kind.PRODUCT, Kind.QUOTIENT)
        ):  # which get fresh tensors
            x = x.clone()
        return function(x, *args, **outs, **dict.fromkeys(given.keys() - outs))

    return call


def runs(model: TinyViT) -> bool:
    try:
        with torch.no_grad():
            return bool(model(IMAGES).isfinite().all())
    except (RuntimeError, TypeError, ValueError):
        return False


def models(function: Function, operation: Operation) -> dict[int, TinyViT]:
    """Models that use the function, by the number of the use: all that run."""
    call, found = called(function, operation), {}
    for i, use in enumerate(USES.get(operation.kind, ())):
        found[i] = TinyViT(mlp=lambda a, b, use=use: use(call, a, b))
    for i, use in enumerate(ATTENDING.get(operation.kind, ())):
        found[i] = TinyViT(attend=lambda q, k, v, use=use: use(call, q, k, v))
    found = {i: model.double() for i, model in found.items()}
    return found if operation.kind is Kind.HIDDEN_ATTENTION else {i: m for i, m in found.items() if runs(m)}


OPERATIONS_OF: dict[str, list[tuple[Function, Operation]]] = {}
for _function, _operation in OPERATIONS.items():
    if "Dimname" not in str(getattr(_function, "_schema", "")):
        OPERATIONS_OF.setdefault(_operation.name, []).append((_function, _operation))
NAMES = sorted(OPERATIONS_OF.keys() - {"multi_head_attention_forward"})  # which has tests of its own
UNUSED = ("_fused_dropout",)  # on CUDA only


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_function_gives_the_same(name: str) -> None:
    """From every backend, and the same as the first name of the function; out= is refused, as it has no gradient."""
    wrong, used = [], 0
    first: dict[tuple[int, str], Outcome] = {}
    hidden = OPERATIONS_OF[name][0][1].kind is Kind.HIDDEN_ATTENTION  # whose arguments torch looks at before a mode
    refused = hidden or OPERATIONS_OF[name][0][1].kind in (Kind.DROPOUT, Kind.RANDOM)
    for function, operation in OPERATIONS_OF[name]:
        schema = str(getattr(function, "_schema", ""))
        use, model = next(iter(models(function, operation).items()), (0, None))
        if model is None:
            continue
        used += 1
        for backward in BACKWARDS:
            got = [outcome(model, backend, backward) for backend in (BACKENDS if used == 1 else BACKENDS[::2])]
            if refused or re.search(r"Tensor\(\w!\) out", schema):
                ok = not isinstance(got[0], Tensor) and got[0][0] in ("TapeError", "TypeError" if hidden else "")
            else:
                ok = isinstance(got[0], Tensor) and same(got[0], first.setdefault((use, backward), got[0]))
            if not (ok and all(same(g, got[0]) for g in got)):
                wrong.append((str(function), use, backward, got, first.get((use, backward))))
    assert not wrong, wrong[:3]
    assert used or name in UNUSED


def added(a: Tensor, b: Tensor) -> Tensor:
    """No activation any more, but a sum that carries."""
    gate = F.silu(a)
    gate += b
    return gate * b


def counted(a: Tensor, b: Tensor) -> Tensor:
    """SiLU by a sigmoid that is computed in place, as the gate of an MLP."""
    gate = a + 0
    gate.sigmoid_()
    return gate * a * b


IN_PLACE: dict[str, tuple[Function, Function]] = {  # a form in place, and the same out of place
    "changed since": (added, lambda a, b: (F.silu(a) + b) * b),
    "constant in place": (counted, lambda a, b: a.sigmoid() * a * b),
    "constant times a number": (lambda a, b: F.silu(a).mul_(2.0).div_(3.0) * b, lambda a, b: F.silu(a) * 2 / 3 * b),
    "positional inplace": (lambda a, b: F.silu(a + 0, True) * b, lambda a, b: F.silu(a) * b),
    "keywords": (lambda a, b: torch.mul(input=F.silu(a), other=b), lambda a, b: F.silu(a) * b),
    "aten's keywords": (lambda a, b: torch.ops.aten.mul.Tensor(self=F.silu(a), other=b), lambda a, b: F.silu(a) * b),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_gives_the_same_as_out_of_place(name: str) -> None:
    found = [outcome(TinyViT(mlp), b, "conservative") for mlp in IN_PLACE[name] for b in BACKENDS]
    assert isinstance(found[0], Tensor) and all(same(found[0], other) for other in found[1:])


def test_masks_of_multi_head_attention_may_be_boolean() -> None:
    """nn.MultiheadAttention makes them additive; who calls the function itself may not have."""
    w, eye, hidden = torch.cat([torch.eye(8)] * 3).double(), torch.eye(8).double(), torch.tensor([[0, 0, 0, 0, 1]] * 2)

    def attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q.transpose(1, 2).flatten(2).transpose(0, 1)
        out = F.multi_head_attention_forward(
            x, x, x, 8, 2, w, None, None, None, False, 0.0, eye, None, False, mask, attn_mask=torch.ones(5, 5).double()
        )[0]
        return out.transpose(0, 1).unflatten(-1, (2, 4)).transpose(1, 2)

    added = torch.zeros(2, 5).double().masked_fill(hidden.bool(), float("-inf"))
    models = [TinyViT(attend=partial(attend, mask)) for mask in (hidden.bool(), added)]
    found = [outcome(model, backend, "exact") for model in models for backend in BACKENDS]
    assert isinstance(found[0], Tensor) and all(same(found[0], other) for other in found[1:])


def names_of_torch() -> set[tuple[str, Function]]:
    """Every function of torch's namespaces, found without the table."""
    spaces = {"torch": torch, "F": F, "Tensor": Tensor, "special": torch.special, "linalg": torch.linalg}
    spaces["_nn"] = torch._C._nn
    found = {(f"{space}.{name}", getattr(where, name)) for space, where in spaces.items() for name in dir(where)
             if callable(getattr(where, name)) and not isinstance(getattr(where, name), type)}  # fmt: skip
    operators = {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if "aten::" in name}
    for operator in operators:
        packet, _, overload = operator.partition(".")
        found.add((f"aten.{operator}", getattr(getattr(torch.ops.aten, packet), overload or "default")))
        found.add((f"aten.{packet}", getattr(torch.ops.aten, packet)))
    return found


ALIKE = re.compile(
    r"softmax|dropout|attention|encoder_layer|layer_norm|rms_norm|gelu|silu|swish|mish|glu|relu|sigmoid|expit"
    r"|normalize|cosine|\.(linalg_|special_|__[ri]?)?(norm|vector_norm|linear|rsqrt|sqrt|std|std_mean|tanh|erf|pow"
    r"|float_power|mul|multiply|div|divide|truediv|true_divide|add|rand|randn|randint|randperm|rand_like|randn_like"
    r"|randint_like|bernoulli|binomial|multinomial|poisson|normal|uniform|exponential|cauchy|geometric|log_normal)"
    r"(__|_)?(\.|$)"
)
# What looks like an operation of the table and is none.
OTHERS = re.compile(
    r"backward|_jvp|_mask_$|_state|log_?_?softmax|logsigmoid|log_sigmoid|softmin|gumbel|sparse_|nested|_foreach"
    r"|cosine_embedding|embedding_bag|get_softmax|test_|quantized_rnn|rnn_relu|cudnn_conv|miopen|has_torch"
    r"|(leaky_|p|r|_add_)relu|rrelu|relu6|[cs]elu|add_relu|__rand__|__rpow__|__r(true)?div__"
)


def test_no_name_is_forgotten() -> None:
    seen = {name: f for name, f in names_of_torch() if ALIKE.search(name) and not OTHERS.search(name)}
    assert len(seen) > 300
    assert {name for name, f in seen.items() if f not in OPERATIONS} == set()


def looked_at(a: Tensor, b: Tensor) -> Tensor:
    with torch.inference_mode():  # for a log
        F.relu(a).amax()
    return F.gelu(a) * b


@pytest.mark.parametrize(
    "mlp",
    [looked_at, lambda a, b: a * torch.pow(input=b.square() + 1, exponent=-0.5)],
    ids=["inference mode", "pow by keywords"],
)
@pytest.mark.parametrize("backward", BACKWARDS)
def test_unusual_calls_are_explained_alike(mlp: Function, backward: str) -> None:
    model = TinyViT(mlp)
    first, *others = (outcome(model, backend, backward) for backend in BACKENDS)
    assert isinstance(first, Tensor) and all(same(first, other) for other in others)
