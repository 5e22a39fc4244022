"""Where SAE files are read from: links that lead out, subfolders, and the hub only when it is asked for."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import formats_dictionary_learning as dictionary_learning
import formats_saelens as saelens
import formats_saev as saev
import formats_sparsify as sparsify
import formats_visaebench as visaebench
import pytest
import torch
from formats import public_folder
from formats_case import C, F

from fga_fast.sae import SparseAutoencoder

load = SparseAutoencoder.from_pretrained


def own(folder: Path) -> Path:
    state = {"W_enc": torch.zeros(C, F), "b_enc": None, "W_dec": torch.zeros(F, C), "b_dec": torch.zeros(C)}
    return SparseAutoencoder(**state).save(folder)  # type: ignore[arg-type]


FOLDERS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "fga_fast": (own, ("sae.safetensors", "config.json")),
    "vit-prisma": (public_folder, ("n_images_2600058.pt", "config.json")),
    "saelens": (lambda f: saelens.case(f).path, ("sae_weights.safetensors", "cfg.json")),
    "saev": (lambda f: saev.case(f).path.parent, ("sae.pt",)),
    "sparsify": (lambda f: sparsify.case(f.parent, f.name).path, ("sae.safetensors", "cfg.json")),
    "visaebench": (lambda f: visaebench.own(f).path, ("sae.pt", "config.json")),
    "dictionary_learning": (
        lambda f: dictionary_learning.case(f, "AutoEncoderTopK").path,
        ("ae.pt", "config.json"),
    ),
    "visaebench yaml": (lambda f: visaebench.own(f, config=visaebench.YAML).path, ("sae.pt", "config.yaml")),
}
LINKED = [(name, file) for name, (_, files) in FOLDERS.items() for file in files]


@pytest.mark.parametrize(("name", "file"), LINKED)
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str, file: str) -> None:
    folder = FOLDERS[name][0](tmp_path / "layers.10")
    load(folder)
    elsewhere = tmp_path / "elsewhere" / file
    elsewhere.parent.mkdir()
    shutil.move(folder / file, elsewhere)
    for target in (elsewhere, os.path.join("..", "elsewhere", file)):  # noqa: PTH118 - kept as written in the link
        (folder / file).symlink_to(target)
        with pytest.raises(ValueError, match="outside the SAE's folder, and is not followed"):
            load(folder)
        (folder / file).unlink()
    (folder / "within").mkdir()
    shutil.move(elsewhere, folder / "within" / file)
    (folder / file).symlink_to(Path("within") / file)  # within the folder a link is fine
    load(folder)


def test_a_folder_reached_by_a_link_is_a_folder(tmp_path: Path) -> None:
    folder = saelens.case(tmp_path / "real").path
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(load(tmp_path / "link").W_dec, load(folder).W_dec)


@pytest.mark.parametrize(("name", "file"), LINKED)
def test_the_hubs_cache_is_links_into_its_blobs(tmp_path: Path, name: str, file: str) -> None:
    repository = tmp_path / "models--org--name"
    folder = FOLDERS[name][0](_parent(repository / "snapshots" / "abc123" / "layers.10"))
    blob = repository / "blobs" / "d34db33f"
    blob.parent.mkdir(exist_ok=True)
    shutil.move(folder / file, blob)
    (folder / file).symlink_to(os.path.relpath(blob, folder))
    load(folder)
    other = tmp_path / "models--org--other" / "blobs" / "d34db33f"  # another repository's
    shutil.move(blob, _parent(other))
    (folder / file).unlink()
    (folder / file).symlink_to(other)
    with pytest.raises(ValueError, match="is not followed"):
        load(folder)


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("bad", ["..", "../other", "a/../../other", "/etc", "", ".", "a*", "[ab]", "a\\b", "c:x"])
def test_subfolders_that_lead_out(tmp_path: Path, bad: str) -> None:
    saelens.case(tmp_path / "other")
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="subfolder: expected a folder inside the checkpoint"):
        load(tmp_path / "root", subfolder=bad)


def test_subfolders(tmp_path: Path) -> None:
    saelens.case(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not followed"):
        load(root, subfolder="link")
    saelens.case(_parent(root / "a" / "b"))
    assert load(root, subfolder="a/b/").d_sae == F
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(root, subfolder="c")
    with pytest.raises(TypeError, match="subfolder: expected a str, got int"):
        load(root, subfolder=9)  # type: ignore[arg-type]


def test_names_in_settings_are_never_followed(tmp_path: Path) -> None:
    other = saelens.case(tmp_path / "other").path
    target = str(other / "sae_weights.safetensors")
    names = ("weights", "weights_path", "sae_path", "checkpoint", "from_pretrained_path", "dataset_path", "weight_map")
    settings = saelens.settings(**dict.fromkeys(names, target)) | {
        "metadata": {"hook_name": "blocks.1.hook_resid_post"}
    }
    state = {name: value + 1 for name, value in saelens.tensors().items()}
    folder = saelens.write(tmp_path / "sae", state, settings)
    index = {"weight_map": {"W_enc": "../other/sae_weights.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(folder).W_dec, state["W_dec"])


def test_several_files(tmp_path: Path) -> None:
    folder = saev.case(tmp_path / "sae").path.parent
    shutil.copy(folder / "sae.pt", folder / "other.pt")
    with pytest.raises(ValueError, match=r"expected one \.pt file, got 2 \(other\.pt, sae\.pt\)"):
        load(folder)
    load(folder / "other.pt")
    lens = saelens.case(tmp_path / "lens").path
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(lens / "sae_weights.safetensors", lens / name)
    load(lens)  # the name SAELens gives
    (lens / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected one \.safetensors file, got 2"):
        load(lens)
    with pytest.raises(ValueError, match="holds the features' sparsity, not an SAE"):
        load(lens / "sparsity.safetensors")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=r"pipe\.pt"):
        load(tmp_path / "pipe.pt")


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_missing_settings(tmp_path: Path, name: str) -> None:
    folder = FOLDERS[name][0](tmp_path / "layers.10")
    (folder / "cfg.json").rename(folder / "elsewhere.json")
    with pytest.raises((FileNotFoundError, ValueError), match=r"(cfg|config)\.json: no such file"):
        load(folder)


class Hub:
    """Stands for huggingface_hub: one repository, and what was asked for."""

    def __init__(self, cache: Path, files: Path) -> None:
        self.cache, self.files, self.calls = cache, files, 0

    def snapshot_download(
        self, repo_id: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        self.calls += 1
        self.revision = revision
        assert repo_id == "org/saes"
        snapshot = self.cache / "models--org--saes" / "snapshots" / "0123abc"
        self.fetched = []
        for file in sorted(self.files.rglob("*")):
            name = file.relative_to(self.files).as_posix()
            allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and allowed and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                self.fetched.append(name)
                blob = self.cache / "models--org--saes" / "blobs" / name.replace("/", "-")
                shutil.copy(file, _parent(blob))
                _parent(snapshot / name).unlink(missing_ok=True)
                (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    files = tmp_path / "on the hub"
    saelens.case(_parent(files / "layers" / "7"))
    saelens.case(files / "layers" / "8")
    saelens.case(files)
    for folder in (files, files / "layers" / "7"):
        for name in ("modeling.py", "weights.pkl", "n_log_feature_sparsity.pt", "README.md", "setup.sh", "x.bin"):
            (folder / name).write_text("x")
    made = Hub(tmp_path / "cache", files)
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = made.snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return made


def test_nothing_is_downloaded_unasked(hub: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"org/saes: no such file or folder \(nothing is downloaded\).*download=T"
    ):
        load("org/saes")
    assert hub.calls == 0


def test_one_folder_is_downloaded(hub: Hub) -> None:
    sae = load("org/saes", download=True, revision="v1.0", subfolder="layers/7")
    assert hub.fetched == ["layers/7/cfg.json", "layers/7/sae_weights.safetensors"] and hub.revision == "v1.0"
    assert torch.equal(sae.W_dec, saelens.tensors()["W_dec"]) and sae.metadata["layer"] == "7"
    load("org/saes", download=True)
    assert hub.fetched == ["cfg.json", "sae_weights.safetensors"] and hub.revision is None
    shutil.move(hub.files / "layers", hub.files / "sparsity_7")  # a folder's name decides nothing
    load("org/saes", download=True, subfolder="sparsity_7/8")
    assert hub.fetched == ["sparsity_7/8/cfg.json", "sparsity_7/8/sae_weights.safetensors"]


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="in 'layers/9'; pass subfolder="):
        load("org/saes", download=True, subfolder="layers/9")
    with pytest.raises(ValueError, match="subfolder: expected a folder inside the checkpoint"):
        load("org/saes", download=True, subfolder="../secrets")
    assert hub.calls == 1


def test_a_local_folder_is_never_looked_up(hub: Hub) -> None:
    saelens.case(_parent(Path("org/saes")))
    load("org/saes", download=True)
    assert hub.calls == 0
    with pytest.raises(ValueError, match="revision: belongs to a hub repository"):
        load("org/saes", revision="main")


@pytest.mark.parametrize(
    "name", ["saes", "/org/saes", "org/saes/layers", "../org", "org/..", "org//saes", "~/saes", "a b/c"]
)
def test_names_that_are_no_repositories(hub: Hub, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(name, download=True)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(Path("org/saes"), download=True)  # a Path is a place on this machine
    assert hub.calls == 0


def test_without_huggingface_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="download=True needs huggingface_hub: pip install huggingface_hub"):
        load("org/saes", download=True)


def test_the_real_function_takes_these_arguments() -> None:
    import inspect

    real = pytest.importorskip("huggingface_hub")
    accepted: Any = inspect.signature(real.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns", "ignore_patterns"} <= set(accepted)
