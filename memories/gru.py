"""Gated recurrent unit: Cho et al. 2014, arXiv:1406.1078, with the candidate of cuDNN and PyTorch.

    r = sigmoid(W_r x + U_r h)    z = sigmoid(W_z x + U_z h + 1)    (biases not shown)
    n = tanh(W_n x + r * (U_n h + c))
    h = (1 - z) n + z h

State: h, D numbers. Cost per step: 6 D^2 multiplications. Good at: nearly everything that needs a few
dozen steps; the first to try. Bad at: many items, long spans, and speed, since steps wait for each other.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """A GRU; a reset clears h before the cell."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.size, init = size, nnx.initializers.orthogonal()
        self.inputs = nnx.Linear(size, 3 * size, kernel_init=init, rngs=rngs)
        self.recurrent = nnx.Linear(size, 3 * size, kernel_init=init, rngs=rngs)
        self.inputs.bias[...] = self.inputs.bias[...].at[size : 2 * size].set(1.0)  # it remembers

    def initial_memory(self, batch: int) -> Array:
        """h [B, D]."""
        return jnp.zeros((batch, self.size))

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> h, y [B, D], which is h."""
        h = self.cell(acting, self.inputs(x), reset)
        return h, h

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> h, y [T, B, D]; one product for the inputs of all steps."""

        def advance(h, step):
            # The barrier: XLA would slice the inputs within the cell, slowly on a CPU.
            h = self.cell(h, *jax.lax.optimization_barrier(step))
            return h, h

        return jax.lax.scan(advance, memory, (self.inputs(x), reset))

    def cell(self, h: Array, gates: Array, reset: Array) -> Array:
        """h [B, D], what the inputs give to the gates [B, 3 D], reset [B] -> h."""
        h = jnp.where(reset[:, None], 0.0, h)
        x_r, x_z, x_n = jnp.split(gates, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(self.recurrent(h), 3, axis=-1)
        z = nnx.sigmoid(x_z + h_z)
        n = nnx.tanh(x_n + nnx.sigmoid(x_r + h_r) * h_n)
        return (1.0 - z) * n + z * h
