"""What the tests of the page share: the demo as it is served, what is done on the page, and what is read from it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from fga_fast import Explainer, Explanation
from fga_fast.assets import fashion_config, fashion_model, fashion_saes
from fga_fast.io.images import Preprocess, load_image
from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

LIMITS = Limits(max_batch=1, pixels=250_000, deadline=60)
Visit: TypeAlias = "Callable[..., AbstractContextManager[Page]]"  # of an address; settings of the browser


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[str]:
    """The address of a running service."""
    from serving import running  # needs the libraries of the service

    with running(engine, LIMITS, **settings) as server:
        yield f"{server.url}/"


def preprocess(**settings: Any) -> Preprocess:
    config = fashion_config()
    return Preprocess((56, 56), config.mean, config.std, **settings)


def demo_explainer(**settings: Any) -> Explainer:
    config = fashion_config()
    return Explainer(fashion_model(), fashion_saes(), class_names=config.class_names, ungated=True, **settings)


def upload(page: Page, file: Any) -> None:
    page.locator("#file").set_input_files(file)
    page.locator("#shown").wait_for()


def pixels(canvas: Locator) -> Any:  # -> [H, W, 4] uint8
    data = canvas.evaluate("c => c.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def explained(scene: Path) -> Explanation:
    """What the explainer itself says of a scene."""
    return demo_explainer()(preprocess()(load_image(scene)).unsqueeze(0))
