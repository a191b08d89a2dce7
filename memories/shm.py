"""Stable Hadamard memory: Le et al. 2024, arXiv:2410.10132.

    x = LN(x)     K, Q = relu(W x) / (1e-5 + its sum)     V, v_c = W x     eta = sigmoid(w x)
    C = 1 + tanh(theta_n v_c^T)     M = M * C + (eta V) K^T     y = W_o (M Q + W_s x)

A matrix memory whose every entry is calibrated by a factor of its own between 0 and 2. theta_n is a row of
a learned table, drawn at random at each step: products of independent factors keep their mean of 1, while
those of one row overflow. The draw is that of the step's number in its episode, kept in the memory, so
acting, learning and judging see the same. An unroll may be a tree of products (parallel; by default not on
a CPU). State: M, m^2 numbers, and the step. Cost per step: 6 m D + 3 m^2. Good at: many items for long. Bad
at: speed beside linear memories of vectors; the noise of its factors.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

DRAWS = 4096  # after so many steps the random rows repeat


class Memory(nnx.Module):
    """SHM; a reset clears M and the step's number."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, features: int = 24, rows: int = 128, parallel=None
    ):
        self.parallel = jax.default_backend() != "cpu" if parallel is None else parallel
        self.features = features
        self.inputs = nnx.Linear(size, 4 * features + 1, rngs=rngs)  # K, Q, V, v_c, eta
        xavier = nnx.initializers.xavier_uniform()
        self.theta = nnx.Param(xavier(rngs.params(), (rows, features)))
        self.skip = nnx.Linear(size, features, use_bias=False, rngs=rngs)  # W_s
        self.output = nnx.Linear(features, size, rngs=rngs)  # W_o

    def initial_memory(self, batch: int) -> tuple[Array, Array]:
        """M [B, m, m], the number of steps it has seen [B]."""
        return jnp.zeros((batch, self.features, self.features)), jnp.zeros(batch, jnp.int32)

    def open(self, memory: tuple[Array, Array]) -> tuple[Array, Array]:
        return memory

    def step(self, acting: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        acting, y = self.unroll(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D]."""
        x, m = norm(x), self.features
        K, Q, V, v_c, eta = jnp.split(self.inputs(x), [m, 2 * m, 3 * m, 4 * m], axis=-1)
        share = lambda x: nnx.relu(x) / (1e-5 + nnx.relu(x).sum(axis=-1, keepdims=True))
        K, Q, V = share(K), share(Q), nnx.sigmoid(eta) * V
        rows = jax.random.randint(jax.random.key(0), (DRAWS,), 0, len(self.theta[...]))

        M, number = memory
        steps = jnp.arange(len(x))[:, None]
        number = steps - jax.lax.cummax(jnp.where(reset, steps, -number), axis=0)  # [T, B]
        outer = lambda a, b: a[..., :, None] * b[..., None, :]
        factors = lambda theta, v_c: 1.0 + nnx.tanh(outer(theta, v_c))  # C
        theta = self.theta[...][rows[number % DRAWS]]  # [T, B, m]

        def advance(M, step):
            K, Q, V, v_c, theta, reset = step
            M = jnp.where(reset[:, None, None], 0.0, M) * factors(theta, v_c) + outer(V, K)
            return M, jnp.einsum("bij,bj->bi", M, Q)

        if self.parallel:
            C = jnp.where(reset[..., None, None], 0.0, factors(theta, v_c))
            M = tree(M, C, outer(V, K))  # [T, B, m, m]
            M, read = M[-1], jnp.einsum("tbij,tbj->tbi", M, Q)
        else:
            M, read = jax.lax.scan(advance, M, (K, Q, V, v_c, theta, reset))
        return (M, number[-1] + 1), self.output(read + self.skip(x))


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
