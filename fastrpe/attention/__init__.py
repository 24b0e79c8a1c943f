from .attention import Attention as Attention
from .cache import KVCache as KVCache
from .cache import LinearCache as LinearCache
from .multihead import MultiheadAttention as MultiheadAttention
from .performer import Performer as Performer
from .softmax import Softmax as Softmax
