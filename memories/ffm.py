"""Fast and forgetful memory: Morad et al. 2023, arXiv:2310.04128.

    z = (W_p x) sigmoid(W_i x)                                   m features
    S = gamma S + z,  gamma_jk = exp(-|alpha_j| + i omega_k)      m x c complex traces
    g = sigmoid(W_g x)
    y = LN(W [Re S, Im S]) g + (W_s x)(1 - g)

Sums that decay and turn: the decay says how long ago something was about, the angle when. Nothing of y
enters the next step, so an unroll may be a tree of products (parallel; by default not on a CPU). State: S,
m c complex numbers. Cost per step: 2 m D + 2 m c D + 2 D^2. Good at: speed, and order within its decay times.
Bad at: holding one item for longer than those.
Differs from the paper: the recurrence itself, not gamma^-t cumsum(gamma^t z), which overflows.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """FFM; a reset clears S before the step."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, features: int = 32, context: int = 4, parallel=None
    ):
        self.parallel = jax.default_backend() != "cpu" if parallel is None else parallel
        self.shape = (features, context)
        self.inputs = nnx.Linear(size, 2 * features, rngs=rngs)  # W_p, W_i
        self.outputs = nnx.Linear(size, 2 * size, rngs=rngs)  # W_g, W_s
        self.read = nnx.Linear(2 * features * context, size, rngs=rngs)  # W
        # Decay times and periods from a few steps to a thousand, evenly in their logarithm.
        self.log_alpha = nnx.Param(-jnp.log(jnp.geomspace(2.0, 1024.0, features)))
        self.log_omega = nnx.Param(jnp.log(2 * jnp.pi / jnp.geomspace(4.0, 1024.0, context)))

    def initial_memory(self, batch: int) -> Array:
        """S [B, m, c], complex."""
        return jnp.zeros((batch, *self.shape), jnp.complex64)

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> S, y [B, D]."""
        acting, y = self.unroll(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> S, y [T, B, D]."""
        alpha, omega = jnp.exp(self.log_alpha[...]), jnp.exp(self.log_omega[...])
        gamma = jnp.exp(-alpha[:, None] + 1j * omega)  # [m, c]
        features, gate = jnp.split(self.inputs(x), 2, axis=-1)
        z = features * nnx.sigmoid(gate)  # [T, B, m]

        def advance(S, step):
            z, reset = step
            S = jnp.where(reset[:, None, None], 0.0, gamma * S) + z[..., None]
            return S, S

        if self.parallel:
            S = tree(memory, jnp.where(reset[..., None, None], 0.0, gamma), z[..., None])
        else:
            _, S = jax.lax.scan(advance, memory, (z, reset))  # [T, B, m, c]
        memory, S = S[-1], S.reshape(*S.shape[:2], -1)
        read = self.read(jnp.concatenate([S.real, S.imag], axis=-1))
        gate, skip = jnp.split(self.outputs(x), 2, axis=-1)
        gate = nnx.sigmoid(gate)
        return memory, norm(read) * gate + skip * (1.0 - gate)


def tree(state: Array, decay: Array, inputs: Array) -> Array:
    """s_t = decay_t s_(t-1) + inputs_t -> s of all steps, [T, B, ...]: more work than a loop, fewer turns.

    state [B, ...] is what came before; decay, 0 at a reset, and inputs [T, B, ...] or broadcast to it.
    """
    decay, inputs = jnp.broadcast_arrays(decay, inputs)
    inputs = jnp.concatenate([decay[:1] * state + inputs[:1], inputs[1:]])
    after = lambda one, two: (two[0] * one[0], two[0] * one[1] + two[1])
    return jax.lax.associative_scan(after, (decay, inputs))[1]


def norm(x: Array) -> Array:
    """The last axis with mean 0 and variance 1."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
