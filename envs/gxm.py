"""gxm::Pgx/2048, gxm::Pgx/minatar-seaquest, ... (Pgx's games for one player)

pip install gxm pgx. gxm 0.4 loses last observations and most time limits: the game inside it is
stepped, and its other suites go direct (gymnax::, brax::, ...). The JAXAtari it imports is gone.
"""

import gxm


def make(name):
    game = getattr(gxm.make(name), "env", None)
    if not name.startswith("Pgx/") or game.num_players > 1:
        raise ValueError(f"only Pgx/... for one player goes through gxm, not {name}")

    def step(key, state, action):
        state = game.step(state, action, key)
        return state.observation, state, state.rewards[0], state.terminated, state.truncated

    def reset(key):
        state = game.init(key)
        return state.observation, state

    return reset, step, game.num_actions
