"""GTrXL, a Transformer-XL with gates: Parisotto et al. 2019, arXiv:1910.06764; Dai et al. 2019,
arXiv:1901.02860.

    score_ij = ((q_i + u) k_j + (q_i + v) W r_(i-j)) / sqrt(D / H)     r: sines of the distance
    x = gate(x, relu(attention(norm(x))))     x = gate(x, relu(MLP(norm(x))))     in each layer

A step attends to the last `length` steps of its episode and to itself; a gated recurrent unit takes the
place of x + y, and lets little through at first. State: the inputs of each layer, L length D numbers, which
is what learning starts from; acting keeps their keys and values. Cost per step: 19 D^2 L, and 3 length D L
for attention. Good at: finding one step among many. Bad at: what lies farther back than L length.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """A GTrXL; a reset hides all earlier steps."""

    def __init__(self, size: int, rngs, layers=2, heads=4, length=64, gate_bias=2.0):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.size, self.length = size, length
        self.layers = nnx.List([Layer(size, heads, gate_bias, rngs) for _ in range(layers)])

    def initial_memory(self, batch: int) -> tuple[list[Array], Array]:
        """Of each layer the last inputs, normalised [B, M, D], the oldest first; and the age [B] of the last
        step in its episode, -1 before any.
        """
        zeros = jnp.zeros((batch, self.length, self.size))
        return [zeros] * len(self.layers), jnp.full(batch, -1)

    def open(self, memory: tuple) -> tuple[list, Array]:
        """Keys and values, both [B, M, H, D / H], of those inputs, as long as the parameters are the same."""
        inputs, age = memory
        return [layer.keys_values(x) for layer, x in zip(self.layers, inputs, strict=True)], age

    def step(self, acting: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        cached, age = acting
        age, after = jnp.where(reset, 0, age + 1), []
        visible = (jnp.arange(self.length, -1, -1) <= age[:, None])[:, None]  # [B, 1, M + 1]
        x = x[:, None]  # [B, 1, D]
        for layer, old in zip(self.layers, cached, strict=True):
            pairs = zip(old, layer.keys_values(norm(x)), strict=True)
            keys, values = [jnp.concatenate(pair, axis=1) for pair in pairs]
            after.append((keys[:, 1:], values[:, 1:]))
            x = layer(x, keys, values, visible)
        return (after, age), x[:, 0]

    def unroll(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [T, B, D], reset [T, B] -> memory, into which no gradient flows, y [T, B, D]."""
        inputs, age = memory
        steps = jnp.arange(len(x))[:, None]
        first = jax.lax.cummax(jnp.where(reset, steps, -1 - age), axis=0)  # of the episode
        age = steps - first  # [T, B]
        distance = steps - jnp.arange(-self.length, len(x))  # [T, M + T]
        farthest = jnp.minimum(age.T, self.length)[..., None]
        visible, x, after = (distance >= 0) & (distance <= farthest), x.swapaxes(0, 1), []
        for layer, old in zip(self.layers, inputs, strict=True):
            known = jnp.concatenate([old, norm(x)], axis=1)  # [B, M + T, D]
            after.append(jax.lax.stop_gradient(known[:, -self.length :]))
            x = layer(x, *layer.keys_values(known), visible)  # [B, T, D]
        return (after, age[-1]), x.swapaxes(0, 1)


class Layer(nnx.Module):
    """Attention and a perceptron, each of what is normalised first, and gated into x."""

    def __init__(self, size: int, heads: int, gate_bias: float, rngs: nnx.Rngs):
        self.heads, root = heads, 2**0.5
        make = lambda out, scale=1.0: nnx.Linear(
            size, out, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs
        )
        self.query, self.key_value, self.positions = make(size), make(2 * size), make(size)
        self.content_bias, self.position_bias = [nnx.Param(jnp.zeros(size)) for _ in "uv"]
        self.attention_output, self.hidden, self.output = make(size), make(size, root), make(size)
        self.gate_1, self.gate_2 = [Gate(size, gate_bias, rngs) for _ in range(2)]

    def split(self, x: Array) -> Array:
        """[..., D] -> [..., H, D / H]."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def keys_values(self, inputs: Array) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values, both [B, S, H, D / H]."""
        keys, values = jnp.split(self.key_value(inputs), 2, axis=-1)
        return self.split(keys), self.split(values)

    def __call__(self, x, keys, values, visible: Array) -> Array:
        """x [B, T, D], keys and values [B, M + T, H, D / H], visible [B, T, M + T] -> x for the next layer."""
        query, scale = self.query(norm(x)), (x.shape[-1] // self.heads) ** -0.5
        with_u, with_v = [
            self.split((query + b[...]) * scale) for b in (self.content_bias, self.position_bias)
        ]
        distances = jnp.arange(keys.shape[1] - x.shape[1], -1, -1)  # M to 0
        r = self.split(self.positions(sinusoids(distances, x.shape[-1])))
        scores = jnp.einsum("bthd,bshd->bhts", with_u, keys)
        scores += shift(jnp.einsum("bthd,ohd->bhto", with_v, r))
        weights = nnx.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
        attended = jnp.einsum("bhts,bshd->bthd", weights, values).reshape(x.shape)
        x = self.gate_1(x, nnx.relu(self.attention_output(attended)))
        return self.gate_2(x, nnx.relu(self.output(nnx.relu(self.hidden(norm(x))))))


class Gate(nnx.Module):
    """A gated recurrent unit in the place of x + y (arXiv:1910.06764, section 3.2)."""

    def __init__(self, size: int, bias: float, rngs: nnx.Rngs):
        self.bias, init = bias, nnx.initializers.orthogonal()
        self.from_y = nnx.Linear(size, 3 * size, kernel_init=init, rngs=rngs)
        self.from_x = nnx.Linear(size, 2 * size, kernel_init=init, rngs=rngs)
        self.from_reset = nnx.Linear(size, size, kernel_init=init, rngs=rngs)

    def __call__(self, x: Array, y: Array) -> Array:
        """All [..., D]."""
        reset, update, candidate = jnp.split(self.from_y(y), 3, axis=-1)
        reset_x, update_x = jnp.split(self.from_x(x), 2, axis=-1)
        update = nnx.sigmoid(update + update_x - self.bias)
        candidate = nnx.tanh(candidate + self.from_reset(nnx.sigmoid(reset + reset_x) * x))
        return (1.0 - update) * x + update * candidate


def norm(x: Array) -> Array:
    """The last axis with mean 0 and variance 1; scale and bias are left to the linear layer behind."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def sinusoids(position: Array, size: int) -> Array:
    """[...] -> [..., D]: sines and cosines of D / 2 wavelengths (arXiv:1706.03762, section 3.5)."""
    half = (size + 1) // 2
    angles = position[..., None] / 10_000.0 ** (jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :size]


def shift(scores: Array) -> Array:
    """Scores by distance, from M to 0, to scores by step: [..., T, M + 1] -> [..., T, M + T].

    Row i moves right by i: rows padded to M + T + 1 are read as rows of M + T (1901.02860, app. B).
    """
    *batch, steps, _ = scores.shape
    flat = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, steps)]).reshape(*batch, -1)
    return flat[..., :-steps].reshape(*batch, steps, -1)
