"""Packages of Debian, npm and PyPI: fetched by name and version, unpacked, and the pictures in them found."""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tga", ".dds", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pcx", ".avif")
ZIPS = (".zip", ".pk3", ".pk4", ".jar", ".whl", ".egg")


class Failure(Exception):
    """A source that cannot be collected; the others go on."""


def run(command, cwd, tries=3):
    for attempt in range(1, tries + 1):
        done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode == 0:
            return done.stdout
        if attempt < tries:
            time.sleep(5 * attempt)
    raise Failure(f"{' '.join(map(str, command))}: {done.stdout.strip()[-400:]}")


def download(source, downloads):
    """The folder with the source's archives, downloaded before or now."""
    folder = downloads / source.kind / f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', source.name)}_{source.version.replace(':', '-')}"
    if (folder / ".complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if source.kind == "debian":
        run(["apt-get", "download", f"{source.name}={source.version}"], folder)
    elif source.kind == "debian-source":
        run(["apt-get", "source", "--download-only", f"{source.name}={source.version}"], folder)
    elif source.kind == "npm":
        run(["npm", "pack", f"{source.name}@{source.version}"], folder)
    else:
        which = ["--no-binary", ":all:"] if source.dist == "sdist" else ["--only-binary", ":all:"]
        run([sys.executable, "-m", "pip", "download", "--no-deps", *which, f"{source.name}=={source.version}"], folder)
    (folder / ".complete").touch()
    return folder


def unpack(source, archives, target):
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for archive in sorted(archives.iterdir()):
        if archive.suffix == ".deb":
            run(["dpkg-deb", "-x", archive, target], archives, tries=1)
        elif archive.suffix == ".dsc":
            target.rmdir()
            run(["dpkg-source", "--no-check", "--no-copy", "-x", archive, target], archives, tries=1)
        elif archive.suffix in ZIPS:
            with zipfile.ZipFile(archive) as z:
                z.extractall(target)
        elif source.kind in ("npm", "pypi") and archive.name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")):
            run(["tar", "-xf", archive, "-C", target, "--strip-components=1"], archives, tries=1)
    # Folders without the right to enter them are in some npm archives.
    for root, folders, _ in os.walk(target):
        for name in folders:
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(root, name), 0o755)


def rcc_members(data):
    """The (resource path, bytes) of a binary Qt resource file."""
    magic, version, tree, payload, names = struct.unpack(">4sIIII", data[:20])
    if magic != b"qres":
        raise Failure("not a Qt resource file")
    node_size = 14 if version == 1 else 22

    def name_at(offset):
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6
        return data[start : start + 2 * length].decode("utf-16-be")

    def walk(index, prefix):
        name, flags = struct.unpack_from(">IH", data, tree + node_size * index)
        path = f"{prefix}/{name_at(name)}" if index else prefix
        if flags & 2:
            count, first = struct.unpack_from(">II", data, tree + node_size * index + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        else:
            (offset,) = struct.unpack_from(">I", data, tree + node_size * index + 10)
            (size,) = struct.unpack_from(">I", data, payload + offset)
            content = data[payload + offset + 4 : payload + offset + 4 + size]
            if flags & 1:
                content = zlib.decompress(content[4:])
            if not flags & 4:  # zstd: no picture is stored so, they do not get smaller
                yield path.lstrip("/"), content

    yield from walk(0, "")


def files_below(folder):
    """The path of every file in a folder and its folders but links, in sorted order."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            file = Path(root, name)
            if not file.is_symlink():
                yield file.relative_to(folder).as_posix()


def picture_files(folder, files=()):
    """Every (path, function that gives the bytes) of an unpacked source, archives in it opened, in sorted order; or of these files in it alone."""
    for path in files or files_below(folder):
        file = folder / path
        lower = file.name.lower()
        if lower.endswith(PICTURES):
            yield path, file.read_bytes
        elif lower.endswith(".rcc"):
            for member, data in sorted(rcc_members(file.read_bytes())):
                if member.lower().endswith(PICTURES):
                    yield f"{path}/{member}", lambda data=data: data
        elif lower.endswith(ZIPS) and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as z:
                for member in sorted(set(z.namelist())):
                    if member.lower().endswith(PICTURES):
                        yield f"{path}/{member}", lambda z=z, member=member: z.read(member)
