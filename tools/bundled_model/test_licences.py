#!/usr/bin/env python3
"""python3 test_licences.py: what may be trained on. Wants nothing but Python."""

import struct
import tempfile
import types
import unittest
from pathlib import Path

from licences import Licences, permissive, unnamed

COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2015 Somebody
License: GPL-3+

Files: images/*
Copyright: 2015 Somebody
License: CC-BY-SA-4.0

Files: images/land/*
Copyright: Various
License: public-domain
 Taken from a collection of photographs.

Files: images/land/*-ann*
Copyright: 2016 Ann
License: CC-BY-SA-4.0

Files:
 images/land/mountain1*
 images/land/nasa*
Copyright: NASA
License: public-domain

Files: images/land/nobody.jpg
Copyright: Public Domain ???? by ????
License: CC0-1.0

Files: images/scene/bob.jpg
Copyright: 2017 Bob
  2018 Carol
License: CC-BY-4.0
"""


def terms_of(copyright_file, path, blanket="", file=()):
    with tempfile.TemporaryDirectory() as folder:
        path_of_it = Path(folder, "usr/share/doc/game/copyright")
        path_of_it.parent.mkdir(parents=True)
        path_of_it.write_text(copyright_file)
        source = types.SimpleNamespace(
            kind="debian", licence="copyright-file", group="photograph", author="", blanket=blanket, roots={"usr/share/game/": ""}, extensions=[], file=list(file)
        )
        return Licences(source, Path(folder)).of(f"usr/share/game/{path}")


class CopyrightFile(unittest.TestCase):
    def refused(self, path, why):
        self.assertIn(why, terms_of(COPYRIGHT, path).refused)

    def test_the_last_paragraph_that_matches_holds(self):
        terms = terms_of(COPYRIGHT, "images/land/nasa3.jpg")
        self.assertEqual((terms.licence, terms.author, terms.refused), ("public-domain", "NASA", ""))
        terms = terms_of(COPYRIGHT, "images/scene/bob.jpg")
        self.assertEqual((terms.licence, terms.author, terms.refused), ("CC-BY-4.0", "2017 Bob; 2018 Carol", ""))

    def test_a_later_pattern_that_is_too_wide_does_not_hide_copyleft(self):
        self.assertEqual(terms_of(COPYRIGHT, "images/land/mountain1.jpg").refused, "")
        self.refused("images/land/mountain10-ann.jpg", "CC-BY-SA-4.0")

    def test_only_an_exception_overrules(self):
        for earlier, later, passes in (
            ("images/*", "images/a*", True),
            ("*", "images/a*", True),
            ("images/ann/*", "images/a*", False),
            ("images/ann/b*", "*", False),
            ("images/ann/*.jpg", "images/ann/b*", False),
        ):
            for first in ("License: CC-BY-SA-4.0", "License:\n CC-BY-SA-4.0", "Comment: none", "License: Expat\nCopyright: unknown"):
                text = f"Files: {earlier}\nCopyright: Ann\n{first}\n\nFiles: {later}\nCopyright: 2015 Bob\nLicense: CC0-1.0\n"
                self.assertEqual(not terms_of(text, "images/ann/b.jpg", blanket="all by Bob").refused, passes, text)

    def test_copyleft_of_a_folder(self):
        self.refused("images/scene/other.jpg", "CC-BY-SA-4.0")

    def test_nobody_is_named(self):
        self.refused("images/land/beach.jpg", "nobody is named")
        self.refused("images/land/nobody.jpg", "nobody is named")

    def test_a_blanket_licence_is_not_trusted_unless_a_source_says_why(self):
        text = "Files: *\nCopyright: 2015 Somebody\nLicense: CC0-1.0\n"
        self.assertIn("blanket", terms_of(text, "images/a.jpg").refused)
        self.assertEqual(terms_of(text, "images/a.jpg", blanket="all drawn by the author").refused, "")


README = """\
These pictures are free.

sea.jpg, shore.jpg
Copyright: Ann
License: CC-BY 3.0
Source: cover.jpg
  inset.jpg

Files:
wood.jpg
far/dune.jpg
Copyright: Bob
License: CC-BY-SA 3.0

Files: twice.jpg
Copyright: Bob
License: CC-BY-SA 3.0

Files: twice.jpg
Copyright: Carol
License: CC0

Files: bare.jpg
Copyright: Carol

lake.jpg
License: CC0
"""


def qt_resources(name, content):
    """A binary Qt resource file with one file in one folder."""
    folder, file = Path(name).parts
    at, names = [], b""
    for part in (folder, file):
        at.append(len(names))
        names += struct.pack(">HI", len(part), 0) + part.encode("utf-16-be")
    nodes = [struct.pack(">IHII", 0, 2, 1, 1), struct.pack(">IHII", at[0], 2, 1, 2), struct.pack(">IHHHI", at[1], 0, 0, 0, 0)]
    tree = b"".join(nodes)
    payload = struct.pack(">I", len(content)) + content
    return struct.pack(">4sIIII", b"qres", 1, 20, 20 + len(tree), 20 + len(tree) + len(payload)) + tree + payload + names


def source_of(licence, file=(), author="", kind="npm"):
    return types.SimpleNamespace(kind=kind, licence=licence, group="photograph", author=author, blanket="", roots={}, extensions=[], file=list(file))


class Readme(unittest.TestCase):
    def of(self, path, **more):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "art/scenes").mkdir(parents=True)
            Path(folder, "art/scenes/README").write_text(README)
            return Licences(source_of("readme", **more), Path(folder)).of(path)

    def test_names_its_files(self):
        terms = self.of("art/scenes/shore.jpg")
        self.assertEqual((terms.licence, terms.author, terms.refused), ("CC-BY-3.0", "Ann", ""))
        self.assertIn("CC-BY-SA", self.of("art/scenes/wood.jpg").refused)
        self.assertIn("CC-BY-SA", self.of("art/scenes/far/dune.jpg").refused)

    def test_says_nothing_of_others(self):
        for path in ("art/scenes/hill.jpg", "art/sea.jpg", "art/scenes/cover.jpg", "art/scenes/inset.jpg", "art/scenes/bare.jpg"):
            self.assertIn("unknown", self.of(path).refused, path)

    def test_named_twice(self):
        self.assertIn("CC-BY-SA", self.of("art/scenes/twice.jpg").refused)

    def test_within_qt_resources(self):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "art.rcc").write_bytes(qt_resources("scenes/README", README.encode()))
            licences = Licences(source_of("readme"), Path(folder))
            self.assertEqual((licences.of("art.rcc/scenes/sea.jpg").author, licences.of("art.rcc/scenes/sea.jpg").refused), ("Ann", ""))
            self.assertIn("CC-BY-SA", licences.of("art.rcc/scenes/wood.jpg").refused)

    def test_without_an_author(self):
        self.assertIn("nobody is named", self.of("art/scenes/lake.jpg").refused)
        self.assertEqual(self.of("art/scenes/lake.jpg", file=[{"path": "*/lake.jpg", "author": "Carol"}]).refused, "")


