# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12",
#   "flax>=0.12.8,<0.13",
#   "optax>=0.2.8,<0.3",
#   "gymnasium[box2d]>=1.3,<1.4",
#   "gymnax>=1.0.1,<1.1",
#   "six>=1.16,<2",  # gymnax imports it without saying so
#   "envpool>=1.2.5,<1.3",
#   "orbax-checkpoint>=0.12,<0.13",
#   "tyro>=1.0,<1.1",
#   "tqdm>=4.66,<5",
#   "matplotlib>=3.9,<4",
# ]
# ///
"""Proximal policy optimisation with a Transformer-XL memory on many devices and hosts, in one file.

Schulman et al. 2017, arXiv:1707.06347 (loss: eq. 9); Dai et al. 2019, arXiv:1901.02860 (memory: section
3.2, relative positions: 3.3); Parisotto et al. 2019, arXiv:1910.06764 (layers normalised first: 3.1,
without its ReLU). "detail N": the N-th core detail of Huang et al. 2022, "The 37 Implementation
Details of PPO".

    python ppo_trxl_pmap.py                     # Craftax-Symbolic (envs/craftax.py), on all devices
    srun python ppo_trxl_pmap.py                # in a SLURM job with one task for each GPU
    python ppo_trxl_pmap.py --coordinator-address HOST:9000 --num-processes 2 --process-id 0
                                                # the first of two machines; on the other: 1

Expected on Craftax-Symbolic: not yet measured, for want of GPUs. A test holds memories, metrics and
parameters of four devices to those that ppo_trxl.py computes on one.

Differs from ppo_trxl.py in: the environments are shared out to the devices. Each device acts in its own
and learns from their windows; what it learns, and the moments of the advantages, are averaged over
all devices in every minibatch. The name is the customary one: jax.pmap itself has become
jax.shard_map over a mesh, which is used here. The defaults are those of transformerXL_PPO_JAX.
"""

import os
import time

LAUNCHED = time.time()  # before the slow imports, so that `seconds` in metrics.csv counts them
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # if the CPU has AVX-512
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/unroll"))

import atexit
import dataclasses
import json
import re
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata, util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from jax import Array
from jax.experimental import buffer_callback, io_callback, multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

