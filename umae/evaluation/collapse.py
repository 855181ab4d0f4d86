"""Measures of collapse: pure functions of a feature matrix (N, D) of N images and D dimensions.

`FeatureStatistics` computes the same measures batch by batch. All compute in float64 on the CPU, return Python floats
and never NaN, and raise ValueError for anything but a matrix of finite numbers with at least one row and one column.
An image's direction is its row divided by its length; the direction of a row of zeros is zero, and its cosine with
every row, itself included, is 0.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize


def singular_values(features: torch.Tensor, center: bool = False) -> list[float]:
    """The spectrum: min(N, D) singular values, descending; with `center` of the features minus their mean row."""
    features = _checked(features)
    if center:
        features = features - features.mean(dim=0)
    # Eigenvalues of the Gram matrix would be faster, but lose all singular values below 1e-8 of the largest
    return torch.linalg.svdvals(features).tolist()


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007).

    From 1 (all rows on one line through zero) to min(N, D) (all singular values equal); 0 if all features are zero.
    RankMe (Garrido et al. 2023) is this number up to its epsilon.
    """
    return _entropy_rank(singular_values(features))


def _entropy_rank(values: Sequence[float]) -> float:
    total = sum(values)
    return math.exp(-sum(value / total * math.log(value / total) for value in values if value > 0)) if total else 0.0


def rankme(features: torch.Tensor, epsilon: float = 1e-7) -> float:
    """exp of the entropy of `singular value / their sum + epsilon` (RankMe, Garrido et al. 2023, equations 1 and 2)."""
    return _rankme(singular_values(features), epsilon)


def _rankme(values: Sequence[float], epsilon: float = 1e-7) -> float:
    shares = [value / (sum(values) or 1.0) + epsilon for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


def dead_dimensions(features: torch.Tensor, relative: float = 1e-6) -> int:
    """Number of dimensions whose standard deviation over the images is at most `relative` of the largest one: all D
    if all images have the same features."""
    return _dead(_checked(features).std(dim=0, correction=0), relative)


def _dead(deviations: torch.Tensor, relative: float = 1e-6) -> int:
    return int((deviations <= relative * deviations.max()).sum())


def uniformity(features: torch.Tensor) -> float:
    """Mean squared cosine over all N * N pairs, each image with itself included: U-MAE's loss (Zhang et al. 2022).

    From 1 / min(N, D) (directions evenly spread) to 1 (all on one line through zero).
    """
    return _second_moment(features).square().sum().item()


def participation_ratio(features: torch.Tensor) -> float:
    """sum(e)**2 / sum(e**2) over the eigenvalues e of the directions' second moment about zero, a (D, D) matrix.

    From 1 (all directions on one line through zero) to min(N, D) (evenly spread); 0 if all features are zero. It is
    1 / uniformity if no row is zero.
    """
    return _participation(_second_moment(features))


def _participation(moment: torch.Tensor) -> float:
    squares = moment.square().sum().item()  # of the eigenvalues; their sum is the trace
    return moment.trace().item() ** 2 / squares if squares else 0.0


def mean_cosine(features: torch.Tensor) -> float:
    """Mean cosine over all N * N pairs, each image with itself included: in [0, 1], 1 if all directions are equal.

    It equals the squared length of the mean direction.
    """
    return _directions(features).mean(dim=0).square().sum().item()


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance between the directions of paired rows (Wang & Isola 2020, with alpha = 2).

    From 0 (the same direction in each pair) to 4 (opposite directions).
    """
    if first.shape != second.shape:
        raise ValueError(f"features of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected paired rows")
    return (_directions(first) - _directions(second)).square().sum(dim=1).mean().item()


def mean_norm(features: torch.Tensor) -> float:
    """Mean length of the rows."""
    return torch.linalg.vector_norm(_checked(features), dim=1).mean().item()


# Measures of one matrix, by their names in metrics and reports
MEASURES = {
    "effective_rank": effective_rank,
    "rankme": rankme,
    "participation_ratio": participation_ratio,
    "uniformity": uniformity,
    "mean_cosine": mean_cosine,
    "feature_norm": mean_norm,
    "dead_dimensions": dead_dimensions,
}


class FeatureStatistics:
    """MEASURES of features that come batch by batch, in memory that does not grow with their number.

    It keeps the triangular factor of the QR decomposition of the N rows (min(N, D) rows of D numbers, with exactly the
    singular values of all rows), sums over their directions, and the mean and squared deviations of every dimension.
    """

    def __init__(self) -> None:
        self.count, self.norm_sum = 0, 0.0
        self.rows: list[torch.Tensor] = []  # the factor, and rows that are not in it yet
        self.direction_sum = self.moment_sum = self.mean = self.squared_deviations = torch.empty(0)

    def add(self, features: torch.Tensor) -> None:
        """Add rows: (images, D)."""
        rows = _checked(features)
        directions, count = _directions(rows), len(rows)
        if self.count == 0:
            width = rows.shape[1]
            self.direction_sum, self.mean, self.squared_deviations = torch.zeros(3, width, dtype=torch.float64)
            self.moment_sum = torch.zeros(width, width, dtype=torch.float64)
        self.norm_sum += torch.linalg.vector_norm(rows, dim=1).sum().item()
        self.direction_sum += directions.sum(dim=0)
        self.moment_sum += directions.T @ directions
        shift = rows.mean(dim=0) - self.mean  # combining two means: Chan, Golub & LeVeque 1983
        self.squared_deviations += (rows - rows.mean(dim=0)).square().sum(dim=0)
        self.squared_deviations += shift.square() * (self.count * count / (self.count + count))
        self.mean += shift * (count / (self.count + count))
        self.count += count
        self.rows.append(rows)
        if sum(map(len, self.rows)) >= 2 * rows.shape[1]:
            self.rows = [torch.linalg.qr(torch.cat(self.rows), mode="r").R]

    def singular_values(self) -> list[float]:
        """`singular_values` of all rows added so far."""
        return singular_values(torch.cat(self.rows)) if self.count else singular_values(torch.empty(0, 0))

    def measures(self) -> dict[str, float]:
        """MEASURES of all rows added so far. Raises `ValueError` if there are none."""
        values = self.singular_values()
        moment = self.moment_sum / self.count
        return {
            "effective_rank": _entropy_rank(values),
            "rankme": _rankme(values),
            "participation_ratio": _participation(moment),
            "uniformity": moment.square().sum().item(),
            "mean_cosine": (self.direction_sum / self.count).square().sum().item(),
            "feature_norm": self.norm_sum / self.count,
            "dead_dimensions": _dead((self.squared_deviations / self.count).sqrt()),
        }


def _checked(features: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features of shape {tuple(features.shape)}; expected (images, dimensions), both at least 1")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        count = (~features.isfinite()).sum().item()
        raise ValueError(f"{count} of {features.numel()} features are NaN or infinite; expected finite numbers")
    return features


def _directions(features: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(torch.float64).tiny  # the default epsilon would change rows shorter than 1e-12
    features = normalize(_checked(features), p=math.inf, eps=tiny)  # else the squares may overflow or underflow
    return normalize(features, eps=tiny)


def _second_moment(features: torch.Tensor) -> torch.Tensor:
    """(D, D), positive semi-definite; the sum of its squares is the mean of the squared (N, N) cosines."""
    directions = _directions(features)
    return directions.T @ directions / len(directions)
