"""Under which terms a file of a package comes, and whether they are permissive enough to train on.

The rules are on the strict side: a picture whose terms leave a doubt is left out.
"""

import dataclasses
import fnmatch
import gzip
import re
from pathlib import Path

from packages import Failure, rcc_members

PERMISSIVE = re.compile(
    r"(public[ -]domain|pd|cc-?0(-1\.0)?|cc-by(-\d(\.\d)?)?|expat|mit(-0)?|x11|bsd(-[234]-clause)?|0bsd|apache(-2(\.0)?)?|zlib|isc|unlicense)",
    re.IGNORECASE,
)


# Nobody whom the licence could be from.
UNNAMED = re.compile(r"\W*(|various|unknown|public domain)\W*|.*\?\?.*", re.IGNORECASE)


def permissive(expression):
    """Whether an SPDX or DEP-5 licence expression can be met with permissive licences alone."""
    expression = re.sub(r"[(),]", " ", expression.strip())
    for choice in re.split(r"\s+(?:or|OR)\s+|\s*\|\s*", expression):
        parts = [p.strip() for p in re.split(r"\s+(?:and|AND)\s+", choice)]
        if parts and all(PERMISSIVE.fullmatch(p) for p in parts):
            return True
    return False


def spelled(licence):
    """One spelling for each of the commonest licences."""
    licence = re.sub(r"\b(public[ -]domain|PD)\b", "public domain", licence, flags=re.IGNORECASE)
    return re.sub(r"\bCC-?0(-1\.0)?(?![\w.-])", "CC0-1.0", licence)


def dep5(text):
    """The (patterns, licence, authors) of a machine-readable debian/copyright, in order."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r", "")):
        fields = {}
        for m in re.finditer(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", block, re.MULTILINE):
            fields[m[1].lower()] = m[2]
        if "files" in fields and "license" in fields:
            licence = fields["license"].split("\n")[0].strip()
            authors = "; ".join(" ".join(line.split()) for line in fields.get("copyright", "").split("\n") if line.strip())
            paragraphs.append((re.sub(r",(?=\s)", " ", fields["files"]).split(), licence, authors))
    return paragraphs


def dep5_regex(patterns):
    """One regular expression for the patterns of a paragraph that are not just `*`."""
    alternatives = []
    for pattern in patterns:
        if pattern not in ("*", "./*"):
            alternatives.append("".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern.removeprefix("./")))
    return re.compile("|".join(alternatives) or r"(?!)", re.DOTALL)


def readme_terms(text):
    """What a README in the manner of debian/copyright says: file name -> (licence, authors)."""
    terms = {}
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        fields = dict(re.findall(r"^(Copyright|License):[ \t]*(.+)$", block, re.MULTILINE))
        if "License" not in fields:
            continue
        licence = re.sub(r"^CC-BY (?=\d)", "CC-BY-", fields["License"].strip())
        listed = re.sub(r"^(Copyright|License|Source|Comments?):.*$", "", block, flags=re.MULTILINE)
        for name in re.findall(r"[^\s,:]+\.\w{3,4}\b", listed):
            terms[name] = (licence, fields.get("Copyright", "").strip())
    return terms


@dataclasses.dataclass
class Terms:
    licence: str = ""
    author: str = ""
    title: str = ""
    group: str = ""
    refused: str = ""


class Licences:
    """Says under which terms a file of an unpacked source comes."""

    def __init__(self, source, folder):
        self.source = source
        self.paragraphs = []
        self.readmes = {}  # folder -> what its README says
        if source.licence == "copyright-file":
            text = None
            for f in (folder / "debian/copyright", *sorted(folder.glob("usr/share/doc/*/copyright*")), *sorted(folder.glob("*/debian/copyright"))):
                if f.is_file():
                    data = f.read_bytes()
                    text = (gzip.decompress(data) if f.suffix == ".gz" else data).decode("utf-8", "replace")
                    break
            if text is None:
                raise Failure("no debian/copyright in the package")
            self.paragraphs = [
                ("*" in p or "./*" in p, dep5_regex(p), dep5_regex([f for f in p if not f.endswith("/*")]), licence, authors) for p, licence, authors in dep5(text)
            ]
            if not self.paragraphs:
                raise Failure("debian/copyright is not machine-readable")
        if source.licence == "readme":
            for file in folder.rglob("*"):
                path = file.relative_to(folder).as_posix()
                if file.name == "README" and file.is_file():
                    self.readmes[Path(path).parent.as_posix()] = readme_terms(file.read_text(errors="replace"))
                elif file.suffix == ".rcc":
                    for member, data in rcc_members(file.read_bytes()):
                        if member.endswith("/README"):
                            self.readmes[Path(f"{path}/{member}").parent.as_posix()] = readme_terms(data.decode("utf-8", "replace"))

    def of(self, path):
        terms = Terms(group=self.source.group, author=self.source.author)
        if self.source.licence == "copyright-file":
            name = path
            for prefix, replacement in self.source.roots.items():
                if path.startswith(prefix):
                    name = replacement + path[len(prefix) :]
                    break
            names = [name, *(str(Path(name).with_suffix(e)) for e in self.source.extensions)]
            other = ""
            for blanket, regex, by_file, licence, authors in self.paragraphs:
                named = any(regex.fullmatch(n) for n in names)
                if named or blanket:
                    terms.licence, terms.author = licence, authors
                    terms.refused = "" if named or self.source.blanket else "only the blanket licence"
                if not permissive(licence) and any(by_file.fullmatch(n) for n in names):
                    other = licence
            # The last one that matches holds, by the format; but "mountain1*" is easily written for mountain1.jpg, and meets mountain10-by-another.jpg,
            # too, of which an earlier paragraph says something else. One for a whole folder is meant to have exceptions.
            if other and not terms.refused:
                terms.refused = f"licence {other}, by one of the paragraphs that name it"
        elif self.source.licence == "readme":
            for folder in Path(path).parents:
                said = self.readmes.get(folder.as_posix(), {}).get(Path(path).relative_to(folder).as_posix())
                if said:
                    terms.licence, terms.author = said
                    break
        elif self.source.licence != "listed":
            terms.licence = self.source.licence
        for entry in self.source.file:
            if fnmatch.fnmatchcase(path, entry["path"]):
                terms.licence = entry.get("licence", terms.licence)
                if "licence" in entry:
                    terms.refused = ""
                terms.author = entry.get("author", terms.author)
                terms.title = entry.get("title", terms.title)
                terms.group = entry.get("group", terms.group)
                if entry.get("exclude"):
                    terms.refused = "excluded: " + str(entry["exclude"])
        if self.source.kind != "folder" and not terms.refused and not permissive(terms.licence):
            terms.refused = f"licence {terms.licence or 'unknown'}"
        if self.source.kind != "folder" and not terms.refused and UNNAMED.fullmatch(terms.author):
            terms.refused = "nobody is named as its author"
        return terms
