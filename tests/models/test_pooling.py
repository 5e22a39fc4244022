"""A model that pools otherwise than its layout says: refused or warned of by every backend, in the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_vit import IMAGES, OwnViT, own_vit
from torch import Tensor, nn

from fga_fast import Explainer, ModelLayout
from fga_fast.models.block_io import TapeError

BACKENDS = ("native", "composite", "reference")


def layout_of(model: OwnViT, pooling: Any = "token", **settings: Any) -> ModelLayout:
    return ModelLayout(tuple(model.layers), 1, (2, 3), pooling, **settings)


def refused(model: nn.Module, layout: ModelLayout, message: str) -> None:
    images, found = torch.randn(IMAGES).double(), set()
    for backend in BACKENDS:
        with pytest.raises(TapeError, match=message) as error:
            Explainer(model, layout=layout, backend=backend, preset="published")(images)  # type: ignore[arg-type]
        found.add(str(error.value))
    assert len(found) == 1


@pytest.mark.parametrize("form", ("sdpa", "F.softmax", "mha"))
def test_an_attention_pool_that_the_layout_does_not_know_is_refused(form: str) -> None:
    model = own_vit(pool=form)
    refused(model, layout_of(model), "'token' pooling, but the explained values read another attention with one query")


def test_a_promised_attention_pool_must_be_there_and_read() -> None:
    model = own_vit()
    refused(model, layout_of(model, "attention"), "no attention with one query over the 6 pooled tokens was found")
    other = own_vit(pool="sdpa")  # over all 7 tokens
    refused(other, layout_of(other, "attention"), "only one of 1 queries over 7 keys")

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.pool = model.norm, model.pool

        def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
            x = self.norm(x)
            self.pool(x[:, :1], x[:, 1:])
            return x

    model.norm = Unread()  # type: ignore[assignment]
    refused(model, layout_of(model, "attention"), "the explained values do not read the attention")


def test_attention_between_the_last_block_and_the_pool_is_refused() -> None:
    model = own_vit(pool="sdpa")
    norm = model.norm
    model.norm = nn.Sequential(norm, Mixing())  # type: ignore[assignment]
    refused(model, model.layout(), "7 queries over 7 keys runs between the last block of the layout and its attention")


class Mixing(nn.Module):
    """Attention of all tokens to all."""

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Averaging(nn.Module):
    """Makes of all tokens their average."""

    def forward(self, x: Tensor) -> Tensor:  # [B, N, C]
        return x.mean(1, keepdim=True).expand_as(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("head", "pooling", "message"),
    (
        (Averaging(), "token", "read 7 of the 7 tokens that block 2 hands on"),
        (nn.Identity(), "average", "read 1 of the 7 tokens that block 2 hands on"),
        (Mixing(), "token", "attention after the blocks that the layout does not know of"),
    ),
)
def test_what_is_read_besides_the_pooled_tokens_is_said_and_logged_once(
    head: nn.Module, pooling: str, message: str, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, images = own_vit(), torch.randn(IMAGES).double()
    model.norm = nn.Sequential(model.norm, head)  # type: ignore[assignment]
    pooled = {"pooled": (0, 7)} if pooling == "average" else {}
    explainer = Explainer(model, layout=layout_of(model, pooling, **pooled), backend=backend, preset="published")
    first = explainer(images)
    again = explainer(images)
    assert first.notices == again.notices == tuple(record.getMessage() for record in caplog.records)  # logged once
    assert sum(message in notice for notice in first.notices) == 1
