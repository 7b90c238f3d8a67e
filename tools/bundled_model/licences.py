"""Under which terms a file of a package comes, and whether they are permissive enough to train on.

The rules are on the strict side: a picture whose terms leave a doubt that they can see is left out. One they do not see: whether those who are
named made it. A list of authors for many pictures passes, and so does a site that offers pictures; README.md says which those are.
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


def unnamed(authors):
    """Whether nobody is named whom the licence could be from. The unknown painter of a museum's picture is known to be one."""
    if re.search(r"\bby \?\?", authors):
        return True
    rest = re.sub(r"\(c\)|©|\b(copyright|published|public domain|various|unknown|none|n/a|authors?|by|and|\d{4})\b|\?\?+", "", authors, flags=re.IGNORECASE)
    return not re.search(r"\w", rest)


def permissive(expression):
    """Whether an SPDX or DEP-5 licence expression can be met with permissive licences alone."""
    words = re.split(r"\s+(and|or)\s+|\s*(\|)\s*", re.sub(r"[(),]", " ", expression.strip()), flags=re.IGNORECASE)
    licences = [PERMISSIVE.fullmatch(word.strip()) is not None for word in words[::3]]
    joints = {(a or b).lower().replace("|", "or") for a, b in zip(words[1::3], words[2::3])}
    # Of "either" alone one suffices; where both are mixed it hangs on brackets and commas, and all must pass.
    return any(licences) if joints == {"or"} else all(licences)


def spelled(licence):
    """One spelling for each of the commonest licences."""
    licence = re.sub(r"\b(public[ -]domain|PD)\b", "public domain", licence, flags=re.IGNORECASE)
    return re.sub(r"\bCC-?0(-1\.0)?(?![\w.-])", "CC0-1.0", licence)


@dataclasses.dataclass
class Said:
    """What a debian/copyright says of the files of one pattern."""

    pattern: str
    regex: re.Pattern
    licence: str
    authors: str

    def passes(self):
        return permissive(self.licence) and not unnamed(self.authors)


def dep5(text):
    """What a machine-readable debian/copyright says, in order."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r", "")):
        fields = {}
        for m in re.finditer(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t]+.*)*)", block, re.MULTILINE):
            fields[m[1].lower()] = m[2]
        if "files" in fields:
            licence = fields.get("license", "").split("\n")[0].strip()
            authors = "; ".join(" ".join(line.split()) for line in fields.get("copyright", "").split("\n") if line.strip())
            for pattern in re.sub(r",(?=\s)", " ", fields["files"]).split():
                pattern = pattern.removeprefix("./")
                regex = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
                paragraphs.append(Said(pattern, re.compile(regex, re.DOTALL), licence, authors))
    return paragraphs


def readme_terms(text):
    """What a README in the manner of debian/copyright says: file name -> (licence, authors)."""
    terms = {}
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        fields = dict(re.findall(r"^(Copyright|License):[ \t]*(.+)$", block, re.MULTILINE))
        if "License" not in fields:
            continue
        licence = re.sub(r"^CC-BY (?=\d)", "CC-BY-", fields["License"].strip())
        # All but the list of files, with what is indented below it.
        listed = re.sub(r"^(?!Files?:)[A-Z]\w*:.*(?:\n[ \t]+.*)*", "", block, flags=re.MULTILINE)
        said = (licence, fields.get("Copyright", "").strip())
        for name in re.findall(r"[^\s,:]+\.\w{3,4}\b", listed):
            before = terms.get(name, said)
            # Named twice, it must pass both times.
            terms[name] = said if before == said else (f"{before[0]} and {licence}", f"{before[1]}; {said[1]}")
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
            self.paragraphs = dep5(text)
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
            said = [s for s in self.paragraphs if any(s.regex.fullmatch(n) for n in names)]
            if said:
                holds = said[-1]
                terms.licence, terms.author = holds.licence, holds.authors
                if holds.pattern == "*" and not self.source.blanket:
                    terms.refused = "only the blanket licence"
                # The last one that matches holds, by the format; but "mountain1*" is easily written for mountain1.jpg, and meets
                # mountain10-by-another.jpg, too, of which an earlier one says something else. Unless it is an exception from that one, it is in doubt.
                doubt = [s for s in said if not s.passes() and not s.regex.fullmatch(holds.pattern)]
                if holds.passes() and doubt:
                    terms.refused = f"licence {doubt[0].licence or 'unknown'} of {doubt[0].authors or 'nobody'}, by another pattern than the last"
        elif self.source.licence == "readme":
            for folder in Path(path).parents:
                said = self.readmes.get(folder.as_posix(), {}).get(Path(path).relative_to(folder).as_posix())
                if said:
                    terms.licence, terms.author = said
                    break
        elif self.source.licence != "listed":
            terms.licence = self.source.licence
        excluded = ""
        for entry in self.source.file:
            if fnmatch.fnmatchcase(path, entry["path"]):
                terms.licence = entry.get("licence", terms.licence)
                if "licence" in entry:
                    terms.refused = ""
                terms.author = entry.get("author", terms.author)
                terms.title = entry.get("title", terms.title)
                terms.group = entry.get("group", terms.group)
                if entry.get("exclude"):
                    excluded = "excluded: " + str(entry["exclude"])
        terms.refused = excluded or terms.refused
        if self.source.kind != "folder" and not terms.refused and not permissive(terms.licence):
            terms.refused = f"licence {terms.licence or 'unknown'}"
        if self.source.kind != "folder" and not terms.refused and unnamed(terms.author):
            terms.refused = "nobody is named as its author"
        return terms
