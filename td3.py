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
"""Twin delayed deep deterministic policy gradient, in one file.

Fujimoto et al. 2018, arXiv:1802.09477 (algorithm 1; the smaller of two critics: section 4.2, delay:
5.2, smoothed targets: 5.3); Lee et al. 2024, arXiv:2410.09754 (SimBa: section 4); Fujimoto et al. 2020,
arXiv:2007.06049 (--prioritized-replay, loss-adjusted: section 4).

    python td3.py                                                           # Pendulum-v1
    python td3.py --env-id envpool::HalfCheetah-v5 --total-timesteps 1000000 --learning-starts 10000 \
        --num-envs 8 --num-steps 125 --buffer-size 1000000 --policy-lr 3e-4

Expected on Pendulum-v1: greedy return -146 +- 3 after 20k steps (mean and std of 10 seeds, 1,000
episodes each), on HalfCheetah-v5 10204 +- 859 after 1M and, with the README's flags, on
LunarLanderContinuous-v3 210 +- 53 after 300k (5 seeds each).

Differs from sac.py in: the policy is deterministic and explores by added noise; its actor and all
targets follow the critics at every second step; target actions are smoothed by noise.

Differs from the papers: normalised observations are clipped to 10, the noise is a share of half the
range of each action entry, and a time limit is not taken for the end of the task (arXiv:1712.00378).
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
from functools import partial
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
from jax.flatten_util import ravel_pytree

CALL_STEPS = 1  # each iteration is a call of its own, with a row of metrics.csv
IN_HASTE = {"xla_backend_optimization_level": 0}  # compiler options for what runs only once


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "gymnax::Pendulum-v1"  # suite::name (gymnax, gymnasium, envpool, envs/)
    env_kwargs: str = "{}"  # JSON object of arguments for the environment
    mask_obs: tuple[int, ...] = ()  # observation entries to hide from the agent
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained at once by vmap: seed, seed + 1, ... (JAX suites only)
    total_timesteps: int = 20_000  # environment steps of each agent
    num_envs: int = 1  # parallel environments
    num_steps: int = 200  # steps in each environment from one log row to the next
    policy_lr: float = 1e-3  # Adam's step size for the actor
    q_lr: float = 1e-3  # Adam's step size for the critics
    anneal_lr: bool = False  # let all step sizes fall linearly to 0 over the run
    weight_decay: float = 0.0  # AdamW's weight decay for actor and critics
    max_grad_norm: float | None = None  # largest global norm of a network's gradient, None: any
    monitor_gradients: bool = False  # log norms of gradients, parameters and updates
    gamma: float = 0.99  # discount factor
    buffer_size: int = 100_000  # transitions kept for replay
    prioritized_replay: bool = False  # replay in proportion to the critics' last error
    priority_exponent: float = 0.4  # on that error, which counts at least 1
    linear_decay_sampling: bool = False  # replay new transitions more often than old ones
    decay_steps: int = 100_000  # age at which a transition's share would reach 0
    decay_floor: float = 0.1  # below this it does not fall
    batch_size: int = 256  # transitions in each gradient step
    learning_starts: int = 1_000  # environment steps, with random actions, before the first one
    updates_per_step: float = 1.0  # gradient steps for each environment step
    policy_frequency: int = 2  # gradient steps of the critics for one of the actor and the targets
    policy_noise: float = 0.2  # deviation of the noise on target actions, which lie in [-1, 1]
    noise_clip: float = 0.5  # largest such noise
    exploration_noise: float = 0.1  # deviation of the noise on the actions played
    tau: float = 0.005  # how far all targets follow at each step of the actor
    reward_scale: float = 1.0  # factor on the rewards the agent learns from, not on those reported
    norm_obs: bool = False  # normalise observations by the mean and variance of all acted on
    block_type: Literal["mlp", "simba"] = "mlp"  # hidden layers, or SimBa's residual blocks
    actor_hidden_size: int = 256  # width of the actor
    actor_num_blocks: int = 2  # its hidden layers or residual blocks
    critic_hidden_size: int = 256  # width of each critic
    critic_num_blocks: int = 2  # its hidden layers or residual blocks
    num_critics: int = 2  # the smallest of their values counts
    target_return: float | None = None  # stop when the last 100 training episodes average this
    eval_episodes: int = 100  # greedy episodes at the end, 0 for none
    eval_env_id: str | None = None  # where to play them, if not in env_id
    checkpoint_every: int = 0  # iterations between checkpoints, 0 for one at the end
    resume: Path | None = None  # run folder to go on with; its config.json fills in other flags
    run_dir: Path | None = None  # folder of the run, runs/<script>__<env>__<seed>__<time> if None
    track: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

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
    counts = "num_seeds num_envs num_steps buffer_size decay_steps batch_size num_critics policy_frequency"
    counts += " actor_hidden_size critic_hidden_size actor_num_blocks critic_num_blocks"
    check_ranges(args, at_least_1=counts, at_most_1="gamma tau priority_exponent decay_floor")
    if args.updates_per_step > 1_000:
        fail("--updates-per-step must be at most 1000")
    if args.buffer_size < max(args.batch_size, args.num_envs):
        fail("--buffer-size must hold a batch and a step of all environments")
    if args.num_iterations < 1:
        fail("--total-timesteps must be at least --num-envs x --num-steps")
    if args.learning_starts >= args.total_timesteps:
        fail("--learning-starts must be below --total-timesteps, or nothing is learned")


def check_env(env_id: str, env: "Env") -> None:
    """Ends the program with status 2 if this script cannot act in the environment."""
    if env.action_low is None:
        fail(f"{env_id} has discrete actions: use dqn.py")
    if not np.isfinite([env.action_low, env.action_high]).all():
        fail(f"the actions of {env_id} have no bounds: use ppo_continuous.py")


# --- Networks -------------------------------------------------------------------------------------


def linear(in_size: int, out_size: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    return nnx.Linear(in_size, out_size, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)


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


class ResidualBlock(nnx.Module):
    """x + MLP(LayerNorm(x)), widened 4 times within: SimBa, section 4.2."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        he = nnx.initializers.he_normal()
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.widen = nnx.Linear(size, 4 * size, kernel_init=he, rngs=rngs)
        self.narrow = nnx.Linear(4 * size, size, kernel_init=he, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.narrow(nnx.relu(self.widen(self.norm(x))))


class SimBa(nnx.Module):
    """A linear embedding, num_blocks residual blocks and a LayerNorm: SimBa, section 4.

    [..., in_size] -> [..., hidden_size]. The normalisation of the observations that belongs to it
    is done before, by --norm-obs.
    """

    def __init__(self, in_size: int, hidden_size: int, num_blocks: int, rngs: nnx.Rngs):
        self.embed = linear(in_size, hidden_size, 1.0, rngs)
        self.blocks = nnx.List([ResidualBlock(hidden_size, rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Actor(nnx.Module):
    """A deterministic policy; images pass an encoder."""

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, args: Args, rngs: nnx.Rngs):
        self.encoder = CNN(obs_shape, rngs) if len(obs_shape) == 3 else None
        in_size = self.encoder.out_size if self.encoder else obs_shape[0]
        body = {"mlp": Layers, "simba": SimBa}[args.block_type]
        self.body = body(in_size, args.actor_hidden_size, args.actor_num_blocks, rngs)
        self.head = linear(args.actor_hidden_size, action_size, 0.01, rngs)

    def __call__(self, obs: Array) -> Array:
        """Observations [..., *obs_shape] -> actions [..., A] in [-1, 1]."""
        return nnx.tanh(self.head(self.body(self.encoder(obs) if self.encoder else obs)))


class Critic(nnx.Module):
    """num_critics networks that value observation and action, each with its own first weights; on
    images they share an encoder, which the actor does not.
    """

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, args: Args, rngs: nnx.Rngs):
        self.encoder = CNN(obs_shape, rngs) if len(obs_shape) == 3 else None
        in_size = (self.encoder.out_size if self.encoder else obs_shape[0]) + action_size
        body, size = {"mlp": Layers, "simba": SimBa}[args.block_type], args.critic_hidden_size
        numbers = range(args.num_critics)
        self.bodies = nnx.List([body(in_size, size, args.critic_num_blocks, rngs) for _ in numbers])
        self.heads = nnx.List([linear(size, 1, 1.0, rngs) for _ in numbers])

    def __call__(self, obs: Array, action: Array) -> Array:
        """obs [M, *obs_shape], action [M, A], in [-1, 1] -> values [num_critics, M]."""
        x = jnp.concatenate([self.encoder(obs) if self.encoder else obs, action], axis=-1)
        pairs = zip(self.bodies, self.heads, strict=True)
        return jnp.stack([head(body(x))[..., 0] for body, head in pairs])


# --- Acting ---------------------------------------------------------------------------------------


class Acting(NamedTuple):
    """What goes on from one step to the next."""

    env_state: Any
    obs: Array  # [B, *obs_shape], what to act on next


class Transition(NamedTuple):
    """What the replay buffer keeps of a step."""

    obs: Array  # [B, *obs_shape], not normalised
    action: Array  # [B, A], in [-1, 1]
    reward: Array  # [B]
    next_obs: Array  # [B, *obs_shape], where the action led, also where it ended the episode
    terminated: Array  # [B], the task ended: unlike a time limit, this cuts the bootstrap


def to_bounds(action: Array, env: "Env") -> Array:
    """From [-1, 1] to the bounds of the environment's actions."""
    return env.action_low + 0.5 * (action + 1.0) * (env.action_high - env.action_low)


# --- Normalisation --------------------------------------------------------------------------------


class RunningStats(NamedTuple):
    """Mean and variance of all that was seen so far."""

    mean: Array
    var: Array
    count: Array


def init_running(shape: tuple[int, ...]) -> RunningStats:
    """Nothing was seen yet."""
    return RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.float32(0.0))


def update_running(stats: RunningStats, x: Array) -> RunningStats:
    """Adds x [T, B, ...]: Chan et al. 1983, "Algorithms for Computing the Sample Variance"."""
    new, count = x.shape[0] * x.shape[1], stats.count + x.shape[0] * x.shape[1]
    delta = x.mean(axis=(0, 1)) - stats.mean
    squares = stats.var * stats.count + x.var(axis=(0, 1)) * new
    var = (squares + delta**2 * stats.count * new / count) / count
    return RunningStats(stats.mean + delta * new / count, var, count)


def normalize(obs: Array, stats: RunningStats | None) -> Array:
    """Observations with mean 0 and variance 1, clipped to 10; stats None: as they are."""
    if stats is None:
        return obs
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


# --- Replay ---------------------------------------------------------------------------------------


def make_replay(args: Args) -> Any:
    """Flashbax's buffer of single transitions: when it is full, the oldest make room."""
    return flashbax.make_item_buffer(args.buffer_size, 1, args.batch_size, add_batches=True)


def sample(replay: Any, buffer: Any, priorities: Array | None, key: Array, args: Args):
    """-> batch [M, ...], its positions in the buffer [M]. Uniform, or by flag in proportion to
    priority, to recency, or to their product.

    Flashbax's own prioritised buffer rounds, until it draws what was never stored (its issue 52).
    """
    if not (args.prioritized_replay or args.linear_decay_sampling):
        return replay.sample(buffer, key).experience, None
    if args.prioritized_replay:
        weights, ages = priorities, buffer.current_index - 1 - jnp.arange(len(priorities))
        if args.linear_decay_sampling:
            weights = weights * recency(ages % args.buffer_size, args)
        positions = draw(weights, key, args.batch_size)
    else:
        size = jnp.where(buffer.is_full, args.buffer_size, buffer.current_index)
        positions = (buffer.current_index - 1 - recent_ages(size, key, args)) % args.buffer_size
    return jax.tree.map(lambda x: x[0, positions], buffer.experience), positions


def draw(weights: Array, key: Array, number: int) -> Array:
    """Positions in weights [N], in proportion to them: a row of 64 first, then one in it -> [number].

    Shares are counted in whole numbers: sums of floats round, until a weight of 0 is drawn.
    """
    counts = (2**30 / weights.sum() * weights).astype(jnp.int32)
    table = jnp.pad(counts, (0, -len(counts) % 64)).reshape(-1, 64)
    ends = table.sum(axis=1).cumsum()
    ticket = jax.random.randint(key, (number,), 0, ends[-1])
    rows = jnp.searchsorted(ends, ticket, side="right")
    ticket = ticket - (ends[rows] - table[rows].sum(axis=1))  # within its row
    return 64 * rows + (table[rows].cumsum(axis=1) <= ticket[:, None]).sum(axis=1)


def recency(age: Array, args: Args) -> Array:
    """How often a transition of this age is replayed, relative to the newest, of age 0."""
    return jnp.maximum(args.decay_floor, 1.0 - age / args.decay_steps)


def recent_ages(size: Array, key: Array, args: Args) -> Array:
    """Ages below size in proportion to their recency: uniform numbers under its integral -> [M]."""
    horizon, floor = args.decay_steps, args.decay_floor
    falling = jnp.minimum(horizon * (1.0 - floor), size)  # younger ones are above the floor
    area = falling - falling**2 / (2 * horizon)
    u = jax.random.uniform(key, (args.batch_size,)) * (area + floor * (size - falling))
    young = 2.0 * u / (1.0 + jnp.sqrt(jnp.maximum(1.0 - 2.0 * u / horizon, 0.0)))
    age = jnp.where(u < area, young, falling + (u - area) / floor)
    return jnp.minimum(age.astype(int), size - 1)


# --- Targets --------------------------------------------------------------------------------------


def compute_targets(actor: Actor, critic: Critic, batch: Transition, key: Array, args: Args):
    """reward + gamma min Q'(next_obs, a') of the target networks, a' = pi'(next_obs) + clipped noise
    (section 5.3), without the second term where the task ended -> [M].
    """
    noise = args.policy_noise * jax.random.normal(key, batch.action.shape)  # own for each entry
    noise = jnp.clip(noise, -args.noise_clip, args.noise_clip)
    next_action = jnp.clip(actor(batch.next_obs) + noise, -1.0, 1.0)
    next_value = critic(batch.next_obs, next_action).min(axis=0)  # [M]
    assert next_value.shape == batch.reward.shape
    return args.reward_scale * batch.reward + args.gamma * ~batch.terminated * next_value


# --- Loss -----------------------------------------------------------------------------------------


def critic_loss(critic: Critic, batch: Transition, targets: Array, args: Args):
    """Squared error of every critic against the targets [M] (eq. 5) -> loss, values [num_critics, M].

    Replayed by priority, errors above 1 count linearly: they come more often instead
    (arXiv:2007.06049, section 4).
    """
    q_values = critic(batch.obs, batch.action)
    assert q_values.shape[1:] == targets.shape == batch.reward.shape
    each = optax.huber_loss if args.prioritized_replay else optax.l2_loss  # half the square
    return each(q_values - targets).mean(axis=1).sum(), q_values


def actor_loss(actor: Actor, critic: Critic, batch: Transition) -> Array:
    """Minus the first critic's value of the actor's actions (algorithm 1)."""
    return -critic(batch.obs, actor(batch.obs))[0].mean()


# --- Training -------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What gradient steps change."""

    actor: Actor
    critic: Critic
    target_actor: Actor
    target_critic: Critic
    opt_states: dict[str, optax.OptState]


class TrainState(NamedTuple):
    """All that one iteration hands to the next: saving it is an exact checkpoint."""

    learner: Learner
    obs_stats: RunningStats | None
    buffer: Any  # of Transition, [buffer_size, ...]
    priorities: Array | None  # [buffer_size], 0 where nothing is stored
    acting: Acting
    episode_stats: "EpisodeStats"
    key: Array
    step: Array  # environment steps done
    iteration: Array  # iterations done


def make_train(args: Args, env: "Env") -> tuple[Callable, Callable]:
    """-> init(key) -> state, and train_iteration(state) -> (state, metrics)."""
    txs, replay = make_optimizers(args), make_replay(args)

    def init(key: Array) -> TrainState:
        actor_key, critic_key, env_key, key = jax.random.split(key, 4)
        actor = Actor(env.obs_shape, env.action_size, args, nnx.Rngs(actor_key))
        critic = Critic(env.obs_shape, env.action_size, args, nnx.Rngs(critic_key))
        opt_states = {"actor": txs["actor"].init(actor), "critic": txs["critic"].init(critic)}
        targets = jax.tree.map(jnp.copy, (actor, critic))
        acting, action = Acting(*env.reset(env_key)), jnp.zeros(env.action_size)
        obs = acting.obs[0]
        example = Transition(obs, action, jnp.float32(0.0), obs, jnp.bool_(False))
        return TrainState(
            learner=Learner(actor, critic, *targets, opt_states),
            obs_stats=init_running(env.obs_shape) if args.norm_obs else None,
            buffer=replay.init(example),
            priorities=jnp.zeros(args.buffer_size) if args.prioritized_replay else None,
            acting=acting,
            episode_stats=EpisodeStats(jnp.zeros((args.num_envs, 2))),
            key=key,
            step=jnp.int32(0),
            iteration=jnp.int32(0),
        )

    def train_iteration(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        step = lambda state, _: step_and_learn(state, env, replay, txs, args)
        state, (rewards, dones, sums) = jax.lax.scan(step, state, length=args.num_steps)
        assert rewards.shape == dones.shape == (args.num_steps, args.num_envs)  # [T, B]
        updates = gradient_steps_due(state.step, args)
        number = updates - gradient_steps_due(state.step - args.num_envs * args.num_steps, args)
        metrics = {name: x.sum() / jnp.maximum(number, 1) for name, x in sums.items()}
        metrics |= {"charts/updates": updates}
        episode_stats, episode_metrics = record_episodes(state.episode_stats, rewards, dones)
        state = state._replace(episode_stats=episode_stats, iteration=state.iteration + 1)
        return state, metrics | episode_metrics

    return init, train_iteration


def make_optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """AdamW for actor and critics; the actor takes fewer steps."""
    updates = gradient_steps_due(jnp.int32(args.total_timesteps), args)
    rate = lambda lr, steps: optax.linear_schedule(lr, 0.0, steps) if args.anneal_lr else lr

    def adamw(lr, steps):
        # eps stays Adam's own 1e-8: the 1e-5 of ppo.py is a detail of PPO.
        tx = optax.adamw(rate(lr, steps), weight_decay=args.weight_decay)
        if args.max_grad_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), tx)

    actor = adamw(args.policy_lr, updates // args.policy_frequency)
    return {"actor": actor, "critic": adamw(args.q_lr, updates)}


def gradient_steps_due(step: Array, args: Args) -> Array:
    """Gradient steps due after so many environment steps, in all: the same for any num_envs."""
    ratio = Fraction(args.updates_per_step).limit_denominator(1_000)  # floats would lose count
    steps = jnp.maximum(step - args.learning_starts, 0)
    whole, rest = jnp.divmod(steps, ratio.denominator)
    return whole * ratio.numerator + rest * ratio.numerator // ratio.denominator


def step_and_learn(state: TrainState, env: "Env", replay: Any, txs: dict, args: Args):
    """One step in each environment, then the gradient steps due by now -> state, (rewards, dones,
    sums): rewards and dones are [B], sums those of the metrics of all gradient steps.
    """
    action_key, random_key, env_key, update_key, key = jax.random.split(state.key, 5)
    (env_state, obs), obs_stats = state.acting, state.obs_stats
    if obs_stats is not None:  # of what is acted on, never of what is replayed
        obs_stats = update_running(obs_stats, obs[None])
    action = state.learner.actor(normalize(obs, obs_stats))
    noise = args.exploration_noise * jax.random.normal(action_key, action.shape)
    random_action = jax.random.uniform(random_key, action.shape, minval=-1.0)
    action = jnp.clip(action + noise, -1.0, 1.0)
    action = jnp.where(state.step < args.learning_starts, random_action, action)
    env_state, timestep = env.step(env_key, env_state, to_bounds(action, env))
    reward, next_obs, terminated = timestep.reward, timestep.next_obs, timestep.terminated
    buffer, priorities = state.buffer, state.priorities
    if priorities is not None:  # new ones are drawn as often as any
        new = (buffer.current_index + jnp.arange(args.num_envs)) % args.buffer_size
        priorities = priorities.at[new].set(jnp.maximum(priorities.max(), 1.0))
    buffer = replay.add(buffer, Transition(obs, action, reward, next_obs, terminated))

    def gradient_step(number, carry):
        learner, priorities, sums = carry
        sample_key, loss_key = jax.random.split(jax.random.fold_in(update_key, number))
        batch, positions = sample(replay, buffer, priorities, sample_key, args)
        obs, next_obs = normalize(batch.obs, obs_stats), normalize(batch.next_obs, obs_stats)
        batch = batch._replace(obs=obs, next_obs=next_obs)
        learner, metrics, errors = update(learner, txs, batch, number, loss_key, args)
        if priorities is not None:
            priority = jnp.maximum(errors**args.priority_exponent, 1.0)
            priorities = priorities.at[positions].set(priority)
        return learner, priorities, jax.tree.map(jnp.add, sums, metrics)

    step = state.step + args.num_envs
    sums = dict.fromkeys(metric_names(args), jnp.float32(0.0))
    due_before, due = gradient_steps_due(state.step, args), gradient_steps_due(step, args)
    carry = (state.learner, priorities, sums)
    learner, priorities, sums = jax.lax.fori_loop(due_before, due, gradient_step, carry)
    state = state._replace(
        learner=learner,
        obs_stats=obs_stats,
        buffer=buffer,
        priorities=priorities,
        acting=Acting(env_state, timestep.obs),
        key=key,
        step=step,
    )
    return state, (reward, timestep.terminated | timestep.truncated, sums)


def update(learner: Learner, txs: dict, batch: Transition, number: Array, key: Array, args: Args):
    """Gradient step `number` (from 0) of the critics on a batch [M, ...] -> learner, metrics, the
    larger of their errors [M]. With the last of each policy_frequency, the actor takes one too, and all
    targets follow.
    """
    actor, critic, *targets, opt_states = learner

    def descend(name, part, grads):
        updates, opt_state = txs[name].update(grads, opt_states[name], part)
        seen = monitor(name, part, grads, updates, args) if args.monitor_gradients else {}
        return optax.apply_updates(part, updates), opt_state, seen

    goal = compute_targets(*targets, batch, key, args)
    value_and_grad = partial(jax.value_and_grad, has_aux=True)
    (qf_loss, q_values), grads = value_and_grad(critic_loss)(critic, batch, goal, args)
    critic, critic_opt, critic_seen = descend("critic", critic, grads)

    def follow():
        loss, grads = jax.value_and_grad(actor_loss)(actor, critic, batch)
        new, actor_opt, seen = descend("actor", actor, grads)
        followed = optax.incremental_update((new, critic), (*targets,), args.tau)
        # Metrics are averaged over all steps, of which only these have an actor's.
        seen = {"losses/actor_loss": loss} | seen
        seen = jax.tree.map(lambda x: x * args.policy_frequency, seen)
        return new, followed, actor_opt, seen

    due = (number + 1) % args.policy_frequency == 0
    nothing = {x: jnp.float32(0.0) for x in metric_names(args) if "actor" in x}
    wait = lambda: (actor, (*targets,), opt_states["actor"], nothing)
    actor, targets, actor_opt, actor_seen = jax.lax.cond(due, follow, wait)
    metrics = {
        "losses/qf_loss": qf_loss,
        "losses/qf_values": q_values.mean(),
    }
    errors = jnp.abs(q_values - goal).max(axis=0)
    learner = Learner(actor, critic, *targets, {"actor": actor_opt, "critic": critic_opt})
    return learner, metrics | actor_seen | critic_seen, errors


MONITORED = ("norm", "param_norm", "update_ratio", "near_zero", "clipped")


def metric_names(args: Args) -> list[str]:
    """Of what `update` measures."""
    losses = [f"losses/{x}" for x in ("qf_loss", "qf_values", "actor_loss")]
    networks = ("actor", "critic") if args.monitor_gradients else ()
    return losses + [f"gradients/{x}_{y}" for x, y in product(networks, MONITORED)]


def monitor(name: str, part: Any, grads: Any, updates: Any, args: Args) -> dict[str, Array]:
    """What --monitor-gradients logs of a network's gradient step, in the order of MONITORED."""
    norm, size = optax.tree.norm(grads), optax.tree.norm(part)
    below = jnp.abs(ravel_pytree(grads)[0]) < 1e-8  # Adam's epsilon: such entries hardly move
    clipped = norm > (jnp.inf if args.max_grad_norm is None else args.max_grad_norm)
    values = (norm, size, optax.tree.norm(updates) / size, below.mean(), clipped.astype(float))
    return {f"gradients/{name}_{x}": y for x, y in zip(MONITORED, values, strict=True)}


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(state: TrainState, env: "Env", key: Array, max_steps: int = 108_000):
    """Plays the actor alone, without noise, for one episode in each environment -> returns, lengths [B].

    Only first episodes count: those that end first are short. After max_steps, one counts as it is.
    """

    def playing(carry):
        *_, lengths, alive = carry
        return alive.any() & (lengths.max() < max_steps)

    def act_and_step(carry):
        (env_state, obs), key, returns, lengths, alive = carry
        env_key, key = jax.random.split(key)
        action = state.learner.actor(normalize(obs, state.obs_stats))
        env_state, timestep = env.step(env_key, env_state, to_bounds(action, env))
        returns += jnp.where(alive, timestep.reward, 0.0)
        lengths += alive
        alive &= ~(timestep.terminated | timestep.truncated)
        return Acting(env_state, timestep.obs), key, returns, lengths, alive

    reset_key, key = jax.random.split(key)
    acting = Acting(*env.reset(reset_key))
    zeros = jnp.zeros(acting.obs.shape[0])
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
