"""Textures, in plain Python on top of diffusers: regions, filled layouts, expansion, seamless tiles, tuned decoders.

The third part of what the crate's tests compare themselves with. A texture itself is what the other two make with a style
alone: `optimise` from noise, or `sample` with the prompt "" and `guidance=1`. Here is what goes beyond that.

    model = Sampler.open("folder")
    style = model.encode(style_picture)
    mask = Labels(target_labels, (64, 64), [(style_labels, (64, 64))])
    run = sample(model, [""], guidance=1, styles=[style], iterations=3, mask=mask)

    start = model.encode(fill(style_picture, style_labels, target_labels, seed=0))
    run = optimise(model, start, [style], start, content_weight=0.25, mask=mask)

    run = expand(model, [style], size=(1536, 512), view_batch=8)

    make_circular(model.network.unet, "xy")
    make_circular(model.vae, "xy")

    losses, decoder = tune_decoder(model.vae, style_picture)

Pictures are (B, 3, H, W) in 0..1, label maps (1, 1, H, W) of whole numbers, and the sizes of latents (height, width).
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention_distillation import decode, encode
from diffusers.models.downsampling import Downsample2D
from sampling import arrival, descend, drawn, latent_shape, noised, predict

# Regions: what may be given to `ad_loss` as its mask


def grid(size, tokens):
    """A layer's feature map (h, w): that of the latents, halved until it has as many places as the layer has tokens."""
    h, w = size
    while h * w > tokens:
        # As a convolution of stride 2 leaves it: half a place is one.
        h, w = (h + 1) // 2, (w + 1) // 2
    assert h * w == tokens, f"latents of {size} have no feature map of {tokens} tokens"
    return h, w


@dataclass
class Labels:
    """Like attends to like: a token of the picture sees the tokens of the styles that have its label."""

    target: torch.Tensor
    """(1, 1, H, W), or one for each picture of the batch."""
    size: tuple
    """Of the picture's latents."""
    styles: list
    """For each style its labels and the size of its latents."""
    fallback: bool = False
    """A token whose label no style has sees all tokens; or else it is an error."""

    def __call__(self, tokens, style_tokens):
        """Whether a token of the picture (rows) sees one of the styles (columns): (1 or batch, 1, tokens, all style tokens)."""
        target = nearest(self.target, self.size, tokens)
        styles = [nearest(labels, size, count) for (labels, size), count in zip(self.styles, style_tokens, strict=True)]
        seen = target[:, None, :, None] == torch.cat(styles, dim=1)[:, None, None, :]
        blind = ~seen.any(-1, keepdim=True)
        # A row of nothing would be a softmax of nothing, which is NaN.
        missing = target[blind[:, 0, :, 0]].unique().tolist()
        assert self.fallback or not missing, f"no style has the labels {missing} on its map of {style_tokens} tokens"
        return seen | blind

    def of_views(self, views):
        """The same for views of the picture; the labels are as many times as large as the latents."""
        (height, width), (h, w) = self.target.shape[2:], views[0].size
        y, x = height // self.size[0], width // self.size[1]
        assert (y * self.size[0], x * self.size[1]) == (height, width), f"labels of {height}x{width}"
        crops = [self.target[:, :, y * top : y * (top + h), x * left : x * (left + w)] for top, left, *_ in views]
        return Labels(torch.cat(crops), (h, w), self.styles, self.fallback)


def nearest(labels, size, tokens):
    """The label of each token, row by row: (B, tokens)."""
    return F.interpolate(labels.float(), grid(size, tokens), mode="nearest").flatten(1)


@dataclass
class StyleBias:
    """How much a token of the picture is to see of each style's tokens: `Labels` with real numbers.

    A soft map says how much of each token belongs to each of a few areas. Be M(l, i) that of the picture, S(m, j) that of
    a style, and W(l, m) how much an area of the picture is to have of an area of this style: then
    `ln(sum over l, m of M(l, i) W(l, m) S(m, j) + eps)` is added to the score of the tokens i and j.
    """

    target: torch.Tensor | None
    """(areas, H, W), in each place of sum 1; None is a single area."""
    size: tuple
    styles: list
    """For each style its weights W (areas of the picture, areas of the style), its soft map or None, and the size of its
    latents."""
    eps: float = 0.0

    def __call__(self, tokens, style_tokens):
        """What is added to the scores: (1, 1, tokens, all style tokens)."""
        target = averaged(self.target, self.size, tokens)
        shares = [
            target.T @ weights @ averaged(areas, size, count)
            for (weights, areas, size), count in zip(self.styles, style_tokens, strict=True)
        ]
        share = torch.cat(shares, dim=1)
        # A token that is to see nothing sees everything; with an eps it does so anyway, as the softmax ignores constants.
        share = torch.where(share.sum(1, keepdim=True) == 0, torch.ones_like(share), share)
        return (share + self.eps).log()[None, None]


def averaged(areas, size, tokens):
    """The mean of a soft map over each token: (areas, tokens)."""
    if areas is None:
        return torch.ones(1, tokens)
    return F.interpolate(areas[None].float(), grid(size, tokens), mode="area").flatten(2)[0]


# Controlled synthesis


