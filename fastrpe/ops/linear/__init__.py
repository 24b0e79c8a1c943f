from . import op as op
from .api import State as State
from .api import linear_attention as linear_attention
from .api import linear_attention_step as linear_attention_step
