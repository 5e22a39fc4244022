"""Files of every format that try to run code, exhaust memory, lie or are cut short: refused, and nothing runs."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats_dictionary_learning as dictionary_learning
import formats_overcomplete as overcomplete
import formats_saelens as saelens
import formats_saev as saev
import formats_sparsify as sparsify
import formats_visaebench as visaebench
import pytest
import torch
from formats import malicious, public_folder, rezip, state_dict
from formats_case import C, F, bounded_memory, refused
from safetensors.torch import load_file, save_file

from fga_fast.io.safetensors_file import MAX_HEADER_BYTES
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats.checkpoint import MAX_SETTINGS_BYTES
from fga_fast.sae.formats.yaml_config import MAX_YAML_BYTES, read_yaml

OPTIONS: dict[str, dict[str, Any]] = {"overcomplete": {"activation": "relu"}}


def weights_in(folder: Path) -> Path:
    return next(folder.glob("*.pt"))


def write_pickled(name: str, folder: Path, state: Any) -> Path:
    """``state`` in a folder of one of the formats that torch.save writes."""
    folder.mkdir(exist_ok=True)
    if name == "vit-prisma":
        return public_folder(folder, state)
    if name == "saev":
        return saev.write(folder / "sae.pt", state, saev.header(5)).parent
    if name == "overcomplete":
        return overcomplete.write(folder / "sae.pt", state).parent
    if name == "dictionary_learning":
        return dictionary_learning.write(folder, state, dictionary_learning.settings())
    return visaebench.write(folder / "sae.pt", state, visaebench.settings())


def state_of(name: str) -> dict[str, Any]:
    if name == "overcomplete":
        return overcomplete.encoder() | overcomplete.dictionary()[0]
    if name == "dictionary_learning":
        return dictionary_learning.tensors("AutoEncoder")
    return {"saev": saev.tensors, "visaebench": visaebench.tensors, "vit-prisma": state_dict}[name]()


PICKLED = ("saev", "overcomplete", "visaebench", "vit-prisma", "dictionary_learning")
STORED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "saelens": (lambda f: saelens.case(f).path, "sae_weights.safetensors"),
    "sparsify": (lambda f: sparsify.case(f).path, "sae.safetensors"),
    "visaebench": (lambda f: visaebench.own(f, "model.safetensors").path, "model.safetensors"),
    "overcomplete": (lambda f: overcomplete.case(f, name="model.safetensors").path.parent, "model.safetensors"),
}


def test_the_memory_bound_bites() -> None:
    with bounded_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(20_000_000_000, dtype=torch.uint8)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("place", ["tensor", "key", "wrapped", "whole file"])
@pytest.mark.parametrize("name", PICKLED)
def test_no_code_runs(tmp_path: Path, name: str, place: str, allow: bool) -> None:
    marker = tmp_path / "marker"
    for bad in malicious(marker):
        state: Any = state_of(name)
        if place == "tensor":
            state[next(iter(state))] = bad
        elif place == "key":
            state[bad] = torch.zeros(1)
        elif place == "wrapped":
            state = {"state_dict": state, "config": bad}
        else:
            state = bad
        path = write_pickled(name, tmp_path / "sae", state)
        with pytest.raises(ValueError, match=r"refused without running it: it refers to [\w.]+, which is not a tensor"):
            SparseAutoencoder.from_pretrained(path, allow_pickled_config=allow, **OPTIONS.get(name, {}))
        assert not marker.exists()


def test_those_files_are_armed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for bad in malicious(marker)[:3]:
        torch.save(saev.tensors() | {"b_dec": bad}, tmp_path / "sae.pt")
        torch.load(tmp_path / "sae.pt", weights_only=False)
        marker.unlink()


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(C, F), tmp_path / "sae.pt")
    refused(tmp_path / "sae.pt", "it refers to torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("name", PICKLED)
def test_truncated_pickled(tmp_path: Path, name: str) -> None:
    file = weights_in(write_pickled(name, tmp_path / "sae", state_of(name)))
    data = file.read_bytes()
    for keep in (0, 1, 30, len(data) // 2, len(data) - 5):
        file.write_bytes(data[:keep])
        refused(file, "truncated", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", PICKLED)
def test_flipped_bytes_never_do_more_than_fail(tmp_path: Path, name: str) -> None:
    file = weights_in(write_pickled(name, tmp_path / "sae", state_of(name)))
    data, generator, failures = file.read_bytes(), torch.Generator().manual_seed(1), 0
    for _ in range(100):
        at = int(torch.randint(len(data), (1,), generator=generator))
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            SparseAutoencoder.from_pretrained(file, **OPTIONS.get(name, {}))
        except ValueError:  # any other exception fails the test; a flipped weight may pass
            failures += 1
    assert failures > 0


@pytest.mark.parametrize("name", PICKLED)
def test_tensors_that_claim_more_than_is_stored(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    first = next(iter(state))
    state[first] = torch.zeros(1, dtype=torch.float64).expand(50_000, 50_000)
    path = write_pickled(name, tmp_path / "sae", state)
    refused(path, f"{first}: claims 20000000000 bytes, the file stores 8", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", PICKLED)
def test_storages_that_claim_more_than_is_stored(tmp_path: Path, name: str) -> None:
    file = weights_in(write_pickled(name, tmp_path / "sae", state_of(name)))
    data = file.read_bytes()
    start = data.index(b"PK\x03\x04")
    inner = tmp_path / "inner.zip"
    inner.write_bytes(data[start:])
    rezip(inner, lambda entry, content: content[:8] if "/data/" in entry else content)
    file.write_bytes(data[:start] + inner.read_bytes())
    refused(file, "damaged or refused by torch.load", **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(C, F, dtype=torch.int64), "W_enc: expected a dense floating-point tensor, got torch.int64"),
        ([[0.0] * F] * C, "W_enc: expected a dense floating-point tensor, got list"),
        (torch.zeros(C, F + 1, dtype=torch.float64), "W_enc: expected shape [6, 10] or [10, 6]"),
        (torch.zeros(C, F, 1, dtype=torch.float64), "W_enc: expected shape [6, 10] or [10, 6]"),
        (torch.zeros(C, F, dtype=torch.float32), "W_dec: expected dtype torch.float32 (that of W_enc)"),
        (torch.full((C, F), float("nan"), dtype=torch.float64), "W_enc: holds NaN or Inf (60 of 60 elements"),
        (torch.zeros(0, dtype=torch.float64), "W_enc: expected shape"),
    ],
)
def test_wrong_tensors(tmp_path: Path, value: Any, message: str) -> None:
    refused(write_pickled("saev", tmp_path, saev.tensors() | {"W_enc": value}), message)


@pytest.mark.parametrize("name", ["b_enc", "b_dec"])
def test_empty_biases(tmp_path: Path, name: str) -> None:
    head = saev.header(5)
    head["cfg"] = {"activation": head["cfg"]["activation"]}
    state = saev.tensors() | {name: torch.zeros(0).double()}
    refused(saev.write(tmp_path / "sae.pt", state, head), "W_enc: expected shape")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{" * (MAX_SETTINGS_BYTES + 10), "oversized header: expected one line of JSON of at most 1048576 bytes"),
        (b'{"schema": 5', "truncated header"),
        (b'{"schema": 5\n', "not valid JSON"),
        (b"{" * 100_000 + b"\n", "not valid JSON"),
        (b'{"a": ' * 100_000 + b"\n", "not valid JSON"),
        (b'{"schema": ' + b"9" * 100_000 + b"}\n", "not valid JSON"),
        (b'{"schema": NaN}\n', "not valid JSON"),
        (b'{"\xff": 1}\n', "not valid JSON"),
    ],
)
def test_saev_headers(tmp_path: Path, line: bytes, message: str) -> None:
    if b"\n" in line:
        path = saev.write(tmp_path / "sae.pt", saev.tensors(), line)
    else:
        path = tmp_path / "sae.pt"
        path.write_bytes(line)
    refused(path, message)


def test_bytes_before_an_archive(tmp_path: Path) -> None:
    """An archive's table is found from its end; what torch.load reads from the start must be that archive."""
    path = overcomplete.write(tmp_path / "sae.pt", state_of("overcomplete"))
    path.write_bytes(b"\x80\x02}q\x00." + path.read_bytes())
    refused(path, "not an archive of torch.save", activation="relu")
    path = saev.write(tmp_path / "saev.pt", saev.tensors(), json.dumps(saev.header(5)).encode() + b"\n\x80\x02}.")
    refused(path, "not an archive of torch.save")
    data = saev.write(tmp_path / "saev.pt", saev.tensors(), saev.header(5)).read_bytes()
    start = data.index(b"PK\x03\x04")
    path.write_bytes(data[:start] + b"PK\x03\x04" + data[start:])
    refused(path, "does not start where its table of contents says")


