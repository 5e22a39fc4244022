"""SAE files that try to run code, exhaust memory or are cut short: refused, and nothing runs."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from formats import config, malicious, public_folder, rezip, state_dict, trainer_file
from formats_case import refused

from fga_fast.io import torch_file
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats import checkpoint


@pytest.mark.parametrize("allow", [False, True])
def test_no_code_runs_in_a_configuration(tmp_path: Path, allow: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "sae.pt"
    for bad in malicious(marker):
        for field in (False, True):
            if field:
                trainer_file(path, dataset=bad)
            else:
                torch.save({"cfg": bad, "state_dict": state_dict()}, path)
            assert "is not a tensor" in refused(path, "without running it: it refers to ", allow_pickled_config=allow)
            assert not marker.exists()


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
    refused(path, "refused without running it", allow_pickled_config=allow)
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
    refused(path, message, allow_pickled_config=True)
    assert not hasattr(checkpoint.ConfigRecord, "a")


def test_second_guard_holds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the list of names bypassed, PyTorch's restricted reader would still refuse."""
    marker = tmp_path / "marker"
    torch.save({"cfg": malicious(marker)[0], "state_dict": state_dict()}, tmp_path / "sae.pt")
    monkeypatch.setattr(torch_file, "foreign_names", lambda path, content=None: [])
    refused(tmp_path, "damaged or refused by torch.load", allow_pickled_config=True)
    assert not marker.exists()


def test_allowed_class_does_not_stay_allowed(tmp_path: Path) -> None:
    file = trainer_file(tmp_path / "sae.pt")
    before = set(torch.serialization.get_safe_globals())
    SparseAutoencoder.from_pretrained(file, allow_pickled_config=True)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def test_compressed_archive(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    rezip(folder / "n_images_2600058.pt", lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(folder, "expected uncompressed entries as torch.save writes them")


def test_oversized_pickle(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "sae.pt", b"N" * (torch_file.MAX_PICKLE_BYTES + 1))
    refused(path, "oversized pickle: expected at most 4194304 bytes, got 4194305")


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
    refused(path, message)


def test_archive_without_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sae.pt", "w") as archive:
        archive.writestr("archive/version", b"3\n")
    refused(tmp_path / "sae.pt", "expected one data.pkl in the archive, got 0")


def test_torch_file_before_1_6_is_refused(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    torch.save(state_dict(), folder / "n_images_2600058.pt", _use_new_zipfile_serialization=False)
    refused(folder, "not an archive of torch.save")


def test_not_a_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "expected a dict of tensors, got list")
    torch.save({"cfg": [1], "state_dict": state_dict()}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "cfg: expected a VisionModelSAERunnerConfig or a dict, got list")
    torch.save({"cfg": config(), "state_dict": [1]}, tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "state_dict: expected a dict of tensors, got list")
