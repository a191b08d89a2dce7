# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10,<0.12",
#   "flax>=0.12.8,<0.13",
#   "optax>=0.2.8,<0.3",
#   "distrax>=0.1.9,<0.2",
#   "gymnasium[box2d]>=1.3,<1.4",
#   "gymnax>=1.0.1,<1.1",
#   "craftax>=1.6,<1.7",
#   "envpool>=1.2.5,<1.3",
#   "orbax-checkpoint>=0.12,<0.13",
#   "tyro>=1.0,<1.1",
#   "tqdm>=4.66,<5",
#   "matplotlib>=3.9,<4",
# ]
# ///
"""Recurrent proximal policy optimisation for continuous actions, in one file.

Schulman et al. 2017, arXiv:1707.06347 (clipped surrogate: eq. 7, loss: eq. 9); Hochreiter and
Schmidhuber 1997, "Long Short-Term Memory"; Kapturowski et al. 2019, "Recurrent Experience Replay in
Distributed Reinforcement Learning" (stored carries and burn-in: section 3). "detail N" and "detail cN":
the N-th core detail and the N-th for continuous actions of Huang et al. 2022, "The 37 Implementation
Details of PPO".

    python rppo_continuous.py                                    # Pendulum-v1 without the velocity
    python rppo_continuous.py --burn-in 8 --recompute-advantages

Expected on Pendulum-v1 without the velocity, on two CPU cores: greedy return -159 +- 10 after 500k
steps (mean and std of 10 seeds, 100 episodes each); --target-return -200 ends 15 s after the launch.

Differs from ppo_lstm.py in: actor and critic have an LSTM each; the policy is a Gaussian whose actions
are clipped on their way to the simulator and nowhere else; rollouts are cut into sequences, each with
the carry that acting had at its start.

Differs from the papers as ppo.py does: annealing, clipped gradient norm, normalised advantages,
scaled rewards, and a time limit is not taken for the end of the task (arXiv:1712.00378). Sequences do not
overlap as R2D2's do, so the steps that burn a carry in are not learned from.
"""

import os
import time

LAUNCHED = time.time()  # before the slow imports, so that `seconds` in metrics.csv counts them
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # if the CPU has AVX-512

import csv
import dataclasses
import difflib
import json
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from jax import Array
from jax.experimental import io_callback


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "gymnax::Pendulum-v1"  # suite::name (gymnax, craftax, gymnasium, envpool)
    env_kwargs: str = "{}"  # JSON object of arguments for the environment
    mask_obs: tuple[int, ...] | None = None  # to hide, None: the velocity if gymnax::Pendulum-v1
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained at once by vmap: seed, seed + 1, ... (JAX suites only)
    total_timesteps: int = 500_000  # environment steps of each agent
    num_envs: int = 64  # parallel environments
    num_steps: int = 128  # steps in each environment between two updates
    learning_rate: float = 2e-3  # Adam's step size at the start
    anneal_lr: bool = True  # let the step size fall linearly to 0 over the run
    gamma: float = 0.95  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 16  # minibatches in each epoch, of sequences
    update_epochs: int = 8  # passes over each batch
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move from 1
    clip_vloss: bool = False  # clip the value loss in the same way
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest global norm of a gradient
    target_kl: float | None = None  # skip an update's remaining epochs once approx_kl exceeds this
    sequence_length: int = 64  # steps of a training sequence, into which num_steps is cut
    burn_in: int = 0  # first steps of a sequence: they warm its carry up, unlearned
    recompute_advantages: bool = False  # with present values and carries, before each epoch
    reward_scale: float = 0.02  # factor on the rewards the agent learns from, not on those reported
    hidden_size: int = 64  # width of each encoder and LSTM
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
            velocity = (2,) if self.env_id == "gymnax::Pendulum-v1" else ()
            object.__setattr__(self, "mask_obs", velocity)

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_sequences(self) -> int:
        return self.num_steps // self.sequence_length * self.num_envs

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size


# --- Networks -------------------------------------------------------------------------------------


