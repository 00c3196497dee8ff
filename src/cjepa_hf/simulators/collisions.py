"""A CLEVRER-like world seen from above: spheres, cylinders and cubes that glide, collide, enter, leave and stop.

Lengths are world units (the view is 6 x 4, its origin in the middle, x right, y down), angles radians, velocities
units and radians per second. A video shows frames 0..127 (25 per second); frames 128..174 are simulated but hidden.
Bodies are pymunk's (mass 1, no gravity); once per frame Coulomb friction of the ground takes a constant amount off every
speed, so that things really come to rest. Nothing is random after the start: the same objects give the same episode,
and an object never changes what does not touch it, directly or through others.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pymunk
import pymunk.batch

from cjepa_hf.simulators.rendering import (
    COLORS,
    CUBE_SIDE,
    MATERIALS,
    MAX_OBJECTS,
    OBJECT_STATE_NAMES,
    SHAPES,
    VIEW_SIZE,
)
from cjepa_hf.simulators.rendering import OBJECT_RADIUS as RADIUS

VISIBLE_FRAMES = 128
TOTAL_FRAMES = 175
FPS = 25
GROUND_FRICTION = {"sphere": 0.05, "cylinder": 0.15, "cube": 0.15}  # units / s^2
PHYSICS_VERSION = 1  # counts changes that make other episodes from the same start

_SPIN_FRICTION = 1.0  # rad / s^2
_SUBSTEPS = 4
_FRAME = 1.0 / FPS
_ELASTICITY = {"metal": 0.95, "rubber": 0.80}  # of a pair: the product
_CONTACT_FRICTION = {"metal": 0.3, "rubber": 0.6}
_CORNER = 0.01  # radius of the cubes' corners
_MERGE_FRAMES = 8  # contacts of a pair that begin closer than this are one collision

_FIELDS = (
    pymunk.batch.BodyFields.POSITION
    | pymunk.batch.BodyFields.ANGLE
    | pymunk.batch.BodyFields.VELOCITY
    | pymunk.batch.BodyFields.ANGULAR_VELOCITY
)


@dataclass(frozen=True)
class CollisionObject:
    """What an object is, and where it is at frame 0.

    Attributes:
        shape, color, material: one of `SHAPES`, `COLORS`, `MATERIALS`.
        position: xy; outside the view it is not seen yet.
        velocity: xy per second.
        angle, angular_velocity: of its rotation.
    """

    shape: str
    color: str
    material: str
    position: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    angular_velocity: float = 0.0

    def __post_init__(self):
        for name, known in (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {known}.")
        for name, count in (("position", 2), ("velocity", 2), ("angle", None), ("angular_velocity", None)):
            try:
                array = np.asarray(getattr(self, name), dtype=np.float64)
            except (TypeError, ValueError):
                array = np.full(1, np.nan)
            if array.shape != (() if count is None else (count,)) or not np.isfinite(array).all():
                raise ValueError(f"{name}={getattr(self, name)!r}; expected {count or 1} finite number(s).")
            object.__setattr__(self, name, float(array) if count is None else tuple(array.tolist()))

    @property
    def description(self) -> str:
        """Its three attributes, such as "red metal cube"."""
        return f"{self.color} {self.material} {self.shape}"


@dataclass(frozen=True)
class Collision:
    """A contact that began between frame `frame` and the next one.

    Attributes:
        frame: int.
        pair: ids of the two objects, ascending.
        location: xy of the contact.
        impulse: size of the first substep's impulse (mass 1: change of speed).
    """

    frame: int
    pair: tuple[int, int]
    location: tuple[float, float]
    impulse: float


@dataclass(frozen=True)
class CollisionEpisode:
    """What happened: n objects in T frames, in the order of `ids`.

    Attributes:
        ids: of the objects; those of the world they come from, also after others were removed.
        objects: n `CollisionObject`.
        positions: [T, n, 2] float64.
        angles: [T, n] float64 (not wrapped).
        velocities: [T, n, 2] float64.
        angular_velocities: [T, n] float64.
        collisions: in the order of their frames.
    """

    ids: tuple[int, ...]
    objects: tuple[CollisionObject, ...]
    positions: np.ndarray
    angles: np.ndarray
    velocities: np.ndarray
    angular_velocities: np.ndarray
    collisions: tuple[Collision, ...]

    @property
    def in_view(self) -> np.ndarray:
        """bool [T, n]: the center is inside the view."""
        return (np.abs(self.positions) < np.array(VIEW_SIZE) / 2).all(axis=-1)

    @property
    def states(self) -> np.ndarray:
        """float64 [T, 60]: 6 places of `OBJECT_STATE_NAMES`, the object with id k at place k."""
        states = np.zeros((len(self.positions), MAX_OBJECTS, len(OBJECT_STATE_NAMES)))
        places = list(self.ids)
        states[:, places, 0] = 1.0
        states[:, places, 1:3], states[:, places, 3] = self.positions, self.angles
        states[:, places, 4:6], states[:, places, 6] = self.velocities, self.angular_velocities
        states[:, places, 7:] = [
            (SHAPES.index(o.shape), COLORS.index(o.color), MATERIALS.index(o.material)) for o in self.objects
        ]
        return states.reshape(len(states), -1)

    def pairs(self, start: int = 0, end: int = TOTAL_FRAMES) -> set[tuple[int, int]]:
        """The pairs of ids that collide in frames start .. end - 1."""
        return {c.pair for c in self.collisions if start <= c.frame < end}


class CollisionWorld:
    """Objects at frame 0 and what follows from them.

    Args:
        objects: 1 to 6, none overlapping another.
        ids: of the objects; default 0, 1, ...

    Raises:
        ValueError: no or too many objects, overlapping ones, ids that repeat.
    """

    def __init__(self, objects: Sequence[CollisionObject], ids: Sequence[int] | None = None):
        self.objects = tuple(objects)
        self.ids = tuple(range(len(self.objects))) if ids is None else tuple(int(i) for i in ids)
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"{len(self.objects)} objects; expected 1 to {MAX_OBJECTS}.")
        if len(set(self.ids)) != len(self.ids) or len(self.ids) != len(self.objects):
            raise ValueError(f"ids {self.ids} for {len(self.objects)} objects; expected as many different numbers.")
        if not all(0 <= i < MAX_OBJECTS for i in self.ids):
            raise ValueError(f"ids {self.ids}; expected numbers from 0 to {MAX_OBJECTS - 1}.")
        places = np.array([o.position for o in self.objects])
        for i, j in zip(*np.triu_indices(len(places), 1)):
            # closer than this, shapes of any kind overlap
            if np.hypot(*(places[i] - places[j])) < 2 * min(RADIUS, CUBE_SIDE / 2):
                raise ValueError(
                    f"objects {self.ids[i]} ({self.objects[i].description}) and {self.ids[j]} "
                    f"({self.objects[j].description}) overlap at {places[i].tolist()} and {places[j].tolist()}; "
                    "put them apart."
                )

    def simulate(self, num_frames: int = TOTAL_FRAMES) -> CollisionEpisode:
        """Run from frame 0; frame 0 is the start itself.

        Raises:
            ValueError: `num_frames` is not a whole number above 0.
        """
        if isinstance(num_frames, bool) or int(num_frames) != num_frames or num_frames < 1:
            raise ValueError(f"num_frames={num_frames!r}; expected a whole number, at least 1.")
        space, bodies, contacts = self._build()
        n, frames, buffer = len(bodies), [], pymunk.batch.Buffer()
        unpack = struct.Struct(f"{6 * n}d").unpack
        drops = [GROUND_FRICTION[o.shape] * _FRAME for o in self.objects]
        spin_drop = _SPIN_FRICTION * _FRAME
        set_velocity, set_spin, step = _fast_calls(space)
        for frame in range(num_frames):
            buffer.clear()
            pymunk.batch.get_space_bodies(space, _FIELDS, buffer)
            raw = bytes(buffer.float_buf())
            frames.append(raw)
            if frame == num_frames - 1:
                break
            values, moving = unpack(raw), False
            for i, body in enumerate(bodies):
                vx, vy, spin = values[6 * i + 3 : 6 * i + 6]
                if vx or vy:
                    moving = True
                    speed = math.hypot(vx, vy)
                    keep = 1.0 - drops[i] / speed if speed > drops[i] else 0.0
                    set_velocity(body, (vx * keep, vy * keep))
                if spin:
                    moving = True
                    set_spin(body, math.copysign(max(abs(spin) - spin_drop, 0.0), spin))
            if not moving:  # nothing will ever happen again
                frames.extend([raw] * (num_frames - 1 - frame))
                break
            contacts.frame = frame
            for _ in range(_SUBSTEPS):
                step(_FRAME / _SUBSTEPS)
        data = np.frombuffer(b"".join(frames)).reshape(num_frames, n, 6)
        return CollisionEpisode(
            ids=self.ids,
            objects=self.objects,
            positions=data[..., :2],
            angles=data[..., 2],
            velocities=data[..., 3:5],
            angular_velocities=data[..., 5],
            collisions=contacts.merged(),
        )

    def without(self, object_id: int) -> "CollisionWorld":
        """The same start without one object; the others keep their ids.

        What happens is the same to the last bit until the object would first have touched another.

        Raises:
            ValueError: no object has this id, or it is the only one.
        """
        gone = self._index(object_id)
        if len(self.objects) == 1:
            raise ValueError(f"object {object_id} is the only one; nothing would be left.")
        keep = [i for i in range(len(self.ids)) if i != gone]
        return CollisionWorld([self.objects[i] for i in keep], [self.ids[i] for i in keep])

    def with_state(self, object_id: int, **changes: Any) -> "CollisionWorld":
        """The same start but for one object: any of `position`, `velocity`, `angle`, `angular_velocity`, also
        `shape`, `color`, `material`.

        Raises:
            ValueError: no object has this id, unknown names, bad values, objects that overlap.
        """
        index = self._index(object_id)
        unknown = set(changes) - set(CollisionObject.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"unknown changes {sorted(unknown)}; an object has {[*CollisionObject.__dataclass_fields__]}."
            )
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)
        return CollisionWorld(objects, self.ids)

    def perturbed(self, generator: np.random.Generator, scale: float = 1e-3) -> "CollisionWorld":
        """Gaussian noise on every start: `scale` units on positions, radians on angles, a share of each velocity."""
        noise = generator.normal(0.0, scale, (len(self.objects), 6)).tolist()
        objects = [
            replace(
                o,
                position=(o.position[0] + e[0], o.position[1] + e[1]),
                velocity=(o.velocity[0] * (1 + e[2]), o.velocity[1] * (1 + e[3])),
                angle=o.angle + e[4],
                angular_velocity=o.angular_velocity * (1 + e[5]),
            )
            for o, e in zip(self.objects, noise)
        ]
        return CollisionWorld(objects, self.ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; floats keep every bit, so that `from_dict` gives the same episode."""
        return {
            "physics_version": PHYSICS_VERSION,
            "objects": [{"object_id": i, **asdict(o)} for i, o in zip(self.ids, self.objects)],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "CollisionWorld":
        """The world that `to_dict` described.

        Raises:
            ValueError: keys are missing, or it was made with other physics.
        """
        try:
            version, rows = content["physics_version"], [dict(row) for row in content["objects"]]
            ids = [row.pop("object_id") for row in rows]
            objects = [CollisionObject(**row) for row in rows]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a collision world ({error!r}); expected what `CollisionWorld.to_dict` gives."
            ) from None
        if version != PHYSICS_VERSION:
            raise ValueError(
                f"physics_version {version}; this release has {PHYSICS_VERSION} and would not replay what was stored. "
                "Collect again, or install the release that made it."
            )
        return cls(objects, ids)

    def _index(self, object_id):
        if object_id not in self.ids:
            raise ValueError(f"no object {object_id!r} here; the objects are {list(self.ids)}.")
        return self.ids.index(object_id)

    def _build(self):
        space = pymunk.Space()
        space.iterations = 20
        space.collision_slop = 0.001
        # What an object does must not depend, in its last bits, on others that are merely there. A contact that ended
        # leaves nothing behind, and pairs are found in the order of the objects: pymunk's default index, a tree, finds
        # them in an order that every object changes.
        space.collision_persistence = 1
        space.use_spatial_hash(100.0, 101)
        contacts, bodies = _Contacts(), []
        for object_id, item in zip(self.ids, self.objects):
            if item.shape == "cube":
                body = pymunk.Body(1.0, pymunk.moment_for_box(1.0, (CUBE_SIDE, CUBE_SIDE)))
                side = CUBE_SIDE - 2 * _CORNER
                shape = pymunk.Poly.create_box(body, (side, side), _CORNER)
            else:
                body = pymunk.Body(1.0, pymunk.moment_for_circle(1.0, 0.0, RADIUS))
                shape = pymunk.Circle(body, RADIUS)
            body.position, body.velocity = item.position, item.velocity
            body.angle, body.angular_velocity = item.angle, item.angular_velocity
            shape.elasticity = _ELASTICITY[item.material]
            shape.friction = _CONTACT_FRICTION[item.material]
            shape.collision_type = 1
            body.object_id = object_id
            space.add(body, shape)
            bodies.append(body)
        space.on_collision(1, 1, begin=contacts.begin, post_solve=contacts.post_solve)
        return space, bodies if _LIB is None else [body._body for body in bodies], contacts


