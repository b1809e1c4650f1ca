"""Fourier transforms and what feeds on them."""

from __future__ import annotations

from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor


def dft(
    x: Tensor, length: Any = None, axis: Any = None, *, inverse: int = 0, onesided: int = 0, version: int
) -> Tensor:
    """DFT along an axis; the last axis holds real and imaginary parts, or the real alone."""
    axis = (1 if version < 20 else -2) if axis is None else axis[0] if isinstance(axis, list) else axis
    axis = axis % x.dim()
    count = length[0] if isinstance(length, list) else length
    if inverse and onesided:
        half = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0].to(_complex(x))
        total = count if count is not None else 2 * (half.shape[axis] - 1)
        return torch.fft.irfft(half, total, axis).unsqueeze(-1)
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else torch.complex(x[..., 0], x[..., 0] * 0)
    spectrum = torch.fft.ifft(signal, count, axis) if inverse else torch.fft.fft(signal, count, axis)
    if onesided:
        spectrum = spectrum.narrow(axis, 0, spectrum.shape[axis] // 2 + 1)
    return torch.view_as_real(spectrum)


def _complex(x: Tensor) -> Any:
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


def stft(
    x: Tensor, frame_step: Any, window: Tensor | None = None, frame_length: Any = None, *, onesided: int = 1
) -> Tensor:
    step = frame_step[0] if isinstance(frame_step, list) else frame_step
    length = frame_length[0] if isinstance(frame_length, list) else frame_length
    length = length if length is not None else window.shape[0]  # type: ignore[union-attr]
    if x.dim() == 3:
        x = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    frames = x.unfold(1, length, step)
    if window is not None:
        frames = frames * window
    spectrum = torch.fft.fft(frames, dim=-1)
    if onesided:
        spectrum = spectrum[..., : length // 2 + 1]
    return torch.view_as_real(spectrum)


def mel_weight_matrix(
    bins: Any, length: Any, rate: Any, lower: Any, upper: Any, *, output_datatype: int = 1, dtype: Any, device: Any
) -> Tensor:
    """MelWeightMatrix: triangles, evenly spaced in mel, over the bins of a spectrum."""
    bins, length, rate, lower, upper = (i[0] if isinstance(i, list) else i for i in (bins, length, rate, lower, upper))
    rows = length // 2 + 1
    # 2595 and 700 are the constants of the mel scale in ONNX's definition.
    limits = 2595 * torch.log10(1 + torch.tensor([lower, upper], dtype=torch.float32) / 700)
    mel = torch.arange(bins + 2, dtype=torch.float32) * (limits[1] - limits[0]) / (bins + 2) + limits[0]
    hertz = 700 * (torch.pow(10.0, mel / 2595) - 1)
    edges = torch.div((length + 1) * hertz, rate, rounding_mode="floor").to(torch.int64).tolist()
    matrix = torch.zeros(rows, bins)
    for i in range(bins):
        low, centre, high = edges[i : i + 3]
        if centre == low:
            matrix[centre, i] = 1
        else:
            for j in range(low, centre + 1):
                matrix[j, i] = (j - low) / (centre - low)
        if high > centre:
            for j in range(centre, high):
                matrix[j, i] = (high - j) / (high - centre)
    return matrix.to(dtype=dtype, device=device)
