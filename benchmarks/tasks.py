"""The tasks of the benchmarks and of the README: a new script or task is a new row here.

run.py measures them, tables.py and figures.py show what it wrote to results/.
"""

import re
import shlex
from typing import NamedTuple

ONE, THREE, SIX, TEN = range(1, 2), range(1, 4), range(1, 7), range(1, 11)
MINATAR = ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
FAULT_STEPS = 1_000_000  # of each run of pqn_fault
MINATAR_STEPS = "--total-timesteps 10000000"


class Task(NamedTuple):
    script: str
    label: str  # what the README calls it
    flags: str = ""
    seeds: tuple[int, ...] | range = range(1, 6)  # whose scores are reported; (): it is only timed
    bar: float | None = None  # score that counts as solved
    target: float | None = None  # return that ends a timed launch; None: launches are not timed
    judge: str = ""  # where the greedy episodes are played, if not where it was trained

    @property
    def scored_flags(self) -> str:
        return f"{self.flags} --eval-env-id {self.judge}".strip() if self.judge else self.flags

    @property
    def command(self) -> str:
        return f"python {self.script} {self.scored_flags}".strip()


SCRIPTS = {  # name: what it is
    "ppo": "proximal policy optimisation, discrete actions; the root of the collection",
    "ppo_continuous": "the same for continuous actions, with running normalisation by flag",
    "ppo_lstm": "PPO with a long short-term memory",
    "rppo": "the same with any memory of memories/, or of your own, by flag",
    "rppo_continuous": "the same for continuous actions, with sequences and burn-in",
    "ppo_trxl": "PPO with a Transformer-XL memory: relative positions, cached keys and values",
    "ppo_gtrxl": "the same with GRU gates",
    "ppo_trxl_pmap": "ppo_trxl.py on many devices and many machines",
    "a2c": "advantage actor-critic",
    "impala": "actor threads, a learner and V-trace; actors and learners on different devices by flag",
    "impala_lstm": "the same with a long short-term memory, or any of memories/ by flag",
    "dqn": "(double) deep Q-network; the replay buffer is part of the compiled loop",
    "pqn": "Q(lambda) with normalised layers: no replay buffer, no target network",
    "rpqn": "the same with any memory",
    "drqn": "dqn.py with any memory: sequences are replayed; R2D2's parts by flag",
    "sac": "soft actor-critic with automatic temperature; SimBa's networks by flag",
    "sacd": "the same for discrete actions, with exact expectations",
    "rsac": "sac.py with any memory, one each for actor and critics",
    "rsacd": "the same for discrete actions",
    "td3": "twin delayed deep deterministic policy gradient",
}