class _Contacts:
    """pymunk's callbacks: one entry per contact that begins."""

    def __init__(self):
        self.frame, self.found = 0, []

    @staticmethod
    def _pair(arbiter):
        a, b = arbiter.bodies
        return tuple(sorted((a.object_id, b.object_id)))

    def begin(self, arbiter, space, data):
        self.found.append([self.frame, self._pair(arbiter), tuple(arbiter.contact_point_set.points[0].point_a), 0.0])

    def post_solve(self, arbiter, space, data):
        if arbiter.is_first_contact:
            pair = self._pair(arbiter)
            for contact in reversed(self.found):
                if contact[1] == pair:
                    contact[3] = arbiter.total_impulse.length
                    return

    def merged(self):
        last, collisions = {}, []
        for frame, pair, location, impulse in self.found:
            if pair not in last or frame - last[pair] >= _MERGE_FRAMES:
                collisions.append(Collision(frame, pair, location, impulse))
            last[pair] = frame
        return tuple(collisions)


try:  # Chipmunk's own functions leave out checks of pymunk's that cannot fail here
    from pymunk._chipmunk_cffi import lib as _LIB

    _LIB.cpBodySetVelocity, _LIB.cpBodySetAngularVelocity, _LIB.cpSpaceStep  # noqa: B018
