from . import op as op
from .api import rotate as rotate
from .api import rotate_cos_sin as rotate_cos_sin
