"""The adapter, under a solver and a policy that ask as stable-worldmodel's do (which is not needed here)."""

import numpy as np
import pytest
import torch

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, ColorIsaImageProcessor, DinoWmConfig, DinoWmModel
from cjepa_hf.planning import RolloutCost, SlotGoalCost
from cjepa_hf.planning.stable_worldmodel import StableWorldModelCost

SIZE, SKIP = 32, 5
ENCODER = ColorIsaConfig(num_slots=3, slot_size=16, image_size=SIZE, hidden_size=16, mlp_size=16, stem_channels=8)
SIZES = dict(
    num_slots=3, slot_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, frame_skip=SKIP,
    action_size=2 * SKIP, slot_encoder_config=ENCODER,
)  # fmt: skip


def build(kind="cjepa", proprio_size=4):
    torch.manual_seed(0)
    if kind == "cjepa":
        model = CJepaModel(CJepaConfig(**SIZES, proprio_size=proprio_size)).eval()
    else:
        model = DinoWmModel(DinoWmConfig(**SIZES, proprio_size=proprio_size, token_type="slots")).eval()
    # every place in a block has statistics of its own
    model.set_statistics(action_mean=torch.linspace(-0.1, 0.1, 10), action_std=torch.linspace(0.1, 0.3, 10))
    if proprio_size:
        model.set_statistics(proprio_mean=torch.full((4,), 200.0), proprio_std=torch.full((4,), 50.0))
    return model


def adapter(kind="cjepa", proprio_size=4, **kwargs):
    return StableWorldModelCost(build(kind, proprio_size), ColorIsaImageProcessor(size=SIZE), **kwargs)


def observation(tasks=2, frames=1, seed=0):
    """What their policies hold for each task, in environment units: [B, T, ...]."""
    random = np.random.default_rng(seed)
    return {
        "pixels": random.integers(0, 255, (tasks, frames, 48, 48, 3), dtype=np.uint8),
        "goal": random.integers(0, 255, (tasks, 1, 48, 48, 3), dtype=np.uint8),
        "proprio": random.uniform(100, 300, (tasks, frames, 4)).astype(np.float32),
        "goal_proprio": random.uniform(100, 300, (tasks, 1, 4)).astype(np.float32),
        "id": np.arange(tasks)[:, None],
        "env_name": ["push_t"] * tasks,
    }


def prepared(info, process, samples):
    """As their policy normalises and their solver expands: [B, S, T, ...]."""
    result = {}
    for name, value in info.items():
        if name in process:
            value = process[name].transform(value.reshape(-1, *value.shape[2:])).reshape(value.shape)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
            value = value.unsqueeze(1).expand(-1, samples, *value.shape[1:])
        result[name] = value
    return result


class Solver:
    """A cross-entropy method that asks as theirs does: one task at a time, the same dictionary at every iteration."""

    def __init__(self, cost, samples=16, iterations=3, elites=4):
        self.cost, self.samples, self.iterations, self.elites = cost, samples, iterations, elites
        self.dtype = next(cost.parameters()).dtype

    @torch.inference_mode()
    def __call__(self, info, process, horizon=5):
        generator = torch.Generator().manual_seed(0)
        plans = []
        for task in range(len(info["pixels"])):
            one = prepared({k: v[task : task + 1] for k, v in info.items()}, process, self.samples)
            before = {k: v.clone() for k, v in one.items() if torch.is_tensor(v)}
            mean, std = torch.zeros(horizon, 10), torch.ones(horizon, 10)
            for _ in range(self.iterations):
                noise = torch.randn(1, self.samples, horizon, 10, generator=generator)
                candidates = (mean + std * noise).to(self.dtype)
                candidates[:, 0] = mean
                costs = self.cost.get_cost(one, candidates)
                assert costs.shape == (1, self.samples)
                best = candidates[0, costs[0].topk(self.elites, largest=False).indices]
                mean, std = best.mean(0), best.std(0)
            assert all(torch.equal(one[k], v) for k, v in before.items()) and one.keys() == info.keys()
            plans.append(mean)
        return torch.stack(plans)


@pytest.mark.parametrize("kind", ["cjepa", "dino-wm"])
@torch.no_grad()
def test_costs_are_those_of_our_planner_for_the_same_raw_actions(kind):
    cost, info = adapter(kind), observation()
    process = cost.process()
    candidates = torch.randn(2, 7, 5, 10, generator=torch.Generator().manual_seed(1))
    got = cost.get_cost(prepared(info, process, 7), candidates)

    model = cost.model
    raw = process["action"].inverse_transform(candidates.unflatten(-1, (SKIP, 2))).flatten(-2)
    processor = ColorIsaImageProcessor(size=SIZE)
    start, goal = (model.encode(processor(list(info[k]))["pixel_values"]) for k in ("pixels", "goal"))
    proprio, goal_proprio = (model.normalize_proprio(torch.from_numpy(info[k])) for k in ("proprio", "goal_proprio"))
    ours = RolloutCost(
        model, SlotGoalCost(match_slots=False), start, goal[:, 0], proprio=proprio, goal_proprio=goal_proprio[:, 0]
    )
    torch.testing.assert_close(got, ours(model.normalize_actions(raw)), atol=1e-5, rtol=1e-5)
    assert got.dtype == torch.float32 and got.std() > 0
    torch.testing.assert_close(cost.criterion(prepared(info, process, 7), candidates), got)


