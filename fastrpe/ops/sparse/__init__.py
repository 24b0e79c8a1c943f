from . import op as op
from .api import sparse_cayley as sparse_cayley