LANDER, JUDGE = "LunarLander-v3", "gymnasium::LunarLander-v3"  # trained in EnvPool's
LANDER_CONTINUOUS = "LunarLanderContinuous-v3"  # the same with continuous actions
HALFCHEETAH = (
    "--env-id envpool::HalfCheetah-v5 --num-envs 64 --num-steps 64 --num-minibatches 32 "
    "--update-epochs 10 --learning-rate 3e-4 --gamma 0.99 --reward-scale 1 --norm-obs --norm-reward "
    "--log-std-init -1 "
    "--total-timesteps 1000000"
)
SHORT_ROLLOUTS = (
    "--num-envs 64 --num-steps 32 --num-minibatches 32 "
    "--update-epochs 10 --learning-rate 3e-4 --reward-scale 1 --norm-obs --norm-reward "
    "--log-std-init -1 --no-norm-adv --total-timesteps 1000000"
)
WALKER2D = f"--env-id envpool::Walker2d-v5 --gamma 0.99 {SHORT_ROLLOUTS}"
ANT = (  # as in v3, whose published scores are compared: its contact forces are zeros
    "--env-id envpool::Ant-v5 --env-kwargs '{\"use_contact_force\": false}' --gamma 0.99 "
    + SHORT_ROLLOUTS
)
HOPPER = f"--env-id envpool::Hopper-v5 --gamma 0.995 {SHORT_ROLLOUTS}"
LANDER_BY_DQN = (
    "--env-id envpool::LunarLander-v3 --num-envs 8 --total-timesteps 400000 --reward-scale 0.1 "
    "--learning-rate 5e-4 --buffer-size 100000 --learning-starts 5000 --train-frequency 2 "
    "--target-network-frequency 1000 --exploration-fraction 0.3 --hidden-sizes 128 128 "
    "--gamma 0.99 --n-step 1"
)
BREAKOUT_BY_DQN = (
    "--env-id gymnax::Breakout-MinAtar --total-timesteps 5000000 --num-envs 64 --learning-rate 5e-4 "
    "--buffer-size 100000 --train-frequency 32 --target-network-frequency 4000 --end-e 0.01 "
    "--exploration-fraction 0.1 --hidden-sizes 128 128 --n-step 3 "
    "--gamma 0.99 --reward-scale 1"
)
SMALL_PQN = (
    "--total-timesteps 500000 --num-envs 32 --num-minibatches 16 --update-epochs 4 "
    "--learning-rate 2.5e-4 --q-lambda 0.95 --end-e 0.05 --exploration-fraction 0.5"
)
CARTPOLE_BY_PQN = f"--env-id gymnax::CartPole-v1 {SMALL_PQN} --num-steps 64 --reward-scale 0.1"
LANDER_BY_PQN = (
    "--env-id envpool::LunarLander-v3 --total-timesteps 1000000 --reward-scale 0.1 --q-lambda 0.95 "
    "--num-minibatches 16 --update-epochs 4 --end-e 0.02 --exploration-fraction 0.2"
)
LANDER_BY_SACD = (
    "--env-id envpool::LunarLander-v3 --total-timesteps 300000 --num-envs 8 --num-steps 125 "
    "--learning-starts 5000 --buffer-size 300000 --tau 0.01 --gamma 0.997 --no-critic-entropy"
)
LANDER_BY_TD3 = (
    "--env-id envpool::LunarLanderContinuous-v3 --total-timesteps 300000 --num-envs 8 --num-steps 125 "
    "--learning-starts 10000 --buffer-size 300000 --updates-per-step 0.5 --policy-lr 3e-4 --q-lr 3e-4 "
    "--gamma 0.997 --tau 0.02 --reward-scale 0.1 --exploration-noise 0.2 --actor-hidden-size 128 "
    "--critic-hidden-size 128"
)
MANY_EPISODES = "--eval-episodes 1000"  # where a start decides more than the agent does
HALFCHEETAH_BY_SAC = (
    "--env-id envpool::HalfCheetah-v5 --learning-starts 5000 --total-timesteps 200000"
)
HALFCHEETAH_BY_TD3 = (
    "--env-id envpool::HalfCheetah-v5 --learning-starts 10000 --total-timesteps 200000 "
    "--buffer-size 200000 --policy-lr 3e-4"
)
MASKED, CHAIN_100 = "CartPole-v1 without velocities", "MemoryChain-bsuite, 100 steps"
CONTROL = ", the control"
CHAIN_8 = (
    "--env-id gymnax::MemoryChain-bsuite --reward-scale 1 --no-norm-adv "
    """--env-kwargs '{"memory_length": 8}'"""
)
MASKED_CARTPOLE = "--env-id gymnax::CartPole-v1 --mask-obs 1 3"
CHAIN_32 = (
    "--env-id gymnax::MemoryChain-bsuite --env-kwargs '{\"memory_length\": 32}' --num-steps 66 "
    "--reward-scale 1"
)
# With rewards of 1, one answer in 129 steps or more gives gradients below Adam's epsilon.
RARE_REWARDS = "--no-norm-adv --reward-scale 100 --vf-coef 0.005"
CHAIN_128 = (
    "--env-id gymnax::MemoryChain-bsuite --env-kwargs '{\"memory_length\": 128}' --num-steps 512 "
    "--total-timesteps 320000 --learning-rate 1e-3 --num-minibatches 8 --chrono-length 128 "
    f"--gae-lambda 0 {RARE_REWARDS}"
)
CHAIN_CONTROL = f"MemoryChain-bsuite, 32 steps{CONTROL}"
CARTPOLE_BY_TRXL = f"{MASKED_CARTPOLE} --memory-length 32 --window-length 32"
CARTPOLE_BY_PPO = (
    f"{MASKED_CARTPOLE} --total-timesteps 500000 --num-envs 16 --num-minibatches 4 "
    "--learning-rate 2e-3 --gamma 0.99"
)
CARTPOLE_BY_IMPALA = (  # what impala_lstm.py has by default
    f"{MASKED_CARTPOLE} --total-timesteps 500000 --num-steps 32 --learning-rate 3e-3 --gamma 0.99 "
    "--ent-coef 0.003"
)
LANDER_BY_LSTM = (
    "--env-id envpool::LunarLander-v3 --total-timesteps 1000000 --num-envs 64 --num-minibatches 16 "
    "--gamma 0.997"
)
LANDER_BY_TRXL = f"{LANDER_BY_LSTM} --memory-length 32 --window-length 32"

