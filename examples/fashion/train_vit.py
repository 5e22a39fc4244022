"""Train the small ViT that ships with fga_fast on scenes of Fashion-MNIST garments.

    python -m examples.fashion.train_vit --out examples/fashion/runs

Writes `vit.safetensors`, `config.json` and `vit_report.json` to `--out`. Saves the averaged weights every
`--report-every` steps, so that a stopped run leaves a usable checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.fashion.data import ALL_CLASSES, Garments, load_garments, make_scenes, patch_classes
from fga_fast.io.atomic import atomic_write

LOG = logging.getLogger("train_vit")
MODEL_ARGS = {"img_size": 56, "patch_size": 7, "embed_dim": 128, "depth": 5, "num_heads": 4, "class_token": True}
MEAN, STD = 0.3, 0.25
DECAY = 0.3  # in this share of the steps, at the end, the learning rate falls and the model sees every patch


def main() -> None:
    arguments = _parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Processes synchronise once per step, threads in every operation, which is far slower on a busy machine.
        torch.multiprocessing.spawn(work, (arguments, f"file://{folder}/meet"), nprocs=arguments.processes)


def work(rank: int, arguments: argparse.Namespace, meeting_point: str) -> None:
    """One of the training processes; each takes its own share of every batch."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    torch.distributed.init_process_group("gloo", meeting_point, rank=rank, world_size=arguments.processes)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)  # the same first weights in every process
    # At these sizes on a CPU, unfused attention has a three times faster backward pass.
    set_fused_attn(False)
    names = tuple(name for name in ALL_CLASSES if name not in arguments.without)
    model_args = MODEL_ARGS | {"num_classes": len(names)}
    config = {"model_args": model_args, "mean": [MEAN] * 3, "std": [STD] * 3, "class_names": list(names)}
    model = train(VisionTransformer(**config["model_args"]), names, config, arguments)
    if rank > 0:
        return
    report = evaluate(model, load_garments("test", names), arguments.test_scenes, seed=1_000_003)
    report["training"] = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
    LOG.info("test %s", json.dumps(report))
    write_json(arguments.out / "vit_report.json", report)


