#!/usr/bin/env python3
"""How much colours vary within the grounds of a content, in transfers that evaluate.py made: patches of a second colour count there.

    python3 grounds.py NAME ...        # names of work/evaluation; the mean of each one's pairs at 256 px, the median and the worst

Pictures are taken in Lab and blurred (contents by a Gaussian of 3 pixels, results of 4). A place belongs to a ground as far as the content
deviates little within the 33 x 33 pixels around it, `exp(-(d / 4)^2)`. Counted is the deviation of a result's a and b within such a window,
over 5, a mean over places by how far they belong to a ground. What a style has of texture and of gradients in a ground counts as well, so
figures compare for the same pairs alone.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
WINDOW, FLAT, UNIT = 33, 4.0, 5.0
# From linear sRGB to XYZ, relative to the white of D65.
XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(path):
    srgb = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255
    linear = np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    xyz = linear @ XYZ.T / WHITE
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def filtered(picture, kernel):
    """Along both sides, the picture mirrored at its borders."""
    for axis in (0, 1):
        radius = len(kernel) // 2
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(picture, padding, mode="symmetric")
        picture = sum(weight * np.take(padded, range(i, i + picture.shape[axis]), axis) for i, weight in enumerate(kernel))
    return picture


def blurred(picture, sigma):
    offsets = np.arange(-4 * sigma, 4 * sigma + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    return filtered(picture, kernel / kernel.sum())


def deviation(picture):
    """Within the window around each place, of all channels together."""
    kernel = np.full(WINDOW, 1 / WINDOW)
    mean = filtered(picture, kernel)
    variance = filtered(picture**2, kernel) - mean**2
    return np.sqrt(variance.clip(0).sum(axis=-1))


def within_grounds(content, result):
    ground = np.exp(-((deviation(blurred(lab(content), 3)) / FLAT) ** 2))
    colours = deviation(blurred(lab(result), 4)[..., 1:])
    return float((ground * colours).sum() / ground.sum()) / UNIT


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    args = parser.parse_args()
    evaluation = args.work / "evaluation"
    for name in args.names:
        results = sorted((evaluation / name).glob("*_256__style_*_256.png"))
        if not results:
            raise SystemExit(f"no transfers at 256 px in {evaluation / name}: run evaluate.py first")
        inputs = evaluation / name / "inputs"  # of one's own pictures
        inputs = inputs if inputs.exists() else evaluation / "inputs"
        found = [within_grounds(inputs / f"{result.stem.split('_256__style_')[0]}_256.png", result) for result in results]
        print(f"{name}: {len(found)} pairs, mean {statistics.mean(found):.3f}, median {statistics.median(found):.3f}, worst {max(found):.3f}")


if __name__ == "__main__":
    main()
