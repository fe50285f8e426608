"""Miras: memories with other errors and other ways to retain.

Ali Behrouz, Meisam Razaviyayn, Peilin Zhong, Vahab Mirrokni: It's All Connected: A Journey Through Test-Time
Memorization, Attentional Bias, Retention, and Online Optimization, 2025, arXiv:2504.13173.

A memory is four choices: its architecture, the attentional bias ℓ, the retention, the optimiser. Implemented are the
paper's three models, as options of `zoo.token_mixers.titans.Memory`, whose block they share. All have the memory
``M(x) = x + LN(W_1 gelu(W_2 x))``, gradient descent without momentum, and decays α for each token:

    Moneta  ℓ = ‖M(k) − v‖₃³,                        A_t = α_t A_{t−1} − η_t ∇ℓ(W_{t'}),  W_t = A_t / ‖A_t‖₄²
    Yaad    ℓ = Huber's of ‖M(k) − v‖, threshold δ_t, W_t = α_t W_{t−1} − η_t ∇ℓ(W_{t'})
    Memora  ℓ = ‖M(k) − v‖²,                          W_t = softmax(α_t log W_{t−1} − η_t ∇ℓ(W_{t'}))

Deviations and what is left open (we had notes on the paper and its abstract, not its text):

- α, η and δ are one for each head and token; the paper's are one for each channel, through a projection of low rank.
- The layer norm in M has no weights.
- Powers of the absolute value are as they are; the notes smooth sign and absolute value. The threshold of Huber's error
  is on the norm of the error, with r² below it (`primitives.huber_error`).
- Memora's softmax is over the inputs of each output and has sums of √(size of a head), which makes its weights as
  spread as normal ones of the usual variance. Initial weights are logarithms.
- The notes apply norm and softmax at the ends of intervals only. So do Moneta and Memora here, which read the weights
  of those (``read="after_interval"``), in intervals that the convolution spans. Read after each token they are retained
  with all gradients before it, token by token.
- Moneta's steps are the smallest: gradients of cubes are large, and ‖A‖ in the denominator makes them larger.
- Rotary positions, which the notes name for the block, are not here: a memory has none.
- Presets: depth, width and heads of the notes; the channel mixer has 8/3 widths.
"""

from zoo.token_mixers.titans import MemoryConfig, presets

AT_ENDS = {"update_interval": 4, "read": "after_interval"}
MONETA = MemoryConfig(loss="power", retention="power_norm", momentum=False, max_step=0.01, **AT_ENDS)
YAAD = MemoryConfig(loss="huber", momentum=False)
MEMORA = MemoryConfig(retention="softmax", momentum=False, **AT_ENDS)

SIZES = {"170m": (768, 12), "340m": (1024, 24), "780m": (1536, 24)}
PRESETS = {
    "moneta": presets(MONETA, sizes=SIZES),
    "yaad": presets(YAAD, sizes=SIZES),
    "memora": presets(MEMORA, sizes=SIZES),
}
