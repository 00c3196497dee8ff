import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cjepa_hf
from cjepa_hf.simulators import collisions
from cjepa_hf.simulators.collisions import (
    COLORS,
    GROUND_FRICTION,
    MATERIALS,
    RADIUS,
    SHAPES,
    TOTAL_FRAMES,
    VISIBLE_FRAMES,
    CollisionObject,
    CollisionWorld,
    sample_scene,
)


def thing(position, velocity=(0.0, 0.0), shape="sphere", color="red", material="metal", **more):
    return CollisionObject(shape, color, material, position, velocity, **more)


def crowd(seed):
    """Six objects that meet in the middle: many contacts, some at once."""
    random = np.random.default_rng(seed)
    kinds = [(s, c, m) for s in SHAPES for c in COLORS for m in MATERIALS]
    chosen = [kinds[k] for k in random.choice(len(kinds), 6, replace=False)]
    places = 1.2 * np.stack([np.cos(np.arange(6) * math.pi / 3), np.sin(np.arange(6) * math.pi / 3)], axis=1)
    velocities = -0.5 * places + random.uniform(-0.3, 0.3, (6, 2))
    return CollisionWorld([CollisionObject(*kind, *start) for kind, *start in zip(chosen, places, velocities)])


@pytest.fixture(scope="module")
def scenes():
    outcomes = {}
    return [sample_scene(np.random.default_rng(seed), outcomes) for seed in range(4)], outcomes


def arrays(episode):
    return episode.positions, episode.angles, episode.velocities, episode.angular_velocities


def test_the_same_start_gives_the_same_bits():
    for seed in range(5):
        first, again = crowd(seed).simulate(), crowd(seed).simulate()
        assert first.collisions == again.collisions and len(first.collisions) > 2
        assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays(first), arrays(again)))


