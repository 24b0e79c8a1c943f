from .attention import Attention as Attention
from .cache import KVCache as KVCache
from .multihead import MultiheadAttention as MultiheadAttention
from .softmax import Softmax as Softmax
