"""Trains the same top-k SAE with fga_fast and with another library: explained variance and speed.

    python benchmarks/sae_training_peers.py dictionary_learning      # or saelens, overcomplete, where it is installed

The tokens are the residual stream of the patches of the demo model's scenes, centred and divided by their scale once,
so that every trainer sees the same numbers in the same order. Learning rate, batch, number of steps, warm-up and decay
are the same; initial weights, auxiliary losses and clipping are each library's own. Time is taken from the moment a
trainer gets a batch to the moment it asks for the next, so making the batches does not count. Needs Fashion-MNIST (see
examples/fashion/data.py). Prints one JSON row for each run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import cpu_name
from examples.fashion.data import load_garments, make_scenes
from fga_fast.assets import fashion_config, fashion_model
from fga_fast.engine.streams import streams_of
from fga_fast.harvest.tokens import TensorTokens
from fga_fast.models.find import find_layout
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train

WARMUP, DECAY = 0.05, 0.3  # shares of the steps
# [T, C] -> codes [T, F] and reconstruction [T, C]
Trained = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What every trainer is given."""

    tokens: Tensor  # [T, C]
    features: int
    k: int
    steps: int
    batch: int
    lr: float
    seed: int

    @property
    def width(self) -> int:
        """C."""
        return self.tokens.shape[1]

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return max(1, round(WARMUP * self.steps))

    @property
    def decay(self) -> int:
        """Steps at the end in which it falls."""
        return max(1, round(DECAY * self.steps))


class Clock:
    """`Tokens` that note how long a trainer works on each batch."""

    def __init__(self, task: Task) -> None:
        self._tokens = TensorTokens({0: task.tokens}, seed=task.seed)
        self.blocks, self.d_model, self.about = self._tokens.blocks, self._tokens.d_model, self._tokens.about
        self._task = task
        self.seconds: list[float] = []

    def sample(self, count: int) -> dict[int, Tensor]:
        """See `Tokens`."""
        return self._tokens.sample(count)

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        """See `Tokens`."""
        for batch in self._tokens.batches(size, start):
            given = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - given)

    def plain(self) -> Iterator[Tensor]:
        """As many batches [T, C] as there are steps, and one more, for trainers that ask before they stop."""
        for step, batch in enumerate(self.batches(self._task.batch)):
            yield batch[0]
            if step == self._task.steps:
                return

    def tokens_per_s(self, chunk: int = 20) -> float:
        """Median over chunks of steps, but for the first chunk."""
        seconds = self.seconds[: self._task.steps]
        chunks = [seconds[at : at + chunk] for at in range(0, len(seconds), chunk)]
        whole = [one for one in chunks[1:] if len(one) == chunk] or [seconds[1:]]
        return statistics.median(len(one) * self._task.batch / sum(one) for one in whole)


def fga_fast(task: Task, clock: Clock) -> Trained:
    """`fga_fast.training.train.train`."""
    recipe = Recipe(kind="topk", features=task.features, k=task.k)
    with tempfile.TemporaryDirectory() as folder:
        saes = train(
            clock, {"sae": recipe}, out=Path(folder) / "run", steps=task.steps, batch_size=task.batch, lr=task.lr,
            warmup=WARMUP, decay=DECAY, seed=task.seed, checkpoint_every=0, progress=False,
        )  # fmt: skip
    sae = saes["sae", 0]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes, x)

    return run


def dictionary_learning(task: Task, clock: Clock) -> Trained:
    """dictionary_learning's TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=task.steps, activation_dim=task.width, dict_size=task.features, k=task.k, layer=0, lm_name="demo",
        lr=task.lr, warmup_steps=task.warmup, decay_start=task.steps - task.decay, seed=task.seed, device="cpu",
    )  # fmt: skip
    for step, x in zip(range(task.steps), clock.plain(), strict=False):
        trainer.update(step, x)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = trainer.ae.encode(x)
        return codes, trainer.ae.decode(codes)

    return run


def saelens(task: Task, clock: Clock) -> Trained:
    """SAELens's SAETrainer with its top-k SAE."""
    import sae_lens as lens

    settings = lens.config.SAETrainerConfig(
        total_training_samples=task.steps * task.batch, train_batch_size_samples=task.batch, lr=task.lr,
        lr_end=task.lr / 10, lr_warm_up_steps=task.warmup, lr_decay_steps=task.decay,
    )  # fmt: skip
    config = lens.TopKTrainingSAEConfig(d_in=task.width, d_sae=task.features, k=task.k)
    sae = lens.SAETrainer(settings, lens.TopKTrainingSAE(config), clock.plain()).fit()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return codes, sae.decode(codes)

    return run


