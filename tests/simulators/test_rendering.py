import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cjepa_hf.simulators.push_t import block_distance, random_states
from cjepa_hf.simulators.rendering import (
    MAX_OBJECTS,
    OBJECT_RADIUS,
    OBJECT_STATE_NAMES,
    block_vertices,
    render_collisions,
    render_push_t,
)

STYLES = ("smooth", "aliased")
FAR_AWAY = -500.0


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "data" / "push_t_golden.npz") as file:
        return dict(file)


def states(count, seed=0):
    return random_states(count, np.random.default_rng(seed))


def pixel_grid(resolution):
    """[R * R, 2] table coordinates of the pixel centers, in the convention that pixel i of 512 is coordinate i."""
    centers = (np.arange(resolution) + 0.5) * 512 / resolution - 0.5
    return np.stack(np.meshgrid(centers, centers), axis=-1).reshape(-1, 2)


def inside_t(pose, resolution, margin):
    """[R, R] bool: pixel centers less than `margin` from the T (negative margin: that deep inside is not asked)."""
    points = pixel_grid(resolution)
    rows = np.concatenate([points, np.tile(pose, (len(points), 1))], axis=1)
    return (block_distance(rows) <= margin).reshape(resolution, resolution)


def test_peer_style_equals_the_peers_to_the_pixel_outside_contact_markers(golden):
    pytest.importorskip("pygame")
    for k, tag in enumerate(golden["frame_tag"]):
        pose = None if "notarget" in tag else golden["frame_goal_pose"][k]
        frame = render_push_t(golden["frame_state"][k], goal_pose=pose, resolution=224, style="peer")[0]
        different = (frame != golden["frames"][k]).any(axis=-1)
        if golden["frame_contacts"][k] == 0:
            assert not different.any(), tag
        else:  # red markers that the peers draw where bodies touch
            assert 1 <= different.sum() <= 6
            shift = golden["frames"][k][different].astype(int) - frame[different]
            assert (shift[:, 0] > shift[:, 2]).all()
    goal = render_push_t(golden["goal_image_state"], resolution=224, style="peer")[0]
    np.testing.assert_array_equal(goal, golden["goal_image"])


def test_peer_style_equals_gym_pusht_at_96_pixels(golden):
    pytest.importorskip("pygame")
    frame = render_push_t(golden["gym_frame_state"], resolution=96, style="peer")[0]
    assert (frame != golden["gym_frame"]).any(axis=-1).sum() <= 6


