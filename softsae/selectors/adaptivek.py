"""AdaptiveK (Yao et al. 2025, arXiv 2508.17320): more latents for what a linear probe takes for complex.

    s = clamp(w . (x - m) + b, 0, 10),   k_hat = k_min + sigmoid(6 (s / 10 - 1/2)) (k_max - k_min)
    latents = the round(k_hat) largest of relu(pre)

The paper's, as public summaries give it: these formulas (apart from m, the mean of the activations, which b
would take up), a probe fitted by ridge regression to complexity scores before training, then training with
the probe frozen, then a joint phase with the loss  L_SAE + gamma (L_probe + delta L_deviation),  gamma = 0.9,
delta between 0.01 and 0.5, L_SAE with an L1 term |f|_1 / |x|_2. The weight 0.005 of that and the joint phase
in the last tenth of the steps are our reading of the options that its code is called with; the code itself
comes without a licence and is not followed. In `published` mode the probe learns from these terms alone, as
we read them: a rounded k has no gradient. L_probe is over the samples of the fit; L_deviation, whose form and
schedule we do not know, is the mean squared change of a batch's scores and rises linearly from 0.

Ours: in `corrected` mode, the default, the probe learns in the joint phase as SoftSAE's estimator does, from
the reconstruction, through the gradient of soft top-k to k, and from the budget loss, which keeps the mean
k_hat at k. The scores are measured (softsae/complexity.py), where the paper has a language model judge the
text; the ridge weight is given and not cross-validated; the activations are normalised; k_min and k_max
follow k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softsae.complexity import TOP, check_scores, scored_samples
from softsae.config import AutoencoderConfig, TrainConfig
from softsae.losses import budget
from softsae.schedules import Phase
from softsae.selectors.contract import Selection, Selector
from softsae.sparse import Sparse, encode
from softtopk import SparseCode, hard_topk, soft_topk

STEEPNESS = 6.0  # of the sigmoid between the scores 0 and 10
HELD_OUT = 5  # one sample in so many measures R^2


class AdaptiveK(Selector):
    """latents = a * hard_topk(a, k_hat), a = relu(pre), k_hat from a linear probe.

    Parameters: w (d,) and b () of the probe. Buffers: mean (d,) of the activations it was fitted to;
    fitted_w, fitted_b, what w and b were then; r2 () of them on held-out samples, NaN until they are fitted
    or where all held-out scores are equal. With a probe_weight also the moments of the samples:
    covariance (d, d), moment (d,), the covariance with the scores, and their mean and variance, score (2,).
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.options = config.adaptivek
        self.w = nn.Parameter(torch.zeros(config.d))
        self.b = nn.Parameter(torch.tensor(TOP / 2))
        self.register_buffer("mean", torch.zeros(config.d))
        self.register_buffer("fitted_w", torch.zeros(config.d))
        self.register_buffer("fitted_b", torch.tensor(TOP / 2))
        self.register_buffer("r2", torch.tensor(torch.nan))
        self.x: Tensor | None = None  # of the last training pass, for its loss terms
        if self.options.probe_weight:
            self.register_buffer("covariance", torch.zeros(config.d, config.d))
            self.register_buffer("moment", torch.zeros(config.d))
            self.register_buffer("score", torch.tensor([TOP / 2, 0.0]))

    @classmethod
    def check(cls, config: AutoencoderConfig, source):
        check_scores(config.adaptivek, source)

    def prepare(self, sae, x: Tensor, source, seed: int) -> dict:
        """Fit the probe to samples of the source and their scores; its R^2 and what it was measured on."""
        samples, scores = scored_samples(self.options, x, source, seed)
        samples = sae.normalize(samples).double()
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        held, rest = order.to(samples.device).tensor_split([max(1, len(samples) // HELD_OUT)])
        weight = self.options.ridge * samples.pow(2).mean()  # the same whatever the normalisation
        mean, w, b, moments = ridge_regression(samples[rest], scores[rest], weight)
        r2 = determination(((samples[held] - mean) @ w + b).clamp(0, TOP), scores[held])
        for name, value in {"mean": mean, "w": w, "b": b, "fitted_w": w, "fitted_b": b, "r2": r2}.items():
            getattr(self, name).data.copy_(value)
        if self.options.probe_weight:
            for name, value in zip(("covariance", "moment", "score"), moments, strict=True):
                getattr(self, name).copy_(value)
        known = bool(r2.isfinite())
        return {"probe_r2": float(r2) if known else None, "fitted": len(rest), "held_out": len(held)}

    def scores(self, x: Tensor) -> Tensor:
        """The probe's scores (B,), before they are clamped to 0 ... 10, of normalised x (B, d)."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self.w.dtype) - self.mean) @ self.w + self.b

    def k_hat(self, x: Tensor) -> Tensor:
        """The budget (B,), not rounded, of normalised x (B, d)."""
        k_min, k_max = self.options.k_min, self.options.k_max
        share = torch.sigmoid(STEEPNESS * (self.scores(x).clamp(0, TOP) / TOP - 0.5))
        return k_min + share * (k_max - k_min)

    def forward(self, sae, x: Tensor, pre: Tensor, phase: Phase) -> Selection:
        a = torch.relu_(pre)  # [B, n]
        self.x = x if phase.step is not None else None
        learns = torch.is_grad_enabled() and self.learns_by_selection(phase)
        with torch.set_grad_enabled(learns):
            k_hat = self.k_hat(x)
        if learns:
            return Selection(a * soft_topk(a.detach(), k_hat, phase.alpha, hard=True), k_hat, a)
        if phase.learns == "decoder":
            a = a.detach()
        return Selection(a * hard_topk(a.detach(), k_hat), k_hat, a)

    def dense_only(self, phase: Phase) -> None:
        return None

    def sparse(self, sae, x: Tensor, phase: Phase, sparse: Sparse) -> Selection:
        self.x = x if phase.step is not None else None
        learns = torch.is_grad_enabled() and self.learns_by_selection(phase)
        with torch.set_grad_enabled(learns):
            k_hat = self.k_hat(x)
        if learns:
            code = encode(sae, x, sparse, k_hat, phase.alpha, hard=True, selection_gradient=0.0)
            return Selection(code, k_hat)
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase.learns != "decoder"):
            return Selection(encode(sae, x, sparse, k_hat.detach()), k_hat)

    def most_active(self) -> float:
        return self.options.k_max

    def learns_by_selection(self, phase: Phase) -> bool:
        return phase.step is not None and phase.learns == "all" and self.options.selection_gradient

    def loss_terms(self, sae, target: Tensor, selection: Selection, phase: Phase) -> dict[str, Tensor]:
        terms = {}
        if self.x is None:
            return terms
        x, self.x = self.x, None
        if self.options.l1_weight:
            norm = target.norm(dim=1).clamp(min=torch.finfo(target.dtype).tiny)
            f = selection.latents
            terms["l1"] = ((f.values if isinstance(f, SparseCode) else f).sum(1) / norm).mean()
        if phase.learns != "all":
            return terms
        if self.options.selection_gradient:
            terms["budget"] = budget(selection.k_hat, phase.k_target, phase.softplus_beta)
        with torch.autocast(x.device.type, enabled=False):
            if self.options.probe_weight:
                terms["probe"] = self.probe_loss()
            if self.options.deviation_weight:
                terms["deviation"] = self.deviation_loss(x)
        return terms

    def probe_loss(self) -> Tensor:
        """The mean squared error of the scores over the samples that the probe was fitted to."""
        score, variance = self.score
        squares = self.w @ self.covariance @ self.w - 2 * self.w @ self.moment + variance
        return squares + (self.b - score).pow(2)

    def deviation_loss(self, x: Tensor) -> Tensor:
        """The mean squared change, since the probe was fitted, of the scores of x (B, d)."""
        change = (x - self.mean) @ (self.w - self.fitted_w) + (self.b - self.fitted_b)
        return change.pow(2).mean()

    def loss_weights(self, train: TrainConfig, square_norm: float, step: int) -> dict[str, float]:
        options = self.options
        first = options.joint_from * train.steps
        rise = min(1.0, max(0.0, (step + 1 - first) / max(train.steps - first, 1.0)))
        return {
            "l1": options.l1_weight * square_norm,
            "budget": train.budget_weight,
            "probe": options.probe_weight * square_norm,
            "deviation": options.deviation_weight * square_norm * rise,
        }

    def estimator_parameters(self) -> list[nn.Parameter]:
        return [self.w, self.b]


def ridge_regression(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """The minimum of sum_i (y_i - w . (x_i - mean) - b)^2 + weight |w|^2 for x (N, d), y (N,) in float64.

    Returns mean (d,) of x, w (d,), b (), and the moments: covariance (d, d) of x, (d,) of x and y, and mean
    and variance (2,) of y.
    """
    mean, b = x.mean(0), y.mean()
    x, y = x - mean, y - b
    covariance, moment = x.T @ x / len(x), x.T @ y / len(x)
    penalty = weight / len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(covariance + penalty, moment)
    return mean, w, b, (covariance, moment, torch.stack([b, y.pow(2).mean()]))


def determination(predicted: Tensor, y: Tensor) -> Tensor:
    """R^2 = 1 - sum (y - predicted)^2 / sum (y - mean y)^2 of y (N,), NaN where y is constant."""
    total = (y - y.mean()).pow(2).sum()
    return torch.where(total > 0, 1 - (y - predicted).pow(2).sum() / total, torch.nan)
