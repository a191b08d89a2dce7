"""xLSTM, residual blocks of mLSTM and sLSTM: Beck et al. 2024, arXiv:2405.04517, fig. 10 and 11.

    m: p, z = Up LN(x)     u = SiLU(conv(p))     h = mLSTM(q, k, i~, f~ of u, v of p), as in mlstm.py
       x = x + Down[(norm(h) + skip u) SiLU(z)]
    s: x = x + norm(sLSTM(LN(x))), as in slstm.py     x = x + W_3[GELU(W_1 LN(x)) W_2 LN(x)]

The convolution sees the last 4 inputs of its episode, each channel for itself. LN in the end. State: in an
m block, twice as wide inside, 4 D^2 / heads + 8 D numbers, in an s block 4 D. Cost per step: 18 D^2 and 8 D^2
/ heads for m, 8 D^2 and 4 D^2 / heads for s. Good at: many items (m), and replacing what is stored (s). Bad
at: speed, since the blocks of a step wait for those of the step before, and size beside a single cell.
Differs from the paper: whole matrices make q, k and v, not blocks of 4; the gates of m look at u alone; no
convolution before the sLSTM; an unroll is step by step, and m's C is computed again for gradients.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """Blocks in a row, "m" and "s"; a reset puts the state of each to that of a beginning."""

    def __init__(self, size: int, rngs: nnx.Rngs, blocks: str = "ms", heads: int = 4):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        kinds = {"m": Matrix, "s": Scalar}
        self.blocks = nnx.List([kinds[kind](size, heads, len(blocks), rngs) for kind in blocks])
        self.norm = nnx.LayerNorm(size, rngs=rngs)

    def initial_memory(self, batch: int) -> list[tuple]:
        return [block.initial_memory(batch) for block in self.blocks]

    def open(self, memory: list[tuple]) -> list[tuple]:
        return memory

    def step(self, acting: list[tuple], x: Array, reset: Array) -> tuple[list[tuple], Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        clear = lambda new, old: jnp.where(reset.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        acting, after = jax.tree.map(clear, self.initial_memory(len(x)), acting), []
        for block, memory in zip(self.blocks, acting, strict=True):
            memory, x = block(memory, x)
            after.append(memory)
        return after, self.norm(x)

    def unroll(self, memory: list[tuple], x: Array, reset: Array) -> tuple[list[tuple], Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D], step by step."""
        step = jax.checkpoint(lambda memory, step: self.step(memory, *step))
        return jax.lax.scan(step, memory, (x, reset))