def test_aliased_style_is_close_to_the_peers_and_smooth_not_far(golden):
    for k in np.flatnonzero(golden["frame_contacts"] == 0):
        pose = None if "notarget" in golden["frame_tag"][k] else golden["frame_goal_pose"][k]
        peer = cv2.resize(golden["frames"][k], (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        error = {
            style: np.abs(render_push_t(golden["frame_state"][k], goal_pose=pose, style=style)[0] - peer).mean()
            for style in STYLES
        }
        assert error["aliased"] < 0.25 and error["smooth"] < 1.2, error


def test_peer_style_without_pygame_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ImportError, match=r"cjepa-hf\[peers\]"):
        render_push_t(states(1), style="peer")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resolution", [64, 96, 224])
def test_objects_land_where_they_should(style, resolution):
    goal = (330.0, 200.0, 2.0)
    for state in states(4, seed=resolution):
        empty = render_push_t(state, goal_pose=None, hide=("agent", "block"), resolution=resolution, style=style)[0]
        half = 512 / resolution / 2
        only = {
            "agent": render_push_t(state, goal_pose=None, hide=("block",), resolution=resolution, style=style)[0],
            "block": render_push_t(state, goal_pose=None, hide=("agent",), resolution=resolution, style=style)[0],
            "goal": render_push_t(state, goal_pose=goal, hide=("agent", "block"), resolution=resolution, style=style)[
                0
            ],
        }
        painted = {name: (frame != empty).any(axis=-1) for name, frame in only.items()}
        for name, pose in (("block", state[2:5]), ("goal", goal)):
            # 2 px of outline, a pixel of blur and rounding on each side
            assert not (painted[name] & ~inside_t(pose, resolution, 4 + 2 * half)).any()
            assert not (~painted[name] & inside_t(pose, resolution, 0)).any()
        distance = np.linalg.norm(pixel_grid(resolution) - state[:2], axis=1).reshape(resolution, resolution)
        assert not (painted["agent"] & (distance > 17 + 2 * half)).any()
        assert not (~painted["agent"] & (distance < 14)).any()
        # weighed by how far the color is from white, the agent's center is where the state says
        ink = 255.0 - only["agent"].min(axis=-1) - (255.0 - empty.min(axis=-1))
        center = (ink.reshape(-1, 1) * pixel_grid(resolution)).sum(axis=0) / ink.sum()
        np.testing.assert_allclose(center, state[:2], atol=0.75)


@pytest.mark.parametrize("style", STYLES)
def test_colors_are_the_peers(style):
    state = (400.0, 100.0, 150.0, 300.0, 0.0)
    frame = render_push_t(state, goal_pose=(350.0, 350.0, 0.0), resolution=512, style=style)[0]
    expected = {
        (400, 100): (78, 126, 255),
        (400, 113): (65, 105, 225),
        (150, 315): (143, 163, 184),
        (150, 300): (119, 136, 153),
        (150, 330): (119, 136, 153),
        (350, 365): (144, 238, 144),
        (5, 200): (211, 211, 211),
        (200, 506): (211, 211, 211),
        (250, 250): (255, 255, 255),
    }
    for (x, y), color in expected.items():
        assert tuple(frame[y, x]) == color, (x, y)


@pytest.mark.parametrize("style", STYLES)
def test_hide_removes_exactly_the_object(style):
    for state in states(8, seed=2):
        gone = {"agent": state.copy(), "block": state.copy()}
        gone["agent"][:2] = FAR_AWAY
        gone["block"][2:4] = FAR_AWAY
        for name, moved in gone.items():
            np.testing.assert_array_equal(
                render_push_t(state, hide=(name,), style=style), render_push_t(moved, style=style)
            )
        without = render_push_t(state, goal_pose=None, style=style)
        np.testing.assert_array_equal(render_push_t(state, hide=("goal",), style=style), without)
        np.testing.assert_array_equal(
            render_push_t(state, hide=("agent", "block", "goal", "walls"), style=style), np.full((1, 64, 64, 3), 255)
        )
        walls = render_push_t(state, hide=("agent", "block", "goal"), style=style)
        assert (walls[0, :, 0] < 255).any() and (walls[0, 2:-2, 2:-2] == 255).all()


@pytest.mark.parametrize("style", STYLES)
def test_drawing_order_is_goal_block_agent_walls(style):
    pile = (256.0, 256.0, 256.0, 241.0, 0.0)
    frame = render_push_t(pile, goal_pose=(256, 241, 0), resolution=512, style=style)[0]
    assert tuple(frame[256, 256]) == (78, 126, 255)
    assert tuple(frame[256, 300]) == (143, 163, 184)
    frame = render_push_t((5.0, 256.0, 256.0, 495.0, 0.0), goal_pose=(490, 100, 0), resolution=512, style=style)[0]
    assert tuple(frame[256, 5]) == tuple(frame[506, 256]) == tuple(frame[115, 506]) == (211, 211, 211)
    assert tuple(frame[256, 10]) == (78, 126, 255)


@pytest.mark.parametrize("style", STYLES)
def test_a_batch_equals_its_frames_one_by_one(style):
    rng = np.random.default_rng(0)
    batch = states(12)
    batch[::3, :2] = rng.uniform(0, 30, (4, 2))  # at the wall
    goals = np.column_stack([rng.uniform(20, 490, (12, 2)), rng.uniform(0, 6, 12)])
    single = [render_push_t(s, goal_pose=g, style=style)[0] for s, g in zip(batch, goals)]
    np.testing.assert_array_equal(render_push_t(batch, goal_pose=goals, style=style), single)
    shared = [render_push_t(s, goal_pose=goals[0], style=style)[0] for s in batch]
    np.testing.assert_array_equal(render_push_t(batch, goal_pose=goals[0], style=style), shared)
    np.testing.assert_array_equal(render_push_t(batch, goal_pose=goals[:1].repeat(12, 0), style=style), shared)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resolution", [4, 17, 64, 97, 257])
def test_any_resolution(style, resolution):
    frames = render_push_t(states(2), resolution=resolution, style=style)
    assert frames.shape == (2, resolution, resolution, 3) and frames.dtype == np.uint8
    assert render_push_t(np.zeros((0, 7)), resolution=resolution, style=style).shape == (0, resolution, resolution, 3)


def test_smooth_frames_move_with_fractions_of_a_pixel():
    state = np.array([256.0, 256.0, 100.0, 100.0, 0.0])
    moved = np.add(state, (0.5, 0, 0, 0, 0))
    assert (render_push_t(state) != render_push_t(moved)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": np.zeros((2, 4))}, ">=5"),
        ({"states": np.zeros((2, 3, 7))}, ">=5"),
        ({"states": np.full((1, 7), np.nan)}, "NaN"),
        ({"goal_pose": (1.0, 2.0)}, "goal_pose"),
        ({"goal_pose": np.zeros((3, 3))}, "goal_pose"),
        ({"goal_pose": (np.nan, 0, 0)}, "goal_pose"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": 64.5}, "resolution"),
        ({"hide": ("robot",)}, "hide"),
        ({"style": "pretty"}, "style"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_push_t(**{"states": states(2), **arguments})


def test_block_vertices_turn_and_grow():
    vertices = block_vertices(np.array([[100.0, 200.0, math.pi / 2]]))
    np.testing.assert_allclose(vertices[0, 0], [(100, 140), (100, 260), (70, 260), (70, 140)])
    grown = block_vertices(np.array([[0.0, 0.0, 0.0]]), margin=2)
    np.testing.assert_allclose(grown[0, 1], [(-17, 28), (17, 28), (17, 122), (-17, 122)])


def collision_state(*objects):
    """One state [60] from (x, y, angle, shape, color, material) per object."""
    state = np.zeros((MAX_OBJECTS, len(OBJECT_STATE_NAMES)))
    for place, (x, y, angle, *kind) in enumerate(objects):
        state[place] = [1, x, y, angle, 0, 0, 0, *kind]
    return state.reshape(-1)


@pytest.mark.parametrize("resolution", [64, (320, 480)])
def test_every_shape_color_and_material_looks_different(resolution):
    kinds = [(s, c, m) for s in range(3) for c in range(8) for m in range(2)]
    frames = render_collisions(np.stack([collision_state((0, 0, 0.3, *k)) for k in kinds]), resolution=resolution)
    shown = (frames != frames[0, 0, 0]).any(axis=(0, -1))  # pixels that some object covers
    flat = frames[:, shown].astype(np.int64)
    for i in range(1, len(kinds)):
        difference = np.abs(flat[:i] - flat[i]).sum(axis=-1).mean(axis=-1)  # of a pixel, over its channels
        assert difference.min() > 20, (kinds[i], kinds[difference.argmin()])


def test_collision_frames_show_objects_where_they_are():
    states = np.stack([collision_state((x, y, 0, 0, 1, 0)) for x, y in ((-2.5, -1.5), (2.5, 1.5), (0.0, 0.5))])
    frames = render_collisions(states)
    assert frames.shape == (3, 320, 480, 3) and frames.dtype == np.uint8
    for frame, (x, y) in zip(frames, ((40, 40), (440, 280), (240, 200))):
        rows, columns = np.nonzero((frame != frame[0, 479]).any(axis=-1))
        assert abs(columns.mean() + 0.5 - x) < 0.6 and abs(rows.mean() + 0.5 - y) < 0.6
        assert columns.max() - columns.min() == pytest.approx(2 * OBJECT_RADIUS * 80, abs=3)
    small = render_collisions(states[:1], resolution=64)[0]
    rows, columns = np.nonzero((np.abs(small.astype(int) - small[0, 63]) > 12).any(axis=-1))
    assert small.shape == (64, 64, 3) and abs(columns.mean() + 0.5 - 64 * 40 / 480) < 0.6
    assert abs(rows.mean() + 0.5 - 8) < 0.6


def test_hidden_absent_and_far_objects_are_not_drawn():
    state = collision_state((0, 0, 0, 2, 3, 1), (50.0, 0, 0, 1, 2, 0))
    empty = render_collisions(np.zeros(60), resolution=32)
    assert (empty == empty[0, 0, 0]).all()
    np.testing.assert_array_equal(render_collisions(state, resolution=32, hide=[0]), empty)
    assert (render_collisions(state, resolution=32) != empty).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": np.zeros((2, 7))}, r"\[n, 60\]"),
        ({"states": np.full(60, np.nan)}, "NaN"),
        ({"states": np.full(60, 9.0)}, "do not exist"),
        ({"states": np.zeros(60), "resolution": (2, 64)}, "resolution"),
        ({"states": np.zeros(60), "hide": [6]}, "hide"),
    ],
)
def test_collision_states_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_collisions(**arguments)
