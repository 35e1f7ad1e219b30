"""A scripted expert for PushT: it tries pushes in a second simulator, and makes the one that helps most.

It chooses where to touch the T, goes there around the T, and pushes in a straight line for as long as that brings the T
closer to its goal. Lengths are pixels of the simulator, whose side is 512.
"""

import heapq
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from transfusion_pytorch.examples.run import optional

SIDE, MARGIN = 512, 24  # of the arena, and what the agent keeps from its walls
AGENT_RADIUS = 15
CELL = 12  # side of the grid on which a way around the T is found
CLEARANCE = AGENT_RADIUS + 5  # of that way from the T
START_GAP = 7  # between the agent and the T before a push
ARRIVED = 6  # so close to where a push starts, it may start
TRAVEL_LOOKAHEAD, COARSE_LOOKAHEAD, FINE_LOOKAHEAD = 40.0, 30.0, 12.0  # how far an action lies before the agent
FINE_BELOW = 25.0  # error of the T below which it is pushed slowly
LONGEST_PUSH = 14  # steps of the controller
LEAST_GAIN = 0.1  # error that a push must take away to be worth it
FAN = np.radians((-20.0, 0.0, 20.0))  # directions of a push beside the normal of the surface
TURNS = np.radians((-12.0, 0.0, 12.0))  # by which a push that is being made may change
TRAVEL_COST = 0.02  # error that a push must gain for each pixel to its start
RECTANGLES = np.array([(-60, 60, 0, 30), (-15, 15, 30, 120)], float)  # of the T in its frame: x and y, from and to
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)


class Pose(NamedTuple):
    """Where the T is: its origin and its angle in radians."""

    origin: np.ndarray  # (2,)
    angle: float

    def to_world(self, points: np.ndarray) -> np.ndarray:
        return points @ rotation(self.angle).T + self.origin

    def to_local(self, points: np.ndarray) -> np.ndarray:
        return (points - self.origin) @ rotation(self.angle)


class Push(NamedTuple):
    """Where a push starts, its unit direction, for how many steps it helps, and the error it takes away."""

    start: np.ndarray  # (2,)
    direction: np.ndarray  # (2,)
    steps: int
    gain: float


class OutOfReach(RuntimeError):
    """Every side of the T that could be pushed is beyond the walls."""


