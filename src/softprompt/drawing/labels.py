"""Where the labels of a figure go: rectangles are float [N, 4], left, bottom, right, top, in points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]

LABEL_SIZE = 8.0

BESIDE = 9.0
"""A label at most so many points from its mark needs no line to it."""


def place_labels(marks: Boxes, sizes: Boxes, taken: Boxes, frame: Boxes) -> Boxes:
    """A rectangle for each label, near its mark, inside ``frame``, over nothing else as far as there is room.

    Each label in turn takes the cheapest of its places, given where the others and the lines to them are; three rounds
    settle it.

    Args:
        marks: float ``[N, 2]``, x and y of each label's mark.
        sizes: float ``[N, 2]``, width and height of each label.
        taken: float ``[M, 4]``, marks and error bars.
        frame: float ``[4]``, the panel.
    """
    placed: dict[int, Boxes] = {}
    for _ in range(3):
        for key, (mark, size) in enumerate(zip(marks, sizes, strict=True)):
            obstacles = [taken]
            for other in placed.keys() - {key}:
                line = _leaders(placed[other][None], marks[other])[0]
                obstacles += [placed[other][None], around(line[~np.isnan(line[:, 0])], 2.0, 2.0)]
            full = np.vstack(obstacles)
            places = _places(mark, size)
            covered = _overlaps(places, full).sum(axis=1)
            outside = size.prod() - _overlaps(places, frame[None])[:, 0]
            steps = _leaders(places, mark)[:, :, None]
            inside = np.logical_and(steps > full[:, :2], steps < full[:, 2:]).all(axis=3)
            crossed = np.any(inside, axis=1).sum(axis=1)
            cost = gap(places, mark) + 2 * covered + 4 * outside + 12 * crossed
            placed[key] = places[cost.argmin()]
    return np.array([placed[key] for key in range(len(marks))])


def _places(mark: Boxes, size: Boxes) -> Boxes:
    """Rectangles around a mark, the nearest and rightmost first."""
    middles = []
    for radius in (7.0, 11.0, 16.0, 22.0, 30.0, 40.0, 52.0, 66.0, 82.0, 100.0):
        for degrees in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240, 15, 345, 165, 195, 45, 315, 135, 225):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            beside = size[0] / 2 if across > 0.1 else -size[0] / 2 if across < -0.1 else 0.0
            middles.append((mark[0] + across * radius + beside, mark[1] + up * (radius + size[1] / 2)))
    return around(np.array(middles), *size)


def around(middles: Boxes, width: float, height: float) -> Boxes:
    half = np.array([width, height]) / 2
    return np.hstack([middles - half, middles + half])


def _overlaps(some: Boxes, others: Boxes) -> Boxes:
    """float ``[N, M]``: the area that two rectangles both cover."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    area: Boxes = np.clip(high - low, 0, None).prod(axis=-1)
    return area


def gap(boxes: Boxes, mark: Boxes) -> Boxes:
    """float ``[N]``: from a mark to the nearest place of each rectangle."""
    length: Boxes = np.linalg.norm(np.clip(mark, boxes[:, :2], boxes[:, 2:]) - mark, axis=-1)
    return length


def _leaders(boxes: Boxes, mark: Boxes) -> Boxes:
    """float ``[N, 10, 2]``: places along the line from a mark's edge to each rectangle; NaN where there is no line."""
    ends = np.clip(mark, boxes[:, :2], boxes[:, 2:])
    length = gap(boxes, mark)[:, None, None]
    shares = np.linspace(0, 1, 10)[None, :, None]
    start = mark + (ends[:, None] - mark) * np.minimum(7.0 / np.maximum(length, 1e-9), 1.0)
    points: Boxes = start + (ends[:, None] - start) * shares * 0.95  # short of the label itself
    return np.where(length > BESIDE, points, np.nan)


@cache
def text_size(text: str, bold: bool) -> tuple[float, float]:
    """Width and height of a label in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", size=LABEL_SIZE, weight="bold" if bold else "normal")
    return TextPath((0, 0), text, prop=font).get_extents().width + 3, LABEL_SIZE + 2


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights, moved as little as possible (least squares) to be ``gap`` apart and from ``low`` to ``high``.

    This is isotonic regression with bounds; too many heights for the bounds go above ``high``.
    """
    blocks: list[tuple[float, int]] = []  # (mean, size)
    for i, height in enumerate(heights):
        mean, size = height - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    ceiling = high - (len(means) - 1) * gap
    return [max(min(mean, ceiling), low) + i * gap for i, mean in enumerate(means)]
