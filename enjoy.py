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
#   "craftax>=1.6,<1.7",
#   "envpool>=1.2.5,<1.3",
#   "orbax-checkpoint>=0.12,<0.13",
#   "tyro>=1.0,<1.1",
#   "tqdm>=4.66,<5",
#   "matplotlib>=3.9,<4",
#   "pillow>=11,<14",
#   "flatbuffers>=24.3,<26",  # jax.export, for .stablehlo
# ]
# ///
"""Plays what a run has learned: greedy returns, and a picture that moves.

    python enjoy.py runs/<run>                            # its evaluation again, and one episode as a GIF
    python enjoy.py runs/<run> --episodes 10 --no-draw    # only the returns of ten episodes
    python enjoy.py runs/<run> --seed 3 --out landing.webp
    python enjoy.py runs/<run> --export policy.npz        # the policy, for run_policy.py: NumPy alone

The script that config.json names must stand beside this file: it builds the agent and the environment,
loads the checkpoint and plays. Without --episodes these are the episodes of evaluation.json.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn
from unittest import mock

import numpy as np
import tyro

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory,
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")  # in silence
os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")


@dataclasses.dataclass(frozen=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]  # the run's folder
    seed: int | None = None  # which agent of a run with several seeds, None: the first
    episodes: int | None = None  # how many to play, None: those of evaluation.json
    draw: bool = True  # draw an episode too
    out: Path | None = None  # .gif, .webp or .png (animated), None: episode.gif in the run's folder
    export: Path | None = None  # play nothing, write the policy: .npz for NumPy, or .stablehlo
    env_seed: int = 0  # which episode to draw
    width: int = 320  # of the picture, in pixels
    fps: float = 30.0  # pictures a second
    max_frames: int = 600  # of a longer episode, every second step is drawn, or every third, ...


def fail(message: str) -> NoReturn:
    """Ends the program with status 2 and one line on stderr that says what to change."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- What the run was -----------------------------------------------------------------------------