class Files(unittest.TestCase):
    """What a source says of single files."""

    def of(self, path, *file, licence="listed", **more):
        return Licences(source_of(licence, file, **more), Path("nowhere")).of(path)

    def test_only_what_is_listed(self):
        listed = {"path": "*/a.jpg", "licence": "CC0-1.0", "author": "Ann", "title": "A", "group": "painting"}
        terms = self.of("art/a.jpg", listed)
        self.assertEqual((terms.licence, terms.author, terms.title, terms.group, terms.refused), ("CC0-1.0", "Ann", "A", "painting", ""))
        self.assertIn("unknown", self.of("art/b.jpg", listed).refused)

    def test_overrules_the_source(self):
        self.assertEqual(self.of("a.jpg", licence="CC0-1.0", author="Ann").refused, "")
        self.assertIn("GPL-3", self.of("a.jpg", {"path": "a.jpg", "licence": "GPL-3"}, licence="CC0-1.0", author="Ann").refused)
        self.assertIn("blurred", self.of("a.jpg", {"path": "a*", "exclude": "blurred"}, licence="CC0-1.0", author="Ann").refused)

    def test_a_licence_overrules_debian_copyright(self):
        text = "Files: *\nCopyright: 2015 Somebody\nLicense: CC0-1.0\n"
        said = {"path": "*/a.jpg", "licence": "CC-BY-4.0", "author": "Ann"}
        self.assertEqual(terms_of(text, "images/a.jpg", file=[said]).refused, "")
        self.assertIn("blanket", terms_of(text, "images/b.jpg", file=[said]).refused)

    def test_a_licence_does_not_bring_back_what_is_excluded(self):
        excluded, licensed = {"path": "a*", "exclude": "ours"}, {"path": "*.jpg", "licence": "CC0-1.0", "author": "Ann"}
        for entries in ((licensed, excluded), (excluded, licensed)):
            self.assertIn("excluded", self.of("a.jpg", *entries).refused)

    def test_a_folder_of_ones_own_needs_none(self):
        self.assertEqual(self.of("a.jpg", licence="", kind="folder").refused, "")


class Authors(unittest.TestCase):
    def test_named(self):
        for authors in ("2016 Ann", "Published Public Domain ???? by Para; 2018 Bob", "Unidentified artist", "NASA", "Anonymous"):
            self.assertFalse(unnamed(authors), authors)

    def test_unnamed(self):
        for authors in ("", "Various", "2015 Various authors", "(Public Domain)", "Public Domain ???? by ????", "(c) unknown", "N/A", "Various; Various"):
            self.assertTrue(unnamed(authors), authors)


class Expressions(unittest.TestCase):
    def test_permissive(self):
        for expression in ("public-domain", "CC0-1.0", "CC-BY-3.0", "Expat", "GPL-2+ or CC-BY-3.0", "Expat and CC0-1.0", "(MIT OR GPL-3.0)"):
            self.assertTrue(permissive(expression), expression)

    def test_not_permissive(self):
        mixed = "(MIT or GPL-3) and CC-BY-SA-4.0", "Expat or GPL-2, and CC-BY-SA-4.0", "(CC0-1.0 or GPL-2+) and CC-BY-NC-4.0", "MIT | GPL-2 and CC-BY-SA-4.0"
        for expression in ("", "CC-BY-SA-3.0", "CC-BY-NC-4.0", "GPL-2+", "CC-BY-3.0 and GPL-2+", "CC-BY-ND-4.0", "unknown", *mixed):
            self.assertFalse(permissive(expression), expression)


if __name__ == "__main__":
    unittest.main()
