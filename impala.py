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
"""IMPALA: actor threads, a learner and V-trace, for discrete actions, in one file.

Espeholt et al. 2018, arXiv:1802.01561 (V-trace: section 4.1, losses: section 4.2), laid out as in
Cleanba, Huang et al. 2023, arXiv:2310.00036 (queues of length one).

    python impala.py                                           # LunarLander-v3
    python impala.py --target-return 200                       # stop as soon as it is solved
    python impala.py --num-actor-threads 2                     # two threads share the environments
    python impala.py --num-envs 12 --actor-device-ids 0 --learner-device-ids 1 2 3     # four GPUs

Expected, on two CPU cores: greedy return 258 +- 16 after 3M steps (mean and std of 10 seeds, 100
episodes each in Gymnasium's LunarLander-v3); --target-return 200 ends 54 s after the launch
(median).

While the learner updates on one batch, the actors play the next with the agent from before that
update: one update behind, always, so that a seed determines the run for any number of threads.

Differs from ppo.py in: acting and learning overlap; the loss is a policy gradient in which V-trace
makes up for the actors' older policy; one pass over the batch.

Differs from the paper: the lag is fixed, Adam takes the place of RMSProp, advantages are
normalised, losses are means, rewards are scaled, and a time limit is not taken for the end of the
task (arXiv:1712.00378).
"""

import os
import time

LAUNCHED = time.time()  # before the slow imports, so that `seconds` in metrics.csv counts them
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # if the CPU has AVX-512
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/unroll"))

import dataclasses
import json
import math
import queue
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata, util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx
from jax import Array
from jax.experimental import buffer_callback, io_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CALL_STEPS = 8_192  # shorter iterations share a call, and with it a row of metrics.csv
IN_HASTE = {"xla_backend_optimization_level": 0}  # compiler options for what runs only once


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "envpool::LunarLander-v3"  # suite::name (gymnax, gymnasium, envpool, envs/)
    env_kwargs: str = "{}"  # JSON object of arguments for the environment
    mask_obs: tuple[int, ...] = ()  # observation entries to hide from the agent
    seed: int = 1  # seed of the first agent
    num_seeds: int = 1  # agents trained at once by vmap: seed, seed + 1, ... (JAX suites only)
    total_timesteps: int = 3_000_000  # environment steps of each agent
    num_envs: int = 8  # parallel environments, of all actors together
    num_steps: int = 64  # steps in each environment between two updates
    learning_rate: float = 2e-3  # Adam's step size at the start
    anneal_lr: bool = True  # let the step size fall linearly to 0 over the run
    gamma: float = 0.997  # discount factor
    num_actor_threads: int = 1  # threads on each actor device
    actor_device_ids: tuple[int, ...] = (0,)  # devices that act
    learner_device_ids: tuple[int, ...] = (0,)  # devices that learn, each on its share of a batch
    num_minibatches: int = 1  # gradient steps for each batch, each on other environments
    norm_adv: bool = True  # normalise the advantages of each minibatch
    rho_bar: float = 1.0  # bound of V-trace's weights rho
    c_bar: float = 1.0  # bound of V-trace's traces c, at most rho_bar
    vtrace_lambda: float = 1.0  # factor on the traces c, which c_bar alone shortens already
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest global norm of a gradient
    reward_scale: float = 0.1  # factor on the rewards the agent learns from, not on those reported
    hidden_size: int = 64  # width of the two hidden layers of actor and critic
    target_return: float | None = None  # stop when the last 100 training episodes average this
    eval_episodes: int = 100  # greedy episodes at the end, 0 for none
    eval_env_id: str | None = None  # where to play them, if not in env_id
    checkpoint_every: int = 0  # iterations between checkpoints, 0 for one at the end
    resume: Path | None = None  # run folder to go on with; its config.json fills in other flags
    run_dir: Path | None = None  # folder of the run, runs/<script>__<env>__<seed>__<time> if None
    track: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to TensorBoard too

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_actors(self) -> int:
        return self.num_actor_threads * len(self.actor_device_ids)

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
    counts = "num_seeds num_envs num_steps num_minibatches num_actor_threads hidden_size"
    check_ranges(args, at_least_1=counts, at_most_1="gamma vtrace_lambda")
    if args.c_bar > args.rho_bar:
        fail(f"--c-bar {args.c_bar} must be at most --rho-bar {args.rho_bar}")
    num_devices = jax.local_device_count()
    for name in ("actor_device_ids", "learner_device_ids"):
        ids = getattr(args, name)
        if not ids or not set(ids) <= set(range(num_devices)) or len(set(ids)) < len(ids):
            flag = name.replace("_", "-")
            fail(f"--{flag} takes different ids of the {num_devices} devices, from 0, not {ids}")
    parts = math.lcm(args.num_minibatches, args.num_actors) * len(args.learner_device_ids)
    if args.num_envs % parts:
        what = "the minibatches, actor threads and learner devices"
        fail(f"--num-envs must be a multiple of {parts}, to divide among {what}")
    if args.num_iterations < 1:
        fail(f"--total-timesteps must be at least one batch, {args.batch_size}")


