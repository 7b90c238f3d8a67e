"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for the rest."""

import torch


@torch.no_grad()
def orthogonal(updates):
    """Of each matrix, `(count, rows, columns)`, the nearest with singular values near 1, by five steps of Newton and Schulz with Muon's
    coefficients."""
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold tensors of two or more axes, taken as matrices (outputs, all else); their updates have the size of
    AdamW's, so that one learning rate serves both (Liu et al. 2025)."""

    def __init__(self, model, lr, decay=1e-2, outer=("conv_in", "conv_out", "time_embedding")):
        inner, rest = [], []
        for name, p in model.named_parameters():
            if p.requires_grad:
                (inner if p.ndim >= 2 and not name.startswith(outer) else rest).append(p)
        super().__init__([dict(params=inner, lr=lr, muon=True), dict(params=rest, lr=lr, muon=False)], dict(decay=decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            seen = [p for p in group["params"] if p.grad is not None]
            for p in seen:
                if not self.state[p]:
                    self.state[p].update({"step": 0, "mean": torch.zeros_like(p)} | ({} if group["muon"] else {"square": torch.zeros_like(p)}))
                self.state[p]["step"] += 1
            (self._muon if group["muon"] else self._adamw)(seen, group["lr"], group["decay"])

    def _muon(self, seen, lr, decay):
        # Those of one shape together: on a GPU most of the time goes by starting work, not by doing it.
        shapes = {}
        for p in seen:
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        for (rows, columns), params in shapes.items():
            grads, means = [p.grad for p in params], [self.state[p]["mean"] for p in params]
            torch._foreach_lerp_(means, grads, 0.05)
            looked_ahead = torch._foreach_lerp(grads, means, 0.95)
            updates = orthogonal(torch.stack([update.reshape(rows, columns) for update in looked_ahead]))
            torch._foreach_mul_(params, 1 - lr * decay)
            updates = [update.reshape(p.shape) for update, p in zip(updates, params)]
            torch._foreach_add_(params, updates, alpha=-lr * 0.2 * max(rows, columns) ** 0.5)

    def _adamw(self, seen, lr, decay):
        for p in seen:
            n, mean, square = (self.state[p][key] for key in ("step", "mean", "square"))
            mean.lerp_(p.grad, 0.1)
            square.lerp_(p.grad.square(), 0.01)
            root = (square / (1 - 0.99**n)).sqrt_().add_(1e-8)
            p.addcdiv_(mean, root, value=-lr / (1 - 0.9**n))
