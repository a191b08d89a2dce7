# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12",
#   "flax>=0.12.8,<0.13",
#   "optax>=0.2.8,<0.3",
#   "flashbax>=0.1.3,<0.2",
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
"""Recurrent soft actor-critic for discrete actions with any memory, in one file.

Christodoulou 2019, arXiv:1910.07207 (values: eq. 10, temperature: eq. 11, actor: eq. 12); Ni et al.
2021, "Recurrent Model-Free RL Can Be a Strong Baseline for Many POMDPs", arXiv:2110.05038 (separate
memories, previous actions and rewards: section 4). The memory: a GRU (Cho et al. 2014,
arXiv:1406.1078), or any of the files in memories/.

    python rsacd.py                                 # CartPole-v1 without the velocities
    python rsacd.py --memory s5                     # memories/s5.py instead of the GRU in this file

Expected on two CPU cores: greedy return 500 +- 0 after 100k steps of CartPole-v1 without the velocities
(mean and std of 5 seeds, 100 episodes each; sacd.py: 41).

Differs from rsac.py in: a policy over numbered actions, whose expectations are sums, not samples;
critics that value all actions at once. From sacd.py in: actor and critics have a memory each; what is
replayed are sequences, in which episodes end and begin.

Differs from the papers as rsac.py and sacd.py do: sequences begin with the memories of the agent that
acted, all gradients of a step are taken at once, the entropy's target is half of the largest, and
what a time limit cut is not learned from.
"""

import os
import time

LAUNCHED = time.time()  # before the slow imports, so that `seconds` in metrics.csv counts them
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # if the CPU has AVX-512
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/unroll"))

import dataclasses
import json
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial
from importlib import import_module, metadata, util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, NoReturn

import flashbax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from jax import Array
from jax.experimental import buffer_callback, io_callback

CALL_STEPS = 1  # each iteration is a call of its own, with a row of metrics.csv
IN_HASTE = {"xla_backend_optimization_level": 0}  # compiler options for what runs only once


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "gymnax::CartPole-v1"  # suite::name (gymnax, gymnasium, envpool, envs/)
    env_kwargs: str = "{}"  # JSON object of arguments for the environment
    mask_obs: tuple[int, ...] | None = None  # to hide, None: velocities if gymnax::CartPole-v1
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained at once by vmap: seed, seed + 1, ... (JAX suites only)
    total_timesteps: int = 100_000  # environment steps of each agent
    num_envs: int = 4  # parallel environments
    num_steps: int = 32  # steps in each environment in an iteration: a sequence
    policy_lr: float = 1e-3  # Adam's step size for the actor
    q_lr: float = 1e-3  # Adam's step size for the critics and the temperature
    anneal_lr: bool = True  # let all step sizes fall linearly to 0 over the run
    max_grad_norm: float | None = None  # largest global norm of a network's gradient, None: any
    gamma: float = 0.99  # discount factor
    buffer_size: int = 100_000  # environment steps kept for replay, in whole sequences
    batch_size: int = 32  # sequences in each gradient step
    learning_starts: int = 2_000  # environment steps, with random actions, before the first one
    updates_per_step: float = 0.125  # gradient steps for each environment step
    burn_in: int = 0  # first steps of a sequence: they warm its memories up, unlearned
    tau: float = 0.02  # how far the target critics follow at each gradient step
    alpha: float = 0.1  # weight of the entropy, at the start if autotune
    autotune: bool = True  # learn alpha so that the entropy stays near its target
    target_entropy_scale: float = 0.5  # target of the entropy, as a share of the largest, log A
    critic_entropy: bool = True  # the critics value future entropy too
    aggregate: Literal["min", "mean"] = "min"  # what of the critics' values counts
    reward_scale: float = 0.1  # factor on the rewards the agent learns from, not on those reported
    previous_action: bool = True  # the memories see the action before each observation
    previous_reward: bool = False  # and the reward, scaled
    memory: str = "gru"  # a file of memories/ by its name, or file.py:Class
    memory_kwargs: str = "{}"  # JSON object of arguments for the memory
    embed_dim: int = 64  # width of the memories
    actor_hidden_size: int = 128  # width of the layers of the actor behind its memory
    critic_hidden_size: int = 128  # width of those of each critic
    num_critics: int = 2  # behind one memory
    target_return: float | None = None  # stop when the last 100 training episodes average this
    eval_episodes: int = 100  # greedy episodes at the end, 0 for none
    eval_env_id: str | None = None  # where to play them, if not in env_id
    checkpoint_every: int = 0  # iterations between checkpoints, 0 for one at the end
    resume: Path | None = None  # run folder to go on with; its config.json fills in other flags
    run_dir: Path | None = None  # folder of the run, runs/<script>__<env>__<seed>__<time> if None
    track: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

    def __post_init__(self):
        if self.mask_obs is None:
            velocities = (1, 3) if self.env_id == "gymnax::CartPole-v1" else ()
            object.__setattr__(self, "mask_obs", velocities)
        if ".py" in self.memory:  # a run is resumed and played from any folder
            object.__setattr__(self, "memory", str(Path(self.memory).absolute()))

    @property
    def num_sequences(self) -> int:
        return self.buffer_size // self.num_steps

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)


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
    counts = "num_seeds num_envs num_steps buffer_size batch_size num_critics embed_dim"
    check_ranges(
        args,
        at_least_1=f"{counts} actor_hidden_size critic_hidden_size",
        at_most_1="gamma tau target_entropy_scale",
    )
    if args.updates_per_step > 1_000:
        fail("--updates-per-step must be at most 1000")
    if args.alpha == 0:
        fail("--alpha must be above 0")
    if args.burn_in >= args.num_steps:
        fail(f"--burn-in must be below --num-steps {args.num_steps}")
    if args.num_sequences < max(args.batch_size, args.num_envs):
        fail("--buffer-size must hold a batch, and a rollout, of --num-steps each")
    if args.num_iterations < 1:
        fail("--total-timesteps must be at least --num-envs x --num-steps")
    if args.learning_starts >= args.total_timesteps:
        fail("--learning-starts must be below --total-timesteps, or nothing is learned")
    load_memory(args.memory, args.memory_kwargs, args.embed_dim)


