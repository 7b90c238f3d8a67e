#!/usr/bin/env python3
"""python3 test_pictures.py: photographs that lie are known, and cut, upright. Wants numpy and Pillow, and is skipped without them."""

import importlib.util
import io
import tempfile
import unittest
from pathlib import Path
from unittest import mock

WANTED = all(map(importlib.util.find_spec, ("numpy", "PIL")))
if WANTED:
    import collect
    import heldout
    import numpy as np
    from PIL import Image

LYING = 6  # the EXIF tag of a photograph taken upright, whose pixels lie


def photograph(orientation=None):
    """JPEG of blobs, 400 x 300, with a tag that says how it lies."""
    blobs = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x112] = orientation
    data = io.BytesIO()
    Image.fromarray(blobs).resize((400, 300), Image.Resampling.BICUBIC).save(data, "JPEG", quality=95, exif=exif)
    return data.getvalue()


@unittest.skipUnless(WANTED, "numpy or Pillow is missing")
class HeldOut(unittest.TestCase):
    def setUp(self):
        kept = tempfile.TemporaryDirectory()
        self.addCleanup(kept.cleanup)
        self.folder = Path(kept.name)
        self.source = collect.Source("folder", "own", "1", "own", "photograph", any_name=True)
        here = mock.patch.object(collect, "HERE", self.folder)
        here.start()
        self.addCleanup(here.stop)

    def test_a_photograph_that_lies_is_known_however_it_is_saved(self):
        (self.folder / "upright.jpg").write_bytes(photograph(LYING))
        collect.hold_out([self.folder / "upright.jpg"])
        turned, _, _ = collect.open_picture(photograph(LYING), self.source)
        self.assertEqual(turned.size, (300, 400))
        other = turned.resize((240, 320))  # of another checksum, and turned already
        row = {"sha256": "another", "path": "other.jpg", "title": ""}
        reason = collect.HeldOut().holds(self.source, row, collect.difference_hash(other), collect.views(other))
        self.assertIn("upright", reason or "")

    def test_the_square_of_one_that_lies_is_cut_upright(self):
        lying, upright = (heldout.square(photograph(orientation), None) for orientation in (None, LYING))
        apart = np.asarray(upright, int) - np.asarray(lying.transpose(Image.Transpose.ROTATE_270), int)
        self.assertLessEqual(np.abs(apart).max(), 2)  # of roundings, as it is scaled along the other axis first


if __name__ == "__main__":
    unittest.main()
