"""TNL, and Lightning Attention, the algorithm of blocks that computes its linear attention in time linear in length.

Zhen Qin, Weigao Sun, Dong Li, Xuyang Shen, Weixuan Sun, Yiran Zhong: Various Lengths, Constant Speed: Efficient
Language Modeling with Lightning Attention, 2024, arXiv:2405.17381 (TNL); and, by the same authors, for the algorithm:
Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models, 2024,
arXiv:2401.04658.

The attention is that of TransNormerLLM, with a constant decay λ for each head. For a block of B tokens i = 0 … B − 1,
M_ij = λ^{i−j} for j ≤ i, diagonal Λ_q = λ^{i+1} and Λ_k = λ^{B−1−i}, and the memory S that enters the block

    O = [(Q Kᵀ) ⊙ M] V + Λ_q Q S          S ← λ^B S + (Λ_k K)ᵀ V

and, for gradients, from the last block to the first, with the cotangent dS of the memory that leaves the block

    dQ = [(dO Vᵀ) ⊙ M] K + Λ_q dO Sᵀ
    dK = [(dO Vᵀ) ⊙ M]ᵀ Q + Λ_k V dSᵀ
    dV = [(Q Kᵀ) ⊙ M]ᵀ dO + Λ_k K dS      dS ← λ^B dS + (Λ_q Q)ᵀ dO

`primitives.linear_attention` in its chunked form is this, for decays that change over time as well; a test holds it
against these equations, for several blocks. Lightning Attention-1, of the TransNormerLLM paper, tiles the left product
[(Q Kᵀ) ⊙ M] V alone, over the whole length, which is still O(n²); its result is the same attention, so it has no code
of its own here. The model is `zoo.token_mixers.transnormer_llm`, whose docstring has its equations: as far as we know
TNL has the same mixer, LRPE-d in the first layer and the decay in all, SRMSNorm, SGLU.

Deviations: those of `zoo.token_mixers.transnormer_llm`. The tiles are XLA's: no kernel keeps a block in the fast memory
of an accelerator. Presets are those of TransNormerLLM at the sizes to which TNL was trained, except 15B, of which
released notes say 42 layers, width 5120, 40 heads and 14.83 billion parameters, but not `hidden`.
"""

from zoo.token_mixers import transnormer_llm

PRESETS = {size: transnormer_llm.PRESETS[size] for size in ("tiny", "385m", "1b", "3b", "7b")}