def test_a_world_stored_as_json_replays_to_the_same_bits_in_another_process(tmp_path):
    world, path = crowd(3), tmp_path / "world.json"
    path.write_text(json.dumps(world.to_dict()))
    assert CollisionWorld.from_dict(json.loads(path.read_text())).objects == world.objects
    # the package without its __init__, which imports torch
    code = (
        "import sys, types, json, hashlib; m = sys.modules['cjepa_hf'] = types.ModuleType('cjepa_hf'); "
        "m.__path__ = [sys.argv[2]]; from cjepa_hf.simulators.collisions import CollisionWorld; "
        "e = CollisionWorld.from_dict(json.load(open(sys.argv[1]))).simulate(); "
        "print(hashlib.sha256(e.states.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code, path, Path(cjepa_hf.__file__).parent]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == hashlib.sha256(world.simulate().states.tobytes()).hexdigest()


def test_without_an_object_everything_is_identical_to_the_bit_until_its_first_contact():
    changed = 0
    for seed in range(8):
        world = crowd(seed)
        episode = world.simulate()
        for gone in world.ids:
            rest = world.without(gone).simulate()
            first = min((c.frame for c in episode.collisions if gone in c.pair), default=TOTAL_FRAMES - 1)
            kept = [k for k in world.ids if k != gone]
            assert rest.ids == tuple(kept)
            for a, b in zip(arrays(episode), arrays(rest)):
                np.testing.assert_array_equal(a[: first + 1, kept], b[: first + 1])
            earlier = [c for c in episode.collisions if c.frame < first]
            assert [c for c in rest.collisions if c.frame < first] == earlier
            changed += not np.array_equal(episode.positions[-1, kept], rest.positions[-1])
    assert changed > 40  # of 48: removing does something


def test_with_state_changes_one_start_and_keeps_the_others():
    world = CollisionWorld([thing((-1, 0), (1.0, 0)), thing((1, 0), color="blue")])
    moved = world.with_state(1, position=(1.0, 1.5))
    assert moved.objects[0] == world.objects[0] and moved.objects[1].position == (1.0, 1.5)
    assert world.simulate().pairs() == {(0, 1)} and moved.simulate().pairs() == set()
    assert world.with_state(0, velocity=(0, 0)).simulate().pairs() == set()


@pytest.mark.parametrize("shape", SHAPES)
def test_friction_of_the_ground_brings_an_object_to_exact_rest_where_physics_says(shape):
    loss, speed = GROUND_FRICTION[shape], 0.2
    world = CollisionWorld([thing((-2, 0), (speed, 0), shape=shape, angular_velocity=-1.0)])
    episode = world.simulate()
    stop = math.ceil(speed / loss * 25)
    assert (episode.velocities[stop + 1 :] == 0).all() and (episode.velocities[: stop - 1, 0, 0] > 0).all()
    assert (episode.positions[stop + 1 :] == episode.positions[-1]).all()
    assert episode.positions[-1, 0, 0] + 2 == pytest.approx(speed**2 / (2 * loss), abs=speed / 25)
    assert episode.angular_velocities[-1, 0] == 0 and episode.angles[-1, 0] == pytest.approx(-0.5, abs=0.03)


@pytest.mark.parametrize(
    ("materials", "restitution"), [(("metal", "metal"), 0.9025), (("metal", "rubber"), 0.76), (("rubber",) * 2, 0.64)]
)
def test_a_head_on_collision_keeps_momentum_and_loses_what_the_materials_say(materials, restitution):
    objects = [thing((-0.5, 0), (1.0, 0), material=materials[0]), thing((0.5, 0), material=materials[1], color="blue")]
    episode = CollisionWorld(objects).simulate(40)
    (collision,) = episode.collisions
    assert (
        collision.pair == (0, 1)
        and pytest.approx(np.diff(episode.positions[collision.frame, :, 0])[0], abs=0.05) == 2 * RADIUS
    )
    before, after = episode.velocities[collision.frame, :, 0], episode.velocities[collision.frame + 1, :, 0]
    assert after.sum() == pytest.approx(before.sum(), abs=0.01)
    assert after[1] - after[0] == pytest.approx(restitution * before[0], rel=0.02)
    assert collision.impulse == pytest.approx((1 + restitution) * before[0] / 2, rel=0.02)
    assert collision.location == pytest.approx((episode.positions[collision.frame, :, 0].mean(), 0), abs=0.05)


def test_a_collision_is_dated_by_the_frame_before_it():
    episode = CollisionWorld([thing((-1, 0), (1.0, 0)), thing((1, 0), color="blue")]).simulate()
    frame = episode.collisions[0].frame
    np.testing.assert_array_equal(episode.velocities[: frame + 1, 1], 0)
    assert episode.velocities[frame + 1, 1, 0] > 0


def test_contacts_that_begin_again_at_once_are_one_collision():
    contacts = collisions._Contacts()
    contacts.found = [[10, (0, 1), (0, 0), 0.3], [14, (0, 1), (0, 0), 0.1], [21, (0, 1), (0, 0), 0.1]]
    contacts.found += [[22, (1, 2), (0, 0), 0.2], [40, (0, 1), (0, 0), 0.2]]
    assert [(c.frame, c.pair, c.impulse) for c in contacts.merged()] == [
        (10, (0, 1), 0.3), (22, (1, 2), 0.2), (40, (0, 1), 0.2)
    ]  # fmt: skip


def test_sampled_scenes_pass_their_filters(scenes):
    for scene in scenes[0]:
        world, episode = scene.world, scene.episode
        assert 3 <= len(world.ids) <= 6 and len({o.description for o in world.objects}) == len(world.ids)
        seen, visible = episode.in_view[:VISIBLE_FRAMES], [c for c in episode.collisions if c.frame < VISIBLE_FRAMES]
        assert 1 <= len(visible) <= 4 and (seen.sum(axis=0) >= 12).all()
        assert len({c.pair for c in episode.collisions}) == len(episode.collisions)
        for c in visible:
            assert c.frame >= 6 and c.impulse >= 0.05
            places = np.abs(episode.positions[c.frame, list(c.pair)])
            assert (places < np.array([3.0, 2.0]) - RADIUS).all()
        noisy = world.perturbed(np.random.default_rng(9), 1e-4).simulate()
        assert noisy.pairs(0, VISIBLE_FRAMES) == episode.pairs(0, VISIBLE_FRAMES)
        for gone, rest in scene.removals.items():
            assert gone not in rest.ids and len(rest.positions) == VISIBLE_FRAMES
            for pair in scene.unsure[gone]:
                assert gone not in pair


def test_sampling_depends_on_the_generator_alone(scenes):
    again = sample_scene(np.random.default_rng(2))
    assert again.world.objects == scenes[0][2].world.objects and again.unsure == scenes[0][2].unsure
    assert len({scene.world.objects for scene in scenes[0]}) == len(scenes[0])


def test_outcomes_of_candidates_are_counted(scenes):
    assert scenes[1]["accepted"] == 4 and scenes[1]["object accepted"] >= 12


def test_noise_that_changes_what_meets_rejects_a_scene():
    near = collisions.CUBE_SIDE / 2 + RADIUS
    graze = CollisionWorld([thing((-2, near - 0.0002), (1.0, 0)), thing((0, 0), color="blue", shape="cube")])
    hit = CollisionWorld([thing((-2, 0.1), (1.0, 0)), thing((0, 0), color="blue", shape="cube")])
    fault = [collisions._scene_fault(w, w.simulate(), np.random.default_rng(1)) for w in (graze, hit)]
    assert fault[0] is not None
    assert fault[1] in (None, "nothing happens after the video (half of these)")


def test_states_keep_every_object_at_the_place_of_its_id():
    world = CollisionWorld(
        [thing((-1, 0), (1.0, 0.5)), thing((1, 0), color="blue", shape="cube", angle=0.4)], ids=[4, 1]
    )
    states = world.simulate(3).states.reshape(3, 6, 10)
    np.testing.assert_array_equal(states[0, :, 0], [0, 1, 0, 0, 1, 0])
    np.testing.assert_allclose(states[0, 4], [1, -1, 0, 0, 1.0, 0.5, 0, 0, 1, 0])
    np.testing.assert_allclose(states[0, 1], [1, 1, 0, 0.4, 0, 0, 0, 2, 2, 0])
    assert (states[:, [0, 2, 3, 5]] == 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: thing((0, 0), shape="cone"), "shape='cone'"),
        (lambda: thing((0, math.nan)), "position"),
        (lambda: thing((0, 0), (1.0,)), "velocity"),
        (lambda: CollisionWorld([]), "0 objects"),
        (lambda: CollisionWorld([thing((k, 0)) for k in range(7)]), "7 objects"),
        (lambda: CollisionWorld([thing((0, 0)), thing((0.3, 0))]), "objects 0 .* and 1 .* overlap"),
        (lambda: CollisionWorld([thing((0, 0)), thing((1, 0))], ids=[2, 2]), "different"),
        (lambda: CollisionWorld([thing((0, 0))], ids=[6]), "from 0 to 5"),
        (lambda: CollisionWorld([thing((0, 0))]).without(3), "no object 3"),
        (lambda: CollisionWorld([thing((0, 0))]).without(0), "only one"),
        (lambda: CollisionWorld([thing((0, 0))]).with_state(0, speed=1), "unknown changes"),
        (lambda: CollisionWorld([thing((0, 0))]).simulate(0), "num_frames"),
        (lambda: CollisionWorld.from_dict({"objects": []}), "not a collision world"),
        (lambda: CollisionWorld.from_dict({"physics_version": 99, "objects": []}), "physics_version 99"),
    ],
)
def test_bad_worlds_are_refused_with_the_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()
