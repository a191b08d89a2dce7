"""No memory at all: the control that shows whether a task needs one.

State: nothing (an empty column, so that it has a batch). Cost per step: none. Good at: what can be seen at
once. Bad at: all else.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """What comes in goes out."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        pass

    def initial_memory(self, batch: int) -> Array:
        return jnp.zeros((batch, 0))

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        return acting, x

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D]."""
        return memory, x