def check_env(env_id: str, env: "Env") -> None:
    """Ends the program with status 2 if this script cannot act in the environment."""
    if env.action_low is not None:
        fail(f"{env_id} has continuous actions: use ppo_continuous.py")


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


class Agent(nnx.Module):
    """Separate actor and critic; on images they share the encoder."""

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, hidden_size: int, rngs):
        self.encoder = CNN(obs_shape, rngs) if len(obs_shape) == 3 else None
        in_size = self.encoder.out_size if self.encoder else obs_shape[0]
        self.actor = MLP(in_size, hidden_size, action_size, 0.01, rngs)  # starts near uniform
        self.critic = MLP(in_size, hidden_size, 1, 1.0, rngs)

    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """Observations [..., *obs_shape] -> log-probs of the actions [..., A], value [...]."""
        x = self.encoder(obs) if self.encoder else obs
        return nnx.log_softmax(self.actor(x)), self.critic(x)[..., 0]


# --- Rollout --------------------------------------------------------------------------------------


class Acting(NamedTuple):
    """What goes on from one rollout to the next."""

    env_state: Any
    obs: Array  # [B, *obs_shape], what to act on next


class Transition(NamedTuple):
    """One step of all environments; rollout stacks them to [T, B, ...]."""

    obs: Array  # [B, *obs_shape]
    action: Array  # [B]
    logprob: Array  # [B], log mu(action | obs) of the agent that acted
    reward: Array  # [B]
    done: Array  # [B], the action ended the episode
    cut: Array  # [B], and a time limit was the reason
    next_obs: Array  # [B, *obs_shape], where the action led


def rollout(agent: Agent, env: "Env", acting: Acting, key: Array, num_steps: int):
    """Acts for num_steps steps -> Acting, Transition [T, B, ...]."""
    action_keys, env_keys = jax.random.split(key, (2, num_steps))

    def act_and_step(acting, keys):
        (env_state, obs), (action_key, env_key) = acting, keys
        logprobs, _ = agent(obs)
        action = jax.random.categorical(action_key, logprobs)
        logprob = jnp.take_along_axis(logprobs, action[:, None], axis=-1)[:, 0]
        env_state, timestep = env.step(env_key, env_state, action)
        done = timestep.terminated | timestep.truncated
        cut = timestep.truncated & ~timestep.terminated
        transition = Transition(obs, action, logprob, timestep.reward, done, cut, timestep.next_obs)
        return Acting(env_state, timestep.obs), transition

    return jax.lax.scan(act_and_step, acting, (action_keys, env_keys))


# --- Advantages -----------------------------------------------------------------------------------


