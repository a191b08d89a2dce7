"""a2c.py: the loss. (What it shares with ppo.py is tested there; tests/copies.py keeps it shared.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import real_env, small_args

import a2c


def make_batch(args):
    env = real_env("a2c")
    state = jax.jit(a2c.make_train(args, env)[0])(jax.random.key(0))
    _, batch = a2c.rollout(state.agent, env, state.acting, jax.random.key(1), args.num_steps)
    advantages, returns = jax.random.normal(jax.random.key(2), (2, *batch.value.shape))
    return state.agent, batch, advantages, returns


def test_the_policy_s_gradient_is_the_advantage_times_that_of_the_log_prob():
    """Section 4 of the paper, summed by hand over the steps."""
    args = small_args("a2c", ent_coef=0.0, vf_coef=0.0, norm_adv=False)
    agent, batch, advantages, returns = make_batch(args)
    grads = jax.grad(a2c.a2c_loss, has_aux=True)(agent, batch, advantages, returns, args)[0]
    logprob = lambda agent, obs, action: agent(obs)[0].log_prob(action)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    each = jax.vmap(jax.grad(logprob), (None, 0, 0))(agent, flat(batch.obs), flat(batch.action))
    by_hand = jax.tree.map(
        lambda g: -(flat(advantages).reshape(-1, *[1] * (g.ndim - 1)) * g).mean(axis=0), each
    )
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_critic_s_gradient_is_that_of_the_squared_error():
    args = small_args("a2c", ent_coef=0.0, vf_coef=0.7)
    agent, batch, advantages, returns = make_batch(args)
    zeros = jnp.zeros_like(advantages)
    loss, metrics = a2c.a2c_loss(agent, batch, zeros, returns, args)
    np.testing.assert_allclose(loss, 0.7 * 0.5 * ((batch.value - returns) ** 2).mean(), rtol=1e-4)
    assert metrics["losses/policy_loss"] == 0


def test_entropy_is_rewarded():
    args = small_args("a2c", ent_coef=0.3, vf_coef=0.0)
    agent, batch, advantages, returns = make_batch(args)
    loss, _ = a2c.a2c_loss(agent, batch, jnp.zeros_like(advantages), returns, args)
    np.testing.assert_allclose(loss, -0.3 * np.log(2), rtol=1e-3)  # two actions, nearly uniform


def test_the_loss_refuses_shapes_that_would_broadcast():
    args = small_args("a2c")
    agent, batch, advantages, returns = make_batch(args)
    with pytest.raises(AssertionError):
        a2c.a2c_loss(agent, batch, advantages[..., None], returns, args)
