import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cjepa_hf.models.cjepa import CJepaConfig, CJepaModel
from cjepa_hf.planning import RolloutCost, SlotGoalCost

DATA = Path(__file__).parents[1] / "data"
SIZES = dict(num_hidden_layers=2, intermediate_size=64, action_size=10, proprio_size=4)
CONFIGS = {
    "tokens": dict(slot_size=32, num_attention_heads=16, **SIZES),
    "concat": dict(
        slot_size=24,
        num_attention_heads=4,
        auxiliary_fusion="concat",
        action_embedding_size=4,
        proprio_embedding_size=4,
        **SIZES,
    ),
}


def golden_model(name):
    """The golden model of that name and the rest of the file: what the original code gave with these weights."""
    tensors = load_file(DATA / f"planning_{name}.safetensors")
    model = CJepaModel(CJepaConfig(**CONFIGS[name])).eval()
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if "weights." in key}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {"action_mean", "action_std", "proprio_mean", "proprio_std"}
    return model, tensors


def case(tensors, tag):
    return {key.removeprefix(f"{tag}."): value for key, value in tensors.items() if key.startswith(f"{tag}.")}


@pytest.fixture(scope="module")
def tiny_model():
    torch.manual_seed(0)
    config = CJepaConfig(slot_size=16, num_attention_heads=2, **SIZES)
    return CJepaModel(config).eval()


def tiny_cost(model, batch=3, frames=1, objective=None, **kwargs):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    past = draw(batch, frames - 1, 10) if frames > 1 else None
    cost = RolloutCost(
        model,
        objective or SlotGoalCost(),
        draw(batch, frames, 4, 16),
        draw(batch, 4, 16),
        proprio=draw(batch, frames, 4),
        goal_proprio=draw(batch, 4),
        past_actions=past,
        **kwargs,
    )
    return cost, draw(batch, 7, 5, 10)


# ------------------------------------------------------------------------------------------- against the original