def linear(in_size: int, out_size: int, scale: float, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer with orthogonal weights and zero bias."""
    return nnx.Linear(in_size, out_size, kernel_init=nnx.initializers.orthogonal(scale), rngs=rngs)


class LSTM(nnx.Module):
    """Long short-term memory; its carry is (h, c), both [B, D]. A reset clears it BEFORE the cell."""

    def __init__(self, in_size: int, hidden_size: int, rngs: nnx.Rngs):
        self.hidden_size = hidden_size
        self.inputs = linear(in_size, 4 * hidden_size, 1.0, rngs)
        self.recurrent = linear(hidden_size, 4 * hidden_size, 1.0, rngs)

    def cell(self, carry: tuple[Array, Array], gates: Array, reset: Array) -> tuple[Array, Array]:
        """carry, what the inputs give to the gates [B, 4 D], reset [B] -> carry."""
        h, c = [jnp.where(reset[:, None], 0.0, x) for x in carry]
        i, f, g, o = jnp.split(gates + self.recurrent(h), 4, axis=-1)
        c = nnx.sigmoid(f + 1.0) * c + nnx.sigmoid(i) * nnx.tanh(g)  # at the start it remembers
        return nnx.sigmoid(o) * nnx.tanh(c), c

    def step(self, carry: tuple[Array, Array], x: Array, reset: Array):
        """x [B, in_size], reset [B] -> carry, outputs [B, D]."""
        carry = self.cell(carry, self.inputs(x), reset)
        return carry, carry[0]

    def unroll(self, carry: tuple[Array, Array], x: Array, reset: Array):
        """x [T, B, in_size], reset [T, B] -> carry, outputs [T, B, D]; the same as T steps."""

        def advance(carry, step):
            carry = self.cell(carry, *step)
            return carry, carry[0]

        gates = self.inputs(x)  # [T, B, 4 D], one product for all steps
        # Not unrolled: on a CPU, XLA would fuse the steps, and the gradient takes three times as long.
        return jax.lax.scan(advance, carry, (gates, reset))


class CNN(nnx.Module):
    """The Nature DQN's image encoder, [..., H, W, C] -> [..., F].

    A convolution is written as its patches times a matrix: on a CPU, the gradient of XLA's own is
    many times slower inside a compiled loop.
    """

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
        for layer, (width, stride) in zip(self.layers, self.windows, strict=True):
            rows, cols = [(n - width) // stride * stride + 1 for n in x.shape[-3:-1]]
            shifts = [(i, j) for i in range(width) for j in range(width)]
            parts = [x[..., i : i + rows : stride, j : j + cols : stride, :] for i, j in shifts]
            x = nnx.relu(layer(jnp.concatenate(parts, axis=-1)))  # [..., H', W', features]
        return x.reshape(*x.shape[:-3], self.out_size)


class Recurrent(nnx.Module):
    """Encoder, LSTM and a linear head."""

    def __init__(self, obs_shape: tuple[int, ...], hidden_size: int, out_size: int, scale, rngs):
        self.cnn = CNN(obs_shape, rngs) if len(obs_shape) == 3 else None
        in_size = self.cnn.out_size if self.cnn else obs_shape[0]
        self.embed = linear(in_size, hidden_size, 2**0.5, rngs)
        self.lstm = LSTM(hidden_size, hidden_size, rngs)
        self.head = linear(hidden_size, out_size, scale, rngs)

    def encode(self, obs: Array) -> Array:
        """[..., *obs_shape] -> [..., D]."""
        return nnx.tanh(self.embed(self.cnn(obs) if self.cnn else obs))

    def step(self, carry: tuple[Array, Array], obs: Array, reset: Array):
        """obs [B, *obs_shape], reset [B] -> carry, outputs [B, out_size]."""
        carry, x = self.lstm.step(carry, self.encode(obs), reset)
        return carry, self.head(x)

    def unroll(self, carry: tuple[Array, Array], obs: Array, reset: Array):
        """obs [T, B, *obs_shape], reset [T, B] -> carry, outputs [T, B, out_size]."""
        carry, x = self.lstm.unroll(carry, self.encode(obs), reset)
        return carry, self.head(x)


class Agent(nnx.Module):
    """Separate actor and critic (detail 13), each with a memory; orthogonal weights (detail 2)."""

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, hidden_size: int, rngs):
        self.actor = Recurrent(obs_shape, hidden_size, action_size, 0.01, rngs)  # mean near 0
        self.critic = Recurrent(obs_shape, hidden_size, 1, 1.0, rngs)
        self.log_std = nnx.Param(jnp.zeros(action_size))  # details c2 and c3

    def initial_memory(self, num_envs: int) -> tuple:
        """The carries of actor and critic at the start of an episode, each (h, c), all [B, D]."""
        return (((jnp.zeros((num_envs, self.actor.lstm.hidden_size)),) * 2),) * 2

    def step(self, memory: tuple, obs: Array, reset: Array):
        """obs [B, *obs_shape], reset [B] -> memory, policy and value, both [B]."""
        actor_carry, mean = self.actor.step(memory[0], obs, reset)
        critic_carry, value = self.critic.step(memory[1], obs, reset)
        return (actor_carry, critic_carry), self.policy(mean), value[..., 0]

    def unroll(self, memory: tuple, obs: Array, reset: Array):
        """obs [T, B, *obs_shape], reset [T, B] -> memory, policy and value, both [T, B]."""
        actor_carry, mean = self.actor.unroll(memory[0], obs, reset)
        critic_carry, value = self.critic.unroll(memory[1], obs, reset)
        return (actor_carry, critic_carry), self.policy(mean), value[..., 0]

    def policy(self, mean: Array) -> distrax.Distribution:
        """[..., A] -> Gaussian of actions."""
        return distrax.MultivariateNormalDiag(mean, jnp.exp(self.log_std[...]))


# --- Rollout --------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of all environments; rollout stacks them to [T, B, ...]."""

    obs: Array  # [B, *obs_shape]
    reset: Array  # [B], obs begins an episode: clear the memory before it
    action: Array  # [B, A], as sampled: not clipped
    logprob: Array  # [B], log pi(action | obs)
    value: Array  # [B], V(obs)
    reward: Array  # [B]
    done: Array  # [B], the action ended the episode
    cut: Array  # [B], and a time limit was the reason
    final_value: Array  # [B], V(next_obs) where a time limit cut the episode, else 0
    next_obs: Array  # [B, *obs_shape], where the action led
    memory: Any  # [B, ...], before obs


class Acting(NamedTuple):
    """Where acting stands between two steps."""

    env_state: Any
    obs: Array  # [B, *obs_shape], what to act on next
    reset: Array  # [B], obs begins an episode
    memory: Any  # [B, ...], before obs


def rollout(agent: Agent, env: "Env", acting: Acting, key: Array, num_steps: int):
    """Acts for num_steps steps -> acting, Transition [T, B, ...]."""
    action_keys, env_keys = jax.random.split(key, (2, num_steps))

    def act_and_step(acting, keys):
        env_state, obs, reset, memory = acting
        action_key, env_key = keys
        next_memory, pi, value = agent.step(memory, obs, reset)
        action = pi.sample(seed=action_key)
        clipped = jnp.clip(action, env.action_low, env.action_high)  # detail c5
        env_state, timestep = env.step(env_key, env_state, clipped)
        cut = timestep.truncated & ~timestep.terminated
        done = timestep.terminated | timestep.truncated
        final_value = value_at_limit(agent, next_memory, timestep.next_obs, cut)
        transition = (obs, reset, action, pi.log_prob(action), value, timestep.reward, done)
        transition = Transition(*transition, cut, final_value, timestep.next_obs, memory)
        return Acting(env_state, timestep.obs, done, next_memory), transition

    return jax.lax.scan(act_and_step, acting, (action_keys, env_keys))


def value_at_limit(agent: Agent, memory, next_obs: Array, cut: Array) -> Array:
    """V(next_obs) where a time limit cut the episode, else 0: the task goes on beyond (arXiv:1712.00378,
    sec. 3). All are [B, ...]; memory: after the step.
    """
    return jax.lax.cond(
        cut.any(),
        lambda: jnp.where(cut, agent.step(memory, next_obs, jnp.zeros_like(cut))[2], 0.0),
        lambda: jnp.zeros(cut.shape),
    )


def replay(agent: Agent, batch: Transition, acting: Acting) -> tuple[Transition, Acting]:
    """The batch and what follows it, with what this agent would have remembered and expected."""

    def step(memory, transition):
        next_memory, _, value = agent.step(memory, transition.obs, transition.reset)
        final_value = value_at_limit(agent, next_memory, transition.next_obs, transition.cut)
        fresh = transition._replace(memory=memory, value=value, final_value=final_value)
        return next_memory, fresh

    start = jax.tree.map(lambda x: x[0], batch.memory)
    memory, batch = jax.lax.scan(step, start, batch)
    return batch, acting._replace(memory=memory)


# --- Advantages -----------------------------------------------------------------------------------


def compute_gae(
    rewards: Array, values: Array, dones: Array, last_value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalised advantage estimation, arXiv:1506.02438, eq. 16 -> advantages, returns.

    rewards, values, dones (bool) and both results: [T, B]; last_value: [B], V of the observation
    after the last step. Where a time limit cut the episode, first add gamma * V(next_obs) to the
    reward.
    """
    next_values = jnp.concatenate([values[1:], last_value[None]])  # [T, B]
    deltas = rewards + gamma * next_values * ~dones - values  # [T, B], TD errors

    def backward(advantage, step):
        delta, done = step
        advantage = delta + gamma * gae_lambda * ~done * advantage
        return advantage, advantage

    start = jnp.zeros_like(last_value)
    _, advantages = jax.lax.scan(backward, start, (deltas, dones), reverse=True, unroll=8)
    return advantages, advantages + values


# --- Loss -----------------------------------------------------------------------------------------


LOSS_METRICS = [
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/clipfrac",
]


def ppo_loss(
    agent: Agent, memory, batch: Transition, advantages: Array, returns: Array, args: Args
):
    """Clipped surrogate, value and entropy loss (eq. 9) of sequences [W, S, ...] that begin with memory
    [S, ...] -> loss, metrics. The first burn_in steps only warm the memory up.
    """
    assert batch.obs.shape[:2] == batch.logprob.shape == advantages.shape == returns.shape
    if args.burn_in:
        warm_up, (batch, advantages, returns) = [
            jax.tree.map(lambda x, part=part: x[part], (batch, advantages, returns))
            for part in (slice(args.burn_in), slice(args.burn_in, None))
        ]
        memory, _, _ = jax.lax.stop_gradient(agent).unroll(memory, warm_up[0].obs, warm_up[0].reset)
    _, pi, value = agent.unroll(memory, batch.obs, batch.reset)
    logratio = pi.log_prob(batch.action) - batch.logprob
    ratio = jnp.exp(logratio)

    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()  # eq. 7

    v_error = (value - returns) ** 2
    if args.clip_vloss:  # detail 9
        clipped_value = jnp.clip(value, batch.value - args.clip_coef, batch.value + args.clip_coef)
        v_error = jnp.maximum(v_error, (clipped_value - returns) ** 2)
    v_loss = 0.5 * v_error.mean()

    entropy = pi.entropy().mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    approx_kl = ((ratio - 1) - logratio).mean()  # k3 of joschu.net/blog/kl-approx.html
    clipfrac = (jnp.abs(ratio - 1) > args.clip_coef).mean()
    return loss, dict(
        zip(LOSS_METRICS, (pg_loss, v_loss, entropy, approx_kl, clipfrac), strict=True)
    )


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that one iteration hands to the next: saving it is an exact checkpoint."""

    agent: Agent
    opt_state: optax.OptState
    acting: Acting
    stats: "EpisodeStats"
    key: Array
    iteration: Array  # iterations done


def make_train(args: Args, env: "Env") -> tuple[Callable, Callable]:
    """-> init(key) -> state, and train_iteration(state) -> (state, metrics)."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)  # detail 11
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-5))  # detail 3; `update` has the step size

    def init(key: Array) -> TrainState:
        agent_key, env_key, key = jax.random.split(key, 3)
        agent = Agent(env.obs_shape, env.action_size, args.hidden_size, nnx.Rngs(agent_key))
        env_state, obs = env.reset(env_key)
        reset, memory = jnp.ones(args.num_envs, bool), agent.initial_memory(args.num_envs)
        acting, stats = Acting(env_state, obs, reset, memory), init_stats(args.num_envs)
        return TrainState(agent, tx.init(agent), acting, stats, key, jnp.int32(0))

    def train_iteration(state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        rollout_key, update_key, key = jax.random.split(state.key, 3)
        acting, batch = rollout(state.agent, env, state.acting, rollout_key, args.num_steps)
        assert batch.reward.shape == (args.num_steps, args.num_envs)  # [T, B]

        progress = state.iteration / args.num_iterations
        learning_rate = args.learning_rate * (1.0 - progress * args.anneal_lr)  # detail 4
        learner = (state.agent, state.opt_state, tx, learning_rate)
        agent, opt_state, metrics = update(*learner, batch, acting, update_key, args)
        stats = record_episodes(state.stats, batch.reward, batch.done)
        metrics |= {"charts/learning_rate": learning_rate}
        state = TrainState(agent, opt_state, acting, stats, key, state.iteration + 1)
        return state, metrics | episode_metrics(stats)

    return init, train_iteration


def prepare(agent: Agent, batch: Transition, acting: Acting, args: Args):
    """The batch [T, B, ...] as sequences [W, K B, ...] -> memory [K B, ...], (batch, advantages,
    returns). acting: where it stood after the batch.
    """
    _, _, last_value = agent.step(acting.memory, acting.obs, acting.reset)
    rewards = args.reward_scale * batch.reward + args.gamma * batch.final_value
    advantages, returns = compute_gae(
        rewards, batch.value, batch.done, last_value, args.gamma, args.gae_lambda
    )
    assert advantages.shape == returns.shape == (args.num_steps, args.num_envs)

    def to_sequences(x):  # [T, B, ...] -> [W, K B, ...], K sequences of each environment
        x = x.reshape(-1, args.sequence_length, *x.shape[1:]).swapaxes(0, 1)  # [W, K, B, ...]
        return x.reshape(args.sequence_length, args.num_sequences, *x.shape[3:])

    data = jax.tree.map(to_sequences, (batch, advantages, returns))
    memory = jax.tree.map(lambda x: x[0], data[0].memory)
    return memory, (data[0]._replace(memory=None, next_obs=None), *data[1:])


def update(agent, opt_state, tx, learning_rate, batch, acting, key, args: Args):
    """Epochs of gradient steps on a batch [T, B, ...], in minibatches of sequences -> agent, opt_state,
    metrics. acting: where it stood after the batch.
    """
    as_acted = prepare(agent, batch, acting, args)

    def minibatch_step(carry, indices, memory, data):
        agent, opt_state = carry
        start = jax.tree.map(lambda x: x[indices], memory)  # [S, ...]
        minibatch = jax.tree.map(lambda x: x[:, indices], data)  # [W, S, ...]
        grads, metrics = jax.grad(ppo_loss, has_aux=True)(agent, start, *minibatch, args)
        updates, opt_state = tx.update(grads, opt_state)
        agent = optax.apply_updates(agent, jax.tree.map(lambda u: -learning_rate * u, updates))
        return (agent, opt_state), metrics

    def epoch(carry):
        key, order_key = jax.random.split(carry["key"])
        order = random_order(order_key, args.num_sequences)
        order = order.reshape(args.num_minibatches, -1)  # [N, S]
        agent, _ = carry["train"]
        memory, data = as_acted
        if args.recompute_advantages:
            memory, data = prepare(agent, *replay(agent, batch, acting), args)
        step = partial(minibatch_step, memory=memory, data=data)
        train, metrics = jax.lax.scan(step, carry["train"], order)
        metrics = jax.tree.map(jnp.mean, metrics)
        return {"epoch": carry["epoch"] + 1, "key": key, "train": train, "metrics": metrics}

    def keep_going(carry):
        more = carry["epoch"] < args.update_epochs
        if args.target_kl is None:
            return more
        return more & (carry["metrics"]["losses/approx_kl"] <= args.target_kl)

    metrics = {name: jnp.float32(0.0) for name in LOSS_METRICS}
    carry = {"epoch": 0, "key": key, "train": (agent, opt_state), "metrics": metrics}
    carry = jax.lax.while_loop(keep_going, epoch, carry)
    _, (sequences, _, returns) = as_acted
    explained = 1.0 - jnp.var(returns - sequences.value) / (jnp.var(returns) + 1e-8)
    return *carry["train"], carry["metrics"] | {"losses/explained_variance": explained}


def random_order(key: Array, size: int) -> Array:
    """range(size) in random order (detail 6), four times as fast on a CPU as jax.random.permutation.

    It sorts once, and single words: random high bits above the index in the low bits. Where the
    high bits of two words agree they stay in order, which is rare and does not matter here.
    """
    low_bits = jnp.uint32(2 ** (size - 1).bit_length() - 1)
    words = (jax.random.bits(key, (size,)) & ~low_bits) | jnp.arange(size, dtype=jnp.uint32)
    return jnp.sort(words) & low_bits


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(
    state: TrainState, env: "Env", key: Array, max_steps: int = 108_000
) -> tuple[Array, Array]:
    """Plays the most probable actions for one episode in each environment -> returns, lengths [B].

    Only first episodes count: taking the first to end would favour short ones. An episode that
    still runs after max_steps counts as it stands.
    """
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    reset, memory = jnp.ones(obs.shape[0], bool), state.agent.initial_memory(obs.shape[0])
    zeros = jnp.zeros(obs.shape[0])

    def playing(carry):
        _, totals = carry
        return totals["alive"].any() & (totals["length"].max() < max_steps)

    def act_and_step(carry):
        (env_state, obs, reset, memory, key), totals = carry
        key, env_key = jax.random.split(key)
        memory, pi, _ = state.agent.step(memory, obs, reset)
        clipped = jnp.clip(pi.mode(), env.action_low, env.action_high)
        env_state, timestep = env.step(env_key, env_state, clipped)
        done = timestep.terminated | timestep.truncated
        alive = totals["alive"]
        totals = {
            "return": totals["return"] + jnp.where(alive, timestep.reward, 0.0),
            "length": totals["length"] + alive,
            "alive": alive & ~done,
        }
        return (env_state, timestep.obs, done, memory, key), totals

    totals = {"return": zeros, "length": zeros, "alive": jnp.ones(obs.shape[0], bool)}
    start = (env_state, obs, reset, memory, key)
    _, totals = jax.lax.while_loop(playing, act_and_step, (start, totals))
    return totals["return"], totals["length"]


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

    reset: Callable  # key -> env_state, obs
    step: Callable  # key, env_state, action -> env_state, Timestep
    obs_shape: tuple[int, ...]  # of one environment: a vector, or an image [H, W, C]
    action_size: int  # number of discrete actions, or of entries of a continuous one
    action_low: np.ndarray | None = None
    action_high: np.ndarray | None = None
    num_states: int = 0  # above 0: observations are numbers below it, and are made one-hot
    hosted: bool = False  # stepped outside JAX: no vmap over seeds, no state in checkpoints


def make_env(
    env_id: str,
    num_envs: int,
    seed: int = 0,
    env_kwargs: str = "{}",
    mask_obs: tuple[int, ...] = (),
) -> Env:
    """Builds num_envs environments `suite::name`; bad input ends the program with status 2."""
    suite, _, name = env_id.partition("::")
    own = Path(__file__).with_name("envs") / f"{suite}.py"
    suites = {"gymnax": gymnax_env, "craftax": craftax_env, "gymnasium": gymnasium_env}
    suites["envpool"] = envpool_env
    if "::" not in env_id:
        fail(f"--env-id {env_id} names no suite: write suite::name, like gymnasium::{env_id}")
    if not own.is_file():  # for a suite of your own, write this file
        check_known("suite", suite, suites)
    # Simulators give environment i the seed + i, so seeds in a row would share all but one.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 2)
    try:
        kwargs = json.loads(env_kwargs)
        repeats = kwargs.pop("action_repeat", 1)
        env = suites.get(suite, partial(own_env, own))(name, num_envs, seed, **kwargs)
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        if env_kwargs == "{}":
            raise
        fail(f"{env_id} refuses --env-kwargs {env_kwargs}: {str(error).splitlines()[0]}")
    if type(repeats) is not int or repeats < 1:
        fail(f'"action_repeat" in --env-kwargs must be a whole number from 1, not {repeats}')
    return repeat_action(shape_obs(env, mask_obs), repeats)


def shape_obs(env: Env, mask_obs: tuple[int, ...]) -> Env:
    """Screens (36 x 36 and larger) become [H, W, C], all else a float32 vector without mask_obs."""
    axes, size = env.obs_shape, env.num_states or int(np.prod(env.obs_shape))
    keep = np.setdiff1d(np.arange(size), mask_obs)
    obs_shape = (keep.size,)
    screen = len(axes) == 3 and sorted(axes)[1] >= 36
    channels_first = screen and axes[0] < axes[2]
    if screen:
        obs_shape = (*axes[1:], axes[0]) if channels_first else axes
    if screen and mask_obs:
        fail("--mask-obs is for vectors, and these observations are images")
    if not set(mask_obs) < set(range(size)):
        fail(f"--mask-obs takes some, not all, of the entries 0 to {size - 1}, not {mask_obs}")

    def shape(obs):
        if screen:
            return jnp.moveaxis(obs, 1, -1) if channels_first else obs
        if env.num_states:
            obs = obs[:, None] == jnp.arange(size)  # [B, size]
        obs = obs.reshape(obs.shape[0], size).astype(jnp.float32)
        return obs[:, keep] if mask_obs else obs

    def reset(key):
        env_state, obs = env.reset(key)
        return env_state, shape(obs)

    def step(key, env_state, action):
        env_state, (obs, next_obs, reward, *ends) = env.step(key, env_state, action)
        return env_state, Timestep(shape(obs), shape(next_obs), jnp.float32(reward), *ends)

    return env._replace(reset=reset, step=step, obs_shape=obs_shape)


def repeat_action(env: Env, repeats: int) -> Env:
    """Takes each action several times and adds up the rewards: "action_repeat" in --env-kwargs.

    Where an episode ends on the way, what is left of the repeats opens the next one, unrecorded.
    """

    def step(key, env_state, action):
        first_key, *keys = jax.random.split(key, repeats)
        env_state, sums = env.step(first_key, env_state, action)
        for key in keys:
            env_state, timestep = env.step(key, env_state, action)
            ended = sums.terminated | sums.truncated
            next_obs = jnp.where(
                ended.reshape(-1, *[1] * (sums.next_obs.ndim - 1)), sums.next_obs, timestep.next_obs
            )
            sums = Timestep(
                timestep.obs,
                next_obs,
                sums.reward + jnp.where(ended, 0.0, timestep.reward),
                jnp.where(ended, sums.terminated, timestep.terminated),
                jnp.where(ended, sums.truncated, timestep.truncated),
            )
        return env_state, sums

    return env if repeats == 1 else env._replace(step=step)


def gymnax_env(name: str, num_envs: int, seed: int, **kwargs) -> Env:
    gymnax = require("gymnax", "gymnax>=1.0.1")
    check_known("environment of gymnax", name, gymnax.registered_envs)
    fields = {field.name for field in dataclasses.fields(gymnax.make(name)[1])}
    params = {key: kwargs.pop(key) for key in fields & set(kwargs)}
    env, default = gymnax.make(name, **kwargs)
    params = default.replace(**params)

    def step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params)

    return jax_env(partial(env.reset_env, params=params), step, num_envs, num_envs, env, params)


def craftax_env(name: str, num_envs: int, seed: int, **kwargs) -> Env:
    make = require("craftax.craftax_env", "craftax").make_craftax_env_from_name
    kinds = ["Symbolic", "Pixels", "Classic-Symbolic", "Classic-Pixels"]
    names = [f"Craftax-{kind}-v1" for kind in kinds]
    check_known("environment of craftax", name, names)
    env = make(name, auto_reset=False)
    params = env.default_params.replace(**kwargs)
    without_limit = params.replace(max_timesteps=np.iinfo(np.int32).max)

    def step(key, state, action):
        obs, state, reward, done, _ = env.step(key, state, action, params)
        terminated = env.is_terminal(state, without_limit)
        return obs, state, reward, terminated, done & ~terminated

    # Worlds are expensive: a few fresh ones go round among the environments that end in a step.
    num_worlds = max(1, num_envs // 16)
    return jax_env(partial(env.reset, params=params), step, num_envs, num_worlds, env, params)


def jax_env(reset: Callable, step: Callable, num_envs: int, num_fresh: int, env, params) -> Env:
    """An Env of JAX functions for a single environment; num_fresh of them are reset for a step in
    which some ended. If more than num_fresh end at once, some get the same fresh state.
    """

    def env_reset(key):
        obs, env_state = jax.vmap(reset)(jax.random.split(key, num_envs))
        return env_state, obs

    def env_step(key, env_state, action):
        next_obs, next_state, reward, terminated, truncated = jax.vmap(step)(
            jax.random.split(key, num_envs), env_state, action
        )
        done = terminated | truncated

        def replace_ended():
            reset_key = jax.random.fold_in(key, 0)  # made here, so that other steps are spared it
            fresh = jax.vmap(reset)(jax.random.split(reset_key, num_fresh))
            chosen = (jnp.cumsum(done) - 1) % num_fresh  # [B], the k-th to end takes fresh state k

            def replace(old, new):
                return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new[chosen], old)

            return jax.tree.map(replace, (next_obs, next_state), fresh)

        obs, env_state = jax.lax.cond(done.any(), replace_ended, lambda: (next_obs, next_state))
        return env_state, Timestep(obs, next_obs, reward, terminated, truncated)

    space, actions = (
        env.observation_space(params),
        action_spec(env.action_space(params), str(env.name)),
    )
    return Env(env_reset, env_step, space.shape, *actions, getattr(space, "n", 0))


def gymnasium_env(name: str, num_envs: int, seed: int, **kwargs) -> Env:
    """Any registered Gymnasium environment, also one that importing a package registers."""
    gymnasium = require("gymnasium")
    spaces = gymnasium.spaces
    package, _, registered = name.rpartition(":")
    if package:
        if not util.find_spec(package.partition(".")[0]):
            fail(f"no package {package}: install it, or put it beside {Path(__file__).name}")
        import_module(package)  # registers its environments
    check_known("environment of gymnasium", registered, gymnasium.registry)

    def make_one():
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
        if isinstance(env.observation_space, spaces.Box):
            return env
        if not env.observation_space.is_np_flattenable:
            fail(f"the observations of {name}, {env.observation_space}, do not flatten to a vector")
        return gymnasium.wrappers.FlattenObservation(env)

    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    try:
        envs = gymnasium.vector.SyncVectorEnv([make_one] * num_envs, autoreset_mode=mode)
    except (gymnasium.error.Error, ImportError) as error:
        fail(f"gymnasium::{name} cannot be made: {str(error).splitlines()[0]}")

    def step(action):
        obs, reward, terminated, truncated, info = envs.step(action)
        next_obs, done = obs.copy(), terminated | truncated
        if done.any():
            next_obs[done] = np.stack(info["final_obs"][done])
        return obs, next_obs, reward, terminated, truncated

    space, actions = envs.single_observation_space, action_spec(envs.single_action_space, name)
    return host_env(
        lambda: envs.reset(seed=seed)[0], step, num_envs, space.shape, space.dtype, actions
    )


def envpool_env(name: str, num_envs: int, seed: int, **kwargs) -> Env:
    """EnvPool would reset an ended environment on the NEXT step; here it is reset at once.

    On a Linux CPU the steps are XLA calls, and Python is entered only when an episode ended.
    """
    envpool = require("envpool")
    check_known("environment of envpool", name, envpool.list_all_envs())
    pool = envpool.make_gymnasium(name, num_envs=num_envs, seed=seed, **kwargs)
    if pool.config["max_num_players"] > 1:
        fail(f"envpool::{name} has several players, and this script trains one agent")

    def join(obs):  # one array as it is, several (of a Dict) as one [B, size]
        parts = jax.tree.leaves(obs)
        joined = [part.reshape(len(part), -1) for part in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(joined, axis=1)

    def reset():
        return join(pool.reset()[0])

    def reset_ended(handle, done, next_obs):
        obs, done = np.array(next_obs), np.asarray(done)
        obs[done] = join(pool.reset(np.flatnonzero(done).astype(np.int32))[0])
        return handle, obs

    def step(action):
        next_obs, reward, terminated, truncated, _ = pool.step(action)
        next_obs, done = join(next_obs), terminated | truncated
        obs = reset_ended(0, done, next_obs)[1] if done.any() else next_obs
        return obs, next_obs, reward, terminated, truncated

    example, actions = reset(), action_spec(pool.action_space, name)
    env = host_env(reset, step, num_envs, example.shape[1:], example.dtype, actions)
    env = env._replace(num_states=getattr(pool.observation_space, "n", 0))
    arrays = [*pool.spec.state_array_spec.values(), *pool.spec.action_array_spec.values()]
    wide = any(np.dtype(array.dtype).itemsize > 4 for array in arrays)  # JAX would halve them
    several = pool.observation_space.shape is None
    if wide or several or sys.platform != "linux" or jax.default_backend() != "cpu":
        return env
    handle, _, _, xla_step = pool.xla()

    def fast_reset(key):
        return jnp.asarray(handle), env.reset(key)[1]

    def fast_step(key, handle, action):
        handle, (next_obs, reward, terminated, truncated, _) = xla_step(handle, action)
        done = terminated | truncated
        # The callback returns the handle too: without that the next step would not wait for it.
        types = (handle, next_obs)
        handle, obs = jax.lax.cond(
            done.any(),
            lambda: io_callback(reset_ended, types, handle, done, next_obs, ordered=True),
            lambda: types,
        )
        return handle, Timestep(obs, next_obs, reward, terminated, truncated)

    return env._replace(reset=fast_reset, step=fast_step)


def own_env(path: Path, name: str, num_envs: int, seed: int, **kwargs) -> Env:
    """A suite of the user's own: envs/<suite>.py has make(name, num_envs, seed, **kwargs), which
    returns the fields of an Env; its step returns env_state and the fields of a Timestep.
    """
    spec = util.spec_from_file_location(f"envs.{path.stem}", path)
    module = sys.modules[spec.name] = util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return Env(*module.make(name, num_envs, seed, **kwargs))


def host_env(reset: Callable, step: Callable, num_envs: int, obs_shape, dtype, actions) -> Env:
    """An Env of numpy functions: reset() -> obs, step(action) -> the fields of a Timestep."""
    dtype = np.uint8 if dtype == np.uint8 else np.float32
    obs_type = jax.ShapeDtypeStruct((num_envs, *obs_shape), dtype)
    reward, flag = [jax.ShapeDtypeStruct((num_envs,), kind) for kind in (np.float32, np.bool_)]
    types = Timestep(obs_type, obs_type, reward, flag, flag)

    def cast_reset():
        return np.asarray(reset(), dtype)

    def cast_step(action):
        parts = zip(step(np.asarray(action)), types, strict=True)
        return Timestep(*[np.asarray(part, kind.dtype) for part, kind in parts])

    def env_reset(key):
        return jnp.int32(0), io_callback(cast_reset, obs_type, ordered=True)

    def env_step(key, env_state, action):
        return env_state, io_callback(cast_step, types, action, ordered=True)

    return Env(env_reset, env_step, tuple(obs_shape), *actions, hosted=True)


def action_spec(space: Any, name: str) -> tuple[int, np.ndarray | None, np.ndarray | None]:
    """Action space of any suite -> action_size, action_low, action_high."""
    kind = type(space).__name__
    if kind == "Discrete" and getattr(space, "start", 0) == 0:
        return int(space.n), None, None
    if kind == "Box" and len(space.shape) < 2:
        size = int(np.prod(space.shape))
        bounds = [np.broadcast_to(np.asarray(x, np.float32), size) for x in (space.low, space.high)]
        return size, *bounds
    fail(f"the actions of {name} are {space}: only Discrete (from 0) and one-dimensional Box work")


# --- Logging & checkpoints ------------------------------------------------------------------------


class EpisodeStats(NamedTuple):
    """Returns and lengths of the running episodes and of the last 100 that ended."""

    running_return: Array  # [B]
    running_length: Array  # [B]
    last_returns: Array  # [100], a ring
    last_lengths: Array  # [100]
    episodes: Array  # ended so far


def init_stats(num_envs: int) -> EpisodeStats:
    """No episode has ended yet."""
    zeros, nans = jnp.zeros(num_envs), jnp.full(100, jnp.nan)
    return EpisodeStats(zeros, zeros, nans, nans, jnp.int32(0))


def record_episodes(stats: EpisodeStats, rewards: Array, dones: Array) -> EpisodeStats:
    """Adds a rollout's rewards and dones, both [T, B]."""

    def add(running, step):
        reward, done = step
        total = running[0] + reward, running[1] + 1.0
        return [jnp.where(done, 0.0, x) for x in total], total

    running, totals = jax.lax.scan(
        add, [stats.running_return, stats.running_length], (rewards, dones)
    )
    ended = dones.reshape(-1)  # [T * B]
    number = jnp.cumsum(ended)  # 1, 2, ... where an episode ended
    new = number[-1]
    slot = jnp.where(ended & (number > new - 100), (stats.episodes + number - 1) % 100, 100)
    last = [
        ring.at[slot].set(total.reshape(-1), mode="drop")
        for ring, total in zip((stats.last_returns, stats.last_lengths), totals, strict=True)
    ]
    return EpisodeStats(*running, *last, stats.episodes + new)


def episode_metrics(stats: EpisodeStats) -> dict[str, Array]:
    """Means over the last 100 training episodes, nan before the first has ended."""
    return {
        "charts/episodic_return": jnp.nanmean(stats.last_returns),
        "charts/episodic_length": jnp.nanmean(stats.last_lengths),
        "charts/episodes": stats.episodes,
    }


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on stderr that says what to change."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_known(what: str, name: str, known: Any) -> None:
    """Ends the program with status 2, naming the nearest, if a name is not among the known."""
    if name not in known:
        near = difflib.get_close_matches(name, list(known), 3, 0.5) or sorted(known)[:5]
        fail(f"unknown {what}: {name}; nearest: {', '.join(near)}")


def require(module: str, package: str | None = None) -> Any:
    """Imports what not every run needs; if it is missing, names the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing: pip install '{package or error.name}'")


def parse_args() -> Args:
    """Reads the command line; after --resume, the run's config.json gives what it leaves out."""
    args = tyro.cli(Args)
    if args.resume is None:
        return args
    try:
        config = json.loads((args.resume / "config.json").read_text())
        saved = config["args"] | {"mask_obs": tuple(config["args"]["mask_obs"])}
        default = Args(**saved | {"resume": args.resume, "run_dir": args.resume})
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--resume {args.resume} holds no config.json of a run of {Path(__file__).name}")
    if config["script"] != Path(__file__).name:
        fail(f"{args.resume} is a run of {config['script']}: resume it with that script")
    args = tyro.cli(Args, default=default)
    for name in {"seed", "num_seeds", "num_envs", "num_steps"} & set(saved):
        if getattr(args, name) != saved[name]:
            fail(f"--resume cannot change --{name.replace('_', '-')}, which is {saved[name]}")
    return args


def check_range(args: Any, names: str, low: float, high: float = float("inf")) -> None:
    """Ends the program with status 2 unless every named field is in [low, high] or None."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
            fail(f"--{name.replace('_', '-')} must be {bounds}, not {value}")


def open_run(args: Any) -> Path:
    """Makes the run's folder; one that holds a run already is only taken with --resume."""
    script, env = Path(__file__).stem, args.env_id.replace("::", "-")
    env = "".join(x if x.isalnum() or x in "-_." else "-" for x in env)
    name = f"{script}__{env}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = args.resume or args.run_dir or Path("runs") / name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if args.resume is None and any(run_dir.iterdir()):
            fail(f"{run_dir} is not empty: choose another --run-dir, or go on with --resume")
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        fail(f"cannot write to {run_dir} ({error.strerror}): choose another --run-dir")
    return run_dir


def write_config(run_dir: Path, args: Any) -> None:
    """config.json: the script, its flags and the versions of what it runs on."""
    versions = {name: metadata.version(name) for name in ("jax", "flax", "optax")}
    config = {"script": Path(__file__).name, "args": dataclasses.asdict(args), "versions": versions}
    write_atomically(run_dir / "config.json", json.dumps(config, indent=2, default=str) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that a kill leaves the old text or the new."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def checkpoints(run_dir: Path) -> Any:
    """Orbax writes a checkpoint beside its place and renames it: what is there is complete."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    folder, handler = (run_dir / "checkpoints").resolve(), ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(folder, options=options, item_handlers=handler)


def named_arrays(state: Any) -> dict[str, Array]:
    """Path in the state -> array. As a flat dict, Orbax keeps a state made of any modules."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def save_checkpoint(run_dir: Path, iteration: int, state: Any) -> None:
    """Saves the state as checkpoints/<iteration>, if it is not there already."""
    import orbax.checkpoint as ocp

    with checkpoints(run_dir) as manager:
        if manager.latest_step() != iteration:
            manager.save(iteration, args=ocp.args.StandardSave(named_arrays(state)))


def load_checkpoint(run_dir: Path, like: Any) -> Any:
    """The last complete checkpoint of a state with the structure and shapes of `like`."""
    import orbax.checkpoint as ocp

    def shapes(arrays):
        return {name: tuple(x.shape) for name, x in arrays.items()}

    def data(x):  # what is stored of a random key
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    arrays = named_arrays(like)
    with checkpoints(run_dir) as manager:
        last = manager.latest_step()
        if last is None:
            fail(f"{run_dir} has no checkpoint to resume from: start a new run")
        if shapes(manager.item_metadata(last)) != shapes(jax.tree.map(data, arrays)):
            fail(
                f"the checkpoint in {run_dir} does not fit these flags: its own are in config.json"
            )
        restored = manager.restore(last, args=ocp.args.StandardRestore(arrays))
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in arrays])


class Logger:
    """metrics.csv, the progress line and, if asked for, TensorBoard and Weights & Biases."""

    def __init__(self, args: Any, run_dir: Path, first_step: int):
        self.path, self.first_step, self.began = run_dir / "metrics.csv", first_step, time.time()
        self.seeds = range(args.seed, args.seed + args.num_seeds)
        self.launched, self.printed, self.trackers = LAUNCHED, 0.0, []
        if first_step and self.path.exists():  # drop what came after the checkpoint
            header, *lines = self.path.read_text().splitlines(keepends=True)
            lines = [x for x in lines if x.endswith("\n") and int(x.split(",")[0]) <= first_step]
            write_atomically(self.path, "".join([header, *lines]))
            self.launched -= float(lines[-1].split(",")[1]) if lines else 0.0
        self.bar = tqdm.tqdm(
            total=args.num_iterations * args.num_envs * args.num_steps,
            initial=first_step,
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
        )
        if args.tensorboard:
            writer = require("tensorboardX").SummaryWriter(str(run_dir))
            self.trackers.append(writer.add_scalar)
        if args.track:
            options = {"project": "unroll", "name": run_dir.name, "dir": run_dir, "resume": "allow"}
            options["id"] = f"{zlib.crc32(bytes(run_dir.resolve())):x}"  # the same again on resume
            wandb_run = require("wandb").init(config=dataclasses.asdict(args), **options)
            self.trackers.append(lambda tag, value, step: wandb_run.log({tag: value}, step=step))

    def log(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Adds a row for each seed; the metrics are arrays [num_seeds]."""
        now, rows = time.time(), []
        speed = (step - self.first_step) / (now - self.began)
        for k, seed in enumerate(self.seeds):
            row = {"charts/SPS": round(speed)} | {name: float(x[k]) for name, x in metrics.items()}
            rows.append(
                {"step": step, "seconds": round(now - self.launched, 3), "seed": seed} | row
            )
            prefix = f"seed_{seed}/" if len(self.seeds) > 1 else ""
            for track in self.trackers:
                for name, value in row.items():
                    track(prefix + name, value, step)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        progress = f"return {np.mean(metrics['charts/episodic_return']):.1f}"
        progress += f", {speed * len(self.seeds):,.0f} steps/s"
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (now - self.printed > 2 or step == self.bar.total):
            self.printed = now
            print(f"{step:,} of {self.bar.total:,} steps, {progress}", flush=True)


def plot_curve(run_dir: Path) -> None:
    """Draws the returns in metrics.csv over the steps, a line for each seed: learning_curve.png."""
    from matplotlib.figure import Figure

    curves = {}
    with (run_dir / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            point = (int(row["step"]), float(row["charts/episodic_return"]))
            curves.setdefault(f"seed {row['seed']}", []).append(point)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes")
    axes.set_title(run_dir.resolve().name, fontsize="small")
    axes.legend()
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


@contextmanager
def catch_signals():
    """Yields a list that the first Ctrl-C or SIGTERM is noted in; the second ends the program."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after this call (again: at once, unsaved)", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compile_training(init: Callable, train_iteration: Callable, key: Array) -> tuple[Any, Callable]:
    """-> the first state, and train(state, n), which runs n iterations in one compiled call."""
    train_iteration = jax.jit(train_iteration)  # so that it is traced once

    def train(state, num_iterations):
        metrics = jax.eval_shape(train_iteration, state)[1]
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        step = lambda _, carry: train_iteration(carry[0])
        return jax.lax.fori_loop(0, num_iterations, step, (state, metrics))

    with ThreadPoolExecutor(1) as pool:  # XLA leaves Python free: compile both at the same time
        compiled_init = pool.submit(lambda: jax.jit(init).lower(key).compile())
        state = jax.eval_shape(init, key)
        train = jax.jit(train, donate_argnums=0).lower(state, 1).compile()
        return compiled_init.result()(key), train


def write_evaluation(run_dir: Path, args: Any, returns: np.ndarray) -> dict:
    """evaluation.json from greedy returns [num_seeds, episodes]: each seed's, and over the seeds
    mean and interquartile mean with a 95 % bootstrap interval (arXiv:2108.13264).
    """
    numbers = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max, "episodes": np.size}
    seeds = [{name: float(f(x)) for name, f in numbers.items()} for x in returns]
    seeds = [{"seed": args.seed + k} | seed for k, seed in enumerate(seeds)]
    means = returns.mean(axis=1)
    result = {
        "env_id": args.eval_env_id or args.env_id,
        "seeds": seeds,
        "mean": float(means.mean()),
    }
    if len(means) > 1:
        from scipy import stats

        iqm = partial(stats.trim_mean, proportiontocut=0.25, axis=-1)
        interval = stats.bootstrap((means,), iqm, method="percentile", rng=0).confidence_interval
        result |= {"iqm": float(iqm(means)), "iqm_ci95": [float(x) for x in interval]}
    write_atomically(run_dir / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next launch; JAX_COMPILATION_CACHE_DIR moves them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "unroll"))


