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
# ]
# ///
"""Plays what a run has learned: greedy returns, and a picture that moves.

    python enjoy.py runs/<run>                            # its evaluation again, and one episode as a GIF
    python enjoy.py runs/<run> --episodes 10 --no-draw    # only the returns of ten episodes
    python enjoy.py runs/<run> --seed 3 --out landing.webp

The script that config.json names must stand beside this file: it builds the agent and the environment,
loads the checkpoint and plays. Without --episodes these are the episodes of evaluation.json.
"""

import dataclasses
import importlib.util
import json
import os
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
    if not 0 <= seed - run_args.seed < run_args.num_seeds:
        last = run_args.seed + run_args.num_seeds - 1
        fail(f"--seed {seed} is not in this run, whose seeds are {run_args.seed} to {last}")
    out = args.out or args.run / "episode.gif"
    if out.suffix not in (".gif", ".webp", ".png"):
        fail(f"--out {out} must end in .gif, .webp or .png")
    episodes = run_args.eval_episodes if args.episodes is None else args.episodes
    if episodes < 1:
        fail("--episodes must be at least 1")
    if args.fps <= 0 or args.max_frames < 1 or args.width < 1:
        fail("--fps, --max-frames and --width must be above 0")

    state = load_state(script, run_args, args.run, seed)
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