@pytest.mark.parametrize("name", ["tokens", "concat"])
@pytest.mark.parametrize("tag", ["nobs1", "nobs3"])
@torch.no_grad()
def test_rollout_and_cost_equal_the_original(name, tag):
    model, tensors = golden_model(name)
    want = case(tensors, tag)
    # The original takes the first actions of a candidate as those of the observed frames.
    output = model.rollout(
        want["pixels"], actions=want["action_candidates"], proprio=want["proprio"], match_slots=True
    )
    torch.testing.assert_close(output.slots, want["slots"], atol=1e-5, rtol=1e-5)
    goal, goal_proprio = want["goal"][:, -1], model.embed_proprio(want["goal_proprio"][:, -1])
    arguments = (output.slots, output.proprio_embeddings, goal, goal_proprio)
    torch.testing.assert_close(SlotGoalCost()(*arguments), want["cost"], atol=1e-5, rtol=1e-5)
    slots_only = SlotGoalCost(proprio_weight=0)(*arguments)
    torch.testing.assert_close(slots_only, want["slot_cost"], atol=1e-5, rtol=1e-5)
    doubled = SlotGoalCost(proprio_weight=2)(*arguments)
    torch.testing.assert_close(doubled - slots_only, 2 * want["proprio_cost"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tokens", "concat"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_rollout_cost_equals_the_original_planner(name, chunk):
    model, tensors = golden_model(name)
    want = case(tensors, "nobs1")
    cost_fn = RolloutCost(
        model,
        SlotGoalCost(),
        want["pixels"],
        want["goal"][:, -1],
        proprio=want["proprio"],
        goal_proprio=want["goal_proprio"][:, -1],
        match_slots=True,
        max_candidates_per_chunk=chunk,
    )
    for candidates, cost in (
        (want["action_candidates"], want["cost"]),
        (want["action_candidates_2"], want["cost_2_same_id_and_step"]),
    ):
        torch.testing.assert_close(cost_fn(candidates), cost, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_slots", [4, 7])
def test_matched_slot_cost_equals_the_originals_hungarian_cost(num_slots):
    tensors = load_file(DATA / "planning_assignment.safetensors")
    predicted, target = tensors[f"S{num_slots}.pred"], tensors[f"S{num_slots}.target"]
    # [B, T, N, D] golden pairs: every frame is a task with one candidate of one step.
    cost = SlotGoalCost()(predicted.flatten(0, 1)[:, None, None], None, target.flatten(0, 1), None)
    torch.testing.assert_close(cost[:, 0], tensors[f"S{num_slots}.cost.mse.full"].flatten(), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- SlotGoalCost


def test_matching_eight_slots_is_exact():
    generator = torch.Generator().manual_seed(0)
    slots, goal = torch.randn(2, 3, 1, 8, 5, generator=generator), torch.randn(2, 8, 5, generator=generator)
    orders = torch.tensor(list(itertools.permutations(range(8))))
    pairs = (slots[:, :, 0, :, None] - goal[:, None, None]).square().mean(-1)
    best = pairs[:, :, orders, torch.arange(8)].mean(-1).amin(-1)
    torch.testing.assert_close(SlotGoalCost()(slots, None, goal, None), best)


def test_matching_ignores_slot_order_and_no_matching_sees_it():
    slots = torch.randn(2, 3, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    goal = slots[:, 0, -1][:, [2, 0, 3, 1]]
    assert SlotGoalCost()(slots, None, goal, None)[:, 0].abs().max() == 0
    assert (SlotGoalCost(match_slots=False)(slots, None, goal, None)[:, 0] > 0.5).all()


def test_slot_weights_leave_slots_out():
    slots = torch.randn(2, 3, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    goal = slots[:, 0, -1].clone()
    goal[:, 3] += 2
    plain = SlotGoalCost(match_slots=False)(slots, None, goal)
    weighted = SlotGoalCost(match_slots=False, slot_weights=[1, 1, 1, 0])(slots, None, goal)
    equal = SlotGoalCost(match_slots=False, slot_weights=[3, 3, 3, 3])(slots, None, goal)
    assert (weighted[:, 0] == 0).all() and (plain[:, 0] == 1).all()
    torch.testing.assert_close(equal, plain)
    with pytest.raises(ValueError, match="3 slot_weights for 4 slots"):
        SlotGoalCost(slot_weights=[1, 1, 1])(slots, None, goal)
    with pytest.raises(ValueError, match="not all 0"):
        SlotGoalCost(slot_weights=[0, 0, 0, 0])


def test_a_goal_with_other_slots_is_refused():
    with pytest.raises(ValueError, match="same encoder"):
        SlotGoalCost()(torch.zeros(1, 2, 5, 4, 8), None, torch.zeros(1, 6, 8))


# ---------------------------------------------------------------------------------------------------- RolloutCost


@pytest.mark.parametrize("chunk", [1, 4, 7, 10, 14])
def test_chunks_do_not_change_the_cost_and_stay_within_the_limit(tiny_model, chunk, monkeypatch):
    whole, actions = tiny_cost(tiny_model, max_candidates_per_chunk=1000)
    want = whole(actions)
    sizes = []
    rollout = CJepaModel.rollout

    def counted(self, slots, **kwargs):
        sizes.append(kwargs["actions"].shape[0] * kwargs["actions"].shape[1])
        return rollout(self, slots, **kwargs)

    monkeypatch.setattr(CJepaModel, "rollout", counted)
    chunked, _ = tiny_cost(tiny_model, max_candidates_per_chunk=chunk)
    torch.testing.assert_close(chunked(actions), want)
    assert sum(sizes) == 21 and max(sizes) <= chunk
    assert len(sizes) <= {1: 21, 4: 6, 7: 3, 10: 3, 14: 2}[chunk]


def test_max_memory_bounds_the_activations(tiny_model):
    """Counts every tensor that is alive during a rollout, against the limit that was asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    class Peak(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.storages, self.peak = WeakIdKeyDictionary(), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor):
                    self.storages[value.untyped_storage()] = value.untyped_storage().nbytes()
            self.peak = max(self.peak, sum(self.storages.values()))
            return result

    peaks = []
    for limit in (2**20, 2**22):
        cost_fn, _ = tiny_cost(tiny_model, batch=2, max_memory=limit, max_candidates_per_chunk=10**9)
        actions = torch.zeros(2, 300, 5, 10)
        with Peak() as mode:
            cost_fn(actions)
        peaks.append(mode.peak)
        assert mode.peak < limit + actions.nbytes
    assert peaks[1] > 2 * peaks[0]
    with pytest.raises(ValueError, match="max_memory=1000 bytes is less than one candidate needs"):
        tiny_cost(tiny_model, max_memory=1000)
    with pytest.raises(ValueError, match="max_candidates_per_chunk must be at least 1"):
        tiny_cost(tiny_model, max_candidates_per_chunk=0)


@torch.no_grad()
def test_past_frames_and_actions_reach_the_model(tiny_model):
    seen = {}

    def objective(slots, proprio_embeddings, goal_slots, goal_proprio_embeddings):
        seen["slots"] = slots
        return slots.flatten(2).mean(-1)

    cost_fn, actions = tiny_cost(tiny_model, frames=3, objective=objective)
    cost_fn(actions)
    past = cost_fn.past_actions.unsqueeze(1).expand(-1, 7, -1, -1)
    want = tiny_model.rollout(cost_fn.slots, actions=torch.cat([past, actions], 2), proprio=cost_fn.proprio)
    assert seen["slots"].shape == (3, 7, 5, 4, 16)
    torch.testing.assert_close(seen["slots"], want.slots)
    torch.testing.assert_close(cost_fn.imagine(actions[1:2], slice(1, 2)).slots, want.slots[1:2])


def test_a_window_of_one_frame_is_markov(tiny_model):
    full, actions = tiny_cost(tiny_model)
    markov, _ = tiny_cost(tiny_model, window=1)
    assert not torch.allclose(full(actions), markov(actions))
    one_step = actions[:, :, :1]
    torch.testing.assert_close(full(one_step), markov(one_step))


def test_costs_follow_the_models_dtype(tiny_model):
    full, actions = tiny_cost(tiny_model)
    half = CJepaModel(tiny_model.config).eval()
    half.load_state_dict(tiny_model.state_dict())
    low, _ = tiny_cost(half.to(torch.bfloat16))
    assert low(actions).dtype == torch.float32
    torch.testing.assert_close(low(actions), full(actions), atol=0.1, rtol=0.05)


def test_what_cannot_be_planned_is_refused(tiny_model):
    slots, goal, proprio = torch.zeros(2, 1, 4, 16), torch.zeros(2, 4, 16), torch.zeros(2, 1, 4)
    cost = SlotGoalCost()
    with pytest.raises(ValueError, match="takes no actions"):
        RolloutCost(CJepaModel(CJepaConfig(slot_size=16, num_hidden_layers=1)).eval(), cost, slots, goal)
    with pytest.raises(ValueError, match="give `proprio`"):
        RolloutCost(tiny_model, cost, slots, goal)
    with pytest.raises(ValueError, match=r"expected slots \[B, T, N, D\] and goal_slots \[B, N, D\]"):
        RolloutCost(tiny_model, cost, slots, goal[:1], proprio=proprio)
    with pytest.raises(ValueError, match="past_actions"):
        RolloutCost(tiny_model, cost, slots.expand(-1, 2, -1, -1), goal, proprio=proprio.expand(-1, 2, -1))
    with pytest.raises(ValueError, match="goal_slots holds NaN"):
        RolloutCost(tiny_model, cost, slots, goal * torch.nan, proprio=proprio)
    with pytest.raises(ValueError, match="training mode"):
        RolloutCost(CJepaModel(tiny_model.config).train(), cost, slots, goal, proprio=proprio)


# ---------------------------------------------------------------------------------------------------- with gradient


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("match_slots", [False, True])
def test_gradients_of_a_plans_cost_are_those_of_small_changes(tiny_model, frames, match_slots):
    cost, actions = tiny_cost(tiny_model, frames=frames, match_slots=match_slots)
    costs, gradient = cost.with_gradient(actions)
    torch.testing.assert_close(costs, cost(actions))
    assert gradient.shape == actions.shape and not costs.requires_grad
    direction = torch.randn(actions.shape, generator=torch.Generator().manual_seed(3)) * 1e-2
    change = (cost(actions + direction) - cost(actions - direction)) / 2
    torch.testing.assert_close((gradient * direction).sum((2, 3)), change, rtol=0.02, atol=1e-5)


def test_gradients_do_not_depend_on_the_chunks(tiny_model):
    costs, gradient = tiny_cost(tiny_model)[0].with_gradient(actions := tiny_cost(tiny_model)[1])
    for options in ({"max_candidates_per_chunk": 3}, {"max_memory": 2**21}):
        again = tiny_cost(tiny_model, **options)[0].with_gradient(actions)
        torch.testing.assert_close(again, (costs, gradient))
    with pytest.raises(ValueError, match="less than the gradient of one candidate needs"):
        tiny_cost(tiny_model, max_memory=2**17)[0].with_gradient(actions)


def test_gradients_pass_by_slots_that_an_encoder_made_in_inference_mode(tiny_model):
    cost, actions = tiny_cost(tiny_model)
    with torch.inference_mode():
        slots, goal_slots, proprio = cost.slots + 0, cost.goal_slots + 0, cost.proprio + 0
        inside = RolloutCost(
            tiny_model, SlotGoalCost(), slots, goal_slots, proprio=proprio, goal_proprio=proprio[:, 0]
        )
        assert inside.with_gradient(actions)[1].abs().sum() > 0
    outside = RolloutCost(tiny_model, SlotGoalCost(), slots, goal_slots, proprio=proprio)
    assert outside.with_gradient(actions)[1].abs().sum() > 0


def test_an_objective_without_gradient_is_named(tiny_model):
    def blind(slots, *others):
        return slots.detach().square().mean((2, 3, 4))

    cost, actions = tiny_cost(tiny_model, objective=blind)
    with pytest.raises(ValueError, match=r"blind.* passes no gradient on, which CEMGDPlanner needs"):
        cost.with_gradient(actions)
