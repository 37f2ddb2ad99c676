"""Products of 8-bit floating-point numbers (e4m3) on GPUs that multiply them, by PyTorch's own kernel."""

from __future__ import annotations

import torch

LEAST_CAPABILITY = (8, 9)
"""Of CUDA devices that multiply them: Ada and Hopper, and what came later."""

LEAST_WEIGHTS = 1 << 22
"""Weights of a layer below which rounding its inputs takes longer than is gained: a round number, not measured."""

UNIT = 16
"""Of which the kernel wants both sides of a weight to be a multiple."""

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has such products. A CPU has them, too, but they take no less time than with what the codes
    stand for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def fits(rows: int, columns: int) -> bool:
    """Whether a weight of that shape is multiplied as codes."""
    return rows % UNIT == 0 and columns % UNIT == 0 and rows * columns >= LEAST_WEIGHTS


def product(inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """``inputs`` times the transpose of a weight, both in codes.

    Args:
        inputs: ``[M, K]`` in 16 bits; each row is rounded with a scale of its own, so that no row changes another.
        codes: float8 (e4m3) ``[N, K]``, contiguous.
        scales: float32 ``[N, 1]``, of the weight's rows; None: all are 1.

    Returns:
        ``[M, N]`` in the type of the inputs.
    """
    numbers = inputs.float()
    rows = numbers.abs().amax(dim=1, keepdim=True) / LARGEST
    rows = torch.where(rows > 0, rows, 1.0)
    rounded = (numbers / rows).clamp(-LARGEST, LARGEST).to(codes.dtype)
    columns = rows.new_ones(1, len(codes)) if scales is None else scales.view(1, -1)
    # The kernel with a scale for each row writes bfloat16 only.
    found = torch._scaled_mm(rounded, codes.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)
    return found.to(inputs.dtype)
