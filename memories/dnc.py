"""Differentiable neural computer: Graves et al. 2016, "Hybrid computing using a neural network with
dynamic external memory", Nature 538 (methods, eq. 1-12 of the supplement's glossary).

    h = LSTM(x, reads)     f, k, g, a, e, v, pi, ... = W h     y = W (h, reads)
    u = (u + w - u w) prod_r (1 - f_r w_r)     free_i = (1 - u_i) prod of u_j where u_j < u_i
    w = g (a free + (1 - a) content(M, k))     M = M (1 - w e^T) + w v^T
    L_ij = (1 - w_i - w_j) L_ij + w_i p_j where i is not j     p = (1 - sum w) p + w
    w_r = pi_1 L^T w_r + pi_2 L w_r + pi_3 content(M, k_r)     reads_r = w_r M

An LSTM of D cells writes to N slots of W numbers, where the content is near a key or where nothing is in
use (u), and R readers read by content, or the slot written after (L) or before (L^T) the one read last. State:
N W + N^2 + (R + 3) N + R W + 2 D numbers, 816 at the defaults and D = 64. Cost per step: 9 D^2 + 6 R W D, and
(2 R + 3) (N^2 + N W) for the slots, some 70,000 multiplications there. Good at: lists and order, in principle.
Bad at: speed, and learning to be used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class State(NamedTuple):
    slots: Array  # [B, N, W]
    usage: Array  # [B, N]
    link: Array  # [B, N, N], i was written after j
    precedence: Array  # [B, N], was written last
    read_weights: Array  # [B, R, N]
    write_weights: Array  # [B, N]
    reads: Array  # [B, R W]
    h: Array  # [B, H]
    c: Array  # [B, H]


class Memory(nnx.Module):
    """A DNC; a reset clears all of its state before the step."""

    def __init__(
        self, size: int, rngs: nnx.Rngs, slots: int = 16, width: int = 16, readers: int = 4
    ):
        self.size, self.slots, self.width, self.readers = size, slots, width, readers
        self.lstm = nnx.Linear(2 * size + readers * width, 4 * size, rngs=rngs)
        self.lstm.bias[...] = self.lstm.bias[...].at[size : 2 * size].set(1.0)
        # Read: keys, strengths, modes, free gates. Write: key, strength, erase, value, two gates.
        self.cuts = readers * width, readers, 3 * readers, readers, width, 1, width, width, 1, 1
        self.interface = nnx.Linear(size, sum(self.cuts), rngs=rngs)
        self.output = nnx.Linear(size + readers * width, size, rngs=rngs)

    def initial_memory(self, batch: int) -> State:
        N, W, R, H = self.slots, self.width, self.readers, self.size
        shapes = (N, W), (N,), (N, N), (N,), (R, N), (N,), (R * W,), (H,), (H,)
        return State(*[jnp.zeros((batch, *shape)) for shape in shapes])

    def open(self, memory: State) -> State:
        return memory

    def unroll(self, memory: State, x: Array, reset: Array) -> tuple[State, Array]:
        """x [T, B, D], reset [T, B] -> memory, y [T, B, D], step by step."""
        return jax.lax.scan(lambda memory, step: self.step(memory, *step), memory, (x, reset))

    def step(self, acting: State, x: Array, reset: Array) -> tuple[State, Array]:
        """x [B, D], reset [B] -> acting, y [B, D]."""
        clear = lambda x: jnp.where(reset.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
        s = jax.tree.map(clear, acting)
        i, f, g, o = jnp.split(self.lstm(jnp.concatenate([x, s.reads, s.h], -1)), 4, axis=-1)
        c = nnx.sigmoid(f) * s.c + nnx.sigmoid(i) * nnx.tanh(g)
        h = nnx.sigmoid(o) * nnx.tanh(c)
        cuts = [sum(self.cuts[: n + 1]) for n in range(len(self.cuts) - 1)]
        read_keys, read_strengths, modes, free, key, strength, erase, value, *gates = jnp.split(
            self.interface(h), cuts, axis=-1
        )
        per_reader = lambda x: x.reshape(len(x), self.readers, -1)
        modes = nnx.softmax(per_reader(modes))[..., None, :]  # [B, R, 1, 3]
        write_gate, allocation_gate = [nnx.sigmoid(x) for x in gates]

        kept = jnp.prod(1.0 - nnx.sigmoid(free)[..., None] * s.read_weights, axis=1)
        usage = (s.usage + s.write_weights - s.usage * s.write_weights) * kept  # [B, N]
        by_content = content(s.slots, key[:, None], strength)[:, 0]
        write = allocation_gate * allocate(usage) + (1.0 - allocation_gate) * by_content
        write = write_gate * write  # [B, N]
        slots = s.slots * (1.0 - write[..., None] * nnx.sigmoid(erase)[:, None])
        slots += write[..., None] * value[:, None]

        now, then = write[:, :, None], write[:, None]
        link = (1.0 - now - then) * s.link + now * s.precedence[:, None]
        link *= 1.0 - jnp.eye(self.slots)
        precedence = (1.0 - write.sum(axis=-1, keepdims=True)) * s.precedence + write
        backward = jnp.einsum("bji,brj->bri", link, s.read_weights)
        forward = jnp.einsum("bij,brj->bri", link, s.read_weights)
        found = content(slots, per_reader(read_keys), read_strengths)
        read_weights = (modes * jnp.stack([backward, forward, found], axis=-1)).sum(axis=-1)
        reads = jnp.einsum("brn,bnw->brw", read_weights, slots).reshape(len(x), -1)
        acting = State(slots, usage, link, precedence, read_weights, write, reads, h, c)
        return acting, jnp.clip(self.output(jnp.concatenate([h, reads], axis=-1)), -20.0, 20.0)


def content(slots: Array, keys: Array, strengths: Array) -> Array:
    """slots [B, N, W], keys [B, R, W], strengths [B, R] -> weights [B, R, N] by the cosine between."""
    unit = lambda x: x * jax.lax.rsqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)
    cosine = jnp.einsum("brw,bnw->brn", unit(keys), unit(slots))
    return nnx.softmax((1.0 + nnx.softplus(strengths))[..., None] * cosine)


def allocate(usage: Array) -> Array:
    """usage [B, N] -> weights [B, N] of the slots to write to: 1 - use, if all less used ones are full.

    Without a sort: the product over those of less use, ties by their number.
    """
    usage, n = 1e-6 + (1.0 - 1e-6) * usage, jnp.arange(usage.shape[-1])
    mine, other = usage[:, :, None], usage[:, None]
    before = (other < mine) | ((other == mine) & (n < n[:, None]))
    return (1.0 - usage) * jnp.prod(jnp.where(before, other, 1.0), axis=-1)
