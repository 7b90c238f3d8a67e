"""The training pictures: tiles on disk, and random crops of them.

`collect.py` writes `work/tiles/NAME.npy` (N x 288 x 288 x 3, uint8) and a row per picture in `work/manifest.csv`; `manifest.csv` here is that of the
weights that are shipped. One picture in forty is held out for validation, told by its checksum: adding sources moves none from one side to the other.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
SIDE = 288

# How often a tile of each group is drawn, relative to a texture. Style lives in paintings and structure in photographs.
DRAWN = {"painting": 3.0, "photograph": 2.0, "drawing": 1.5, "texture": 1.0}


class Tiles:
    """All tiles of the working folder, those held out apart."""

    def __init__(self, work=HERE / "work"):
        rows, manifest = {}, Path(work) / "manifest.csv"
        if not manifest.exists():
            raise SystemExit(f"no {manifest}: run collect.py first")
        with open(manifest, newline="") as f:
            for row in csv.DictReader(f):
                rows.setdefault(row["source"], []).append(row)
        self.arrays, train, weights, self.held = [], [], [], []
        for source in sorted(rows):
            path = Path(work) / "tiles" / f"{source}.npy"
            if not path.exists():
                raise SystemExit(f"no {path}, which {manifest} lists: run collect.py again")
            array = np.load(path, mmap_mode="r")
            if len(array) != sum(int(row["tiles"]) for row in rows[source]):
                raise SystemExit(f"{path} does not go with {manifest}: run collect.py again")
            n, start = len(self.arrays), 0
            self.arrays.append(array)
            for row in rows[source]:
                count = int(row["tiles"])
                if int(row["sha256"][:8], 16) % 40 == 0:
                    self.held.append((n, start))
                else:
                    # Many details of one picture are less new than as many pictures.
                    train += [(n, start + i) for i in range(count)]
                    weights += [DRAWN[row["group"]] / count**0.5] * count
                start += count
        if not train:
            raise SystemExit(f"no tiles in {work}/tiles: run collect.py first")
        self.train, weights = np.array(train), np.cumsum(weights)
        self.upto = weights / weights[-1]

    def tile(self, at):
        return self.arrays[at[0]][at[1]]

    def crops(self, count, side, rng, recolour=0.3, scales=(1, 1, 1, 2, 2, 3)):
        """`count` crops, `(count, 3, side, side)` in -1..1, made smaller by one of `scales` as far as tiles reach, the share `recolour` of them
        with another palette."""
        out = np.empty((count, side, side, 3), np.float32)
        for i in range(count):
            tile = self.tile(self.train[np.searchsorted(self.upto, rng.random())])
            scale = rng.choice([s for s in scales if s * side <= SIDE])
            span = scale * side
            y, x = rng.integers(0, SIDE - span + 1, 2)
            crop = tile[y : y + span, x : x + span].astype(np.float32)
            if scale > 1:
                crop = crop.reshape(side, scale, side, scale, 3).mean((1, 3))
            if rng.random() < 0.5:
                crop = crop[:, ::-1]
            if rng.random() < 0.1:
                crop = np.rot90(crop, rng.integers(1, 4))
            if rng.random() < recolour:
                crop = recoloured(crop, rng)
            out[i] = crop
        return torch.from_numpy(out).permute(0, 3, 1, 2).div(127.5).sub(1).contiguous()

    def pairs(self, count, side, rng, scales=(1, 1, 1, 2, 2, 3)):
        """`count` crops, then the same as if in another style."""
        crops, others = (self.crops(count, side, rng, 0, scales) for _ in range(2))
        return torch.cat([crops, in_another_style(crops, others, rng)])

    def held_out(self, side, count=48):
        """The middle of the first tile of held-out pictures, spread over the sources: always the same ones."""
        if len(self.held) < 4:
            raise SystemExit(f"{len(self.held)} pictures are held out, one in forty by chance, and at least 4 are needed: add pictures, some 300 suffice")
        picked = [self.held[i] for i in np.linspace(0, len(self.held) - 1, min(count, len(self.held))).round().astype(int)]
        m = (SIDE - side) // 2
        crops = np.stack([self.tile(at)[m : m + side, m : m + side] for at in picked]).astype(np.float32)
        return torch.from_numpy(crops).permute(0, 3, 1, 2).div(127.5).sub(1).contiguous()


class Batches(torch.utils.data.DataLoader):
    """`crops_of(step, rng)` for each of the steps. Each has a generator of its own, of seed and step, so it makes no difference which process
    cuts it, nor whether the run was stopped before."""

    def __init__(self, crops_of, seed, steps, workers, device):
        # A fork has the tiles and the function; another kind of process would run the training script once more to get them. Of a GPU it
        # touches nothing.
        fork = "fork" if workers else None
        super().__init__(
            _Crops(crops_of, seed), batch_size=None, sampler=steps, num_workers=workers, pin_memory=device.type == "cuda", multiprocessing_context=fork
        )


class _Crops(torch.utils.data.Dataset):
    def __init__(self, crops_of, seed):
        self.crops_of, self.seed = crops_of, seed

    def __getitem__(self, step):
        return self.crops_of(step, np.random.default_rng((self.seed, step)))


def in_another_style(crops, others, rng):
    """Crops, recoloured twice, with the fine detail of the other crops over them: much the same layout."""
    pixels = crops.add(1).mul(127.5).permute(0, 2, 3, 1).numpy()
    changed = np.stack([recoloured(recoloured(crop, rng), rng) for crop in pixels]).astype(np.float32)
    changed = torch.from_numpy(changed).permute(0, 3, 1, 2).div(127.5).sub(1)
    # What is left of them without what blocks of 8 x 8 pixels, 2 x 2 latents, hold.
    coarse = F.interpolate(F.avg_pool2d(others, 8), scale_factor=8, mode="bilinear")
    amount = torch.from_numpy(rng.random(len(crops), np.float32)).view(-1, 1, 1, 1)
    return (changed + amount * (others - coarse)).clamp(-1, 1)


def recoloured(crop, rng):
    """Another palette: channels mixed, contrast and light changed. Small data has few of the palettes that paintings have."""
    mix = np.eye(3) + rng.normal(0, 0.15, (3, 3))
    if rng.random() < 0.3:
        mix = mix[rng.permutation(3)]
    mix /= mix.sum(1, keepdims=True)
    mean = crop.mean((0, 1))
    crop = (crop - mean) * rng.uniform(0.8, 1.2) + mean + rng.normal(0, 12)
    return np.clip(crop @ mix.T.astype(np.float32), 0, 255)
