"""The geometric median."""

import numpy as np


def geometric_median(x_Rxd: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """Returns the point (d,) with the least summed distance to the rows of x (rows, d).

    Weiszfeld's iteration starts from the mean. It ends when the point moves by less than
    `tolerance` times the mean distance of the rows from it, or after 100 iterations.
    """
    point = x_Rxd.mean(axis=0, dtype=np.float64).astype(np.float32)
    for _ in range(100):
        distance = np.linalg.norm(x_Rxd - point, axis=1)
        weights = 1 / np.maximum(distance, 1e-12 * max(float(distance.mean()), 1e-30))
        moved = (weights / weights.sum()) @ x_Rxd
        step = np.linalg.norm(moved - point)
        point = moved.astype(np.float32)
        if step <= tolerance * distance.mean():
            break
    return point
