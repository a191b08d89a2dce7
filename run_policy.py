"""Acts with a policy that `enjoy.py --export policy.npz` wrote: needs that file, this one and NumPy.

    policy = Policy("policy.npz")
    action, scores, memory = policy(obs, policy.memory, first=True)  # obs begins an episode
    action, scores, memory = policy(obs, memory)

obs: as the simulator gives it (a list, if it has parts). action: a number, or a vector within the
bounds. scores: logits or values of all actions, the action itself where it is a vector.
"""

import json

import numpy as np


def window(shape, starts, sizes):
    starts = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(s, s + k) for s, k in zip(starts, sizes, strict=True))


def update(x, new, *starts):
    (x := x.copy())[window(x.shape, starts, new.shape)] = new
    return x


NAMES = """exp expm1 log log1p tanh sqrt square sin cos abs sign floor real imag add subtract multiply
divide negative maximum minimum power fmod equal not_equal less less_equal greater greater_equal
logical_and logical_or logical_not sum prod max min any all where argmax cumsum split take transpose clip"""
STEPS = {name: getattr(np, name) for name in NAMES.split()} | {
    "logistic": lambda x: np.tanh(x / 2) / 2 + np.float32(0.5),
    "complex": lambda x, y: (x + 1j * y).astype(np.complex64),
    "cast": lambda x, to: np.asarray(x).astype(to),
    "reshape": lambda x, to: x.reshape(to),
    "broadcast": lambda x, over, to: np.broadcast_to(x.reshape(over), to),
    "concatenate": lambda *parts, axis: np.concatenate(parts, axis),
    "stack": lambda *parts, axis: np.stack(parts, axis),
    "cummax": lambda x, axis: np.maximum.accumulate(x, axis),
    "pad": lambda x, value, by: np.pad(x, by, constant_values=value),
    "slice": lambda x, at: x[tuple(slice(*each) for each in at)],
    "window": lambda x, *starts, sizes: x[window(x.shape, starts, sizes)],
    "update": update,
    "einsum": lambda x, y, of: np.einsum(of, x, y, optimize=True),
}


class Policy:
    def __init__(self, path):
        file = np.load(path)
        self.program = json.loads(str(file["program"]))
        self.constants = {n: file[f"constant{n}"] for n in self.program["constants"]}
        self.memory = [file[f"memory{n}"] for n in range(self.program["memory"])]

    def __call__(self, obs, memory=(), first=False):
        obs = [np.asarray(x)[None] for x in (obs if isinstance(obs, list) else [obs])]
        values = self.constants | dict(enumerate([*obs, np.array([first]), *memory]))
        for name, inputs, outputs, parameters in self.program["steps"]:
            made = STEPS[name](*[values[n] for n in inputs], **parameters)
            values.update(zip(outputs, made if len(outputs) > 1 else [made], strict=True))
        action, scores, *memory = [values[n] for n in self.program["outputs"]]
        return action[0], scores[0], memory