def load_script(run: Path) -> tuple[Any, Any]:
    """-> the module of the script that made the run, and its Args."""
    try:
        config = json.loads((run / "config.json").read_text())
        path, saved = Path(__file__).with_name(config["script"]), config["args"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{run} holds no config.json of a run")
    if not path.is_file():
        fail(f"{run} is a run of {config['script']}: put that script beside {Path(__file__).name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    saved = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
    try:
        return script, script.Args(**saved)
    except TypeError as error:
        fail(f"the flags in {run}/config.json are not those of {path.name}: {error}")


def make_env(script: Any, args: Any, num_envs: int, seed: int) -> Any:
    """The environment that the run is evaluated in."""
    return script.make_env(
        args.eval_env_id or args.env_id, num_envs, seed, args.env_kwargs, args.mask_obs
    )


def load_state(script: Any, args: Any, run: Path, seed: int) -> Any:
    """The state that the run's last checkpoint holds of one agent."""
    import jax

    if not 0 <= seed - args.seed < args.num_seeds:
        last = args.seed + args.num_seeds - 1
        fail(f"--seed {seed} is not in this run, whose seeds are {args.seed} to {last}")
    num_actors = getattr(args, "num_actors", 1)  # impala.py
    if hasattr(args, "process_id"):  # ppo_trxl_pmap.py
        args = dataclasses.replace(args, num_envs=args.num_envs // jax.device_count())
    num_envs = args.num_envs // num_actors
    env = script.make_env(args.env_id, num_envs, args.seed, args.env_kwargs, args.mask_obs)
    init, *_ = script.make_train(args, *[env] * num_actors)
    key = jax.random.key(args.seed)
    if args.num_seeds > 1:
        seeds = args.seed + np.arange(args.num_seeds)
        state = jax.lax.map(init, jax.vmap(jax.random.key)(seeds))
    else:
        state = jax.jit(init)(key)
    state = script.load_checkpoint(run, state)
    if args.num_seeds > 1:
        state = jax.tree.map(lambda x: x[seed - args.seed], state)

    def off_the_mesh(x):
        return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)

    return jax.tree.map(off_the_mesh, state)


def play(script: Any, state: Any, env: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Plays a greedy episode in each environment -> returns, lengths, both [B]."""
    import jax

    evaluate = jax.jit(lambda state: script.evaluate(state, env, jax.random.key(seed)))
    returns, lengths = evaluate(state)
    return np.asarray(returns), np.asarray(lengths)


# --- Pictures -------------------------------------------------------------------------------------


def record(script: Any, args: Any, state: Any, seed: int) -> tuple[list[np.ndarray], float]:
    """Plays one episode -> its pictures [H, W, 3], uint8, and its return."""
    env_id = args.eval_env_id or args.env_id
    suite, _, name = env_id.partition("::")
    record_in = {
        "gymnax": record_states,
        "craftax": record_states,
        "gymnasium": record_gymnasium,
        "envpool": record_envpool,
    }
    if suite not in record_in:
        fail(f"{env_id} cannot be drawn: --no-draw prints the returns alone")
    return record_in[suite](script, args, state, seed, name)


def record_states(script, args, state, seed, name):
    """JAX environments: keep the states, and draw them afterwards."""
    import jax
    from jax.experimental import io_callback

    env, states = make_env(script, args, 1, seed), []

    def step(key, env_state, action):
        keep = lambda state: states.append(jax.tree.map(lambda x: np.asarray(x)[0], state))
        io_callback(keep, None, env_state, ordered=True)
        return env.step(key, env_state, action)

    (total,), _ = play(script, state, env._replace(step=step), seed)
    jax.effects_barrier()
    suite = (args.eval_env_id or args.env_id).partition("::")[0]
    draw = draw_craftax if suite == "craftax" else draw_gymnax
    return draw(name, args, states), total


def draw_gymnax(name: str, args: Any, states: list) -> list[np.ndarray]:
    import gymnax
    import matplotlib

    matplotlib.use("Agg")
    from gymnax.visualize import Visualizer

    kwargs = json.loads(args.env_kwargs)
    fields = {field.name for field in dataclasses.fields(gymnax.make(name)[1])}
    params = {key: kwargs.pop(key) for key in fields & set(kwargs)}
    env, default = gymnax.make(name, **kwargs)
    visualizer = Visualizer(env, default.replace(**params), states)
    visualizer.init()
    if not hasattr(visualizer, "im"):
        fail(f"gymnax has no pictures of {name}: --no-draw prints the returns alone")
    frames = []
    for number in range(len(states)):
        visualizer.update(number)
        visualizer.fig.canvas.draw()
        frames.append(np.array(visualizer.fig.canvas.buffer_rgba())[..., :3])
    return frames


def draw_craftax(name: str, args: Any, states: list) -> list[np.ndarray]:
    import jax

    module = "craftax.craftax_classic" if "Classic" in name else "craftax.craftax"
    renderer = importlib.import_module(f"{module}.renderer")
    render = jax.jit(renderer.make_craftax_pixel_renderer(16))
    return [np.asarray(render(state)).clip(0, 255).astype(np.uint8) for state in states]


def record_gymnasium(script, args, state, seed, name):
    """Every Gymnasium environment that is made renders each of its steps."""
    import gymnasium

    frames, over, make = [], [], gymnasium.make

    class Camera(gymnasium.Wrapper):
        def reset(self, **kwargs):
            result = super().reset(**kwargs)
            if not over:
                frames.append(self.render())
            return result

        def step(self, action):
            result = super().step(action)
            if not over:
                frames.append(self.render())
            if result[2] or result[3]:  # terminated or truncated: the first episode is over
                over.append(True)
            return result

    with mock.patch.object(
        gymnasium, "make", lambda name, **kw: Camera(make(name, render_mode="rgb_array", **kw))
    ):
        env = make_env(script, args, 1, seed)
    frames.clear()
    (total,), _ = play(script, state, env, seed)
    if any(not isinstance(frame, np.ndarray) for frame in frames):
        fail(f"{name} gives no pictures: --no-draw prints the returns alone")
    return frames, total


def record_envpool(script, args, state, seed, name):
    """EnvPool draws on demand: between two steps of the compiled loop."""
    import envpool
    import jax
    from jax.experimental import io_callback

    pools, frames, make = [], [], envpool.make_gymnasium

    def make_drawable(name, **kwargs):
        pools.append(make(name, render_mode="rgb_array", **kwargs))
        return pools[-1]

    with mock.patch.object(envpool, "make_gymnasium", make_drawable):
        env = make_env(script, args, 1, seed)

    def draw(obs):
        frames.append(pools[-1].render()[0])
        return np.asarray(obs)

    def step(key, env_state, action):
        env_state, timestep = env.step(key, env_state, action)
        # What the agent sees next comes through the camera, so no step overtakes it.
        shape = jax.ShapeDtypeStruct(timestep.obs.shape, timestep.obs.dtype)
        return env_state, timestep._replace(
            obs=io_callback(draw, shape, timestep.obs, ordered=True)
        )

    (total,), (length,) = play(script, state, env._replace(step=step), seed)
    return frames[: max(1, int(length) - 1)], total


def save(frames: list[np.ndarray], args: Args, out: Path) -> int:
    """Writes an animation that repeats for ever -> how many pictures it has."""
    from PIL import Image

    stride = -(-len(frames) // args.max_frames)
    pictures = [Image.fromarray(frame) for frame in frames[::stride]]
    size = args.width, round(pictures[0].height * args.width / pictures[0].width)
    pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
    if out.suffix == ".gif":  # few colours, the same in all pictures: small files
        palette = pictures[len(pictures) // 2].quantize(64)
        pictures = [x.quantize(palette=palette, dither=Image.Dither.NONE) for x in pictures]
    options = {"save_all": True, "append_images": pictures[1:], "loop": 0}
    pictures[0].save(out, duration=1000 / args.fps, **options)
    return len(pictures)


# --- A policy to take along -----------------------------------------------------------------------

# JAX's primitives, and the steps of run_policy.py with the same meaning.
RENAMED = """add=add add_any=add sub=subtract mul=multiply div=divide neg=negative max=maximum min=minimum
pow=power rem=fmod eq=equal ne=not_equal lt=less le=less_equal gt=greater ge=greater_equal and=logical_and
or=logical_or not=logical_not select_n=where clamp=clip reduce_sum=sum reduce_max=max reduce_min=min
reduce_prod=prod reduce_or=any reduce_and=all dynamic_update_slice=update"""
STEPS = dict(pair.split("=") for pair in RENAMED.split())
STEPS |= {
    x: x for x in "exp expm1 log log1p tanh logistic sqrt square sin cos abs sign floor".split()
}
STEPS |= {x: x for x in "real imag complex cumsum cummax stack concatenate transpose split".split()}


def greedy_step(script: Any, args: Any, state: Any, env: Any) -> tuple[Any, list, list]:
    """What evaluate does between an observation and an action -> step(obs, first, memory), whose parts
    are lists, -> action, memory; examples of obs; the memory before the first step.
    """
    import jax
    import jax.numpy as jnp

    if getattr(args, "previous_reward", False):
        fail("the policy sees rewards (--previous-reward), and one that is taken along does not")
    raw = []  # observations as the simulator gives them

    def spy(mask_obs, obs):
        raw.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), obs))
        return shape_obs(mask_obs, obs)

    shape_obs = script.shape_obs
    with mock.patch.object(script, "shape_obs", spy):
        make_env(script, args, 1, 0)
    examples, structure = jax.tree.flatten(raw[0])

    def one_turn(obs, first, memory):
        """Runs evaluate up to its loop, and the loop's body once."""
        actions, carries = [], []
        obs = script.shape_obs(args.mask_obs, jax.tree.unflatten(structure, obs))
        no, zero = jnp.zeros(1, bool), jnp.zeros(1)

        def act(key, env_state, action):
            actions.append(action)
            return env_state, script.Timestep(obs, obs, zero, no, no)

        def loop(playing, body, carry):
            if hasattr(carry[0], "memory"):
                kept, tree = jax.tree.flatten(kept_of(carry[0]))
                kept = jax.tree.unflatten(tree, kept if memory is None else memory)
                acting = carry[0]._replace(memory=kept[0], reset=first)
                if hasattr(acting.obs, "action"):
                    acting = acting._replace(obs=acting.obs._replace(action=kept[1]))
                carries.extend([(acting, *carry[1:]), body((acting, *carry[1:]))])
            else:
                carries.extend([carry, body(carry)])
            return carry

        fake, lax = env._replace(reset=lambda key: (None, obs), step=act), jax.lax
        with mock.patch.object(lax, "while_loop", loop), mock.patch.object(lax, "scan", unrolled):
            script.evaluate(state, fake, jax.random.key(0))
        before, after = [jax.tree.leaves(kept_of(carry[0])) for carry in carries]
        return actions[0], (before if memory is None else after)

    zeros = [jnp.zeros(x.shape, x.dtype) for x in examples]
    _, memory = one_turn(zeros, jnp.ones(1, bool), None)
    return one_turn, zeros, memory


def load_policy(run: Path | str, seed: int | None = None) -> tuple[Any, list]:
    """A run's greedy policy in JAX -> act(obs, memory, first) -> action, memory; and a first memory.

    obs: one observation as the simulator gives it (a list, if it has parts); first: it begins an
    episode; seed: which agent of a run with several. jax.vmap makes of act one for many environments.
    """
    import jax
    import jax.numpy as jnp

    script, args = load_script(Path(run))
    state = load_state(script, args, Path(run), args.seed if seed is None else seed)
    step, examples, memory = greedy_step(script, args, state, make_env(script, args, 1, 0))

    @jax.jit
    def act(obs, memory=(), first=False):
        parts = obs if isinstance(obs, list) else [obs]
        parts = [jnp.asarray(x, y.dtype)[None] for x, y in zip(parts, examples, strict=True)]
        action, memory = step(parts, jnp.asarray(first)[None], list(memory))
        return action[0], memory

    return act, memory


def unrolled(f, carry, xs, **_):
    """jax.lax.scan, step after step."""
    import jax

    ys = []
    for n in range(len(jax.tree.leaves(xs)[0])):
        carry, y = f(carry, jax.tree.map(lambda x, n=n: x[n], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *parts: jax.numpy.stack(parts), *ys)


def kept_of(acting: Any) -> tuple:
    """What a policy hands to its next step: its memory, and the action where it sees the last one."""
    if not hasattr(acting, "memory"):
        return ()
    return acting.memory, getattr(acting.obs, "action", None)


def steps_of(jaxpr: Any, known: dict, steps: list, fresh: Any) -> None:
    """Appends [name, inputs, outputs, parameters] for the equations of a program; known: variable -> its
    number, or its value where that depends on no input.
    """
    from jax.extend.core import Literal

    value_of = lambda x, known: np.asarray(x.val) if isinstance(x, Literal) else known[x]
    for eqn in jaxpr.eqns:
        inputs = [value_of(x, known) for x in eqn.invars]
        inner = next(
            (x for x in eqn.params.values() if hasattr(x, "jaxpr") or hasattr(x, "eqns")), None
        )
        if not any(isinstance(x, int) for x in inputs):
            made = eqn.primitive.bind(*inputs, **eqn.params)
            made = made if eqn.primitive.multiple_results else [made]
            known.update(zip(eqn.outvars, made, strict=True))
        elif inner is not None and eqn.primitive.name not in ("scan", "while"):
            body, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            within = dict(zip(body.constvars, constants, strict=True))
            within |= dict(zip(body.invars, inputs, strict=True))
            steps_of(body, within, steps, fresh)
            outputs = [value_of(x, within) for x in body.outvars]
            known.update(zip(eqn.outvars, outputs, strict=True))
        elif eqn.primitive.name in ("copy", "stop_gradient", "optimization_barrier", "copy_p"):
            known.update(zip(eqn.outvars, inputs, strict=True))
        else:
            outputs = [next(fresh) for _ in eqn.outvars]
            known.update(zip(eqn.outvars, outputs, strict=True))
            steps.extend(in_numpy(eqn, inputs, outputs))


def in_numpy(eqn: Any, inputs: list, outputs: list[int]) -> list:
    """An equation as steps that run_policy.py knows."""
    name, p, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    kind = eqn.outvars[0].aval.dtype.name
    if name == "select_n":  # of no and yes, where np.where has yes and no
        inputs = [inputs[0], inputs[2], inputs[1]]
    if name == "clamp":  # low, x, high
        inputs = [inputs[1], inputs[0], inputs[2]]
    if name in ("reshape", "squeeze", "expand_dims"):
        return [["reshape", inputs[:1], outputs, {"to": shape}]]
    if name == "broadcast_in_dim":
        sizes = dict(zip(p["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True))
        over = [sizes.get(n, 1) for n in range(len(shape))]
        return [["broadcast", inputs[:1], outputs, {"over": over, "to": shape}]]
    if name == "convert_element_type":
        return [["cast", inputs, outputs, {"to": kind}]]
    if name == "integer_pow":
        return [["power", [*inputs, np.float32(p["y"])], outputs, {}]]
    if name == "rsqrt":
        return [["power", [*inputs, np.float32(-0.5)], outputs, {}]]
    if name == "slice":
        strides = p["strides"] or [1] * len(shape)
        at = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
        return [["slice", inputs, outputs, {"at": at}]]
    if name == "dynamic_slice":
        return [["window", inputs, outputs, {"sizes": p["slice_sizes"]}]]
    if name == "pad" and all(
        inner == 0 and min(low, high) >= 0 for low, high, inner in p["padding_config"]
    ):
        return [["pad", inputs, outputs, {"by": [x[:2] for x in p["padding_config"]]}]]
    if name == "gather" and (axis := taken_axis(eqn)) is not None:
        x, indices = inputs
        reshape = ["reshape", [indices], outputs, {"to": eqn.invars[1].aval.shape[:-1]}]
        return [reshape, ["take", [x, *outputs], outputs, {"axis": axis}]]
    if name == "dot_general":
        return [["einsum", inputs, outputs, {"of": einsum_of(eqn)}]]
    if name == "argmax":
        (axis,) = p["axes"]
        cast = ["cast", outputs, outputs, {"to": kind}]
        return [["argmax", inputs, outputs, {"axis": axis}], cast]
    if name == "unstack":
        parts = [["reshape", [n], [n], {"to": shape}] for n in outputs]
        if len(outputs) == 1:
            return [["reshape", inputs, outputs, {"to": shape}]]
        at = list(range(1, len(outputs)))
        parameters = {"indices_or_sections": at, "axis": p["axis"]}
        return [["split", inputs, outputs, parameters], *parts]
    if name not in STEPS or p.get("reverse"):
        fail(f"--export: run_policy.py knows no {name}, which this policy needs")
    if name.startswith("reduce_"):
        steps = [[STEPS[name], outputs, outputs, {"axis": n}] for n in sorted(p["axes"])[::-1]]
        return [[STEPS[name], inputs, *steps[0][2:]], *steps[1:]]
    parameters = {}
    if name == "concatenate":
        parameters = {"axis": p["dimension"]}
    elif name in ("stack", "cummax"):
        parameters = {"axis": p["axis"]}
    elif name == "transpose":
        parameters = {"axes": p["permutation"]}
    elif name == "cumsum":
        parameters = {"axis": p["axis"], "dtype": kind}
    elif name == "split":
        at = [int(x) for x in np.cumsum(p["sizes"])[:-1]]
        parameters = {"indices_or_sections": at, "axis": p["axis"]}
    return [[STEPS[name], inputs, outputs, parameters]]


def taken_axis(eqn: Any) -> int | None:
    """The axis along which a gather takes whole slices, None if it does something else."""
    numbers, x, out = eqn.params["dimension_numbers"], eqn.invars[0].aval, eqn.outvars[0].aval
    axes, sizes = numbers.start_index_map, list(eqn.params["slice_sizes"])
    if len(axes) != 1 or numbers.collapsed_slice_dims != axes:
        return None
    (axis,), kept = axes, set(numbers.offset_dims)
    places = [n for n in range(out.ndim) if n not in kept]
    whole = sizes[:axis] + sizes[axis + 1 :] == list(x.shape[:axis] + x.shape[axis + 1 :])
    return axis if whole and places == list(range(axis, axis + len(places))) else None


def einsum_of(eqn: Any) -> str:
    """dot_general's dimensions as einsum's letters."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    a, b = [
        list(letters[: x.aval.ndim])
        for x, letters in zip(eqn.invars, ("abcdefgh", "ijklmnop"), strict=True)
    ]
    for i, j in [*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)]:
        b[j] = a[i]
    out = [a[i] for i in left_batch]
    out += [x for i, x in enumerate(a) if i not in (*left, *left_batch)]
    out += [x for j, x in enumerate(b) if j not in (*right, *right_batch)]
    return f"{''.join(a)},{''.join(b)}->{''.join(out)}"


def export(script: Any, args: Any, state: Any, out: Path) -> None:
    """The policy as a list of NumPy's steps, for run_policy.py, which is put beside it; or in
    StableHLO, for jax.export.deserialize: (obs [1, ...] in a list, first [1], memory) -> action [1],
    memory. Where first is True the memory is not read, so zeros of in_avals' shapes will do.
    """
    import jax

    step, obs, memory = greedy_step(script, args, state, make_env(script, args, 1, 0))
    first = np.ones(1, bool)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".stablehlo":
        made = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "rocm", "tpu"))
        out.write_bytes(made(obs, first, memory).serialize())
        return
    program, number = jax.make_jaxpr(step)(obs, first, memory), len(obs) + 1 + len(memory)
    known = dict(zip(program.jaxpr.invars, range(number), strict=True))
    known |= dict(zip(program.jaxpr.constvars, map(np.asarray, program.consts), strict=True))
    steps, fresh = [], itertools.count(number)
    steps_of(needed(program.jaxpr), known, steps, fresh)
    action, *kept = [known[x] for x in program.jaxpr.outvars]
    scores = next((x[1][0] for x in steps if x[0] == "argmax" and x[2] == [action]), action)

    constants = {}

    def numbered(x):
        if isinstance(x, int):
            return x
        constants[next_number := next(fresh)] = np.asarray(x)
        return next_number

    steps = [[name, [numbered(x) for x in inputs], *rest] for name, inputs, *rest in steps]
    outputs = [numbered(x) for x in (action, scores, *kept)]
    program = {"steps": steps, "outputs": outputs, "memory": len(memory), "constants": [*constants]}
    arrays = {f"constant{n}": x for n, x in constants.items()}
    arrays |= {f"memory{n}": np.asarray(x) for n, x in enumerate(memory)}
    np.savez(out, program=json.dumps(program, default=int), **arrays)
    beside = Path(__file__).with_name("run_policy.py")
    if out.parent.resolve() != beside.parent.resolve():
        shutil.copy(beside, out.parent)


def needed(jaxpr: Any) -> Any:
    """A program without what its outputs do not depend on (random keys, episode statistics)."""
    wanted, eqns = set(map(id, jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if any(id(x) in wanted for x in eqn.outvars):
            eqns.append(eqn)
            wanted |= set(map(id, eqn.invars))
    return jaxpr.replace(eqns=eqns[::-1])


# --- From the shell -------------------------------------------------------------------------------


@contextmanager
def told(what: str):
    """One line for what a simulator or a picture library cannot do."""
    try:
        yield
    except Exception as error:  # of any simulator or picture library
        fail(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def main(args: Args) -> None:
    script, run_args = load_script(args.run)
    seed = run_args.seed if args.seed is None else args.seed
    out = args.out or args.run / "episode.gif"
    if out.suffix not in (".gif", ".webp", ".png"):
        fail(f"--out {out} must end in .gif, .webp or .png")
    episodes = run_args.eval_episodes if args.episodes is None else args.episodes
    if episodes < 1 and args.export is None:
        fail("--episodes must be at least 1")
    if args.fps <= 0 or args.max_frames < 1 or args.width < 1:
        fail("--fps, --max-frames and --width must be above 0")

    if args.export and args.export.suffix not in (".npz", ".stablehlo"):
        fail(f"--export {args.export} must end in .npz or .stablehlo")

    if args.export and hasattr(run_args, "compute_dtype"):  # NumPy has no bfloat16
        run_args = dataclasses.replace(run_args, compute_dtype="float32")
    state = load_state(script, run_args, args.run, seed)
    if args.export:
        export(script, run_args, state, args.export)
        print(f"{args.export}: the policy of {args.run}")
        return
    env = make_env(script, run_args, episodes, run_args.seed + 2**30)  # as in the run's evaluation
    returns, lengths = play(script, state, env, seed + 2**30)
    print(
        f"greedy return over {episodes} episodes: {returns.mean():.1f} +- {returns.std():.1f}, "
        f"{returns.min():.1f} to {returns.max():.1f}, {lengths.mean():.0f} steps"
    )
    if args.draw:
        with told(f"{run_args.env_id} cannot be drawn, --no-draw prints the returns alone"):
            frames, total = record(script, run_args, state, args.env_seed)
            number = save(frames, args, out)
        print(f"{out}: {number} pictures of an episode with return {total:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