def overcomplete(task: Task, clock: Clock) -> Trained:
    """overcomplete's train_sae with its top-k SAE and auxiliary loss; it leaves the rate to PyTorch's scheduler."""
    from overcomplete.sae import TopKSAE, train_sae
    from overcomplete.sae.losses import top_k_auxiliary_loss

    sae = TopKSAE(task.width, task.features, top_k=task.k, device="cpu")
    optimizer = torch.optim.Adam(sae.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / task.warmup, max(0.0, (task.steps - step) / task.decay))
    )
    given = (x for _, x in zip(range(task.steps), clock.plain(), strict=False))
    train_sae(sae, given, top_k_auxiliary_loss, optimizer, schedule, nb_epochs=1, monitoring=0)
    sae.eval()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        _, codes, reconstruction = sae(x)
        return codes, reconstruction

    return run


PEERS: dict[str, tuple[str, Callable[[Task, Clock], Trained]]] = {
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "saelens": ("sae-lens", saelens),
    "overcomplete": ("overcomplete", overcomplete),
}


def streams(block: int, scenes: int, split: Any, seed: int) -> Tensor:  # [T, C]
    """The patches' residual stream after a block of the demo model."""
    model, config = fashion_model(), fashion_config()
    layout, generator = find_layout(model), torch.Generator().manual_seed(seed)
    garments = load_garments(split)
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.mean, config.std))
    found = []
    for at in range(0, scenes, 200):
        images = (make_scenes(garments, min(200, scenes - at), generator).images - mean) / std
        found.append(streams_of(model, layout, images, [block])[block][:, layout.prefix_tokens :].flatten(0, 1))
    return torch.cat(found)


@torch.no_grad()
def measured(run: Trained, held_out: Tensor) -> dict[str, float]:
    """Explained variance, codes a token and the share of features without a code, of held-out tokens [T, C]."""
    codes, reconstruction = run(held_out)
    left = (held_out - reconstruction).double().square().sum()
    whole = (held_out - held_out.mean(0)).double().square().sum()
    return {
        "explained_variance": round(float(1 - left / whole), 5),
        "l0": round(float((codes != 0).sum(1).double().mean()), 2),
        "dead": round(float((codes == 0).all(0).double().mean()), 4),
    }


def main() -> None:
    """Trains with fga_fast and one peer in turn, as often as asked, and prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    for name, value in (("steps", 300), ("batch", 4096), ("features", 768), ("k", 16), ("block", 3), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scenes", type=int, default=8000, help="of 64 tokens each; a tenth as many are held out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = streams(options.block, options.scenes, "train", seed=0)
    held_out = streams(options.block, max(20, options.scenes // 10), "test", seed=1)
    mean = tokens.mean(0)
    scale = (tokens - mean).norm(dim=1).mean() / tokens.shape[1] ** 0.5
    held_out = (held_out - mean) / scale
    package, peer = PEERS[options.peer]
    runs = {"fga_fast": fga_fast, options.peer: peer}
    versions = {name: importlib.metadata.version(package) for name in (options.peer,)}
    for seed in range(options.repeats):
        task = Task(
            (tokens - mean) / scale, options.features, options.k, options.steps, options.batch, options.lr, seed
        )
        for name, trainer in runs.items():
            torch.manual_seed(seed)
            clock = Clock(task)
            trained = trainer(task, clock)
            row = {"trainer": name, "version": versions.get(name, "this commit"), **measured(trained, held_out)}
            row |= {"tokens_per_s": round(clock.tokens_per_s()), "seed": seed, "threads": options.threads}
            row |= {n: getattr(options, n) for n in ("steps", "batch", "features", "k", "block", "scenes", "lr")}
            print(json.dumps(row | {"torch": torch.__version__, "cpu": cpu_name()}), flush=True)


if __name__ == "__main__":
    main()
