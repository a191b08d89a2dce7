"""sLSTM, the cell of xLSTM that mixes its memory: Beck et al. 2024, arXiv:2405.04517, eq. 8-17, 72-77.

    i~, f~, z~, o~ = W x + R h + b
    m' = max(log sigmoid(f~) + m, i~)     i = exp(i~ - m')     f = exp(log sigmoid(f~) + m - m')
    c' = f c + i tanh(z~)     n' = f n + i     h' = sigmoid(o~) c' / n'

Exponential gates: a later input can outweigh all before it. n counts what was taken in, m keeps the
exponents small and cancels. R has a block for each head. State: c, n, m, h, 4 D numbers. Cost per step:
4 D^2 + 4 D^2 / heads. Good at: replacing what is stored. Bad at: speed, since steps wait for each other.
Differs from the paper: no block around the cell (xlstm.py has it), one normalisation of the output.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """An sLSTM; a reset puts c, n and h to 0 and m to "nothing yet" before the cell."""

    def __init__(self, size: int, rngs: nnx.Rngs, heads: int = 4):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        self.size, self.heads = size, heads
        self.inputs = nnx.Linear(size, 4 * size, rngs=rngs)
        self.recurrent = nnx.Param(jnp.zeros((heads, size // heads, 4 * size // heads)))  # R
        forget = jnp.tile(jnp.linspace(3.0, 6.0, size // heads), heads)  # at the start it remembers
        self.inputs.bias[...] = self.inputs.bias[...].at[size : 2 * size].set(forget)
        self.scale = nnx.Param(jnp.ones(size))

    def initial_memory(self, batch: int) -> tuple[Array, Array, Array, Array]:
        """c, n, m, h, all [B, D]."""
        zeros = jnp.zeros((batch, self.size))
        return zeros, zeros, jnp.full_like(zeros, -1e30), zeros

    def open(self, memory: tuple) -> tuple:
        return memory

    def step(self, acting: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        acting = self.cell(acting, self.inputs(x), reset)
        return acting, self.norm(acting[-1])

    def unroll(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D]; one product for the inputs of all steps."""

        def advance(memory, step):
            memory = self.cell(memory, *step)
            return memory, memory[-1]

        memory, h = jax.lax.scan(advance, memory, (self.inputs(x), reset))
        return memory, self.norm(h)

    def cell(self, memory: tuple, gates: Array, reset: Array) -> tuple:
        """memory, what the inputs give to the gates [B, 4 D], reset [B] -> memory."""
        initial = self.initial_memory(len(reset))
        c, n, m, h = [
            jnp.where(reset[:, None], new, old) for new, old in zip(initial, memory, strict=True)
        ]
        mixed = jnp.einsum("bhd,hde->bhe", self.split(h), self.recurrent[...])  # [B, H, 4 D / H]
        mixed = [self.join(x) for x in jnp.split(mixed, 4, axis=-1)]
        i, f, z, o = [
            x + y for x, y in zip(jnp.split(gates, 4, axis=-1), mixed, strict=True)
        ]  # all [B, D]
        decay = nnx.log_sigmoid(f) + m
        m = jnp.maximum(decay, i)
        i, f = jnp.exp(i - m), jnp.exp(decay - m)
        c, n = f * c + i * nnx.tanh(z), f * n + i
        return c, n, m, nnx.sigmoid(o) * c / n

    def split(self, x: Array) -> Array:
        """[..., D] -> [..., H, D / H]."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def join(self, x: Array) -> Array:
        """[..., H, D / H] -> [..., D]."""
        return x.reshape(*x.shape[:-2], -1)

    def norm(self, h: Array) -> Array:
        """h [..., D] with mean 0 and variance 1 in each head, times a learned scale."""
        h = self.split(h)
        h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt((h**2).mean(axis=-1, keepdims=True) + 1e-6)
        return self.join(h) * self.scale[...]
