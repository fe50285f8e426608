"""Causal depthwise convolution over the last few tokens: what recurrent mixers put in front of queries, keys, values.

Daniel Y. Fu, Tri Dao, Khaled K. Saab, Armin W. Thomas, Atri Rudra, Christopher Ré: Hungry Hungry Hippos, 2022,
arXiv:2212.14052, §3.1 (the shift SSM); Albert Gu, Tri Dao: Mamba, 2023, arXiv:2312.00752, §3.4, for the form that is
used since: a few taps for each channel.

The state is the last ``width − 1`` tokens of the document. Before its first token there are zeros, so that a document
needs no count of its tokens. Padding is left out, not taken for zeros: a token sees the tokens before it, however far
away they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from primitives import contract

IMPLEMENTATIONS = ("sequential", "parallel")


class ShortConvolutionState(NamedTuple):
    """The last ``width − 1`` tokens, the latest last. Float32 or wider."""

    inputs: Float[Array, "batch past dim"]  # zeros before the document's first token
    segment: Int[Array, " batch"]  # the last non-negative segment id


jax.export.register_namedtuple_serialization(ShortConvolutionState, serialized_name="primitives.ShortConvolutionState")


def short_convolution(
    x: Float[Array, "batch time dim"],
    weight: Float[Array, "width dim"],
    bias: Float[Array, " dim"] | None = None,
    *,
    state: ShortConvolutionState | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch time dim"], ShortConvolutionState]:
    """Each channel's own filter over the last `width` tokens (Mamba, §3.4, without its activation).

        y_t = bias + Σ_{0≤j<width} weight_j · x_{t−(width−1)+j}

    The last row of `weight` is that of the present token, as in the convolutions of PyTorch and XLA, which do not flip.
    A tap before the document's first token is zero.

    Args:
        x: Inputs.
        weight: The taps of each channel, the oldest first. A width of one is a scale, and a state without tokens.
        bias: Added to each token; none where `None`.
        state: The last tokens of what came before, or `None` for a fresh start.
        segment_ids: Documents packed in a row; no filter crosses a change of id. Negative ids are padding, with zero
            outputs and zero gradients, and are skipped: the token after them sees those before them. `None`: the
            carried document goes on, no padding.
        implementation: ``"sequential"`` (the definition, a scan over time), ``"parallel"`` (a sum of `width` shifted
            products; with segment ids the tokens are moved together for it), or `None`: parallel. One time step is one
            sum over the taps under every name. All support forward mode.

    Returns:
        Outputs in the dtype of `x`, and the state after the last token. Sums are float32 or wider.

    Raises:
        ValueError: Shapes that do not fit together, a length of zero, an unknown implementation.
        TypeError: Dtypes that are not floating point (x, weight, bias) or not integer (segment ids), a foreign state.
    """
    fields = contract.check_state(state, ShortConvolutionState, inputs="batch past dim", segment="batch")
    inputs, _ = fields.pop("state.inputs")
    sizes = contract.check_shapes(
        x=(x, "batch time dim"),
        weight=(weight, "width dim"),
        bias=(bias, "dim"),
        segment_ids=(segment_ids, "batch time"),
        **fields,
    )
    shape = sizes["batch"], sizes["width"] - 1, sizes["dim"]
    if inputs is not None and inputs.shape != shape:  # not in `check_shapes`, which refuses an axis of size zero
        raise ValueError(f"state.inputs: expected shape [batch, width - 1, dim] = {shape}, got {inputs.shape}")
    contract.check_floating(x=x, weight=weight, bias=bias)
    contract.check_segment_ids(segment_ids)
    contract.check_implementation(implementation, IMPLEMENTATIONS)

    arrays = [array for array in (x, weight, bias, inputs) if array is not None]
    dtype = contract.accumulation_dtype(*arrays)
    state = _fresh_state(x, segment_ids, shape) if state is None else state
    segments = contract.segments(segment_ids, state.segment)
    tokens = contract.mask_padding(x, segments.valid).astype(dtype)  # the gradient of a weight is no zero times NaN
    convolve = _step if x.shape[1] == 1 else _sequential if implementation == "sequential" else _parallel
    outputs, inputs = convolve(tokens, weight.astype(dtype), segments, state.inputs.astype(dtype))
    if bias is not None:
        outputs = outputs + bias.astype(dtype)
    outputs = contract.mask_padding(outputs, segments.valid)
    return outputs.astype(x.dtype), ShortConvolutionState(inputs, segments.last)


def _fresh_state(x, segment_ids, shape):
    zeros = contract.fresh_like(x[:, :1], 0)
    return ShortConvolutionState(jnp.broadcast_to(zeros, shape), contract.fresh_counter(segment_ids, x.shape[0]))


def _step(x, weight, segments, inputs):
    valid, reset, _ = segments
    before = inputs if reset is None else jnp.where(reset[:, :, None], 0, inputs)
    window = jnp.concatenate([before, x], axis=1)
    after = window[:, 1:] if valid is None else jnp.where(valid[:, :, None], window[:, 1:], inputs)
    return jnp.sum(window * weight, axis=1, keepdims=True), after


def _sequential(x, weight, segments, inputs):
    def step(inputs, token):
        x, valid, reset = jax.tree.map(lambda x: x[:, None], token)
        outputs, inputs = _step(x, weight, segments._replace(valid=valid, reset=reset), inputs)
        return inputs, outputs[:, 0]

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (x, segments.valid, segments.reset))
    inputs, outputs = lax.scan(step, inputs, tokens)
    return outputs.swapaxes(0, 1), inputs


def _parallel(x, weight, segments, inputs):
    time = x.shape[1]
    if segments.valid is None:
        row = jnp.concatenate([inputs, x], axis=1)
        return _shifted_sum(row, weight, time), row[:, time:]

    past = inputs.shape[1]
    index, start = (contract.fresh_like(segments.last, fill) for fill in (0, -past))  # a carried document fills `past`
    number, first = contract.count_tokens(segments, index, start, time)
    age = number - first  # tokens of the same document before this one
    slot = jnp.where(segments.valid, number, time + jnp.arange(time, dtype=number.dtype))  # none for padding
    row = jnp.concatenate([inputs, _scatter(x, slot)], axis=1)
    outputs = _gather(_shifted_sum(row, weight, time, _scatter(age, slot)), slot)
    last = jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, past))(row, number[:, -1] + 1)
    same_document = jnp.arange(past) >= past - 1 - age[:, -1:]
    return outputs, jnp.where(same_document[..., None], last, 0)


def _shifted_sum(row, weight, time, age=None):
    """Σ_j weight_j row_{t+j}: products that XLA fuses into one pass, with the taps in other documents left out."""
    outputs = 0
    for j, tap in enumerate(weight):
        shifted = row[:, j : j + time]
        if age is not None:
            shifted = jnp.where((age >= len(weight) - 1 - j)[..., None], shifted, 0)
        outputs = outputs + tap * shifted
    return outputs


@jax.vmap
def _scatter(rows, slot):
    return jnp.zeros_like(rows).at[slot].set(rows, mode="drop", unique_indices=True)


@jax.vmap
def _gather(rows, slot):
    return rows.at[slot].get(mode="fill", unique_indices=True, fill_value=0)
