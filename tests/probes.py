"""Probe environments, each of which isolates one part of an agent, and how to train each script on one.

Andy Jones, "Debugging RL, without the agonising pain": an agent that cannot learn the value of a
constant reward need not be tried on anything else.
"""

import importlib
import os
import subprocess
import sys
from typing import Any, NamedTuple

import copies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import ppo

ALL_SCRIPTS = [path.stem for path in copies.scripts(ROOT)]
# ppo_trxl_pmap.py has the agent of ppo_trxl.py: test_ppo_trxl_pmap.py holds it to that.
SCRIPTS = [name for name in ALL_SCRIPTS if name != "ppo_trxl_pmap"]
ON_POLICY = [name for name in SCRIPTS if hasattr(importlib.import_module(name), "rollout")]
OFF_POLICY = [name for name in SCRIPTS if name not in ON_POLICY]
CONTINUOUS = ["ppo_continuous", "rppo_continuous", "rsac", "sac", "td3"]
VALUE_BASED = ["dqn", "drqn", "pqn", "rpqn"]  # their agents are action values
SEQUENCES = ["drqn", "rsac", "rsacd"]  # are what they replay
MEMORY = [
    name
    for name in SCRIPTS
    if hasattr(getattr(importlib.import_module(name), "Agent", 0), "unroll")
]
# Their acting has an entry for each actor thread.
THREADED = [name for name in SCRIPTS if hasattr(importlib.import_module(name), "actor_threads")]
# ppo_gtrxl.py differs from ppo_trxl.py by its gates alone: where time counts, one of them will do.
DISTINCT = [name for name in SCRIPTS if name != "ppo_gtrxl"]
NUM_ENVS = 16


def quick(names, *chosen):
    """Parameters for all names, of which only the chosen ones run without --thorough."""
    marks = lambda name: () if name in chosen else (pytest.mark.thorough,)
    return [pytest.param(name, marks=marks(name)) for name in names]


def probe(observe, reward, terminated=None, truncated=None, continuous=False, num_envs=NUM_ENVS):
    """Environments with a step counter and a random bit as state; an observation is one number.

    observe(time, bit) -> [B]; reward(time, bit, action) -> [B]; terminated, truncated(time, bit)
    -> [B], of the time after the step. An action is 0 or 1, or a number in [-1, 1].
    """
    never = lambda time, bit: jnp.zeros(num_envs, bool)
    terminated, truncated = terminated or never, truncated or never

    def draw(key):
        return jnp.zeros(num_envs, jnp.int32), jax.random.bernoulli(key, shape=(num_envs,))

    def show(state):
        return (observe(*state) * jnp.ones(num_envs))[:, None]

    def reset(key):
        state = draw(key)
        return state, show(state)

    def step(key, state, action):
        time, bit = state
        action = action[:, 0] if continuous else action
        gain = (reward(time, bit, action) * jnp.ones(num_envs)).astype(jnp.float32)
        ends, cut = terminated(time + 1, bit), truncated(time + 1, bit)
        moved = (time + 1, bit)
        state = jax.tree.map(lambda new, old: jnp.where(ends | cut, new, old), draw(key), moved)
        return state, ppo.Timestep(show(state), show(moved), gain, ends, cut)

    if continuous:
        bounds = np.array([[-1.0], [1.0]], np.float32)
        return ppo.Env(reset, step, (1,), 1, *bounds)
    return ppo.Env(reset, step, (1,), 2)


class Learned(NamedTuple):
    """What a script has learned."""

    state: Any
    value: Any  # observations, reset (where episodes begin, by default at each) -> their values
    act: Any  # observations that begin an episode -> greedy actions


