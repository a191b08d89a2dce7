"""Our scripts beside what else pip installs, with the same networks and updates.

    python benchmarks/peers.py ppo_speed memory_speed ...

No program evaluates. They take turns, each as a process of its own with the compilation cache that
it has by itself (the peers: none; ours: emptied). The peers live in virtual environments that this
program makes (benchmarks/.venv-*). Prints a Markdown table and writes benchmarks/results/<task>.csv.

Whole commands: seconds are those of the whole process, the steady state what comes after the first
quarter of the steps (of memorax the second half, as its second call compiles once more).
ppo_speed: LunarLander-v3, 64 environments x 128 steps, 4 epochs of 32 minibatches, 64 x 64 tanh
networks for actor and critic, 131,072 steps. The peers step Gymnasium's simulators one after the
other, their default and the fastest of theirs for such a cheap one; ppo.py runs in EnvPool, its
default, and in the same Gymnasium.
sac_speed_pendulum, sac_speed_halfcheetah: one environment, an update with 256 transitions for each
step after the first 1,000, networks of 256 x 256; 20,000 and 10,000 steps.
memory_speed: recurrent PPO on Pendulum-v1 in gymnax, 64 environments x 128 steps, 4 epochs of 8
minibatches of whole rollouts; actor and critic with an encoder of 64, a memory of 64 and a linear
head each; 196,608 steps, with GTrXL 65,536.
sequence_speed: drqn.py (one step, no double Q-learning, CartPole-v1), rpqn.py (CartPole-v1) and
rsac.py (Pendulum-v1) beside memorax's DQN, PQN and SAC with the same GRU, widths, batches and
gradient steps for each environment step; our layers have LayerNorm besides, but for rsac.py.

Steady state alone, on gymnax's CartPole-v1, after a call to compile and warm up.
cartpole_speed: PPO with 64 x 64 tanh networks, 128 steps, 4 epochs x 4 minibatches, about 500k
steps per timing. rejax runs as it is and with the XLA flag that ppo.py sets for itself; eight seeds
at once are timed against one; the peak is that of a large matrix product.
dqn_speed: 10 environments, a gradient step on 128 transitions for each 10 steps, a buffer of
10,000. Beside rejax: 64 x 64 networks (rejax has no others), double Q-learning. In PureJaxRL's
configuration: 120 x 84, no double Q-learning; PureJaxRL is in no package index, so it is not run.
The peak is that of a product of the larger layer's size, 128 x 120 x 84, which XLA runs on one core.
pqn_speed: 32 environments x 64 steps, 4 epochs x 16 minibatches, 64 x 64 networks with LayerNorm, as
rejax has them and with the XLA flag and the single thread that pqn.py sets for itself.
..._jax012: the same with rejax on jax 0.12, which our simulators do not permit yet.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

from record import ROOT, parse_tasks, run_script, show, without_xla_settings, write

ROUNDS = 3
REJAX = ["rejax==0.1.3", "gymnax==0.0.9"]
WIDE = {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}  # as our scripts set it for themselves
PEERS = {  # virtual environment: what is installed there, beside the JAX that we run if no other
    "rejax": [*REJAX, "gymnasium<1.4"],
    "rejax-jax012": [*REJAX, "gymnasium==1.4.0", "jax==0.12.0.1"],
    "sbx": ["sbx-rl==0.28.0", "stable-baselines3==2.9.2", "gymnasium[box2d,mujoco]<1.4"],
    "memorax": ["memorax==1.0.1", "gymnax==0.0.9"],  # it expects the steps of this gymnax
}


# --- Processes ------------------------------------------------------------------------------------


def packages_of(name: str) -> list[str]:
    own = any(package.startswith("jax==") for package in PEERS[name])
    return PEERS[name] if own else [*PEERS[name], f"jax=={version('jax')}"]


def python_of(name: str) -> Path:
    """The interpreter of benchmarks/.venv-<name>; makes it if it is missing or holds something else."""
    folder = ROOT / "benchmarks" / f".venv-{name}"
    python, stamp, packages = folder / "bin" / "python", folder / "installed", packages_of(name)
    if not stamp.exists() or stamp.read_text() != str(packages):
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        stamp.write_text(str(packages))
    return python


def versions_of(name: str) -> str:
    """What is installed there of the packages that matter."""
    words = dict.fromkeys(re.match(r"[\w-]+", x)[0] for x in [*packages_of(name), "flax"])
    program = (
        "import importlib.metadata as m, sys\n"
        "print(', '.join(f'{x} {m.version(x)}' for x in sys.argv[1:]))"
    )
    command = [python_of(name), "-c", program, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def child(peer: str, function: Callable, *words, settings: dict | None = None, **sizes) -> tuple:
    """Calls a function of this file in a process of its own, for us (peer "") or a peer
    -> seconds of the whole process, what the function returns."""
    python = python_of(peer) if peer else sys.executable
    command = [python, __file__, "child", function.__name__, json.dumps([words, sizes])]
    environment = without_xla_settings() | (settings or {})
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # its own, if it has one
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def ours(script: str, flags: str, steps: int, **environment) -> tuple[float, float]:
    """One of our scripts -> seconds of the whole process, steps/s in steady state."""
    flags = f"{flags} --eval-episodes 0 --total-timesteps {steps}"
    run = run_script(script, flags, cold=True, **environment)
    points = [(int(row["step"]), float(row["seconds"])) for row in run.metrics]
    (first, began), (last, ended) = next(x for x in points if x[0] >= steps // 4), points[-1]
    return run.seconds, (last - first) / (ended - began)


# --- Programs: each returns steps/s in steady state -----------------------------------------------


def learn_by_sb3(model, steps: int) -> float:
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        """Where each rollout begins: SAC's are single steps, so that both find a quarter."""

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.num_timesteps == steps // 4:
                self.quarter = time.perf_counter()

    clock = Clock()
    model.learn(steps, callback=clock)
    return 0.75 * steps / (time.perf_counter() - clock.quarter)