except (ImportError, AttributeError):  # another pymunk: its public calls do the same
    _LIB = None


def _fast_calls(space):
    """`body.velocity = v`, `body.angular_velocity = w` and `space.step(dt)` as functions."""
    if _LIB is None:
        return (
            lambda body, value: setattr(body, "velocity", value),
            lambda body, value: setattr(body, "angular_velocity", value),
            space.step,
        )
    pointer = space._space
    return _LIB.cpBodySetVelocity, _LIB.cpBodySetAngularVelocity, lambda dt: _LIB.cpSpaceStep(pointer, dt)


# Scenes. The recipe is CLEVRER's (section 3 of its paper): every new object is aimed at one that is already there.

_OBJECT_COUNTS = {3: 0.10, 4: 0.35, 5: 0.35, 6: 0.20}
_MIN_START_DISTANCE = 2.9 * RADIUS
_MIN_IMPULSE = 0.05  # a lighter touch is hard to see
_FIRST_CONTACT = 6  # frame; earlier ones leave no history
_MAX_VISIBLE_COLLISIONS = 4
_MIN_VISIBLE = 12  # frames in which every object is in view
_ATTEMPTS = 30  # per object, before the scene is given up
NOISE_SCALE = 1e-3
NOISE_COPIES = 4


@dataclass(frozen=True)
class CollisionScene:
    """A world with everything that questions about it need.

    Attributes:
        world: the start.
        episode: `TOTAL_FRAMES` frames.
        removals: by the removed object's id, the episode without it (`VISIBLE_FRAMES` frames).
        unsure: by the removed object's id, the pairs whose meeting without it depends on 1e-3 of noise, or happens out
            of view: not to be asked about.
    """

    world: CollisionWorld
    episode: CollisionEpisode
    removals: dict[int, CollisionEpisode]
    unsure: dict[int, frozenset[tuple[int, int]]]


