"""Frames of the simulators.

Push-T: a fast anti-aliased renderer, the peers' pygame picture, and an imitation of it without pygame. Coordinates
are pixels of the 512 x 512 table, x to the right and y down; colors and drawing order are those of `swm/PushT-v1`
(stable-worldmodel) and `gym-pusht`. The collision world: a renderer with CLEVRER's shapes, colors and materials.
"""

import math
import os
from collections.abc import Collection

import cv2
import numpy as np

TABLE_SIZE = 512.0
AGENT_RADIUS = 15.0
GOAL_POSE = (256.0, 256.0, math.pi / 4)
# The T in its own frame: origin in the middle of the bar's outer edge, stem along +y.
BAR_VERTICES = ((-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (-60.0, 30.0))
STEM_VERTICES = ((-15.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0))
WALL_SEGMENTS = (((5, 506), (5, 5)), ((5, 5), (506, 5)), ((506, 5), (506, 506)), ((5, 506), (506, 506)))
LINE_RADIUS = 2.0  # of the walls and of the block's outline

WHITE = (255, 255, 255)
GOAL_COLOR = (144, 238, 144)
BLOCK_COLOR = (119, 136, 153)
BLOCK_FILL = (143, 163, 184)  # round(min(1.2 * color, 255)), as pymunk's debug drawing lightens
AGENT_COLOR = (65, 105, 225)
AGENT_FILL = (78, 126, 255)
WALL_COLOR = (211, 211, 211)

HIDEABLE = ("agent", "block", "goal", "walls")
STYLES = ("smooth", "aliased", "peer")

PEER_RESOLUTION = 224  # of the peers' frames

_SHIFT = 6  # fractional bits of the coordinates given to cv2


def render_push_t(
    states: np.ndarray,
    *,
    goal_pose: np.ndarray | tuple[float, float, float] | None = GOAL_POSE,
    resolution: int = 64,
    hide: Collection[str] = (),
    style: str = "smooth",
) -> np.ndarray:
    """Draw Push-T states.

    Args:
        states: [n, >=5] float, agent xy, block xy (px of the 512 px table), block angle (rad); more columns are
            ignored. One state [>=5] gives one frame (n = 1).
        goal_pose: where the green T is drawn, xy (px) and angle (rad): one for all frames [3], one per frame [n, 3],
            or None for no goal.
        resolution: height and width of the frames in pixels.
        hide: any of "agent", "block", "goal", "walls": what is left out.
        style: "smooth" draws anti-aliased shapes (fast; the default). "peer" is the picture of `swm/PushT-v1` and
            `gym-pusht` to the pixel (outside their red contact markers): pygame at 512 px, bilinear to `resolution`
            without anti-aliasing; needs `pip install "cjepa-hf[peers]"`. "aliased" imitates the peers' 224 px frames
            without pygame, area-averaged to `resolution`, for training augmentation.

    Returns:
        uint8 [n, resolution, resolution, 3], RGB.

    Raises:
        ValueError: wrong shapes, NaN or infinite numbers, unknown `hide` or `style`.
        ImportError: style "peer" without pygame.
    """
    states = np.asarray(states, dtype=np.float64)
    if states.ndim == 1:
        states = states[None]
    if states.ndim != 2 or states.shape[1] < 5:
        raise ValueError(
            f"states have shape {states.shape}; expected [n, >=5]: agent xy, block xy, block angle. "
            "Flatten batch and time axes first."
        )
    states = states[:, :5]
    if not np.isfinite(states).all():
        raise ValueError("states contain NaN or infinite numbers; drop those rows before rendering.")
    # a set: a bare string such as hide="agent" would otherwise be read letter by letter
    hidden = {hide} if isinstance(hide, str) else set(hide)
    if not hidden <= set(HIDEABLE):
        raise ValueError(f"hide={sorted(hidden)}; expected a subset of {HIDEABLE}.")
    if style not in STYLES:
        raise ValueError(f"style={style!r}; expected one of {STYLES}.")
    if isinstance(resolution, bool) or int(resolution) != resolution or not 4 <= resolution <= 4096:
        raise ValueError(f"resolution={resolution!r}; expected a whole number of pixels from 4 to 4096.")
    resolution = int(resolution)
    goals = None
    if goal_pose is not None and "goal" not in hidden:
        goals = np.asarray(goal_pose, dtype=np.float64)
        if goals.shape not in ((3,), (1, 3), (len(states), 3)):
            raise ValueError(f"goal_pose has shape {goals.shape}; expected [3] or [{len(states)}, 3] (x, y, angle).")
        if not np.isfinite(goals).all():
            raise ValueError("goal_pose contains NaN or infinite numbers; pass None for frames without a goal.")
        goals = goals.reshape(-1, 3)

    draw = {"smooth": _render_smooth, "aliased": _render_aliased, "peer": _render_peer}[style]
    return draw(states, goals, resolution, hidden)


def block_vertices(poses: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Corners of the T: poses [n, 3] (x, y, angle) -> [n, 2, 4, 2], bar then stem, in table pixels.

    `margin` (px) moves every edge outward (negative: inward).
    """
    shape = np.array([BAR_VERTICES, STEM_VERTICES])
    shape = shape + margin * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    rotation = np.stack([cos, -sin, sin, cos], axis=-1).reshape(-1, 1, 2, 2)
    return (shape.reshape(1, 8, 2) @ rotation.swapaxes(-1, -2)).reshape(-1, 2, 4, 2) + poses[:, None, None, :2]


def _render_smooth(states, goals, resolution, hidden):
    # Supersampling on top of LINE_AA; large frames need less of it.
    size = resolution * (4 if resolution <= 96 else 2 if resolution <= 256 else 1)
    scale = size / TABLE_SIZE
    one = 1 << _SHIFT

    def fixed(points):
        # pixel i of a 512 px picture is coordinate i, so pixel centers of the two canvases are half a pixel off
        points = (np.clip(np.asarray(points, dtype=np.float64), -4096, 4096) + 0.5) * scale - 0.5
        return np.rint(points * one).astype(np.int32)

    def polygon(points, color):
        cv2.fillConvexPoly(canvas, points, color, cv2.LINE_AA, _SHIFT)

    walls = []
    if "walls" not in hidden:
        for a, b in WALL_SEGMENTS:
            low, high = np.minimum(a, b) - LINE_RADIUS, np.maximum(a, b) + LINE_RADIUS
            walls.append(fixed([low, (high[0], low[1]), high, (low[0], high[1])]))
    outlines = block_vertices(states[:, 2:5], LINE_RADIUS)
    outer, inner = fixed(outlines), fixed(block_vertices(states[:, 2:5], -LINE_RADIUS))
    agents = fixed(states[:, :2]).tolist()
    radius, inner_radius = (round(r * scale * one) for r in (AGENT_RADIUS, AGENT_RADIUS - 4))
    goal_parts = [()] if goals is None else fixed(block_vertices(goals))
    shared_goal = len(goal_parts) == 1

    # Walls lie on top, but only a frame with something next to a wall can tell: the others start from a picture that
    # has the walls already (and the goal, where all frames share one).
    near = [outlines.reshape(-1, 16), states[:, :2] - AGENT_RADIUS, states[:, :2] + AGENT_RADIUS]
    if goals is not None:
        near.append(np.broadcast_to(block_vertices(goals).reshape(-1, 16), (len(states), 16)))
    near = np.concatenate(near, axis=1)
    near_wall = (near.min(axis=1) < 12) | (near.max(axis=1) > TABLE_SIZE - 12)

    canvas = np.full((size, size, 3), 255, dtype=np.uint8)
    if shared_goal:
        for part in goal_parts[0]:
            polygon(part, GOAL_COLOR)
    open_background = canvas.copy()
    for wall in walls:
        polygon(wall, WALL_COLOR)
    walled_background = canvas.copy()

    half = np.empty((size // 2, size // 2, 3), dtype=np.uint8)
    frames = np.empty((len(states), resolution, resolution, 3), dtype=np.uint8)
    for i in range(len(states)):
        np.copyto(canvas, open_background if near_wall[i] else walled_background)
        if not shared_goal:
            for part in goal_parts[i]:
                polygon(part, GOAL_COLOR)
        if "block" not in hidden:
            for k in range(2):
                polygon(outer[i, k], BLOCK_COLOR)
                polygon(inner[i, k], BLOCK_FILL)
        if "agent" not in hidden:
            cv2.circle(canvas, agents[i], radius, AGENT_COLOR, -1, cv2.LINE_AA, _SHIFT)
            cv2.circle(canvas, agents[i], inner_radius, AGENT_FILL, -1, cv2.LINE_AA, _SHIFT)
        if near_wall[i]:
            for wall in walls:
                polygon(wall, WALL_COLOR)
        image = canvas
        if size == 4 * resolution:  # cv2 halves an image twice far faster than it quarters it
            image = cv2.resize(canvas, half.shape[:2], dst=half, interpolation=cv2.INTER_AREA)
        cv2.resize(image, (resolution, resolution), dst=frames[i], interpolation=cv2.INTER_AREA)
    return frames


def _outline_body(a, b):
    """The four corners of the body of pymunk's fat line from a to b (whole pixels)."""
    across = [abs(b[1] - a[1]), abs(b[0] - a[0])]
    length = math.hypot(*across)
    if length == 0:
        return None
    dx, dy = (round(v * LINE_RADIUS / length) for v in across)
    return [(a[0] - dx, a[1] - dy), (a[0] + dx, a[1] + dy), (b[0] + dx, b[1] + dy), (b[0] - dx, b[1] - dy)]


def _draw_peer_scene(pen, parts, goal, agent, hidden):
    """Order, rounding and primitives of the peers' picture; `pen` draws on a white 512 px canvas.

    parts [2, 4, 2], goal [2, 4, 2] or None, agent [2]: nested lists of whole pixels.
    """

    def fat_line(a, b, color):
        pen.line(a, b, color, round(2 * LINE_RADIUS))
        body = _outline_body(a, b)
        if body is not None:
            pen.polygon(body, color)
            pen.circle(a, round(LINE_RADIUS), color)
            pen.circle(b, round(LINE_RADIUS), color)

    if goal is not None:
        for part in goal:
            pen.polygon(part, GOAL_COLOR)
    if "block" not in hidden:
        for part in parts:
            pen.polygon(part, BLOCK_FILL)
            for a, b in zip(part, part[1:] + part[:1]):
                fat_line(a, b, BLOCK_COLOR)
    if "agent" not in hidden:
        pen.circle(agent, round(AGENT_RADIUS), AGENT_COLOR)
        pen.circle(agent, round(AGENT_RADIUS - 4), AGENT_FILL)
    if "walls" not in hidden:
        for a, b in WALL_SEGMENTS:
            fat_line(a, b, WALL_COLOR)


class _PygamePen:
    def __init__(self):
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            import pygame
        except ImportError as error:
            raise ImportError(
                'style="peer" draws with pygame, which is not installed. Run `pip install "cjepa-hf[peers]"`, '
                'or use style="aliased", which needs nothing more.'
            ) from error
        self.draw, self.array3d = pygame.draw, pygame.surfarray.array3d
        self.surface = pygame.Surface((512, 512), depth=32)

    def clear(self):
        self.surface.fill(WHITE)

    def polygon(self, points, color):
        self.draw.polygon(self.surface, color, points)

    def line(self, a, b, color, width):
        self.draw.lines(self.surface, color, False, [a, b], width)

    def circle(self, center, radius, color):
        self.draw.circle(self.surface, color, center, radius, 0)

    def image(self):
        return np.ascontiguousarray(self.array3d(self.surface).transpose(1, 0, 2))


class _CvPen:
    def __init__(self):
        self.canvas = np.empty((512, 512, 3), dtype=np.uint8)

    def clear(self):
        self.canvas.fill(255)

    def polygon(self, points, color):
        cv2.fillConvexPoly(self.canvas, np.array(points, dtype=np.int32), color, cv2.LINE_8)

    def line(self, a, b, color, width):
        cv2.line(self.canvas, a, b, color, width, cv2.LINE_8)

    def circle(self, center, radius, color):
        cv2.circle(self.canvas, center, radius, color, -1, cv2.LINE_8)

    def image(self):
        return self.canvas


def _render_with_pen(pen, states, goals, hidden, resize):
    # np.rint rounds half to even, as Python's round() does in the peers
    def whole(points):
        return np.clip(np.rint(points), -4096, 4096).astype(int).tolist()

    parts, agents = whole(block_vertices(states[:, 2:5])), whole(states[:, :2])
    goal_parts = [None] if goals is None else whole(block_vertices(goals))
    for i in range(len(states)):
        pen.clear()
        _draw_peer_scene(pen, parts[i], goal_parts[i if len(goal_parts) > 1 else 0], agents[i], hidden)
        resize(pen.image(), i)


def _render_peer(states, goals, resolution, hidden):
    frames = np.empty((len(states), resolution, resolution, 3), dtype=np.uint8)

    def resize(image, i):
        frames[i] = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_LINEAR)

    _render_with_pen(_PygamePen(), states, goals, hidden, resize)
    return frames


def _render_aliased(states, goals, resolution, hidden):
    frames = np.empty((len(states), resolution, resolution, 3), dtype=np.uint8)

    def resize(image, i):
        first = max(resolution, PEER_RESOLUTION)
        image = cv2.resize(image, (first, first), interpolation=cv2.INTER_LINEAR)
        if first != resolution:
            image = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
        frames[i] = image

    _render_with_pen(_CvPen(), states, goals, hidden, resize)
    return frames


# The collision world (`collisions`): things on a gray floor, seen from above.

SHAPES = ("sphere", "cylinder", "cube")
MATERIALS = ("metal", "rubber")
COLORS = ("gray", "red", "blue", "green", "brown", "yellow", "cyan", "purple")
VIEW_SIZE = (6.0, 4.0)  # world units; the origin is in the middle, x right, y down
OBJECT_RADIUS = 0.28  # of spheres and cylinders
CUBE_SIDE = 0.524
MAX_OBJECTS = 6
# Of each of the `MAX_OBJECTS` places for an object; a place without one is all zeros. The last three are positions in
# `SHAPES`, `COLORS`, `MATERIALS`.
OBJECT_STATE_NAMES = (
    "present", "x", "y", "angle", "velocity_x", "velocity_y", "angular_velocity", "shape", "color", "material",
)  # fmt: skip

_FLOOR = (132, 133, 132)
_RGB = np.array(
    [(87, 87, 87), (173, 35, 35), (42, 75, 215), (29, 105, 20), (129, 74, 25), (255, 238, 51), (41, 208, 208), (129, 38, 192)],
    dtype=np.float64,
)  # fmt: skip
_LIGHT = np.array([-0.6, -0.8])  # where the light comes from


def render_collisions(
    states: np.ndarray, *, resolution: int | tuple[int, int] = (320, 480), hide: Collection[int] = ()
) -> np.ndarray:
    """Draw states of the collision world.

    Spheres are shaded discs, cylinders discs with a dark hole, cubes squares with a bevel; metal is bright, with a
    light rim and a glint, rubber is dull.

    Args:
        states: [n, 60] float, 6 places of `OBJECT_STATE_NAMES` (see `CollisionEpisode.states`). One state [60] gives
            one frame (n = 1).
        resolution: (height, width) in pixels, or one number for both: the view, which is 3 : 2, is then squeezed.
        hide: places (0 to 5) that are left out.

    Returns:
        uint8 [n, height, width, 3], RGB.

    Raises:
        ValueError: wrong shapes, NaN or infinite numbers, attributes that do not exist.
    """
    states = np.asarray(states, dtype=np.float64)
    states = states[None] if states.ndim == 1 else states
    width = len(OBJECT_STATE_NAMES)
    if states.ndim != 2 or states.shape[1] != MAX_OBJECTS * width:
        raise ValueError(
            f"states have shape {states.shape}; expected [n, {MAX_OBJECTS * width}]: {MAX_OBJECTS} times "
            f"{', '.join(OBJECT_STATE_NAMES)}. Flatten batch and time axes first."
        )
    if not np.isfinite(states).all():
        raise ValueError("states contain NaN or infinite numbers; a place without an object is all zeros.")
    size = (resolution, resolution) if isinstance(resolution, int | np.integer) else tuple(resolution)
    if len(size) != 2 or any(isinstance(s, bool) or int(s) != s or not 4 <= s <= 4096 for s in size):
        raise ValueError(f"resolution={resolution!r}; expected (height, width) or one number, each from 4 to 4096.")
    hidden = sorted(hide)
    if not set(hidden) <= set(range(MAX_OBJECTS)):
        raise ValueError(f"hide={hidden}; expected places from 0 to {MAX_OBJECTS - 1}.")
    states = states.reshape(len(states), MAX_OBJECTS, width)
    kinds = states[..., 7:].astype(int)
    if (kinds < 0).any() or (kinds >= (len(SHAPES), len(COLORS), len(MATERIALS))).any():
        raise ValueError("states name shapes, colors or materials that do not exist; see OBJECT_STATE_NAMES.")
    shown = (states[..., 0] > 0.5) & (np.abs(states[..., 1:3]) < np.array(VIEW_SIZE) / 2 + 0.5).all(axis=-1)
    shown[:, hidden] = False

    # Drawn in the view's own shape, larger than asked for, then averaged: circles stay circles until the end.
    height, wide = (int(s) for s in size)
    unit = max(height / VIEW_SIZE[1], wide / VIEW_SIZE[0])
    unit = unit if unit >= 64 else 64  # pixels per world unit of the canvas
    canvas_size = round(VIEW_SIZE[1] * unit), round(VIEW_SIZE[0] * unit)
    floor = np.full((*canvas_size, 3), _FLOOR, dtype=np.uint8)
    canvas = np.empty_like(floor)
    frames = np.empty((len(states), height, wide, 3), dtype=np.uint8)
    centers = ((states[..., 1:3] + np.array(VIEW_SIZE) / 2) * unit - 0.5) * (1 << _SHIFT)
    centers = np.rint(np.clip(centers, -1e6, 1e6)).astype(int).tolist()
    angles, kinds, shown = states[..., 3].tolist(), kinds.tolist(), [np.flatnonzero(row).tolist() for row in shown]
    parts = {}
    for i in range(len(states)):
        np.copyto(canvas, floor)
        for k in shown[i]:
            kind = tuple(kinds[i][k])
            if kind not in parts:
                parts[kind] = _object_parts(*kind, unit)
            _draw_object(canvas, parts[kind], *centers[i][k], angles[i][k])
        if canvas_size == (height, wide):
            frames[i] = canvas
        else:
            cv2.resize(canvas, (wide, height), dst=frames[i], interpolation=cv2.INTER_AREA)
    return frames


def _object_parts(shape, color, material, unit):
    """What is drawn for an object, back to front: (x, y, radius, color) is a disc, (half side, color) a square.

    Lengths are in fixed-point pixels, x and y from the object's center.
    """
    metal = MATERIALS[material] == "metal"
    base, scale = _RGB[color] * (1.0 if metal else 0.82), unit * (1 << _SHIFT)

    def shade(value):  # 0 black, 1 the color itself, 2 white
        mixed = base * value if value <= 1 else base + (255 - base) * (value - 1)
        return tuple(np.rint(np.clip(mixed, 0, 255)).tolist())

    def disc(towards_light, radius, color):  # both in units of the object's radius
        x, y = (_LIGHT * towards_light * OBJECT_RADIUS * scale).tolist()
        return round(x), round(y), round(radius * OBJECT_RADIUS * scale), color

    def square(side, color):  # in units of the cube's side
        return side * CUBE_SIDE / 2 * scale, color

    rim = shade(1.5 if metal else 0.6)
    if SHAPES[shape] == "sphere":
        tones = np.linspace(0.5, 1.5, 7) if metal else np.linspace(0.55, 1.1, 7)
        parts = [disc(0.06 * k, 1 - 0.13 * k, shade(tone)) for k, tone in enumerate(tones)]
        glint = disc(0.45, 0.16, shade(2))
    elif SHAPES[shape] == "cylinder":
        parts = [disc(0, 1, rim), disc(0, 0.84, shade(1.0)), disc(0, 0.42, shade(0.3))]
        glint = disc(0.63, 0.13, shade(2))
    else:
        parts = [square(1, rim), square(0.84, shade(0.65)), square(0.6, shade(1.05))]
        glint = disc(0.28, 0.14, shade(2))
    return [*parts, glint] if metal else parts


def _draw_object(canvas, parts, x, y, angle):
    for *where, color in parts:
        if len(where) == 3:
            cv2.circle(canvas, (x + where[0], y + where[1]), where[2], color, -1, cv2.LINE_AA, _SHIFT)
        else:
            cos, sin = where[0] * math.cos(angle), where[0] * math.sin(angle)
            corners = [(x + cos - sin, y + sin + cos), (x - cos - sin, y - sin + cos)]
            corners += [(x - cos + sin, y - sin - cos), (x + cos + sin, y + sin - cos)]
            cv2.fillConvexPoly(canvas, np.rint(corners).astype(np.int32), color, cv2.LINE_AA, _SHIFT)
