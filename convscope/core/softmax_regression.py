"""L2-regularised softmax regression along a path of regularisation strengths, each to its optimum.

The objective is that of scikit-learn's `LogisticRegression` divided by C N: mean cross-entropy + |W|^2 / (2 C N),
biases free. Of two classes, where scikit-learn has one vector, the penalty counts twice, and so the classifier is the
same. It is minimised by L-BFGS (Nocedal & Wright 2006, algorithm 7.4). What makes a sweep over C cheap:

- The inverse Hessian starts as (M x S + 1 / (C N))^-1, a Kronecker product inverted by two eigendecompositions: M is
  the mean of diag(p) - p p^T over samples with class shares p, and S the covariance of the features, where a sample
  weighs 1 - |p|^2. Both are of the point where a value of C starts; a bias makes up for the mean of the features.
- C ascends, and the solutions at the last values of C, continued along log C, start the next one. The curvature pairs
  go along: between two values of C the Hessian differs by a multiple of the identity, which is added to them exactly.
- Products are in float32 until that is good enough to stop, then in float64 until float64 says so too.

One value of C at a time needs some 5 to 10 gradients; all of them at once, each from zero, would need 100 or more.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.core.errors import UserError

HISTORY = 20  # curvature pairs
SUFFICIENT = 1e-4  # share of the decrease promised by the slope that a step has to bring (Armijo)
SHORTENINGS = {torch.float32: 3, torch.float64: 30}  # of a step, after which there is only rounding to gain
ROUNDING = {torch.float32: 1e-8, torch.float64: 1e-15}  # of the objective
LEAST_LOSS = 1e-2  # the tolerance is relative to the objective, or to this where the objective is smaller
REFRESH = 1.5  # change of the samples' mean weight after which the features' covariance is computed anew
SAMPLES = 8  # of it for each dimension
ENTRIES = 2**18  # logits held at a time on a CPU, where they stay in the cache; 256 times as many elsewhere
NEGLIGIBLE = 1e-20  # shares below count as 0 in float32: denormal numbers make a matrix product six times slower

Pair = tuple[Tensor, Tensor]  # a step and the change of the gradient, (K, D+1) each


@dataclass(frozen=True)
class Solution:
    """The classifier at one C."""

    weight: Tensor  # (K, D) float64
    bias: Tensor  # (K,)
    loss: float  # mean cross-entropy + |W|^2 / (2 C N)
    evaluations: int  # of the gradient, in float32 and float64 together
    converged: bool

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) of any floating type -> (N, K) float64."""
        return torch.addmm(self.bias, x.double(), self.weight.T)


@dataclass(frozen=True)
class _Point:
    """Objective and gradient at theta."""

    theta: Tensor  # (K, D+1): weights, and the bias in the last column
    loss: float
    gradient: Tensor  # (K, D+1)


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues and, in columns, eigenvectors of the covariance of weighted features."""

    mean: Tensor  # (D,)
    values: Tensor  # (D,)
    axes: Tensor  # (D, D)
    level: float  # mean weight of the samples


class _Curvature:
    """The approximate Hessian of the objective at one point.

    Args:
        between: mean of diag(p) - p p^T, (K, K).
        features: of the samples weighted by 1 - |p|^2.
        decay: of the weights.
    """

    def __init__(self, between: Tensor, features: _Spectrum, decay: float) -> None:
        self.features = features
        values, self.axes = torch.linalg.eigh(between)
        values = values.clamp_min(0)[:, None]
        self.scale = values * features.values + decay  # (K, D)
        # Equal biases for all classes change nothing: that direction stays as it is.
        self.bias_scale = torch.where(values > 1e-9 * values.max(), values, float("inf"))  # (K, 1)

    def solve(self, gradient: Tensor) -> Tensor:
        """The inverse applied to (K, D+1)."""
        mean, axes = self.features.mean, self.features.axes
        bias = gradient[:, -1:]
        inner = self.axes.T @ (gradient[:, :-1] - bias * mean) @ axes / self.scale
        weight = self.axes @ inner @ axes.T
        level = self.axes @ ((self.axes.T @ bias) / self.bias_scale)
        return torch.cat([weight, level - (weight @ mean)[:, None]], 1)


def softmax_regression(
    x: Tensor,
    y: Tensor,
    classes: int,
    strengths: Sequence[float],
    *,
    tol: float = 1e-8,
    max_steps: int = 1000,
    start: Solution | None = None,
) -> Iterator[Solution]:
    """The optimum for every C, in the order given; each value starts from those before it, so let them ascend.

    Args:
        x: features (N, D) of any floating type, on the device that computes.
        y: classes (N,), each of 0 ... K-1; every class must occur.
        classes: their number K.
        strengths: values of C above 0.
        tol: stop when the last step lowered the objective, and the next one promises to lower it, by no more than tol
            times the objective, or times 0.01 where it is smaller than that, as for separable classes and a large C.
        max_steps: most steps in each precision; a solution that needed more says so.
        start: a solution near the first one.

    Raises:
        UserError: features that are not finite, or a class without a sample.
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError("features contain NaN or infinity; a logistic regression cannot use them")
    if len(absent := torch.nonzero(torch.bincount(y, minlength=classes) == 0)):
        raise UserError(f"class {int(absent[0])} has no train sample; a logistic regression needs one of every class")
    return _path(_Problem(x, y, classes), strengths, tol, max_steps, start)