SMALL = {
    "ppo": {"num_steps": 16, "num_minibatches": 4, "learning_rate": 5e-3, "gamma": 0.8},
    "a2c": {"num_steps": 8, "learning_rate": 1e-2, "gamma": 0.8},
    "dqn": {
        "num_steps": 16,
        "learning_rate": 2e-3,
        "gamma": 0.8,
        "buffer_size": 2_000,
        "learning_starts": 64,
        "batch_size": 64,
        "train_frequency": 8,
        "target_network_frequency": 200,
    },
    "pqn": {"num_steps": 16, "num_minibatches": 4, "learning_rate": 5e-3, "gamma": 0.8},
    "impala": {"num_steps": 8, "num_minibatches": 2, "learning_rate": 5e-3, "gamma": 0.8},
    "sac": {
        "num_steps": 16,
        "policy_lr": 3e-3,
        "q_lr": 3e-3,
        "gamma": 0.8,
        "alpha": 0.01,
        "autotune": False,
        "learning_starts": 64,
        "buffer_size": 2_000,
        "batch_size": 64,
        "updates_per_step": 0.125,
        "tau": 0.05,
        "actor_hidden_size": 32,
        "critic_hidden_size": 32,
    },
}
SMALL["sacd"] = SMALL["sac"]
SMALL["rpqn"] = SMALL["pqn"] | {"embed_dim": 32, "hidden_size": 32}
SMALL["drqn"] = {
    "num_steps": 8,
    "learning_rate": 2e-3,
    "gamma": 0.8,
    "buffer_size": 8_000,
    "learning_starts": 128,
    "batch_size": 16,
    "train_frequency": 8,
    "target_network_frequency": 200,
    "embed_dim": 32,
    "hidden_size": 32,
}
SMALL["rsac"] = {
    "num_steps": 8,
    "policy_lr": 3e-3,
    "q_lr": 3e-3,
    "gamma": 0.8,
    "alpha": 0.01,
    "autotune": False,
    "learning_starts": 128,
    "batch_size": 16,
    "buffer_size": 8_000,
    "updates_per_step": 0.125,
    "tau": 0.05,
    "embed_dim": 32,
    "actor_hidden_size": 32,
    "critic_hidden_size": 32,
}
SMALL["rsacd"] = SMALL["rsac"]
SMALL["td3"] = {k: x for k, x in SMALL["sac"].items() if k not in ("alpha", "autotune")}
SMALL["td3"]["policy_noise"] = 0.05  # the probes' rewards are steep
SMALL["ppo_continuous"] = SMALL["ppo"] | {"update_epochs": 4}
SMALL["ppo_lstm"] = SMALL["ppo"] | {"hidden_size": 32}
SMALL["impala_lstm"] = SMALL["impala"] | {"embed_dim": 32}
SMALL["rppo"] = SMALL["ppo"] | {"embed_dim": 32}
SMALL["rppo_continuous"] = SMALL["ppo_continuous"] | {"embed_dim": 32, "sequence_length": 8}
SMALL["ppo_trxl"] = SMALL["ppo"] | {"memory_length": 6, "window_length": 8, "embed_dim": 32}
SMALL["ppo_gtrxl"] = SMALL["ppo_trxl_pmap"] = SMALL["ppo_trxl"]


def small_args(name, num_iterations=60, **changes):
    """Arguments for the probes, or for a short run of anything else."""
    script = importlib.import_module(name)
    fields = {"num_envs": NUM_ENVS, "reward_scale": 1.0} | SMALL[name] | changes
    steps = fields["num_envs"] * fields["num_steps"] * num_iterations
    return script.Args(**{"total_timesteps": steps} | fields)


def make_train(name, args, *envs):
    """A script's init and train_iteration; IMPALA's is what its threads do, one after the other."""
    if name not in THREADED:
        return importlib.import_module(name).make_train(args, *envs)
    init, actors, learner = importlib.import_module(name).make_train(args, *envs)

    def train_iteration(state):
        inputs = zip(actors, state.acting, state.keys, strict=True)
        rollouts = [actor(state.acting_agent, *own) for actor, *own in inputs]
        return learner(state, *zip(*rollouts, strict=True))

    return init, train_iteration


def train(name, args, env, num_iterations=None):
    """-> the state after num_iterations, by default all, and the metrics of the last."""
    init, train_iteration = make_train(name, args, env)
    state, train_iteration = jax.jit(init)(jax.random.key(args.seed)), jax.jit(train_iteration)
    for _ in range(num_iterations or args.num_iterations):
        state, metrics = train_iteration(state)
    return state, metrics


def log_prob(pi, action):
    """Of actions under [log-probs] or under [mean, std], as agents return them."""
    if len(pi) == 1:
        return (pi[0] * jax.nn.one_hot(action, pi[0].shape[-1])).sum(axis=-1)
    mean, std = pi
    return (-0.5 * ((action - mean) / std) ** 2 - jnp.log(std * (2 * jnp.pi) ** 0.5)).sum(axis=-1)


def most_probable(pi):
    return pi[0].argmax(axis=-1) if len(pi) == 1 else pi[0]


def recurrent_critic(name, learner):
    """rsac.py and rsacd.py -> functions of obs and reset, in one environment, that give values and actions."""
    actor, critic = learner.actor, learner.critic

    def unroll(obs, reset=None):
        reset = jnp.ones(len(obs), bool) if reset is None else reset
        module = importlib.import_module(name)
        action = jnp.zeros((len(obs), 1, 1 if name == "rsac" else 2))
        seen = module.Seen(obs[:, None], action, jnp.zeros((len(obs), 1)))
        outs = [
            part.history.unroll(part.history.memory.initial_memory(1), seen, reset[:, None])[1]
            for part in (actor, critic)
        ]
        if name == "rsacd":
            return critic(outs[1]).min(axis=0).max(axis=-1)[:, 0], actor(outs[0]).argmax(-1)[:, 0]
        act = jnp.tanh(actor(outs[0])[0])
        return critic(outs[1], act).min(axis=0)[:, 0], act[:, 0]

    return lambda *x: unroll(*x)[0], lambda obs: unroll(obs)[1]


