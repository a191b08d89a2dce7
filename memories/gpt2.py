"""GPT-2, a Transformer decoder: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    x = x + position    x = x + attention(LN(x))    x = x + MLP(LN(x))    in each layer, LN in the end

A step attends to the last `length` steps of its episode; through L layers, news travels L times as far.
Positions are the steps since the episode began, as sines and cosines. State: the inputs of each layer, L
length D numbers, which is what learning starts from; acting keeps their keys and values. Cost per step: 12 D^2
L, and 2 length D L for attention. Good at: finding one step among many. Bad at: what lies farther back.
Differs from the paper: sines, not learned positions, since an episode has no longest length.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """A decoder; a reset hides all earlier steps."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, layers: int = 2, heads: int = 4, length: int = 64
    ):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.size, self.length = size, length
        self.layers = nnx.List([Layer(size, heads, layers, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(size, rngs=rngs)

    def initial_memory(self, batch: int) -> tuple[list[Array], Array]:
        """Of each layer the last inputs [B, M, D], the oldest first; and the age [B] of the last step in its
        episode, -1 before any.
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
        x = (x + sinusoids(age, self.size))[:, None]  # [B, 1, D]
        for layer, old in zip(self.layers, cached, strict=True):
            pairs = zip(old, layer.keys_values(x), strict=True)
            keys, values = [jnp.concatenate(pair, axis=1) for pair in pairs]
            after.append((keys[:, 1:], values[:, 1:]))
            x = layer(x, keys, values, visible)
        return (after, age), self.norm(x[:, 0])

    def unroll(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [T, B, D], reset [T, B] -> memory, into which no gradient flows, y [T, B, D]."""
        inputs, age = memory
        steps = jnp.arange(len(x))[:, None]
        first = jax.lax.cummax(jnp.where(reset, steps, -1 - age), axis=0)  # of the episode
        age = steps - first  # [T, B]
        distance = steps - jnp.arange(-self.length, len(x))  # [T, M + T]
        farthest = jnp.minimum(age.T, self.length)[..., None]
        visible = (distance >= 0) & (distance <= farthest)  # [B, T, M + T]
        x, after = (x + sinusoids(age, self.size)).swapaxes(0, 1), []  # [B, T, D]
        for layer, old in zip(self.layers, inputs, strict=True):
            known = jnp.concatenate([old, x], axis=1)  # [B, M + T, D]
            after.append(jax.lax.stop_gradient(known[:, -self.length :]))
            x = layer(x, *layer.keys_values(known), visible)
        return (after, age[-1]), self.norm(x).swapaxes(0, 1)


class Layer(nnx.Module):
    """Attention and a perceptron, each of what is normalised first, and added."""

    def __init__(self, size: int, heads: int, layers: int, rngs: nnx.Rngs):
        self.heads = heads
        weights = lambda std: {"kernel_init": nnx.initializers.normal(std), "rngs": rngs}
        self.query = nnx.Linear(size, size, **weights(0.02))
        self.key_value = nnx.Linear(size, 2 * size, **weights(0.02))
        self.attention_output = nnx.Linear(size, size, **weights(0.02 / (2 * layers) ** 0.5))
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
        attended = jnp.einsum("bhts,bshd->bthd", weights, values).reshape(x.shape)
        x = x + self.attention_output(attended)
        return x + self.output(nnx.gelu(self.hidden(self.norm_2(x))))


def sinusoids(age: Array, size: int) -> Array:
    """[...] -> [..., D]: sines and cosines of D / 2 wavelengths (arXiv:1706.03762, section 3.5)."""
    half = (size + 1) // 2
    angles = age[..., None] / 10_000.0 ** (jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :size]