RESULTS = {
    "ppo_lunarlander": Task("ppo.py", LANDER, "", TEN, 200, 200, JUDGE),
    "ppo_cartpole": Task("ppo.py", "CartPole-v1", "--env-id gymnax::CartPole-v1", (), target=475),
    "ppo_cartpole_gymnasium": Task(
        "ppo.py", "CartPole-v1 in Gymnasium", "--env-id gymnasium::CartPole-v1", ()
    ),
    "ppo_continuous_pendulum": Task("ppo_continuous.py", "Pendulum-v1", "", TEN, -170, -200),
    "ppo_continuous_halfcheetah": Task(
        "ppo_continuous.py", "HalfCheetah-v5", HALFCHEETAH, range(11, 21), 4000
    ),
    "ppo_continuous_walker2d": Task("ppo_continuous.py", "Walker2d-v5", WALKER2D, TEN),
    "ppo_continuous_hopper": Task("ppo_continuous.py", "Hopper-v5", HOPPER, TEN),
    "ppo_continuous_ant": Task("ppo_continuous.py", "Ant-v5 without contact forces", ANT, TEN),
    "a2c_lunarlander": Task("a2c.py", LANDER, "", TEN, 200, 200, JUDGE),
    "impala_lunarlander": Task("impala.py", LANDER, "", TEN, 200, 200, JUDGE),
    "dqn_cartpole": Task("dqn.py", "CartPole-v1", "", TEN, 475),
    "dqn_lunarlander": Task("dqn.py", LANDER, LANDER_BY_DQN, bar=200, judge=JUDGE),
    "dqn_breakout": Task("dqn.py", "Breakout-MinAtar", BREAKOUT_BY_DQN, bar=28),  # PPO's in gymnax
    "pqn_cartpole": Task("pqn.py", "CartPole-v1", CARTPOLE_BY_PQN, TEN, 475, 475),
    "pqn_lunarlander": Task("pqn.py", LANDER, LANDER_BY_PQN, TEN, 200, judge=JUDGE),
    "pqn_breakout": Task("pqn.py", "Breakout-MinAtar", bar=28),
    **{
        f"pqn_{game.lower()}_10m": Task(
            "pqn.py", f"{game}-MinAtar", f"--env-id gymnax::{game}-MinAtar {MINATAR_STEPS}", bar=bar
        )
        for game, bar in zip(MINATAR, (15, 28, 58, 131), strict=True)  # PPO's in gymnax
    },
    "sacd_cartpole": Task("sacd.py", "CartPole-v1", "", TEN, 475),
    "sacd_lunarlander": Task("sacd.py", LANDER, LANDER_BY_SACD, TEN, 200, judge=JUDGE),
    "td3_pendulum": Task("td3.py", "Pendulum-v1", MANY_EPISODES, TEN, -160),
    "td3_lunarlander": Task(
        "td3.py", LANDER_CONTINUOUS, LANDER_BY_TD3, bar=207, judge=f"gymnasium::{LANDER_CONTINUOUS}"
    ),
    "sac_pendulum": Task("sac.py", "Pendulum-v1", MANY_EPISODES, SIX, -160),
    "sac_halfcheetah": Task("sac.py", "HalfCheetah-v5", HALFCHEETAH_BY_SAC),
    "td3_halfcheetah": Task("td3.py", "HalfCheetah-v5", HALFCHEETAH_BY_TD3, THREE),
    # Eight environments, so that a step of the simulators is worth the way from a GPU and back.
    "sac_halfcheetah_1m": Task(
        "sac.py",
        "HalfCheetah-v5, on a GPU",
        "--env-id envpool::HalfCheetah-v5 --learning-starts 5000 --num-envs 8 --num-steps 125 "
        "--buffer-size 1000000 --total-timesteps 1000000",
    ),
    "td3_halfcheetah_1m": Task(
        "td3.py",
        "HalfCheetah-v5, on a GPU",
        "--env-id envpool::HalfCheetah-v5 --learning-starts 10000 --num-envs 8 --num-steps 125 "
        "--buffer-size 1000000 --total-timesteps 1000000 --policy-lr 3e-4",
    ),
}
REPLAY = {  # which transitions are replayed: beside the tasks of the same name without the flag
    f"{name}_{flag.replace('-', '_')}": RESULTS[name]._replace(
        flags=f"{RESULTS[name].flags} --{flag}", seeds=seeds
    )
    for name, flag, seeds in [
        ("sac_halfcheetah", "prioritized-replay", THREE),
        ("sac_halfcheetah", "linear-decay-sampling", THREE),
        ("dqn_breakout", "prioritized-replay", RESULTS["dqn_breakout"].seeds),
    ]
}
MEMORY = {
    "ppo_lstm_cartpole": Task("ppo_lstm.py", MASKED, bar=475, target=475),
    "rppo_cartpole": Task("rppo.py", f"{MASKED}, GRU", bar=475),
    "rppo_s5_cartpole": Task("rppo.py", f"{MASKED}, S5", "--memory s5", bar=475),
    "ppo_trxl_cartpole": Task("ppo_trxl.py", MASKED, CARTPOLE_BY_TRXL, bar=475),
    "ppo_gtrxl_cartpole": Task("ppo_gtrxl.py", MASKED, CARTPOLE_BY_TRXL, bar=475),
    "ppo_masked_cartpole": Task("ppo.py", MASKED + CONTROL, CARTPOLE_BY_PPO, bar=475),
    "impala_lstm_cartpole": Task("impala_lstm.py", MASKED, bar=475),
    "impala_lstm_memorychain": Task(
        "impala_lstm.py", "MemoryChain-bsuite, 8 steps", CHAIN_8, bar=1
    ),
    "rppo_continuous_pendulum": Task(
        "rppo_continuous.py", "Pendulum-v1 without velocity", "", TEN, -200, -200
    ),
    "rpqn_cartpole": Task("rpqn.py", MASKED, bar=475),
    "pqn_masked_cartpole": Task(
        "pqn.py", MASKED + CONTROL, f"{CARTPOLE_BY_PQN} --mask-obs 1 3", bar=475
    ),
    "drqn_cartpole": Task("drqn.py", MASKED, bar=475),
    "rsacd_cartpole": Task("rsacd.py", MASKED, bar=475),
    "rsac_pendulum": Task("rsac.py", "Pendulum-v1 without velocity", bar=-185),
    "dqn_masked_cartpole": Task("dqn.py", MASKED + CONTROL, "--mask-obs 1 3", bar=475),
    "sacd_masked_cartpole": Task("sacd.py", MASKED + CONTROL, "--mask-obs 1 3", bar=475),
    "impala_masked_cartpole": Task("impala.py", MASKED + CONTROL, CARTPOLE_BY_IMPALA, bar=475),
    "sac_masked_pendulum": Task(
        "sac.py",
        f"Pendulum-v1 without velocity{CONTROL}",
        "--mask-obs 2 --total-timesteps 50000",
        bar=-185,
    ),
    "rpqn_memorychain": Task("rpqn.py", "MemoryChain-bsuite, 32 steps", CHAIN_32, bar=1),
    "drqn_memorychain": Task("drqn.py", "MemoryChain-bsuite, 32 steps", CHAIN_32, bar=1),
    "pqn_memorychain": Task("pqn.py", CHAIN_CONTROL, f"{SMALL_PQN} {CHAIN_32}", bar=1),
    "dqn_memorychain": Task(
        "dqn.py",
        CHAIN_CONTROL,
        "--total-timesteps 200000 --learning-rate 2.5e-4 --gamma 0.99 --buffer-size 10000 --n-step 1 "
        + CHAIN_32,
        bar=1,
    ),
    "impala_memorychain": Task(
        "impala.py",
        f"MemoryChain-bsuite, 8 steps{CONTROL}",
        f"--total-timesteps 500000 --learning-rate 3e-3 --gamma 0.99 {CHAIN_8}",
        bar=1,
    ),
    "ppo_lstm_lunarlander": Task(
        "ppo_lstm.py", LANDER, LANDER_BY_LSTM, bar=200, target=200, judge=JUDGE
    ),
    "ppo_trxl_lunarlander": Task(
        "ppo_trxl.py", LANDER, LANDER_BY_TRXL, bar=200, target=200, judge=JUDGE
    ),
    "ppo_gtrxl_lunarlander": Task(
        "ppo_gtrxl.py", LANDER, LANDER_BY_TRXL, bar=200, target=200, judge=JUDGE
    ),
    "ppo_lstm_memorychain": Task("ppo_lstm.py", "MemoryChain-bsuite, 128 steps", CHAIN_128, bar=1),
    "ppo_trxl_memorychain": Task("ppo_trxl.py", CHAIN_100, bar=1),
    "ppo_gtrxl_memorychain": Task("ppo_gtrxl.py", CHAIN_100, bar=1),
}
STEPS, GENTLE = "--total-timesteps", "--learning-rate 1e-3 --reward-scale 1 --gamma 0.99"
SUITES = {  # simulators in JAX beside gymnax and Craftax: one seed says that learning works there
    re.sub(r"\W+", "_", f"{suite}_{name.lower()}"): Task(
        script, name, f"--env-id {suite}::{name} {flags}".strip(), ONE
    )
    for suite, script, name, flags in [
        ("brax", "ppo_continuous.py", "inverted_pendulum", f"{STEPS} 300000 --gamma 0.99"),
        ("mujoco", "ppo_continuous.py", "CartpoleBalance", f"{STEPS} 1000000 --gamma 0.99"),
        ("navix", "ppo.py", "Navix-Empty-5x5-v0", f"{STEPS} 300000"),
        ("xminigrid", "ppo.py", "MiniGrid-Empty-5x5", f"{STEPS} 500000 --learning-rate 1e-3"),
        ("jumanji", "ppo.py", "Snake-v1", f"{STEPS} 3000000 --mask-obs 720 {GENTLE}"),
        ("gxm", "ppo.py", "Pgx/minatar-breakout", f"{STEPS} 1000000 --reward-scale 1 --gamma 0.99"),
        ("gymnasium", "ppo_lstm.py", "popgym:popgym-RepeatFirstEasy-v0", f"{STEPS} 500000"),
    ]
}
TASKS = RESULTS | REPLAY | MEMORY | SUITES