def check_env(env_id: str, env: "Env") -> None:
    """Ends the program with status 2 if this script cannot act in the environment."""
    if env.action_low is not None:
        fail(f"{env_id} has continuous actions: use rsac.py")
    if len(env.obs_shape) != 1:
        fail(f"the observations of {env_id} are images, and this script is for vectors")


# --- Networks -------------------------------------------------------------------------------------


def linear(in_size: int, out_size: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    return nnx.Linear(in_size, out_size, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)


class GRU(nnx.Module):
    """Gated recurrent unit (arXiv:1406.1078); a reset clears h before the cell. As in
    memories/gru.py.
    """

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.size, init = size, nnx.initializers.orthogonal()
        self.inputs = nnx.Linear(size, 3 * size, kernel_init=init, rngs=rngs)
        self.recurrent = nnx.Linear(size, 3 * size, kernel_init=init, rngs=rngs)
        self.inputs.bias[...] = self.inputs.bias[...].at[size : 2 * size].set(1.0)  # it remembers

    def initial_memory(self, batch: int) -> Array:
        """h [B, D]."""
        return jnp.zeros((batch, self.size))

    def open(self, memory: Array) -> Array:
        return memory

    def step(self, acting: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [B, D], reset [B] -> h, y [B, D], which is h."""
        h = self.cell(acting, self.inputs(x), reset)
        return h, h

    def unroll(self, memory: Array, x: Array, reset: Array) -> tuple[Array, Array]:
        """x [T, B, D], reset [T, B] -> h, y [T, B, D]; one product for the inputs of all steps."""

        def advance(h, step):
            # The barrier: XLA would slice the inputs within the cell, slowly on a CPU.
            h = self.cell(h, *jax.lax.optimization_barrier(step))
            return h, h

        return jax.lax.scan(advance, memory, (self.inputs(x), reset))

    def cell(self, h: Array, gates: Array, reset: Array) -> Array:
        """h [B, D], what the inputs give to the gates [B, 3 D], reset [B] -> h."""
        h = jnp.where(reset[:, None], 0.0, h)
        x_r, x_z, x_n = jnp.split(gates, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(self.recurrent(h), 3, axis=-1)
        z = nnx.sigmoid(x_z + h_z)
        n = nnx.tanh(x_n + nnx.sigmoid(x_r + h_r) * h_n)
        return (1.0 - z) * n + z * h


OWN_MEMORIES = {"gru": GRU}  # those that stand in this file


@cache  # a class is to be made once
def load_memory(name: str, kwargs: str, size: int) -> Callable:
    """-> make(rngs), a memory of this width; bad input ends the program with status 2."""
    file, _, of = name.partition(":")
    path = Path(file) if file.endswith(".py") else Path(__file__).parent / f"memories/{file}.py"

    def try_out():
        memory, x, reset = make(rngs=nnx.Rngs(0)), jnp.zeros((2, size)), jnp.zeros(2, bool)
        start = memory.initial_memory(2)
        opened = memory.open(start)
        acting, acted = memory.step(opened, x, reset)
        after, (learned,) = memory.unroll(start, x[None], reset[None])
        return start, (acted, learned), (start, opened), (after, acting)

    def form(tree):
        return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    try:
        found = OWN_MEMORIES.get(name) or runpy.run_path(str(path))[of or "Memory"]
        make = partial(found, size, **json.loads(kwargs))
        start, y, before, after = jax.eval_shape(try_out)
        if any(x.shape != (2, size) for x in y):
            raise ValueError(f"what it returns must be as wide as what it takes, {size}")
        if any(x.shape[:1] != (2,) for x in jax.tree.leaves(start)):
            raise ValueError("the first axis of all in initial_memory(batch) must be the batch")
        if form(before) != form(after):
            raise ValueError("unroll and step must return a memory in the form that they took")
    except Exception as error:
        known = ", ".join(sorted(x.stem for x in Path(__file__).parent.glob("memories/*.py")))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"--memory {name} with --memory-kwargs '{kwargs}': {reason} (there are {known})")
    return make


class Layers(nnx.Module):
    """num_blocks ReLU layers, [..., in_size] -> [..., hidden_size]."""

    def __init__(self, in_size: int, hidden_size: int, num_blocks: int, rngs: nnx.Rngs):
        sizes = [in_size] + [hidden_size] * num_blocks
        layers = [linear(*pair, 2**0.5, rngs) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
        self.layers = nnx.List(layers)

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Seen(NamedTuple):
    """What is acted on: an observation, and what led to it, 0 where an episode begins."""

    obs: Array  # [..., obs_size]
    action: Array  # [..., A]
    reward: Array  # [...]


class History(nnx.Module):
    """A memory of what was seen; what it gives is joined with what is seen now."""

    def __init__(self, obs_size: int, action_size: int, args: Args, rngs: nnx.Rngs):
        self.parts = (True, args.previous_action, args.previous_reward)
        self.reward_scale = args.reward_scale
        in_size = sum(np.array([obs_size, action_size, 1])[list(self.parts)])
        self.embed = linear(in_size, args.embed_dim, 2**0.5, rngs)
        self.memory = load_memory(args.memory, args.memory_kwargs, args.embed_dim)(rngs=rngs)
        self.out_size = args.embed_dim + in_size

    def look(self, seen: Seen) -> Array:
        """What counts of it -> [..., I]."""
        columns = (seen.obs, seen.action, self.reward_scale * seen.reward[..., None])
        return jnp.concatenate(
            [x for x, part in zip(columns, self.parts, strict=True) if part], axis=-1
        )

    def step(self, acting: Any, seen: Seen, reset: Array) -> tuple[Any, Array]:
        """seen [B, ...], reset [B] -> acting, [B, D + I]."""
        now = self.look(seen)
        acting, x = self.memory.step(acting, nnx.relu(self.embed(now)), reset)
        return acting, jnp.concatenate([x, now], axis=-1)

    def unroll(self, memory: Any, seen: Seen, reset: Array) -> tuple[Any, Array]:
        """seen [T, B, ...], reset [T, B] -> memory, [T, B, D + I]."""
        now = self.look(seen)
        memory, x = self.memory.unroll(memory, nnx.relu(self.embed(now)), reset)
        return memory, jnp.concatenate([x, now], axis=-1)


class Actor(nnx.Module):
    """A policy over discrete actions, behind a history of its own."""

    def __init__(self, obs_size: int, action_size: int, args: Args, rngs: nnx.Rngs):
        self.history, size = History(obs_size, action_size, args, rngs), args.actor_hidden_size
        self.body = Layers(self.history.out_size, size, 2, rngs)
        self.head = linear(size, action_size, 0.01, rngs)  # starts near uniform

    def __call__(self, x: Array) -> Array:
        """What the history gives [..., D + I] -> log-probs of all actions [..., A]."""
        return nnx.log_softmax(self.head(self.body(x)))


class Critic(nnx.Module):
    """num_critics networks that value all actions behind one history, each with its own first
    weights.
    """

    def __init__(self, obs_size: int, action_size: int, args: Args, rngs: nnx.Rngs):
        self.history, size = History(obs_size, action_size, args, rngs), args.critic_hidden_size
        numbers, width = range(args.num_critics), self.history.out_size
        self.bodies = nnx.List([Layers(width, size, 2, rngs) for _ in numbers])
        self.heads = nnx.List([linear(size, action_size, 1.0, rngs) for _ in numbers])

    def __call__(self, x: Array) -> Array:
        """What the history gives [T, M, D + I] -> values [num_critics, T, M, A]."""
        pairs = zip(self.bodies, self.heads, strict=True)
        return jnp.stack([head(body(x)) for body, head in pairs])


# --- Rollout --------------------------------------------------------------------------------------


class Memories(NamedTuple):
    """Before an observation, [B, ...]; learning starts from them."""

    actor: Any
    critic: Any


class Acting(NamedTuple):
    """What goes on from one rollout to the next."""

    env_state: Any
    obs: Seen  # [B, ...], what to act on next
    reset: Array  # [B], it begins an episode
    memory: Any  # Memories; in a rollout, the actor's alone, opened


class Transition(NamedTuple):
    """One step of all environments; rollout stacks them to [T, B, ...]."""

    obs: Seen  # [B, ...]
    reset: Array  # [B], it begins an episode: clear the memories before it
    action: Array  # [B]
    reward: Array  # [B]
    terminated: Array  # [B], the task ended: unlike a time limit, this cuts the bootstrap
    truncated: Array  # [B], a time limit cut the episode, and the task did not end


class Sequence(NamedTuple):
    """What the replay buffer keeps of a rollout in one environment; a batch of them is [M, ...]."""

    memory: Any  # [...], before the first step
    steps: Transition  # [T, ...]
    last_obs: Any  # [...], what would have been acted on next
    last_reset: Array  # [], it begins an episode


def next_seen(obs: Array, action: Array, reward: Array, done: Array, action_size: int) -> Seen:
    """Of an episode that ended nothing is seen in the next: obs [B, obs_size], action, reward, done
    [B].
    """
    one_hot = jax.nn.one_hot(action, action_size)
    return Seen(obs, jnp.where(done[:, None], 0.0, one_hot), jnp.where(done, 0.0, reward))


def rollout(actor: Actor, env: "Env", acting: Acting, random: Array, key: Array, args: Args):
    """Acts for num_steps steps, at random where `random` -> Acting, Transition [T, B, ...]."""
    action_keys, env_keys = jax.random.split(key, (2, args.num_steps))

    def act_and_step(acting, keys):
        (env_state, obs, reset, memory), (action_key, env_key) = acting, keys
        memory, x = actor.history.step(memory, obs, reset)
        action = jax.random.categorical(action_key, jnp.where(random, 0.0, actor(x)))
        env_state, timestep = env.step(env_key, env_state, action)
        terminated, truncated = timestep.terminated, timestep.truncated & ~timestep.terminated
        done = terminated | truncated
        transition = Transition(obs, reset, action, timestep.reward, terminated, truncated)
        obs = next_seen(timestep.obs, action, timestep.reward, done, env.action_size)
        return Acting(env_state, obs, done, memory), transition

    return jax.lax.scan(act_and_step, acting, (action_keys, env_keys))


# --- Replay ---------------------------------------------------------------------------------------


def make_replay(args: Args) -> Any:
    """Flashbax's buffer of sequences: when it is full, the oldest make room."""
    return flashbax.make_item_buffer(args.num_sequences, 1, args.batch_size, add_batches=True)


def recorded(memory: Any, batch: Transition, acting: Acting) -> Sequence:
    """A rollout [T, B, ...] that began with memory [B, ...] and ended at acting -> B sequences."""
    steps = jax.tree.map(lambda x: x.swapaxes(0, 1), batch)  # [B, T, ...]
    return Sequence(memory, steps, acting.obs, acting.reset)


def unroll(network: Any, memory: Any, batch: Sequence, args: Args) -> Array:
    """What a network with a memory gives at all steps of sequences that are learned from, and after
    them -> [W + 1, M, ...]. The first burn_in steps only warm the memory up, with the parameters of
    this network.
    """
    join = lambda x, last: jnp.concatenate([x.swapaxes(0, 1), last[None]])  # [T + 1, M, ...]
    steps = (batch.steps.obs, batch.steps.reset), (batch.last_obs, batch.last_reset)
    steps, start = jax.tree.map(join, *steps), args.burn_in
    if start:
        warm_up = jax.tree.map(lambda x: x[:start], steps)
        memory, _ = jax.lax.stop_gradient(network).unroll(memory, *warm_up)
    return network.unroll(memory, *jax.tree.map(lambda x: x[start:], steps))[1]


# --- Targets --------------------------------------------------------------------------------------


def aggregate(q_values: Array, args: Args) -> Array:
    """What counts of the critics' values, [num_critics, ..., A] -> [..., A]."""
    return q_values.min(axis=0) if args.aggregate == "min" else q_values.mean(axis=0)


def compute_targets(
    target: Critic, x: Array, logprobs: Array, alpha, steps: Transition, args: Args
):
    """reward + gamma sum_a pi(a) (Q'(s', a) - alpha log pi(a)), without the second term where the
    task ended (eq. 10) -> [W, M].

    x [W + 1, M, D + I]: what the history of the target critic gives; logprobs [W + 1, M, A].
    """
    values = aggregate(target(x[1:]), args) - args.critic_entropy * alpha * logprobs[1:]
    next_value = (jnp.exp(logprobs[1:]) * values).sum(axis=-1)
    assert next_value.shape == steps.reward.shape
    return args.reward_scale * steps.reward + args.gamma * ~steps.terminated * next_value


# --- Loss -----------------------------------------------------------------------------------------


def losses(parts: dict, target: Critic, batch: Sequence, args: Args):
    """The losses of actor, critic and temperature on sequences [M, ...] -> their sum, metrics.

    parts: these three by name. None of the losses has a gradient for another's part, so the gradient of
    the sum is that of each.
    """
    actor, critic, alpha = parts["actor"], parts["critic"], jnp.exp(parts["log_alpha"])
    still = jax.lax.stop_gradient
    steps = jax.tree.map(lambda x: x.swapaxes(0, 1)[args.burn_in :], batch.steps)  # [W, M, ...]
    logprobs = actor(unroll(actor.history, batch.memory.actor, batch, args))  # [W + 1, M, A]
    x = unroll(critic.history, batch.memory.critic, batch, args)  # [W + 1, M, D + I]
    target_x = unroll(target.history, batch.memory.critic, batch, args)

    targets = still(compute_targets(target, target_x, logprobs, alpha, steps, args))
    q_values = critic(x[:-1])  # [num_critics, W, M, A]
    taken = jnp.take_along_axis(q_values, steps.action[None, ..., None], axis=-1)[..., 0]
    assert taken.shape[1:] == targets.shape == steps.reward.shape
    known = ~steps.truncated  # else the last step's target is of the next episode
    errors = optax.l2_loss(taken - targets) * known
    qf_loss = errors.sum() / jnp.maximum(known.sum(), 1)

    logprobs, values = logprobs[:-1], still(aggregate(q_values, args))  # [W, M, A]
    assert logprobs.shape == values.shape
    probs = jnp.exp(logprobs)
    actor_loss = (probs * (still(alpha) * logprobs - values)).sum(axis=-1).mean()  # eq. 12
    entropy = -still((probs * logprobs).sum(axis=-1)).mean()
    target_entropy = args.target_entropy_scale * jnp.log(actor.head.out_features)
    loss = qf_loss + actor_loss
    if args.autotune:
        loss += alpha_loss(parts["log_alpha"], entropy, target_entropy)
    return loss, {
        "losses/qf_loss": qf_loss,
        "losses/qf_values": taken.mean(),
        "losses/actor_loss": actor_loss,
        "losses/entropy": entropy,
        "losses/alpha": alpha,
    }


def alpha_loss(log_alpha: Array, entropy: Array, target_entropy: float) -> Array:
    """Raises alpha while the entropy is below its target, and the reverse (1812.05905, eq. 18)."""
    return jnp.exp(log_alpha) * (entropy - target_entropy)


# --- Training -------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What gradient steps change."""

    actor: Actor
    critic: Critic
    target: Critic
    log_alpha: Array
    opt_states: dict[str, optax.OptState]


class TrainState(NamedTuple):
    """All that one iteration hands to the next: saving it is an exact checkpoint."""

    learner: Learner
    buffer: Any  # of Sequence, [num_sequences, ...]
    acting: Acting
    episode_stats: "EpisodeStats"
    key: Array
    iteration: Array  # iterations done


def make_train(args: Args, env: "Env") -> tuple[Callable, Callable]:
    """-> init(key) -> state, and train_iteration(state) -> (state, metrics)."""
    txs, replay = make_optimizers(args), make_replay(args)

    def init(key: Array) -> TrainState:
        actor_key, critic_key, env_key, key = jax.random.split(key, 4)
        env_state, obs = env.reset(env_key)
        number, reset = jnp.zeros(args.num_envs), jnp.ones(args.num_envs, bool)
        action = number.astype(int)
        obs = Seen(obs, jnp.zeros((args.num_envs, env.action_size)), number)
        actor = Actor(env.obs_shape[0], env.action_size, args, nnx.Rngs(actor_key))
        critic = Critic(env.obs_shape[0], env.action_size, args, nnx.Rngs(critic_key))
        log_alpha = jnp.log(jnp.float32(args.alpha))
        parts = {"actor": actor, "critic": critic, "log_alpha": log_alpha}
        opt_states = {name: txs[name].init(part) for name, part in parts.items()}
        memories = [part.history.memory.initial_memory(args.num_envs) for part in (actor, critic)]
        acting = Acting(env_state, obs, reset, Memories(*memories))
        step = Transition(obs, reset, action, number, reset, reset)
        batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (args.num_steps, *x.shape)), step)
        example = jax.tree.map(lambda x: x[0], recorded(acting.memory, batch, acting))
        return TrainState(
            learner=Learner(actor, critic, jax.tree.map(jnp.copy, critic), log_alpha, opt_states),
            buffer=replay.init(example),
            acting=acting,
            episode_stats=EpisodeStats(jnp.zeros((args.num_envs, 2))),
            key=key,
            iteration=jnp.int32(0),
        )

    def train_iteration(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        (actor, critic, *_), memory = state.learner, state.acting.memory
        rollout_key, update_key, key = jax.random.split(state.key, 3)
        step = state.iteration * args.num_envs * args.num_steps
        acting = state.acting._replace(memory=actor.history.memory.open(memory.actor))
        random = step < args.learning_starts
        acting, batch = rollout(actor, env, acting, random, rollout_key, args)
        assert batch.reward.shape == (args.num_steps, args.num_envs)  # [T, B]
        done = batch.terminated | batch.truncated
        episode_stats, episode_metrics = record_episodes(state.episode_stats, batch.reward, done)
        pairs = zip((actor, critic), memory, strict=True)
        after = [part.history.unroll(own, batch.obs, batch.reset)[0] for part, own in pairs]
        acting = acting._replace(memory=Memories(*after))
        buffer = replay.add(state.buffer, recorded(memory, batch, acting))
        learner, metrics = learn(state.learner, replay, buffer, txs, step, update_key, args)
        state = TrainState(learner, buffer, acting, episode_stats, key, state.iteration + 1)
        return state, metrics | episode_metrics

    return init, train_iteration


def make_optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Adam for actor, critics and temperature."""
    updates = gradient_steps_due(jnp.int32(args.total_timesteps), args)
    rate = lambda lr: optax.linear_schedule(lr, 0.0, updates) if args.anneal_lr else lr

    def adam(lr):
        # eps stays Adam's own 1e-8: the 1e-5 of ppo.py is a detail of PPO.
        if args.max_grad_norm is None:
            return optax.adam(rate(lr))
        return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(rate(lr)))

    rates = {"actor": args.policy_lr, "critic": args.q_lr}
    return {name: adam(lr) for name, lr in rates.items()} | {
        "log_alpha": optax.adam(rate(args.q_lr))
    }


def gradient_steps_due(step: Array, args: Args) -> Array:
    """Gradient steps due after so many environment steps, in all: the same for any num_envs."""
    ratio = Fraction(args.updates_per_step).limit_denominator(1_000)  # floats would lose count
    steps = jnp.maximum(step - args.learning_starts, 0)
    whole, rest = jnp.divmod(steps, ratio.denominator)
    return whole * ratio.numerator + rest * ratio.numerator // ratio.denominator


def learn(
    learner: Learner, replay: Any, buffer: Any, txs: dict, step: Array, key: Array, args: Args
):
    """The gradient steps that the rollout from this environment step on made due -> learner, means of
    their metrics.
    """

    def gradient_step(number, carry):
        learner, sums = carry
        batch = replay.sample(buffer, jax.random.fold_in(key, number)).experience
        learner, metrics = update(learner, txs, batch, args)
        return learner, jax.tree.map(jnp.add, sums, metrics)

    due_before = gradient_steps_due(step, args)
    due = gradient_steps_due(step + args.num_envs * args.num_steps, args)
    names = ("qf_loss", "qf_values", "actor_loss", "entropy", "alpha")
    sums = {f"losses/{name}": jnp.float32(0.0) for name in names}
    learner, sums = jax.lax.fori_loop(due_before, due, gradient_step, (learner, sums))
    means = {name: x / jnp.maximum(due - due_before, 1) for name, x in sums.items()}
    return learner, means | {"charts/updates": due}


def update(learner: Learner, txs: dict, batch: Sequence, args: Args):
    """A gradient step of critics, actor and temperature on sequences [M, ...] -> learner, metrics."""
    parts = {name: getattr(learner, name) for name in txs}
    grads, metrics = jax.grad(losses, has_aux=True)(parts, learner.target, batch, args)
    opt_states = {}
    for name, tx in txs.items():
        updates, opt_states[name] = tx.update(grads[name], learner.opt_states[name], parts[name])
        parts[name] = optax.apply_updates(parts[name], updates)
    target = optax.incremental_update(parts["critic"], learner.target, args.tau)
    return Learner(**parts, target=target, opt_states=opt_states), metrics


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
        memory, x = actor.history.step(memory, obs, reset)
        action = actor(x).argmax(axis=-1)
        env_state, timestep = env.step(env_key, env_state, action)
        returns += jnp.where(alive, timestep.reward, 0.0)
        lengths += alive
        done = timestep.terminated | timestep.truncated
        alive &= ~done
        obs = next_seen(timestep.obs, action, timestep.reward, done, env.action_size)
        return Acting(env_state, obs, done, memory), key, returns, lengths, alive

    actor, (reset_key, key) = state.learner.actor, jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    zeros, memory = jnp.zeros(len(obs)), actor.history.memory.initial_memory(len(obs))
    obs = Seen(obs, jnp.zeros((len(obs), env.action_size)), zeros)
    acting = Acting(env_state, obs, zeros == 0, actor.history.memory.open(memory))
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


def main(args: Args) -> Path:
    """Trains, saves and evaluates -> the run's folder."""
    check_args(args)
    env = make_env(args.env_id, args.num_envs, args.seed, args.env_kwargs, args.mask_obs)
    make_eval_env(args, env)  # what cannot work is refused now
    run_dir = open_run(args)
    state, train = compile_training(args, *make_train(args, env))
    if args.resume:
        state = load_checkpoint(run_dir, state, env.hosted)
    with noted_signals(run_dir) as caught:
        state = run_training(args, run_dir, state, train, caught)
        save_checkpoint(run_dir, state)
        if (run_dir / "metrics.csv").stat().st_size:
            plot_curve(run_dir)
    if args.eval_episodes:
        write_evaluation(args, run_dir, state, make_eval_env(args, env))
    return run_dir


if __name__ == "__main__":
    main(parse_args())
