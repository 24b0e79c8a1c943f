"""Feature maps of one formula: Performers' of the softmax kernel, and ReLU, exp and ELU."""

from typing import Any

from .feature_map import FeatureMap


class PositiveFeatures(FeatureMap):
    r"""Positive features of FAVOR+: unbiased, and accurate where the kernel is small.

    .. math:: \phi(x) = M^{-1/2} \exp(W x - |x|^2 / 2), \qquad x = q D^{-1/4}

    The arguments are those of `FeatureMap`.

    Source:
        Performers (arXiv 2009.14794) lemma 1.
    """

    kind = "positive"


class HyperbolicFeatures(FeatureMap):
    r"""Positive features of W and -W: 2 M features, with less variance than 2 M positive ones.

    .. math:: \phi(x) = (2 M)^{-1/2} \exp(-|x|^2 / 2) \, [\exp(W x), \exp(-W x)], \qquad x = q D^{-1/4}

    The arguments are those of `FeatureMap`.

    Source:
        Performers (arXiv 2009.14794) lemma 1.
    """

    kind = "hyperbolic"


class TrigonometricFeatures(FeatureMap):
    r"""Random Fourier features: unbiased, accurate where the kernel is large; their products may be negative.

    .. math:: \phi(x) = M^{-1/2} \exp(|x|^2 / 2) \, [\cos W x, \sin W x], \qquad x = q D^{-1/4}

    The arguments are those of `FeatureMap`, with ``eps`` 0.

    Source:
        Performers (arXiv 2009.14794) section 2.3.
    """

    kind = "trigonometric"


class ReLUFeatures(FeatureMap):
    r"""Performer-ReLU.

    .. math:: \phi(x) = \mathrm{relu}(W x) + \epsilon

    Of x itself where ``num_features`` is None, the default. The other arguments are those of `FeatureMap`.

    Source:
        Performers (arXiv 2009.14794) section 4.3, generalized attention.
    """

    kind = "relu"

    def __init__(self, head_dim: int, num_features: int | None = None, *, eps: float = 1e-3, **options: Any) -> None:
        super().__init__(head_dim, num_features, eps=eps, **options)


class ExpFeatures(FeatureMap):
    r"""Performer-exp: deterministic where ``num_features`` is None, the default.

    .. math:: \phi(x) = \exp(W x) + \epsilon

    The other arguments are those of `FeatureMap`.

    Source:
        Performers (arXiv 2009.14794) section 4.3, generalized attention.
    """

    kind = "exp"

    def __init__(self, head_dim: int, num_features: int | None = None, **options: Any) -> None:
        super().__init__(head_dim, num_features, **options)


class EluFeatures(FeatureMap):
    r"""The features of linear transformers.

    .. math:: \phi(x) = \mathrm{elu}(W x) + 1

    Of x itself where ``num_features`` is None, the default. The other arguments are those of `FeatureMap`.

    Source:
        Transformers are RNNs (arXiv 2006.16236) eq. 7.
    """

    kind = "elu"

    def __init__(self, head_dim: int, num_features: int | None = None, **options: Any) -> None:
        super().__init__(head_dim, num_features, **options)
