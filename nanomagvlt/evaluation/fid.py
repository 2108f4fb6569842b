"""Appendix - The field's measures of images: FID, the Inception Score and the CLIP score, from features alone.

Nobody can judge 30,000 drawings exactly as shapes.py judges its own. So the field has networks look at them, those of
inception.py and clip.py, and compares what they saw. No network is touched here: these are a few formulas over
features, in float64, as they stream by.

FID (Heusel et al., NeurIPS 2017) takes the features of drawings and of photographs for two normal distributions, and
says how far one must be moved to be the other. The Inception Score (Salimans et al., NeurIPS 2016) is high where each
image is clearly of one class and all classes occur. The CLIP score says how well an image and its text go together.

Shapes: B a batch, M all images, D features, E CLIP's features, C classes.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Moments:
    """The mean and the covariance of features that come in batches, without keeping them. In float64.

    Sums of squares, with the mean taken out at the end, would lose the digits that matter; so the mean is taken out
    of each batch, and what is known of two sets gives what is known of both (Chan, Golub and LeVeque 1979).
    """

    def __init__(self):
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)                       # (D,) after the first batch
        self.scatter = torch.zeros((), dtype=torch.float64)                    # (D, D): sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Takes in features (B, D), any number at once. Raises ValueError where one of them is not a number."""
        if not features.isfinite().all():
            raise ValueError("features that are infinite or not a number: are the images and the weights right?")
        for batch in features.cpu().split(1024):                               # little memory, however many there are
            batch = batch.double()
            mean = batch.mean(0)
            centred = batch - mean
            self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Takes in all that another has seen: the moments of parts, of several processes say, give those of all."""
        self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        if self.count and len(mean) != len(self.mean):
            raise ValueError(f"{len(mean)} features an image, after images with {len(self.mean)}")
        total, apart = self.count + count, mean - self.mean                    # apart: (D,)
        between = torch.outer(apart, apart * (self.count * count / total))
        self.scatter = between.add_(self.scatter).add_(scatter)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def to_dict(self) -> dict[str, int | Tensor]:
        """All there is to it, to be kept in a file; Moments.from_dict() takes it."""
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_dict(cls, content: dict[str, int | Tensor]) -> "Moments":
        moments = cls()
        moments.count, moments.mean, moments.scatter = (content[name] for name in ("count", "mean", "scatter"))
        return moments

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased. Raises ValueError where there are fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance wants two images or more, not {self.count}")
        return self.scatter / (self.count - 1)


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance (D, D); what rounding made negative of its eigenvalues counts as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID, where the features are Inception's: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2): no root of a matrix that
    is not symmetric is needed, and nothing is added to the covariances to make it exist.
    Raises ValueError where there are no more images than features: the covariances are then mostly made up.
    """
    if len(a.mean.shape) != 1 or a.mean.shape != b.mean.shape:
        raise ValueError("a distance is between features of one kind, and of both there must be some")
    if min(a.count, b.count) <= len(a.mean):
        raise ValueError(f"a Frechet distance over {len(a.mean):,} features wants more images than that on both sides, "
                         f"not {a.count:,} and {b.count:,}")
    s_a, s_b = a.covariance, b.covariance                                                        # (D, D) each
    common = torch.linalg.svdvals(root(s_a) @ root(s_b)).sum()
    distance = (a.mean - b.mean).square().sum() + s_a.trace() + s_b.trace() - 2 * common
    return max(0.0, float(distance))                                           # rounding may take a hair more than all


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y | x) || p(y))), by logits (M, C) of Inception.logits(): mean and standard deviation over splits.

    The splits are consecutive, as in the authors' code: images that come ordered by class want shuffling first.
    Raises ValueError where there are fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception Score over {splits} splits wants as many images, not {len(logits)}")
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, end in zip(edges, edges[1:]):
        log_p = logits[start:end].double().log_softmax(1)                      # (M / splits, C): log p(y | x)
        log_mean = log_p.logsumexp(0) - math.log(end - start)                  # (C,): log p(y)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """100 max(cos, 0), averaged over pairs: features (M, E) of images and, row by row, of their texts.

    Hessel et al. (EMNLP 2021) have 2.5 in place of 100; papers that give 0.32, as MAGVLT's does, mean the cosine.
    Raises ValueError where the rows are no pairs.
    """
    if image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(f"no pairs: features {tuple(image_features.shape)} and {tuple(text_features.shape)}")
    return float(100 * F.cosine_similarity(image_features.double(), text_features.double()).clamp(min=0).mean())