CALL_STEPS = 8_192  # shorter iterations share a call, and with it a row of metrics.csv
IN_HASTE = {"xla_backend_optimization_level": 0}  # compiler options for what runs only once


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "craftax::Craftax-Symbolic-v1"  # suite::name, of environments in JAX
    env_kwargs: str | None = None  # JSON object of its arguments, None: 100 steps if MemoryChain
    mask_obs: tuple[int, ...] = ()  # observation entries to hide from the agent
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained at once by vmap: seed, seed + 1, ... (JAX suites only)
    total_timesteps: int = 1_000_000_000  # environment steps of each agent
    num_envs: int = 1024  # parallel environments, shared out to the devices
    num_steps: int = 128  # steps in each environment between two updates
    learning_rate: float = 2e-4  # Adam's step size at the start
    anneal_lr: bool = True  # let the step size fall linearly to 0 over the run
    gamma: float = 0.999  # discount factor
    gae_lambda: float = 0.8  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches in each epoch, of windows
    update_epochs: int = 4  # passes over each batch
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move from 1
    clip_vloss: bool = False  # clip the value loss in the same way
    ent_coef: float = 0.002  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 1.0  # largest global norm of a gradient
    target_kl: float | None = None  # skip an update's remaining epochs once approx_kl exceeds this
    reward_scale: float = 1.0  # factor on the rewards the agent learns from, not on those reported
    memory_length: int = 128  # steps before the present one that a layer attends to
    window_length: int = 64  # steps of a training sequence, into which num_steps is cut
    num_layers: int = 2  # layers of the Transformer-XL
    num_heads: int = 8  # attention heads of each layer
    embed_dim: int = 256  # width of the layers
    positional_encoding: Literal["relative", "absolute", "learned"] = "relative"  # of past steps
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of products; bfloat16: ratios +-.03
    coordinator_address: str | None = None  # host:port of process 0, if there are several
    num_processes: int | None = None  # how many, None: as SLURM says, or just this one
    process_id: int | None = None  # which of them this is, None: as SLURM says
    target_return: float | None = None  # stop when the last 100 training episodes average this
    eval_episodes: int = 100  # greedy episodes at the end, 0 for none
    eval_env_id: str | None = None  # where to play them, if not in env_id
    checkpoint_every: int = 0  # iterations between checkpoints, 0 for one at the end
    resume: Path | None = None  # run folder to go on with; its config.json fills in other flags
    run_dir: Path | None = None  # folder of the run, runs/<script>__<env>__<seed>__<time> if None
    track: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

    def __post_init__(self):
        if self.env_kwargs is None:
            chain = self.env_id == "gymnax::MemoryChain-bsuite"
            object.__setattr__(self, "env_kwargs", '{"memory_length": 100}' if chain else "{}")

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_windows(self) -> int:
        return self.num_steps // self.window_length * self.num_envs

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on stderr that says what to change."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_ranges(args: Any, at_least_1: str, at_most_1: str, signed="target_return") -> None:
    """Refuses nan, inf, numbers below 0, and flags below or above 1 that must not be."""
    lows = dict.fromkeys(at_least_1.split(), 1) | dict.fromkeys(signed.split(), -(10**9))
    highs = dict.fromkeys(at_most_1.split(), 1) | {"seed": 2**30}
    for name, value in vars(args).items():
        low, high = lows.get(name, 0), highs.get(name, 1e38)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not low <= x <= high:
                fail(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")


def check_args(args: Args) -> None:
    """Ends the program with status 2 if a flag has a value that cannot work."""
    counts = "num_seeds num_envs num_steps num_minibatches update_epochs"
    counts += " memory_length window_length num_layers num_heads embed_dim"
    check_ranges(args, at_least_1=counts, at_most_1="gamma gae_lambda")
    if args.num_steps % args.window_length:
        fail(f"--window-length must divide --num-steps {args.num_steps}")
    if args.embed_dim % args.num_heads or args.embed_dim % 2:
        fail(f"--embed-dim must be even and a multiple of --num-heads {args.num_heads}")
    if args.num_envs % jax.device_count():
        fail(f"--num-envs {args.num_envs} must be a multiple of the {jax.device_count()} devices")
    num_windows = args.num_windows // jax.device_count()
    if num_windows % args.num_minibatches:
        divisors = [n for n in range(1, num_windows + 1) if num_windows % n == 0]
        fail(f"--num-minibatches must divide the windows of a device: take one of {divisors}")
    if args.num_iterations < 1:
        fail(f"--total-timesteps must be at least one batch, {args.batch_size}")


def check_env(env_id: str, env: "Env") -> None:
    """Ends the program with status 2 if this script cannot act in the environment."""
    if env.action_low is not None:
        fail(f"{env_id} has continuous actions: use rppo_continuous.py")


# --- Networks -------------------------------------------------------------------------------------


def linear(in_size: int, out_size: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    return nnx.Linear(in_size, out_size, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)


class MLP(nnx.Module):
    """Two tanh layers and a linear head, [..., in_size] -> [..., out_size]."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, out_scale: float, rngs):
        self.hidden_1 = linear(in_size, hidden_size, 2**0.5, rngs)
        self.hidden_2 = linear(hidden_size, hidden_size, 2**0.5, rngs)
        # Stored as [out, in]: XLA's CPU gradient of a narrow [in, out] matrix is 9 times slower.
        init, shape = nnx.initializers.orthogonal(out_scale), (out_size, hidden_size)
        self.head = nnx.Einsum("...i,oi->...o", shape, (out_size,), kernel_init=init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(nnx.tanh(self.hidden_2(nnx.tanh(self.hidden_1(x)))))


class CNN(nnx.Module):
    """The Nature DQN's image encoder, [..., H, W, C] -> [..., F]."""

    def __init__(self, obs_shape: tuple[int, ...], rngs: nnx.Rngs):
        *size, channels = obs_shape
        self.windows, layers = ((8, 4), (4, 2), (3, 1)), []
        for (width, stride), features in zip(self.windows, (32, 64, 64), strict=True):
            layers.append(linear(width * width * channels, features, 2**0.5, rngs))
            size, channels = [(n - width) // stride + 1 for n in size], features
        self.layers = nnx.List(layers)
        self.out_size = size[0] * size[1] * channels

    def __call__(self, image: Array) -> Array:
        x = image / 255.0 if image.dtype == jnp.uint8 else image
        # A convolution, as patches times a matrix: in a loop on a CPU its gradient is much faster.
        for layer, (width, stride) in zip(self.layers, self.windows, strict=True):
            rows, cols = [(n - width) // stride * stride + 1 for n in x.shape[-3:-1]]
            shifts = [(i, j) for i in range(width) for j in range(width)]
            parts = [x[..., i : i + rows : stride, j : j + cols : stride, :] for i, j in shifts]
            x = nnx.relu(layer(jnp.concatenate(parts, axis=-1)))  # [..., H', W', features]
        return x.reshape(*x.shape[:-3], self.out_size)


class Memory(NamedTuple):
    """What the agent remembers of the last M steps: the input of each layer, normalised."""

    inputs: Array  # [B, M, L, D], the oldest first; no gradient flows back through them
    age: Array  # [B], how far into its episode the last step was, -1 before any


class Cache(NamedTuple):
    """The memory while acting: as long as parameters are fixed, so are keys and values. Rings with one place
    more than the memory: a step is written over the oldest, then read with the others."""

    rings: tuple[tuple[Array, Array], ...]  # keys and values of each layer, [B, H, M + 1, D / H]
    slot: Array  # where to write next
    age: Array  # [B]


def sinusoids(positions: Array, dim: int) -> Array:
    """[...] -> [..., D], sines and cosines of D / 2 wavelengths (arXiv:1706.03762, sec. 3.5)."""
    angles = positions[..., None] / 10_000.0 ** (2 * jnp.arange(dim // 2) / dim)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def norm(x: Array) -> Array:
    """LayerNorm of the last axis; its scale and bias are left to the linear layer that follows.

    Without parameters of its own, what is in the memory stays normalised while the agent changes.
    """
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def shift(scores: Array) -> Array:
    """Scores by distance, from M to 0, to scores by step: [..., W, M + 1] -> [..., W, M + W].

    Row i moves right by i: rows padded to M + W + 1 are read as rows of M + W (app. B).
    """
    *batch, window, distances = scores.shape
    width = distances - 1 + window  # M + W
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, window)]
    flat = jnp.pad(scores, padding).reshape(*batch, window * (width + 1))
    return flat[..., : window * width].reshape(*batch, window, width)


def episode_ages(age: Array, reset: Array) -> Array:
    """age [B] before the first step, reset [T, B] -> [T, B], steps since the episode's first one."""
    steps = jnp.arange(len(reset))[:, None]
    first = jax.lax.cummax(jnp.where(reset, steps, -1), axis=0)  # -1: before these steps
    return jnp.where(first < 0, age + 1 + steps, steps - first)


def visible_steps(ages: Array, memory_length: int) -> Array:
    """ages [T, B] -> [B, T, M + T], which steps a step attends to: M back, in its own episode.

    With M = 2 and T = 4, if no episode begins (left), and if one does at step 2 (right):

        memory | steps        memory | steps
         x  x  | x . . .       x  x  | x . . .
         .  x  | x x . .       .  x  | x x . .
         .  .  | x x x .       .  .  | . . x .
         .  .  | . x x x       .  .  | . . x x
    """
    steps = jnp.arange(len(ages))
    distances = steps[:, None] - jnp.arange(-memory_length, len(ages))  # [T, M + T]
    farthest = jnp.minimum(ages.T, memory_length)[..., None]  # [B, T, 1]
    return (distances >= 0) & (distances <= farthest)


class Layer(nnx.Module):
    """A layer of Transformer-XL: attention, then a perceptron, each normalised first and added to x.

    score_ij = ((q_i + u) k_j + (q_i + v) W r_(i-j)) / sqrt(D / H)   (arXiv:1901.02860, sec. 3.3)
    """

    def __init__(self, args: Args, rngs: nnx.Rngs):
        dim, self.num_heads, self.dtype = args.embed_dim, args.num_heads, args.compute_dtype
        self.distances = args.memory_length + 1
        self.query = linear(dim, dim, 1.0, rngs)
        self.key_value = linear(dim, 2 * dim, 1.0, rngs)
        self.content_bias = nnx.Param(jnp.zeros(dim))  # u
        self.position_bias = nnx.Param(jnp.zeros(dim))  # v
        if args.positional_encoding == "relative":
            self.positions = linear(dim, dim, 1.0, rngs)  # W
        elif args.positional_encoding == "learned":
            self.positions = nnx.Embed(self.distances, dim, rngs=rngs)  # W r, any vectors
        else:
            self.positions = None
        self.attention_output = linear(dim, dim, 1.0, rngs)
        self.hidden = linear(dim, dim, 2**0.5, rngs)
        self.output = linear(dim, dim, 1.0, rngs)

    def split(self, x: Array) -> Array:
        """[..., D] -> [..., H, D / H]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def queries(self, inputs: Array) -> tuple[Array, Array]:
        """[..., D] -> q + u and q + v, scaled, both [..., H, D / H]."""
        query, scale = self.query(inputs), (inputs.shape[-1] // self.num_heads) ** -0.5
        biases = self.content_bias[...], self.position_bias[...]
        return tuple(self.split((query + bias) * scale) for bias in biases)

    def keys_values(self, inputs: Array) -> tuple[Array, Array]:
        """[..., D] -> keys and values, both [..., H, D / H]."""
        keys, values = jnp.split(self.key_value(inputs), 2, axis=-1)
        return self.split(keys), self.split(values)

    def position_keys(self) -> Array:
        """W r for the distances 0 to M -> [M + 1, H, D / H]."""
        distances = jnp.arange(self.distances)
        if isinstance(self.positions, nnx.Linear):
            distances = sinusoids(distances, self.positions.in_features).astype(self.dtype)
        return self.split(self.positions(distances).astype(self.dtype))

    def feed_forward(self, x: Array, attended: Array) -> Array:
        """x and what it attended to, both [..., D] -> x for the next layer."""
        x = x + self.attention_output(attended)
        return x + self.output(nnx.relu(self.hidden(norm(x).astype(self.dtype))))

    def unroll(self, x: Array, remembered: Array, visible: Array) -> tuple[Array, Array]:
        """x [B, T, D], remembered inputs [B, M, D], visible [B, T, M + T] -> x, its inputs [B, T, D]."""
        inputs = norm(x).astype(self.dtype)
        query, position_query = self.queries(inputs)
        parts = zip(self.keys_values(remembered), self.keys_values(inputs), strict=True)
        keys, values = [jnp.concatenate(pair, axis=1) for pair in parts]  # [B, M + T, H, D / H]
        scores = jnp.einsum("bihd,bjhd->bhij", query, keys, preferred_element_type=jnp.float32)
        if self.positions:
            positions = self.position_keys()[::-1]  # the farthest first
            scores += shift(jnp.einsum("bihd,ohd->bhio", position_query, positions))
        weights = nnx.softmax(jnp.where(visible[:, None], scores, -jnp.inf)).astype(self.dtype)
        attended = jnp.einsum("bhij,bjhd->bihd", weights, values)
        return self.feed_forward(x, attended.reshape(x.shape)), inputs

    def step(self, x: Array, ring: tuple, slot: Array, visible: Array) -> tuple[Array, tuple]:
        """One step: x [B, D], written to a slot of its ring, visible [B, M + 1] -> x, ring."""
        inputs = norm(x).astype(self.dtype)
        query, position_query = self.queries(inputs)
        write = lambda ring, new: jax.lax.dynamic_update_index_in_dim(ring, new, slot, axis=2)
        keys, values = ring = jax.tree.map(write, ring, self.keys_values(inputs))
        scores = jnp.einsum("bhd,bhmd->bhm", query, keys, preferred_element_type=jnp.float32)
        if self.positions:
            positions = jnp.roll(self.position_keys()[::-1], slot + 1, axis=0)  # of the slots
            scores += jnp.einsum("bhd,mhd->bhm", position_query, positions)
        weights = nnx.softmax(jnp.where(visible[:, None], scores, -jnp.inf)).astype(self.dtype)
        attended = jnp.einsum("bhm,bhmd->bhd", weights, values)
        return self.feed_forward(x, attended.reshape(x.shape)), ring


class Agent(nnx.Module):
    """Encoder, Transformer-XL, and a perceptron each for actor and critic (details 2 and 13)."""

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, args: Args, rngs):
        self.cnn = CNN(obs_shape, rngs) if len(obs_shape) == 3 else None
        in_size, dim = self.cnn.out_size if self.cnn else obs_shape[0], args.embed_dim
        self.memory_length, self.dtype = args.memory_length, args.compute_dtype
        self.absolute = args.positional_encoding == "absolute"
        self.embed = linear(in_size, dim, 2**0.5, rngs)
        self.layers = nnx.List([Layer(args, rngs) for _ in range(args.num_layers)])
        self.actor = MLP(dim, dim, action_size, 0.01, rngs)  # starts near uniform
        self.critic = MLP(dim, dim, 1, 1.0, rngs)

    def initial_memory(self, num_envs: int) -> Memory:
        """The memory before the first step."""
        shape = (num_envs, self.memory_length, len(self.layers), self.embed.out_features)
        return Memory(jnp.zeros(shape, self.dtype), jnp.full(num_envs, -1))

    def unroll(self, memory: Memory, obs: Array, reset: Array):
        """obs [T, B, *obs_shape], reset [T, B] -> memory, log-probs [T, B, A], value [T, B]."""
        ages = episode_ages(memory.age, reset)  # [T, B]
        visible = visible_steps(ages, self.memory_length)
        x, inputs = self.encode(obs, ages).swapaxes(0, 1), []  # [B, T, D]
        for n, layer in enumerate(self.cast_layers()):
            x, new = layer.unroll(x, memory.inputs[:, :, n], visible)
            inputs.append(new)
        inputs = jax.lax.stop_gradient(jnp.stack(inputs, axis=2))  # [B, T, L, D]
        inputs = jnp.concatenate([memory.inputs, inputs], axis=1)[:, -self.memory_length :]
        return Memory(inputs, ages[-1]), *self.heads(x.swapaxes(0, 1))

    def open(self, memory: Memory) -> Cache:
        """The same for acting, as long as the parameters stay the same."""

        def ring(x):  # [B, M, H, D / H] -> [B, H, M + 1, D / H]
            return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 1), (0, 0)))

        remembered = jnp.moveaxis(memory.inputs, 2, 0)  # [L, B, M, D]
        pairs = zip(self.cast_layers(), remembered, strict=True)
        rings = tuple(jax.tree.map(ring, layer.keys_values(inputs)) for layer, inputs in pairs)
        return Cache(rings, jnp.int32(self.memory_length), memory.age)

    def step(self, cache: Cache, obs: Array, reset: Array):
        """obs [B, *obs_shape], reset [B] -> cache, log-probs [B, A], value [B]."""
        age, places = jnp.where(reset, 0, cache.age + 1), self.memory_length + 1
        distances = (cache.slot - jnp.arange(places)) % places  # 0: this step
        visible = distances <= age[:, None]  # [B, M + 1]
        x, rings = self.encode(obs, age), []
        for layer, ring in zip(self.cast_layers(), cache.rings, strict=True):
            x, ring = layer.step(x, ring, cache.slot, visible)
            rings.append(ring)
        return Cache(tuple(rings), (cache.slot + 1) % places, age), *self.heads(x)

    def cast_layers(self) -> list[Layer]:
        """The layers as they compute; what is learned stays in float32."""
        return [jax.tree.map(lambda x: x.astype(self.dtype), layer) for layer in self.layers]

    def encode(self, obs: Array, age: Array) -> Array:
        """[..., *obs_shape], [...] -> [..., D]."""
        x = self.embed(self.cnn(obs) if self.cnn else obs)
        return x + sinusoids(age, x.shape[-1]) if self.absolute else x

    def heads(self, x: Array) -> tuple[Array, Array]:
        """[..., D] -> log-probs of the actions [..., A], value [...]."""
        return nnx.log_softmax(self.actor(x)), self.critic(x)[..., 0]


# --- Rollout --------------------------------------------------------------------------------------


class Acting(NamedTuple):
    """What goes on from one rollout to the next."""

    env_state: Any
    obs: Array  # [B, *obs_shape], what to act on next
    reset: Array  # [B], obs begins an episode
    memory: Any  # [B, ...], before obs: what learning starts from; in a rollout, opened


class Transition(NamedTuple):
    """One step of all environments; rollout stacks them to [T, B, ...]."""

    obs: Array  # [B, *obs_shape]
    reset: Array  # [B], obs begins an episode: clear the memory before it
    action: Array  # [B]
    logprob: Array  # [B], log pi(action | obs)
    value: Array  # [B], V(obs)
    reward: Array  # [B]
    done: Array  # [B], the action ended the episode
    final_value: Array  # [B], V(next_obs) where a time limit cut the episode, else 0


def rollout(agent: Agent, env: "Env", acting: Acting, key: Array, num_steps: int):
    """Acts for num_steps steps -> Acting, Transition [T, B, ...]."""
    action_keys, env_keys = jax.random.split(key, (2, num_steps))

    def act_and_step(acting, keys):
        action_key, env_key = keys
        memory, logprobs, value = agent.step(acting.memory, acting.obs, acting.reset)
        action = jax.random.categorical(action_key, logprobs)
        logprob = jnp.take_along_axis(logprobs, action[:, None], axis=-1)[:, 0]
        env_state, timestep = env.step(env_key, acting.env_state, action)
        # The task goes on beyond a time limit, so bootstrap there (arXiv:1712.00378, sec. 3).
        cut = timestep.truncated & ~timestep.terminated
        final_value = jax.lax.cond(
            cut.any(),
            lambda: jnp.where(
                cut, agent.step(memory, timestep.next_obs, jnp.zeros_like(cut))[-1], 0.0
            ),
            lambda: jnp.zeros_like(value),
        )
        done = timestep.terminated | timestep.truncated
        transition = Transition(
            acting.obs, acting.reset, action, logprob, value, timestep.reward, done, final_value
        )
        return Acting(env_state, timestep.obs, done, memory), transition

    return jax.lax.scan(act_and_step, acting, (action_keys, env_keys))


def remember(agent: Agent, memory, batch: Transition, length: int) -> tuple[Any, Any]:
    """One more pass over what was seen, from memory [B, ...] on -> the memory after it, and those before
    each sequence of this length, [K B, ...].
    """
    to_windows = lambda x: x.reshape(-1, length, *x.shape[1:])  # [T, B, ...] -> [K, W, B, ...]
    advance = lambda memory, window: (agent.unroll(memory, *window)[0], memory)
    memory, starts = jax.lax.scan(advance, memory, (to_windows(batch.obs), to_windows(batch.reset)))
    return memory, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), starts)


# --- Advantages -----------------------------------------------------------------------------------


def compute_gae(rewards, values, dones, last_value, gamma: float, gae_lambda: float):
    """Generalised advantage estimation, arXiv:1506.02438, eq. 16 -> advantages, returns, both [T, B].

    rewards (plus gamma * V(next_obs) where a time limit cut), values, dones: [T, B]; last_value: [B],
    V of the observation after the last step.
    """
    next_values = jnp.concatenate([values[1:], last_value[None]])  # [T, B]
    deltas = rewards + gamma * next_values * ~dones - values  # [T, B], TD errors

    def backward(advantage, step):
        delta, done = step
        advantage = delta + gamma * gae_lambda * ~done * advantage
        return advantage, advantage

    start = jnp.zeros_like(last_value)
    _, advantages = jax.lax.scan(backward, start, (deltas, dones), reverse=True)
    return advantages, advantages + values


# --- Loss -----------------------------------------------------------------------------------------


def ppo_loss(
    agent: Agent, memory, batch: Transition, advantages: Array, returns: Array, args: Args
):
    """Clipped surrogate, value and entropy loss (eq. 9) of windows [W, S, ...] that begin with
    memory [S, ...] -> loss, metrics.
    """
    _, logprobs, value = agent.unroll(memory, batch.obs, batch.reset)
    assert value.shape == batch.logprob.shape == advantages.shape == returns.shape
    logprob = jnp.take_along_axis(logprobs, batch.action[..., None], axis=-1)[..., 0]
    logratio = logprob - batch.logprob
    ratio = jnp.exp(logratio)

    if args.norm_adv:  # detail 7, with the moments over the minibatches of all devices
        moments = jnp.stack([advantages.mean(), advantages.var()])
        means, variances = jax.lax.all_gather(moments, "devices", axis=1)
        std = jnp.sqrt(variances.mean() + means.var())  # E[x^2] - mean^2 would cancel in float32
        advantages = (advantages - means.mean()) / (std + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()  # eq. 7

    v_error = (value - returns) ** 2
    if args.clip_vloss:  # detail 9
        clipped_value = jnp.clip(value, batch.value - args.clip_coef, batch.value + args.clip_coef)
        v_error = jnp.maximum(v_error, (clipped_value - returns) ** 2)
    v_loss = 0.5 * v_error.mean()

    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1).mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    return loss, {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
        "losses/approx_kl": ((ratio - 1) - logratio).mean(),  # k3 of joschu.net/blog/kl-approx.html
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that one iteration hands to the next: saving it is an exact checkpoint."""

    agent: Agent
    opt_state: optax.OptState
    acting: Acting
    episode_stats: "EpisodeStats"
    key: Array
    iteration: Array  # iterations done


def make_train(args: Args, env: "Env") -> tuple[Callable, Callable]:
    """-> init(key) -> state, and train_iteration(state) -> (state, metrics), on all devices.

    args and env are those of one device: num_envs is its share. What follows runs on each device, and
    sees that share of the arrays marked "devices" below; of all else, every device has the whole.
    """
    clip = optax.clip_by_global_norm(args.max_grad_norm)  # detail 11
    # eps 1e-5 as the first PPO had it (detail 3); the off-policy scripts keep Adam's own 1e-8.
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-5))  # without a step size: `update`

    def init(key: Array) -> TrainState:
        agent_key, env_key, key = jax.random.split(key, 3)
        env_key = jax.random.fold_in(env_key, jax.lax.axis_index("devices"))
        agent = Agent(env.obs_shape, env.action_size, args, nnx.Rngs(agent_key))
        env_state, obs = env.reset(env_key)
        reset, memory = jnp.ones(args.num_envs, bool), agent.initial_memory(args.num_envs)
        acting = Acting(env_state, obs, reset, memory)
        episode_stats = EpisodeStats(jnp.zeros((args.num_envs * jax.device_count(), 2)))
        return TrainState(agent, tx.init(agent), acting, episode_stats, key, jnp.int32(0))

    def train_iteration(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        agent, opt_state, acting, episode_stats, key, iteration = state
        rollout_key, update_key, key = jax.random.split(key, 3)
        device = jax.lax.axis_index("devices")
        rollout_key, update_key = (jax.random.fold_in(x, device) for x in (rollout_key, update_key))
        memory = acting.memory
        acting = acting._replace(memory=agent.open(memory))
        acting, batch = rollout(agent, env, acting, rollout_key, args.num_steps)
        assert batch.reward.shape == (args.num_steps, args.num_envs)  # [T, B]

        # Where a time limit cut the episode: r' = r + gamma V(next_obs).
        rewards = args.reward_scale * batch.reward + args.gamma * batch.final_value
        *_, last_value = agent.step(acting.memory, acting.obs, acting.reset)
        advantages, returns = compute_gae(
            rewards, batch.value, batch.done, last_value, args.gamma, args.gae_lambda
        )
        assert advantages.shape == returns.shape == (args.num_steps, args.num_envs)
        gathered = (batch.reward, batch.done, batch.value, returns)
        gathered = jax.lax.all_gather(gathered, "devices", axis=1, tiled=True)
        reward, done, value, all_returns = gathered  # [T, B of all devices]
        episode_stats, episode_metrics = record_episodes(episode_stats, reward, done)
        explained = 1.0 - jnp.var(all_returns - value) / (jnp.var(all_returns) + 1e-8)

        progress = args.anneal_lr * iteration / args.num_iterations
        learning_rate = args.learning_rate * (1.0 - progress)  # detail 4
        learner, length = (agent, opt_state, tx, learning_rate), args.window_length
        memory, starts = remember(agent, memory, batch, length)
        data = jax.tree.map(partial(to_sequences, length=length), (batch, advantages, returns))
        agent, opt_state, metrics = update(*learner, starts, data, update_key, args)
        acting = acting._replace(memory=memory)
        metrics |= {"losses/explained_variance": explained, "charts/learning_rate": learning_rate}
        state = TrainState(agent, opt_state, acting, episode_stats, key, iteration + 1)
        return state, metrics | episode_metrics

    whole, shared_out = PartitionSpec(), PartitionSpec("devices")
    specs = TrainState(*[whole] * len(TrainState._fields))._replace(acting=shared_out)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    shard = partial(jax.shard_map, mesh=mesh, check_vma=False)  # simulators do not mark what varies
    init = shard(init, in_specs=whole, out_specs=specs)
    return init, shard(train_iteration, in_specs=(specs,), out_specs=(specs, whole))


def mean_over_devices(tree: Any) -> Any:
    """Averages all arrays of a tree in one collective."""
    flat, unflatten = ravel_pytree(tree)
    return unflatten(jax.lax.pmean(flat, "devices"))


def to_sequences(x: Array, length: int) -> Array:
    """[T, B, ...] -> [W, K B, ...], K sequences of length W of each environment."""
    x = x.reshape(-1, length, *x.shape[1:]).swapaxes(0, 1)  # [W, K, B, ...]
    return x.reshape(length, -1, *x.shape[3:])


def update(agent, opt_state, tx, learning_rate, memory, data, key, args: Args):
    """Epochs of gradient steps on windows [W, K B, ...] that begin with memory [K B, ...], in minibatches of
    them -> agent, opt_state, metrics.
    """

    def minibatch_step(learner, indices):
        agent, opt_state = learner
        start = jax.tree.map(lambda x: x[indices], memory)  # [S, ...]
        minibatch = jax.tree.map(lambda x: x[:, indices], data)  # [W, S, ...]
        output = jax.grad(ppo_loss, has_aux=True)(agent, start, *minibatch, args)
        grads, metrics = mean_over_devices(output)  # all stop at the same target_kl
        updates, opt_state = tx.update(grads, opt_state)
        agent = optax.apply_updates(agent, jax.tree.map(lambda u: -learning_rate * u, updates))
        return (agent, opt_state), metrics

    @jax.jit  # so that it is traced once
    def epoch(learner, key):
        # Cheaper than random.permutation; equal bits, which are rare, keep their order: no harm.
        order = jnp.argsort(jax.random.bits(key, (args.num_windows,)))  # random (detail 6)
        indices = order.reshape(args.num_minibatches, -1)  # [N, S]
        learner, metrics = jax.lax.scan(minibatch_step, learner, indices)
        return learner, jax.tree.map(jnp.mean, metrics)

    def epoch_if_near(carry, key):
        learner, metrics = carry
        if args.target_kl is None:
            return epoch(learner, key), None
        far = metrics["losses/approx_kl"] > args.target_kl
        return jax.lax.cond(far, lambda: carry, lambda: epoch(learner, key)), None

    learner, keys = (agent, opt_state), jax.random.split(key, args.update_epochs)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(epoch, learner, key)[1])
    (learner, metrics), _ = jax.lax.scan(epoch_if_near, (learner, zeros), keys)
    return *learner, metrics


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(state: TrainState, env: "Env", key: Array, max_steps: int = 108_000):
    """Plays the most probable actions for one episode in each environment -> returns, lengths [B].

    Only first episodes count: those that end first are short. After max_steps, one counts as it is.
    """

    def playing(carry):
        *_, lengths, alive = carry
        return alive.any() & (lengths.max() < max_steps)

    def act_and_step(carry):
        (env_state, obs, reset, memory), key, returns, lengths, alive = carry
        env_key, key = jax.random.split(key)
        memory, logprobs, _ = state.agent.step(memory, obs, reset)
        env_state, timestep = env.step(env_key, env_state, logprobs.argmax(axis=-1))
        returns += jnp.where(alive, timestep.reward, 0.0)
        lengths += alive
        done = timestep.terminated | timestep.truncated
        alive &= ~done
        return Acting(env_state, timestep.obs, done, memory), key, returns, lengths, alive

    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    zeros, memory = jnp.zeros(obs.shape[0]), state.agent.initial_memory(obs.shape[0])
    acting = Acting(env_state, obs, zeros == 0, state.agent.open(memory))
    carry = (acting, key, zeros, zeros, zeros == 0)
    _, _, returns, lengths, _ = jax.lax.while_loop(playing, act_and_step, carry)
    return returns, lengths


# --- Environment: from here on the text is the same in every script -------------------------------


class Timestep(NamedTuple):
    """What a step gives, for all environments at once. Ended ones are reset in the same step."""

    obs: Array  # [B, *obs_shape], what to act on next: after an end, of the new episode
    next_obs: Array  # [B, *obs_shape], where the action led: after an end, of the old episode
    reward: Array  # [B]
    terminated: Array  # [B], the task ended
    truncated: Array  # [B], a time limit cut it


class Env(NamedTuple):
    """A batch of environments as two pure functions; no action bounds where actions are discrete."""

    reset: Callable  # key -> env_state, obs; each leaf of both is [B, ...] if it is not hosted
    step: Callable  # key, env_state, action -> env_state, Timestep
    obs_shape: tuple[int, ...]  # of one environment: a vector, or an image [H, W, C]
    action_size: int  # number of discrete actions, or of entries of a continuous one
    action_low: np.ndarray | None = None
    action_high: np.ndarray | None = None
    hosted: bool = False  # stepped outside JAX: no vmap over seeds, no state in checkpoints


def make_env(env_id: str, num_envs: int, seed=0, env_kwargs="{}", mask_obs=()) -> Env:
    """Builds num_envs environments `suite::name`; bad input ends the program with status 2."""
    suite, _, name = env_id.partition("::")
    hosts = {"gymnasium": gymnasium_env, "envpool": envpool_env}
    suites = {"gymnax": gymnax_env} | hosts
    files = {path.stem: path for path in Path(__file__).parent.glob("envs/*.py")}
    if suite not in suites | files:
        fail(f"--env-id {env_id} must be suite::name, of {', '.join([*suites, *files])}, envs/*.py")
    # Simulators give environment i the seed + i, so seeds in a row would share all but one.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 2)
    try:
        make = suites.get(suite) or runpy.run_path(str(files[suite]))["make"]
        batch, of = (host_env, (num_envs, seed)) if suite in hosts else (vmap_env, ())
        reset, step, actions, *rest = make(name, *of, **json.loads(env_kwargs))
        reset, step = batch(num_envs, partial(shape_obs, mask_obs), reset, step, *rest)
        obs = jax.eval_shape(reset, jax.random.key(0))[1]
        return Env(reset, step, obs.shape[1:], *action_spec(actions), suite in hosts)
    except ModuleNotFoundError as error:
        how = f"envs/{suite}.py says how" if suite in files else f"pip install {error.name}"
        fail(f"{env_id} needs {error.name}, which is missing: {how}")
    except Exception as error:  # each simulator has its own
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        what = f"{env_id} with --env-kwargs '{env_kwargs}' and --mask-obs {mask_obs}"
        fail(f"{what}: {reason} ({where.filename}, line {where.lineno})")


def shape_obs(mask_obs: tuple[int, ...], obs: Any) -> Array:
    """Screens -> [B, H, W, C]; all else, trees too -> a float32 vector [B, size] without mask_obs."""
    first, *others = parts = jax.tree.leaves(obs)
    if first.ndim == 4 and sorted(first.shape[1:])[1] >= 36 and not others:
        assert not mask_obs, "--mask-obs is for vectors, and these are images"
        return jnp.moveaxis(first, 1, -1) if first.shape[1] < first.shape[3] else first
    vector = jnp.concatenate([jnp.float32(x).reshape(len(x), -1) for x in parts], axis=1)
    keep = np.delete(np.arange(vector.shape[1]), mask_obs)
    assert keep.size, "--mask-obs hides every entry"
    return vector[:, keep] if mask_obs else vector


def action_spec(actions: Any) -> tuple[int, np.ndarray | None, np.ndarray | None]:
    """A number of actions, bounds (low, high) or a space of any suite -> action_size, low, high."""
    kind = type(actions).__name__
    if kind == "int" or (kind == "Discrete" and getattr(actions, "start", 0) == 0):
        return int(getattr(actions, "n", actions)), None, None
    if kind == "Box":
        actions = tuple(np.broadcast_to(x, actions.shape) for x in (actions.low, actions.high))
    if isinstance(actions, tuple) and np.ndim(actions[0]) < 2:
        low, high = np.float32(actions).reshape(2, -1)
        return low.size, low, high
    raise ValueError(f"only Discrete (from 0) and one-dimensional Box actions work, not {actions}")


def gymnax_env(name: str, **kwargs) -> tuple:
    """Arguments go to the environment's parameters where they have such a field, else to itself."""
    gymnax = import_gymnax()
    changes = {x: kwargs.pop(x) for x in vars(gymnax.make(name)[1]) if x in kwargs}
    env, params = gymnax.make(name, **kwargs)
    params = params.replace(**changes)

    def step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params)

    return partial(env.reset_env, params=params), step, env.action_space(params)


def import_gymnax() -> Any:
    """gymnax in a sixth of the time: what it needs only to draw is loaded when it is used."""

    class Later(ModuleType):
        __getattr__ = lambda self, name: getattr(import_module(self.__name__), name)

    later = {x: Later(x) for x in ("seaborn", "matplotlib.pyplot") if x not in sys.modules}
    try:
        sys.modules.update(later)
        return import_module("gymnax")
    finally:  # whoever imports them elsewhere has the real ones
        for name in later:
            del sys.modules[name]


def vmap_env(num_envs: int, shape: Callable, reset: Callable, step: Callable, envs_per_reset=1):
    """One environment's functions -> an Env's. envs_per_reset that end in a step share an episode."""
    num_new = max(1, num_envs // envs_per_reset)
    reset, step = jax.jit(reset), jax.jit(step)  # so that they are traced once

    def env_reset(key, number=num_envs):
        obs, state = jax.vmap(reset)(jax.random.split(key, number))
        return state, shape(obs)

    def env_step(key, state, action):
        keys = jax.random.split(key, num_envs + 1)  # one for each environment, one for resets
        next_obs, state, reward, terminated, truncated = jax.vmap(step)(keys[:-1], state, action)
        next_obs, done = shape(next_obs), terminated | truncated

        def replace_ended():
            chosen = (jnp.cumsum(done) - 1) % num_new  # [B], the k-th to end gets new episode k
            replace = lambda old, new: jax.vmap(jnp.where)(done, new[chosen], old)
            return jax.tree.map(replace, (state, next_obs), env_reset(keys[-1], num_new))

        state, obs = jax.lax.cond(done.any(), replace_ended, lambda: (state, next_obs))
        return state, Timestep(obs, next_obs, jnp.float32(reward), terminated, truncated)

    return env_reset, env_step


def gymnasium_env(name: str, num_envs: int, seed: int, **kwargs) -> tuple:
    """Any registered environment; of package:Name-v0, the package is imported first."""
    gymnasium = import_module("gymnasium")

    def make_one():
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
        box = isinstance(env.observation_space, gymnasium.spaces.Box)
        return env if box else gymnasium.wrappers.FlattenObservation(env)

    envs = gymnasium.vector.SyncVectorEnv([make_one] * num_envs, autoreset_mode="Disabled")
    envs.reset(seed=seed)
    reset = lambda chosen: envs.reset(options={"reset_mask": chosen})[0][chosen]
    return reset, envs.step, envs.single_action_space


def envpool_env(name: str, num_envs: int, seed: int, **kwargs) -> tuple:
    """EnvPool's own reset would come one step late."""
    pool = import_module("envpool").make_gymnasium(name, num_envs=num_envs, seed=seed, **kwargs)
    assert pool.config["max_num_players"] == 1, "it has several players"
    reset = lambda chosen: pool.reset(np.flatnonzero(chosen).astype(np.int32))[0]
    return reset, pool.step, pool.action_space


def host_env(num_envs: int, shape: Callable, reset: Callable, step: Callable):
    """A simulator's reset(chosen [B]) and step(action) -> an Env's; one call from JAX a step."""
    everyone = np.ones(num_envs, bool)
    obs_type = jax.tree.map(jnp.asarray, reset(everyone))  # [B, ...]
    step_type = np.int32(0), Timestep(obs_type, obs_type, jnp.zeros(num_envs), everyone, everyone)

    def host_step(token, action):  # in numpy: a callback that calls JAX can wait for itself
        next_obs, reward, terminated, truncated, *_ = step(np.asarray(action))
        obs, done = jax.tree.map(np.array, next_obs), terminated | truncated
        if done.any():
            for old, new in zip(jax.tree.leaves(obs), jax.tree.leaves(reset(done)), strict=True):
                old[done] = new
        return 0, Timestep(obs, next_obs, reward, terminated, truncated)

    def env_reset(key):
        token, obs = call_host(lambda: (0, reset(everyone)), (np.int32(0), obs_type))
        return token, shape(obs)

    def env_step(key, token, action):  # who passes `token` on has his steps in order
        token, (obs, next_obs, *rest) = call_host(host_step, step_type, token, action)
        return token, Timestep(shape(obs), shape(next_obs), *rest)

    return env_reset, env_step


def call_host(call: Callable, result_type: Any, *args: Array) -> Any:
    """call(*args), in numpy, whenever the compiled program comes to it."""
    if jax.default_backend() != "cpu":
        return io_callback(call, result_type, *args)  # ordered=True can make XLA abort on GPUs

    def write(_, result, *args):  # into JAX's own memory, in an eighth of io_callback's time
        jax.tree.map(lambda x, y: np.copyto(np.asarray(x), y), result, call(*args))

    return buffer_callback.buffer_callback(write, result_type, has_side_effect=True)(*args)


# --- Logging & checkpoints ------------------------------------------------------------------------


class EpisodeStats(NamedTuple):
    """Return and length of the running episodes and of the last 100 that ended."""

    running: Array  # [B, 2]
    last: Array | np.ndarray = np.full((100, 2), np.nan, np.float32)  # a ring, nan: fewer ended
    episodes: Array | np.int32 = np.int32(0)  # ended so far


def record_episodes(stats: EpisodeStats, rewards: Array, dones: Array) -> tuple[EpisodeStats, dict]:
    """Adds a rollout's rewards and dones, both [T, B] -> stats, means over the last 100 episodes."""

    def add(running, step):
        reward, done = step
        total = running + jnp.stack([reward, jnp.ones_like(reward)], axis=1)
        return jnp.where(done[:, None], 0.0, total), total

    running, totals = jax.lax.scan(add, stats.running, (rewards, dones))
    ended = dones.reshape(-1)  # [T * B]
    number = stats.episodes + jnp.cumsum(ended)  # of the episode that ended there, from 1
    slot = jnp.where(ended & (number > number[-1] - 100), number % 100, 100)
    last = jnp.asarray(stats.last).at[slot].set(totals.reshape(-1, 2), mode="drop")
    names = ("charts/episodic_return", "charts/episodic_length", "charts/episodes")
    metrics = dict(zip(names, (*jnp.nanmean(last, axis=0), number[-1]), strict=True))
    return EpisodeStats(running, last, number[-1]), metrics


def parse_args() -> Args:
    """Reads the command line; after --resume, the run's config.json gives what it leaves out."""
    args, script = tyro.cli(Args), Path(__file__).name
    if args.resume is None:
        return args
    try:
        config = json.loads((args.resume / "config.json").read_text())
        saved = {k: tuple(x) if isinstance(x, list) else x for k, x in config["args"].items()}
        assert config["script"] == script, f"it is a run of {config['script']}"
        default = Args(**saved | {"resume": args.resume, "run_dir": args.resume})
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        fail(f"--resume {args.resume} holds no config.json of a run of {script}: {error}")
    args = tyro.cli(Args, default=default)
    for name in ("seed", "num_seeds", "num_envs", "num_steps"):
        if getattr(args, name) != saved[name]:
            fail(f"--resume cannot change --{name.replace('_', '-')}, which is {saved[name]}")
    return args


def open_run(args: Any) -> Path:
    """Makes the run's folder; one that holds a run already is only taken with --resume."""
    for module in ["tensorboardX"] * args.tensorboard + ["wandb"] * args.track:
        if util.find_spec(module) is None:
            fail(f"{module} is missing: pip install {module}")
    name = f"{Path(__file__).stem}__{args.env_id}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    new = Path("runs") / re.sub(r"[^\w.-]+", "-", f"{name}-{os.getpid()}")
    run_dir = args.resume or args.run_dir or new
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK) or any(run_dir.iterdir()) and not args.resume:
            raise FileExistsError(f"{run_dir} is not empty, or not to be written to")
    except OSError as error:
        fail(f"{error}: choose another --run-dir, or go on with --resume")
    print(f"{args.env_id} -> {run_dir}", flush=True)
    return run_dir


def open_trackers(args: Any, run_dir: Path) -> list[Callable]:
    """Writes config.json -> functions of name, value and step, for TensorBoard and W&B."""
    versions = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
    config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "versions": versions}
    (run_dir / "config.part").write_text(json.dumps(config, indent=2, default=str) + "\n")
    (run_dir / "config.part").replace(run_dir / "config.json")  # a kill leaves the old or the new
    trackers = []
    if args.tensorboard:
        trackers.append(import_module("tensorboardX").SummaryWriter(str(run_dir)).add_scalar)
    if args.track:
        options = {"project": "unroll", "name": run_dir.name, "dir": run_dir, "resume": "allow"}
        options["id"] = re.sub(r"\W", "-", str(run_dir.resolve()))[-64:]  # the same when resumed
        run = import_module("wandb").init(config=config["args"], **options)
        trackers.append(lambda name, value, step: run.log({name: value}, step=step))
    return trackers