# MemoryChain by its length: the bit is in the first two observations, and the action after `length`
# steps is to name it (reward 1, or -1). 2,500 episodes or 164k steps, whichever is more; Transformers
# that remember 512 steps have 475.
LENGTHS = (8, 32, 128, 512)
CHAIN_SCRIPTS = {  # name: label, flags. The Transformers remember as many steps as the chain has
    "ppo": ("no memory (ppo.py)", ""),
    "ppo_lstm": ("LSTM (ppo_lstm.py)", "--chrono-length {length}"),
    "ppo_trxl": ("Transformer-XL (ppo_trxl.py)", "--memory-length {length}"),
    "ppo_gtrxl": ("GTrXL (ppo_gtrxl.py)", "--memory-length {length}"),
}


def chain(script: str, length: int) -> Task:
    label, flags = CHAIN_SCRIPTS[script]
    steps = max(20 * 64 * 128, 2_500 * (length + 1))
    rollout, scale = "--num-envs 64 --num-steps 128", "--learning-rate 1e-3 --reward-scale 1"
    if script == "ppo_lstm" and length > 32:  # its gradient goes back no further than a rollout
        rollout = f"--num-envs 16 --num-steps {4 * length}"
        scale = f"--learning-rate 1e-3 --gae-lambda 0 {RARE_REWARDS}"
    rollout += " --num-minibatches 8"
    if "trxl" in script and length > 128:  # two whole episodes in a rollout: each has rewards
        steps, windows = 250_000, 2 * (length + 1) // 64 + 1
        rollout = f"--num-envs 8 --num-steps {64 * windows} --num-minibatches {windows}"
        scale = f"--update-epochs 10 --learning-rate 3e-4 --gae-lambda 0 {RARE_REWARDS}"
    words = ["--env-id", "gymnax::MemoryChain-bsuite", "--total-timesteps", str(steps)]
    words += ["--env-kwargs", f'{{"memory_length": {length}}}', *rollout.split(), *scale.split()]
    words += ["--gamma", "0.99", *flags.format(length=length).split()]
    return Task(f"{script}.py", label, shlex.join(words))