def learn(name, env, num_iterations=60, **changes):
    """Trains the script on the probe -> Learned."""
    state, _ = train(name, small_args(name, num_iterations, **changes), env)
    if name in MEMORY:

        def unroll(obs, reset=None):  # one step after the other, in one environment
            reset = jnp.ones(len(obs), bool) if reset is None else reset
            memory = state.agent.initial_memory(1)
            _, *out = state.agent.unroll(memory, obs[:, None], reset[:, None])
            pi, value = policy_and_value(name, out)
            return most_probable(pi)[:, 0], value[:, 0]

        return Learned(state, lambda *x: unroll(*x)[1], lambda obs: unroll(obs)[0])
    if name in VALUE_BASED:
        return Learned(
            state,
            lambda obs, reset=None: state.agent(obs).max(axis=-1),
            lambda obs: state.agent(obs).argmax(-1),
        )
    if name in ("rsac", "rsacd"):
        return Learned(state, *recurrent_critic(name, state.learner))
    if name == "sacd":
        values = lambda obs, reset=None: state.learner.critic(obs).min(axis=0).max(axis=-1)
        return Learned(state, values, lambda obs: state.learner.actor(obs).argmax(axis=-1))
    if name in ("sac", "td3"):
        actor = state.learner.actor
        act = actor if name == "td3" else lambda obs: jnp.tanh(actor(obs)[0])
        value = lambda obs, reset=None: state.learner.critic(obs, act(obs)).min(axis=0)
        return Learned(state, value, act)
    value = lambda obs, reset=None: state.agent(obs)[-1]
    return Learned(state, value, lambda obs: most_probable(state.agent(obs)[:-1]))


def opened(agent, memory):
    """What acting carries, where it is not what learning starts from."""
    return agent.open(memory) if hasattr(agent, "open") else memory


def act_from(script, agent, env, acting, key, num_steps=64):
    """A rollout of a script with a memory -> where it ended, the memory opened, and the batch."""
    start = acting._replace(memory=opened(agent, acting.memory))
    greedy = [0.0] if script.__name__ in VALUE_BASED else []  # epsilon
    return script.rollout(agent, env, start, *greedy, key, num_steps)


def policy_and_value(name, out):
    """What an agent returns beside its memory -> what chooses the most probable action, the value."""
    return ([out[0]], out[0].max(axis=-1)) if name in VALUE_BASED else (out[:-1], out[-1])


def run_on_devices(count, *command, **options):
    """Runs Python on that many simulated devices, with the scripts and tests at hand."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    folder = os.path.dirname(__file__)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{folder}:{os.path.dirname(folder)}"},
        **options,
    )


def greedy_player(name, state, num_envs=NUM_ENVS):
    """-> act(obs, reset), the greedy actions of what the script has trained, for a plain loop."""
    if name in ("rsac", "rsacd"):
        return recurrent_player(name, state.learner.actor, num_envs)
    if name in MEMORY:
        memory = opened(state.agent, state.agent.initial_memory(num_envs))

    def act(obs, reset):
        nonlocal memory
        if name in MEMORY:
            memory, *out = state.agent.step(memory, obs, reset)
            action = most_probable(policy_and_value(name, out)[0])
        elif name in VALUE_BASED:
            return state.agent(obs).argmax(axis=-1)
        elif name == "sac":  # Pendulum's torque is in [-2, 2]
            return 2.0 * jnp.tanh(state.learner.actor(obs)[0])
        elif name == "sacd":
            return state.learner.actor(obs).argmax(axis=-1)
        elif name == "td3":
            return 2.0 * state.learner.actor(obs)
        else:
            action = most_probable(state.agent(obs)[:-1])
        return jnp.clip(action, -2.0, 2.0) if name in CONTINUOUS else action

    return act


def recurrent_player(name, actor, num_envs):
    """The same, for an actor that sees its last action."""
    memory, last = actor.history.memory, jnp.zeros((num_envs, 1 if name == "rsac" else 2))
    acting, seen = memory.open(memory.initial_memory(num_envs)), importlib.import_module(name).Seen

    def act(obs, reset):
        nonlocal acting, last
        last = jnp.where(reset[:, None], 0.0, last)
        acting, x = actor.history.step(acting, seen(obs, last, jnp.zeros(num_envs)), reset)
        if name == "rsac":  # Pendulum's torque is in [-2, 2]
            last = jnp.tanh(actor(x)[0])
            return 2.0 * last
        last = jax.nn.one_hot(actor(x).argmax(axis=-1), 2)
        return last.argmax(axis=-1)

    return act


def real_env(name, num_envs=NUM_ENVS, limit=20):
    """CartPole or Pendulum in gymnax with a short time limit."""
    script = importlib.import_module(name)
    task = "Pendulum-v1" if name in CONTINUOUS else "CartPole-v1"
    kwargs = f'{{"max_steps_in_episode": {limit}}}'
    return script.make_env(f"gymnax::{task}", num_envs, env_kwargs=kwargs)
