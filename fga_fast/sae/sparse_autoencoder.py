"""SparseAutoencoder: a frozen SAE of the residual stream, readable encode/decode, and the tensors the kernels read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.sae.checks import (
    DTYPES,
    GATED_NAMES,
    check_activations,
    check_expected_l0,
    check_finite,
    check_metadata,
    check_settings,
    check_tensor,
    check_threshold,
    check_weights,
)
from fga_fast.sae.folding import derived_tensors
from fga_fast.sae.formats import WRITERS, load, locate
from fga_fast.sae.formats.options import Options
from fga_fast.sae.normalise import denormalise, normalise
from fga_fast.sae.self_check import SelfCheck, self_check

_RAW = ("_W_enc_t", "W_dec", "b_enc", "b_dec", "threshold", *GATED_NAMES)
_ROUNDED = ("encoder", "limits")  # of the native kernel on CPUs, which makes them when it first needs them
_DERIVED = ("bias", "gate_scale", "mag_bias", "theta", "dec_sum")


class SparseAutoencoder(nn.Module):
    """A trained sparse autoencoder, frozen: it holds buffers only and never requires a gradient.

    With ``u = normalise(x)``, ``pre = u W_enc`` and ``z = pre + bias`` (b_dec is folded into bias) the codes are
      relu                 max(z, 0)
      topk                 the k largest z of the token (ties: the lowest feature index), then relu
      topk_signed          the k largest z of the token, whatever their sign
      jumprelu, batch_topk z where z > theta, else 0; then relu
      gated                1[z > 0] * relu(pre * gate_scale + mag_bias)

    Args:
        W_enc: [C, F] encoder, float16, bfloat16, float32 or float64.
        b_enc: [F] or None (zero). Kept but not used by "gated".
        W_dec: [F, C] decoder, one row a feature.
        b_dec: [C], subtracted before encoding and added after decoding.
        activation: "relu", "topk", "topk_signed", "batch_topk", "jumprelu" or "gated".
        k: features kept a token, 1 <= k <= F; both top-k need it, "batch_topk" keeps it for the record.
        threshold: a number or a tensor [] or [F]; "jumprelu" and "batch_topk" need it.
        normalize: None, "layer_norm" or "constant_norm", see `fga_fast.sae.normalise`.
        b_gate, r_mag, b_mag: [F] each, "gated" only.
        metadata: strings kept with the SAE and its file, such as {"layer": "9"}.
        expected_l0: mean number of active features a token, where it is known, 0 < expected_l0 <= F. On CUDA it chooses
            between the dense and the sparse score kernel, never what is computed. It may be assigned later.

    Attributes:
        W_enc: [C, F], a view; its memory is feature-major (``W_enc.t()`` is contiguous), which the kernels rely on.
        W_dec: [F, C] contiguous. b_enc, b_dec, threshold, b_gate, r_mag, b_mag: as given.
        bias: [F] = b_enc - b_dec W_enc (gated: b_gate - b_dec W_enc).
        gate_scale, mag_bias: [F] = exp(r_mag), b_mag - exp(r_mag) * (b_dec W_enc); None unless gated.
        theta: [F], the threshold of each feature; None unless jumprelu or batch_topk.
        dec_sum: [C], the sum of the decoder rows.
        encoder, limits: W_enc in 16-bit integers and how far it is from them, or None; the native kernel on CPUs makes
            them for float32 SAEs, half as large as W_enc again.
        activation, k, normalize, d_model (C), d_sae (F), metadata, expected_l0, dtype, device.

    The derived tensors are computed in float64 and rounded once, and are computed anew from the parameters when the
    dtype changes, so ``SparseAutoencoder(float32 weights).double()`` is exact. The tensors given are copied.

    Raises:
        TypeError: an argument of the wrong type or dtype, mixed dtypes.
        ValueError: wrong shapes, mixed devices, NaN or Inf, settings that do not fit the activation.

    Source: the conventions are those of ViT-Prisma and SAELens; "topk_signed" is saev's top-k.
    """

    _W_enc_t: Tensor  # [F, C]
    W_dec: Tensor  # [F, C]
    b_enc: Tensor | None  # [F]
    b_dec: Tensor  # [C]
    threshold: Tensor | None  # [] or [F]
    b_gate: Tensor | None  # [F]
    r_mag: Tensor | None  # [F]
    b_mag: Tensor | None  # [F]
    bias: Tensor  # [F]
    gate_scale: Tensor | None  # [F]
    mag_bias: Tensor | None  # [F]
    theta: Tensor | None  # [F]
    dec_sum: Tensor  # [C]
    encoder: Tensor | None  # [F / 16, C / 2, 16, 2] int16
    limits: Tensor | None  # [3, F]
    encoder_version: object  # of W_enc and of the setting that encoder and limits were made for; None: not yet

    def __init__(
        self,
        W_enc: Tensor,  # [C, F]
        b_enc: Tensor | None,  # [F]
        W_dec: Tensor,  # [F, C]
        b_dec: Tensor,  # [C]
        activation: str = "relu",
        k: int | None = None,
        threshold: float | Tensor | None = None,  # [] or [F]
        normalize: str | None = None,
        *,
        b_gate: Tensor | None = None,  # [F]
        r_mag: Tensor | None = None,  # [F]
        b_mag: Tensor | None = None,  # [F]
        metadata: Mapping[str, str] | None = None,
        expected_l0: float | None = None,
    ) -> None:
        super().__init__()
        check_settings(activation, k, threshold, normalize)
        self.d_model, self.d_sae = check_weights(W_enc, W_dec)
        self.activation, self.k, self.normalize = activation, k, normalize
        self.metadata = check_metadata(metadata)
        self.expected_l0 = check_expected_l0(expected_l0, self.d_sae)
        if k is not None and not 1 <= k <= self.d_sae:
            raise ValueError(f"k: expected 1 <= k <= {self.d_sae} (the SAE's features), got {k}")
        if normalize == "layer_norm" and self.d_model < 2:
            raise ValueError("normalize: 'layer_norm' needs a width of at least 2, got d_model=1")
        # A tensor made in inference mode cannot take part in autograd later, and the explanation needs autograd.
        with torch.inference_mode(False), torch.no_grad():
            per_feature = {"b_enc": b_enc, "b_gate": b_gate, "r_mag": r_mag, "b_mag": b_mag}
            self._check_raw(W_enc, W_dec, b_dec, per_feature)
            limits = check_threshold(threshold, self.d_sae, W_enc)
            raw = {"_W_enc_t": W_enc.t(), "W_dec": W_dec, "b_dec": b_dec, "threshold": limits, **per_feature}
            for name in _RAW:
                value = raw[name]
                copy = None if value is None else value.detach().clone(memory_format=torch.contiguous_format)
                self.register_buffer(name, copy)
            for name in (*_DERIVED, *_ROUNDED):
                self.register_buffer(name, None, persistent=False)
            self._derive()
        self.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]
        self.eval()

    def _check_raw(
        self,
        W_enc: Tensor,  # [C, F]
        W_dec: Tensor,  # [F, C]
        b_dec: Tensor,  # [C]
        per_feature: Mapping[str, Tensor | None],  # each [F]
    ) -> None:
        check_tensor("W_dec", W_dec, like=W_enc)
        check_tensor("b_dec", b_dec, (self.d_model,), like=W_enc)
        for name, value in per_feature.items():
            if name in GATED_NAMES and (value is None) == (self.activation == "gated"):
                need = "is needed by" if value is None else "belongs to"
                raise ValueError(f"{name}: {need} activation 'gated', got activation {self.activation!r}")
            if value is not None:
                check_tensor(name, value, (self.d_sae,), like=W_enc)

    @torch.no_grad()
    def _derive(self) -> None:
        """Check the parameters for NaN and Inf and compute the derived tensors from them."""
        self._forget_rounded()
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {self.dtype}")
        for name in _RAW:
            value = self._buffers[name]
            if value is not None:
                check_finite(name.removeprefix("_").removesuffix("_t"), value)
        derived = derived_tensors(
            self._W_enc_t, self.W_dec, self.b_dec, self.b_enc, self.threshold, self.b_gate, self.r_mag, self.b_mag
        )
        for name, value in derived.items():
            rounded = value.to(self.dtype, copy=True).contiguous()
            check_finite(f"{name} (derived from the parameters)", rounded)
            self._buffers[name] = rounded

    def _forget_rounded(self) -> None:
        self.encoder = self.limits = None
        self.encoder_version = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose count of writes begins anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers = dict(self._buffers)  # a shallow copy's are the original's
        self._forget_rounded()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAutoencoder:
        # Module.to(), .double(), .cuda() ... all end here. Casting up the rounded derived tensors would keep their
        # rounding, so they are derived anew; a cast that overflows leaves the SAE as it was.
        self._forget_rounded()  # other devices do not need it
        before, dtype = dict(self._buffers), self.dtype
        with torch.inference_mode(False):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if self.dtype != dtype:
                try:
                    self._derive()
                except (TypeError, ValueError):
                    self._buffers.update(before)
                    raise
        return self

    @property
    def W_enc(self) -> Tensor:
        """Encoder [C, F], a view of feature-major memory."""
        return self._W_enc_t.t()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every tensor of the SAE."""
        return self._W_enc_t.dtype

    @property
    def device(self) -> torch.device:
        """Device of every tensor of the SAE."""
        return self._W_enc_t.device

    def encode(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Codes of residual-stream tokens: the readable, dense definition that fast kernels are checked against.

        Args:
            x: [..., C], the SAE's dtype and device.

        Returns:
            [..., F], values >= 0 (any sign with "topk_signed"); NaN in ``x`` gives NaN, never a silent zero.

        Raises:
            TypeError, ValueError: wrong type, dtype, width or device of ``x``.
        """
        x = check_activations("x", x, self.d_model, self._W_enc_t)
        pre = normalise(x, self.normalize) @ self.W_enc  # [..., F]
        z = pre + self.bias
        if self.gate_scale is not None and self.mag_bias is not None:
            magnitude = torch.relu(pre * self.gate_scale + self.mag_bias)
            return torch.where(z <= 0, torch.zeros_like(magnitude), magnitude)
        if self.activation in ("topk", "topk_signed"):
            # A stable descending sort keeps equal values in index order; torch.topk leaves ties open.
            kept = z.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
            z = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))
            if self.activation == "topk_signed":
                return z
        elif self.theta is not None:
            z = torch.where(z <= self.theta, torch.zeros_like(z), z)
        return torch.relu(z)

    def decode(
        self,
        f: Tensor,  # [..., F]
        x: Tensor | None = None,  # [..., C]
    ) -> Tensor:
        """Reconstruction of residual-stream tokens from their codes.

        Args:
            f: [..., F] codes.
            x: [..., C], the tokens that were encoded; needed with ``normalize``, whose statistics are put back.

        Returns:
            [..., C], the scale of ``x``.

        Raises:
            TypeError, ValueError: wrong type, dtype, width or device; ``x`` missing with ``normalize``.
        """
        f = check_activations("f", f, self.d_sae, self._W_enc_t)
        y = f @ self.W_dec + self.b_dec
        if self.normalize is None:
            return y
        if x is None:
            raise ValueError(
                f"x: an SAE with normalize={self.normalize!r} needs the encoded tokens [..., {self.d_model}] to undo "
                "the normalisation: decode(f, x); got None"
            )
        return denormalise(y, check_activations("x", x, self.d_model, self._W_enc_t), self.normalize)

    def forward(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """Reconstruction [..., C] of ``x``: ``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)

    def self_check(
        self,
        x: Tensor,  # [..., C]
    ) -> SelfCheck:
        """Whether the SAE fits these activations: run it once after loading, on some images of the model's domain.

        Good numbers are those of the SAE's card. Without a card: an explained variance of 0.6 to 0.99, an l0 near the
        published or trained k (SAEs of vision models reach from tens to some 2,000), and few dead features once some
        10,000 tokens were seen. An explained variance near or below 0 says that the block, model or normalisation is
        not the one the SAE was trained on; so does an l0 many times too large or near 0.

        Args:
            x: [..., C], such as [T, C] or [B, P, C], residual stream after the SAE's block; at least two tokens that
                differ; the SAE's dtype and device.

        Returns:
            `SelfCheck`: explained_variance (at most 1), l0, dead (share of features no token activated), tokens.

        Raises:
            TypeError, ValueError: as `encode`; fewer than two tokens or no variance.
        """
        x = check_activations("x", x, self.d_model, self._W_enc_t)
        return self_check(self.encode, self.decode, x, self.d_sae)

    def save(self, path: str | os.PathLike[str], format: str = "fga_fast") -> Path:
        """Write the SAE; nothing half-written is left behind.

        Args:
            path: for "saev" a file, else a folder; its parent must exist. Files of an earlier save are replaced.
            format: "fga_fast" (`sae.safetensors` and `config.json`), "saelens" (`sae_weights.safetensors` and
                `cfg.json`) or "saev" (one file), see docs/sae_formats.md.

        Returns:
            The path.

        Raises:
            OSError: it cannot be written (FileNotFoundError: its parent is missing).
            TypeError, ValueError: an unknown format, an SAE that the format cannot express, or an ``expected_l0`` was
                assigned that the constructor refuses.
        """
        check_expected_l0(self.expected_l0, self.d_sae)  # which may have been assigned
        if format not in WRITERS:
            raise ValueError(f"format: expected one of {', '.join(map(repr, WRITERS))}, got {format!r}")
        return WRITERS[format](self, path)

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str],
        *,
        download: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        allow_pickled_config: bool = False,
        normalize: str | None = "as stored",
        activation: str | None = None,
        k: int | None = None,
        threshold: float | Tensor | None = None,  # [] or [F]
        decoder_norm: str | None = None,
        pre_mean: Tensor | Sequence[float] | None = None,  # [C]
        pre_scale: float | Tensor | None = None,  # [] or [C]
        subtract_b_dec: bool | None = None,
    ) -> SparseAutoencoder:
        """Read an SAE; its format is recognised, see docs/sae_formats.md. No code in a file is ever run.

        Scales and input statistics are folded into the weights, so that codes times decoder rows lie in the residual
        stream's own space. Follow it with `self_check` on a few activations.

        Args:
            path: a file or folder: the one `save` wrote, or one of ViT-Prisma, SAELens, saev, overcomplete, sparsify,
                visaebench or dictionary_learning. With ``download`` also a repository on the Hugging Face hub,
                "organisation/name".
            download: fetch ``path`` from the hub if it is not on this machine (needs huggingface_hub). Only weights
                and settings of one folder are fetched. Without it nothing is ever downloaded.
            revision: branch, tag or commit on the hub; a commit never changes.
            subfolder: the folder with the SAE inside ``path``.
            allow_pickled_config: read ViT-Prisma files that hold their configuration as a pickled object; the one
                configuration class becomes a plain record and every other object is refused.
            normalize: "as stored", or the normalisation of a ViT-Prisma file that does not say which one it needs.
            activation, k: overcomplete's state dicts do not say them: "relu", "topk" with k, or "batch_topk" with
                threshold. A file of dictionary_learning without settings needs activation "topk" or "batch_topk".
            threshold: the value from which codes are kept, where the file has none (overcomplete, visaebench, saev).
            decoder_norm: overcomplete's dictionary normalisation, where it was not the default "l2": "max_l2", "l1",
                "max_l1" or "identity".
            pre_mean, pre_scale: the SAE was trained on ``(x - pre_mean) / pre_scale``, which saev, SAELens, sparsify,
                overcomplete and visaebench keep outside their files.
            subtract_b_dec: saev: whether b_dec is subtracted before encoding; None: by the file's age.

        Raises:
            FileNotFoundError: the path, its weights or its configuration is missing, or a hub id without download.
            ImportError: ``download`` without huggingface_hub, or a ``config.yaml`` without PyYAML.
            ValueError: unknown, damaged, oversized or refused file, settings that cannot be used, an argument for what
                the file itself stores, or an SAE that cannot gate patches of the residual stream.
        """
        local = locate(path, download=download, revision=revision, subfolder=subfolder)
        options = Options(
            allow_pickled_config, normalize, activation, k, threshold, decoder_norm, pre_mean, pre_scale, subtract_b_dec
        )
        arguments, where = load(local, options)
        try:
            return SparseAutoencoder(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error

    def extra_repr(self) -> str:
        """Sizes and settings, for repr()."""
        names = ("d_model", "d_sae", "activation", "k", "expected_l0", "normalize", "dtype", "device", "metadata")
        shown = {name: getattr(self, name) for name in names} | {"device": str(self.device)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value not in (None, {}))


def _after_load_state_dict(module: nn.Module, _incompatible: Any) -> None:
    if isinstance(module, SparseAutoencoder):
        module._W_enc_t = module._W_enc_t.contiguous()
        module.W_dec = module.W_dec.contiguous()
        module._derive()
