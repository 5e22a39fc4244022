"""SAE files that try to run code, exhaust memory or are cut short: refused, and nothing runs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import RunsOnLoad, config, public_folder, state_dict, touch, trainer_file

from fga_fast.io import torch_file
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats import checkpoint


def malicious(kind: str, marker: Path) -> Any:
    """Objects whose unpickling would create ``marker``."""
    calls: dict[str, RunsOnLoad] = {
        "os.system": RunsOnLoad(os.system, f"touch {marker}"),
        "eval": RunsOnLoad(eval, f"open({str(marker)!r}, 'w')"),
        "touch": RunsOnLoad(touch, str(marker)),
        "torch.load": RunsOnLoad(torch.load, str(marker)),
    }
    return calls[kind]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("place", ["state", "key", "cfg", "cfg field", "whole file"])
@pytest.mark.parametrize("kind", ["os.system", "eval", "touch", "torch.load"])
def test_no_code_runs(tmp_path: Path, kind: str, place: str, allow: bool) -> None:
    marker = tmp_path / "marker"
    bad = malicious(kind, marker)
    folder = tmp_path / "sae"
    folder.mkdir()
    if place == "state":
        public_folder(folder, state_dict() | {"extra": bad})
    elif place == "key":
        public_folder(folder, {bad: torch.zeros(1)})
    elif place == "cfg":
        torch.save({"cfg": bad, "state_dict": state_dict()}, folder / "sae.pt")
    elif place == "cfg field":
        trainer_file(folder / "sae.pt", dataset=bad)
    else:
        torch.save(bad, folder / "sae.pt")
    with pytest.raises(ValueError, match=r"refused without running it: it refers to [\w.]+, which is not a tensor"):
        SparseAutoencoder.from_pretrained(folder, allow_pickled_config=allow)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["os.system", "eval", "touch"])
def test_those_files_are_armed(tmp_path: Path, kind: str) -> None:
    torch.save(malicious(kind, tmp_path / "marker"), tmp_path / "sae.pt")
    torch.load(tmp_path / "sae.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "reduce",
    [b"cposix\nsystem\n", b"c__builtin__\neval\n", b"cnt\nsystem\n", b"ccommands\nVisionModelSAERunnerConfig.x\n"],
)
@pytest.mark.parametrize("allow", [False, True])
def test_hand_written_pickles(tmp_path: Path, reduce: bytes, allow: bool) -> None:
    marker = tmp_path / "marker"
    command = f"touch {marker}".encode()
    program = b"\x80\x02" + reduce + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."
    path = archive_with(tmp_path / "sae.pt", program)
    with pytest.raises(ValueError, match="refused without running it"):
        SparseAutoencoder.from_pretrained(path, allow_pickled_config=allow)
    assert not marker.exists()


def archive_with(path: Path, program: bytes, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", b"3\n")
        for name, data in extra.items():
            archive.writestr(name.replace("__", "/"), data)
    return path


CONFIG_GLOBAL = b"cvit_prisma.sae.config\nVisionModelSAERunnerConfig\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "pickle instruction SHORT_BINUNICODE"),
        (b"\x80\x02(X\x01\x00\x00\x00aiposix\nsystem\n.", "pickle instruction INST"),
        (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
        (b"\x80\x02Pname\n.", "pickle instruction PERSID"),
        (b"\x80\x02" + CONFIG_GLOBAL, "truncated or damaged pickle"),
        (b"", "truncated or damaged pickle"),
        (b"\x80\x02X\xff\xff\xff\x7f", "truncated or damaged pickle"),
        # The configuration class itself must not be a way in: called, given state, or changed.
        (b"\x80\x02" + CONFIG_GLOBAL + b"X\x01\x00\x00\x00a\x85R.", "damaged or refused by torch.load"),
        (b"\x80\x02" + CONFIG_GLOBAL + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "damaged or refused by torch.load"),
        (b"\x80\x02" + CONFIG_GLOBAL + b")\x81K\x01b.", "damaged or refused by torch.load"),
        (b"\x80\x02" + CONFIG_GLOBAL + b")\x81}K\x01K\x02sb.", "damaged or refused by torch.load"),
        (b"\x80\x02" + CONFIG_GLOBAL + b")\x81.", "expected a dict of tensors, got ConfigRecord"),
        (b"\x80\x02]K\x01K\x01s.", "damaged or refused by torch.load"),
        (b"\x80\x02" + b"ctorch\nFloatStorage\n\x85\x85Q.", "damaged or refused by torch.load"),
        (b"\x80\x02cos\nVisionModelSAERunnerConfig\n)\x81.", "damaged or refused by torch.load"),
    ],
)
def test_strange_pickles(tmp_path: Path, program: bytes, message: str) -> None:
    path = archive_with(tmp_path / "sae.pt", program)
    with pytest.raises(ValueError) as caught:
        SparseAutoencoder.from_pretrained(path, allow_pickled_config=True)
    assert message in str(caught.value)
    assert not hasattr(checkpoint.ConfigRecord, "a")


def test_second_guard_holds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the list of names bypassed, PyTorch's restricted reader would still refuse."""
    marker = tmp_path / "marker"
    torch.save({"cfg": malicious("os.system", marker), "state_dict": state_dict()}, tmp_path / "sae.pt")
    monkeypatch.setattr(torch_file, "foreign_names", lambda path, content=None: [])
    with pytest.raises(ValueError, match=r"damaged or refused by torch\.load"):
        SparseAutoencoder.from_pretrained(tmp_path, allow_pickled_config=True)
    assert not marker.exists()


