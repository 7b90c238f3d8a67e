"""Queries that see layout, not style, asked for outright.

In a transfer each place of the picture takes colours and texture from where its queries look in the style, and the content loss holds
these queries to the content's. Denoising asks nothing of them in this: they tell colours and grain as much as forms. So the content loss
holds the content's colours and grain, too, and where a flat part begins to come out in two of the style's colours its queries differ,
look at two places, and part further. Here the queries of a crop and of the same layout in another style (other colours, and another
picture's grain over them) are asked to be near one another, relative to those of other pictures and places; only ratios, so scaling them
does nothing. As in a transfer by optimisation the latents are clean, at whatever timestep.
"""

import torch


class Layout:
    """Of a U-Net, by the self-attention of its last two levels, which are the layers that transfers use."""

    def __init__(self, unet, nothing):
        self.unet, self.nothing, self.queries = unet, nothing, None
        for level in unet.up_blocks[-2:]:
            for transformer in level.attentions:
                for block in transformer.transformer_blocks:
                    block.attn1.to_q.register_forward_hook(self._keep)

    def _keep(self, _module, _inputs, output):
        if self.queries is not None:
            self.queries.append(output)

    def loss(self, pairs, t, generator):
        """`pairs`: latents of several pictures, then of the same in another style. The mean of the layers' ratios: 0 is the same queries, 1 is
        queries that have no more in common than those of different pictures."""
        self.queries = []
        self.unet(pairs, t.expand(len(pairs)), self.nothing.expand(len(pairs), -1, -1))
        kept, self.queries = self.queries, None
        ratios = []
        for queries in kept:
            one, other = queries.chunk(2)
            elsewhere = torch.randperm(one.shape[1], generator=generator, device=one.device)
            ratios.append((one - other).abs().mean() / (one - other.roll(1, 0)[:, elsewhere]).abs().mean())
        return sum(ratios) / len(ratios)

    @torch.no_grad()
    def held_out(self, pictures, restyled):
        """The loss on pairs that are always the same, at always the same timesteps."""
        generator = torch.Generator(pictures.device).manual_seed(1)
        # Of about one size: a part of one picture would be compared with itself.
        parts = list(zip(*(found.chunk(max(1, len(found) // 8)) for found in (pictures, restyled))))
        found = [self.loss(torch.cat(part), torch.tensor([t], device=pictures.device), generator) for part in parts for t in (100, 500, 900)]
        return round(torch.stack(found).mean().item(), 4)
