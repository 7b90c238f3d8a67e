#!/usr/bin/env python3
"""Collects the training pictures of the bundled model from freely licensed packages.

    python3 collect.py                   # every source of every sources_*.toml
    python3 collect.py NAME...           # only these, then the merge
    python3 collect.py --merge-only      # after a change to heldout.toml
    python3 collect.py --hold-out FILE.. # adds pictures to heldout.toml
    python3 collect.py --folder DIR --work other   # a folder of one's own in place of the sources
    python3 collect.py --merge-only --publish      # writes manifest.csv here, too: that of the weights that are shipped

Needs Pillow and numpy, and the clients of the registries: apt-get and dpkg (dpkg-dev for source packages), npm, pip.

Two steps, both without chance but for a seed:

1. *Per source*: download, unpack, keep the pictures whose licence and content pass, cut 288 x 288 tiles, and keep the result as
   work/candidates/NAME.npz. A source whose entry has not changed is not done again, so a run that was killed goes on where it stopped.
2. *Merge*: in the order of the files and of the entries in them, drop near-duplicates over all sources and everything that is held out,
   write work/tiles/NAME.npy (uint8, N x 288 x 288 x 3; the tiles of the manifest's rows of that source, in their order),
   a contact sheet work/sheets/NAME.png, and work/manifest.csv.

The keys of a source are those of the class Source below. Paths are inside the unpacked package; a member of a zip archive or of a Qt
resource file goes on after the archive's name: "usr/share/a/b.pk3/textures/c.png". Patterns are shell patterns whose * matches / too.
work/rejected/NAME.csv says for every picture that was left out why; work/excluded.csv does so for the merge.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import fnmatch
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from folder import ARCHIVES, parts, survey
from licences import Licences, permissive, spelled
from packages import PICTURES, Failure, download, picture_files, unpack

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
SIDE = 288
SEED = 5
RECIPE = 3  # count up when the filters, the rules on licences or the cutting change: every source is then done again

GROUPS = ("photograph", "painting", "texture", "drawing")
DETAILS_FROM = {"photograph": 2.0, "painting": 1.45, "texture": 2.0, "drawing": 1.45}  # strokes are what a painting has to teach
KINDS = ("debian", "debian-source", "npm", "pypi", "folder")

# Names of pictures that show no picture: data for a renderer, parts of a user interface, previews and screenshots.
NOT_A_PICTURE = re.compile(
    r"(^|[/_.\- ])(normals?|normalmap|norm|nrm|nm|nmap|n|spec|specular|s|gloss|glow|bump|height|heightmap|displacement|disp|local|"
    r"roughness|metal(lic|ness)|ao|mask|alpha|lum|add|blend|luma|lightmap|reflect|shirt|pants|mr|fonts?|icons?|cursors?|buttons?|"
    r"gui|ui|hud|minimap|levelshots?|screenshots?|thumbnails?|thumbs?|previews?|logos?|flags?|particles?|shadows?|halo)([/_.\- ]|\d*\.)",
    re.IGNORECASE,
)

Image.MAX_IMAGE_PIXELS = 400_000_000


# ---------------------------------------------------------------------------------------------------------------------- sources


@dataclasses.dataclass
class Source:
    """One `[[source]]` of a sources_*.toml."""

    kind: str
    name: str
    version: str
    licence: str  # an SPDX identifier, or "copyright-file": by debian/copyright, "readme": by a README beside the file, "listed": by `file`
    group: str
    evidence: str = ""  # where a licence of the whole source is stated
    id: str = ""  # name of the results, where one package gives several sources
    include: list = dataclasses.field(default_factory=lambda: ["*"])
    exclude: list = dataclasses.field(default_factory=list)  # one added later takes effect in the next merge
    file: list = dataclasses.field(default_factory=list)  # per-file licence, author, title, group, exclude
    roots: dict = dataclasses.field(default_factory=dict)  # installed prefix -> prefix in debian/copyright
    extensions: list = dataclasses.field(default_factory=list)  # that the files had before the package's build converted them
    blanket: str = ""  # why a `Files: *` paragraph may be trusted for the pictures
    author: str = ""
    dist: str = "wheel"  # PyPI: "wheel" or "sdist"
    crops: float = 1.0  # how many tiles of a large picture's details, relative to the default
    details_from: float = 0.0  # how many tile sides the short side must have for tiles of details; by default according to the group
    limit: int = 0  # at most this many pictures, chosen by the seed
    ground: str = ""  # a colour to put transparent pictures on
    min_side: int = 200
    any_name: bool = False  # do not judge by NOT_A_PICTURE
    folder: str = ""  # --folder's, not for an entry: where the pictures are, and which files of them this source is
    files: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.id = self.id or re.sub(r"[^A-Za-z0-9.+-]+", "-", self.name.lstrip("@"))
        if self.kind not in KINDS or self.group not in GROUPS:
            raise Failure(f"{self.id}: kind {self.kind!r} or group {self.group!r} is unknown")
        if self.kind != "folder" and self.licence not in ("copyright-file", "readme", "listed"):
            if not permissive(self.licence):
                raise Failure(f"{self.id}: licence {self.licence!r} is not a permissive one")
            if not self.evidence:
                raise Failure(f"{self.id}: a licence for the whole source needs its evidence")

    def key(self):
        """Changes when the results would."""
        default = Source(self.kind, self.name, self.version, "listed", self.group)
        said = {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(default, name)}
        # The merge heeds the first; what is in the files of a folder is in the version.
        for name in ("exclude", "folder", "files"):
            said.pop(name, None)
        text = json.dumps([RECIPE, SEED, SIDE, self.name, self.version, self.licence, self.group, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_sources():
    sources = []
    for path in sorted(HERE.glob("sources_*.toml")):
        with path.open("rb") as f:
            for entry in tomllib.load(f).get("source", []):
                try:
                    sources.append(Source(**entry))
                except TypeError as e:
                    raise Failure(f"{path.name}: {entry.get('name')}: {e}") from None
    seen = set()
    for s in sources:
        if s.id in seen:
            raise Failure(f"two sources are called {s.id!r}: give one an `id`")
        seen.add(s.id)
    return sources


# --------------------------------------------------------------------------------------------------------------------- pictures


def open_picture(data, source):
    """The picture as RGB and its size as stored, or a reason to leave it out."""
    picture = Image.open(io.BytesIO(data))
    size = picture.size
    if min(size) < source.min_side:
        return None, size, "small"
    if max(size) > 4 * min(size):
        return None, size, "long and narrow"
    if getattr(picture, "n_frames", 1) > 1 and picture.format in ("GIF", "WEBP"):
        return None, size, "animated"
    if picture.format == "JPEG" and min(size) > 8 * SIDE:
        picture.draft("RGB", (size[0] // 2, size[1] // 2))
    picture.load()
    if picture.mode in ("I", "I;16", "F"):
        return None, size, "not 8 bits"
    # Photographs taken upright are stored lying, with a tag. None of those collected from packages has one that turns it, so RECIPE stayed.
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("P", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        alpha = np.asarray(picture.getchannel("A"))
        see_through = float((alpha < 250).mean())
        if see_through > 0.02:
            if source.ground:
                ground = Image.new("RGBA", picture.size, source.ground)
                ground.alpha_composite(picture)
                picture = ground
            elif not (see_through > 0.9 and alpha.std() < 60 and alpha.mean() > 20):  # else: the gloss of a texture
                return None, size, "transparent"
    return picture.convert("RGB"), size, None


def dull(tile, source):
    """Why a tile has nothing to learn from, or None."""
    light = tile.astype(np.float32).mean(2)
    if light.std() < 9:
        return "flat"
    if (np.abs(np.diff(light, axis=0)).mean() + np.abs(np.diff(light, axis=1)).mean()) / 2 < 1.5:
        return "without detail"
    mean = tile.reshape(-1, 3).mean(0)
    if mean[2] > 200 and abs(mean[0] - 128) < 25 and abs(mean[1] - 128) < 25:
        return "normal map"
    bins = (tile >> 3).reshape(-1, 3).astype(np.int32)
    counts = np.bincount(bins[:, 0] * 1024 + bins[:, 1] * 32 + bins[:, 2])
    if counts.max() > (0.75 if source.ground else 0.5) * len(bins):
        return "mostly one colour"
    if (counts > 0).sum() < 25:
        return "few colours"
    return None


def cut(picture, rng, crops, details_from):
    """The tiles of a picture: all of it, and details of a large one at a finer scale."""
    short = min(picture.size)

    def at(scale):
        return picture.resize([max(SIDE, round(n * SIDE * scale / short)) for n in picture.size], Image.Resampling.LANCZOS)

    whole = at(1)
    slack = (whole.width - SIDE, whole.height - SIDE)
    ends = [0.5] if max(slack) < 0.45 * SIDE else [0.0, 1.0]
    tiles = [(whole, round(slack[0] * e), round(slack[1] * e)) for e in ends]
    for scale, least, most in ((min(2.0, short / SIDE), details_from, 2), (3.5, 3.5, 4)):
        if short >= least * SIDE:
            finer = at(scale)
            for _ in range(max(0, round(most * crops))):
                tiles.append((finer, int(rng.integers(finer.width - SIDE + 1)), int(rng.integers(finer.height - SIDE + 1))))
    return [np.asarray(p.crop((x, y, x + SIDE, y + SIDE))) for p, x, y in tiles]


def views(picture):
    """Grey 16 x 16 thumbnails of the whole picture and, of an oblong one, of squares at its ends and in its middle."""
    w, h = picture.size
    side = min(w, h)
    boxes = [(0, 0, w, h)]
    if max(w, h) > 1.15 * side:
        for e in (0.0, 0.5, 1.0):
            x, y = round((w - side) * e), round((h - side) * e)
            boxes.append((x, y, x + side, y + side))
    grey = picture.convert("L")
    return np.stack([np.asarray(grey.resize((16, 16), Image.Resampling.BOX, box=b)) for b in boxes])


def difference_hash(picture):
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def standardise(thumbnails):
    t = thumbnails.reshape(-1, 256).astype(np.float32)
    t = t - t.mean(1, keepdims=True)
    return t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-6)


def matches(globs, path):
    return any(fnmatch.fnmatchcase(path, g) for g in globs)


# ------------------------------------------------------------------------------------------------------------------ per source


def collect(source):
    """Fills work/candidates/ID.npz and work/rejected/ID.csv; True if there was something to do."""
    if collected(source):
        return False
    result = WORK / "candidates" / f"{source.id}.npz"
    mark = WORK / "candidates" / f"{source.id}.key"
    own = source.kind == "folder"
    folder = Path(source.folder) if own else WORK / "unpacked" / source.id
    archives = None if own else download(source, WORK / "downloads")
    try:
        if not own:
            unpack(source, archives, folder)
        licences = Licences(source, folder)
        rows, tiles, hashes, thumbnails, rejected, seen = [], [], [], [], [], set()
        for path, read in choose(source, folder, licences, rejected):
            terms = licences.of(path)
            try:
                data = read()
                sha = hashlib.sha256(data).hexdigest()
                if sha in seen:
                    rejected.append((path, "same file as another"))
                    continue
                seen.add(sha)
                picture, size, reason = open_picture(data, source)
            except Exception as e:  # Pillow raises all kinds for broken files
                if own and isinstance(e, OSError) and e.errno:  # the disk's and not Pillow's: it could be read a moment ago
                    raise Failure(f"{path}: {e.strerror}; the same command again looks at it anew") from None
                rejected.append((path, f"unreadable: {type(e).__name__}"))
                continue
            if picture is not None:
                rng = np.random.default_rng([SEED, int(sha[:8], 16)])
                found = cut(picture, rng, source.crops, source.details_from or DETAILS_FROM[terms.group])
                dullness = [dull(t, source) for t in found]
                found = [t for t, d in zip(found, dullness) if d is None]
                if not found:
                    reason = dullness[0]
            if reason:
                rejected.append((path, reason))
                continue
            tiles.append(np.stack(found))
            hashes.append(difference_hash(picture))
            thumbnails.append(views(picture))
            rows.append(
                {
                    "path": path,
                    "licence": terms.licence,
                    "author": terms.author,
                    "title": terms.title,
                    "width": size[0],
                    "height": size[1],
                    "sha256": sha,
                    "group": terms.group,
                }
            )
    finally:
        if not own:
            shutil.rmtree(folder, ignore_errors=True)
    with writing(WORK / "rejected" / f"{source.id}.csv") as part, part.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(sorted(rejected))
    empty = np.zeros((0, SIDE, SIDE, 3), np.uint8)
    with writing(result) as part, part.open("wb") as f:
        np.savez(
            f,
            rows=json.dumps(rows),
            counts=np.array([len(t) for t in tiles], np.int64),
            tiles=np.concatenate([empty, *tiles]),
            hashes=np.array(hashes, bool).reshape(-1, 64),
            views=np.concatenate([np.zeros((0, 16, 16), np.uint8), *thumbnails]),
            view_counts=np.array([len(t) for t in thumbnails], np.int64),
        )
    mark.write_text(source.key())
    print(f"{source.id}: {len(rows)} pictures, {sum(map(len, tiles))} tiles")
    if not own:
        left_out(rejected)
    sys.stdout.flush()
    return True


def left_out(rejected):
    """Says the commonest reasons."""
    for reason, n in collections.Counter(reason for _, reason in rejected).most_common(12):
        print(f"    left out {n:5}  {reason}")


def collected(source):
    """Whether its candidates are there, and of the rules and the entry as they are now."""
    result, mark = (WORK / "candidates" / f"{source.id}.{end}" for end in ("npz", "key"))
    return result.exists() and mark.exists() and mark.read_text() == source.key()


def choose(source, folder, licences, rejected):
    """The pictures that pass by name and licence; with a limit, as many of them as the limit says, chosen by the seed."""

    def passing():
        for path, read in picture_files(folder, source.files):
            if not matches(source.include, path) or matches(source.exclude, path):
                continue
            if not source.any_name and NOT_A_PICTURE.search(path):
                rejected.append((path, "by its name"))
                continue
            terms = licences.of(path)
            if terms.refused:
                rejected.append((path, terms.refused))
                continue
            yield path, read

    if not source.limit:
        yield from passing()
        return
    found = [path for path, _ in passing()]
    rejected.clear()
    rank = {p: hashlib.sha256(f"{SEED} {p}".encode()).digest() for p in found}
    chosen = set(sorted(found, key=rank.get)[: source.limit])
    for path, read in passing():
        if path in chosen:
            yield path, read
        else:
            rejected.append((path, "over the limit"))


@contextlib.contextmanager
def writing(path):
    """Writes to a neighbour of `path` that takes its place only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


