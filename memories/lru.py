"""Linear recurrent unit: Orvieto et al. 2023, arXiv:2303.06349, eq. 5-7 and section 3; resets as in s5.py.

    s = lambda s + gamma B u     y = Re(C s) + d u     |lambda| = exp(-exp(nu))     gamma = sqrt(1 - |lambda|^2)

What is left of a state-space model without continuous time: numbers in a ring of the unit disk decay and
turn; gamma keeps s as large as u = LN(x). Then GELU, a gate, and the input added. Nothing of y enters the next
step, so an unroll may be a tree of products (parallel; by default not on a CPU). State: `states` complex
numbers. Cost per step: 4 states D + 2 D^2. Good at: speed, long spans. Bad at: choosing what to keep.
Differs from the paper: one layer of its stack; all angles up to pi / 10, its choice for long spans; LN.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """An LRU in a residual layer; a reset puts the decay of its step to 0."""

    def __init__(self, size: int, rngs: nnx.Rngs, states: int = 64, parallel=None):
        self.parallel = jax.default_backend() != "cpu" if parallel is None else parallel
        self.states, draw, normal = states, rngs.params.uniform, rngs.params.normal
        # Evenly over the ring between two radii (lemma 3.2). Complex matrices as real and imaginary parts.
        radius = jnp.sqrt(draw((states,), minval=0.9**2, maxval=0.999**2))
        self.nu = nnx.Param(jnp.log(-jnp.log(radius)))
        self.log_angle = nnx.Param(jnp.log(draw((states,), minval=0.001, maxval=jnp.pi / 10)))
        self.B = nnx.Param(normal((2, states, size)) / (2 * size) ** 0.5)
        self.C = nnx.Param(normal((2, size, states)) / states**0.5)
        self.feedthrough = nnx.Param(normal((size,)))
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.value, self.gate = [nnx.Linear(size, size, rngs=rngs) for _ in range(2)]

    def initial_memory(self, batch: int) -> Array:
        """s [B, states], complex."""
        return jnp.zeros((batch, self.states), jnp.complex64)

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> s, y [B, D]."""
        acting, y = self.unroll(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> s, y [T, B, D]."""
        decay = jnp.exp(-jnp.exp(self.nu[...]) + 1j * jnp.exp(self.log_angle[...]))  # lambda
        gamma = jnp.sqrt(-jnp.expm1(-2.0 * jnp.exp(self.nu[...])))
        u, (B, C) = self.norm(x), [matrix[0] + 1j * matrix[1] for matrix in (self.B, self.C)]
        inputs = gamma * (u @ B.T)  # [T, B, states]

        def advance(s, step):
            inputs, reset = step
            s = jnp.where(reset[:, None], 0.0, decay * s) + inputs
            return s, s

        if self.parallel:
            s = tree(memory, jnp.where(reset[..., None], 0.0, decay), inputs)
        else:
            _, s = jax.lax.scan(advance, memory, (inputs, reset))
        y = nnx.gelu((s @ C.T).real + self.feedthrough[...] * u)
        return s[-1], x + self.value(y) * nnx.sigmoid(self.gate(y))


def tree(state: Array, decay: Array, inputs: Array) -> Array:
    """s_t = decay_t s_(t-1) + inputs_t -> s of all steps, [T, B, ...]: more work than a loop, fewer turns.

    state [B, ...] is what came before; decay, 0 at a reset, and inputs [T, B, ...] or broadcast to it.
    """
    decay, inputs = jnp.broadcast_arrays(decay, inputs)
    inputs = jnp.concatenate([decay[:1] * state + inputs[:1], inputs[1:]])
    after = lambda one, two: (two[0] * one[0], two[0] * one[1] + two[1])
    return jax.lax.associative_scan(after, (decay, inputs))[1]