def open_log(args: Any, run_dir: Path, first_step: int) -> Callable:
    """-> log(step, metrics [num_seeds]), which adds rows to metrics.csv and to the trackers."""
    path, trackers = run_dir / "metrics.csv", open_trackers(args, run_dir)
    began, launched = time.time(), LAUNCHED
    if first_step and path.exists():  # drop what came after the checkpoint
        header, *lines = path.read_text().splitlines(keepends=True)
        lines = [x for x in lines if x.endswith("\n") and int(x.split(",")[0]) <= first_step]
        os.truncate(path, len(header) + sum(map(len, lines)))
        launched -= float(lines[-1].split(",")[1]) if lines else 0.0
    file = path.open("a", buffering=1, newline="\n")  # each line is written at once

    def log(step, metrics):
        now = time.time()
        for k, seed in enumerate(range(args.seed, args.seed + args.num_seeds)):
            row = {"step": step, "seconds": round(now - launched, 3), "seed": seed}
            row["charts/SPS"] = round((step - first_step) / (now - began))
            row |= {name: float(np.atleast_1d(x)[k]) for name, x in metrics.items()}
            if file.tell() == 0:
                print(*row, sep=",", file=file)
            print(*row.values(), sep=",", file=file)
            for track, name in product(trackers, row):
                track(f"seed_{seed}/{name}" if args.num_seeds > 1 else name, row[name], step)

    return log