def sample_scene(generator: np.random.Generator, outcomes: dict[str, int] | None = None) -> CollisionScene:
    """Draw a world that passes all filters, and simulate it without each of its objects.

    A world is kept if its collisions (1 to 4 in view, none grazing, no pair twice, none before frame 6, all inside the
    view) stay the same in 4 copies with noise of 1e-3 on every start, and each object is seen.

    Args:
        generator: all its randomness.
        outcomes: counts by name what happened to the candidates ("accepted" or the reason), for measuring.
    """
    outcomes = {} if outcomes is None else outcomes
    while True:
        world, episode = _propose(generator, outcomes)
        reason = _scene_fault(world, episode, generator)
        outcomes[reason or "accepted"] = outcomes.get(reason or "accepted", 0) + 1
        if reason is None:
            break
    removals, unsure = {}, {}
    for gone in world.ids:
        rest = world.without(gone)
        removals[gone] = rest.simulate(VISIBLE_FRAMES)
        doubtful = {c.pair for c in removals[gone].collisions if not _inside(removals[gone], c, -RADIUS)}
        for pairs in _noisy_pairs(rest, generator, VISIBLE_FRAMES):
            doubtful |= pairs ^ removals[gone].pairs()
        unsure[gone] = frozenset(doubtful)
    return CollisionScene(world, episode, removals, unsure)


