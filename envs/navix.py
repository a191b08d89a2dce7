"""navix::Navix-Empty-5x5-v0, Navix-DoorKey-8x8-v0, Navix-MemoryS7-v0, ... (MiniGrid in JAX)

pip install navix. Memory, MultiRoom and 40 more need navix 4, and that Python 3.12. The agent sees
the whole grid, or its own view: --env-kwargs '{"observation_fn": "symbolic_first_person"}'.
"""

import navix


def make(name, observation_fn="symbolic", **kwargs):
    env = navix.make(name, observation_fn=getattr(navix.observations, observation_fn), **kwargs)

    def unpack(timestep):
        if "rgb" not in observation_fn:  # only images need the cache of 80 to 790 kB
            timestep = timestep.replace(state=timestep.state.replace(cache=None))
        return timestep.observation, timestep

    def step(key, timestep, action):
        obs, timestep = unpack(env._step(timestep, action))  # step() has a reset in it, too late
        return obs, timestep, timestep.reward, timestep.is_termination(), timestep.is_truncation()

    return lambda key: unpack(env.reset(key)), step, len(env.action_set)
