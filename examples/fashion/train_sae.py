"""Train top-k sparse autoencoders on the residual stream of the ViT that `train_vit` made.

    python -m examples.fashion.train_sae --model examples/fashion/runs --blocks 2 3

Writes `sae_<block>/` (fga_fast's own format) beside the ViT, adds the folders to its `config.json`, and writes
`sae_report.json`: explained variance, codes per token, dead features, and the ViT's label accuracy when the
reconstruction replaces the patches of the residual stream. Top-k as in Gao et al. 2024 (arXiv:2406.04093).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor, nn

from examples.fashion.data import Garments, load_garments, make_scenes
from examples.fashion.train_vit import write_json
from fga_fast.sae import SparseAutoencoder

LOG = logging.getLogger("train_sae")
QUIET_TOKENS = 400_000  # a feature that is silent for so many tokens gets the auxiliary loss


class TopKTrainer(nn.Module):
    """One SAE in training, on activations divided by `scale`, so that one learning rate fits all blocks."""

    def __init__(self, sample: Tensor, d_sae: int, k: int) -> None:  # sample [T, C]
        super().__init__()
        width = sample.shape[1]
        self.k = k
        self.scale = (sample - sample.mean(0)).norm(dim=1).mean().item() / width**0.5
        decoder = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=1)
        self.W_dec = nn.Parameter(decoder)  # [F, C]
        self.W_enc = nn.Parameter(decoder.t().clone())  # [C, F]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(sample.mean(0) / self.scale)
        self.register_buffer("silent", torch.zeros(d_sae))  # tokens since the feature last fired

    def forward(self, x: Tensor) -> Tensor:  # x [T, C]
        """The loss on T tokens: the unexplained part, plus a term that makes silent features explain the rest."""
        x = x / self.scale
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc  # [T, F]
        value, index = pre.topk(self.k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, index, value.relu())
        left = x - self.b_dec - codes @ self.W_dec
        variance = (x - x.mean(0)).square().mean()
        loss = left.square().mean() / variance
        with torch.no_grad():
            self.silent += len(x)
            self.silent[(codes > 0).any(0)] = 0
            dead = (self.silent > QUIET_TOKENS).nonzero().flatten()
        if len(dead) >= 8:
            value, index = pre[:, dead].topk(min(len(dead), x.shape[1] // 2), dim=1)
            spare = torch.zeros(len(x), len(dead)).scatter(1, index, value.relu()) @ self.W_dec[dead]
            loss = loss + (left.detach() - spare).square().mean() / variance / 32
        return loss

    @torch.no_grad()
    def unit_decoder(self) -> None:
        """Scale each decoder row to length 1, so that a code is the size of what its feature adds to the stream."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    @torch.no_grad()
    def frozen(self) -> SparseAutoencoder:
        """The same SAE for activations that are not divided by `scale`."""
        W_enc, W_dec, b_dec = self.W_enc / self.scale, self.W_dec * self.scale, self.b_dec * self.scale
        return SparseAutoencoder(W_enc, self.b_enc, W_dec, b_dec, activation="topk", k=self.k)


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = json.loads((arguments.model / "config.json").read_text())
    model = VisionTransformer(**config["model_args"])
    model.load_state_dict(load_file(arguments.model / "vit.safetensors"))
    model.eval().requires_grad_(False)
    names = tuple(config["class_names"])
    trainers = train(model, load_garments("train", names), config, arguments)
    saes = {block: trainer.frozen() for block, trainer in trainers.items()}
    report = evaluate(model, saes, load_garments("test", names), config, arguments.test_scenes)
    for block, sae in saes.items():
        sae.save(arguments.model / f"sae_{block}")
    config["saes"] = {str(block): f"sae_{block}" for block in saes}
    write_json(arguments.model / "config.json", config)
    write_json(arguments.model / "sae_report.json", report)
    LOG.info("test %s", json.dumps(report))


def train(
    model: VisionTransformer, garments: Garments, config: dict[str, list[float]], arguments: argparse.Namespace
) -> dict[int, TopKTrainer]:
    """Train one SAE for each block, all on the same scenes."""
    generator = torch.Generator().manual_seed(arguments.seed)
    sample = residual_streams(model, _images(garments, 256, generator, config), arguments.blocks)
    trainers = {block: TopKTrainer(x, arguments.features, arguments.k) for block, x in sample.items()}
    parameters = [p for trainer in trainers.values() for p in trainer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=arguments.lr, betas=(0.9, 0.999))
    decay_from = 0.7 * arguments.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, (arguments.steps - step) / (arguments.steps - decay_from))
    )
    for step in range(1, arguments.steps + 1):
        streams = residual_streams(model, _images(garments, arguments.batch, generator, config), arguments.blocks)
        losses = {block: trainers[block](x) for block, x in streams.items()}
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        schedule.step()
        for trainer in trainers.values():
            trainer.unit_decoder()
        if step % 250 == 0:
            LOG.info("step %d unexplained %s", step, {block: round(x.item(), 4) for block, x in losses.items()})
    return trainers


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    saes: dict[int, SparseAutoencoder],
    garments: Garments,
    config: dict[str, list[float]],
    count: int,
) -> dict[str, object]:
    """How well each SAE reconstructs the residual stream of held-out scenes."""
    generator = torch.Generator().manual_seed(2_000_003)
    scenes = make_scenes(garments, count, generator)
    images = (scenes.images - config["mean"][0]) / config["std"][0]
    truth = scenes.targets > 0
    report: dict[str, object] = {"scenes": count, "label_accuracy": _accuracy(model(images), truth)}
    streams = residual_streams(model, images, list(saes))
    for block, sae in saes.items():
        x = streams[block]  # [T, C]
        codes = sae.encode(x)
        left = (x - sae.decode(codes)).square().sum()
        fired = codes > 0
        with _replaced(model, block, sae):
            spliced = _accuracy(model(images), truth)
        report[f"block {block}"] = {
            "explained_variance": round(1 - (left / (x - x.mean(0)).square().sum()).item(), 4),
            "codes_a_token": round(fired.sum(1).float().mean().item(), 2),
            "dead_features": int((~fired.any(0)).sum()),
            "features": sae.d_sae,
            "label_accuracy_with_reconstruction": spliced,
        }
    return report


@torch.no_grad()
def residual_streams(model: VisionTransformer, images: Tensor, blocks: list[int]) -> dict[int, Tensor]:
    """The patches' residual stream [B * P, C] after each of `blocks`, for images [B, 3, H, W]."""
    streams: dict[int, Tensor] = {}
    handles = [
        model.blocks[block].register_forward_hook(
            lambda _module, _inputs, output, block=block: streams.__setitem__(block, output[:, 1:].flatten(0, 1))
        )
        for block in blocks
    ]
    try:
        model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return streams


@contextmanager
def _replaced(model: VisionTransformer, block: int, sae: SparseAutoencoder) -> Iterator[None]:
    """Replaces the patches after `block` by the SAE's reconstruction for a while."""

    def splice(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:  # [B, N, C]
        return torch.cat((output[:, :1], sae.decode(sae.encode(output[:, 1:]))), dim=1)

    handle = model.blocks[block].register_forward_hook(splice)
    try:
        yield
    finally:
        handle.remove()


def _accuracy(logits: Tensor, truth: Tensor) -> float:
    return round(((logits > 0) == truth).double().mean().item(), 4)


def _images(garments: Garments, count: int, generator: torch.Generator, config: dict[str, list[float]]) -> Tensor:
    return (make_scenes(garments, count, generator).images - config["mean"][0]) / config["std"][0]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with vit.safetensors and config.json")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64, help="scenes per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test-scenes", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