def _noisy_pairs(world, generator, num_frames, start=0) -> Iterator[set[tuple[int, int]]]:
    for _ in range(NOISE_COPIES):
        yield world.perturbed(generator, NOISE_SCALE).simulate(num_frames).pairs(start)


def _inside(episode, collision, margin):
    """Whether both centers are inside the view by `margin` when they meet."""
    places = episode.positions[collision.frame][[episode.ids.index(i) for i in collision.pair]]
    return bool((np.abs(places) < np.array(VIEW_SIZE) / 2 - margin).all())


def _propose(generator, outcomes) -> tuple[CollisionWorld, CollisionEpisode]:
    """Objects one after another until there are as many as drawn; each is kept if the new episode is fine."""
    counts = list(_OBJECT_COUNTS)
    kinds = [(s, c, m) for s in SHAPES for c in COLORS for m in MATERIALS]
    while True:
        wanted = counts[generator.choice(len(counts), p=list(_OBJECT_COUNTS.values()))]
        chosen = [kinds[k] for k in generator.choice(len(kinds), wanted, replace=False)]
        objects, episode = [], None
        for kind in chosen:
            for _ in range(_ATTEMPTS):
                item, bystander = _draw_object(kind, episode, generator)
                if not _fits(item, objects):
                    continue
                world = CollisionWorld([*objects, item])
                candidate = world.simulate()
                if _objection(candidate, None if bystander else episode) is None:
                    break
                outcomes["object rejected"] = outcomes.get("object rejected", 0) + 1
            else:
                break
            outcomes["object accepted"] = outcomes.get("object accepted", 0) + 1
            objects.append(item)
            episode = candidate
        if len(objects) == wanted:
            # the first to be drawn is hit by all others: ids must not tell
            order = generator.permutation(wanted)
            world = CollisionWorld([objects[k] for k in order])
            return world, world.simulate()
        outcomes["scene given up"] = outcomes.get("scene given up", 0) + 1


