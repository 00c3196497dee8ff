import math
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from cjepa_hf.simulators import push_t, register_envs
from cjepa_hf.simulators.push_t import (
    CONTACT_PAIRS,
    PushTEnv,
    PushTWorld,
    block_distance,
    push_t_success,
    random_states,
    state_errors,
)
from cjepa_hf.simulators.rendering import block_vertices, render_push_t

AT_REST = (100.0, 100.0, 256.0, 300.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "data" / "push_t_golden.npz") as file:
        return dict(file)


def roll(world, actions):
    return np.array([world.step(action) for action in actions])


def test_golden_episodes_are_reproduced(golden):
    for k, episode in enumerate(golden["episode"]):
        # the peers compute in float32 when the action is float32 (episodes 12 to 15)
        tolerance = 1e-3 if 12 <= episode <= 15 else 1e-9
        world = PushTWorld()
        world.set_state(golden["initial_state"][k], golden["initial_block_velocity"][k])
        for t in range(40):
            state = world.step(golden["actions"][k, t])
            np.testing.assert_allclose(state, golden["states"][k, t], rtol=0, atol=tolerance)
            np.testing.assert_allclose(world.block_velocity, golden["block_velocity"][k, t], rtol=0, atol=tolerance)
            # the peers count contact points between agent and block and between block and walls
            touched = world.contacts[0] or world.contacts[2]
            assert touched == (golden["raw_contact_points"][k, t] > 0), (episode, t)


def test_golden_resets_rewards_and_terminations_are_reproduced(golden):
    env = PushTEnv()
    for k, episode in enumerate(golden["episode"]):
        if 12 <= episode <= 15:
            continue
        options = {"state": golden["reset_state"][k], "goal_state": golden["goal_state"][k]}
        observation, _ = env.reset(options=options)
        if episode not in (17, 18):  # there the peers' goal leaks its block velocity into the start
            np.testing.assert_array_equal(observation["state"], golden["initial_state"][k])
        env.set_state(golden["initial_state"][k], golden["initial_block_velocity"][k])
        for t in range(40):
            _, reward, terminated, truncated, _ = env.step(golden["actions"][k, t])
            assert reward == pytest.approx(golden["reward"][k, t], abs=1e-9)
            assert terminated == golden["terminated"][k, t] and not truncated


def test_success_equals_both_rulings_of_the_peers(golden):
    goal, state = golden["eval_goal"], golden["eval_state"]
    np.testing.assert_array_equal(push_t_success(goal, state), golden["eval_success_head"])
    np.testing.assert_array_equal(push_t_success(goal, state, "peers"), golden["eval_success"])
    assert (golden["eval_success"] != golden["eval_success_head"]).any()  # they do differ in these data


def test_state_errors_broadcast_and_wrap():
    goals = np.tile(AT_REST, (3, 1, 1))
    states = np.tile(AT_REST, (1, 4, 1))
    states[..., 0] += 3.0
    states[..., 3] -= 4.0
    states[..., 4] = 2 * math.pi - 0.1
    position, angle = state_errors(goals, states)
    np.testing.assert_allclose(position, np.full((3, 4), 5.0))
    np.testing.assert_allclose(angle, np.full((3, 4), 0.1))
    states[..., 4] = 4 * math.pi + 0.2
    np.testing.assert_allclose(state_errors(goals, states)[1], np.full((3, 4), 0.2))
    with pytest.raises(ValueError, match="angle_rule"):
        state_errors(goals, states, "mod")
    with pytest.raises(ValueError, match=">=5"):
        state_errors(goals[..., :4], states)


@pytest.mark.parametrize(
    ("state", "action", "expected"),
    [
        (AT_REST, (0.1, 0.1), ()),
        ((256, 270, 256, 300, 0, 0, 0), (0.0, 0.3), ("agent_block",)),
        ((40, 100, 256, 300, 0, 0, 0), (-0.5, 0.0), ("agent_wall",)),
        # the T lies on its side, its bar 3 px from the left wall, the agent pushes it there
        ((80, 300, 10, 256, -math.pi / 2, 0, 0), (0.0, 0.0), ()),
        ((60, 300, 10, 256, -math.pi / 2, 0, 0), (-0.1, 0.0), ("agent_block", "block_wall")),
        # the bar overlaps the wall by 1 px; the agent is far away
        ((400, 100, 6, 256, -math.pi / 2, 0, 0), (0.0, 0.0), ("block_wall",)),
        ((490, 100, 6, 256, -math.pi / 2, 0, 0), (0.3, 0.0), ("agent_wall", "block_wall")),
    ],
)
def test_contacts_of_every_pair_are_recorded(state, action, expected):
    world = PushTWorld(state)
    touched = set()
    for _ in range(3):
        world.step(action)
        touched |= {pair for pair, touches in zip(CONTACT_PAIRS, world.contacts) if touches}
    assert touched == set(expected)