# ------------------------------------------------------------------------------------------------------------------------ merge


class HeldOut:
    """The pictures of the evaluation, which must not be trained on."""

    def __init__(self):
        path = HERE / "heldout.toml"
        content = tomllib.loads(path.read_text()) if path.exists() else {}
        self.entries = content.get("picture", [])
        self.names = [re.compile(n, re.IGNORECASE) for n in content.get("names", [])]
        self.sha256 = {e["sha256"]: e["name"] for e in self.entries if "sha256" in e}
        self.paths = {(e["package"], e["path"]): e["name"] for e in self.entries if "package" in e}
        known = [e for e in self.entries if "views" in e]
        self.hashes = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(e["dhash"]), np.uint8)) for e in known], bool).reshape(-1, 64)
        self.hash_names = [e["name"] for e in known]
        shots = [np.frombuffer(bytes.fromhex(v), np.uint8).reshape(16, 16) for e in known for v in e["views"]]
        self.view_names = [e["name"] for e in known for _ in e["views"]]
        shots = np.array(shots, np.uint8).reshape(-1, 16, 16)
        self.views = np.concatenate([standardise(shots), standardise(shots[:, :, ::-1])])  # also mirrored
        self.view_names *= 2

    def holds(self, source, row, dhash, shots):
        if row["sha256"] in self.sha256:
            return f"held out: is {self.sha256[row['sha256']]}"
        if (source.name, row["path"]) in self.paths:
            return f"held out: is {self.paths[source.name, row['path']]}"
        for name in self.names:
            if name.search(row["path"]) or name.search(row["title"]):
                return f"held out: named like {name.pattern}"
        if len(self.hashes):
            distance = (self.hashes != dhash).sum(1)
            i = int(distance.argmin())
            if distance[i] <= 5:
                return f"held out: hash {distance[i]} bits from {self.hash_names[i]}"
        if len(self.views):
            correlation = self.views @ standardise(shots).T
            i = int(correlation.max(1).argmax())
            if correlation.max() > 0.97:
                return f"held out: correlation {correlation.max():.3f} with {self.view_names[i]}"
        return None


