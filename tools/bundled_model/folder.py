"""A folder of one's own pictures, taken in parts: what a run of collect.py that is killed has done stays, and no more than a part is in memory."""

import collections
import hashlib
import json
import os
from pathlib import Path

from packages import PICTURES, ZIPS

PART = 100
ARCHIVES = (*ZIPS, ".rcc", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")


def survey(folder):
    """The pictures, sorted by path; and how many other files there are, by the end of their names. Archives are not opened."""
    read, others = [], collections.Counter()

    def unread(error):
        others[f"folder that cannot be read: {os.path.relpath(error.filename, folder)!r}"] += 1

    for root, folders, files in os.walk(folder, onerror=unread):
        for file in (Path(root, name) for name in folders + files):
            if not utf8(file.name):
                others[f"whose name is not UTF-8: {str(file.relative_to(folder))!r}"] += 1
            elif file.is_symlink():
                others["links"] += 1
            elif file.name.lower().endswith(PICTURES) and file.is_file():
                read.append(file.relative_to(folder).as_posix())
            elif file.is_file():
                others[file.suffix.lower() or "without an ending"] += 1
        folders[:] = filter(utf8, folders)
    return sorted(read), others


def utf8(name):
    """Whether a name can be written to the manifest."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def parts(folder, files):
    """The files that can be read, part by part, each part with a checksum of its names and contents: pictures that are only touched or copied anew
    change nothing, and one that could not be read has its part done again once it can."""
    for start in range(0, len(files), PART):
        part = files[start : start + PART]
        named = [(file, checksum(folder / file)) for file in part]
        if readable := [file for file, found in named if found is not None]:
            yield readable, hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]


def checksum(file):
    found = hashlib.sha256()
    try:
        with file.open("rb") as f:
            while some := f.read(1 << 20):
                found.update(some)
    except OSError:
        return None
    return found.hexdigest()