def test_contacts_last_as_long_as_the_bodies_touch():
    world = PushTWorld((256, 284, 256, 300, 0, 0, 0))
    for _ in range(10):
        before = world.state
        state = world.step((0.0, 0.1))
        assert world.contacts == (True, False, False) and state[3] > before[3]
    for _ in range(3):  # comes to a halt, then leaves
        world.step((0.0, -0.3))
    assert world.contacts == (False, False, False)
    # touching a wall without moving: a contact that began long ago
    world = PushTWorld((18, 100, 256, 300, 0, 0, 0))
    for _ in range(5):
        world.step((0.0, 0.0))
        assert world.contacts == (False, True, False)
    world.set_state(AT_REST)
    assert world.contacts == (False, False, False)


def test_set_state_forgets_everything_and_replays_bit_for_bit():
    rng = np.random.default_rng(0)
    for state in random_states(5, rng):
        actions = rng.uniform(-0.6, 0.6, (30, 2)) + 0.004 * (state[2:4] - state[:2])
        world = PushTWorld(state)
        first = roll(world, actions)
        roll(world, actions)  # other contacts, other velocities
        world.set_state(state)
        np.testing.assert_array_equal(world.state, state)
        np.testing.assert_array_equal(roll(world, actions), first)
        assert not np.array_equal(first[0, 2:5], first[-1, 2:5])  # the block was pushed


