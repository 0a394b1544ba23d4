"""Optimizers and the learning rate.

`learning_rate` is a pure function of images seen: nothing to save, nothing to restore. `build_optimizer` decides which
parameter goes where. Muon and the AdamW for the remaining parameters are one optimizer with one list of groups.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raev2.spec import AdamWSpec, MuonSpec, ScheduleSpec
from raev2.training import dist
from raev2.training.parallel import local, shard_like, whole


def learning_rate(schedule: ScheduleSpec, images_seen: int, total_images: int, batch_size: int = 0) -> float:
    """Learning rate of the step that starts after `images_seen` images.

    warm-up   lr * (images_seen + batch_size) / warmup_images, so that the first step is not lost
    constant  lr until decay_start_images (or the end of the warm-up, if later)
    decay     with p from 0 to 1 until decay_end_images (default: total_images), r = final_lr / lr:
              linear  lr * (1 - (1 - r) p)        cosine  lr * (r + (1 - r) (1 + cos(pi p)) / 2)
    then      final_lr
    """
    if images_seen < schedule.warmup_images:
        return schedule.lr * min(1.0, (images_seen + batch_size) / schedule.warmup_images)
    start = max(schedule.warmup_images, schedule.decay_start_images)
    end = total_images if schedule.decay_end_images is None else schedule.decay_end_images
    if images_seen <= start:
        return schedule.lr
    progress = min(1.0, (images_seen - start) / max(1, end - start))
    kept = 1 - progress if schedule.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.final_lr + (schedule.lr - schedule.final_lr) * kept


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(model: nn.Module, spec: AdamWSpec | MuonSpec, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a spec over the trained parameters of `model`."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(spec, AdamWSpec):
        return torch.optim.AdamW(
            trained.values(), lr=lr, betas=spec.betas, weight_decay=spec.weight_decay, eps=spec.eps, foreach=True
        )
    muon, adamw = muon_routing(trained, spec.routing)
    # Row counts of the matrices that a fused weight holds (`FusedLinear.splits`).
    splits = {f"{name}.weight": module.splits for name, module in model.named_modules() if hasattr(module, "splits")}
    matrices = [(trained[name], splits.get(name, (trained[name].shape[0],))) for name in muon]
    return Muon(matrices, [trained[name] for name in adamw], spec, lr)


def muon_routing(parameters: dict[str, nn.Parameter], routing: str) -> tuple[list[str], list[str]]:
    """Names for Muon and names for AdamW.

    hidden         Muon: matrices inside transformer blocks. AdamW: all the rest, that is embeddings, condition tokens,
                   time MLP, modulation, output layers, norms, biases
    all_matrices   Muon: every 2-D parameter, as RAEv2 does
    """
    hidden = routing == "hidden"
    muon = {name: value.ndim == 2 and (not hidden or "blocks." in name) for name, value in parameters.items()}
    return [name for name in parameters if muon[name]], [name for name in parameters if not muon[name]]


# Polar Express coefficients (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X, five iterations.
# Source: arXiv 2505.16932; values and the safety factor as in Dao-AILab/gram-newton-schulz.
_SAFETY = 1.05
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)


def orthogonalise(
    matrices: Float[Tensor, "S rows cols"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "S rows cols"]:
    """Replace the singular values of each matrix by values near 1; iterates in `dtype`, returns float32.

    Singular values in [0.003, 1] relative to the Frobenius norm come out in [0.846, 1.124].
    """
    x = matrices.float()
    transpose = x.shape[1] > x.shape[2]
    if transpose:
        x = x.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in _POLAR_EXPRESS:
        a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return (x.mT if transpose else x).float()


def fast_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where matrix products in it are fast, that is on a GPU and on CPUs with instructions for it."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the other parameters.

    Muon, per matrix P (rows, cols) with gradient G:
        M <- momentum * M + G;   U = G + momentum * M (nesterov) or M;   O = orthogonalise(U)
        P <- P * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(rows, cols)) * O
    so that elements change by about 0.2 lr on average, like AdamW, and one learning rate fits both.
    With several processes each orthogonalises its share of the matrices. `step` uses up the gradients.

    matrices   (parameter, row counts of the separate matrices it holds)
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, tuple[int, ...]]],
        others: Sequence[nn.Parameter],
        spec: MuonSpec,
        lr: float,
    ) -> None:
        groups: list[dict[str, Any]] = []
        by_splits: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter, splits in matrices:
            by_splits[splits].append(parameter)
        for splits, parameters in by_splits.items():
            groups.append({
                "params": parameters, "algorithm": "muon", "splits": splits, "momentum": spec.momentum,
                "nesterov": spec.nesterov, "weight_decay": spec.weight_decay,
            })  # fmt: skip
        if others:
            groups.append({
                "params": list(others), "algorithm": "adamw", "betas": spec.adamw.betas, "eps": spec.adamw.eps,
                "weight_decay": spec.adamw.weight_decay,
            })  # fmt: skip
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if parameters:
                update = self._muon_step if group["algorithm"] == "muon" else self._adamw_step
                update(group, parameters, gradients)

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        own_momenta, own_gradients = list(map(local, momenta)), list(map(local, gradients))
        torch._foreach_mul_(own_momenta, group["momentum"])
        torch._foreach_add_(own_momenta, own_gradients)
        if group["nesterov"]:
            torch._foreach_add_(own_gradients, own_momenta, alpha=group["momentum"])
        updates = gradients if group["nesterov"] else momenta

        # Matrices of one shape are orthogonalised together, each by one of the processes.
        parts = [part for update in updates for part in whole(update).split(group["splits"])]
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            by_shape[part.shape].append(i)
        for shape, members in by_shape.items():
            own = members[dist.rank() :: dist.world_size()]
            padding = [members[0]] * (-(-len(members) // dist.world_size()) - len(own))
            stacked = torch.stack([parts[i] for i in (*own, *padding)])
            orthogonal = dist.gather_rows(orthogonalise(stacked, fast_dtype(stacked.device)), len(members))
            for i, matrix in zip(members, orthogonal * (0.2 * math.sqrt(max(shape))), strict=True):
                parts[i] = matrix
        weights, matrices = list(map(local, parameters)), iter(parts)
        steps = [torch.cat([next(matrices) for _ in group["splits"]]) for _ in parameters]
        own_steps = [local(shard_like(step, parameter)) for step, parameter in zip(steps, parameters, strict=True)]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, own_steps, alpha=-group["lr"])

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter), step=torch.tensor(0.0)
                )
        states = [self.state[parameter] for parameter in parameters]
        means, squares = ([local(state[name]) for state in states] for name in ("mean", "square"))
        parameters, gradients = list(map(local, parameters)), list(map(local, gradients))
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # mean / (1 - beta1^n) / (sqrt(square / (1 - beta2^n)) + eps)
        counts = [int(step) for step in steps]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2**n) for n in counts])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(parameters, means, denominators, [-group["lr"] / (1 - beta1**n) for n in counts])
