"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for the rest."""

import torch


@torch.no_grad()
def orthogonal(update):
    """The nearest matrix with singular values near 1, by five steps of Newton and Schulz with Muon's coefficients."""
    x = update.reshape(update.shape[0], -1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).reshape(update.shape)


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
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                    if not group["muon"]:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                n, mean = state["step"], state["mean"]
                if group["muon"]:
                    p.mul_(1 - group["lr"] * group["decay"])
                    mean.lerp_(p.grad, 0.05)
                    update = orthogonal(p.grad.lerp(mean, 0.95))
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[0], p[0].numel()) ** 0.5)
                else:
                    mean.lerp_(p.grad, 0.1)
                    state["square"].lerp_(p.grad.square(), 0.01)
                    root = (state["square"] / (1 - 0.99**n)).sqrt_().add_(1e-8)
                    p.addcdiv_(mean, root, value=-group["lr"] / (1 - 0.9**n))