def _path(
    problem: "_Problem", strengths: Sequence[float], tol: float, max_steps: int, start: Solution | None
) -> Iterator[Solution]:
    known: list[tuple[float, Tensor]] = []  # log C and theta of the last three
    pairs: list[Pair] = []
    decay = 0.0
    for strength in strengths:
        before, decay = decay, (2 if problem.classes == 2 else 1) / (strength * problem.count)
        for step, change in pairs:
            change[:, :-1] += (decay - before) * step[:, :-1]
        place = math.log(strength)
        theta = _continue(known, place) if known else problem.origin(start)
        solver = _Solver(problem, problem.curvature(theta, decay), decay, pairs, tol)
        single, _ = solver.minimise(theta, torch.float32, max_steps)
        point, converged = solver.minimise(single.theta, torch.float64, max_steps)
        known = [*[one for one in known if one[0] != place][-2:], (place, point.theta)]
        weight = point.theta[:, :-1]
        bias = point.theta[:, -1] - weight @ problem.mean
        yield Solution(weight, bias, point.loss, solver.evaluations, converged)


def _continue(known: Sequence[tuple[float, Tensor]], place: float) -> Tensor:
    """Lagrange's polynomial through theta at the known values of log C, at `place`."""
    total = torch.zeros_like(known[0][1])
    for i, (own, theta) in enumerate(known):
        factor = 1.0
        for j, (other, _) in enumerate(known):
            if i != j:
                factor *= (place - other) / (own - other)
        total += factor * theta
    return total


