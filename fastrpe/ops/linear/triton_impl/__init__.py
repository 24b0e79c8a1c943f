from .backward import linear_attention_bwd as linear_attention_bwd
from .forward import linear_attention as linear_attention