def plot_curve(run_dir: Path) -> None:
    """learning_curve.png: the returns in metrics.csv over the steps, a line for each seed."""
    axes = import_module("matplotlib.figure").Figure(layout="constrained").subplots()
    rows = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True, deletechars="")
    for seed in np.unique(rows["seed"]):
        curve = np.atleast_1d(rows)[rows["seed"] == seed]
        axes.plot(curve["step"], curve["charts/episodic_return"], label=f"seed {seed:.0f}")
    axes.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes")
    axes.legend(handles=axes.lines[:10], title=run_dir.resolve().name)  # of many seeds, the first
    axes.figure.savefig(run_dir / "learning_curve.png", dpi=150)


def checkpoints(run_dir: Path) -> Any:
    """Orbax writes a checkpoint beside its place and renames it: what is there is complete."""
    ocp = import_module("orbax.checkpoint")
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    return ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options)


def save_checkpoint(run_dir: Path, state: Any) -> None:
    """Saves the arrays of the state as checkpoints/<iteration>, if it is not there already."""
    arrays = [x for x in jax.tree.leaves(state) if x.size]  # Orbax refuses empty ones
    form = import_module("orbax.checkpoint").args.StandardSave(arrays)
    with checkpoints(run_dir) as manager:
        manager.save(int(np.max(state.iteration)), args=form)


