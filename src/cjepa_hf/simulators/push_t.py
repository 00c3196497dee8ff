"""Push-T: a round agent pushes a T-shaped block; the physics of `swm/PushT-v1` and `gym-pusht`, on pymunk.

Lengths are pixels of a 512 x 512 table (x right, y down), angles radians, velocities pixels per second. The agent is
steered by a PD controller towards `agent + 100 * action`, is kinematic (walls do not stop it) and pushes the block
quasi-statically: the block's velocity is cleared in every substep, so it moves only while it is pushed.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pymunk

from cjepa_hf.simulators.rendering import (
    AGENT_RADIUS,
    BAR_VERTICES,
    GOAL_POSE,
    LINE_RADIUS,
    STEM_VERTICES,
    STYLES,
    TABLE_SIZE,
    WALL_SEGMENTS,
    block_vertices,
    render_push_t,
)

STATE_NAMES = ("agent_x", "agent_y", "block_x", "block_y", "block_angle", "agent_vx", "agent_vy")
PROPRIO_INDICES = (0, 1, 5, 6)
CONTACT_PAIRS = ("agent_block", "agent_wall", "block_wall")
POSITION_TOLERANCE = 20.0  # px, agent and block jointly
ANGLE_TOLERANCE = math.pi / 9

_AGENT, _BLOCK, _WALL = 1, 2, 3  # collision types
_DT = 0.01
_SUBSTEPS = 10
_ACTION_SCALE = 100.0
_K_P, _K_V = 100.0, 20.0
_TWO_PI = 2.0 * math.pi


class PushTWorld:
    """The simulator's core, without rendering or goals.

    Attributes:
        contacts: (agent_block, agent_wall, block_wall) bools, whether the pair touched during the last `step`;
            (False, False, False) after `set_state`.
    """

    def __init__(self, state: Sequence[float] = (256.0, 400.0, 256.0, 300.0, 0.0, 0.0, 0.0)):
        self.set_state(state)

    def set_state(self, state: Sequence[float], block_velocity: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """Put the world exactly into a state; what follows depends on nothing that was before.

        Args:
            state: [7] as `STATE_NAMES`.
            block_velocity: [3] the block's velocity (px/s) and angular velocity (rad/s), which the state leaves out
                and which are not zero right after a push. With what `block_velocity` said, a trajectory goes on
                closely (median 0.003 px after 10 steps when cut in the middle of a push) but not exactly: pymunk
                also remembers the last impulses of a lasting contact.

        Raises:
            ValueError: other shapes, NaN or infinite numbers.
        """
        ax, ay, bx, by, angle, avx, avy = _numbers(state, 7, "state")
        bvx, bvy, spin = _numbers(block_velocity, 3, "block_velocity")
        # Contacts persist in a pymunk space (impulses are warm-started from them): only a fresh one forgets.
        self._space, self._agent, self._block, self._touching, self._touched = _build()
        self._agent.velocity = (avx, avy)
        self._agent.position = (ax, ay)
        self._block.angle = angle  # before the position: it turns about the center of gravity, not the origin
        self._block.position = (bx, by)
        self._block.velocity = (bvx, bvy)
        self._block.angular_velocity = spin
        self._agent_motion = (ax, ay, avx, avy)
        self._set_velocity, self._advance = _fast_calls(self._space, self._agent)
        self.contacts = (False, False, False)

    @property
    def state(self) -> np.ndarray:
        """[7] float64 as `STATE_NAMES`, the angle in [0, 2 pi)."""
        ax, ay, avx, avy = self._agent_motion
        bx, by = self._block.position
        return np.array((ax, ay, bx, by, self._block.angle % _TWO_PI, avx, avy))

    @property
    def block_velocity(self) -> np.ndarray:
        """[3] float64: the block's velocity (px/s) and angular velocity (rad/s)."""
        return np.array((*self._block.velocity, self._block.angular_velocity))

    def step(self, action: Sequence[float]) -> np.ndarray:
        """Advance 0.1 s towards `agent + 100 * action` (px); returns the new state [7].

        The action [2] is meant to be in [-1, 1] but, as in the peers, not clipped.

        Raises:
            ValueError: an action of another shape, NaN or infinite.
        """
        try:
            dx, dy = action
            dx, dy = float(dx), float(dy)
        except (TypeError, ValueError):
            raise ValueError(f"action {action!r}: expected 2 numbers.") from None
        x, y, vx, vy = self._agent_motion
        target_x, target_y = x + _ACTION_SCALE * dx, y + _ACTION_SCALE * dy
        if not (-1e9 < target_x < 1e9 and -1e9 < target_y < 1e9):
            raise ValueError(f"action {action!r}: expected 2 finite numbers, normally in [-1, 1].")
        set_velocity, advance, touched = self._set_velocity, self._advance, self._touched
        touched[:] = False, False, False
        for substep in range(_SUBSTEPS):
            vx += (_K_P * (target_x - x) - _K_V * vx) * _DT
            vy += (_K_P * (target_y - y) - _K_V * vy) * _DT
            set_velocity((vx, vy))
            advance(_DT)
            # the same sum as pymunk's: nothing pushes a kinematic body
            x += vx * _DT
            y += vy * _DT
            if substep == 0:  # later contacts either go on from here or begin, and beginning is noted
                for pair in range(3):
                    touched[pair] = self._touching[pair] > 0
        self._agent_motion = (x, y, vx, vy)
        self.contacts = tuple(touched)
        bx, by = self._block.position
        return np.array((x, y, bx, by, self._block.angle % _TWO_PI, vx, vy))

    def settle(self) -> np.ndarray:
        """One physics substep (0.01 s) without control, as the peers do after setting a state; returns the state.

        It pushes overlapping bodies apart and moves the agent by its velocity. The block's velocity is cleared.
        """
        self._space.step(_DT)
        self._block.velocity, self._block.angular_velocity = (0.0, 0.0), 0.0
        self._agent_motion = (*self._agent.position, *self._agent.velocity)
        return self.state


