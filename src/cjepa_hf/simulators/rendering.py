"""Push-T frames: a fast anti-aliased renderer, the peers' pygame picture, and an imitation of it without pygame.

All coordinates are pixels of the 512 x 512 table, x to the right and y down; colors and drawing order are those of
`swm/PushT-v1` (stable-worldmodel) and `gym-pusht`.
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
