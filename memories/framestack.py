"""The last inputs beside each other, as the four frames of Mnih et al. 2015, Nature 518 (methods).

    y = tanh(W [x_t, x_(t-1), ..., x_(t-length+1)] + b)     0 for what lies before the episode

The humblest memory, and a fair one to beat: it keeps everything, and then nothing. Nothing of y enters the
next step. State: the last length - 1 inputs, (length - 1) D numbers. Cost per step: length D^2. Good at:
velocities, and whatever the last few steps show. Bad at: all that lies farther back.
Differs from the paper: what is stacked are encoded observations, and zeros, not copies of the first one.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """A stack of the last inputs; a reset hides those before."""

    def __init__(self, size: int, rngs: nnx.Rngs, length: int = 4):
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.size, self.length, init = size, length, nnx.initializers.orthogonal()
        self.project = nnx.Linear(length * size, size, kernel_init=init, rngs=rngs)

    def initial_memory(self, batch: int) -> Array:
        """The last inputs [B, length - 1, D], the oldest first, 0 where they are not of the episode."""
        return jnp.zeros((batch, self.length - 1, self.size))

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        acting, y = self.unroll(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D], all steps at once."""
        steps, past = len(x), self.length - 1
        episode = jnp.cumsum(reset, axis=0)  # [T, B], 0: that of the memory
        episode = jnp.pad(episode, ((past, 0), (0, 0)))[..., None]
        seen = jnp.concatenate([memory.swapaxes(0, 1), x])  # [past + T, B, D]
        of = lambda back: slice(past - back, past - back + steps)  # so many steps before each
        stack = [
            jnp.where(episode[of(back)] == episode[past:], seen[of(back)], 0.0)
            for back in range(self.length)
        ]
        memory = jnp.where(episode[steps:] == episode[-1], seen[steps:], 0.0).swapaxes(0, 1)
        return memory, nnx.tanh(self.project(jnp.concatenate(stack, axis=-1)))