def load_checkpoint(run_dir: Path, like: Any, hosted: bool = False) -> Any:
    """The last complete checkpoint of a state like `like`; if hosted, with the episodes of that."""
    arrays = [x for x in jax.tree.leaves(like) if x.size]
    form = import_module("orbax.checkpoint").args.StandardRestore(arrays)
    try:
        with checkpoints(run_dir) as manager:
            saved = iter(manager.restore(None, args=form))
    except (FileNotFoundError, ValueError):
        fail(f"no checkpoint in {run_dir} fits these flags: its own are in config.json")
    state = jax.tree.map(lambda x: next(saved) if x.size else x, like)
    if hosted:
        print("the simulator's state is not saved: new episodes start here")
        stats = state.episode_stats._replace(running=like.episode_stats.running)
        state = state._replace(acting=like.acting, episode_stats=stats)
    return state


def compile_training(args: Any, init: Callable, train_iteration: Callable) -> tuple[Any, Callable]:
    """-> the first state; train(state, n), n iterations in one call whose losses are means."""
    key = jax.random.key(args.seed)
    if args.num_seeds > 1:
        key = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
        # Not all at once: JAX's batched QR, for the weights, can deadlock on few cores.
        init, train_iteration = partial(jax.lax.map, init), jax.vmap(train_iteration)
    train_iteration = jax.jit(train_iteration)  # so that it is traced once

    def train(state, num_iterations):
        def step(_, carry):
            state, metrics = train_iteration(carry[0])
            losses = {name: x / num_iterations for name, x in metrics.items() if "losses/" in name}
            return state, metrics | {name: x + carry[1][name] for name, x in losses.items()}

        metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(train_iteration, state)[1])
        return jax.lax.fori_loop(0, num_iterations, step, (state, metrics))

    with ThreadPoolExecutor() as pool:  # XLA leaves Python free: both compile at the same time
        state = pool.submit(jax.jit(init, compiler_options=IN_HASTE), key)
        train = jax.jit(train, donate_argnums=0).lower(jax.eval_shape(init, key), 1).compile()
    return state.result(), train


