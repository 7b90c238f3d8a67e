"""Downsampling whose gradient does not alternate.

A convolution of three taps a side and stride two meets every second row of latents with its middle tap, and those between with both outer
ones. Where these do not weigh the same, the gradient of a smooth difference is not smooth: it alternates from row to row, and whatever
descends by it writes that into the latents, a checkerboard (Odena, Dumoulin & Olah 2016, "Deconvolution and checkerboard artifacts", on
the gradients of such layers). Training does not ask for it: weights by chance are off balance by as much as they are large. Here the outer
taps together weigh as much as the middle one, for rows and for columns; such a kernel is a blur of two by two, then one of two by two taps,
so that it is blind to what alternates, and so is its gradient (Zhang 2019, "Making convolutional networks shift-invariant again"), all but
for the last row and column, which only one of the outer taps meets.
"""

import torch


def strided(unet):
    found = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    for conv in found:
        if conv.kernel_size != (3, 3):
            raise ValueError(f"a strided convolution of {conv.kernel_size} taps, where 3 x 3 can be balanced")
    return found


def difference(weight, axis):
    """What the middle tap weighs more than the outer ones together; of the weight's shape, with one tap on `axis`."""
    first, middle, last = weight.split(1, axis)
    return middle - first - last


@torch.no_grad()
def balance(unet):
    """The nearest weights that are balanced, in place."""
    for conv in strided(unet):
        for axis in (2, 3):
            third = difference(conv.weight, axis) / 3
            conv.weight += torch.cat([third, -third, third], axis)


def imbalance(unet):
    """The largest difference relative to the weights, of all such convolutions: 0 is balanced, 1 is chance."""
    found = (difference(m.weight, axis).norm() / m.weight.norm() for m in strided(unet) for axis in (2, 3))
    return max((relative.item() for relative in found), default=0.0)
