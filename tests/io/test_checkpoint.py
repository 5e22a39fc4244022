"""Checkpoints of the command line: read when they fit, refused when damaged, hostile or another model's."""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fga_fast.io.checkpoint import Checkpoint

timm = pytest.importorskip("timm")

MODEL = "test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(MODEL, num_classes=11).state_dict(), path)
    return path


def state(weights: Path) -> dict[str, Tensor]:
    return Checkpoint(weights).tensors()


def with_header(path: Path, header: bytes, announced: int | None = None, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if announced is None else announced) + header + body)
    return path


def test_oversized_headers_are_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"header of 1099511627776 bytes, over the limit"):
        Checkpoint(with_header(tmp_path / "large", b"{}", announced=2**40))
    with pytest.raises(ValueError, match="truncated or damaged: not a readable safetensors file"):
        Checkpoint(with_header(tmp_path / "lying", b"{}", announced=5000))
    tensor = b'{"w": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'
    with pytest.raises(ValueError, match="truncated or damaged: not a readable safetensors file"):
        Checkpoint(with_header(tmp_path / "huge", tensor, body=b"\0" * 64))


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="neither a safetensors nor a torch"):
        Checkpoint(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no file"):
        Checkpoint(tmp_path)


class Harmful:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({"w": torch.zeros(2), "x": Harmful(trace)}, path)
    with pytest.raises(ValueError, match="pickled objects other than tensors are refused"):
        Checkpoint(path)
    path.write_bytes(pickle.dumps(Harmful(trace), protocol=2))
    with pytest.raises(ValueError, match=r"not an archive of torch\.save .* written by torch < 1\.6"):
        Checkpoint(path)
    assert not trace.exists()


def test_torch_checkpoints_of_tensors_are_read(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    for number, content in enumerate(
        [tensors, {"state_dict": tensors, "epoch": 3}, {"model": {f"module.{k}": v for k, v in tensors.items()}}]
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        model = timm.create_model(MODEL, num_classes=11)
        Checkpoint(path).load_into(model)
        assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def loaded(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], tuple[str, list[str]]]:
    model = timm.create_model(MODEL, num_classes=11)
    said = Checkpoint(path, key).load_into(model)
    return model.state_dict(), said


LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}, "callbacks": {"x": None}}


def under(prefix: str, tensors: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {**{prefix + name: tensor for name, tensor in tensors.items()}, **more}


@pytest.mark.parametrize(
    ("inside", "prefix", "more", "beside"),
    [
        ("state_dict", "model.", {}, []),
        (
            "state_dict",
            "net.",
            {"criterion.weight": torch.ones(4), "criterion.bias": torch.ones(4)},
            ["state_dict.criterion"],
        ),
        ("state_dict", "model._orig_mod.module.", {"ema.decay": torch.ones(())}, ["state_dict.ema"]),
        ("model_ema", "module.", {}, []),
        (None, "_orig_mod.", {}, []),
        (None, "encoder.vit.", {"encoder.pool": torch.ones(2), "text.weight": torch.ones(1)}, ["encoder.pool", "text"]),
    ],
)
def test_prefixes_of_training_tools(
    tmp_path: Path, weights: Path, inside: str | None, prefix: str, more: dict[str, Tensor], beside: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tensors = state(weights)
    named = under(prefix, tensors, **more)
    path = tmp_path / "run.ckpt"
    torch.save(
        named if inside is None else {**LIGHTNING, inside: named, "optimizer_states": [{0: torch.ones(1)}]}, path
    )
    with caplog.at_level("INFO", "fga_fast"):
        got, (said, left_out) = loaded(path)
    whole = prefix if inside is None else f"{inside}.{prefix}"
    assert (said, left_out) == (whole, beside) and repr(whole) in caplog.text
    assert all(torch.equal(value, tensors[name]) for name, value in got.items())


def test_prefixes_in_safetensors(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    save_file(under("model.", tensors), tmp_path / "run.safetensors")
    got, said = loaded(tmp_path / "run.safetensors")
    assert said == ("model.", []) and all(torch.equal(value, tensors[name]) for name, value in got.items())
    assert Checkpoint(tmp_path / "run.safetensors").shape("head.weight") == (11, 64)


def test_several_models_in_a_file_are_refused_until_one_is_named(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    average = {name: tensor + 1 for name, tensor in tensors.items()}
    path = tmp_path / "run.pth"
    torch.save({"state_dict": tensors, "state_dict_ema": under("module.", average)}, path)
    with pytest.raises(
        ValueError, match=r"several models .* 'state_dict\.', 'state_dict_ema\.module\.'; .*--checkpoint-k"
    ):
        loaded(path)
    for key, want in (("state_dict", tensors), ("state_dict_ema", average), ("state_dict_ema.module", average)):
        got, (said, _) = loaded(path, key)
        assert said.startswith(key + ".") and all(torch.equal(value, want[name]) for name, value in got.items())
    with pytest.raises(ValueError, match=r"no tensors under 'ema', but under 'state_dict', 'state_dict_ema'"):
        Checkpoint(path, "ema")


def test_a_mismatch_under_a_prefix_names_it(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    del tensors["norm.bias"]
    torch.save({"state_dict": under("model.", tensors)}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"under 'state_dict\.model\.' 1 missing \(norm\.bias\)"):
        loaded(tmp_path / "run.ckpt")


def test_classes_in_a_lightning_checkpoint_are_named_and_not_loaded(tmp_path: Path, weights: Path) -> None:
    """Lightning pickles what a user keeps as hyperparameters; a namespace stands for all of them."""
    path = tmp_path / "run.ckpt"
    torch.save({**LIGHTNING, "hyper_parameters": argparse.Namespace(lr=0.1), "state_dict": state(weights)}, path)
    with pytest.raises(ValueError, match=r"can run any code; this file's are argparse\.Namespace.*\['state_dict'\]"):
        Checkpoint(path)


def test_sizes_that_a_torch_file_only_claims(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"head.weight": torch.zeros(1).expand(2**27, 16)}, path)
    with pytest.raises(ValueError, match=r"head\.weight: claims 8589934592 bytes, the file stores 4"):
        Checkpoint(path)
    torch.save({"head.weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)  # not checked by torch
    with pytest.raises(ValueError, match=r"not an archive of torch\.save"):
        Checkpoint(path)


def test_damaged_torch_checkpoints(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(state(weights), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        Checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 2**20)
    with pytest.raises(ValueError, match="expected uncompressed entries"):
        Checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict"):
        Checkpoint(path)


def test_mismatches_are_listed_and_the_model_is_left_alone(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    tensors["cls_token"] = torch.zeros(1, 1, 3)
    tensors["extra"] = torch.zeros(1)
    del tensors["norm.bias"]
    save_file(tensors, tmp_path / "other.safetensors")
    model = timm.create_model(MODEL, num_classes=11)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        Checkpoint(tmp_path / "other.safetensors").load_into(model)
    for part in ("1 missing (norm.bias)", "1 unknown (extra)", "cls_token: model [1, 1, 64], file [1, 1, 3]"):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite(tmp_path: Path, weights: Path) -> None:
    tensors = state(weights)
    tensors["norm.bias"][3] = torch.inf
    save_file(tensors, tmp_path / "inf.safetensors")
    with pytest.raises(ValueError, match=r"norm\.bias in .* contains NaN or Inf"):
        Checkpoint(tmp_path / "inf.safetensors").load_into(timm.create_model(MODEL, num_classes=11))
