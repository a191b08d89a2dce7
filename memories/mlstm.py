"""mLSTM, the cell of xLSTM with a matrix memory: Beck et al. 2024, arXiv:2405.04517, eq. 19-27, app. A.3.

    m' = max(log sigmoid(f~) + m, i~)     i = exp(i~ - m')     f = exp(log sigmoid(f~) + m - m')
    C' = f C + i k v^T     n' = f n + i k     y = q C' / max(|q n'|, exp(-m'))

For each head a matrix C to which a value v is added under its key k, and from which a query q reads; two
gates decay and take in. Nothing of y enters the next step, so `piece` steps are a masked product of all
their queries with all their keys, and an unroll is piece after piece: short ones on a CPU. State: D^2 / heads
+ D + heads numbers. Cost per step: 4 D^2 + 2 D^2 / heads, and up to 2 piece D more in an unroll. Good at: many
items, recalled by content. Bad at: comparing with what the state already is. Differs from the paper: no
block around the cell (xlstm.py has it).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Memory(nnx.Module):
    """An mLSTM; a reset clears C and n and puts m to "nothing yet" before the cell."""

    def __init__(self, size: int, rngs: nnx.Rngs, heads: int = 4, piece: int | None = None):
        if size % heads:
            raise ValueError(f"heads must divide the width {size}, not {heads}")
        self.size, self.heads = size, heads
        self.piece = piece or (16 if jax.default_backend() == "cpu" else 128)
        self.query_key_value = nnx.Linear(size, 3 * size, use_bias=False, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.gates = nnx.Linear(size, 2 * heads, kernel_init=zeros, rngs=rngs)
        forget = jnp.linspace(3.0, 6.0, heads)  # at the start it remembers
        self.gates.bias[...] = jnp.concatenate([0.1 * rngs.params.normal((heads,)), forget])
        self.output_gate = nnx.Linear(size, size, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(size))

    def initial_memory(self, batch: int) -> tuple[Array, Array, Array]:
        """C [B, H, D / H, D / H], n [B, H, D / H], m [B, H]."""
        d = self.size // self.heads
        C, n = jnp.zeros((batch, self.heads, d, d)), jnp.zeros((batch, self.heads, d))
        return C, n, jnp.full((batch, self.heads), -1e30)

    def open(self, memory: tuple) -> tuple:
        return memory

    def step(self, acting: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        acting, y = self.at_once(acting, x[None], reset[None])
        return acting, y[0]

    def unroll(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D], piece by piece and then the rest."""
        whole = len(x) - len(x) % self.piece
        cut = lambda x: x[:whole].reshape(-1, self.piece, *x.shape[1:])
        turn = lambda memory, piece: self.at_once(memory, *piece)
        memory, y = jax.lax.scan(turn, memory, (cut(x), cut(reset)))
        y = y.reshape(whole, *x.shape[1:])
        if whole < len(x):
            memory, rest = self.at_once(memory, x[whole:], reset[whole:])
            y = jnp.concatenate([y, rest])
        return memory, y

    def at_once(self, memory: tuple, x: Array, reset: Array) -> tuple[tuple, Array]:
        """The same, all steps at once (eq. 65-74 of app. A.3)."""
        C, n, m = memory
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2, 0, 3)
        q, k, v = [split(x) for x in jnp.split(self.query_key_value(x), 3, axis=-1)]  # [B, H, T, d]
        k = k * k.shape[-1] ** -0.5
        i, f = jnp.moveaxis(self.gates(x).reshape(*reset.shape, 2, self.heads), 0, -1).swapaxes(
            0, 1
        )
        episode = jnp.cumsum(reset, axis=0).T[:, None]  # [B, 1, T], 0: that of the memory
        same = episode[..., :, None] == episode[..., None, :]  # [B, 1, T, T], and not of the future
        same &= jnp.tril(jnp.ones((len(x), len(x)), bool))
        decay = (same * nnx.log_sigmoid(f)[..., None, :]).sum(axis=-1)  # [B, H, T], in the episode
        # What step t keeps of step j, as a logarithm.
        kept = jnp.where(
            same, decay[..., :, None] - decay[..., None, :] + i[..., None, :], -jnp.inf
        )
        old = jnp.where(episode == 0, decay + m[..., None], -1e30)  # and what of the memory
        m = jnp.maximum(kept.max(axis=-1), old)
        kept, old = jnp.exp(kept - m[..., None]), jnp.exp(old - m)
        scores = jnp.einsum("bhtd,bhjd->bhtj", q, k) * kept
        read = jnp.einsum("bhtj,bhjd->bhtd", scores, v)
        read += old[..., None] * jnp.einsum("bhtd,bhde->bhte", q, C)
        norm = scores.sum(axis=-1) + old * jnp.einsum("bhtd,bhd->bht", q, n)
        # exp(-m) overflows long before it could be the smaller of the two.
        y = read / jnp.maximum(jnp.abs(norm), jnp.exp(jnp.minimum(-m, 60.0)))[..., None]
        kept, old, m = kept[..., -1, :, None], old[..., -1], m[..., -1]
        C = old[..., None, None] * C + jnp.einsum("bhjd,bhje->bhde", kept * k, v)
        n = old[..., None] * n + (kept * k).sum(axis=-2)
        y = self.norm(y.transpose(2, 0, 1, 3))  # [T, B, D]
        return (C, n, m), nnx.sigmoid(self.output_gate(x)) * y

    def norm(self, y: Array) -> Array:
        """[..., H, D / H], with mean 0 and variance 1 in each head, times a learned scale -> [..., D]."""
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt((y**2).mean(axis=-1, keepdims=True) + 1e-6)
        return y.reshape(*y.shape[:-2], -1) * self.scale[...]