def fill(source, source_labels, target_labels, seed):
    """A picture of the target's regions, each made of pixels drawn at random from the source's region of the same label.

    The labels take their turn in ascending order, each with a single draw of as many numbers as it has pixels in the
    target. Pixels are counted row by row in both pictures; a pixel may be drawn again.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    height, width = target_labels.shape[2:]
    colours, origins, places = source[0].flatten(1), source_labels.flatten(), target_labels.flatten()
    filled = torch.empty(len(colours), len(places))
    for label in places.unique(sorted=True):
        region = colours[:, origins == label]
        assert region.shape[1] > 0, f"the source has no pixel of label {label}"
        count = int((places == label).sum())
        # On the CPU, and for numbers below 2**28, this is the generator's next 32 bits modulo the number.
        filled[:, places == label] = region[:, torch.randint(0, region.shape[1], (count,), generator=generator)]
    return filled.unflatten(1, (height, width))[None]


# Expansion to any size (MultiDiffusion)


class View(NamedTuple):
    """A window of the latents."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self):
        return self.height, self.width

    def of(self, latents):
        return latents[:, :, self.top : self.top + self.height, self.left : self.left + self.width]


def windows(size, window, stride):
    """Row by row. The last one of a row or column ends where the canvas does, and may so be closer to the one before."""

    def starts(side):
        last = max(side - window, 0)
        return [*range(0, last, stride), last]

    height, width = (min(window, side) for side in size)
    return [View(top, left, height, width) for top in starts(size[0]) for left in starts(size[1])]


@dataclass
class Expanded:
    start: torch.Tensor
    latents: torch.Tensor = None
    picture: torch.Tensor = None
    losses: list = field(default_factory=list)
    """Of each step, for each batch of views the last iteration's, before its update; NaN where there was none."""


def expand(
    model,
    styles,
    size,
    window=64,
    stride=8,
    view_batch=8,
    steps=50,
    iterations=2,
    learning_rate=0.05,
    start_time=999,
    seed=0,
    reference_per_batch=True,
    mask=None,
    progress=None,
):
    """One picture of any size, as a mean of views in each step. `size` is (width, height) in pixels, `window` and `stride`
    count latents. `mask` is a `Labels` for the whole canvas.

    With `reference_per_batch` the styles get noise of their own for each batch of views, or else once in a step. `progress`
    is called with the steps done and the mean loss of the last one's views, first before any.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    canvas = drawn(model, latent_shape(model, 1, size), generator)
    run = Expanded(canvas)
    condition = model.null = model.encode_prompts([""], size)
    views = windows(canvas.shape[2:], window, stride)
    batches = [views[first : first + view_batch] for first in range(0, len(views), view_batch)]

    if progress:
        progress(0, None)
    for timestep in model.timesteps(steps):
        total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
        then, references, losses = arrival(model, timestep, steps), None, []
        for batch in batches:
            latents = torch.cat([view.of(canvas) for view in batch])
            prediction = predict(model, latents, timestep, condition, guidance=1.0, control=None)
            latents = model.scheduler.step(prediction, timestep, latents, eta=0.0).prev_sample
            loss = float("nan")
            if timestep < start_time and iterations > 0:
                if references is None or reference_per_batch:
                    references = [noised(model, style, then, generator) for style in styles]
                seen = mask and mask.of_views(batch)
                latents, loss = descend(model, latents, then, references, None, 0.0, iterations, learning_rate, seen)
            losses.append(loss)
            for view, part in zip(batch, latents, strict=True):
                view.of(total).add_(part)
                view.of(count).add_(1)
        canvas = total / count
        run.losses.append(losses)
        if progress:
            progress(len(run.losses), sum(loss * len(batch) for loss, batch in zip(losses, batches)) / len(views))
    run.latents, run.picture = canvas, model.decode(canvas)
    return run


# Seamless tiles


def make_circular(network, axes):
    """Lets every convolution of a UNet or a VAE go on at the other edge: along "x", "y" or, with "xy", both.

    Padding along the other axis stays zero. Where the VAE's encoder halves, it pads one pixel on the right and at the bottom
    before a convolution without padding; along the axes here this pixel is the first one, too.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and any(module.padding):
            y, x = module.padding
            module.forward = partial(padded_convolution, module, axes, (x, x, y, y))
        elif isinstance(module, Downsample2D) and module.padding == 0:
            assert module.norm is None
            module.forward = partial(padded_convolution, module.conv, axes, (0, 1, 0, 1))


def padded_convolution(convolution, axes, padding, x):
    left, right, top, bottom = padding
    x = F.pad(x, (left, right, 0, 0), mode="circular" if "x" in axes else "constant")
    x = F.pad(x, (0, 0, top, bottom), mode="circular" if "y" in axes else "constant")
    return F.conv2d(x, convolution.weight, convolution.bias, convolution.stride, 0, convolution.dilation, convolution.groups)


# Better decoding


def tune_decoder(vae, picture, epochs=75, learning_rate=1e-4):
    """Teaches the decoder a single picture.

    Gives the loss of each epoch, before its update, and the state of a VAE that differs from the given one in its
    `decoder.*` alone.
    """
    tuned = copy.deepcopy(vae).float().requires_grad_(False)
    pixels = picture * 2 - 1
    with torch.no_grad():
        latents = encode(tuned, pixels)
    optimizer = torch.optim.Adam(tuned.decoder.requires_grad_(True).parameters(), lr=learning_rate)
    losses = []
    for _ in range(epochs):
        loss = (decode(tuned, latents) - pixels).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, tuned.state_dict()
