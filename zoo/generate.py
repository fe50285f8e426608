"""Text from a language model: a prompt of any length, then token by token in a `lax.scan` with the state carried on.

The state of a recurrence does not grow; caches get room for the prompt and what follows, once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from primitives import contract
from zoo.models import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Int[Array, "batch time"],
    length: int,
    *,
    segment_ids: Int[Array, "batch time"] | None = None,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "batch length"]:
    """Continue every row of a prompt by `length` tokens.

    Compiled once for the shape of the prompt and the length when it is called under `jax.jit`, with `length`, `top_k`
    static.

    Args:
        model: A language model, or any module with its signature and `init_state`.
        prompt: Tokens, of any integer dtype. Rows of different lengths are padded, on any side.
        length: How many tokens to add.
        segment_ids: Negative at padding; the last document of each row is continued. `None`: no padding.
        key: Of the samples; `None` takes the likeliest token each time, and the options below are not used.
        temperature: Divides the logits, > 0.
        top_k: Sample among so many of the likeliest tokens.
        top_p: Sample among the likeliest tokens that have this share of the probability together, in (0, 1].

    Returns:
        The tokens that follow the prompt, int32.

    Raises:
        ValueError: A number out of its range, shapes that do not fit together, options of sampling without a key; a row
            of padding only, where that is known when the call is made; more tokens, padding counted, than a model with
            a learned table of positions has places for.
        TypeError: A prompt or segment ids that are not integers.
    """
    sizes = contract.check_shapes(prompt=(prompt, "batch time"), segment_ids=(segment_ids, "batch time"))
    _check_options(length, key, temperature, top_k, top_p)
    _check_places(model, sizes["time"] + length)
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt: expected an integer dtype, got {prompt.dtype}")
    contract.check_segment_ids(segment_ids)
    segment_ids = jnp.zeros_like(prompt, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    real = segment_ids >= 0
    if not isinstance(real, jax.core.Tracer) and not bool(jnp.all(jnp.any(real, axis=1))):
        raise ValueError("segment_ids: expected a token that is no padding in each row")
    last = sizes["time"] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    at_last = jnp.arange(sizes["batch"]), last
    logits, state = model(prompt, model.init_state(sizes["batch"], sizes["time"] + length), segment_ids=segment_ids)
    document = segment_ids[at_last][:, None]
    keys = None if key is None else jax.random.split(key, length)

    def choose(logits, key):
        if key is None:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, restrict(logits / temperature, top_k=top_k, top_p=top_p))

    def step(carry, key):
        logits, state = carry
        token = choose(logits, key).astype(jnp.int32)
        logits, state = model(token[:, None], state, segment_ids=document)
        return (logits[:, 0], state), token

    _, tokens = jax.lax.scan(step, (logits[at_last], state), keys, length=length)
    return tokens.T


def restrict(
    logits: Float[Array, "*batch vocabulary"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*batch vocabulary"]:
    """Logits with −inf outside the `top_k` largest, and outside the fewest largest whose probability reaches `top_p`.

    The largest always stays; of equal logits at the border all stay. Nucleus sampling: Ari Holtzman and others: The
    Curious Case of Neural Text Degeneration, 2019, arXiv:1904.09751, §3.1.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probability = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _check_places(model, tokens):
    """Positions beyond a learned table give NaN, of which the likeliest token is number 0."""
    positions = getattr(getattr(model, "stack", None), "positions", None)
    if getattr(positions, "table", None) is not None and tokens > positions.max_length:
        raise ValueError(
            f"length: expected at most {positions.max_length} tokens with the prompt (max_length), got {tokens}"
        )


def _check_options(length, key, temperature, top_k, top_p):
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    tempered = isinstance(temperature, int | float) and temperature != 1  # a traced number cannot be compared
    if key is None and (tempered or top_k is not None or top_p is not None):
        raise ValueError("key: expected one where temperature, top_k or top_p are given, got None (greedy)")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}; key=None is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if isinstance(top_p, int | float) and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