CALL_STEPS = 8_192  # shorter iterations share a call, and with it a row of metrics.csv


def run_training(args: Any, run_dir: Path, state: Any, train: Callable, caught: list) -> Any:
    """Calls train until the budget, the target or a signal ends it, and saves -> the last state."""
    iteration = int(np.max(state.iteration))
    iteration_steps = args.num_envs * args.num_steps
    logger = Logger(args, run_dir, iteration * iteration_steps)
    # Short iterations share a call. Calls end at fixed iterations, so resuming repeats them.
    strides = [max(1, CALL_STEPS // iteration_steps), args.checkpoint_every or args.num_iterations]
    reached = False
    while iteration < args.num_iterations and not reached and not caught:
        ends = [iteration - iteration % stride + stride for stride in strides]
        end = min(*ends, args.num_iterations)
        state, metrics = jax.block_until_ready(train(state, end - iteration))
        iteration, step = end, end * iteration_steps
        metrics = {name: np.atleast_1d(values) for name, values in metrics.items()}  # [num_seeds]
        logger.log(step, metrics)
        losses = [values for name, values in metrics.items() if name.startswith("losses/")]
        if not np.isfinite(losses).all():
            good = checkpoints(run_dir).latest_step() or "none, see --checkpoint-every"
            sys.exit(f"a loss is nan or inf at step {step}; last checkpoint in {run_dir}: {good}")
        if args.checkpoint_every and iteration % args.checkpoint_every == 0:
            save_checkpoint(run_dir, iteration, state)
        if args.target_return is not None and np.all(metrics["charts/episodes"] >= 100):
            reached = np.all(metrics["charts/episodic_return"] >= args.target_return)
    logger.bar.close()
    if reached:
        seconds = time.time() - logger.launched
        print(
            f"target return {args.target_return:g} reached: {step:,} steps, {seconds:.1f} s",
            flush=True,
        )
    save_checkpoint(run_dir, iteration, state)
    plot_curve(run_dir)
    if caught:
        print(f"stopped and saved; to go on: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(128 + caught[0])
    return state


def resume_state(run_dir: Path, state: Any, hosted: bool) -> Any:
    """The last checkpoint. What belongs to a simulator outside JAX is not in it: it starts anew."""
    saved = load_checkpoint(run_dir, state)
    if not hosted:
        return saved
    print("the simulator's state is not saved: new episodes start here")
    fields = {"env_state", "obs", "acting", "discounted"} & set(state._fields)
    running = {name: getattr(state.stats, name) for name in ("running_return", "running_length")}
    fresh = {name: getattr(state, name) for name in fields}
    return saved._replace(stats=saved.stats._replace(**running), **fresh)


def check_args(args: Args) -> None:
    """Ends the program with status 2 if a flag has a value that cannot work."""
    counts = "num_seeds num_envs num_steps num_minibatches update_epochs hidden_size"
    check_range(args, counts, 1)
    check_range(args, "learning_rate clip_coef ent_coef vf_coef max_grad_norm target_kl", 0)
    check_range(args, "reward_scale eval_episodes checkpoint_every", 0)
    check_range(args, "gamma gae_lambda", 0, 1)
    check_range(args, "seed", 0, 2**30)
    check_range(args, "sequence_length", 1)
    check_range(args, "burn_in", 0, args.sequence_length - 1)
    if args.num_steps % args.sequence_length:
        fail(
            f"--num-steps {args.num_steps} must be a multiple of --sequence-length "
            f"{args.sequence_length}"
        )
    if args.num_sequences % args.num_minibatches:
        divisors = [n for n in range(1, args.num_sequences + 1) if args.num_sequences % n == 0]
        near = sorted(divisors, key=lambda n: abs(n - args.num_minibatches))[:4]
        fail(
            f"{args.num_sequences} sequences do not divide into --num-minibatches "
            f"{args.num_minibatches}: take one of {sorted(near)}"
        )
    if args.num_iterations < 1:
        fail(f"--total-timesteps must be at least one batch, {args.batch_size}")


def check_env(env: Env, env_id: str) -> None:
    """Ends the program with status 2 if this script cannot act in the environment."""
    if env.action_low is None:
        fail(f"{env_id} has discrete actions: use ppo_lstm.py")


def main(args: Args) -> Path:
    """Trains, saves and evaluates -> the run's folder."""
    check_args(args)
    use_compilation_cache()

    def make(env_id, num_envs, seed):
        env = make_env(env_id, num_envs, seed, args.env_kwargs, args.mask_obs)
        check_env(env, env_id)
        return env

    env = make(args.env_id, args.num_envs, args.seed)
    if env.hosted and args.num_seeds > 1:
        fail(
            f"--num-seeds needs an environment in JAX, and {args.env_id} is not: start single runs"
        )
    if args.eval_env_id:
        other = make(args.eval_env_id, 1, 0)
        if (other.obs_shape, other.action_size) != (env.obs_shape, env.action_size):
            fail(f"{args.eval_env_id} has other observations or actions than {args.env_id}")
    for module in ["tensorboardX"] * args.tensorboard + ["wandb"] * args.track:
        require(module)
    run_dir = open_run(args)
    print(f"{args.env_id} -> {run_dir}", flush=True)

    init, train_iteration = make_train(args, env)
    key = jax.random.key(args.seed)
    if args.num_seeds > 1:
        key = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
        # Not all at once: JAX's batched QR, for the weights, can deadlock on few cores.
        init, train_iteration = partial(jax.lax.map, init), jax.vmap(train_iteration)
    state, train = compile_training(init, train_iteration, key)
    if args.resume:
        state = resume_state(run_dir, state, env.hosted)
    write_config(run_dir, args)
    with catch_signals() as caught:
        state = run_training(args, run_dir, state, train, caught)

    if args.eval_episodes:
        seed = args.seed + 2**30  # other episodes than those trained on
        env = make(args.eval_env_id or args.env_id, args.eval_episodes, seed)
        play = jax.jit(lambda state: evaluate(state, env, jax.random.key(seed))[0])
        states = [state]
        if args.num_seeds > 1:
            states = [jax.tree.map(lambda x, k=k: x[k], state) for k in range(args.num_seeds)]
        result = write_evaluation(run_dir, args, np.stack([play(one) for one in states]))
        print(f"greedy return over {args.eval_episodes} episodes: {result['mean']:.1f}")
    return run_dir


if __name__ == "__main__":
    main(parse_args())
