"""Long short-term memory: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    i, f, g, o = W x + U h + b
    c = sigmoid(f) c + sigmoid(i) tanh(g)
    h = sigmoid(o) tanh(c)

State: h and c, 2 D numbers. Cost per step: 8 D^2 multiplications. Good at: holding a few items for dozens
of steps, with --memory-kwargs '{"chrono_length": 100}' for about as many (Tallec and Ollivier 2018,
arXiv:1804.11188, eq. 16). Bad at: many items at once, and speed, since steps wait for each other.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """An LSTM; a reset clears h and c before the cell."""

    def __init__(self, size: int, rngs: nnx.Rngs, chrono_length: int = 0):
        self.size, init = size, nnx.initializers.orthogonal()
        self.inputs = nnx.Linear(size, 4 * size, kernel_init=init, rngs=rngs)
        self.recurrent = nnx.Linear(size, 4 * size, kernel_init=init, rngs=rngs)
        forget = jnp.ones(size)  # at the start it remembers
        if chrono_length:  # cells that forget after 1 to so many steps
            forget = jnp.log(rngs.params.uniform((size,), minval=1.0, maxval=chrono_length))
        zeros, ignore = jnp.zeros(size), -forget * (chrono_length > 0)
        self.inputs.bias[...] = jnp.concatenate([ignore, forget, zeros, zeros])

    def initial_memory(self, batch: int) -> tuple[Array, Array]:
        """h and c, both [B, D]."""
        return (jnp.zeros((batch, self.size)),) * 2

    def open(self, memory: tuple[Array, Array]) -> tuple[Array, Array]:
        return memory

    def step(self, acting: tuple[Array, Array], x: Array, reset: Array):
        """x [B, D], reset [B] -> (h, c), y [B, D], which is h."""
        acting = self.cell(acting, self.inputs(x), reset)
        return acting, acting[0]

    def unroll(self, memory: tuple[Array, Array], x: Array, reset: Array):
        """x [T, B, D], reset [T, B] -> (h, c), y [T, B, D]; one product for the inputs of all steps."""

        def advance(carry, step):
            # The barrier: XLA would slice the inputs within the cell, slowly on a CPU.
            carry = self.cell(carry, *jax.lax.optimization_barrier(step))
            return carry, carry[0]

        return jax.lax.scan(advance, memory, (self.inputs(x), reset))

    def cell(self, carry: tuple[Array, Array], gates: Array, reset: Array) -> tuple[Array, Array]:
        """h and c [B, D], what the inputs give to the gates [B, 4 D], reset [B] -> h and c."""
        h, c = [jnp.where(reset[:, None], 0.0, x) for x in carry]
        i, f, g, o = jnp.split(gates + self.recurrent(h), 4, axis=-1)
        c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * nnx.tanh(g)
        return nnx.sigmoid(o) * nnx.tanh(c), c