class _Problem:
    """Cross-entropy of centred features."""

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        self.y, self.classes, self.count = y, classes, len(x)
        self.mean = x.mean(0, dtype=torch.float64)
        centred = x.double() - self.mean
        self.x = {torch.float64: centred, torch.float32: centred.float()}
        self.spectrum: _Spectrum | None = None

    def origin(self, start: Solution | None) -> Tensor:
        """Where a path starts, (K, D+1)."""
        if start is None:
            return self.mean.new_zeros(self.classes, len(self.mean) + 1)
        return torch.cat([start.weight, (start.bias + start.weight @ self.mean)[:, None]], 1)

    def evaluate(self, theta: Tensor, decay: float, dtype: torch.dtype) -> _Point:
        """Objective and gradient at theta, with products in `dtype` and sums in float64.

        The share of the true class minus one is minus the sum of the others, which is exact where it is small.
        """
        x, weight, bias = self.x[dtype], theta[:, :-1].to(dtype), theta[:, -1].to(dtype)
        rows = self._rows()
        slope, level = torch.zeros_like(weight), theta.new_zeros(self.classes)
        loss = theta.new_zeros(())
        for part, truth in zip(torch.split(x, rows), torch.split(self.y[:, None], rows)):
            logits = torch.addmm(bias, part, weight.T)  # (n, K)
            behind = logits.amax(1) - logits.gather(1, truth)[:, 0]
            share = torch.softmax(logits, 1).scatter_(1, truth, 0.0)
            wrong = share.sum(1)
            highest = torch.maximum(share.amax(1), 1 - wrong)
            few = -torch.log1p(-wrong.clamp_max(0.5))
            loss += torch.where(wrong < 0.5, few, behind - highest.log()).double().sum()
            if dtype == torch.float32:
                torch.threshold_(share, NEGLIGIBLE, 0.0)
            share.scatter_(1, truth, -wrong[:, None])
            slope.addmm_(share.T, part)
            level += share.sum(0)
        gradient = torch.cat([slope.double(), level[:, None]], 1) / self.count
        gradient[:, :-1] += decay * theta[:, :-1]
        objective = loss / self.count + 0.5 * decay * theta[:, :-1].square().sum()
        return _Point(theta, float(objective), gradient)

    def curvature(self, theta: Tensor, decay: float) -> _Curvature:
        """The approximate Hessian at theta; features are weighed anew where the mean weight has changed enough."""
        x, weight, bias = self.x[torch.float32], theta[:, :-1].float(), theta[:, -1].float()
        between, unsure = theta.new_zeros(self.classes, self.classes), []
        for part in torch.split(x, self._rows()):
            share = torch.softmax(torch.addmm(bias, part, weight.T), 1)
            torch.threshold_(share, NEGLIGIBLE, 0.0)
            between += torch.diag(share.sum(0)) - share.T @ share
            unsure.append((share * (1 - share)).sum(1))
        weights = torch.cat(unsure)
        level = max(float(weights.double().mean()), 1e-12)
        if self.spectrum is None or not 1 / REFRESH < level / self.spectrum.level < REFRESH:
            self.spectrum = self._weigh(weights.clamp_min(1e-12), level)
        return _Curvature(between / self.count, self.spectrum, decay)

    def _weigh(self, weights: Tensor, level: float) -> _Spectrum:
        """The covariance of the samples that weigh most, as many as it needs."""
        most = weights.topk(min(self.count, SAMPLES * self.x[torch.float32].shape[1] + 1000))
        x, share = self.x[torch.float32][most.indices], most.values / most.values.sum()
        mean = share @ x
        spread = (x - mean) * share.sqrt()[:, None]
        values, axes = torch.linalg.eigh((spread.T @ spread).double())
        return _Spectrum(mean.double(), values.clamp_min(0), axes, level)

    def _rows(self) -> int:
        """Samples whose logits are held at a time."""
        on_cpu = self.mean.device.type == "cpu"
        return max(64, ENTRIES * (1 if on_cpu else 256) // self.classes)


class _Solver:
    """L-BFGS at one C. `pairs` are used and added to."""

    def __init__(self, problem: _Problem, curvature: _Curvature, decay: float, pairs: list[Pair], tol: float) -> None:
        self.problem, self.curvature, self.decay, self.pairs, self.tol = problem, curvature, decay, pairs, tol
        self.evaluations = 0
        self.gained = float("inf")  # by the last step

    def minimise(self, theta: Tensor, dtype: torch.dtype, max_steps: int) -> tuple[_Point, bool]:
        """The lowest point found from `theta` on, and whether it is within the tolerance."""
        point = self._evaluate(theta, dtype)
        for _ in range(max_steps):
            direction = self._direction(point)
            promised = -float((point.gradient * direction).sum())
            enough = self.tol * max(point.loss, LEAST_LOSS)
            if promised / 2 <= enough and self.gained <= enough:
                return point, True
            following = self._search(point, direction, promised, dtype)
            if following is None:  # only rounding is left to gain
                return point, promised / 2 <= enough
            self.gained = point.loss - following.loss
            step, change = following.theta - point.theta, following.gradient - point.gradient
            if float((step * change).sum()) > ROUNDING[dtype] * point.loss:
                self.pairs.append((step, change))
                del self.pairs[:-HISTORY]
            point = following
        return point, False

    def _evaluate(self, theta: Tensor, dtype: torch.dtype) -> _Point:
        self.evaluations += 1
        return self.problem.evaluate(theta, self.decay, dtype)

    def _search(self, point: _Point, direction: Tensor, promised: float, dtype: torch.dtype) -> _Point | None:
        """The full step, or a shorter one by quadratic interpolation until it lowers the objective enough."""
        length = 1.0
        for _ in range(SHORTENINGS[dtype]):
            trial = self._evaluate(point.theta + length * direction, dtype)
            if trial.loss <= point.loss - SUFFICIENT * length * promised + ROUNDING[dtype] * point.loss:
                return trial
            bend = trial.loss - point.loss + length * promised
            length *= min(0.5, max(0.1, 0.5 * length * promised / bend)) if bend > 0 else 0.1
        return None

    def _direction(self, point: _Point) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient, by the two-loop recursion."""
        q, factors = point.gradient.clone(), []
        usable = [(step, change, dot) for step, change in self.pairs if (dot := float((step * change).sum())) > 0]
        for step, change, dot in reversed(usable):
            factors.append(float((step * q).sum()) / dot)
            q.sub_(change, alpha=factors[-1])
        q = self.curvature.solve(q)
        if usable:
            _, change, dot = usable[-1]
            q *= dot / float((change * self.curvature.solve(change)).sum())
        for (step, change, dot), factor in zip(usable, reversed(factors)):
            q.add_(step, alpha=factor - float((change * q).sum()) / dot)
        return -q