def _build():
    """A fresh space with both bodies at the peers' initial poses; the poses decide the order of later contacts."""
    space = pymunk.Space()
    space.damping = 0.0
    walls = [pymunk.Segment(space.static_body, a, b, LINE_RADIUS) for a, b in WALL_SEGMENTS]
    agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
    agent.position = (256, 400)
    circle = pymunk.Circle(agent, AGENT_RADIUS)
    # twice the bar: the peers reckon the stem's moment from the bar's corners, and their T has always turned like that
    block = pymunk.Body(1.0, 2.0 * pymunk.moment_for_poly(1.0, BAR_VERTICES))
    bar, stem = pymunk.Poly(block, BAR_VERTICES), pymunk.Poly(block, STEM_VERTICES)
    block.center_of_gravity = (bar.center_of_gravity + stem.center_of_gravity) / 2
    block.position = (256, 300)
    for shapes, kind in (((circle,), _AGENT), ((bar, stem), _BLOCK), (walls, _WALL)):
        for shape in shapes:
            shape.collision_type = kind
    space.add(*walls)
    space.add(agent, circle)
    space.add(block, bar, stem)

    # How many shapes of each pair touch at the moment, and whether a contact has begun. Callbacks at the start and the
    # end of a contact cost nothing while it lasts.
    touching, touched = [0, 0, 0], [False, False, False]

    def begin(arbiter, space, pair):
        touching[pair] += 1
        touched[pair] = True

    def separate(arbiter, space, pair):
        touching[pair] -= 1

    for pair, (a, b) in enumerate(((_AGENT, _BLOCK), (_AGENT, _WALL), (_BLOCK, _WALL))):
        space.on_collision(a, b, begin=begin, separate=separate, data=pair)
    return space, agent, block, touching, touched


def _fast_calls(space, agent):
    """`agent.velocity = v` and `space.step(dt)` as functions.

    Twenty of them make one step. Calling Chipmunk directly leaves out checks of pymunk's that cannot fail here and
    doubles the speed.
    """
    try:
        from pymunk._chipmunk_cffi import lib

        return partial(lib.cpBodySetVelocity, agent._body), partial(lib.cpSpaceStep, space._space)
    except (ImportError, AttributeError):  # another pymunk: its public calls do the same
        return partial(setattr, agent, "velocity"), space.step


def _numbers(values, count, name):
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{name} has shape {array.shape}; expected [{count}].")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} {array.tolist()} has NaN or infinite numbers; expected {count} finite ones.")
    return array.tolist()