def test_set_state_sets_exactly_and_says_so():
    state, velocity = np.array([100.5, 30.25, 200.0, 260.0, 5.5, -20.0, 7.0]), np.array([3.0, -4.0, 0.5])
    world = PushTWorld()
    world.set_state(state, velocity)
    np.testing.assert_allclose(world.state, state, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(world.block_velocity, velocity)
    world.set_state((*state[:4], -1.0, 0, 0))
    assert world.state[4] == pytest.approx(2 * math.pi - 1.0)


def test_settling_clears_the_block_velocity_and_parts_overlapping_bodies():
    world = PushTWorld((256, 290, 256, 300, 0, 10.0, 0))
    state = world.settle()
    np.testing.assert_array_equal(world.block_velocity, np.zeros(3))
    assert state[0] == pytest.approx(256.1) and state[5] == 10.0
    for _ in range(20):
        state = world.step((0.0, 0.0))
    assert state[3] > 304.5


def test_fast_physics_calls_equal_the_public_ones():
    rng = np.random.default_rng(1)
    fast, public = PushTWorld(), PushTWorld()
    for state in random_states(3, rng):
        actions = rng.uniform(-0.5, 0.5, (20, 2)) + 0.004 * (state[2:4] - state[:2])
        fast.set_state(state)
        public.set_state(state)
        public._set_velocity, public._advance = partial(setattr, public._agent, "velocity"), public._space.step
        np.testing.assert_array_equal(roll(fast, actions), roll(public, actions))
        # the agent's motion is summed beside pymunk's, to the same bits
        assert tuple(fast._agent.position) == tuple(fast.state[:2])
        assert tuple(fast._agent.velocity) == tuple(fast.state[5:])


@pytest.mark.parametrize("state", [np.zeros(6), np.zeros((1, 7)), (np.nan,) * 7, (np.inf, *AT_REST[1:])])
def test_bad_states_are_refused_and_change_nothing(state):
    world = PushTWorld(AT_REST)
    with pytest.raises(ValueError, match="state"):
        world.set_state(state)
    with pytest.raises(ValueError, match="block_velocity"):
        world.set_state(AT_REST, (0.0, np.nan, 0.0))
    np.testing.assert_array_equal(world.state, AT_REST)


@pytest.mark.parametrize("action", [(0.1,), (0.1, 0.2, 0.3), (np.nan, 0.0), (0.0, np.inf), None, 0.5, ("a", "b")])
def test_bad_actions_are_refused_and_change_nothing(action):
    world = PushTWorld(AT_REST)
    with pytest.raises(ValueError, match="expected 2"):
        world.step(action)
    np.testing.assert_array_equal(world.state, AT_REST)


def test_random_states_lie_free_on_the_table():
    states = random_states(500, np.random.default_rng(0))
    assert ((states[:, :2] >= 50) & (states[:, :2] <= 450)).all()
    assert ((states[:, 2:4] >= 120) & (states[:, 2:4] <= 390)).all()
    assert (block_distance(states) > 15).all()
    corners = block_vertices(states[:, 2:5])
    assert corners.min() > 7 and corners.max() < 504
    for state in states[:50]:  # free: settling moves nothing
        world = PushTWorld(state)
        np.testing.assert_allclose(world.settle(), state, rtol=0, atol=1e-9)


def test_block_distance_is_the_distance_to_the_t():
    states = [(*agent, 256, 300, math.pi / 2, 0, 0) for agent in ((241, 256), (156, 300), (256, 340), (276, 300))]
    # turned by 90 degrees the bar lies at x 226..256, y 240..360 and the stem at x 136..226, y 285..315
    np.testing.assert_allclose(block_distance(np.array(states)), [0, 0, 0, 20], atol=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arguments", [{}, {"pixels": True, "render_mode": "rgb_array", "resolution": 48}])
def test_the_registered_environment_passes_gymnasiums_checks(arguments):
    register_envs()
    register_envs()
    env = gymnasium.make("cjepa_hf/PushT-v0", **arguments)
    assert isinstance(env.unwrapped, PushTEnv)
    check_env(env.unwrapped)


def test_observation_info_and_goal_image():
    env = PushTEnv(render_mode="rgb_array", resolution=64, pixels=True)
    goal = (400.0, 400.0, 200.0, 200.0, 1.0, 0.0, 0.0)
    observation, info = env.reset(options={"state": AT_REST, "goal_state": goal})
    np.testing.assert_array_equal(observation["state"], AT_REST)
    np.testing.assert_array_equal(info["goal"], render_push_t(np.array(goal), resolution=64)[0])
    np.testing.assert_array_equal(observation["pixels"], render_push_t(np.array(AT_REST), resolution=64)[0])
    np.testing.assert_array_equal(env.render(), observation["pixels"])
    np.testing.assert_array_equal(info["goal_state"], goal)
    observation, _, _, _, info = env.step(np.array([0.2, -0.1], dtype=np.float32))
    np.testing.assert_array_equal(observation["proprio"], observation["state"][[0, 1, 5, 6]])
    position, angle = state_errors(np.array(goal), observation["state"])
    assert (info["position_error"], info["angle_error"]) == (position, angle) and info["success"] is False
    assert info["contacts"] == dict.fromkeys(CONTACT_PAIRS, False)


def test_success_terminates_the_episode():
    env = PushTEnv()
    near = np.add(AT_REST, (8, 0, 9, 0, 0.1, 0, 0))
    env.reset(options={"state": AT_REST, "goal_state": near})
    _, _, terminated, _, info = env.step((0.0, 0.0))
    assert terminated and info["success"]
    env.reset(options={"state": AT_REST, "goal_state": np.add(near, (0, 0, 0, 0, 0.3, 0, 0))})
    _, _, terminated, _, info = env.step((0.0, 0.0))
    assert not terminated and not info["success"]


def test_seeds_reproduce_episodes_and_given_starts_keep_the_goal():
    env, other = PushTEnv(), PushTEnv()
    observation, info = env.reset(seed=3)
    again, info_again = other.reset(seed=3)
    np.testing.assert_array_equal(observation["state"], again["state"])
    np.testing.assert_array_equal(info["goal_state"], info_again["goal_state"])
    assert not np.array_equal(env.reset()[0]["state"], observation["state"])
    _, info_given = env.reset(seed=3, options={"state": AT_REST})
    np.testing.assert_array_equal(info["goal_state"], info_given["goal_state"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": AT_REST}, "unknown reset options"),
        ({"state": AT_REST[:5]}, "shape"),
        ({"goal_state": (np.nan, *AT_REST[1:])}, "NaN"),
        ({"goal_state": (600.0, *AT_REST[1:])}, "outside the table"),
        ({"state": (*AT_REST[:3], -1.0, *AT_REST[4:])}, "outside the table"),
    ],
)
def test_bad_reset_options_are_refused(options, message):
    env = PushTEnv()
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_bad_settings_and_stepping_before_reset_are_refused():
    for arguments in ({"render_mode": "human"}, {"style": "flat"}, {"angle_rule": "x"}, {"goal_pose": (1.0, 2.0)}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            PushTEnv(**arguments)
    with pytest.raises(ValueError, match="reset"):
        PushTEnv().step((0.0, 0.0))


def test_state_names_and_proprioception_agree():
    assert [push_t.STATE_NAMES[i] for i in push_t.PROPRIO_INDICES] == ["agent_x", "agent_y", "agent_vx", "agent_vy"]