class Expert:
    """Chooses actions for a `PushTEnv`, from the simulator's own state.

    >>> expert = Expert(env)
    >>> while not done:
    ...     _, _, done, _, info = env.step(expert.act())

    Make a new one for each episode. `seed` is for the pushes that are made where none helps. Needs gym-pusht.
    """

    def __init__(self, env: Any, *, seed: int = 0) -> None:
        self.env = env.unwrapped
        self.twin: Any = optional("gym_pusht.envs.pusht", extra="policy").PushTEnv(obs_type="state")
        self.twin.reset(seed=0)
        self.random = np.random.default_rng(seed)
        self.push: Push | None = None
        self.planned_pose: Pose | None = None
        self.is_pushing = False
        self.path = np.zeros((0, 2))

    def act(self) -> np.ndarray:
        """The action from the present state: where the agent is to go, `(2,)`."""
        if self.is_pushing:
            push = self._continued()
            if push.gain > LEAST_GAIN:
                return self._ahead(push.direction)
            self.is_pushing = False
            self.push = None
        if self.push is None or self._has_moved():
            self._plan()
        push = self.push
        assert push is not None
        if np.linalg.norm(self.agent - push.start) < ARRIVED:
            self.is_pushing, self.planned_pose = True, None
            return self._ahead(push.direction)
        return np.clip(ahead_on(self.path, self.agent, TRAVEL_LOOKAHEAD), 0, SIDE)

    @property
    def agent(self) -> np.ndarray:
        return np.array(self.env.agent.position)

    @property
    def pose(self) -> Pose:
        return pose_of(self.env.block)

    def error(self, pose: Pose) -> float:
        """The mean distance of the corners of the T from where they are to be."""
        goal = Pose(np.array(self.env.goal_pose[:2]), float(self.env.goal_pose[2]))
        return float(np.linalg.norm(pose.to_world(OUTLINE) - goal.to_world(OUTLINE), axis=-1).mean())

    @property
    def lookahead(self) -> float:
        return FINE_LOOKAHEAD if self.error(self.pose) < FINE_BELOW else COARSE_LOOKAHEAD

    def _ahead(self, direction: np.ndarray) -> np.ndarray:
        return np.clip(self.agent + self.lookahead * direction, 0, SIDE)

    def _has_moved(self) -> bool:
        """Whether the T is not where the plan was made for."""
        return self.planned_pose is None or bool(
            np.linalg.norm(self.pose.to_world(OUTLINE) - self.planned_pose.to_world(OUTLINE), axis=-1).max() > 2
        )

    def _plan(self) -> None:
        """Chooses the next push and the way to where it starts."""
        pose, agent = self.pose, self.agent
        pushes = []
        for start, normal in self._starts(pose):
            way = TRAVEL_COST * float(np.linalg.norm(start - agent))
            for turn in FAN:
                push = self._tried(start, np.zeros(2), -rotation(turn) @ normal, pose)
                pushes.append(push._replace(gain=push.gain - way))
        if not pushes:  # which no random state of the environment needs, but policies push it there
            raise OutOfReach("the T cannot be reached by the agent from any side")
        best = max(pushes, key=lambda push: push.gain)
        if best.steps == 0:
            best = pushes[self.random.integers(len(pushes))]
        self.push, self.planned_pose = best, pose
        self.path = way_around(agent, best.start, pose)

    def _starts(self, pose: Pose) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where the agent may stand before the T, and the normals of the surface there."""
        points, normals = contacts()
        starts = points + (AGENT_RADIUS + START_GAP) * normals
        is_free = distance_to_tee(starts) > AGENT_RADIUS + START_GAP - 1
        world, directions = pose.to_world(starts), normals @ rotation(pose.angle).T
        is_free &= ((world > MARGIN) & (world < SIDE - MARGIN)).all(axis=-1)
        return list(zip(world[is_free], directions[is_free], strict=True))

    def _continued(self) -> Push:
        """The best way to go on with the push that is being made."""
        assert self.push is not None
        velocity = np.array(self.env.agent.velocity)
        directions = [rotation(turn) @ self.push.direction for turn in TURNS]
        tried = [self._tried(self.agent, velocity, direction, self.pose) for direction in directions]
        best = max(tried, key=lambda push: push.gain)
        kept = tried[len(tried) // 2]
        best = kept if best.gain < kept.gain + 0.3 else best
        self.push = best._replace(start=self.push.start)
        return best

    def _tried(self, start: np.ndarray, velocity: np.ndarray, direction: np.ndarray, pose: Pose) -> Push:
        """A push in the second simulator, for as many steps as leave the least error."""
        twin, lookahead = self.twin, self.lookahead
        place(twin, start, velocity, pose)
        before = self.error(pose)
        best, steps = 0.0, 0
        for step in range(1, LONGEST_PUSH + 1):
            control(twin, np.clip(np.array(twin.agent.position) + lookahead * direction, 0, SIDE))
            after = pose_of(twin.block)
            error = self.error(after)
            gain = before - error
            if error < 6 and twin._get_coverage() > twin.success_threshold + 0.002:
                return Push(start, direction, step, gain + 20)
            if gain > best:
                best, steps = gain, step
            if gain < best - 3:
                break
        return Push(start, direction, steps, best)


def rotation(angle: float) -> np.ndarray:
    return np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])


def pose_of(body: Any) -> Pose:
    return Pose(np.array(body.position), float(body.angle))


def place(env: Any, agent: np.ndarray, velocity: np.ndarray, pose: Pose) -> None:
    """Sets the state of a simulator. The angle comes first: to set it turns the T about its centre of gravity."""
    env.agent.position, env.agent.velocity = tuple(map(float, agent)), tuple(map(float, velocity))
    env.block.angle = pose.angle
    env.block.position = tuple(map(float, pose.origin))
    env.block.velocity, env.block.angular_velocity = (0.0, 0.0), 0.0
    env.space.reindex_shapes_for_body(env.block)
    env.space.reindex_shapes_for_body(env.agent)


def control(env: Any, action: np.ndarray) -> None:
    """A step of the environment's controller, without the observations and rewards that cost most of its `step`."""
    x, y = map(float, action)
    for _ in range(round(1 / (env.dt * env.control_hz))):
        (px, py), (vx, vy) = env.agent.position, env.agent.velocity
        ax, ay = env.k_p * (x - px) - env.k_v * vx, env.k_p * (y - py) - env.k_v * vy
        env.agent.velocity = (vx + ax * env.dt, vy + ay * env.dt)
        env.space.step(env.dt)


