"""Meta-World tasks that differ in picture and instruction only.

The module has the tasks, their instructions and their opposites, and a `World` for each
task that renders, queries the scripted expert and steps. Policies are
beside this module.

Tasks and experts are Meta-World's (Yu et al., 2019, arXiv:1910.10897; McLean et
al., 2025, arXiv:2505.11289). Needs the extra `sim` and a software renderer
(`MUJOCO_GL=egl` or `osmesa` on Linux).
"""

import atexit
import os
import platform
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from mlx_tokprune.errors import InputError

if TYPE_CHECKING:
    import mujoco

SIZE = 112  # pixels; 8 x 8 patches of 14
REPEAT = 3  # simulator steps for which one action is held
HORIZON = 50  # policy steps of an episode
ACTION_DIM = 4  # x, y, z and the gripper, each in [-1, 1]
STATE_DIM = 4  # x, y, z of the hand in metres, and the opening of its fingers


@dataclass(frozen=True)
class Task:
    """Meta-World task with its instruction.

    `opposite` is the task with the opposite instruction. `joint` starts half way
    between `closed` and `opened`, so that the picture alone does not tell the goal.
    `noise` is the largest standard deviation of action noise with which the expert
    still succeeds. `gain` slows experts that would overshoot when an action is held,
    and then oscillate around their goal.
    """

    name: str
    instruction: str
    opposite: str | None = None
    joint: str | None = None
    closed: float = 0.0
    opened: float = 0.0
    noise: float = 0.6
    gain: float = 1.0


_DRAWER = {"joint": "goal_slidey", "closed": 0.0, "opened": -0.16}
_WINDOW = {"joint": "window_slide", "closed": 0.0, "opened": 0.2, "gain": 0.5}
TASKS = {
    task.name: task
    for task in (
        Task("drawer-open", "open the drawer", "drawer-close", **_DRAWER),
        Task("drawer-close", "close the drawer", "drawer-open", **_DRAWER),
        Task("window-open", "open the window", "window-close", **_WINDOW),
        Task("window-close", "close the window", "window-open", **_WINDOW),
        Task("faucet-open", "turn the faucet on", "faucet-close", gain=0.5),
        Task("faucet-close", "turn the faucet off", "faucet-open", gain=0.5),
        Task("button-press-topdown", "press the button", gain=0.5),
        Task("handle-press", "push the handle down", noise=0.3, gain=0.5),
        Task("hammer", "pick up the hammer and hit the nail", noise=0.3),
    )
}