def test_allowed_class_does_not_stay_allowed(tmp_path: Path) -> None:
    file = trainer_file(tmp_path / "sae.pt")
    before = set(torch.serialization.get_safe_globals())
    SparseAutoencoder.from_pretrained(file, allow_pickled_config=True)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def test_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    """A storage that claims more elements than the archive holds would be read past its end."""
    folder = public_folder(tmp_path / "sae")
    rezip(folder / "n_images_2600058.pt", lambda name, data: data[:8] if "/data/" in name else data)
    with pytest.raises(ValueError, match=r"damaged or refused by torch\.load"):
        SparseAutoencoder.from_pretrained(folder)


def test_compressed_archive(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    rezip(folder / "n_images_2600058.pt", lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"expected uncompressed entries as torch\.save writes them"):
        SparseAutoencoder.from_pretrained(folder)


def test_oversized_pickle(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "sae.pt", b"N" * (torch_file.MAX_PICKLE_BYTES + 1))
    with pytest.raises(ValueError, match="oversized pickle: expected at most 4194304 bytes, got 4194305"):
        SparseAutoencoder.from_pretrained(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"archive__constants.pkl": b"x"}, "the archive holds 'archive/constants.pkl'"),
        ({"archive__code____torch__.py": b"x"}, "which torch.save does not write for a state dict"),
        ({"other__data.pkl": b"x"}, "entries of the same name or in several folders"),
        ({f"archive__data__{i}": b"" for i in range(1001)}, "expected at most 1000 entries in the archive, got 1003"),
    ],
)
def test_archive_with_more_in_it(tmp_path: Path, extra: dict[str, bytes], message: str) -> None:
    path = archive_with(tmp_path / "sae.pt", b"\x80\x02}.", **extra)
    with pytest.raises(ValueError) as caught:
        SparseAutoencoder.from_pretrained(path)
    assert message in str(caught.value)


def test_archive_without_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sae.pt", "w") as archive:
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(ValueError, match=r"expected one data\.pkl in the archive, got 0"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")


def test_truncated_torch_file(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    data = (folder / "n_images_2600058.pt").read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 5):
        (folder / "n_images_2600058.pt").write_bytes(data[:keep])
        with pytest.raises(ValueError, match="truncated"):
            SparseAutoencoder.from_pretrained(folder)


def test_flipped_bytes_never_do_more_than_fail(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    file = folder / "n_images_2600058.pt"
    data = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(200):
        at = int(torch.randint(len(data), (1,), generator=generator))
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            SparseAutoencoder.from_pretrained(folder)
        except ValueError:  # any other exception fails the test; a flipped weight may pass
            refused += 1
    assert refused > 0


def test_torch_file_before_1_6_is_refused(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    torch.save(state_dict(), folder / "n_images_2600058.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not an archive of torch\.save"):
        SparseAutoencoder.from_pretrained(folder)


def test_not_a_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")
    torch.save({"cfg": [1], "state_dict": state_dict()}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="cfg: expected a VisionModelSAERunnerConfig or a dict, got list"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")
    torch.save({"cfg": config(), "state_dict": [1]}, tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="state_dict: expected a dict of tensors, got list"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")
