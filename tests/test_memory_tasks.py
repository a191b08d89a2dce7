"""envs/memory.py deals, shows, asks, pays and ends as POPGym does, and whoever remembers wins."""

import functools
import runpy

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from probes import quick
from scipy.stats import chisquare

import ppo

MAKE = runpy.run_path(str(ROOT / "envs" / "memory.py"))["make"]
STEPS = {
    "RepeatFirstEasy": 51,
    "RepeatFirstMedium": 415,
    "RepeatFirstHard": 831,
    "RepeatPreviousEasy": 51,
    "RepeatPreviousMedium": 103,
    "RepeatPreviousHard": 155,
    "AutoencodeEasy": 103,
    "AutoencodeMedium": 207,
    "AutoencodeHard": 311,
    "CountRecallEasy": 51,
    "CountRecallMedium": 103,
    "CountRecallHard": 207,
}
ASKED = STEPS | {
    "RepeatPreviousEasy": 48,
    "RepeatPreviousMedium": 72,
    "RepeatPreviousHard": 92,
    "AutoencodeEasy": 52,
    "AutoencodeMedium": 104,
    "AutoencodeHard": 156,
}  # steps that ask, the last ones of an episode
K = {"RepeatPreviousEasy": 4, "RepeatPreviousMedium": 32, "RepeatPreviousHard": 64}


@functools.cache
def task(name, **kwargs):
    """-> reset(keys [B]), play(state, actions [T, B]) -> what each step gave, number of actions."""
    reset, step, num_actions = MAKE(name, **kwargs)
    step = jax.vmap(step, (None, 0, 0))

    def advance(state, action):
        obs, state, reward, terminated, truncated = step(jax.random.key(0), state, action)
        return state, (obs, reward, terminated, truncated)

    play = lambda state, actions: jax.lax.scan(advance, state, actions)[1]
    return jax.jit(jax.vmap(reset)), jax.jit(play), num_actions


def episodes(name, actions, seed=0, **kwargs):
    """actions [T, B] -> cards [B, ...], obs [T + 1, B, D], reward, terminated [T, B]."""
    reset, play, _ = task(name, **kwargs)
    first_obs, state = reset(jax.random.split(jax.random.key(seed), actions.shape[1]))
    obs, reward, terminated, truncated = play(state, actions)
    assert not truncated.any() and obs.dtype == first_obs.dtype == jnp.float32
    obs = np.concatenate([first_obs[None], obs])
    return np.asarray(state[0]), obs, np.asarray(reward), np.asarray(terminated)


def remember(name, obs, k=None):
    """obs [T, D] of one episode -> the right actions [T], from nothing but what has been seen."""
    steps, suits = np.arange(len(obs)), obs[:, -4:].argmax(axis=1)
    if name.startswith("RepeatFirst"):
        return np.full(len(obs), suits[0])
    if name.startswith("RepeatPrevious"):
        return suits[np.maximum(steps - (k or K[name]) + 1, 0)]
    if name.startswith("Autoencode"):
        watched = int(obs[:, 1].sum())
        return np.append(np.zeros(watched, int), suits[watched::-1])
    cards, queries = obs.reshape(len(obs), 2, -1).argmax(axis=2).T
    return np.array([(cards[: t + 1] == queries[t]).sum() for t in steps])


def right_actions(name, num, seed=0, **kwargs):
    """[T, B]; what is shown does not depend on what is done."""
    length = kwargs.pop("length", STEPS[name])
    _, obs, *_ = episodes(name, np.zeros((length, num), np.int32), seed, **kwargs)
    played = [remember(name, obs[:-1, b], kwargs.get("k")) for b in range(num)]
    return np.int32(played).T


# --- Without POPGym -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(STEPS, *[x for x in STEPS if x.endswith("Easy")]))
def test_who_remembers_gets_one_and_who_guesses_what_chance_gives(name):
    actions, num_actions = right_actions(name, 3), task(name)[2]
    assert 0 <= actions.min() and actions.max() < num_actions
    _, obs, reward, terminated = episodes(name, actions)
    np.testing.assert_allclose(reward.sum(axis=0), 1.0, rtol=1e-5)
    steps, asked = np.arange(1, STEPS[name] + 1), ASKED[name]
    pay = np.where(steps > STEPS[name] - asked, 1 / asked, 0.0)
    np.testing.assert_allclose(reward.T, [pay] * 3, rtol=1e-6)
    np.testing.assert_array_equal(terminated.T, [steps == STEPS[name]] * 3)
    assert ((obs == 0) | (obs == 1)).all() and len(set(obs.sum(axis=2).ravel())) == 1
    guesses = np.random.default_rng(0).integers(0, num_actions, (STEPS[name], 400))
    returns = episodes(name, np.int32(guesses))[2].sum(axis=0)
    error = returns.std() / 20
    assert abs(returns.mean() - (2 / num_actions - 1)) < 4 * error < 0.05


@pytest.mark.parametrize(
    "name, kwargs, length",
    [
        ("AutoencodeEasy", {"num_cards": 16}, 31),
        ("RepeatPreviousEasy", {"k": 8}, 51),
        ("RepeatPreviousEasy", {"num_cards": 8, "k": 1}, 7),
        ("CountRecallEasy", {"num_cards": 30, "kinds": 5}, 29),
    ],
)
def test_other_decks(name, kwargs, length):
    actions = right_actions(name, 5, length=length, **kwargs)
    _, _, reward, terminated = episodes(name, actions, **kwargs)
    np.testing.assert_allclose(reward.sum(axis=0), 1.0, rtol=1e-5)
    assert terminated[-1].all() and not terminated[:-1].any()