def run_training(args: Any, run_dir: Path, state: Any, train: Callable, caught: list) -> Any:
    """Calls train until the budget, the target or a signal ends it -> the last state."""
    iteration, iteration_steps = int(np.max(state.iteration)), args.num_envs * args.num_steps
    total, first = args.num_iterations * iteration_steps, iteration * iteration_steps
    # Short iterations share a call. Calls end at fixed iterations, so resuming repeats them.
    strides = [max(1, CALL_STEPS // iteration_steps), args.checkpoint_every or args.num_iterations]
    log, reached = open_log(args, run_dir, first), False
    shown = {} if sys.stderr.isatty() else {"file": open(os.devnull, "w"), "mininterval": 2}
    with tqdm.tqdm(total=total, initial=first, unit=" steps", unit_scale=True, **shown) as bar:
        while iteration < args.num_iterations and not reached and not caught:
            end = min(args.num_iterations, *[iteration - iteration % n + n for n in strides])
            state, metrics = jax.block_until_ready(train(state, end - iteration))
            iteration, step = end, end * iteration_steps
            log(step, metrics)
            returns = np.array(metrics["charts/episodic_return"])
            if not np.isfinite([x for name, x in metrics.items() if "losses/" in name]).all():
                sys.exit(f"loss nan or inf at step {step}; earlier checkpoints, if any: {run_dir}")
            if args.checkpoint_every and iteration % args.checkpoint_every == 0:
                save_checkpoint(run_dir, state)
            if args.target_return is not None and np.min(metrics["charts/episodes"]) >= 100:
                reached = returns.min() >= args.target_return
            bar.set_postfix_str(f"return {returns.mean():.1f}", refresh=False)
            if (bar.update(step - bar.n) or reached) and shown:
                print(bar, flush=True)
    return state


def write_evaluation(args: Any, run_dir: Path, state: Any, env: Env) -> None:
    """evaluation.json: greedy returns by seed; over seeds, IQM and interval (arXiv:2108.13264)."""
    keys = jax.vmap(jax.random.key)(args.seed + 2**30 + np.arange(args.num_seeds))  # not trained on
    batch = lambda state: jax.tree.map(lambda x: x if args.num_seeds > 1 else x[None], state)
    play = lambda state: jax.lax.map(lambda x: evaluate(x[0], env, x[1])[0], (batch(state), keys))
    returns = np.array(jax.jit(play)(state))  # [num_seeds, B]; jit leaves out a replay buffer
    result = {"env_id": args.eval_env_id or args.env_id, "mean": returns.mean(), "seeds": []}
    for seed, x in enumerate(returns, args.seed):
        own = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
        result["seeds"].append({"seed": seed, "episodes": x.size} | own)
    if args.num_seeds > 1:
        stats, means = import_module("scipy.stats"), returns.mean(axis=1)
        iqm = partial(stats.trim_mean, proportiontocut=0.25, axis=-1)
        interval = stats.bootstrap((means,), iqm, method="percentile", rng=0).confidence_interval
        result |= {"iqm": iqm(means), "iqm_ci95": [*interval]}
    (run_dir / "evaluation.json").write_text(json.dumps(result, indent=2, default=float) + "\n")
    print(f"greedy return over {args.eval_episodes} episodes: {result['mean']:.1f}")


def make_eval_env(args: Any, env: Env) -> Env:
    """Where the agent is judged in the end: what cannot work is refused before it is trained."""
    env_id, num_envs = args.eval_env_id or args.env_id, max(1, args.eval_episodes)
    eval_env = make_env(env_id, num_envs, args.seed + 2**30, args.env_kwargs, args.mask_obs)
    check_env(env_id, eval_env)
    if (eval_env.obs_shape, eval_env.action_size) != (env.obs_shape, env.action_size):
        fail(f"{env_id} has other observations or actions than {args.env_id}")
    if args.num_seeds > 1 and (env.hosted or eval_env.hosted):
        fail("--num-seeds needs environments in JAX: start single runs")
    return eval_env


@contextmanager
def noted_signals(run_dir: Path) -> Any:
    """Gives a list. The first Ctrl-C or SIGTERM is put there, the second ends the program."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this call (again: at once, unsaved)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)
    if caught:
        print(f"stopped and saved; to go on: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + caught[0])


def join_processes(args: Args) -> Args:
    """Makes this process one of several, if the flags or srun say so; process 0 alone prints."""
    flags = args.coordinator_address, args.num_processes, args.process_id
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in os.environ else "1"
    if flags != (None, None, None) or tasks != "1":
        host, _, port = (args.coordinator_address or "slurm:0").rpartition(":")
        if not host or not port.isdigit():
            fail(f"--coordinator-address must be HOST:PORT, not {args.coordinator_address}")
        jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
        try:
            jax.distributed.initialize(*flags)
        except (ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            fail(f"give --coordinator-address, --num-processes and --process-id: {why}")
    changes = dict.fromkeys(["coordinator_address", "num_processes", "process_id"])
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        changes |= {"track": False, "tensorboard": False}
    return dataclasses.replace(args, **changes)  # a resumed run may have other processes


def share_run(args: Args) -> Path:
    """Opens the run's folder in process 0. The others get one of their own, to be thrown away, with a
    link to the checkpoints, which all processes write and read together.
    """
    folder, refused = "", SystemExit(2)
    if jax.process_index() == 0:
        try:
            folder = str(open_run(args).resolve())
        except SystemExit as error:
            refused = error
    letters = np.frombuffer(folder.encode().ljust(4096), np.uint8)
    folder = bytes(np.array(multihost_utils.broadcast_one_to_all(letters))).decode().rstrip()
    if not folder:
        raise refused
    if not np.all(multihost_utils.process_allgather(np.array(Path(folder).is_dir()))):
        fail(f"not all processes see {folder}: choose a --run-dir that they share")
    if jax.process_index() == 0:
        return Path(folder)
    own = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    (own / "checkpoints").symlink_to(Path(folder) / "checkpoints")
    return own


def agree_on_signals(train: Callable, caught: list, agreed: list) -> Callable:
    """train, after each call of which all processes know of a signal that one of them caught."""

    def train_and_ask(state, num_iterations):
        result = jax.block_until_ready(train(state, num_iterations))
        signals = multihost_utils.process_allgather(np.array(caught[0] if caught else 0))
        agreed.extend(int(x) for x in np.ravel(signals) if x)
        return result

    return train_and_ask


def main(args: Args) -> Path:
    """Trains, saves and evaluates -> the run's folder."""
    args = join_processes(args)
    check_args(args)
    count = jax.device_count()
    share = {"num_envs": args.num_envs // count, "total_timesteps": args.total_timesteps // count}
    env = make_env(args.env_id, share["num_envs"], args.seed, args.env_kwargs, args.mask_obs)
    if env.hosted:
        fail(f"{args.env_id} is stepped outside JAX, on one host: use ppo_trxl.py")
    make_eval_env(args, env)  # what cannot work is refused now
    run_dir = share_run(args)
    parts = make_train(dataclasses.replace(args, **share), env)
    state, train = compile_training(args, *parts)
    if args.resume:
        state = load_checkpoint(run_dir, state, env.hosted)
    with noted_signals(run_dir) as caught:
        agreed = []
        train = agree_on_signals(train, caught, agreed)
        state = run_training(args, run_dir, state, train, agreed)
        caught[:] = agreed  # so that all end alike
        save_checkpoint(run_dir, state)
        if (run_dir / "metrics.csv").stat().st_size:
            plot_curve(run_dir)
    if args.eval_episodes:
        # The agent alone, off the mesh: every process plays, and process 0 writes what comes out.
        nothing = dict.fromkeys(TrainState._fields)
        state = TrainState(**nothing | {"agent": jax.device_get(state.agent)})
        write_evaluation(args, run_dir, state, make_eval_env(args, env))
    return run_dir


if __name__ == "__main__":
    main(parse_args())