def _draw_object(kind, episode, generator) -> tuple[CollisionObject, bool]:
    """One object that meets an existing one (or, rarely, nothing); whether it is a bystander."""
    shape, color, material = kind
    half = np.array(VIEW_SIZE) / 2
    draw, bystander, time = generator.random(), False, 0.0
    moving = episode is None
    if episode is None:
        meeting, time = generator.uniform(-0.7, 0.7, 2) * half, generator.integers(0, 60) / FPS
    elif draw < 0.93:
        target = generator.integers(len(episode.ids))
        frame = generator.integers(12, 118) if generator.random() < 0.5 else generator.integers(132, 164)
        meeting = episode.positions[frame, target] + generator.normal(0.0, 0.12, 2)
        moving, time = draw >= 0.45, frame / FPS
    else:
        bystander, moving = True, generator.random() < 0.5
        meeting, time = generator.uniform(-0.9, 0.9, 2) * half, generator.integers(0, 100) / FPS
    velocity, spin = np.zeros(2), 0.0
    if moving:  # back from the meeting point against a constant deceleration
        heading, speed = generator.uniform(0.0, 2 * math.pi), generator.uniform(0.15, 1.1)
        direction, loss = np.array([math.cos(heading), math.sin(heading)]), GROUND_FRICTION[shape]
        meeting = meeting - direction * (speed * time + loss * time**2 / 2)
        velocity, spin = direction * (speed + loss * time), generator.normal(0.0, 0.7)
    angle = generator.uniform(0.0, 2 * math.pi)
    return CollisionObject(shape, color, material, tuple(meeting), tuple(velocity), angle, spin), bystander


def _fits(item, objects):
    """Whether it starts clear of the others, and either well inside the view or well outside."""
    beyond = float(np.max(np.abs(item.position) - np.array(VIEW_SIZE) / 2))
    if abs(beyond) < RADIUS or (beyond > 0 and item.velocity == (0.0, 0.0)):
        return False
    return all(math.dist(item.position, other.position) > _MIN_START_DISTANCE for other in objects)


def _objection(episode, before) -> str | None:
    """Why an episode is no good; `before`: the episode without the newest object, which it must enrich."""
    pairs = [c.pair for c in episode.collisions]
    if len(set(pairs)) < len(pairs):
        return "a pair meets twice"
    if any(c.frame < _FIRST_CONTACT for c in episode.collisions):
        return "contact too early"
    if any(c.impulse < _MIN_IMPULSE for c in episode.collisions):
        return "grazing contact"
    visible = [c for c in episode.collisions if c.frame < VISIBLE_FRAMES]
    if len(visible) > _MAX_VISIBLE_COLLISIONS:
        return "too many collisions"
    if not all(_inside(episode, c, RADIUS) for c in visible):
        return "collision out of view"
    if before is not None and not any(max(pair) == len(episode.ids) - 1 for pair in pairs):
        return "no new collision"
    seen = episode.in_view[:VISIBLE_FRAMES]
    if (seen.sum(axis=0) < _MIN_VISIBLE).any():
        return "object hardly in view"
    changes = np.diff(seen.astype(np.int8), axis=0)
    if ((changes == 1).sum(axis=0) > 1).any() or ((changes == -1).sum(axis=0) > 1).any():
        return "object crosses the border again"
    return None


def _scene_fault(world, episode, generator) -> str | None:
    if not episode.pairs(0, VISIBLE_FRAMES):
        return "no collision in view"
    reason = _objection(episode, None)  # another order of the objects is another order of the contacts
    if reason is not None:
        return reason
    visible, hidden = episode.pairs(0, VISIBLE_FRAMES), episode.pairs(VISIBLE_FRAMES)
    if not hidden and generator.random() < 0.5:
        return "nothing happens after the video (half of these)"
    for _ in range(NOISE_COPIES):
        noisy = world.perturbed(generator, NOISE_SCALE).simulate()
        if noisy.pairs(0, VISIBLE_FRAMES) != visible or noisy.pairs(VISIBLE_FRAMES) != hidden:
            return "depends on noise"
    return None