def state_errors(
    goal_state: np.ndarray, state: np.ndarray, angle_rule: str = "modulo"
) -> tuple[np.ndarray, np.ndarray]:
    """How far states are from goals: ([...] joint position error in px, [...] angle error in rad).

    Args:
        goal_state, state: [..., >=5], broadcast against each other. The position error is the Euclidean norm over
            agent xy and block xy together.
        angle_rule: "modulo" takes the angle difference modulo 2 pi (in [0, pi]; stable-worldmodel's repository),
            "peers" takes min(d, 2 pi - d) of the raw difference d as its release 0.1.1 on PyPI does: negative when
            d > 2 pi. They agree on angles in [0, 2 pi].
    """
    if angle_rule not in ("modulo", "peers"):
        raise ValueError(f'angle_rule={angle_rule!r}; expected "modulo" or "peers".')
    goal_state, state = np.asarray(goal_state, dtype=np.float64), np.asarray(state, dtype=np.float64)
    if goal_state.shape[-1:] < (5,) or state.shape[-1:] < (5,):
        raise ValueError(f"goal_state {goal_state.shape}, state {state.shape}: expected [..., >=5].")
    position = np.linalg.norm(goal_state[..., :4] - state[..., :4], axis=-1)
    angle = np.abs(goal_state[..., 4] - state[..., 4])
    if angle_rule == "modulo":
        angle = angle % _TWO_PI
    return position, np.minimum(angle, _TWO_PI - angle)


def push_t_success(goal_state: np.ndarray, state: np.ndarray, angle_rule: str = "modulo") -> np.ndarray:
    """Whether states reach goals, as the peers rule: agent and block jointly within 20 px, the angle within pi/9.

    Velocities do not count. Shapes and `angle_rule` as in `state_errors`; returns bool [...].
    """
    position, angle = state_errors(goal_state, state, angle_rule)
    return (position < POSITION_TOLERANCE) & (angle < ANGLE_TOLERANCE)


def random_states(
    num_states: int,
    generator: np.random.Generator,
    agent_range: tuple[float, float] = (50.0, 450.0),
    block_range: tuple[float, float] = (120.0, 390.0),
) -> np.ndarray:
    """[n, 7] states at rest, nothing overlapping: agent xy and block xy (px) uniform in ranges, any block angle."""
    states = np.zeros((num_states, 7))
    low, high = 5 + LINE_RADIUS, TABLE_SIZE - 6 - LINE_RADIUS  # between the walls
    todo = np.arange(num_states)
    while len(todo):
        states[todo, :2] = generator.uniform(*agent_range, (len(todo), 2))
        states[todo, 2:4] = generator.uniform(*block_range, (len(todo), 2))
        states[todo, 4] = generator.uniform(0, _TWO_PI, len(todo))
        agent, corners = states[todo, :2], block_vertices(states[todo, 2:5]).reshape(-1, 16)
        free = ((agent > low + AGENT_RADIUS) & (agent < high - AGENT_RADIUS)).all(axis=1)
        free &= (corners.min(axis=1) > low) & (corners.max(axis=1) < high)
        free &= block_distance(states[todo]) > AGENT_RADIUS
        todo = todo[~free]
    return states


def block_distance(states: np.ndarray) -> np.ndarray:
    """[n, >=5] -> [n] distance (px) from the agent's center to the nearest point of the T, 0 inside it."""
    states = np.asarray(states, dtype=np.float64)
    offset = states[:, :2] - states[:, 2:4]
    cos, sin = np.cos(states[:, 4]), np.sin(states[:, 4])
    local = np.stack([cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0]], axis=-1)
    distances = []
    for vertices in (BAR_VERTICES, STEM_VERTICES):
        low, high = np.min(vertices, axis=0), np.max(vertices, axis=0)
        distances.append(np.linalg.norm(local - np.clip(local, low, high), axis=-1))
    return np.minimum(*distances)


