from . import op as op
from .api import fwht as fwht
from .api import random_features as random_features
