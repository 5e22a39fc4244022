"""Trains sparse autoencoders: several recipes for several blocks, in one pass over the tokens."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fga_fast
from fga_fast.dataset.items import stable_number
from fga_fast.harvest.tokens import Tokens
from fga_fast.io.atomic import check_writable_folder
from fga_fast.io.resume import only_writer
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.training.checkpoint import FILES, Folder
from fga_fast.training.recipe import Recipe
from fga_fast.training.trainee import Scale, Trainee

LOG = logging.getLogger(__name__)
ALGORITHM = 2  # what a step computes; raise it when that changes, so that no run goes on in another way
SAMPLE = 16_384  # tokens that centre and scale are taken from
_LOOK_EVERY = 16  # steps between two looks at the losses, which on a device make the host wait
_POINTS = 50  # of the course that training.json keeps, about
_PRESSED = 0.1  # share of the steps in which a sparsity penalty rises
_THETA_RATE = 10.0  # of the learning rate, for thresholds: they cross their whole range and not a small part of it
_TOLD = ("steps", "batch_size", "seed", "tokens", "fga_fast", "algorithm")  # settings that an SAE keeps
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Key = tuple[str, int]  # recipe's name, block


def train(
    tokens: Tokens, recipes: Mapping[str, Recipe], *, out: str | Path, steps: int, batch_size: int = 4096,
    lr: float | None = None, warmup: float = 0.05, decay: float = 0.3, seed: int = 0, checkpoint_every: int = 1000,
    device: str | torch.device = "cpu", compile: bool = False, autocast: bool = False, progress: bool = True,
) -> dict[Key, SparseAutoencoder]:  # fmt: skip
    """Trains one SAE for each recipe and block, and writes them as `out/<recipe>/block_<l>`.

    A call with the folder of a run that was stopped goes on with it; on a CPU with the same number of threads the
    result is the same, bit for bit, as without the stop. A call with that of a complete run returns at once. An SAE is
    the same whether it is trained alone or beside others.

    Args:
        tokens: where the tokens come from.
        recipes: name, which becomes a folder's -> `Recipe`.
        out: folder of the results.
        steps: number of batches, at least 1.
        batch_size: tokens in a batch, at least 1.
        lr: learning rate of Adam; None: that of each recipe's width, see `Recipe.rate`.
        warmup, decay: share of the steps in which the rate rises from 0, and in which it falls to 0 at the end.
        seed: of the starting points. The order of the tokens has its own, in `tokens`.
        checkpoint_every: steps after which the state is written; 0: at the end only.
        device: where it is computed.
        compile: compile the losses with `torch.compile`; tested for "topk" only.
        autocast: compute pre-activations in bfloat16; weights and everything else stay float32.
        progress: show a bar.

    Returns:
        (recipe's name, block) -> the SAE, on the CPU, float32.

    Raises:
        TypeError, ValueError: an argument does not fit, `out` holds a run with other settings or a damaged checkpoint,
            or tokens that are NaN, Inf or all equal.
        FloatingPointError: a loss or a weight became NaN or Inf; the message says at which step, and the last
            checkpoint is kept.
        OSError: the disk does not take a file; the last checkpoint is kept.
    """
    _check(tokens, recipes, steps, batch_size, lr, warmup, decay, checkpoint_every)
    settings = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "decay": decay, "seed": seed,
        "autocast": autocast, "compile": compile, "fga_fast": fga_fast.__version__, "torch": str(torch.__version__),
        "algorithm": ALGORITHM, "blocks": list(tokens.blocks), "d_model": tokens.d_model,
        "tokens": dict(tokens.about),
        **{f"recipes.{name}": dataclasses.asdict(recipe) for name, recipe in recipes.items()},
    }  # fmt: skip
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device}, but torch sees no CUDA device; leave it out to use the CPU")
    keys = [(name, block) for name in recipes for block in tokens.blocks]
    path = check_writable_folder(out)
    with only_writer(path):
        folder = Folder(path, settings)
        if not folder.complete:
            _Run(tokens, recipes, settings, folder, device).go(checkpoint_every, progress)
    return {key: SparseAutoencoder.from_pretrained(folder.sae(*key)) for key in keys}


class _Run:
    """All SAEs of a run, with their optimizers."""

    def __init__(
        self, tokens: Tokens, recipes: Mapping[str, Recipe], settings: Mapping[str, Any], folder: Folder,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._tokens, self._settings, self._folder, self._device = tokens, settings, folder, device
        sample = tokens.sample(SAMPLE)
        self._scales = {block: Scale(x.to(device, torch.float32)) for block, x in sample.items()}
        self._trainees: dict[Key, Trainee] = {}
        for name, recipe in recipes.items():
            for block in tokens.blocks:
                generator = torch.Generator().manual_seed(stable_number("sae", settings["seed"], block))
                variance = self._scales[block].variance
                self._trainees[name, block] = Trainee(recipe, tokens.d_model, variance, generator, device)
        self._adam = {key: _adam(one) for key, one in self._trainees.items()}
        self._loss: dict[Key, Callable[..., tuple[Tensor, Tensor]]] = {
            key: torch.compile(one.loss) if settings["compile"] else one.loss for key, one in self._trainees.items()
        }
        self._course: dict[str, Any] = {"step": [], **{_place(key): [] for key in self._trainees}}

    def go(self, checkpoint_every: int, progress: bool) -> None:
        """Trains to the end, from the checkpoint if there is one."""
        steps: int = self._settings["steps"]
        done = self._restore()
        unseen: list[tuple[int, Key, Tensor]] = []  # losses that nobody has looked at
        batches = self._batches(done)
        with tqdm(total=steps, initial=done, unit="step", desc="training", disable=not progress) as bar:
            for step in range(done, steps):
                batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"tokens: expected batches without end, got none for step {step + 1} of {steps}")
                unseen += [(step, key, loss) for key, loss in self._step(step, batch).items()]
                last = step + 1 == steps
                save = last or (checkpoint_every > 0 and (step + 1) % checkpoint_every == 0)
                if save or (step + 1) % _LOOK_EVERY == 0:
                    self._look(unseen)
                    latest = torch.stack([loss for _, _, loss in unseen[-len(self._trainees) :]]).mean()
                    bar.set_postfix(unexplained=f"{latest.item():.4f}", refresh=False)  # mean of all SAEs
                    unseen.clear()
                if save:
                    state = self._state()
                    _check_finite(step, state)  # the losses were those before the last step
                    self._folder.write(step + 1, state, self._course)
                bar.update()
        self._finish()

    def _batches(self, start: int) -> Iterator[dict[int, Tensor]]:
        """Centred and scaled batches, on the device."""
        for batch in self._tokens.batches(self._settings["batch_size"], start):
            yield {block: self._scales[block](batch[block].to(self._device, torch.float32)) for block in self._scales}

    def _step(self, step: int, batch: Mapping[int, Tensor]) -> dict[Key, Tensor]:
        """One step of each SAE; the unexplained shares before it."""
        steps, warmup, decay = (self._settings[name] for name in ("steps", "warmup", "decay"))
        rising = min(1.0, (step + 1) / max(1.0, warmup * steps))
        falling = min(1.0, (steps - step) / max(1.0, decay * steps))
        cast = torch.autocast(self._device.type, torch.bfloat16) if self._settings["autocast"] else None
        pressure = torch.tensor(_pressure(step, steps), device=self._device)
        found = {}
        for key, trainee in self._trainees.items():
            adam = self._adam[key]
            rate = (self._settings["lr"] or trainee.recipe.rate) * min(rising, falling)
            for group in adam.param_groups:
                group["lr"] = rate * group["times"]
            adam.zero_grad(set_to_none=True)
            loss, found[key] = self._loss[key](batch[key[1]], pressure, cast)
            loss.backward()  # type: ignore[no-untyped-call]
            trainee.level_gradient()
            adam.step()
            trainee.unit_decoder()
        if step % -(-steps // _POINTS) == 0 or step + 1 == steps:
            self._record(step, found)
        return found

    def _record(self, step: int, found: Mapping[Key, Tensor]) -> None:
        self._course["step"].append(step + 1)
        for key, trainee in self._trainees.items():
            dead = (trainee.silent > trainee.recipe.dead_after).float().mean()
            values = {"unexplained": found[key], "l0": trainee.active, "dead": dead}
            self._course[_place(key)].append({name: round(value.item(), 6) for name, value in values.items()})

    def _look(self, unseen: list[tuple[int, Key, Tensor]]) -> None:
        finite = torch.isfinite(torch.stack([loss for _, _, loss in unseen]))
        if bool(finite.all()):
            return
        step, (name, block), loss = unseen[int((~finite).nonzero()[0])]
        batch = next(self._tokens.batches(self._settings["batch_size"], step))[block]
        wrong = len(batch) - int(torch.isfinite(batch).all(1).sum())
        reason = (
            f"{wrong} of the {len(batch)} tokens of this step hold NaN or Inf; leave out the images that give them"
            if wrong else "the training diverged; take a lower lr"
        )  # fmt: skip
        raise FloatingPointError(
            f"step {step + 1}, recipe {name}, block {block}: the loss is {loss.item()}: {reason}. Nothing of this step "
            "is saved; an earlier checkpoint is unharmed"
        )

    def _state(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, by name; the tensors themselves."""
        state: dict[str, Tensor] = {}
        for key, trainee in self._trainees.items():
            own = trainee.state_dict()
            state |= {f"{_place(key)}/{name}": tensor for name, tensor in own.items()}
            for name, parameter in trainee.named_parameters():
                moments = self._adam[key].state[parameter]
                state |= {f"{_place(key)}/adam/{name}/{moment}": tensor for moment, tensor in moments.items()}
        return state

    def _restore(self) -> int:
        """Goes back to the checkpoint; returns its step, or 0."""
        state = self._state()
        found = self._folder.read(self._settings["steps"], state, self._course)
        if found is None:
            return 0
        step, tensors, self._course = found
        for name, tensor in tensors.items():
            state[name].copy_(tensor)  # into memory that is aligned as it was, which sums depend on
        LOG.info("goes on after step %d", step)
        return step

    def _finish(self) -> None:
        about = self._tokens.about
        for (name, block), trainee in self._trainees.items():
            told = {"lr": self._settings["lr"] or trainee.recipe.rate, **{key: self._settings[key] for key in _TOLD}}
            metadata = {
                "layer": str(block),
                "model_name": str(about.get("model", "")),
                "model_checksum": str(about.get("model_checksum", "")),
                "recipe": json.dumps({"name": name, **dataclasses.asdict(trainee.recipe)}),
                "training": json.dumps(told),
            }
            self._folder.keep(name, block, trainee.frozen(self._scales[block], metadata))
        self._folder.finish(self._course)


def _adam(trainee: Trainee) -> torch.optim.Adam:
    """Adam with its state made at once, so that a checkpoint can be read into it."""
    groups = [
        {"params": [parameter], "times": _THETA_RATE if name == "log_theta" else 1.0}
        for name, parameter in trainee.named_parameters()
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for parameter in trainee.parameters():
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return adam


def _check_finite(step: int, state: Mapping[str, Tensor]) -> None:
    """Raises FloatingPointError for NaN or Inf in any tensor."""
    finite = torch.stack([torch.linalg.vector_norm(tensor, torch.inf) for tensor in state.values()]).isfinite()
    if not bool(finite.all()):
        raise FloatingPointError(
            f"step {step + 1}: weights became NaN or Inf ({[*state][int((~finite).nonzero()[0])]}); take a lower lr. "
            "Nothing of this step is saved; an earlier checkpoint is unharmed"
        )


def _place(key: Key) -> str:
    return f"{key[0]}/block_{key[1]}"


def _pressure(step: int, steps: int) -> float:
    """The share of a sparsity penalty in force: it rises from 0, so that features form before they are pressed."""
    return min(1.0, step / max(1.0, _PRESSED * steps))


def _check(
    tokens: Tokens, recipes: Mapping[str, Recipe], steps: int, batch_size: int, lr: float | None, warmup: float,
    decay: float, checkpoint_every: int,
) -> None:  # fmt: skip
    if not recipes:
        raise ValueError("recipes: expected at least one, got none")
    for name, recipe in recipes.items():
        if not _NAME.fullmatch(name) or name in FILES:
            raise ValueError(f"recipes: expected names of letters, digits, '.', '_' and '-', got {name!r}")
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipes: expected a Recipe for {name!r}, got {type(recipe).__name__}")
    for what, number, least in (
        ("steps", steps, 1), ("batch_size", batch_size, 1), ("checkpoint_every", checkpoint_every, 0),
    ):  # fmt: skip
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{what}: expected a whole number of at least {least}, got {number!r}")
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr: expected a finite number above 0, or None, got {lr}")
    for what, share in (("warmup", warmup), ("decay", decay)):
        if not 0 <= share <= 1:
            raise ValueError(f"{what}: expected a share of the steps from 0 to 1, got {share}")
    if not tokens.blocks:
        raise ValueError("tokens: expected at least one block, got none")