def compute_vtrace(
    rewards: Array,
    values: Array,
    dones: Array,
    last_value: Array,
    ratios: Array,
    gamma: float,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    vtrace_lambda: float = 1.0,
) -> tuple[Array, Array]:
    """V-trace, arXiv:1802.01561, sec. 4.1 -> targets v_t of the values, advantages before their weight.

        rho_t = min(rho_bar, ratio_t),  c_t = lambda min(c_bar, ratio_t)
        delta_t = rho_t (r_t + gamma V(x_t+1) - V(x_t))
        v_t = V(x_t) + delta_t + gamma c_t (v_t+1 - V(x_t+1))                          (remark 1)
        advantage_t = r_t + gamma (V(x_t+1) + lambda (v_t+1 - V(x_t+1))) - V(x_t)

    The paper's lambda is 1, and rho_t the weight of the advantage in its gradient (sec. 4.2).

    rewards, values, dones (bool), ratios pi(a|x) / mu(a|x) and both results: [T, B]; last_value: [B],
    V of the observation after the last step. Nothing passes an end: where done, V(x_t+1) and v_t+1 are
    0. Where a time limit cut the episode, first add gamma * V(next_obs) to the reward.
    """
    discounts = gamma * ~dones  # [T, B]
    rhos, cs = jnp.minimum(rho_bar, ratios), vtrace_lambda * jnp.minimum(c_bar, ratios)
    next_values = jnp.concatenate([values[1:], last_value[None]])  # [T, B]
    errors = rewards + discounts * next_values - values  # [T, B], TD errors

    def backward(change, step):
        delta, discount, c = step
        change = delta + discount * c * change  # v_t - V(x_t)
        return change, change

    start = jnp.zeros_like(last_value)
    _, changes = jax.lax.scan(backward, start, (rhos * errors, discounts, cs), reverse=True)
    next_changes = jnp.concatenate([changes[1:], start[None]])
    return values + changes, errors + vtrace_lambda * discounts * next_changes


def compute_targets(agent: Agent, batch: Transition, last_obs: Array, args: Args):
    """What has no gradient -> targets of the values, weighted advantages [T, M], metrics.

    last_obs: [M, *obs_shape], after the last step.
    """
    logprobs, value = agent(batch.obs)
    logprob = jnp.take_along_axis(logprobs, batch.action[..., None], axis=-1)[..., 0]
    logratio = logprob - batch.logprob
    ratios = jnp.exp(logratio)
    # The task goes on beyond a time limit, so bootstrap there (arXiv:1712.00378, sec. 3).
    value_beyond = lambda: jnp.where(batch.cut, agent(batch.next_obs)[1], 0.0)
    final_value = jax.lax.cond(batch.cut.any(), value_beyond, lambda: jnp.zeros_like(value))
    rewards = args.reward_scale * batch.reward + args.gamma * final_value
    played, bounds = (rewards, value, batch.done, agent(last_obs)[1]), (args.rho_bar, args.c_bar)
    targets, advantages = compute_vtrace(*played, ratios, args.gamma, *bounds, args.vtrace_lambda)
    if args.norm_adv:  # first: centred with their weights, they would favour what mu did rarely
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    metrics = {
        "losses/approx_kl": (ratios - 1 - logratio).mean(),  # of the lag of one update
        "losses/explained_variance": 1.0 - jnp.var(targets - value) / (jnp.var(targets) + 1e-8),
    }
    return targets, jnp.minimum(args.rho_bar, ratios) * advantages, metrics


# --- Loss -----------------------------------------------------------------------------------------


def impala_loss(agent: Agent, batch: Transition, targets: Array, advantages: Array, args: Args):
    """Policy gradient, value and entropy loss (sec. 4.2) of [T, M, ...] -> loss, metrics."""
    logprobs, value = agent(batch.obs)
    logprob = jnp.take_along_axis(logprobs, batch.action[..., None], axis=-1)[..., 0]
    assert logprob.shape == advantages.shape == value.shape == targets.shape == batch.reward.shape
    pg_loss = -(logprob * advantages).mean()
    v_loss = 0.5 * ((value - targets) ** 2).mean()
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1).mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    return loss, {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
    }


# --- Training -------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """All that one iteration hands to the next: saving it is an exact checkpoint."""

    agent: Agent
    acting_agent: Agent  # the one from before the last update, which plays the next rollouts
    opt_state: optax.OptState
    acting: tuple[Acting, ...]  # an entry for each actor thread
    episode_stats: "EpisodeStats"
    keys: tuple[Array, ...]  # likewise
    iteration: Array  # iterations done


