"""Frozen linear layers in few bits, by plain PyTorch.

A CPU computes their products in three ways, equal but for rounding. With many rows, the codes are made numbers for one
product, and scales that belong to whole rows multiply what comes out of it. With few rows that would take most of the
time, so kernels of PyTorch read ``int8`` as it is, and ``int4`` from a copy in their own order, which
``PackedWeights`` has made while text is written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from softprompt.model.fast import fp8

GROUP = 64
"""Neighbouring weights of a row that share a scale and an offset in ``int4``."""

FEW_ROWS = {"int8": 8, "int4": 16}
"""Rows up to which the kernels that read codes are the faster ones, on one CPU core."""

BLOCK = 32
"""Neighbouring weights of a row that share a scale in a GGUF file; in ``Q2_K``, ``Q3_K`` and ``Q6_K`` it is half of it.
"""

FIRST = 8
"""Numbers of a block that mostly have no common divisor beyond its step."""

CODED_AT_ONCE = 1 << 20
"""Weights that are quantised at once, so that what is held meanwhile stays small, and near the processor."""


class CodedLinear(nn.Module):
    """A frozen linear layer in ``int8``, ``int4`` or ``fp8``: what it computes is the product with the weight that its
    codes stand for, and so is the gradient in its inputs. Where the device multiplies fp8, large ``fp8`` layers of a
    model in 16 bits multiply codes, with each row of their inputs rounded to fp8 as well.

    ``int8`` and ``fp8`` (e4m3) have a scale for each row, the largest absolute value over the largest code; ``int4``
    a scale and an offset for each ``GROUP`` of neighbours in a row. All are rounded to the nearest.

    Attributes:
        codes: int8 or float8 ``[out, in]``, or uint8 ``[out, ceil(in / 64) · 32]`` with two codes in each.
        scales: float32 ``[out, 1]``, or bfloat16 ``[out, groups, 1]``.
        offsets: bfloat16 ``[out, groups, 1]``, of ``int4`` alone.
        bias: ``[out]``, or None.
        by_codes: whether codes of ``fp8`` are multiplied.
        packed: of ``int4`` the codes, and scales with offsets, in the order of PyTorch's kernel; None: not laid out.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, precision: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.precision = precision
        self._dtype = weight.dtype
        self.by_codes = precision == "fp8" and fp8.multiplies_fp8(weight.device) and fp8.fits(*weight.shape)
        self._turned: torch.Tensor | None = None
        rows = max(1, CODED_AT_ONCE // max(1, self.in_features))
        parts = [_coded(some.float(), precision) for some in torch.split(weight.detach(), rows)]
        codes, scales, *offsets = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        self.codes, self.scales = _frozen(codes), _frozen(scales)
        if offsets:
            self.offsets = _frozen(offsets[0])
        self.bias = None if bias is None else _frozen(bias.detach())
        self.packed: tuple[torch.Tensor, torch.Tensor] | None = None

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The codes as numbers, ``[out, in]``, or of ``int4`` ``[out, groups, 64]``; exact."""
        codes = self.codes
        if self.precision == "int8":
            return codes.to(dtype)
        if self.precision == "int4":
            return _of_pairs(codes).view(self.out_features, -1, GROUP).to(dtype)
        return (_of_e4m3(codes) if codes.device.type == "cpu" else codes).to(dtype)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes stand for, ``[out, in]``."""
        weight = self.numbers(dtype).mul_(self.scales.to(dtype))
        if self.precision != "int4":
            return weight
        return weight.add_(self.offsets.to(dtype)).view(self.out_features, -1)[:, : self.in_features]

    @property
    def weight(self) -> torch.Tensor:
        """``decoded``, in the type that its bias or its original weight has: some architectures ask for it."""
        return self.decoded(self._dtype if self.bias is None else self.bias.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[…, out]`` of ``[…, in]``."""
        product: torch.Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same without bias, and without a graph."""
        if self._multiplies_codes(inputs):
            return fp8.product(inputs.flatten(0, -2), self.codes, self.scales).view(*inputs.shape[:-1], -1)
        rows = inputs.numel() // self.in_features
        if inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16 and rows <= FEW_ROWS.get(self.precision, 0):
            flat = inputs.reshape(rows, self.in_features)
            found: torch.Tensor
            if self.precision == "int8" and self.in_features % GROUP == 0:  # of others, the kernel reads beyond the end
                found = torch._weight_int8pack_mm(flat, self.codes, self.scales.to(inputs.dtype).view(-1))
                return found.view(*inputs.shape[:-1], -1)
            if self.packed is not None:
                flat = nn.functional.pad(flat, (0, -self.in_features % GROUP))
                found = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed[0], GROUP, self.packed[1])
                return found.view(*inputs.shape[:-1], -1)
        if self._scales_behind(inputs.dtype):
            return nn.functional.linear(inputs, self.numbers(inputs.dtype)) * self.scales.to(inputs.dtype).view(-1)
        return nn.functional.linear(inputs, self.decoded(inputs.dtype))

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient in the inputs, from that in the product ``[…, out]``."""
        if self._multiplies_codes(gradient):
            # The scales belong to what is summed over here, so they go with the gradient.
            scaled = gradient.flatten(0, -2) * self.scales.view(1, -1)
            return fp8.product(scaled, self.turned(), None).view(*gradient.shape[:-1], -1).to(gradient.dtype)
        if self._scales_behind(gradient.dtype):
            gradient, weight = gradient * self.scales.to(gradient.dtype).view(-1), self.numbers(gradient.dtype)
        else:
            weight = self.decoded(gradient.dtype)
        return torch.matmul(gradient, weight)

    def _multiplies_codes(self, numbers: torch.Tensor) -> bool:
        return self.by_codes and numbers.dtype != torch.float32

    def turned(self) -> torch.Tensor:
        """The codes' transpose as the kernel takes it, made for the first gradient: another byte for each weight."""
        if self._turned is None or self._turned.device != self.codes.device:
            self._turned = self.codes.detach().t().contiguous()
        return self._turned

    def _scales_behind(self, dtype: torch.dtype) -> bool:
        """Whether scales may multiply what comes out of the product; in fp16, sums of codes can be too large."""
        return self.precision != "int4" and dtype != torch.float16

    def lay_out(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What ``packed`` is to be, half a byte a weight; None for what has no such kernel here."""
        if self.precision != "int4" or self.codes.device.type != "cpu":
            return None
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).view(self.out_features, -1).int()
        middle = self.offsets.float() + 8 * self.scales.float()  # the kernel counts codes from -8
        both = torch.cat([self.scales.float(), middle], dim=2).transpose(0, 1).contiguous()
        try:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), both.to(torch.bfloat16)
        except RuntimeError:  # a number of outputs that it does not take
            return None

    def extra_repr(self) -> str:
        """As torch shows a linear layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"


class BlockLinear(nn.Module):
    """A frozen linear layer in codes that a file holds: the blocks of GGUF (``Q8_0``, ``Q4_0``, ``Q4_1``), or groups of
    integer codes. It computes with the very numbers that the file stands for, rounded to the type of its inputs.

    Attributes:
        codes: int8 ``[out, groups · size]``, or uint8 ``[out, groups · size / 2]`` with two codes in each.
        scales: ``[out, groups, 1]``.
        offsets: likewise, what code 0 stands for; None if that is 0.
        order: ``[in]``, where the weight of each input lies among the codes; None: in the order of the inputs.
        bias: ``[out]``, or None.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        in_features: int,
        bias: torch.Tensor | None,
        order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = len(codes), in_features
        self.codes, self.scales = _frozen(codes), _frozen(scales)
        self.offsets = None if offsets is None else _frozen(offsets)
        self.order = None if order is None else _frozen(order.int())
        self.bias = None if bias is None else _frozen(bias.detach())

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> BlockLinear | None:
        """The layer of unpacked blocks of GGUF, whose scales are found again from the numbers.

        Args:
            weight: ``[out, in]``.
            bias: ``[out]``, or None.

        Returns:
            None if the numbers are not those of such blocks, bit for bit.
        """
        columns = weight.shape[1]
        if columns % BLOCK:
            return None
        rows = torch.split(weight.detach(), max(1, CODED_AT_ONCE // columns))
        kinds = [(_q4_0, BLOCK), (_q4_1, BLOCK), (_q8_0, BLOCK), (_steps, BLOCK), (_steps, BLOCK // 2)]
        for found, size in kinds:
            parts = list[tuple[torch.Tensor, ...]]()
            for some in rows:
                part = found(some.float().view(len(some), -1, size))
                if part is None:
                    break
                parts.append(part)
            if len(parts) == len(rows):
                whole = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
                codes, scales, *offsets = _in_fewest_bits(*whole) if found is _steps else whole
                layer = cls(codes, scales, offsets[0] if offsets else None, columns, bias).to(weight.device)
                if torch.equal(layer.decoded(torch.float32), weight.float()):
                    return layer
        return None

    @classmethod
    def grouped(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        size: int,
        bias: torch.Tensor | None,
        order: torch.Tensor | None = None,
    ) -> BlockLinear:
        """The layer of the weight ``(codes - zeros) · scales``, exact.

        Args:
            codes: uint8 ``[out, in]``.
            scales: ``[out, groups]``.
            zeros: likewise, uint8: the code that stands for 0.
            size: of a group; the last one may be smaller.
            bias: ``[out]``, or None.
            order: ``[in]``, where the weight of each input lies among the codes.
        """
        columns = codes.shape[1]
        codes = nn.functional.pad(codes, (0, size * scales.shape[1] - columns))
        zero = zeros.float()
        if int(codes.max()) > 15 or codes.shape[1] % 2:
            codes, zero = (codes ^ 128).view(torch.int8), zero - 128
        else:
            codes = _paired(codes)
        offsets = (zero * scales.float()).neg_()
        return cls(codes, scales.unsqueeze(2), offsets.unsqueeze(2), columns, bias, order)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes stand for, ``[out, in]``."""
        codes = self.codes if self.codes.dtype == torch.int8 else _of_pairs(self.codes)
        numbers = codes.view(*self.scales.shape[:2], -1) * self.scales.float()
        if self.offsets is not None:
            numbers.add_(self.offsets.float())
        weight = numbers.view(self.out_features, -1)[:, : self.in_features]
        return (weight if self.order is None else weight.index_select(1, self.order)).to(dtype)

    @property
    def weight(self) -> torch.Tensor:
        """``decoded``, as exactly as it is stored: some architectures ask for it."""
        return self.decoded(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[…, out]`` of ``[…, in]``."""
        product: torch.Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same without bias, and without a graph."""
        return nn.functional.linear(inputs, self.decoded(inputs.dtype))

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient in the inputs, from that in the product ``[…, out]``."""
        return torch.matmul(gradient, self.decoded(gradient.dtype))


class _Product(torch.autograd.Function):
    """Autograd by itself would keep the decoded weight of every layer until the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: CodedLinear | BlockLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.backward(gradient), None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _coded(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, ...]:
    """Codes, scales and, of ``int4``, offsets of float32 ``[out, in]``."""
    if precision == "int4":
        return _four_bits(weight)
    largest = 127.0 if precision == "int8" else float(torch.finfo(torch.float8_e4m3fn).max)
    scales = weight.abs().amax(dim=1, keepdim=True) / largest
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (weight / scales).clamp_(-largest, largest)
    return codes.round_().to(torch.int8) if precision == "int8" else codes.to(torch.float8_e4m3fn), scales


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ``int4``; what is added to fill the last group repeats its last weight."""
    missing = -weight.shape[1] % GROUP
    filled = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1) if missing else weight
    groups = filled.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    offsets = low.to(torch.bfloat16)
    scales = ((high - offsets.float()) / 15).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups - offsets.float()).div_(scales.float()).round_().clamp_(0, 15).to(torch.uint8)
    codes = codes.view(len(weight), -1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales, offsets


def _q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Codes and scales of float32 ``[out, groups, 32]``: llama.cpp gives the largest number of a block code ±127."""
    scales = (blocks.abs().amax(dim=2, keepdim=True) / 127).half()
    codes = (blocks / _not_zero(scales)).round().clamp(-128, 127)
    same = torch.equal(codes * scales.float(), blocks)
    return (codes.to(torch.int8).view(len(blocks), -1), scales) if same else None


def _q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Codes, scales and offsets: it gives the number that is furthest from 0 code 0, which stands for -8."""
    furthest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    scales = (furthest / -8).half()
    codes = (blocks / _not_zero(scales) + 8).round().clamp(0, 15)
    offsets = scales.float() * -8
    same = torch.equal((codes - 8) * scales.float(), blocks) and torch.equal(offsets.half().float(), offsets)
    return (_paired(codes), scales, offsets.half()) if same else None


def _q4_1(blocks: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Codes, scales and offsets: it gives the smallest number code 0, and the largest 15."""
    low, high = blocks.amin(dim=2, keepdim=True), blocks.amax(dim=2, keepdim=True)
    scales, offsets = ((high - low) / 15).half(), low.half()
    codes = ((blocks - low) / _not_zero(scales)).round().clamp(0, 15)
    same = torch.equal(codes * scales.float() + offsets.float(), blocks)
    return (_paired(codes), scales, offsets) if same else None


def _steps(blocks: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Codes, scales and lowest numbers, of any blocks whose numbers go up by equal steps, at most 255. Scales of GGUF
    are whole multiples of 2⁻²⁴, the smallest number of float16, and so are all numbers then: steps are found exactly.
    """
    whole = blocks * 2**24
    if whole.abs().max() >= 2**30 or not torch.equal(whole.round(), whole):
        return None
    numbers = whole.to(torch.int32)
    low = numbers.amin(dim=2, keepdim=True)
    above = numbers - low
    step = _greatest_divisor(above[..., :FIRST])
    codes = (above / step).round_().to(torch.int32)
    uneven = (codes * step != above).any(dim=2).squeeze(-1)
    if uneven.any():
        step[uneven] = _greatest_divisor(above[uneven])
        codes[uneven] = above[uneven] // step[uneven]
    if codes.max() > 255:
        return None
    return codes.to(torch.uint8).flatten(1), step * 2**-24, low * 2**-24


def _greatest_divisor(numbers: torch.Tensor) -> torch.Tensor:
    """The greatest common divisor of numbers along the last dimension, a power of two of them; 1 where all are 0."""
    while numbers.shape[-1] > 1:
        numbers = torch.gcd(numbers[..., 0::2], numbers[..., 1::2])
    return numbers.clamp(min=1)


def _in_fewest_bits(codes: torch.Tensor, scales: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The codes of ``_steps`` as a layer keeps them, scales, and what code 0 stands for if that is not 0."""
    if codes.max() < 16:
        return _paired(codes), scales, low
    first = low / scales
    signed = codes.view(*scales.shape[:2], -1) + first
    if torch.equal(first.round(), first) and signed.min() >= -128 and signed.max() < 128:
        return signed.to(torch.int8).flatten(1), scales
    return codes.to(torch.int8), scales, low


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """float32 of scales, with 1 for 0: of a block of one number alone."""
    return torch.where(scales == 0, 1.0, scales.float())


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[out, n / 2]`` of 4-bit codes ``[out, …]``, two in each, the first in the low bits."""
    flat = codes.to(torch.uint8).flatten(1)
    return flat[:, 0::2] | flat[:, 1::2] << 4


def _of_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """bfloat16 of float8 e4m3; exact. The same bits, further left, are the number times 2⁻¹²⁰: PyTorch's own conversion
    on a CPU goes number by number, and takes fifteen times as long."""
    bits = codes.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(4).bitwise_and_(-0x7810).view(torch.bfloat16).mul_(2.0**120)


def _of_pairs(codes: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[out, 2 · n]`` of 4-bit codes, two in each of uint8 ``[out, n]``."""
    if codes.device.type != "cpu":
        return torch.stack([codes & 15, codes >> 4], dim=-1).view(len(codes), -1).to(torch.bfloat16)
    return _pairs().index_select(0, codes.view(-1).int()).view(torch.bfloat16).view(len(codes), -1)


@cache
def _pairs() -> torch.Tensor:
    """int32 ``[256]``: the two codes in a byte as the bits of two numbers in bfloat16."""
    both = torch.arange(256)
    return torch.stack([both & 15, both >> 4], dim=1).to(torch.bfloat16).view(torch.int32).flatten()
