"""GPT-2, a Transformer decoder: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    x = x + position    x = x + attention(LN(x))    x = x + MLP(LN(x))    in each layer, LN in the end

A step attends to the last `length` steps of its episode; through L layers, news travels L times as far.
Positions are the steps since the episode began, as sines and cosines. State: the inputs of each layer, L
length D numbers, which is what learning starts from; acting keeps their keys and values. Cost per step: 12 D^2
L, and 2 length D L for attention. Good at: finding one step among many. Bad at: what lies farther back.
Differs from the paper: sines, not learned positions, since an episode has no longest length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Inputs(NamedTuple):
    """What learning starts from; no gradient flows into it."""

    layers: tuple[Array, ...]  # of each layer [B, M, D], the last steps' inputs, the oldest first
    age: Array  # [B], of the last step in its episode, -1 before any


class Ring(NamedTuple):
    """The same for acting, with one place more: the next step is written over the oldest, then read."""

    keys: tuple[Array, ...]  # of each layer [B, M + 1, H, D / H]
    values: tuple[Array, ...]
    slot: Array  # [B], where to write
    age: Array  # [B]


class Memory(nnx.Module):
    """A decoder; a reset hides all earlier steps."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, layers: int = 2, heads: int = 4, length: int = 64
    ):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        self.size, self.length = size, length
        self.layers = nnx.List([Layer(size, heads, layers, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(size, rngs=rngs)

    def initial_memory(self, batch: int) -> Inputs:
        zeros = jnp.zeros((batch, self.length, self.size))
        return Inputs((zeros,) * len(self.layers), jnp.full(batch, -1))

    def open(self, memory: Inputs) -> Ring:
        """Keys and values of what is remembered, for as long as the parameters stay the same."""
        room = lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
        pairs = [layer.keys_values(x) for layer, x in zip(self.layers, memory.layers, strict=True)]
        keys, values = [tuple(room(x) for x in part) for part in zip(*pairs, strict=True)]
        return Ring(keys, values, jnp.full_like(memory.age, self.length), memory.age)

    def step(self, acting: Ring, x: Array, reset: Array) -> tuple[Ring, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        age, envs = jnp.where(reset, 0, acting.age + 1), jnp.arange(len(x))
        distance = (acting.slot[:, None] - jnp.arange(self.length + 1)) % (self.length + 1)
        visible = (distance <= age[:, None])[:, None]  # [B, 1, M + 1]
        x, rings = (x + sinusoids(age, self.size))[:, None], []  # [B, 1, D]
        for layer, *ring in zip(self.layers, acting.keys, acting.values, strict=True):
            new = layer.keys_values(x)
            ring = [a.at[envs, acting.slot].set(b[:, 0]) for a, b in zip(ring, new, strict=True)]
            rings.append(ring)
            x = layer(x, *ring, visible)
        slot = (acting.slot + 1) % (self.length + 1)
        return Ring(*zip(*rings, strict=True), slot, age), self.norm(x[:, 0])

    def unroll(self, memory: Inputs, x: Array, reset: Array) -> tuple[Inputs, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D]."""
        steps = jnp.arange(len(x))
        first = jax.lax.cummax(jnp.where(reset, steps[:, None], -1), axis=0)  # of the episode
        age = jnp.where(
            first < 0, memory.age + 1 + steps[:, None], steps[:, None] - first
        )  # [T, B]
        distance = steps[:, None] - jnp.arange(-self.length, len(x))  # [T, M + T]
        farthest = jnp.minimum(age.T, self.length)[..., None]
        visible = (distance >= 0) & (distance <= farthest)  # [B, T, M + T]
        x, inputs = (x + sinusoids(age, self.size)).swapaxes(0, 1), []  # [B, T, D]
        for layer, old in zip(self.layers, memory.layers, strict=True):
            known = jnp.concatenate([old, x], axis=1)  # [B, M + T, D]
            inputs.append(jax.lax.stop_gradient(known[:, -self.length :]))
            x = layer(x, *layer.keys_values(known), visible)
        return Inputs(tuple(inputs), age[-1]), self.norm(x).swapaxes(0, 1)


class Layer(nnx.Module):
    """Attention and a perceptron, each of what is normalised first, and added."""

    def __init__(self, size: int, heads: int, layers: int, rngs: nnx.Rngs):
        self.heads = heads
        weights = lambda std: {"kernel_init": nnx.initializers.normal(std), "rngs": rngs}
        self.query = nnx.Linear(size, size, **weights(0.02))
        self.key_value = nnx.Linear(size, 2 * size, **weights(0.02))
        self.attended = nnx.Linear(size, size, **weights(0.02 / (2 * layers) ** 0.5))
        self.hidden = nnx.Linear(size, 4 * size, **weights(0.02))
        self.output = nnx.Linear(4 * size, size, **weights(0.02 / (2 * layers) ** 0.5))
        self.norm_1, self.norm_2 = [nnx.LayerNorm(size, rngs=rngs) for _ in range(2)]

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values, both [B, S, H, D / H]."""
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        keys, values = jnp.split(self.key_value(self.norm_1(x)), 2, axis=-1)
        return split(keys), split(values)

    def __call__(self, x: Array, keys: Array, values: Array, visible: Array) -> Array:
        """x [B, T, D], keys and values [B, S, H, D / H], visible [B, T, S] -> x for the next layer."""
        query = self.query(self.norm_1(x)).reshape(*x.shape[:2], *keys.shape[2:])
        scores = jnp.einsum("bthd,bshd->bhts", query, keys) * keys.shape[-1] ** -0.5
        weights = nnx.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
        x = x + self.attended(jnp.einsum("bhts,bshd->bthd", weights, values).reshape(x.shape))
        return x + self.output(nnx.gelu(self.hidden(self.norm_2(x))))


def sinusoids(age: Array, size: int) -> Array:
    """[...] -> [..., D]: sines and cosines of D / 2 wavelengths (arXiv:1706.03762, section 3.5)."""
    half = (size + 1) // 2
    angles = age[..., None] / 10_000.0 ** (jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :size]
