#!/usr/bin/env python3
"""python3 test_folder.py: a folder of one's own pictures in parts. Wants nothing but Python."""

import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from folder import PART, parts, survey
from packages import picture_files


def refusing(call, name):
    """`call`, but not for paths of that name: permissions do not hold where tests run as a superuser."""

    def called(path, *more):
        if Path(path).name == name:
            raise PermissionError(13, "refused", str(path))
        return call(path, *more)

    return called


class Folder(unittest.TestCase):
    def setUp(self):
        kept = tempfile.TemporaryDirectory()
        self.addCleanup(kept.cleanup)
        self.folder = Path(kept.name)

    def write(self, *names):
        for name in names:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)

    def parts(self):
        return list(parts(self.folder, survey(self.folder)[0]))

    def test_what_is_read_and_what_is_not(self):
        self.write("b.JPG", "a/c.png", "a/d.heic", "e.HEIC", "README", "f.zip")
        (self.folder / "g.jpg").symlink_to("b.JPG")
        read, others = survey(self.folder)
        self.assertEqual(read, ["a/c.png", "b.JPG"])
        self.assertEqual(others, {".heic": 2, ".zip": 1, "without an ending": 1, "links": 1})
        self.assertEqual([path for path, _ in picture_files(self.folder, read)], ["a/c.png", "b.JPG"])

    def test_names_that_are_not_utf8_are_not_read_and_said(self):
        self.write("a.jpg", "b/c.jpg")
        try:
            (self.folder / os.fsdecode(b"d\xff.jpg")).write_text("d")
            (self.folder / "b").rename(self.folder / os.fsdecode(b"b\xff"))
        except OSError:
            self.skipTest("this file system refuses such names")
        read, others = survey(self.folder)
        self.assertEqual(read, ["a.jpg"])
        self.assertEqual(others, {f"whose name is not UTF-8: '{name}'": 1 for name in (r"d\udcff.jpg", r"b\udcff")})
        "".join(others).encode()

    def test_what_cannot_be_read_is_left_and_said(self):
        self.write("a.jpg", "b/c.jpg", "d.jpg")
        before = self.parts()
        with mock.patch("os.scandir", refusing(os.scandir, "b")):
            read, others = survey(self.folder)
        self.assertEqual((read, others), (["a.jpg", "d.jpg"], {"folder that cannot be read: 'b'": 1}))
        with mock.patch.object(Path, "open", refusing(Path.open, "a.jpg")):
            ((files, state),) = self.parts()
        self.assertEqual(files, ["b/c.jpg", "d.jpg"])
        self.assertNotEqual(state, before[0][1])
        self.assertEqual(self.parts(), before)

    def test_each_file_is_in_one_part(self):
        self.write(*(f"{i:03}.jpg" for i in range(2 * PART + 1)))
        found = [files for files, _ in self.parts()]
        self.assertEqual([len(files) for files in found], [PART, PART, 1])
        self.assertEqual(sum(found, []), survey(self.folder)[0])

    def test_a_part_is_known_by_names_and_contents(self):
        self.write("a.jpg", "b.jpg")
        before = self.parts()
        os.utime(self.folder / "a.jpg", (1, 1))
        self.assertEqual(self.parts(), before)
        (self.folder / "a.jpg").write_text("another")
        self.assertNotEqual(self.parts(), before)
        (self.folder / "a.jpg").write_text("a.jpg")
        self.assertEqual(self.parts(), before)
        (self.folder / "b.jpg").rename(self.folder / "c.jpg")
        self.assertNotEqual(self.parts(), before)


if __name__ == "__main__":
    unittest.main()