def make_train(args: Args, *envs: "Env") -> tuple[Callable, list[Callable], Callable]:
    """-> init(key) -> state; for each of envs, actor(agent, acting, key) -> acting, key, batch; and
    learner(state, acting, keys, batches), with what the actors gave as tuples, -> state, metrics.
    """
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    # eps 1e-5 as in ppo.py; the off-policy scripts keep Adam's own 1e-8.
    tx = optax.chain(clip, optax.scale_by_adam(eps=1e-5))  # without a step size: `update`

    def init(key: Array) -> TrainState:
        agent_key, env_key, actor_key = jax.random.split(key, 3)
        env, env_keys = envs[0], jax.random.split(env_key, len(envs))
        agent = Agent(env.obs_shape, env.action_size, args.hidden_size, nnx.Rngs(agent_key))
        acting = tuple(Acting(*env.reset(env_keys[k])) for k, env in enumerate(envs))
        acting_agent = jax.tree.map(jnp.copy, agent)
        episode_stats = EpisodeStats(jnp.zeros((args.num_envs, 2)))
        keys = jax.random.split(actor_key, len(envs))
        return TrainState(
            agent, acting_agent, tx.init(agent), acting, episode_stats, tuple(keys), jnp.int32(0)
        )

    def actor(env, agent, acting, key):
        rollout_key, key = jax.random.split(key)
        acting, batch = rollout(agent, env, acting, rollout_key, args.num_steps)
        return acting, key, batch

    def learner(state: TrainState, acting: tuple, keys: tuple, batches: tuple):
        agent, _, opt_state, _, episode_stats, _, iteration = state
        batch = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *batches)  # [T, B, ...]
        assert batch.reward.shape == (args.num_steps, args.num_envs)
        episode_stats, episode_metrics = record_episodes(episode_stats, batch.reward, batch.done)
        progress = args.anneal_lr * iteration / args.num_iterations
        learning_rate = args.learning_rate * (1.0 - progress)
        last_obs = jnp.concatenate([one.obs for one in acting])
        agent, opt_state, metrics = update(
            agent, opt_state, tx, learning_rate, batch, last_obs, args
        )
        metrics |= {"charts/learning_rate": learning_rate} | episode_metrics
        rest = (acting, episode_stats, keys, iteration + 1)
        return TrainState(agent, state.agent, opt_state, *rest), metrics

    return init, [partial(actor, env) for env in envs], learner


def update(agent, opt_state, tx, learning_rate, batch: Transition, last_obs: Array, args: Args):
    """A gradient step on each minibatch of environments -> agent, opt_state, metrics."""

    def split(x, axis):  # environments n, n + N, n + 2 N, ... are minibatch n of N
        shape = x.shape[:axis] + (-1, args.num_minibatches) + x.shape[axis + 1 :]
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    def minibatch_step(carry, minibatch):
        agent, opt_state = carry
        batch, last_obs = minibatch
        targets, advantages, off_policy = compute_targets(agent, batch, last_obs, args)
        grads, metrics = jax.grad(impala_loss, has_aux=True)(
            agent, batch, targets, advantages, args
        )
        updates, opt_state = tx.update(grads, opt_state)
        agent = optax.apply_updates(agent, jax.tree.map(lambda u: -learning_rate * u, updates))
        return (agent, opt_state), metrics | off_policy

    # [N, T, M, ...] and [N, M, ...]
    minibatches = (jax.tree.map(lambda x: split(x, 1), batch), split(last_obs, 0))
    (agent, opt_state), metrics = jax.lax.scan(minibatch_step, (agent, opt_state), minibatches)
    return agent, opt_state, jax.tree.map(jnp.mean, metrics)


# --- Threads --------------------------------------------------------------------------------------


def actor_loop(actor: Callable, jobs: queue.Queue, rollouts: queue.Queue) -> None:
    """An actor's thread: plays a rollout for each job, until the job None. An error is handed on."""
    try:
        while (job := jobs.get()) is not None:
            rollouts.put(jax.block_until_ready(actor(*job)))
    except BaseException as error:
        rollouts.put(error)