def test_decks_are_complete_and_every_order_is_as_likely_as_any_other():
    cards, obs, *_ = episodes("RepeatFirstEasy", np.zeros((51, 4000), np.int32))
    suits = obs.sum(axis=0)  # [B, 4], all cards are shown
    np.testing.assert_array_equal(suits, np.full((4000, 4), 13))
    assert len({x.tobytes() for x in cards}) == 4000  # of 52! / 13!^4 decks
    assert chisquare(obs.sum(axis=1), axis=1).pvalue.min() > 1e-4  # each of 52 places
    few = episodes("AutoencodeEasy", np.zeros((1, 4000), np.int32), num_cards=4)[0]
    counts = np.unique(few, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-3  # all orders of four cards


def test_queries_know_nothing_of_the_cards():
    actions = np.zeros((1, 4000), np.int32)
    cards, *_ = episodes("CountRecallEasy", actions, num_cards=4)  # 6 orders of each deck
    counts = np.unique(cards.reshape(4000, -1), axis=0, return_counts=True)[1]
    assert len(counts) == 36 and chisquare(counts).pvalue > 1e-3


def test_a_new_episode_begins_in_the_step_that_ends_one():
    """Whoever repeats the first card after each reset wins; next_obs ends the old deck."""
    num_envs, length = 3, 51
    env = ppo.make_env("memory::RepeatFirstEasy", num_envs)
    assert env.obs_shape == (4,) and env.action_size == 4
    env_state, obs = env.reset(jax.random.key(0))
    step, first, decks = jax.jit(env.step), obs, []
    for _ in range(3):
        seen, total = [obs], 0.0
        for t in range(1, length + 1):
            key = jax.random.key(100 * len(decks) + t)
            env_state, timestep = step(key, env_state, first.argmax(axis=1))
            seen, total, obs = [*seen, timestep.next_obs], total + timestep.reward, timestep.obs
            assert (timestep.terminated == (t == length)).all() and not timestep.truncated.any()
            assert t == length or (timestep.obs == timestep.next_obs).all()
        np.testing.assert_array_equal(np.sum(seen, axis=0), np.full((num_envs, 4), 13))
        np.testing.assert_allclose(total, 1.0, rtol=1e-5)
        decks, first = [*decks, *np.argmax(seen, axis=2).T], obs
    assert len({deck.tobytes() for deck in decks}) == 3 * num_envs


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("RepeatLast", "{}", ["RepeatLast", *STEPS]),
        ("AutoencodeEasy", '{"num_cards": 18}', ["num_cards=18", "4 kinds"]),
        ("AutoencodeEasy", '{"num_cards": 0}', ["num_cards=0", "4 kinds"]),
        ("RepeatPreviousEasy", '{"k": 52}', ["k=52", "num_cards=52"]),
        ("RepeatPreviousEasy", '{"k": 0}', ["k=0"]),
        ("RepeatFirstEasy", '{"k": 3}', ["'k'"]),
    ],
)
def test_what_does_not_exist_is_named(name, kwargs, words, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo.make_env(f"memory::{name}", 2, env_kwargs=kwargs)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in words), error


# --- With POPGym ----------------------------------------------------------------------------------


class Dealer:
    """In the place of POPGym's random numbers: deals cards, [n] or [2, n], the first one first."""

    def __init__(self, cards, kinds):
        self.decks, self.kinds = list(np.atleast_2d(cards)), kinds  # kinds [n], of POPGym's cards

    def shuffle(self, idx):
        places = np.argsort(self.decks.pop(0)[::-1], kind="stable")  # POPGym deals from the end
        idx[places] = np.argsort(self.kinds[: len(idx)], kind="stable")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["random", "right"])
@pytest.mark.parametrize(
    "name, kwargs",
    [*((name, {}) for name in STEPS), ("AutoencodeEasy", {"num_cards": 16})]
    + [("RepeatPreviousEasy", {"k": 8}), ("RepeatPreviousEasy", {"k": 1})],
)
def test_card_for_card_as_in_popgym(name, kwargs, kind):
    popgym = pytest.importorskip("popgym.envs", reason="pip install popgym")
    length = 31 if "num_cards" in kwargs else STEPS[name]
    if kind == "right":
        actions = right_actions(name, 3, length=length, **kwargs)
    else:
        num_actions = task(name, **kwargs)[2]
        actions = np.random.default_rng(1).integers(0, num_actions, (length, 3)).astype(np.int32)
    cards, *ours = episodes(name, actions, **kwargs)
    for b in range(3):
        if "k" in kwargs:
            env = popgym.RepeatPrevious(**kwargs)
        else:
            env = getattr(popgym, name)()
        assert env.action_space.n == task(name, **kwargs)[2]
        deck = env.value_deck if "Count" in name else env.deck
        deck.num_cards = kwargs.get("num_cards", deck.num_cards)  # no fewer than 52 by itself
        kinds = env.deck_idx_type if "Count" in name else deck.suits_idx
        env.np_random = Dealer(cards[b], kinds)
        flat = functools.partial(gymnasium.spaces.flatten, env.observation_space)
        obs, reward, terminated = [x[:, b] for x in ours]
        np.testing.assert_array_equal(obs[0], flat(env.reset()[0]))
        total = 0.0
        for t, action in enumerate(actions[:, b]):
            their_obs, their_reward, *their_ends, _ = env.step(action)
            np.testing.assert_array_equal(obs[t + 1], flat(their_obs), err_msg=f"{t}")
            np.testing.assert_allclose(reward[t], their_reward, rtol=1e-6, err_msg=f"{t}")
            assert (terminated[t], False) == tuple(their_ends), t
            total += their_reward
        assert terminated[-1] and (kind == "random" or np.isclose(total, 1.0))
