#!/usr/bin/env python3
"""Judges a model folder on the pictures of heldout.toml, or on one's own, with the crate's own examples at their default settings.

    python3 heldout.py                                        # once: work/heldout/{evaluation,tuning}/{content,style,texture}/NAME.png
    cargo build --release --examples
    python3 evaluate.py --model ../../assets/mini --name bundled
    python3 evaluate.py --table                               # the table of all that were judged, as in weights.md
    python3 evaluate.py --model mine/my_model --name mine --work mine --sizes 256 --contents DIR --styles DIR     # pictures of one's own in place of heldout.py's

Every content meets several styles, every style several contents; what is counted:

- `patches`, `colours`: sliced Wasserstein distance to the style, of patches over three scales and of colours, relative to that of the
  untouched content: 1 is no style, 0 the style itself;
- `structure`: MS-SSIM to the content;
- `textures`: distance of a synthesised texture to its source, relative to that of another crop of the same picture that is no copy
  of the source: 1 is what nature does;
- PSNR of the autoencoder, and errors of the denoising, on held-out tiles.

Of one's own pictures every content meets every style, each picture's middle square is taken, and textures are those of --texture-folder.
Pictures that are there already are not made again. Results, pictures and a contact sheet of all lie in work/evaluation/NAME.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps

from collect import writing
from packages import PICTURES

HERE = Path(__file__).resolve().parent
parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", type=Path, help="folder in diffusers layout")
parser.add_argument("--name", help="what to call it")
parser.add_argument("--set", default="evaluation", choices=("evaluation", "tuning"))
parser.add_argument("--contents", type=Path, metavar="DIR", help="pictures of your own, with --styles, in place of the set")
parser.add_argument("--styles", type=Path, metavar="DIR")
parser.add_argument("--texture-folder", type=Path, metavar="DIR", help="likewise textures, of at least 512 pixels a side")
parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384])
parser.add_argument("--pairs", type=int, nargs="+", help="of content and style, for each size; the last number serves the sizes left; default: all")
parser.add_argument("--textures", type=int, default=12)
parser.add_argument("--flags", default="", help="for style_transfer, such as '--content-weight 0.15'")
parser.add_argument("--texture-flags", default="", help="likewise for texture_synthesis")
parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="pictures made at the same time, with one thread each")
parser.add_argument("--binaries", type=Path, default=HERE / "../../target/release/examples")
parser.add_argument("--work", type=Path, default=HERE / "work")
parser.add_argument("--no-networks", action="store_true", help="pictures only, which wants no tiles in --work")
parser.add_argument("--table", action="store_true")
args = parser.parse_args()
if not args.table and not (args.model and args.name):
    parser.error("--model and --name, or --table")
if bool(args.contents) != bool(args.styles):
    parser.error("--contents and --styles go together")
OWN = dict(content=args.contents, style=args.styles, texture=args.texture_folder)
OWN = OWN if any(OWN.values()) else None
for network in () if args.table else ("unet", "vae"):
    if not (args.model / network / "config.json").exists():
        parser.error(f"no {network} in {args.model}")


def run(example, *flags):
    command = [args.binaries / example, *map(str, flags)]
    libraries = os.pathsep.join(filter(None, [str(HERE / "../../.libtorch/torch/lib"), os.environ.get("LD_LIBRARY_PATH")]))
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **os.environ, "LD_LIBRARY_PATH": libraries}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Ctrl-C reaches the example, too, which then writes what there is: not a picture to judge.
    if done.returncode or "stopped after step" in done.stderr:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()[-500:]}")
    return done.stdout


def metrics(*flags):
    return {name: float(value) for name, value in (line.split() for line in run("metrics", *flags).splitlines())}


def patches(found):
    """The mean over the scales: they are of one order."""
    scales = [value for name, value in found.items() if name.startswith("patch_distance_scale_")]
    return sum(scales) / len(scales)


def square(path, side):
    """The middle of a picture, turned as its EXIF tag says."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def fitted(picture, role, side, folder):
    """A picture in the size of a run, so that scaling is the same for all models."""
    path = folder / f"{role}_{picture.stem}_{side}.png"
    if not path.exists():
        with writing(path) as part:
            square(picture, side).save(part, "PNG")
    return path


def pairs(contents, styles, count):
    """Round after round each content with another style; the first rounds suffice for a smaller number."""
    every = [(c, (c + r) % len(styles)) for r in range(len(styles)) for c in range(len(contents))]
    return [(contents[c], styles[s]) for c, s in every[:count]]