def ppo_by_sb3(library: str, steps: int) -> float:
    from stable_baselines3.common.env_util import make_vec_env

    if library == "sbx":
        from sbx import PPO

        policy = {}  # 64 x 64 is its default
    else:
        from stable_baselines3 import PPO

        policy = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    sizes = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "policy_kwargs": policy}
    rates = {"learning_rate": 3e-3, "gamma": 0.997, "gae_lambda": 0.95, "ent_coef": 0.01}
    env = make_vec_env("LunarLander-v3", n_envs=64, seed=1)
    return learn_by_sb3(PPO("MlpPolicy", env, **sizes, **rates, seed=1, device="cpu"), steps)


def replay_by_sbx(algorithm: str, env_id: str, steps: int) -> float:
    import sbx

    sizes = {"learning_starts": 1000, "batch_size": 256, "buffer_size": 100_000}
    sizes |= {"policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1, "gradient_steps": 1}
    return learn_by_sb3(getattr(sbx, algorithm)("MlpPolicy", env_id, **sizes, seed=1), steps)


def memorax_torso(memory: str):
    """What is nearest to a file of memories/, 64 wide."""
    import flax.linen as nn
    import jax.numpy as jnp
    from memorax import networks as n

    if memory in ("gru", "lstm"):
        return n.RNN(cell={"gru": nn.GRUCell, "lstm": nn.LSTMCell}[memory](64))
    if memory == "ffm":
        return n.Memoroid(n.FFMCell(64, memory_size=32, context_size=4))
    if memory == "s5":

        class Gates(nn.Module):  # behind each layer, as in ours
            @nn.compact
            def __call__(self, x, **kwargs):
                x = nn.gelu(x)
                return None, nn.Dense(64)(x) * nn.sigmoid(nn.Dense(64)(x))

        layer = n.Stack((n.Memoroid(n.S5Cell(64, state_size=32)), Gates()))
        return n.Stack((n.Residual(n.PreNorm(layer)),) * 2)
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32, "bias_init": nn.initializers.zeros}
    kinds |= {"kernel_init": nn.initializers.lecun_normal()}
    attention = n.SelfAttention(64, 4, 128, **kinds, positional_embedding=n.ALiBi(4))
    recurrent = n.SegmentRecurrence(attention, memory_length=64, features=64, dtype=jnp.float32)
    return n.Stack(
        (n.GatedResidual(n.PreNorm(recurrent)), n.GatedResidual(n.PreNorm(n.FFN(64)))) * 2
    )