@contextmanager
def actor_threads(args: Args, actors: list[Callable], learner: Callable, state: TrainState):
    """Yields train(state, n), which runs n iterations with the actors in threads of their own. They
    begin to play from the given state, and there is always a rollout under way, one too many at the end.

    An iteration: the learner takes the rollouts, sends the actors on with its agent, and only then
    updates that agent. So timing changes nothing. An error in an actor is raised in train.
    """
    devices = jax.local_devices()
    actor_devices = [
        devices[i] for i in args.actor_device_ids for _ in range(args.num_actor_threads)
    ]
    mesh = Mesh(np.array([devices[i] for i in args.learner_device_ids]), "learner")
    axes = [None] * (1 + (args.num_seeds > 1)) + ["learner"]  # of [T, B], or [seeds, T, B]
    sharded, replicated = [NamedSharding(mesh, PartitionSpec(*x)) for x in (axes, ())]
    actors, learner = [jax.jit(actor) for actor in actors], jax.jit(learner)
    jobs, rollouts = [[queue.Queue(maxsize=1) for _ in actors] for _ in range(2)]
    threads = [
        threading.Thread(target=actor_loop, args=loop, name="actor", daemon=True)
        for loop in zip(actors, jobs, rollouts, strict=True)
    ]

    def send(agent, acting, keys):
        for device, job, *own in zip(actor_devices, jobs, acting, keys, strict=True):
            job.put(jax.device_put((agent, *own), device))

    def receive(rollout):
        result = rollout.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def train(state, num_iterations):
        state = jax.device_put(state, replicated)
        history = []
        for _ in range(num_iterations):
            acting, keys, batches = zip(*map(receive, rollouts), strict=True)
            send(state.agent, acting, keys)
            rest = jax.device_put((acting, keys), replicated)
            state, metrics = learner(state, *rest, jax.device_put(batches, sharded))
            history.append({name: x for name, x in metrics.items() if "losses/" in name})
        return state, metrics | jax.tree.map(lambda *x: np.mean(x, axis=0), *history)

    for thread in threads:
        thread.start()
    try:
        send(state.acting_agent, state.acting, state.keys)
        yield train
    finally:
        for job, thread in zip(jobs, threads, strict=True):
            job.put(None)
            thread.join()


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(state: TrainState, env: "Env", key: Array, max_steps: int = 108_000):
    """Plays the most probable actions for one episode in each environment -> returns, lengths [B].

    Only first episodes count: those that end first are short. After max_steps, one counts as it is.
    """

    def playing(carry):
        *_, lengths, alive = carry
        return alive.any() & (lengths.max() < max_steps)

    def act_and_step(carry):
        (env_state, obs), key, returns, lengths, alive = carry
        env_key, key = jax.random.split(key)
        action = state.agent(obs)[0].argmax(axis=-1)
        env_state, timestep = env.step(env_key, env_state, action)
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
    # One for each actor; seeds this far apart share no environments with runs of nearby seeds.
    seeds = [args.seed + 2**16 * k for k in range(args.num_actors)]
    size, rest = args.num_envs // args.num_actors, (args.env_kwargs, args.mask_obs)
    envs = [make_env(args.env_id, size, seed, *rest) for seed in seeds]
    make_eval_env(args, envs[0])  # what cannot work is refused now
    run_dir = open_run(args)
    init, actors, learner = make_train(args, *envs)
    key = jax.random.key(args.seed)
    if args.num_seeds > 1:
        key = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
        # Not all at once: JAX's batched QR, for the weights, can deadlock on few cores.
        init = partial(jax.lax.map, init)
        actors, learner = [jax.vmap(actor) for actor in actors], jax.vmap(learner)
    state = jax.jit(init, compiler_options=IN_HASTE)(key)
    if args.resume:
        state = load_checkpoint(run_dir, state, envs[0].hosted)
    with noted_signals(run_dir) as caught:
        with actor_threads(args, actors, learner, state) as train:
            state = run_training(args, run_dir, state, train, caught)
        save_checkpoint(run_dir, state)
        if (run_dir / "metrics.csv").stat().st_size:
            plot_curve(run_dir)
    state = jax.device_put(state, jax.local_devices()[args.learner_device_ids[0]])  # of its copies
    if args.eval_episodes:
        write_evaluation(args, run_dir, state, make_eval_env(args, envs[0]))
    return run_dir


if __name__ == "__main__":
    main(parse_args())
