"""Feature maps of linear attention: modules that turn (q, k) into (phi_q, phi_k), and their random projections."""

from .feature_map import FeatureMap as FeatureMap
from .feature_map import step as step
from .features import EluFeatures as EluFeatures
from .features import ExpFeatures as ExpFeatures
from .features import HyperbolicFeatures as HyperbolicFeatures
from .features import PositiveFeatures as PositiveFeatures
from .features import ReLUFeatures as ReLUFeatures
from .features import TrigonometricFeatures as TrigonometricFeatures
from .hybrid import HybridFeatures as HybridFeatures
from .learnable import LearnableFeatures as LearnableFeatures
from .masked import MaskedFeatures as MaskedFeatures
from .oprf import SADERF as SADERF
from .oprf import OPRFFeatures as OPRFFeatures
from .oprf import optimal_a as optimal_a
