from . import op as op
from .api import reflection_basis as reflection_basis
