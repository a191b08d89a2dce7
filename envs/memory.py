"""memory::RepeatFirstEasy, RepeatPreviousMedium, AutoencodeHard, CountRecallEasy, ...

Card games that need a memory, each in three sizes, by the rules of POPGym (Morad et al. 2023,
arXiv:2303.01859) but written here: nothing to install. Observations are one-hot.

    game            probes             observation          steps: Easy, Medium, Hard
    RepeatFirst     holding one item   suit [4]             51, 415, 831
    RepeatPrevious  a queue            suit [4]             51, 103, 155
    Autoencode      capacity, order    mode, suit [2 + 4]   103, 207, 311
    CountRecall     accumulating       card, query [K + K]  51, 103, 207

RepeatFirst asks for the episode's first suit. RepeatPrevious asks for the suit of k - 1 steps ago,
once there is one: k = 4, 32, 64. Autoencode shows a deck in mode 1, its last card in mode 0; from
this step on it asks for the suits in reverse, one a step, and shows suit 0. CountRecall asks how
many cards of the query's kind were dealt, the one in view too; K = 2 colours, 4 suits, 13 ranks.

Each of the n steps that ask pays 1/n or -1/n: 1 at best, -.5 by guessing (CountRecall, with 27, 27
and 17 actions: -.93, -.93, -.88). The last card ends an episode (terminated). --env-kwargs:
num_cards, a multiple of the kinds (POPGym: of 52); k for RepeatPrevious; kinds (K) for CountRecall.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Game(NamedTuple):
    """`cards` is what `shuffle` gives; t counts the steps from 0."""

    num_actions: int
    first: int  # the first step that asks
    length: int  # of an episode
    shuffle: Callable  # key -> cards
    observe: Callable  # cards, t -> obs
    answer: Callable  # cards, t -> the right action


def shuffled(num_cards, kinds, key):
    """-> cards [n], the kind of each, in the order in which they are dealt."""
    if num_cards < kinds or num_cards % kinds:
        raise ValueError(f"num_cards={num_cards} must be a multiple of the {kinds} kinds of cards")
    return jax.random.permutation(key, jnp.arange(num_cards) % kinds)


def repeat_first(num_cards):
    observe = lambda cards, t: jax.nn.one_hot(cards[t], 4)
    answer = lambda cards, t: cards[0]
    return Game(4, 0, num_cards - 1, partial(shuffled, num_cards, 4), observe, answer)


def repeat_previous(num_cards, k):
    if not 1 <= k < num_cards:
        raise ValueError(f"k={k} must be at least 1 and less than num_cards={num_cards}")
    observe = lambda cards, t: jax.nn.one_hot(cards[t], 4)
    answer = lambda cards, t: cards[t - k + 1]
    return Game(4, k - 1, num_cards - 1, partial(shuffled, num_cards, 4), observe, answer)


def autoencode(num_cards):
    last = num_cards - 1

    def observe(cards, t):
        mode, suit = jnp.int32(t < last), jnp.where(t <= last, cards[t], 0)
        return jnp.concatenate([jax.nn.one_hot(mode, 2), jax.nn.one_hot(suit, 4)])  # [2 + 4]

    answer = lambda cards, t: cards[2 * last - t]
    return Game(4, last, last + num_cards, partial(shuffled, num_cards, 4), observe, answer)


def count_recall(num_cards, kinds):
    shuffle_one = partial(shuffled, num_cards, kinds)
    shuffle = lambda key: jax.vmap(shuffle_one)(jax.random.split(key))  # [2, n], dealt and asked
    observe = lambda cards, t: jax.nn.one_hot(cards[:, t], kinds).ravel()  # [2 K]

    def answer(cards, t):
        dealt, query = cards[0], cards[1, t]
        return jnp.sum((dealt == query) & (jnp.arange(num_cards) <= t))

    return Game(num_cards // kinds + 1, 0, num_cards - 1, shuffle, observe, answer)


TASKS = {
    "RepeatFirstEasy": partial(repeat_first, num_cards=52),
    "RepeatFirstMedium": partial(repeat_first, num_cards=8 * 52),
    "RepeatFirstHard": partial(repeat_first, num_cards=16 * 52),
    "RepeatPreviousEasy": partial(repeat_previous, num_cards=52, k=4),
    "RepeatPreviousMedium": partial(repeat_previous, num_cards=2 * 52, k=32),
    "RepeatPreviousHard": partial(repeat_previous, num_cards=3 * 52, k=64),
    "AutoencodeEasy": partial(autoencode, num_cards=52),
    "AutoencodeMedium": partial(autoencode, num_cards=2 * 52),
    "AutoencodeHard": partial(autoencode, num_cards=3 * 52),
    "CountRecallEasy": partial(count_recall, num_cards=52, kinds=2),
    "CountRecallMedium": partial(count_recall, num_cards=2 * 52, kinds=4),
    "CountRecallHard": partial(count_recall, num_cards=4 * 52, kinds=13),
}


def make(name, **kwargs):
    if name not in TASKS:
        raise ValueError(f"{name} is none of {', '.join(TASKS)}")
    game = TASKS[name](**kwargs)

    def reset(key):
        state = cards, t = game.shuffle(key), jnp.int32(0)
        return game.observe(cards, t), state

    def step(key, state, action):
        cards, t = state
        sign = jnp.where(action == game.answer(cards, t), 1.0, -1.0)
        reward = jnp.where(t >= game.first, sign / (game.length - game.first), 0.0)
        return game.observe(cards, t + 1), (cards, t + 1), reward, t + 1 == game.length, False

    return reset, step, game.num_actions