@pytest.mark.parametrize("name", STORED)
def test_safetensors_that_lie(tmp_path: Path, name: str) -> None:
    make, file_name = STORED[name]
    folder = make(tmp_path / "sae")
    weights, options = folder / file_name, OPTIONS.get(name, {})
    data = weights.read_bytes()
    for keep in (0, 7, 8, 60, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:keep])
        refused(folder, "truncated", **options)
    for length in (MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1):
        weights.write_bytes(struct.pack("<Q", length) + data[8:])
        refused(folder, f"a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}", **options)
    length = struct.unpack("<Q", data[:8])[0]
    damaged = "not a readable safetensors file"
    for change, message in [*((one, damaged) for one in HEADER_CHANGES), ({"dtype": "I64"}, "got torch.int64")]:
        header = json.loads(data[8 : 8 + length])
        header[min(n for n in header if n.endswith(("weight", "W_enc")))].update(change)
        new = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])
        refused(folder, message, **options)


HEADER_CHANGES: list[dict[str, Any]] = [
    *({"shape": shape} for shape in ([10**9, 10**9], [10**30], [-6, -10], [2] * 65, "6x10")),
    {"dtype": ["F64"]},
    {"data_offsets": [0, 10**12]},
]


@pytest.mark.parametrize("name", STORED)
def test_nan_in_safetensors(tmp_path: Path, name: str) -> None:
    make, file_name = STORED[name]
    folder = make(tmp_path / "sae")
    tensors = load_file(folder / file_name)
    for tensor in tensors:
        broken = {n: t.clone() for n, t in tensors.items()}
        broken[tensor].view(-1)[-1] = float("nan")
        save_file(broken, folder / file_name)
        refused(folder, "holds NaN or Inf", **OPTIONS.get(name, {}))