def hold_out(files):
    """Adds pictures to heldout.toml, with what is needed to know them again."""
    path = HERE / "heldout.toml"
    text = path.read_text() if path.exists() else ""
    known = {e.get("sha256") for e in tomllib.loads(text).get("picture", [])}
    for file in files:
        data = Path(file).read_bytes()
        sha = hashlib.sha256(data).hexdigest()
        if sha in known:
            continue
        known.add(sha)
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # as open_picture turns those that are compared with it
        dhash = np.packbits(difference_hash(picture)).tobytes().hex()
        shots = ",\n".join(f'  "{v.tobytes().hex()}"' for v in views(picture))
        text += f'\n[[picture]]\nname = "{Path(file).stem}"\nsha256 = "{sha}"\ndhash = "{dhash}"\nviews = [\n{shots},\n]\n'
    with writing(path) as part:
        part.write_text(text)


COLUMNS = ["source", "kind", "package", "version", "path", "licence", "author", "title", "width", "height", "tiles", "sha256", "group"]


def merge(sources, publish=False):
    """Returns how many tiles there are."""
    held_out = HeldOut()
    known_hashes, known_views, known_names = np.zeros((0, 64), bool), np.zeros((0, 256), np.float32), []
    known_sha = {}
    manifest, excluded, summary = [], [], []
    wanted = set()
    for source in sources:
        if not collected(source):
            continue
        file = WORK / "candidates" / f"{source.id}.npz"
        with np.load(file) as c:
            rows, counts, hashes = json.loads(str(c["rows"])), c["counts"], c["hashes"]
            ends = np.cumsum(c["view_counts"])
            shots = np.split(c["views"], ends[:-1]) if len(ends) else []
        starts = np.cumsum(counts) - counts
        kept, numbers = [], []
        for i in sorted(range(len(rows)), key=lambda i: rows[i]["path"]):
            row = rows[i]
            name = f"{source.id}: {row['path']}"
            if matches(source.exclude, row["path"]):
                excluded.append((name, "excluded"))
                continue
            reason = held_out.holds(source, row, hashes[i], shots[i])
            view = standardise(shots[i][:1])
            if not reason and row["sha256"] in known_sha:
                reason = f"same file as {known_sha[row['sha256']]}"
            if not reason and known_names:
                correlation = known_views @ view[0]
                distance = (known_hashes != hashes[i]).sum(1)
                j = int(np.argmax(np.where(distance <= 8, correlation, -1)))
                if distance[j] <= 8 and correlation[j] > 0.95:
                    reason = f"near-duplicate of {known_names[j]}"
            if reason:
                excluded.append((name, reason))
                continue
            known_sha[row["sha256"]] = name
            known_names.append(name)
            known_hashes = np.concatenate([known_hashes, hashes[i : i + 1]])
            known_views = np.concatenate([known_views, view])
            row["licence"] = spelled(row["licence"])
            kept.append(row | {"source": source.id, "kind": source.kind, "package": source.name, "version": source.version, "tiles": int(counts[i])})
            numbers += range(starts[i], starts[i] + counts[i])
        manifest += kept
        if not kept:
            continue
        wanted.add(source.id)
        write_tiles(source, file, numbers)
        summary.append((source.id, len(kept), len(numbers)))
    for old in (WORK / "tiles").glob("*.npy"):
        if old.stem not in wanted:
            old.unlink()
            old.with_suffix(".key").unlink(missing_ok=True)
    manifest.sort(key=lambda r: (r["source"], r["path"]))
    for folder in (WORK, HERE) if publish else (WORK,):
        with writing(folder / "manifest.csv") as part, part.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(manifest)
    with writing(WORK / "excluded.csv") as part, part.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(excluded)
    report(manifest, excluded, summary)
    return sum(r["tiles"] for r in manifest)


