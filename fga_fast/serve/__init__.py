"""An HTTP service around an explainer: `fga-fast serve`. docs/serve.md says how to use it.

questions.py is what can be asked of a picture; engine.py explains batches and knows nothing of HTTP; batcher.py groups
requests; service.py takes one picture through both; app.py and stream.py are the routes; server.py runs them. `Client`
needs only httpx and httpx-retries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fga_fast.serve.app import make_app
    from fga_fast.serve.client import AsyncClient, Client
    from fga_fast.serve.engine import Engine
    from fga_fast.serve.limits import Limits
    from fga_fast.serve.server import serve
    from fga_fast.serve.service import Service

__all__ = ["AsyncClient", "Client", "Engine", "Limits", "Service", "make_app", "serve"]

_WHERE = {
    "AsyncClient": "client", "Client": "client", "Engine": "engine", "Limits": "limits", "Service": "service",
    "make_app": "app", "serve": "server",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