def sheet(rows, path, side=96):
    """Rows of content, style, result; three of them beside one another."""
    columns, width = 3, max(len(row) for row in rows)
    picture = Image.new("RGB", (columns * (width * side + 8) - 8, -(-len(rows) // columns) * (side + 4) - 4), "white")
    for n, row in enumerate(rows):
        for i, file in enumerate(row):
            tile = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(tile, (n % columns * (width * side + 8) + i * side, n // columns * (side + 4)))
    picture.save(path)


def each(judged, made):
    """Results of `made(item)` for a list of (file of the result, item): what was judged before is read, the rest made several at a time."""

    def one(pair):
        file, item = pair
        if not file.exists():
            result = json.dumps(made(*item))
            with writing(file) as part:
                part.write_text(result)
        return json.loads(file.read_text())

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(one, judged))


def transfer(content, style, output, side):
    run("style_transfer", "--model", args.model, "--content", content, "--style", style, "--size", f"{side}x{side}", "--output", output, *args.flags.split())
    before = metrics("--result", content, "--style", style)
    after = metrics("--result", output, "--style", style, "--content", content)
    return dict(patches=patches(after) / patches(before), colours=after["colour_distance"] / before["colour_distance"], structure=after["ms_ssim"])


def transfers(pictures, folder, inputs, side, count):
    rows = []
    for content, style in pairs(pictures["content"], pictures["style"], count):
        content, style = fitted(content, "content", side, inputs), fitted(style, "style", side, inputs)
        rows.append((content, style, folder / f"{content.stem}__{style.stem}.png"))
    found = each([(row[2].with_suffix(".json"), (*row, side)) for row in rows], transfer)
    if rows:
        sheet(rows, folder / f"transfers_{side}.png")
    return found


def texture(source, other, output):
    run("texture_synthesis", "--model", args.model, "--style", source, "--method", "sample", "--size", "256x256", "--output", output, *args.texture_flags.split())
    natural, made = (patches(metrics("--result", result, "--style", source)) for result in (other, output))
    return dict(natural=natural, made=made, ratio=made / natural)


def two_crops(whole, side):
    """The first quarter and the opposite one, or the one to the right of the first where the opposite one is a copy, as it can be in
    textures for games, which are shifted by half their width and height and laid over themselves."""
    first, opposite, beside = (whole.crop((x, y, x + side, y + side)) for x, y in ((0, 0), (side, side), (side, 0)))
    return first, beside if correlation(first, opposite) > 0.8 else opposite


def correlation(a, b):
    a, b = (picture.convert("L").tobytes() for picture in (a, b))
    return statistics.correlation(a, b)


def textures(pictures, folder, inputs, side=256):
    rows = []
    for picture in pictures["texture"][: args.textures]:
        source, other = (inputs / f"quarter_{name}_{picture.stem}.png" for name in ("a", "b"))
        if not other.exists():
            for crop, path in zip(two_crops(square(picture, 2 * side), side), (source, other)):
                with writing(path) as part:
                    crop.save(part, "PNG")
        rows.append((source, other, folder / f"texture_{picture.stem}.png"))
    # Of a name that says by what they were judged; earlier ones took copies, too.
    found = each([(row[2].with_suffix(".quarters.json"), row) for row in rows], texture)
    if rows:
        sheet([(source, output) for source, _, output in rows], folder / "textures.png")
    return found


def networks():
    """What needs no pictures made: the autoencoder's PSNR and the denoising errors."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    import autoencoder
    from data import Tiles
    from denoising import Denoising

    tiles = Tiles(args.work)
    vae = AutoencoderKL.from_pretrained(args.model / "vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).eval()
    prediction = json.loads((args.model / "scheduler/scheduler_config.json").read_text())["prediction_type"]
    with torch.no_grad():
        latents = vae.encode(tiles.held_out(128)).latent_dist.mean * vae.config.scaling_factor
        return dict(psnr=round(autoencoder.psnr(vae, tiles.held_out(256, 24)), 2), **Denoising(unet, prediction).held_out(latents))


def mean(found, name):
    return round(sum(f[name] for f in found) / len(found), 3) if found else None


def held_out():
    """The pictures of the set, by role."""
    held, found = HERE / "work/heldout" / args.set, {}
    for role in ("content", "style", "texture"):
        wanted = [p["name"] for p in tomllib.loads((HERE / "heldout.toml").read_text())["picture"] if (p.get("set"), p.get("role")) == (args.set, role)]
        if missing := [name for name in wanted if not (held / role / f"{name}.png").exists()]:
            raise SystemExit(f"no {', '.join(missing)} in {held / role}: run heldout.py first")
        found[role] = sorted((held / role).glob("*.png"))
    return found


def own(folder, role):
    """The pictures of a folder, looked at before anything is made of them."""
    least = 512 if role == "texture" else 1
    found = sorted(file for file in folder.glob("*") if file.name.lower().endswith(PICTURES))
    if not found:
        raise SystemExit(f"no pictures in {folder}: files are read that end in {', '.join(PICTURES)}")
    stems = [file.stem for file in found]
    for file in found:
        if stems.count(file.stem) > 1:
            raise SystemExit(f"{folder} has two pictures called {file.stem}")
        try:
            with Image.open(file) as picture:
                picture.load()
                mode, side = picture.mode, min(picture.size)
        except Exception as e:  # Pillow raises all kinds for broken files
            raise SystemExit(f"{file}: {e or type(e).__name__}") from None
        if mode.startswith(("I", "F")):
            raise SystemExit(f"{file} has more than 8 bits a channel: save it with 8")
        if side < least:
            raise SystemExit(f"{file} has {side} pixels on its shorter side, {least} are the least")
        if role == "texture":
            try:
                first, other = two_crops(square(file, 512), 256)
            except statistics.StatisticsError:
                raise SystemExit(f"{file} is of one colour, in a quarter at least, which is no texture") from None
            if first.tobytes() == other.tobytes():
                raise SystemExit(f"{file} repeats, so another part of it says nothing: take a picture of more than one period")
    return found


def apart(contents, styles):
    """Refuses what is both: nothing would be between them to measure by."""
    seen = {square(file, 256).tobytes(): file for file in contents}
    for file in styles:
        if same := seen.get(square(file, 256).tobytes()):
            raise SystemExit(f"{same} and {file} are the same picture: leave one out")


def checksum(files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def same_as_before(path, pictures):
    """What a folder's pictures are made with; they are not made again, so they must not be of something else."""
    model = checksum(sorted(file for kind in ("*.json", "*/*.json", "*/*.safetensors") for file in args.model.glob(kind)))
    if OWN:
        named = json.dumps({role: [(file.name, checksum([file])) for file in files] for role, files in pictures.items()})
        judged_on = dict(pictures=hashlib.sha256(named.encode()).hexdigest())
    else:
        judged_on = dict(held_out=checksum([HERE / "heldout.toml"]), set=args.set)
    now = dict(model=model, **judged_on, flags=args.flags, texture_flags=args.texture_flags)
    if path.exists():
        before = json.loads(path.read_text())
    elif any(path.parent.glob("*.json")):
        before = {}
    else:
        with writing(path) as part:
            part.write_text(json.dumps(now, indent=1))
        return
    if other := [name for name in now if now[name] != before.get(name)]:
        raise SystemExit(f"{path.parent} was judged with other or unknown {', '.join(other)}: give this one another --name")


def judge():
    evaluation = args.work / "evaluation"
    folder = evaluation / args.name
    if OWN:
        pictures = {role: own(place, role) if place else [] for role, place in OWN.items()}
        apart(pictures["content"], pictures["style"])
        inputs, every = folder / "inputs", len(pictures["content"]) * len(pictures["style"])
    else:
        pictures, inputs, every = held_out(), evaluation / "inputs", 144
    for made in (folder, inputs):
        made.mkdir(parents=True, exist_ok=True)
    same_as_before(folder / "judged.json", pictures)
    result = dict(name=args.name, set="own" if OWN else args.set, flags=args.flags, texture_flags=args.texture_flags, **({} if args.no_networks else networks()))
    counts = args.pairs or [every]
    for i, side in enumerate(args.sizes):
        found = transfers(pictures, folder, inputs, side, counts[min(i, len(counts) - 1)])
        result[f"transfers_{side}"] = dict(pairs=len(found), **{name: mean(found, name) for name in ("patches", "colours", "structure")})
    found = textures(pictures, folder, inputs)
    ratios = [f["ratio"] for f in found]
    median, within = (round(statistics.median(ratios), 3), sum(ratio <= 1.5 for ratio in ratios)) if ratios else (None, None)
    result["textures"] = dict(count=len(found), ratio=mean(found, "ratio"), median=median, within=within)
    with writing(folder / "result.json") as part:
        part.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1), flush=True)


def judged_on(result):
    """The set, or of which pictures of one's own: rows compare where these are the same."""
    if result.get("set") != "own":
        return result.get("set", "")
    record = args.work / "evaluation" / result["name"] / "judged.json"
    return f"own {json.loads(record.read_text())['pictures'][:6]}" if record.exists() else "own"


def table():
    results = [json.loads(path.read_text()) for path in sorted((args.work / "evaluation").glob("*/result.json"))]
    sizes = sorted({name for r in results for name in r if name.startswith("transfers_")}, key=lambda n: int(n.split("_")[1]))
    head = ["model", "judged on", "PSNR, dB", "v error", "by quarter of t"]
    head += [f"{what}, {name.split('_')[1]} px" for name in sizes for what in ("patches", "colours", "structure")]
    head += ["textures: mean", "median", "within 1.5"]
    print("| " + " | ".join(head) + " |")
    print("|---" + "|--:" * (len(head) - 1) + "|")
    for r in results:
        cells = [r["name"], judged_on(r), r.get("psnr", ""), r.get("v", ""), " ".join(map(str, r.get("v_quarters", [])))]
        cells += [r.get(name, {}).get(what, "") for name in sizes for what in ("patches", "colours", "structure")]
        textures = r["textures"]
        # Results without a median are of an earlier way to judge.
        judged = textures.get("median") is not None
        cells += [textures["ratio"], textures["median"], f"{textures['within']} of {textures['count']}"] if judged else [""] * 3
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")


table() if args.table else judge()