def write_tiles(source, candidates, numbers):
    """Writes work/tiles/ID.npy and the contact sheet, unless they are there already."""
    target, mark = WORK / "tiles" / f"{source.id}.npy", WORK / "tiles" / f"{source.id}.key"
    key = hashlib.sha256(f"{source.key()} {[int(n) for n in numbers]}".encode()).hexdigest()
    if target.exists() and mark.exists() and mark.read_text() == key:
        return
    with np.load(candidates) as c:
        found = c["tiles"]
    with writing(target) as part:
        tiles = np.lib.format.open_memmap(part, "w+", np.uint8, (len(numbers), SIDE, SIDE, 3))
        for i, n in enumerate(numbers):
            tiles[i] = found[n]
        tiles.flush()
    sheet(tiles, WORK / "sheets" / f"{source.id}.png")
    mark.write_text(key)


def sheet(tiles, path, count=10, side=144):
    """Ten of the tiles, chosen by the seed, at half size."""
    chosen = np.random.default_rng(SEED).permutation(len(tiles))[:count]
    picture = Image.new("RGB", (side * 5, side * -(-len(chosen) // 5)))
    for n, i in enumerate(sorted(chosen)):
        picture.paste(Image.fromarray(tiles[i]).resize((side, side)), (side * (n % 5), side * (n // 5)))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def report(manifest, excluded, summary):
    print()
    for name, pictures, tiles in summary:
        print(f"{tiles:6} tiles of {pictures:5} pictures  {name}")
    for column in ("group", "licence"):
        print()
        for value in sorted({r[column] for r in manifest}):
            of = [r for r in manifest if r[column] == value]
            print(f"{sum(r['tiles'] for r in of):6} tiles of {len(of):5} pictures  {value}")
    print()
    for name, reason in excluded:
        if reason.startswith("held out"):
            print(f"{name}: {reason}")
    duplicates = sum(not reason.startswith("held out") for _, reason in excluded)
    print(f"{duplicates} near-duplicates dropped ({WORK / 'excluded.csv'})")
    print(f"\n{sum(r['tiles'] for r in manifest)} tiles of {len(manifest)} pictures")


def of_folder(folder):
    """One's own pictures as sources."""
    files, others = survey(folder)
    if others:
        print("not read as pictures: " + ", ".join(f"{n} {end}" for end, n in others.most_common()))
        if any(end in ARCHIVES for end in others):
            print("archives are not opened: unpack them first if there are pictures in them")
    if not files:
        raise Failure(f"no pictures in {folder}: files are read that end in {', '.join(PICTURES)}")
    found = list(parts(folder, files))
    if not found:
        raise Failure(f"none of the {len(files)} pictures in {folder} can be read")
    if unread := sorted(set(files).difference(*(part for part, _ in found))):
        print(f"{len(unread)} cannot be read, and are looked at again by the same command: {', '.join(unread[:3])}{', ...' if unread[3:] else ''}")
    return [
        Source(kind="folder", name="own", version=state, licence="own", group="photograph", id=f"own-{n:03}", any_name=True, folder=str(folder), files=part)
        for n, (part, state) in enumerate(found, 1)
    ]


def forget_parts(sources):
    """Drops what is left of a folder that had more pictures once, and says what was left out of the parts that there are."""
    wanted = {source.id for source in sources}
    part = re.compile(r"(own(-\d+)?)\.(npz|key|csv|png)(\.part)?")  # and nothing that somebody else may have put there
    for kind in ("candidates", "rejected", "sheets"):
        for file in (WORK / kind).glob("own*"):
            if (name := part.fullmatch(file.name)) and name[1] not in wanted and file.is_file():
                file.unlink()
    rejected = []
    for file in (WORK / "rejected" / f"{source.id}.csv" for source in sources):
        if not file.exists():
            continue
        with file.open(newline="") as f:
            rejected += csv.reader(f)
    left_out(rejected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these sources")
    parser.add_argument("--merge-only", action="store_true", help="collect nothing, only apply heldout.toml and write the tiles")
    parser.add_argument("--hold-out", nargs="+", metavar="FILE", help="add pictures to heldout.toml")
    parser.add_argument("--discard-downloads", action="store_true", help="delete each archive after use")
    parser.add_argument("--publish", action="store_true", help="write the manifest that is committed, too; every source must be there")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="your own pictures, in place of the sources")
    parser.add_argument("--work", type=Path, help="the working folder; for --folder another than the default one")
    args = parser.parse_args()
    if args.folder and (args.work is None or not args.folder.is_dir()):
        parser.error("--folder needs a folder that is there, and --work for the results")
    if args.publish and args.folder:
        parser.error("--publish is for the weights that are shipped, which are not made of --folder")
    if args.work:
        global WORK
        WORK = args.work.resolve()  # dpkg-deb, tar and npm work in folders of their own
    if args.hold_out:
        hold_out(args.hold_out)
        return 0
    if args.folder and (WORK == (HERE / "work").resolve() or WORK.is_relative_to(args.folder.resolve())):
        parser.error("--work: for --folder another than the default one, and not within that folder")
    sources = of_folder(args.folder.resolve()) if args.folder else read_sources()
    unknown = set(args.names) - {s.id for s in sources}
    if unknown:
        raise Failure(f"no source is called {', '.join(sorted(unknown))}")
    failed = []
    for source in sources:
        if args.merge_only or (args.names and source.id not in args.names):
            continue
        try:
            collect(source)
        except (Failure, OSError, subprocess.SubprocessError, zipfile.BadZipFile, zlib.error, struct.error, UnicodeDecodeError) as e:
            failed.append(source.id)
            print(f"{source.id}: failed: {e}", file=sys.stderr)
        if args.discard_downloads:
            shutil.rmtree(WORK / "downloads", ignore_errors=True)
    missing = [source.id for source in sources if not collected(source)]
    if args.publish and missing:
        raise Failure(f"not collected yet, or by earlier rules: {', '.join(missing)}")
    if args.folder:
        forget_parts(sources)
    tiles = merge(sources, args.publish)
    if missing:
        print(f"left out, since they are not collected yet, or by earlier rules: {', '.join(missing)}", file=sys.stderr)
    if not tiles:
        raise Failure(f"no tiles: {WORK}/rejected says for every picture why it was left out, {WORK}/excluded.csv for those of the merge")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(f"collect.py: {e}")