def train(
    model: nn.Module, names: tuple[str, ...], config: dict[str, object], arguments: argparse.Namespace
) -> nn.Module:
    """Train `model` from scratch and return the model with the running average of its weights, in eval mode."""
    rank, processes = torch.distributed.get_rank(), arguments.processes
    garments = load_garments("train", names)
    validation = load_garments("validation", names)
    generator = torch.Generator().manual_seed(arguments.seed * processes + rank)
    # Names the garment under each patch, in training only: a dense signal beside the sparse one of the class token.
    patch_head = nn.Linear(MODEL_ARGS["embed_dim"], len(names) + 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizers = _optimizers(model, patch_head, arguments)
    schedules = [LambdaLR(optimizer, lambda step: _lr_factor(step, arguments.steps)) for optimizer in optimizers]
    decay_from = (1 - DECAY) * arguments.steps
    master = nn.ModuleList((model, patch_head))
    # Forward and backward run on a bfloat16 copy; the float32 weights accumulate the small steps.
    copy = deepcopy(master).to(torch.float32 if arguments.float32 else torch.bfloat16)
    started, losses = time.time(), []
    for step in range(1, arguments.steps + 1):
        alone = {"fewest": 1, "most": 1} if step <= arguments.alone_steps else {}
        scenes = make_scenes(garments, arguments.batch // processes, generator, augment=True, **alone)
        patches = patch_classes(scenes, MODEL_ARGS["patch_size"], background=len(names))
        keep = (18 if alone else arguments.keep) if step < decay_from else patches.shape[1]
        kept = kept_patches(patches, keep, background=len(names), generator=generator)
        images = ((scenes.images - MEAN) / STD).to(copy[1].weight.dtype)
        loss, class_loss = _loss(copy[0], copy[1], images, scenes.targets, patches, kept, arguments.patch_loss)
        copy.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(copy, master)
        nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(copy.parameters()), list(master.parameters()))
        for schedule in schedules:
            schedule.step()
        average.update_parameters(model)
        if step < 300:  # leave the first weights out of the average
            average.module.load_state_dict(model.state_dict())
        losses.append(class_loss.detach())
        if rank == 0 and (step % arguments.report_every == 0 or step == arguments.steps):
            report = evaluate(average.module, validation, 1000, seed=7)
            rate = step * arguments.batch / (time.time() - started)
            LOG.info(
                "step %d loss %.4f validation label accuracy %.4f exact %.4f | %.0f scenes/s",
                step, torch.stack(losses).mean(), report["label_accuracy"], report["exact_match"], rate,
            )  # fmt: skip
            losses.clear()
            save(average.module, config, arguments.out)
    return average.module.eval()


def _loss(
    model: VisionTransformer,
    patch_head: nn.Module,
    images: Tensor,  # [B, 3, 56, 56]
    targets: Tensor,  # [B, classes]
    patches: Tensor,  # [B, P] class under each patch
    kept: Tensor,  # [B, keep] the patches that the model sees
    patch_weight: float,
) -> tuple[Tensor, Tensor]:
    """The training loss, and its part from the class token."""
    tokens = model._pos_embed(model.patch_embed(images))  # [B, 1 + P, C]
    chosen = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = model.norm(model.blocks(torch.cat((tokens[:, :1], chosen), dim=1)))  # [B, 1 + keep, C]
    class_loss = F.binary_cross_entropy_with_logits(model.forward_head(tokens).float(), targets)
    patch_loss = F.cross_entropy(patch_head(tokens[:, 1:]).float().flatten(0, 1), patches.gather(1, kept).flatten())
    return class_loss + patch_weight * patch_loss, class_loss


def _average_gradients(copy: nn.Module, master: nn.Module) -> None:
    """Give `master` the mean of all processes' gradients of `copy`."""
    flat = torch.cat([p.grad.flatten().float() for p in copy.parameters()])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    weights = list(master.parameters())
    for weight, mean in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.grad = mean.view_as(weight)


def kept_patches(patches: Tensor, keep: int, background: int, generator: torch.Generator) -> Tensor:
    """`keep` patches of each scene, garments first: [B, keep] int64. Empty canvas costs as much and teaches little."""
    order = torch.rand(patches.shape, generator=generator) + (patches == background)  # patches [B, P]
    return order.argsort(dim=1)[:, :keep]


@torch.inference_mode()
def evaluate(model: nn.Module, garments: Garments, count: int, seed: int) -> dict[str, object]:
    """Accuracy on `count` scenes from `seed`, in float32 with threshold 0.5, and that of the answer "all absent"."""
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    guesses, targets = [], []
    for _ in range(0, count, 250):
        scenes = make_scenes(garments, 250, generator)
        guesses.append(model((scenes.images - MEAN) / STD) > 0)
        targets.append(scenes.targets > 0)
    model.train(training)
    guess, truth = torch.cat(guesses), torch.cat(targets)
    right = guess == truth
    hit = (guess & truth).sum(0).double()
    return {
        "scenes": len(truth),
        "label_accuracy": right.double().mean().item(),
        "exact_match": right.all(1).double().mean().item(),
        "all_absent_label_accuracy": (~truth).double().mean().item(),
        "class_names": list(garments.class_names),
        "class_accuracy": [round(value, 4) for value in right.double().mean(0).tolist()],
        "class_f1": [round(v, 4) for v in (2 * hit / (guess.sum(0) + truth.sum(0)).clamp(min=1)).tolist()],
    }


def save(model: nn.Module, config: dict[str, object], out: Path) -> None:
    """Write `vit.safetensors`, with the configuration in its header, and `config.json`."""
    state = {name: value.float().contiguous() for name, value in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in config.items()}
    save_file(state, out / "vit.safetensors.partial", metadata=metadata)
    (out / "vit.safetensors.partial").replace(out / "vit.safetensors")
    write_json(out / "config.json", config)


def _optimizers(
    model: nn.Module, patch_head: nn.Module, arguments: argparse.Namespace
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon, which needs far fewer scenes, for the matrices of the blocks; AdamW for everything else."""
    named = [*model.named_parameters(), *patch_head.named_parameters()]
    matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for name, p in named if not (name.startswith("blocks.") and p.ndim == 2)]
    decay = arguments.weight_decay
    muon = torch.optim.Muon(matrices, lr=arguments.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=arguments.lr, weight_decay=0.0, betas=(0.9, 0.98))
    return muon, adam


def _lr_factor(step: int, steps: int, warmup: int = 300) -> float:
    """Warm-up, constant, then a cosine down to 0.005 over the last `DECAY` of the steps."""
    decay_from = (1 - DECAY) * steps
    if step < decay_from:
        return min(1.0, (step + 1) / warmup)
    return 0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (steps - decay_from)))


def write_json(path: Path, value: object) -> None:
    atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--patch-loss", type=float, default=0.3, help="weight of the loss on the patch tokens")
    parser.add_argument("--keep", type=int, default=40, help="patches seen before the learning rate falls")
    parser.add_argument("--alone-steps", type=int, default=800, help="steps at the start with one garment per scene")
    parser.add_argument("--without", nargs="*", default=[], choices=ALL_CLASSES, help="classes to leave out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="with one thread each; results depend on this number")
    parser.add_argument("--test-scenes", type=int, default=5000)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for CPUs without AMX")
    return parser.parse_args()


if __name__ == "__main__":
    main()