def test_their_solver_lowers_the_cost_and_the_policy_gets_raw_actions():
    cost, info = adapter(), observation()
    process = cost.process()
    plan = Solver(cost, samples=32, iterations=6)(info, process)
    assert plan.shape == (2, 5, 10)
    both = torch.stack([torch.zeros_like(plan), plan], dim=1)
    costs = cost.get_cost(prepared(info, process, 2), both)
    assert (costs[:, 1] < costs[:, 0]).all()
    # what their policy executes: single actions [B, 2] through `inverse_transform`, as numpy
    first = plan.reshape(2, -1, 2)[:, 0].numpy()
    raw = process["action"].inverse_transform(first)
    average = torch.linspace(-0.1, 0.1, 10).view(SKIP, 2).mean(0).numpy()
    np.testing.assert_allclose((raw - average) / first, process["action"].std.numpy()[None].repeat(2, 0), rtol=1e-4)
    np.testing.assert_allclose(process["action"].transform(raw), first, atol=1e-5)


def test_a_scene_is_encoded_once_while_it_stays_the_same():
    cost, calls = adapter(), []
    encode = cost.model.encode
    cost.model.encode = lambda pixels: calls.append(len(pixels)) or encode(pixels)
    process, candidates = cost.process(), torch.randn(1, 4, 5, 10)
    info = observation(tasks=1)
    for _ in range(3):
        before = cost.get_cost(prepared(info, process, 4), candidates)
    assert len(calls) == 2  # start and goal
    other = observation(tasks=1, seed=1)  # the same id
    after = cost.get_cost(prepared(other, process, 4), candidates)
    assert len(calls) == 4 and not torch.allclose(before, after)
    moved = dict(other, proprio=other["proprio"] + 50)
    assert not torch.allclose(cost.get_cost(prepared(moved, process, 4), candidates), after)


@torch.no_grad()
def test_transformed_images_are_taken_as_pixel_values():
    cost, info = adapter(), observation()
    process, candidates = cost.process(), torch.randn(2, 3, 5, 10)
    expected = cost.get_cost(prepared(info, process, 3), candidates)
    processor = ColorIsaImageProcessor(size=SIZE)
    transformed = {k: processor(list(info[k]))["pixel_values"].numpy() for k in ("pixels", "goal")}
    got = cost.get_cost(prepared(info | transformed, process, 3), candidates)
    torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_a_history_of_frames_comes_with_the_actions_between_them():
    cost, info = adapter(), observation(frames=3)
    process, candidates = cost.process(), torch.randn(2, 3, 5, 10)
    ready = prepared(info, process, 3)
    with pytest.raises(ValueError, match="action_history"):
        cost.get_cost(ready, candidates)
    ready["action_history"] = torch.randn(2, 1, 2, 10).expand(-1, 3, -1, -1)
    three = cost.get_cost(ready, candidates)
    changed = dict(ready, action_history=ready["action_history"] + 1)
    assert not torch.allclose(cost.get_cost(changed, candidates), three)
    longer = {k: torch.cat([v[:, :, :1], v], dim=2) if k in ("pixels", "proprio") else v for k, v in ready.items()}
    longer["action_history"] = torch.cat([torch.zeros(2, 3, 1, 10), ready["action_history"]], dim=2)
    torch.testing.assert_close(cost.get_cost(longer, candidates), three)  # the model's history is the last three


def test_a_model_without_proprioception_needs_none():
    cost, info = adapter(proprio_size=0), observation()
    assert set(cost.process()) == {"action"}
    info = {k: v for k, v in info.items() if "proprio" not in k}
    assert cost.get_cost(prepared(info, cost.process(), 2), torch.randn(2, 2, 5, 10)).shape == (2, 2)


def test_a_saved_folder_becomes_a_cost(tmp_path):
    expected = adapter()
    expected.model.save_pretrained(tmp_path)
    ColorIsaImageProcessor(size=SIZE).save_pretrained(tmp_path)
    cost = StableWorldModelCost.from_pretrained(tmp_path, window=1)
    info, candidates = observation(), torch.randn(2, 2, 5, 10)
    got, want = (c.get_cost(prepared(info, c.process(), 2), candidates) for c in (cost, expected))
    assert cost.rollout_options == {"match_slots": False, "window": 1} and cost.frame_skip == SKIP
    assert got.shape == want.shape and not torch.allclose(got, want)  # the window counts


def test_errors_say_what_to_do():
    cost, info = adapter(), prepared(observation(), adapter().process(), 2)
    with pytest.raises(ValueError, match="action_block=5"):
        cost.get_cost(info, torch.randn(2, 2, 25, 2))
    with pytest.raises(ValueError, match="no 'goal'"):
        cost.get_cost({k: v for k, v in info.items() if k != "goal"}, torch.randn(2, 2, 5, 10))
    with pytest.raises(ValueError, match="no gradient"):
        cost.get_cost(info, torch.randn(2, 2, 5, 10, requires_grad=True))
    with pytest.raises(ValueError, match="3 tasks"):
        cost.get_cost(info, torch.randn(3, 2, 5, 10))
    processor = ColorIsaImageProcessor(size=SIZE)
    bare = CJepaModel(CJepaConfig(**SIZES | {"slot_encoder_config": None}))
    with pytest.raises(ValueError, match="no slot encoder"):
        StableWorldModelCost(bare, processor)
    with pytest.raises(ValueError, match="action statistics"):
        StableWorldModelCost(CJepaModel(CJepaConfig(**SIZES)), processor)