@pytest.mark.parametrize("value", [None, [], {}, "x", "", True, -1, 0, 1.5, 10**400, ["topk"], {"k": 3}])
def test_settings_of_any_type_are_read_or_refused(tmp_path: Path, value: Any) -> None:
    """ValueError or an SAE, for every setting of every format; any other exception fails the test."""
    outcomes = []
    for name, default in (
        ("saelens", saelens.settings()),
        ("sparsify", sparsify.settings()),
        ("visaebench", visaebench.settings()),
        ("dictionary_learning", dictionary_learning.settings()["trainer"]),
    ):
        known = {"k", "hook_name", "hook", "activation_fn", "activation_fn_kwargs", "hook_head_index", "normalize"}
        for setting in {*default, *known, "rescale_acts_by_decoder_norm", "tokens", "model", "metadata", "sae"}:
            config = default | {setting: value}
            folder = tmp_path / name
            if name == "saelens":
                saelens.write(folder, saelens.tensors(), config)
            elif name == "sparsify":
                sparsify.write(folder, sparsify.tensors(), config)
            elif name == "dictionary_learning":
                dictionary_learning.write(folder, dictionary_learning.tensors(), {"trainer": config})
            else:
                visaebench.write(folder / "sae.pt", visaebench.tensors(), config)
            outcomes.append(attempt(folder))
    for setting in ("schema", "cfg", "cls", "tokens"):
        outcomes.append(attempt(saev.write(tmp_path / "a.pt", saev.tensors(), saev.header(5) | {setting: value})))
        outcomes.append(attempt(saev.write(tmp_path / "a.pt", saev.tensors(), saev.header(1) | {setting: value})))
    for setting in ("cls", "params"):
        head = saev.header(5, "TopK")
        head["cfg"]["activation"][setting] = value
        outcomes.append(attempt(saev.write(tmp_path / "a.pt", saev.tensors(), head)))
    assert set(outcomes) == {True, False}


def attempt(path: Path) -> bool:
    try:
        SparseAutoencoder.from_pretrained(path)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold: !!python/object/apply:os.system ['touch marker']\n", "not valid YAML"),
        ("a: &a [1]\nb: &b [*a, *b]\nthreshold: *b\n", "threshold: expected one"),
        ("a: &a {b: 1}\nc:\n  <<: [*a, *a]\n", "not valid YAML"),
        ("threshold: [1, 2]\n", "threshold: expected one"),
        ("threshold:\n  nested: 1\n", "threshold: expected a number"),
        ("threshold: 2024-01-01\n", "threshold: expected one"),
        ("threshold: !!int ''\n", "not valid YAML"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("threshold: " + "[" * 10_000, "not valid YAML"),
        ("threshold\n", "expected settings by name, got str"),
        ("\x00", "not valid YAML"),
        ("", "threshold: expected one"),
        ("threshold: .inf\n", "threshold: holds NaN or Inf"),
        ("threshold: 1e999\n", "threshold: holds NaN or Inf"),
    ],
)
def test_yaml_is_plain_scalars(tmp_path: Path, text: str, message: str) -> None:
    refused(visaebench.write(tmp_path / "sae" / "model.safetensors", visaebench.tensors(), text), message)
    assert not Path("marker").exists()


def test_yaml_numbers_without_a_dot(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("threshold: 1e-3\nname: 1e-3x\n")
    assert read_yaml(path) == {"threshold": 0.001, "name": "1e-3x"}


def test_yaml_without_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml, or write the settings"):
        SparseAutoencoder.from_pretrained(visaebench.own(tmp_path / "sae", config=visaebench.YAML).path)


def test_yaml_of_a_wrong_size_or_encoding(tmp_path: Path) -> None:
    text = "#" * (MAX_YAML_BYTES + 1)
    folder = visaebench.write(tmp_path / "sae" / "model.safetensors", visaebench.tensors(), text)
    refused(folder, "expected a file of at most 16384 bytes, got 16385")
    (folder / "config.yaml").write_bytes(b"threshold: \xff\xfe\n")
    refused(folder, "not valid YAML")
