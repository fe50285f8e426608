"""TTT: hidden states that are models, trained by self-supervision on the tokens they see.

Yu Sun, Xinhao Li, Karan Dalal, Jiarui Xu, Arjun Vikram, Genghan Zhang, Yann Dubois, Xinlei Chen, Xiaolong Wang, Sanmi
Koyejo, Tatsunori Hashimoto, Carlos Guestrin: Learning to (Learn at Test Time): RNNs with Expressive Hidden States,
2024, arXiv:2407.04620.

Implemented are its two layers, as options of `zoo.token_mixers.titans.Memory`: gradient descent without momentum and
decay, in mini-batches of 16 tokens whose gradients are at the weights of the batch before,

    W_t = W_{t−1} − η_t ∇‖f(k_t; W_{t'}) − v_t‖²,  o_t = f(q_t; W_t),  η_t = max_step · σ(w x_t + b)
    TTT-Linear  f(x) = x + LN(W x)
    TTT-MLP     f(x) = x + LN(W_1 gelu(W_2 x)), four times as wide inside

Deviations (we had the abstract and others' accounts of the code): queries and keys are normalised, as in Titans; the
target is v itself and not its difference to k; the layer norm in f has no weights; convolutions, norm and output gate
are those of `Memory`, not the block of Mamba. Presets: 16 heads, depth and width of the Miras paper's comparison.
"""

from zoo.token_mixers.miras import SIZES
from zoo.token_mixers.titans import MemoryConfig, presets

TTT_LINEAR = MemoryConfig(depth=1, momentum=False, forgetting=False)
TTT_MLP = MemoryConfig(depth=2, momentum=False, forgetting=False)

PRESETS = {
    "ttt_linear": presets(TTT_LINEAR, sizes=SIZES),
    "ttt_mlp": presets(TTT_MLP, sizes=SIZES),
}
