"""S5, a linear state-space model: Smith et al. 2023, arXiv:2208.04933; with resets: Lu et al. 2023,
arXiv:2303.03982.

    s = lambda_ s + B_ u     y = 2 Re(C s) + d u     lambda_ = exp(lambda Delta)     B_ = (lambda_ - 1) / lambda B

Oscillators that decay: lambda are the eigenvalues of HiPPO's matrix, one of each conjugate pair, Delta a
learned step for each. Each layer: LN, the model, GELU, a gate, and the input added. Nothing of y enters
the next step, so an unroll may be a tree of products (parallel; by default not on a CPU). State: states / 2
complex numbers a layer. Cost per step and layer: 2 states D + 2 D^2. Good at: speed, and long spans. Bad at:
choosing what to keep, since the decay does not look at the input.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """A stack of S5 layers; a reset puts the decay of its step to 0."""

    def __init__(self, size: int, rngs: nnx.Rngs, states: int = 64, layers: int = 2, parallel=None):
        if states < 2:
            raise ValueError(f"states must be at least 2, not {states}")
        self.states = states
        self.layers = nnx.List([Layer(size, states, rngs, parallel) for _ in range(layers)])

    def initial_memory(self, batch: int) -> list[Array]:
        """A state [B, states / 2], complex, for each layer."""
        return [jnp.zeros((batch, self.states // 2), jnp.complex64) for _ in self.layers]

    def open(self, memory: list[Array]) -> list[Array]:
        return memory

    def step(self, acting: list[Array], x: Array, reset: Array) -> tuple[list[Array], Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        acting, y = self.unroll(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: list[Array], x: Array, reset: Array) -> tuple[list[Array], Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D]."""
        after = []
        for layer, state in zip(self.layers, memory, strict=True):
            state, x = layer(state, x, reset)
            after.append(state)
        return after, x


class Layer(nnx.Module):
    """x + gate(GELU(S5(LN(x)))). Complex parameters are kept as real and imaginary parts."""

    def __init__(self, size: int, states: int, rngs: nnx.Rngs, parallel, block: int = 16):
        self.parallel = jax.default_backend() != "cpu" if parallel is None else parallel
        half, draw = states // 2, rngs.params.normal
        values, vectors = hippo(min(block, states))
        copies = -(-half // len(values))
        self.eigenvalues = nnx.Param(parts(np.tile(values, copies)[:half]))
        # Random matrices in the basis of the eigenvectors, a block for each copy of HiPPO's.
        rotate = np.kron(np.eye(copies), vectors.conj().T)[:half]  # [P / 2, P]
        B = draw((rotate.shape[1], size)) / size**0.5
        C = draw((size, rotate.shape[1])) / rotate.shape[1] ** 0.5
        self.B, self.C = nnx.Param(parts(rotate @ B)), nnx.Param(parts(C @ rotate.conj().T))
        self.feedthrough = nnx.Param(draw((size,)))
        low, high = jnp.log(0.001), jnp.log(0.1)
        self.log_delta = nnx.Param(rngs.params.uniform((half,), minval=low, maxval=high))
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.value, self.gate = [nnx.Linear(size, size, rngs=rngs) for _ in range(2)]

    def __call__(self, state: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """state [B, P / 2], x [T, B, D], reset [T, B] -> state, y [T, B, D]."""
        real, imag = self.eigenvalues[...]
        values = jnp.minimum(real, -1e-4) + 1j * imag  # or it would grow
        decay = jnp.exp(values * jnp.exp(self.log_delta[...]))
        u, (B, C) = self.norm(x), [matrix[0] + 1j * matrix[1] for matrix in (self.B, self.C)]
        inputs = u @ (((decay - 1.0) / values)[:, None] * B).T  # [T, B, P / 2]

        def advance(state, step):
            inputs, reset = step
            state = jnp.where(reset[:, None], 0.0, decay * state) + inputs
            return state, state

        if self.parallel:
            states = tree(state, jnp.where(reset[..., None], 0.0, decay), inputs)
        else:
            _, states = jax.lax.scan(advance, state, (inputs, reset))
        y = nnx.gelu(2.0 * (states @ C.T).real + self.feedthrough[...] * u)
        return states[-1], x + self.value(y) * nnx.sigmoid(self.gate(y))


def tree(state: Array, decay: Array, inputs: Array) -> Array:
    """s_t = decay_t s_(t-1) + inputs_t -> s of all steps, [T, B, ...]: more work than a loop, fewer turns.

    state [B, ...] is what came before; decay, 0 at a reset, and inputs [T, B, ...] or broadcast to it.
    """
    decay, inputs = jnp.broadcast_arrays(decay, inputs)
    inputs = jnp.concatenate([decay[:1] * state + inputs[:1], inputs[1:]])
    after = lambda one, two: (two[0] * one[0], two[0] * one[1] + two[1])
    return jax.lax.associative_scan(after, (decay, inputs))[1]


def hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [N / 2] with a negative imaginary part, and eigenvectors [N, N / 2], of the normal part
    of HiPPO's matrix (2208.04933, app. B.1).
    """
    p, q = np.sqrt(2 * np.arange(size) + 1), np.sqrt(np.arange(size) + 0.5)
    matrix = -np.tril(np.outer(p, p)) + np.diag(np.arange(size)) + np.outer(q, q)
    skew = (matrix - matrix.T) / 2  # the rest is -1/2 on the diagonal
    imag, vectors = np.linalg.eigh(-1j * skew)
    half = max(1, size // 2)
    return -0.5 + 1j * imag[:half], vectors[:, :half]


def parts(x: np.ndarray) -> Array:
    """Complex [...] -> its real and imaginary parts [2, ...]."""
    return jnp.stack([jnp.real(x), jnp.imag(x)]).astype(jnp.float32)