@cache
def contacts() -> tuple[np.ndarray, np.ndarray]:
    """Points around the T, every 13 pixels or less, and the normals there, in its frame."""
    points, normals = [], []
    for start, end in zip(OUTLINE, np.roll(OUTLINE, -1, axis=0), strict=True):
        side = end - start
        length = float(np.linalg.norm(side))
        normal = np.array((side[1], -side[0])) / length
        for fraction in (np.arange(count := max(2, round(length / 13))) + 0.5) / count:
            points.append(start + fraction * side)
            normals.append(normal)
    return np.array(points), np.array(normals)


def distance_to_tee(points: np.ndarray) -> np.ndarray:
    """From points `(..., 2)` in the frame of the T, 0 inside."""
    x, y = points[..., None, 0], points[..., None, 1]
    left, right, low, high = RECTANGLES.T
    dx, dy = np.maximum(np.maximum(left - x, x - right), 0), np.maximum(np.maximum(low - y, y - high), 0)
    return np.hypot(dx, dy).min(axis=-1)


def way_around(start: np.ndarray, end: np.ndarray, pose: Pose) -> np.ndarray:
    """A short way that keeps clear of the T, `(n, 2)`, by Dijkstra's algorithm on a grid and straightened."""
    count = (SIDE - 2 * MARGIN) // CELL + 1
    axis = MARGIN + CELL * np.arange(count)
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    near = np.maximum(CLEARANCE - distance_to_tee(pose.to_local(nodes)), 0)  # it costs to be too near, so as to get out
    first, last = (tuple(np.clip(np.round((p - MARGIN) / CELL), 0, count - 1).astype(int)) for p in (start, end))
    came_from = shortest(near, first, last)
    cells = [last]
    while cells[-1] != first:
        cells.append(came_from[cells[-1]])
    path = [start, *(nodes[cell] for cell in cells[-2:0:-1]), end]
    return straightened(np.array(path), pose)


def shortest(near: np.ndarray, first: tuple, last: tuple) -> dict[tuple, tuple]:
    """For each cell of a grid that was reached, the one before it on the cheapest way from the first to the last."""
    cost, came_from, queue = {first: 0.0}, {}, [(0.0, first)]
    moves = [(i, j, float(np.hypot(i, j))) for i, j in product((-1, 0, 1), repeat=2) if i or j]
    while queue:
        so_far, cell = heapq.heappop(queue)
        if cell == last:
            break
        for i, j, length in moves:
            other = (cell[0] + i, cell[1] + j)
            if not (0 <= other[0] < near.shape[0] and 0 <= other[1] < near.shape[1]):
                continue
            total = so_far + length * (1 + float(near[other]))
            if total < cost.get(other, np.inf):
                cost[other], came_from[other] = total, cell
                heapq.heappush(queue, (total, other))
    return came_from


def straightened(path: np.ndarray, pose: Pose) -> np.ndarray:
    """Leaves out the points of a way between which a straight line is as clear of the T."""
    kept, here = [path[0]], 0
    while here < len(path) - 1:
        there = len(path) - 1
        while there > here + 1 and not is_clear(path[here], path[there], pose):
            there -= 1
        kept.append(path[there])
        here = there
    return np.array(kept)


def is_clear(start: np.ndarray, end: np.ndarray, pose: Pose) -> bool:
    fractions = np.linspace(0, 1, 2 + int(np.linalg.norm(end - start) / 5))[:, None]
    return bool((distance_to_tee(pose.to_local(start + fractions * (end - start))) > CLEARANCE).all())


def ahead_on(path: np.ndarray, position: np.ndarray, lookahead: float) -> np.ndarray:
    """The point of a way that lies so far behind the point of it that is nearest to the position."""
    sides = np.diff(path, axis=0)
    lengths = np.maximum(np.linalg.norm(sides, axis=-1), 1e-9)
    along = np.clip(((position - path[:-1]) * sides).sum(axis=-1) / lengths**2, 0, 1)
    feet = path[:-1] + along[:, None] * sides
    nearest = int(np.linalg.norm(feet - position, axis=-1).argmin())
    left = lookahead + along[nearest] * lengths[nearest]
    for side, length, start in zip(sides[nearest:], lengths[nearest:], path[nearest:-1], strict=True):
        if left <= length:
            return start + side * (left / length)
        left -= length
    return path[-1]
