"""DiffQKV attention: queries, keys and values of different sizes, keys the smallest, since they matter least.

Zhenghao Lin, Zihao Tang, Xiao Liu, Yeyun Gong, Yi Cheng, Qi Chen, Hang Li, Ying Xin, Ziyue Yang, Kailai Yang, Yu Yan,
Xiao Liang, Shuai Lu, Yiming Huang, Zheheng Luo, Lei Qu, Xuan Feng, Yaoxiang Wang, Yuqing Xia, Feiyang Chen, Yuting
Jiang, Yasen Hu, Hao Ni, Binyang Li, Guoshuai Zhao, Jui-Hao Chiang, Zhongxin Guo, Chen Lin, Kun Kuang, Wenjie Li, Yelong
Shen, Jian Jiao, Peng Cheng, Mao Yang: Sigma: Differential Rescaling of Query, Key and Value for Efficient Language
Models, 2025, arXiv:2501.13629.

Implemented: n_q query heads on n_k ≤ n_v ≤ n_q heads of keys and values, each shared by neighbouring query heads, on
`primitives.causal_attention`, whose cache then holds n_k d_k + n_v d_v numbers for a token; keys of fewer channels than
values as an option (`key_dim`); and augmented queries, made in a wider space (`query_hidden`):

    head_h = softmax_{j≤t}(⟨q_{t,h}, k_{j, h n_k / n_q}⟩ / √d_k) v_{j, h n_v / n_q},  y_t = W_o [head_1 … head_{n_q}]

With n_k = n_v, d_k = d_v and plain queries this is grouped-query attention.

Deviations and what is open:

- Augmented queries are ``W_2 silu(W_1 x)``: of their path we had only that it is wider (3072 for a width of 2048), so
  the activation and that it is one hidden layer are our reading.
- Keys of half the channels are projected up before the product in the paper. Here the queries have as few channels as
  the keys, since ``⟨q, U k⟩ = ⟨Uᵀ q, k⟩`` and queries have a projection already; rotations act on these channels.
- Values are not fetched selectively: every value is used.
- "1.5b" has the heads and the query path of the paper's example (32, 4 and 16 heads of 64 channels); layers, channel
  mixer and norms are our choice.
"""

import dataclasses

import jax
from flax import nnx

from primitives import cache_positions, causal_attention, rotary
from zoo.layers import LLAMA, MixerConfig, StackConfig, check_rotary, merge_heads, split_heads


class DiffQKVAttention(nnx.Module):
    """The mixer. Its state is a `primitives.AttentionState`."""

    def __init__(self, config: "DiffQKVAttentionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.heads, self.key_heads, self.value_heads = config.heads, config.key_heads, config.value_heads
        self.rotary = config.rotary
        value_dim = stack.width // config.heads
        key_dim = config.key_dim or value_dim
        hidden = config.query_hidden
        self.query_inner = None if hidden is None else stack.linear(hidden, rngs=rngs)
        self.query = stack.linear(config.heads * key_dim, inputs=hidden, rngs=rngs)
        self.key = stack.linear(config.key_heads * key_dim, rngs=rngs)
        self.value = stack.linear(config.value_heads * value_dim, rngs=rngs)
        self.output = stack.linear(stack.width, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        inner = x if self.query_inner is None else jax.nn.silu(self.query_inner(x))
        q, k = split_heads(self.query(inner), self.heads), split_heads(self.key(x), self.key_heads)
        v = split_heads(self.value(x), self.value_heads)
        if self.rotary:
            positions = cache_positions(segment_ids, state, *x.shape[:2])
            q, k = rotary(q, positions), rotary(k, positions)
        outputs, state = causal_attention(q, k, v, state=state, segment_ids=segment_ids)
        return self.output(merge_heads(outputs)), state


@dataclasses.dataclass(frozen=True)
class DiffQKVAttentionConfig(MixerConfig):
    """DiffQKV attention.

    Attributes:
        heads: Of queries.
        key_heads: A divisor of `value_heads`.
        value_heads: A divisor of `heads`.
        key_dim: Channels of a head of queries and keys; `None`: as many as of values, ``width / heads``.
        query_hidden: Size of the hidden layer of augmented queries; `None`: queries are a plain projection.
        rotary: Whether queries and keys are turned by their positions.
    """

    heads: int = 4
    key_heads: int = 1
    value_heads: int = 2
    key_dim: int | None = None
    query_hidden: int | None = None
    rotary: bool = True

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for heads that do not fit."""
        super().check(stack)
        if self.value_heads < 1 or self.heads % self.value_heads:
            raise ValueError(f"value_heads: expected a divisor of the {self.heads} heads, got {self.value_heads}")
        if self.key_heads < 1 or self.value_heads % self.key_heads:
            raise ValueError(f"key_heads: expected a divisor of the {self.value_heads} heads, got {self.key_heads}")
        for option in ("key_dim", "query_hidden"):
            if (size := getattr(self, option)) is not None and size < 1:
                raise ValueError(f"{option}: expected a positive number, got {size}")
        key_dim = self.key_dim or stack.width // self.heads
        if self.rotary:
            check_rotary(key_dim)

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> DiffQKVAttention:
        """One DiffQKV attention."""
        return DiffQKVAttention(self, stack, rngs=rngs)


_TINY = DiffQKVAttentionConfig(heads=4, key_heads=1, value_heads=2, key_dim=2, query_hidden=24)
_PAPER = DiffQKVAttentionConfig(heads=32, key_heads=4, value_heads=16, query_hidden=3072)
PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(_TINY,), hidden=32, **LLAMA),
    "1.5b": StackConfig(width=2048, layers=26, pattern=(_PAPER,), hidden=6144, scan=True, **LLAMA),
}