CHAIN = {
    f"{script}_{length}": chain(script, length) for script in CHAIN_SCRIPTS for length in LENGTHS
}
CARDS = "--total-timesteps 1000000 --num-envs 64 --num-minibatches 8 --reward-scale 1 --env-id "
MEMORY_TASKS = {  # of memories.py, for rppo.py: what the README calls it, flags
    "cartpole": ("CartPole without velocities", "--total-timesteps 300000"),
    "chain": (
        "MemoryChain, 32 steps",
        # One reward an episode: lambda below 1 would hardly reach back, and all others are noise.
        "--num-steps 66 --reward-scale 1 --gae-lambda 1 --no-norm-adv "
        "--env-id gymnax::MemoryChain-bsuite --env-kwargs '{\"memory_length\": 32}'",
    ),
    "repeat_previous": ("RepeatPrevious, k = 4", f"{CARDS} memory::RepeatPreviousEasy"),
    "repeat_first": ("RepeatFirst, 415 steps", f"{CARDS} memory::RepeatFirstMedium"),
    "autoencode": (
        "Autoencode, 16 cards",
        f"{CARDS} memory::AutoencodeEasy --env-kwargs '{{\"num_cards\": 16}}'",
    ),
    "count_recall": ("CountRecall, Easy", f"{CARDS} memory::CountRecallEasy"),
}