def memorax_network(head, memory: str = "gru"):
    """An encoder 64 wide, a memory and a head."""
    from memorax.networks import MLP, FeatureExtractor, Network

    return Network(FeatureExtractor(MLP(64)), memorax_torso(memory), head)


def train_by_memorax(agent, steps: int) -> float:
    """Steps/s of the second half: its second call compiles once more."""
    import jax

    (key, state), times = agent.init(jax.random.key(1)), []
    for _ in range(4):
        key, state, _ = jax.block_until_ready(agent.train(key, state, num_steps=steps // 4))
        times.append(time.perf_counter())
    return 0.5 * steps / (times[-1] - times[1])


def ppo_by_memorax(memory: str, steps: int) -> float:
    import optax
    from memorax.algorithms import PPO, PPOConfig
    from memorax.environments import environment
    from memorax.networks import heads

    env, params = environment.make("gymnax::Pendulum-v1")
    sizes = {"num_envs": 64, "num_eval_envs": 1, "num_steps": 128, "num_minibatches": 8}
    sizes |= {"update_epochs": 4, "gamma": 0.95, "gae_lambda": 0.95, "normalize_advantage": True}
    sizes |= {"clip_coef": 0.2, "clip_vloss": False, "ent_coef": 0.0, "vf_coef": 0.5}
    head = heads.Gaussian(env.action_space(params).shape[0])
    networks = memorax_network(head, memory), memorax_network(heads.VNetwork(), memory)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(2e-3))
    config = PPOConfig(name="PPO", **sizes)
    return train_by_memorax(PPO(config, env, params, *networks, tx, tx), steps)


def q_head():
    """A layer of 64, then the values of two actions."""
    import flax.linen as nn
    from memorax.networks import heads

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            return heads.DiscreteQNetwork(2)(nn.relu(nn.Dense(64)(x)))

    return Head()


DRQN_AS_MEMORAX = "--mask-obs --no-double-q --n-step 1 --gamma 0.99 --max-grad-norm None "
DRQN_AS_MEMORAX += "--target-network-frequency 4000 --tau 1"


def drqn_by_memorax(steps: int) -> float:
    import optax
    from memorax.algorithms import DQN, DQNConfig
    from memorax.buffers import get_full_start_flags, make_episode_buffer
    from memorax.environments import environment

    env, params = environment.make("gymnax::CartPole-v1")
    sizes = {"num_envs": 16, "num_eval_envs": 1, "buffer_size": 50_000, "batch_size": 32}
    sizes |= {"learning_starts": 5_000, "train_frequency": 16, "target_network_frequency": 4_000}
    rates = {"gamma": 0.99, "tau": 1.0, "learning_rate": 1e-3}
    rates |= {"start_e": 1.0, "end_e": 0.05, "exploration_fraction": 0.25}
    lengths = (50_000, 5_000, 32, 32)  # of the buffer, before learning, of a batch, of a sequence
    buffer = make_episode_buffer(*lengths, get_full_start_flags, True, 16)
    epsilon = optax.linear_schedule(1.0, 0.05, steps // 4)
    config = DQNConfig(name="DRQN", **sizes, **rates)
    agent = DQN(config, env, params, memorax_network(q_head()), optax.adam(1e-3), buffer, epsilon)
    return train_by_memorax(agent, steps)


def rpqn_by_memorax(steps: int) -> float:
    import optax
    from memorax.algorithms import PQN, PQNConfig
    from memorax.environments import environment

    env, params = environment.make("gymnax::CartPole-v1")
    sizes = {"num_envs": 32, "num_eval_envs": 1, "num_steps": 64, "num_minibatches": 16}
    config = PQNConfig(name="RPQN", **sizes, update_epochs=4, gamma=0.99, td_lambda=0.9)
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.radam(5e-4))
    epsilon = optax.linear_schedule(1.0, 0.2, steps // 2)
    agent = PQN(config, env, params, memorax_network(q_head()), tx, epsilon)
    return train_by_memorax(agent, steps)


def rsac_by_memorax(steps: int) -> float:
    import flax.linen as nn
    import jax.numpy as jnp
    import optax
    from memorax.algorithms import SAC, SACConfig
    from memorax.buffers import get_full_start_flags, make_episode_buffer
    from memorax.environments import environment
    from memorax.networks import MLP, Identity, heads

    class Policy(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            return heads.SquashedGaussian(1)(MLP((128, 128))(x), **kwargs)

    class Value(nn.Module):  # memorax's own returns values without the axis that its SAC removes
        @nn.compact
        def __call__(self, x, action):
            x = MLP((128, 128))(jnp.concatenate([x, action], axis=-1))
            return nn.Dense(1)(x), {}

        @nn.nowrap
        def loss(self, output, aux, targets):
            return 0.5 * jnp.square(output[..., 0] - targets).mean()

    class Twins(nn.Module):
        history: nn.Module
        head1: nn.Module
        head2: nn.Module

        def __call__(self, observation, mask, action, reward, done, initial_carry=None):
            carry, x = self.history(observation, mask, action, reward, done, initial_carry)
            return carry, (self.head1(x, action), self.head2(x, action))

        @nn.nowrap
        def initialize_carry(self, input_shape):
            return self.history.initialize_carry(input_shape)

    env, params = environment.make("gymnax::Pendulum-v1")
    sizes = {"num_envs": 4, "num_eval_envs": 1, "buffer_size": 100_000, "batch_size": 32}
    sizes |= {"learning_starts": 2_000, "train_frequency": 8, "target_update_frequency": 1}
    rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "gamma": 0.95, "tau": 0.01}
    rates |= {"initial_alpha": 0.1, "target_entropy_scale": 2.0, "max_grad_norm": 1e9}
    lengths = (100_000, 2_000, 32, 32)  # of the buffer, before learning, of a batch, of a sequence
    buffer = make_episode_buffer(*lengths, get_full_start_flags, True, 4)
    twins = Twins(memorax_network(Identity()), Value(), Value())
    networks = (memorax_network(Policy()), twins, heads.Alpha(0.1))
    config = SACConfig(name="RSAC", **sizes, **rates)
    agent = SAC(config, env, params, *networks, *[optax.adam(1e-3)] * 3, buffer)
    return train_by_memorax(agent, steps)


def time_calls(train: Callable, state, calls: int, steps_per_call: int) -> float:
    """Steps/s of train(state, calls) -> state, after a shorter call to warm up."""
    import jax

    state = jax.block_until_ready(train(state, max(1, calls // 4)))
    start = time.perf_counter()
    jax.block_until_ready(train(state, calls))
    return calls * steps_per_call / (time.perf_counter() - start)


def our_script(name: str):
    sys.path.insert(0, str(ROOT))
    return import_module(name)


def our_training(script, args, num_seeds: int = 1) -> tuple:
    """-> train(state, calls) -> state, and the first state."""
    env = script.make_env(args.env_id, args.num_envs, args.seed, args.env_kwargs)
    args = dataclasses.replace(args, num_seeds=num_seeds)
    state, train = script.compile_training(args, *script.make_train(args, env))
    return lambda state, calls: train(state, calls)[0], state


def training_by_rejax(algorithm, updates: int) -> tuple:
    """The same for rejax; a call is so many of its iterations."""
    import jax

    def train(state, calls):
        body = lambda _, state: algorithm.train_iteration(state)
        return jax.lax.fori_loop(0, updates * calls, body, state)

    return jax.jit(train, donate_argnums=0), jax.jit(algorithm.init_state)(jax.random.key(0))


def our_ppo(num_seeds: int, num_envs: int) -> float:
    ppo = our_script("ppo")
    sizes = {"num_envs": num_envs, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4}
    sizes |= {"total_timesteps": 2 * max(500_000, num_envs * 128), "anneal_lr": False}
    rates = {"learning_rate": 5e-4, "gamma": 0.99, "reward_scale": 1.0}
    args = ppo.Args(env_id="gymnax::CartPole-v1", **sizes, **rates)
    calls = max(1, 500_000 // args.batch_size)
    return time_calls(*our_training(ppo, args, num_seeds), calls, args.batch_size)


def ppo_by_rejax(num_envs: int) -> float:
    from rejax import PPO

    batch = num_envs * 128
    calls = max(1, 500_000 // batch)
    sizes = {"num_envs": num_envs, "num_steps": 128, "num_minibatches": 4, "num_epochs": 4}
    sizes |= {"total_timesteps": calls * batch, "eval_freq": calls * batch}
    rates = {"learning_rate": 5e-4, "gamma": 0.99, "gae_lambda": 0.95, "clip_eps": 0.2}
    rates |= {"ent_coef": 0.01, "max_grad_norm": 0.5, "agent_kwargs": {"activation": "tanh"}}
    algorithm = PPO.create(env="CartPole-v1", **sizes, **rates, skip_initial_evaluation=True)
    return time_calls(*training_by_rejax(algorithm, 1), calls, batch)


def our_dqn(hidden_sizes: list[int], double_q: bool) -> float:
    dqn = our_script("dqn")
    sizes = {"hidden_sizes": tuple(hidden_sizes), "buffer_size": 10_000, "n_step": 1}
    args = dqn.Args(**sizes, double_q=double_q, anneal_lr=False)
    train, state = our_training(dqn, args)
    return time_calls(train, train(state, 20), 200, 1_000)  # 20 iterations: past learning_starts


def dqn_by_rejax() -> float:
    from rejax import DQN

    sizes = {"num_envs": 10, "num_epochs": 1, "batch_size": 128, "buffer_size": 10_000}
    sizes |= {"fill_buffer": 1_000, "target_update_freq": 500}
    sizes |= {"total_timesteps": 500_000, "eval_freq": 500_000}
    rates = {"learning_rate": 2.5e-4, "gamma": 0.99, "agent_kwargs": {"activation": "relu"}}
    algorithm = DQN.create(env="CartPole-v1", **sizes, **rates, skip_initial_evaluation=True)
    return time_calls(*training_by_rejax(algorithm, 100), 200, 1_000)


def our_pqn() -> float:
    pqn = our_script("pqn")
    sizes = {"num_envs": 32, "num_steps": 64, "num_minibatches": 16, "update_epochs": 4}
    sizes |= {"hidden_size": 64, "total_timesteps": 1_000_000, "anneal_lr": False}
    args = pqn.Args(env_id="gymnax::CartPole-v1", **sizes)
    pqn.use_one_thread(args)
    return time_calls(*our_training(pqn, args), 244, args.batch_size)


def pqn_by_rejax() -> float:
    from rejax import PQN

    sizes = {"num_envs": 32, "num_steps": 64, "num_minibatches": 16, "num_epochs": 4}
    sizes |= {"total_timesteps": 1_000_000, "eval_freq": 1_000_000, "max_grad_norm": 10.0}
    algorithm = PQN.create(env="CartPole-v1", **sizes, skip_initial_evaluation=True)
    return time_calls(*training_by_rejax(algorithm, 1), 244, 32 * 64)


def peak(rows: int, columns: int, width: int, number: int, **_) -> float:
    """GFLOP/s of float32 products [rows, columns] x [columns, width], so many in one program."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones((rows, columns)), jnp.full((columns, width), 1e-3)
    body = lambda _, x: x + 1e-9 * (x @ w).sum()
    product = jax.jit(lambda x: jax.lax.fori_loop(0, number, body, x))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - start)
    return 2 * rows * columns * width * number / best / 1e9


# --- Comparisons ----------------------------------------------------------------------------------


class Comparison(NamedTuple):
    peer: str  # its virtual environment
    programs: dict[str, Callable]  # called with a case -> seconds of the process, steps/s
    cases: list[dict]
    wide: bool = False  # rows have a column of steps/s for each program, not a row for each


PRODUCTS = 2 * ((4 * 64 + 64 * 64 + 64 * 2) + (4 * 64 + 64 * 64 + 64))  # FLOP, both networks
GFLOP_PER_STEP = PRODUCTS * (1 + 4 * 3) / 1e9  # forward in the rollout, all in each of 4 epochs

PPO = "--num-envs 64 --num-steps 128 --num-minibatches 32 --env-id"
RPPO = (
    "--env-id gymnax::Pendulum-v1 --mask-obs --num-envs 64 --num-steps 128 --sequence-length 128 "
    "--num-minibatches 8 --update-epochs 4"
)
LANDER_PROGRAMS = {
    "ppo.py, EnvPool": partial(ours, "ppo.py", f"{PPO} envpool::LunarLander-v3"),
    "ppo.py, Gymnasium": partial(ours, "ppo.py", f"{PPO} gymnasium::LunarLander-v3"),
    "SBX, Gymnasium": partial(child, "sbx", ppo_by_sb3, "sbx"),
    "Stable-Baselines3, Gymnasium": partial(child, "sbx", ppo_by_sb3, "sb3"),
}
MEMORIES = ("gru", "lstm", "s5", "ffm", "gtrxl")


def beside_memorax(script: str, flags: str, program: Callable, steps: int, *words: str) -> dict:
    """A pair of programs; both are called with no more than a case."""
    mine, name = partial(ours, script, flags, steps), " ".join([script, *words])
    theirs = partial(child, "memorax", program, *words, steps=steps)
    return {name: mine, f"{name} by memorax": theirs}


MEMORY_PROGRAMS = {
    name: program
    for memory in MEMORIES
    for name, program in beside_memorax(
        "rppo_continuous.py",
        f"{RPPO} --memory {memory}",
        ppo_by_memorax,
        65_536 if memory == "gtrxl" else 196_608,
        memory,
    ).items()
}
SEQUENCE_PROGRAMS = {
    **beside_memorax("drqn.py", DRQN_AS_MEMORAX, drqn_by_memorax, 50_000),
    **beside_memorax("rpqn.py", "--mask-obs --gamma 0.99", rpqn_by_memorax, 500_000),
    **beside_memorax("rsac.py", "--mask-obs --no-previous-action", rsac_by_memorax, 8_000),
}


def beside_sbx(name: str, ours_id: str, theirs_id: str, steps: int) -> Comparison:
    mine = partial(ours, f"{name}.py", f"--env-id {ours_id}")
    programs = {
        f"{name}.py": mine,
        "sbx": partial(child, "sbx", replay_by_sbx, name.upper(), theirs_id),
    }
    return Comparison("sbx", programs, [{"steps": steps}])


def cartpole_programs(peer: str) -> dict:
    return {
        "ppo": partial(child, "", our_ppo, 1),
        "rejax": partial(child, peer, ppo_by_rejax),
        "rejax_same_flag": partial(child, peer, ppo_by_rejax, settings=WIDE),
        "ppo_8_seeds": partial(child, "", our_ppo, 8),
        "peak_gflops": partial(child, "", peak, 4096, 4096, 4096, 1),
    }


def dqn_programs(peer: str) -> dict:
    return {
        "ours_64_64_double": partial(child, "", our_dqn, [64, 64], True),
        "rejax_64_64_double": partial(child, peer, dqn_by_rejax),
        "ours_120_84_double": partial(child, "", our_dqn, [120, 84], True),
        "ours_120_84": partial(child, "", our_dqn, [120, 84], False),
        "peak_gflops": partial(child, "", peak, 128, 120, 84, 20_000),
    }


PQN_PROGRAMS = {
    "pqn": partial(child, "", our_pqn),
    "rejax": partial(child, "rejax", pqn_by_rejax),
    "rejax_same_settings": partial(
        child, "rejax", pqn_by_rejax, settings=WIDE | {"PJRT_NPROC": "1"}
    ),
}
NUM_ENVS = [{"num_envs": 4}, {"num_envs": 64}, {"num_envs": 2048}]
PENDULUM = "gymnax::Pendulum-v1", "Pendulum-v1", 20_000
HALFCHEETAH = "envpool::HalfCheetah-v5", "HalfCheetah-v5", 10_000
OLD, NEW = "rejax", "rejax-jax012"
TASKS = {
    "ppo_speed": Comparison("sbx", LANDER_PROGRAMS, [{"steps": 131_072}]),
    "sac_speed_pendulum": beside_sbx("sac", *PENDULUM),
    "sac_speed_halfcheetah": beside_sbx("sac", *HALFCHEETAH),
    "td3_speed_halfcheetah": beside_sbx("td3", *HALFCHEETAH),
    "memory_speed": Comparison("memorax", MEMORY_PROGRAMS, [{}]),
    "sequence_speed": Comparison("memorax", SEQUENCE_PROGRAMS, [{}]),
    "cartpole_speed": Comparison(OLD, cartpole_programs(OLD), NUM_ENVS, wide=True),
    "cartpole_speed_jax012": Comparison(NEW, cartpole_programs(NEW), NUM_ENVS, wide=True),
    "dqn_speed": Comparison(OLD, dqn_programs(OLD), [{}], wide=True),
    "dqn_speed_jax012": Comparison(NEW, dqn_programs(NEW), [{}], wide=True),
    "pqn_speed": Comparison(OLD, PQN_PROGRAMS, [{}], wide=True),
}


def run(task: str) -> None:
    """Rounds in which all programs take a turn -> results/<task>.csv, round by round."""
    comparison, rows = TASKS[task], []
    versions = versions_of(comparison.peer)
    for case in comparison.cases:
        for number in range(ROUNDS):
            turns = []
            for program, timing in comparison.programs.items():
                seconds, speed = timing(**case)
                turn = {"round": number, "program": program, "seconds": round(seconds, 2)}
                turns.append(turn | {"steps_per_second": round(speed, 1)})
                show({"task": task} | case | turns[-1], heading=not rows and len(turns) == 1)
            rows += [case | turn for turn in turns]
            if comparison.wide:
                speeds = {turn["program"]: round(turn["steps_per_second"]) for turn in turns}
                turns = [case | {"round": number} | speeds]
            keys = [*case, "round"] if comparison.wide else ["round", "program"]
            write(task, turns, *keys, peers=versions)
        for program in comparison.programs:
            own = [row for row in rows if row["program"] == program and case.items() <= row.items()]
            seconds, speed = [
                median(x[key] for x in own) for key in ("seconds", "steps_per_second")
            ]
            print(f"{program}: medians {seconds:.1f} s, {speed:,.0f} steps/s {case or ''}")


def files(words: list[str]) -> set[str]:
    """The raw files that a command line writes."""
    return {f"{task}.csv" for task in parse_tasks(__doc__, TASKS, words).tasks}


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        words, sizes = json.loads(sys.argv[3])
        print(globals()[sys.argv[2]](*words, **sizes))
    else:
        for task in parse_tasks(__doc__, TASKS, sys.argv[1:]).tasks:
            run(task)
