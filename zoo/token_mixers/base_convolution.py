"""BaseConv: a projection of each token times a filter over the last few, the simplest gated convolution.

Simran Arora, Sabri Eyuboglu, Aman Timalsina, Isys Johnson, Michael Poli, James Zou, Atri Rudra, Christopher Ré:
Zoology: Measuring and Improving Recall in Efficient Language Models, 2023, arXiv:2312.04927.

Implemented: the operator BaseConv, for tokens u, a projection W and a causal filter h of each channel,

    y_t = (W u_t + b_1) ⊙ (Σ_{0≤j<taps} h_j ⊙ u_{t−j} + b_2)

The filter does not depend on the input: what lies `taps` tokens back or more is out of reach, and what is nearer is
combined at fixed distances. That is why the paper's task of recall asks for a width that grows with the sequence.

Deviations and what is left open (we had the equations and the authors' public code, not the paper's appendix):

- Filters are explicit, with a parameter for each tap. The paper's models alternate short filters (three taps) with long
  ones, as long as the sequence, which the code generates by a small network and applies by a Fourier transform. Neither
  is here. A long filter is a large `taps`: its cost is `taps` products for each token, and its state holds the
  ``taps − 1`` last tokens, so it is no recurrence of constant memory.
- The code adds u to y within the operator; here, as in the equation, only the block adds its input.
- Preset "mqar" has the sizes of the code's smallest model for that task, four layers of width 64 and no channel mixer,
  for sequences of 64 tokens. The paper's language models have sizes that we did not find.
"""

import dataclasses

from flax import nnx

from zoo.layers import MixerConfig, ShortConvolution, StackConfig


class BaseConvolution(nnx.Module):
    """The mixer. Its state is a `primitives.ShortConvolutionState`."""

    def __init__(self, config: "BaseConvolutionConfig", stack: StackConfig, *, rngs: nnx.Rngs):
        self.projection = stack.linear(stack.width, bias=True, rngs=rngs)
        self.convolution = ShortConvolution(
            stack.width, config.taps, activation="identity", bias=True, dtype=stack.dtype, rngs=rngs
        )

    def __call__(self, x, state=None, *, segment_ids=None, key=None):
        """Mix tokens ``[batch, time, width]``; nothing is random here."""
        local, state = self.convolution(x, state, segment_ids=segment_ids)
        return self.projection(x) * local, state


@dataclasses.dataclass(frozen=True)
class BaseConvolutionConfig(MixerConfig):
    """`taps`: tokens that the filter sees, its own among them."""

    taps: int = 3

    def check(self, stack: StackConfig) -> None:
        """Raise `ValueError` for a filter without taps."""
        if self.taps < 1:
            raise ValueError(f"taps: expected a positive number, got {self.taps}")

    def mixer(self, stack: StackConfig, layer: int, *, rngs: nnx.Rngs) -> BaseConvolution:
        """One BaseConv."""
        return BaseConvolution(self, stack, rngs=rngs)


PRESETS = {
    "tiny": StackConfig(width=16, layers=2, pattern=(BaseConvolutionConfig(),), hidden=32),
    "mqar": StackConfig(width=64, layers=4, pattern=(BaseConvolutionConfig(3), BaseConvolutionConfig(64)), hidden=0),
}
