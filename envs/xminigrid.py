"""xminigrid::MiniGrid-DoorKey-5x5, MiniGrid-MemoryS16, XLand-MiniGrid-R1-9x9, ...

pip install xminigrid. XLand has nothing to do without --env-kwargs '{"benchmark": "trivial-21k"}',
which is downloaded when first used and gives each episode a task. Also: max_steps, view_size.
"""

import jax
import xminigrid


def make(name, benchmark=None, **kwargs):
    env, params = xminigrid.make(name, **kwargs)
    tasks = benchmark and xminigrid.load_benchmark(benchmark)

    def reset(key):
        key, task_key = jax.random.split(key)
        task = {"ruleset": tasks.sample_ruleset(task_key)} if tasks else {}
        return unpack(env.reset(params.replace(**task), key))[:2]

    def unpack(timestep):
        ends = timestep.discount == 0, timestep.last() & (timestep.discount > 0)
        return timestep.observation, timestep, timestep.reward, *ends

    step = lambda key, timestep, action: unpack(env.step(params, timestep, action))
    return reset, step, env.num_actions(params)
