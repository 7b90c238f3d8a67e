"""Downsampling whose gradient is even.

A convolution of three taps a side and stride two meets every second row of latents with its middle tap, and those between with both outer
ones. Where these do not weigh the same, the gradient of a smooth difference is not smooth: it has a pattern of the period of two rows, and
whatever descends by it writes that pattern into the latents (Odena, Dumoulin & Olah 2016, "Deconvolution and checkerboard artifacts",
on gradients of discriminators). Here the outer taps together weigh as much as the middle one, for rows and for columns.
"""

import torch


def strided(unet):
    return [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]


def excess(weight, axis):
    """How much more the middle tap weighs than the outer ones together; the shape is the weight's, with one tap on `axis`."""
    first, middle, last = weight.split(1, axis)
    return middle - first - last


@torch.no_grad()
def balance(unet):
    """The nearest weights that are balanced, in place."""
    for conv in strided(unet):
        if conv.kernel_size != (3, 3):
            raise ValueError(f"a strided convolution of {conv.kernel_size} taps, where 3 x 3 can be balanced")
        for axis in (2, 3):
            third = excess(conv.weight, axis) / 3
            conv.weight += torch.cat([third, -third, third], axis)


def imbalance(unet):
    """The largest excess relative to the weights, of all such convolutions; 0 is balanced."""
    return max((excess(m.weight, axis).norm() / m.weight.norm()).item() for m in strided(unet) for axis in (2, 3))