class Matrix(nnx.Module):
    """mLSTM behind a convolution, between two projections."""

    def __init__(self, size: int, heads: int, blocks: int, rngs: nnx.Rngs):
        self.heads, wide, zeros = heads, 2 * size, nnx.initializers.zeros_init()
        up, down = [nnx.initializers.normal(std / size**0.5) for std in (0.4**0.5, 2 / blocks)]
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.up = nnx.Linear(size, 2 * wide, kernel_init=up, rngs=rngs)
        self.taps = nnx.Param(rngs.params.uniform((4, wide), minval=-0.5, maxval=0.5))
        self.query_key = nnx.Linear(wide, 2 * wide, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(wide, wide, use_bias=False, rngs=rngs)
        self.gates = nnx.Linear(wide, 2 * heads, kernel_init=zeros, rngs=rngs)
        forget = jnp.linspace(3.0, 6.0, heads)  # at the start it remembers
        self.gates.bias[...] = jnp.concatenate([0.1 * rngs.params.normal((heads,)), forget])
        self.scale, self.skip = [nnx.Param(jnp.ones(wide)) for _ in range(2)]
        self.down = nnx.Linear(wide, size, kernel_init=down, rngs=rngs)

    def initial_memory(self, batch: int) -> tuple[Array, Array, Array, Array]:
        """The last 3 inputs of the convolution [B, 3, 2 D], C [B, H, d, d], n [B, H, d], m [B, H]."""
        wide, H = self.skip.shape[0], self.heads
        shapes = (3, wide), (H, wide // H, wide // H), (H, wide // H)
        return *[jnp.zeros((batch, *shape)) for shape in shapes], jnp.full((batch, H), -1e30)

    def __call__(self, memory: tuple, x: Array) -> tuple[tuple, Array]:
        """memory, x [B, D] -> memory, x for the next block."""
        past, C, n, m = memory
        p, z = jnp.split(self.up(self.norm(x)), 2, axis=-1)  # [B, 2 D]
        past = jnp.concatenate([past, p[:, None]], axis=1)  # [B, 4, 2 D]
        u = nnx.silu((past * self.taps[...]).sum(axis=1))
        q, k = jnp.split(self.query_key(u), 2, axis=-1)
        q, k, v = [split(a, self.heads) for a in (q, k, self.value(p))]  # [B, H, d]
        k = k * k.shape[-1] ** -0.5
        i, f = jnp.split(self.gates(u), 2, axis=-1)  # [B, H]
        decay = nnx.log_sigmoid(f) + m
        m = jnp.maximum(decay, i)
        take, keep = jnp.exp(i - m)[..., None], jnp.exp(decay - m)[..., None]
        n = keep * n + take * k
        C = keep[..., None] * C + (take * k)[..., None] * v[..., None, :]
        # exp(-m) overflows long before it could be the smaller of the two.
        size = jnp.maximum(jnp.abs((q * n).sum(axis=-1)), jnp.exp(jnp.minimum(-m, 60.0)))
        h = norm(jnp.einsum("bhd,bhde->bhe", q, C) / size[..., None]) * self.scale[...]
        return (past[:, 1:], C, n, m), x + self.down((h + self.skip[...] * u) * nnx.silu(z))


class Scalar(nnx.Module):
    """sLSTM, then a gated perceptron."""

    def __init__(self, size: int, heads: int, blocks: int, rngs: nnx.Rngs):
        self.size, self.heads, hidden = size, heads, int(1.3 * size)
        self.norm_1, self.norm_2 = [nnx.LayerNorm(size, rngs=rngs) for _ in range(2)]
        self.inputs = nnx.Linear(size, 4 * size, rngs=rngs)
        self.recurrent = nnx.Param(jnp.zeros((4, heads, size // heads, size // heads)))  # R
        forget = jnp.tile(jnp.linspace(3.0, 6.0, size // heads), heads)
        self.inputs.bias[...] = self.inputs.bias[...].at[size : 2 * size].set(forget)
        self.scale = nnx.Param(jnp.ones(size))
        up, down = [nnx.initializers.normal(std / size**0.5) for std in (0.4**0.5, 2 / blocks)]
        self.hidden = nnx.Linear(size, 2 * hidden, kernel_init=up, rngs=rngs)
        self.output = nnx.Linear(hidden, size, kernel_init=down, rngs=rngs)

    def initial_memory(self, batch: int) -> tuple[Array, Array, Array, Array]:
        """c, n, m, h, all [B, D]."""
        zeros = jnp.zeros((batch, self.size))
        return zeros, zeros, jnp.full_like(zeros, -1e30), zeros

    def __call__(self, memory: tuple, x: Array) -> tuple[tuple, Array]:
        """memory, x [B, D] -> memory, x for the next block."""
        c, n, m, h = memory
        mixed = jnp.einsum("bhd,ghde->bghe", split(h, self.heads), self.recurrent[...])
        gates = self.inputs(self.norm_1(x)) + mixed.reshape(len(x), -1)
        i, f, z, o = jnp.split(gates, 4, axis=-1)  # [B, D]
        decay = nnx.log_sigmoid(f) + m
        m = jnp.maximum(decay, i)
        take, keep = jnp.exp(i - m), jnp.exp(decay - m)
        c, n = keep * c + take * nnx.tanh(z), keep * n + take
        h = nnx.sigmoid(o) * c / n
        x = x + norm(split(h, self.heads)) * self.scale[...]
        gate, value = jnp.split(self.hidden(self.norm_2(x)), 2, axis=-1)
        return (c, n, m, h), x + self.output(nnx.gelu(gate) * value)


def split(x: Array, heads: int) -> Array:
    """[..., D] -> [..., H, D / H]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def norm(x: Array) -> Array:
    """[..., H, d], with mean 0 and variance 1 in each head -> [..., H d]."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x.reshape(*x.shape[:-2], -1)