class World:
    """Simulator of one task, with its camera and expert.

    Raises `InputError` when Meta-World is missing.
    """

    def __init__(self, name: str):
        mujoco = import_simulator()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self.task = TASKS[name]
        self._mujoco = mujoco
        self._expert = ENV_POLICY_MAP[f"{name}-v3"]()
        self._env = env = ALL_V3_ENVIRONMENTS[f"{name}-v3"]()
        # Together these make `seed(n); reset()` reproducible.
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        env._partially_observable = False
        env.model.vis.quality.offsamples = 0
        camera = env.model.camera("corner2").id
        env.model.cam_pos[camera] = [0.75, 0.075, 0.7]
        env.model.cam_fovy[camera] = 45
        # Goal markers would show what the instruction has to tell.
        env.model.site_rgba[:, 3] = 0
        self._renderer = _renderer(name, env.model)
        self.success = False

    def reset(self, seed: int) -> None:
        """Start the episode of `seed`."""
        env, task = self._env, self.task
        env.seed(seed)
        self._state, _ = env.reset()
        self.success = False
        if task.joint:
            share = np.random.default_rng(seed).uniform(0.35, 0.65)
            start = task.closed + share * (task.opened - task.closed)
            env.data.joint(task.joint).qpos = start
            self._mujoco.mj_forward(env.model, env.data)
            self._state = env._get_obs()

    def frame(self) -> np.ndarray:
        """Return the camera's frame: `(112, 112, 3)` uint8."""
        renderer, mujoco = self._renderer, self._mujoco
        renderer.update_scene(self._env.data, camera="corner2")
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
        ):
            renderer.scene.flags[flag] = 0
        return renderer.render()[::-1].copy()

    def expert(self) -> np.ndarray:
        """Return the scripted expert's action in this state: `(4,)` in [-1, 1]."""
        if self.task.name == "hammer":
            action = _grasp_and_hit(self._state)
        else:
            action = np.array(self._expert.get_action(self._state), dtype=np.float32)
        action[:3] *= self.task.gain
        return np.clip(action, -1, 1)

    def hand(self) -> np.ndarray:
        """Return the state of the hand: `(4,)` float32."""
        return np.array(self._state[:STATE_DIM], np.float32)

    def ahead(self, count: int) -> np.ndarray:
        """Return the expert's next actions from this state: `(count, 4)`.

        The simulator steps through them; then its state is restored.
        """
        mujoco, env, saved = self._mujoco, self._env, (self._state, self.success)
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        before = np.empty(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, before, kind)
        attributes, actions = dict(vars(env)), []
        for _ in range(count):
            actions.append(self.expert())
            self.step(actions[-1])
        vars(env).update(attributes)
        mujoco.mj_setState(env.model, env.data, before, kind)
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_setState(env.model, env.data, before, kind)  # forward warms up
        self._state, self.success = saved
        return np.stack(actions)

    def step(self, action: np.ndarray) -> bool:
        """Hold `action` for three simulator steps; return whether the task is done."""
        action = np.clip(np.asarray(action, dtype=np.float32), -1, 1)
        for _ in range(REPEAT):
            self._state, _, _, _, info = self._env.step(action)
            self.success = self.success or bool(info["success"])
        return self.success


_renderers: dict[str, "mujoco.Renderer"] = {}


def _renderer(name: str, model: "mujoco.MjModel") -> "mujoco.Renderer":
    """Return the renderer that all worlds of a task share.

    A change of renderer costs nearly as much as a frame. Renderers are closed at exit
    only: an earlier close spoils the frames of the other renderers (OSMesa), and OpenGL
    may be unloaded when `__del__` runs.
    """
    if name not in _renderers:
        _renderers[name] = import_simulator().Renderer(model, SIZE, SIZE)
        atexit.register(_renderers[name].close)
    return _renderers[name]


def _grasp_and_hit(state: np.ndarray) -> np.ndarray:
    """Return the hammer expert's action; fingers close only around the handle.

    Meta-World's own expert closes them on the way down. A policy that closes one frame
    early then presses on the handle for good, and the expert's labels repeat that.
    """
    hand, opening, hammer = state[:3], state[3], state[4:7]
    grip = hammer - np.array([0.04, 0.0, 0.01])
    above, around = grip + np.array([0, 0, 0.12]), grip + np.array([0, 0, 0.03])
    beside_nail = np.array([0.05, 0.71, 0.16])
    lifted = grip[2] >= 0.03
    if np.linalg.norm(hand[:2] - grip[:2]) > 0.04:
        target, close = above, False
    elif not lifted and abs(hand[2] - grip[2]) > 0.055:
        target, close = around, False
    elif not lifted and opening > 0.65:
        target, close = around, True
    elif np.linalg.norm((hand - beside_nail)[[0, 2]]) > 0.02:
        target, close = np.array([beside_nail[0], hand[1], beside_nail[2]]), True
    else:
        target, close = beside_nail, True
    return np.append(10 * (target - hand), 1 if close else -1).astype(np.float32)


def import_simulator() -> ModuleType:
    """Import MuJoCo with a software renderer.

    Raises `InputError` when Meta-World is missing.
    """
    if platform.system() == "Linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # read at the first import
    # Experts exceed the simulator's limits, which warns; `World.expert` clips.
    warnings.filterwarnings("ignore", "Constant", UserWarning, "metaworld")
    try:
        import metaworld  # noqa: F401
        import mujoco
    except ImportError:
        raise InputError(
            "the tasks come from Meta-World; pip install 'mlx-tokprune[sim]'"
        ) from None
    return mujoco