class PushTEnv(gymnasium.Env):
    """Gymnasium environment `cjepa_hf/PushT-v0`: bring agent and block to a goal state.

    Actions: Box [2], relative targets in units of 100 px (the peers' `swm/PushT-v1`); values outside [-1, 1] are not
    clipped. Observations: {"state": [7] float64 (`STATE_NAMES`), "proprio": [4] float64 (agent xy and velocity)} and,
    with `pixels=True`, "pixels": uint8 [resolution, resolution, 3]. Reward: minus the Euclidean distance of the
    7-number states, as the peers. Terminated on success (`push_t_success`); never truncated: the budget is the
    caller's.

    `info` of `reset` and `step`: "goal_state" [7], "goal" (image of the goal, uint8), "goal_pose" [3] (where the
    green T is drawn; the peers' default, whatever the goal state is), "contacts" (pair -> bool, during the last
    step), "block_velocity" [3], "position_error" (px), "angle_error" (rad), "success" (bool).

    Args:
        render_mode: None or "rgb_array".
        resolution: of frames and goal images, px.
        pixels: also return frames as observations.
        style: of frames, see `render_push_t`.
        goal_pose: where the green T is drawn (x, y, angle), or None for no green T.
        angle_rule: of success, "modulo" or "peers", see `state_errors`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        render_mode: str | None = None,
        resolution: int = 224,
        *,
        pixels: bool = False,
        style: str = "smooth",
        goal_pose: Sequence[float] | None = GOAL_POSE,
        angle_rule: str = "modulo",
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode={render_mode!r}; expected None or "rgb_array".')
        if style not in STYLES:
            raise ValueError(f"style={style!r}; expected one of {STYLES}.")
        if angle_rule not in ("modulo", "peers"):
            raise ValueError(f'angle_rule={angle_rule!r}; expected "modulo" or "peers".')
        self.render_mode, self.resolution, self.pixels = render_mode, resolution, pixels
        self.style, self.angle_rule = style, angle_rule
        self.goal_pose = None if goal_pose is None else np.array(_numbers(goal_pose, 3, "goal_pose"))
        self.world = PushTWorld()
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        low, high = np.full(7, -np.inf), np.full(7, np.inf)
        low[4], high[4] = 0.0, _TWO_PI
        spaces = {
            "state": gymnasium.spaces.Box(low, high, dtype=np.float64),
            "proprio": gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64),
        }
        if pixels:
            spaces["pixels"] = gymnasium.spaces.Box(0, 255, (resolution, resolution, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self._goal_state = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: of the random states; the same seed gives the same episode.
            options: "state" [7], "goal_state" [7] (each random when missing, see `random_states`): agent and block
                xy on the table, [0, 512]. The start settles for 0.01 s as in the peers, without block velocity.

        Raises:
            ValueError: unknown options, wrong shapes, NaN, positions outside the table.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        unknown = set(options) - {"state", "goal_state"}
        if unknown:
            raise ValueError(f'unknown reset options {sorted(unknown)}; expected "state" and "goal_state".')
        # both are always drawn, so that a given start does not change which goal a seed means
        states = dict(zip(("state", "goal_state"), random_states(2, self.np_random)))
        for name, value in options.items():
            if value is not None:
                states[name] = np.array(_numbers(value, 7, name))
                if not ((states[name][:4] >= 0) & (states[name][:4] <= TABLE_SIZE)).all():
                    raise ValueError(
                        f"{name} {states[name].tolist()} is outside the table: agent xy and block xy must lie in "
                        f"[0, {TABLE_SIZE:.0f}] px."
                    )
        # The goal settles too: an image of overlapping bodies would show what the physics never does.
        self.world.set_state(states["goal_state"])
        self._goal_image = self._frame(self.world.settle())
        self._goal_state = states["goal_state"]
        self.world.set_state(states["state"])
        self.world.settle()
        return self._observation(), self._info()

    def set_state(self, state: Sequence[float], block_velocity: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """Put the world exactly into a state [7], without settling; see `PushTWorld.set_state`."""
        self.world.set_state(state, block_velocity)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take one action [2] (0.1 s). ValueError on other shapes, NaN or infinite numbers."""
        if self._goal_state is None:
            raise ValueError("step() before reset(); call reset() first.")
        state = self.world.step(action)
        info = self._info()
        reward = -float(np.linalg.norm(self._goal_state - state))
        return self._observation(), reward, info["success"], False, info

    def render(self) -> np.ndarray | None:
        """The current frame, uint8 [resolution, resolution, 3], or None without a render mode."""
        return self._frame(self.world.state) if self.render_mode == "rgb_array" else None

    def _frame(self, state):
        return render_push_t(state, goal_pose=self.goal_pose, resolution=self.resolution, style=self.style)[0]

    def _observation(self):
        state = self.world.state
        observation = {"state": state, "proprio": state[list(PROPRIO_INDICES)]}
        if self.pixels:
            observation["pixels"] = self._frame(state)
        return observation

    def _info(self):
        state = self.world.state
        position, angle = state_errors(self._goal_state, state, self.angle_rule)
        return {
            "goal_state": self._goal_state.copy(),
            "goal": self._goal_image.copy(),
            "goal_pose": None if self.goal_pose is None else self.goal_pose.copy(),
            "contacts": dict(zip(CONTACT_PAIRS, self.world.contacts)),
            "block_velocity": self.world.block_velocity,
            "position_error": float(position),
            "angle_error": float(angle),
            "success": bool(push_t_success(self._goal_state, state, self.angle_rule)),
        }
