from . import op as op
from .api import cayley_basis as cayley_basis
