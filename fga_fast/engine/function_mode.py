"""How a forward pass is followed: a mode that sees every torch function, and hooks on the blocks.

The tape and the reference both derive from it. It finds the attentions and refuses what cannot be explained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fga_fast.engine.torch_functions import OPERATIONS, Function, Kind, Operation, depends
from fga_fast.models.block_io import Arguments, ForwardPass, with_stream
from fga_fast.models.follower import followed_by, is_following
from fga_fast.models.layout import LISTS, ends
from fga_fast.models.multihead import open_multi_head_attention


class FunctionMode(TorchFunctionMode, ABC):
    """Follows one forward pass: sees the model's blocks begin and end, and every function that the model calls.

    `handlers[kind](operation, function, *args, **kwargs)` answers from the first explained block to the model's end.
    Parameters, and all else that has a gradient from before the pass, take part without it. So what requires a gradient
    is what depends on the tokens.
    """

    def __init__(self, passed: ForwardPass) -> None:
        super().__init__()
        self.passed = passed
        self.handlers: dict[Kind, Function] = {
            Kind.ATTENTION: self._attend,
            Kind.MULTI_HEAD_ATTENTION: self._open,
            Kind.SOFTMAX: self._softmax,
            Kind.LINEAR: self._linear,
        }
        # Of a block that is a list of modules: what its last one returned, until it is added to the stream; and the
        # stream that enters it, with what takes its place until the block ends.
        self._unadded: tuple[int, Any] | None = None
        self._replaced: tuple[Any, Any] | None = None
        # id of a weight -> the weight, so that no other object gets this id, and its values without a gradient
        self._detached: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_node = 0  # autograd's number of the first node of the pass; a thread numbers its nodes in order

    # -- what each side answers in its own way -----------------------------------------------------------------

    @abstractmethod
    def tap_attention(
        self,
        function: Function,
        query: Tensor,  # [B, H, Nq, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, Dv]
        mask: Tensor | None,  # additive, broadcastable to [B, H, Nq, N]
        scale: float | None,
    ) -> Tensor:
        """The output [B, H, Nq, Dv] of an attention of the running block or of the pool."""

    @abstractmethod
    def tap_map(self, maps: Tensor, logits: Tensor) -> Tensor:  # [B, H, Nq, N]; before the softmax
        """What such an attention that the model writes out goes on with in place of its maps."""

    @abstractmethod
    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        """What block `index` is called with in place of `arguments`; None: these."""

    @abstractmethod
    def tap_output(self, index: int, x: Tensor) -> Tensor | None:  # [B, N, C], or [N, B, C]
        """What the model goes on with in place of the residual stream after block `index`; None: x."""

    def tap_linear(self, function: Function, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The output of a linear layer."""
        out: Tensor = function(*args, **kwargs)
        return out

    def is_own(self, leaf: Tensor) -> bool:
        """Whether this side made a leaf of the graph and handed it to the model."""
        return False

    # -- what both sides share ---------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follows calls made in this thread. Hooks and mode are gone afterwards, whatever happens."""
        handles = []
        self._first_node = torch._C._autograd._get_sequence_nr()
        try:
            for index, block in enumerate(self.passed.layout.blocks):
                first, last = ends(block)
                handles.append(first.register_forward_pre_hook(self._entering(index), with_kwargs=True))
                # Before other hooks, such as those by which transformers keeps hidden states.
                handles.append(last.register_forward_hook(self._leaving(index, whole=last is block), prepend=True))
            with followed_by(self), torch.enable_grad(), torch._C._EnableTorchFunction(), self:
                yield
            self._check_added()
            self.passed.check_held()
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        """Lets go of everything, at the end of a pass. Handlers are bound methods, which would keep cycles alive."""
        self._detached.clear()
        self.handlers.clear()
        self._unadded = self._replaced = None

    def _entering(self, index: int) -> Function:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if not is_following(self):
                return None
            self._check_added()
            arguments = self.passed.enter(index, (args, kwargs or {}))
            if not self.passed.live:
                return None
            tapped = self.tap_input(index, arguments)
            if tapped is not None or arguments[0] is not args:
                self.passed.put_in(arguments if tapped is None else tapped)
            if tapped is not None and isinstance(self.passed.layout.blocks[index], LISTS):
                pairs = zip(*((*a, *k.values()) for a, k in (arguments, tapped)), strict=True)
                self._replaced = next(pair for pair in pairs if pair[0] is not pair[1])
            return arguments if tapped is None else tapped

        return hook

    def _leaving(self, index: int, whole: bool) -> Function:
        """`whole`: the module is the block, and not the last one of a list."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not is_following(self):
                return None
            if whole:
                return self._left(index, output)
            self._unadded = index, output
            return None

        return hook

    def _left(self, index: int, output: Any) -> Any:
        """What the model goes on with in place of a block's output."""
        self._unadded = self._replaced = None
        x = self.passed.leave(index, output)
        if index in self.passed.held:
            with torch._C.DisableTorchFunction():  # what is computed here is no part of the model
                output = self.passed.hold(index, output)
            x = None if x is None else self.passed.stream
        if x is None:
            return output
        tapped = self.tap_output(index, x)
        if tapped is None and x._is_view():  # a change in place would replace its place in autograd's graph
            tapped = x.clone()
        self.passed.hand_on(index, x if tapped is None else tapped)
        return output if tapped is None else with_stream(output, tapped)

    def _check_added(self) -> None:
        if self._unadded is not None:
            self.passed.refuse_list(self._unadded[0])

    def _attend(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Answers scaled_dot_product_attention. Grouped queries share repeated keys and values."""
        passed = self.passed
        if not passed.is_tapped(query.shape[-2], key.shape[-2]):
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            outside: Tensor = function(query, key, value, attn_mask, dropout_p, is_causal, **settings)
            passed.pass_by(outside, query.shape[-2], key.shape[-2])
            return outside
        passed.check_call(attn_mask, dropout_p, is_causal)
        if enable_gqa:
            key, value = passed.share_heads(query, key, value)
        passed.attend(query.shape, key.shape)
        if not passed.live:
            out: Tensor = function(query, key, value, attn_mask, scale=scale)
            return out
        tapped = self.tap_attention(function, query, key, value, attn_mask, scale)
        passed.attended_with(tapped)
        return tapped

    def _softmax(self, _operation: Operation, function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Taps the maps [B, H, Nq, N] or [B H, Nq, N] of a model that writes out its attention; others pass."""
        maps: Tensor = function(input, *args, **kwargs)
        by_head = self.passed.map_of(maps, kwargs.get("dim", args[0] if args else None))
        if by_head is None:
            return maps
        tapped = self.tap_map(by_head, input)
        self.passed.attended_with(tapped)
        self.passed.keep_map(tapped)
        return tapped if maps.dim() == 4 else tapped.flatten(0, 1)

    def _open(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.passed.is_tapped(len(query), len(key)):
            with self:  # its projections and its attention are to be seen
                return open_multi_head_attention(query, key, *args, **kwargs)
        found = function(query, key, *args, **kwargs)
        self.passed.pass_by(found[0], len(query), len(key))
        return found

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_following(self):
            return func(*args, **kwargs)
        args = tuple(map(self._without_gradient, args))
        if kwargs:
            kwargs = {name: self._without_gradient(value) for name, value in kwargs.items()}
        if self._replaced is not None:
            old, new = self._replaced
            args, kwargs = tree_map(lambda value: new if value is old else value, (args, kwargs))
        operation = OPERATIONS.get(func)
        if operation is None:
            return func(*args, **kwargs)
        if operation.kind is Kind.DROPOUT:
            self.passed.check_dropout(_dropped(operation, args, kwargs))
            return func(*args, **kwargs)
        if operation.kind is Kind.RANDOM and kwargs.get("generator") is None and torch.is_grad_enabled():
            drawn = None if "out" in kwargs else func(*args, **kwargs)
            if drawn is None or drawn.dim():  # single numbers are drawn by models that only may drop
                self.passed.refuse_random(operation.name)
            return drawn
        if operation.kind is Kind.ADDITION and self._unadded is not None:
            index, output = self._unadded
            if any(value is output for value in (*args, *kwargs.values())):
                return self._left(index, func(*args, **kwargs))
        if not self.passed.explaining:
            return func(*args, **kwargs)
        if operation.kind is Kind.HIDDEN_ATTENTION:
            self.passed.refuse_hidden(operation.name)
        if kwargs.get("out") is not None or "out0" in kwargs:
            if torch.is_grad_enabled() and any(map(depends, (*args, *kwargs.values()))):
                self.passed.check_out(operation.name)
            return func(*args, **kwargs)
        handler = self.handlers.get(operation.kind)
        if handler is None:
            return func(*args, **kwargs)
        if "self" in kwargs:
            args, kwargs = (kwargs["self"], *args), {name: kwargs[name] for name in kwargs if name != "self"}
        return handler(operation, func, *args, **kwargs)

    def _linear(self, _operation: Operation, function: Function, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Refuses weights of which another process has a part, and the product of activations that were quantised."""
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        self.passed.check_whole(weight)
        out = self.tap_linear(function, *args, **kwargs)
        if not out.requires_grad and torch.is_grad_enabled() and any(map(depends, (*args, *kwargs.values()))):
            self.passed.refuse_cut_linear(type(weight).__name__)
        return out

    def _without_gradient(self, value: Any) -> Any:
        """An argument of a function. What has a gradient that is not of this pass is replaced by its values."""
        if isinstance(value, Tensor):
            if not value.requires_grad:
                return value
            return self._detach(value) if self._is_older(value) else value
        if type(value) in (list, tuple):
            return type(value)(map(self._without_gradient, value))
        return value

    def _is_older(self, tensor: Tensor) -> bool:
        """Whether a tensor's gradient is from before this pass: a parameter, or made of one for all passes."""
        if tensor.grad_fn is None:
            return not self.is_own(tensor)
        return tensor.grad_fn._sequence_nr() < self._first_node

    def _detach(self, weight: Tensor) -> Tensor:
        """The weight's values without its gradient; one tensor a weight, so the cost is paid once a pass."""
        if id(weight) not in self._detached:
            self._detached[id(weight)] = weight, weight.detach()
        return self._detached[id(weight)][1]


def _dropped(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The probability of a dropout that is on, else 0. All forms begin with (input, p, training), or say `train`."""
    if operation.name == "_fused_dropout":  # (input, share that is kept), always on
        return float(1 - kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return 0.0 if training is not None and not training else float(p)  # None, for native_dropout, means on
