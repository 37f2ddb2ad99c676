"""What codes stand for, worked out from what is stored."""

from __future__ import annotations

from typing import Any

import torch


def dense(module: Any) -> torch.Tensor:
    """The weight of a quantised layer, worked out from what is stored."""
    if hasattr(module.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
        return found.float()
    if module.precision == "int4":
        rows, codes = module.out_features, module.codes.long()
        both = torch.empty(rows, 2 * codes.shape[1], dtype=torch.long)
        both[:, 0::2], both[:, 1::2] = codes % 16, codes // 16
        groups = both.reshape(rows, -1, 64).float()
        grouped: torch.Tensor = groups * module.scales.float() + module.offsets.float()
        return grouped.reshape(rows, -1)[:, : module.in_features]
    plain: torch.Tensor = module.codes.float() * module.scales
    return plain
