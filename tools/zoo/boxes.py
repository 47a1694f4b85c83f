"""Boxes out of a text-probability map (the DB method) and their match with the true ones."""

from __future__ import annotations

import numpy as np

_THRESHOLD = 0.3
_BOX_THRESHOLD = 0.5
_UNCLIP = 1.6
_LEAST_SIDE = 3


def find_boxes(probability: np.ndarray) -> np.ndarray:
    """Rows of left, top, right, bottom, with the OCR package's own thresholds.

    The package offsets each turned rectangle outwards by area * 1.6 / perimeter and takes the least
    rectangle around the result: that is the same rectangle with its sides longer by twice the offset.
    """
    import cv2

    mask = cv2.dilate((probability > _THRESHOLD).astype(np.uint8), np.ones((2, 2), np.uint8))
    contours, _ = cv2.findContours(mask * 255, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for contour in contours[:1000]:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _LEAST_SIDE:
            continue
        corners = cv2.boxPoints((centre, (width, height), angle))
        if _mean_inside(probability, corners) < _BOX_THRESHOLD:
            continue
        offset = width * height * _UNCLIP / (2 * (width + height))
        corners = cv2.boxPoints((centre, (width + 2 * offset, height + 2 * offset), angle))
        boxes.append(np.concatenate((corners.min(0), corners.max(0))))
    tall, wide = probability.shape
    return np.clip(np.array(boxes).reshape(-1, 4), 0, [wide, tall, wide, tall])


def _mean_inside(probability: np.ndarray, corners: np.ndarray) -> float:
    import cv2

    tall, wide = probability.shape
    left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, [wide - 1, tall - 1])
    right, bottom = np.clip(np.ceil(corners.max(0)).astype(int), 0, [wide - 1, tall - 1])
    mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    cv2.fillPoly(mask, [(corners - [left, top]).astype(np.int32)], 1)
    return float(cv2.mean(np.ascontiguousarray(probability[top : bottom + 1, left : right + 1]), mask)[0])


def match(found: np.ndarray, truth: np.ndarray, least: float = 0.5) -> int:
    """How many true boxes have a partner of their own with an overlap (IoU) of at least `least`."""
    if not len(found) or not len(truth):
        return 0
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (found, truth)]
    overlap = shared / (areas[0][:, None] + areas[1][None] - shared)
    count = 0
    while overlap.max() >= least:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        count += 1
    return count
