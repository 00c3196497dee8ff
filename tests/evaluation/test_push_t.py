"""The frozen protocol, its controls, and closed-loop evaluation from images."""

from hashlib import sha256
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig
from cjepa_hf.checkpoints import bundled_checkpoint
from cjepa_hf.evaluation import suite
from cjepa_hf.evaluation.protocols import load_protocol, make_push_t_protocol, protocol_names
from cjepa_hf.evaluation.push_t import run_actions, run_baseline, run_policy, select_tasks, simulator_policy
from cjepa_hf.evaluation.suite import evaluate_push_t, make_policy
from cjepa_hf.planning.planners import CEMGDPlanner, CEMPlanner
from cjepa_hf.simulators.push_t import push_t_success, state_errors


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("pusht-25")


def test_the_protocol_holds_what_it_promises(protocol):
    tasks = protocol["tasks"]
    assert "pusht-25" in protocol_names() and len(tasks["state"]) == 200
    assert (tasks["bin"] == "near").sum() == (tasks["bin"] == "far").sum() == 100
    assert not push_t_success(tasks["goal_state"], tasks["state"]).any()  # none starts solved
    move = np.linalg.norm(tasks["goal_state"][:, 2:4] - tasks["state"][:, 2:4], axis=1)
    turn = np.rad2deg(state_errors(tasks["goal_state"], tasks["state"])[1])
    assert ((move > 20) | (turn > 20)).all()
    assert ((move < 75) == (tasks["bin"] == "near")).all()
    assert len(np.unique(tasks["state"], axis=0)) == 200


def test_the_frozen_file_is_what_its_recipe_makes(protocol):
    """Not a byte has changed, and ten tasks drawn anew are among the two hundred (the first of each bin)."""
    content = (files("cjepa_hf.evaluation") / "protocols" / "pusht-25.json").read_bytes()
    assert sha256(content).hexdigest() == "745528b80a12a1b150b1da4f2a362dbce5e095764639d45cf7a3675fdb4e99f4"
    small = make_push_t_protocol(num_tasks=10)["tasks"]
    for name in ("near", "far"):
        ours = [s for s, b in zip(small["state"], small["bin"]) if b == name]
        frozen = protocol["tasks"]["state"][protocol["tasks"]["bin"] == name][:5]
        np.testing.assert_allclose(ours, frozen, atol=1e-3)


def test_controls_replay_succeeds_and_doing_nothing_never_does(protocol):
    replay = run_baseline("replay", protocol, num_tasks=20)
    nothing = run_baseline("no-op", protocol, num_tasks=20)
    assert replay.success.mean() >= 0.9 and not nothing.success.any()
    assert (replay.steps <= 26).sum() >= 18 and (nothing.steps == protocol["budget"]).all()
    assert run_baseline("random", protocol, num_tasks=20).success.mean() <= 0.2
    with pytest.raises(ValueError, match="replay"):
        run_baseline("best", protocol)


def test_a_task_ends_at_its_first_success_and_stays_there(protocol):
    results = run_actions(protocol["tasks"]["actions"][:5], protocol, num_tasks=5)
    assert results.success.any()
    for task in np.flatnonzero(results.success):
        step = results.steps[task]
        goal = protocol["tasks"]["goal_state"][task]
        assert push_t_success(goal, results.states[task, step])
        assert not push_t_success(goal, results.states[task, :step]).any()
        assert (results.states[task, step:] == results.states[task, step]).all()


def test_the_true_simulator_as_model_solves_tasks_that_chance_does_not(protocol):
    actions = protocol["tasks"]["actions"].reshape(-1, 10)
    policy = simulator_policy(
        torch.tensor(actions.mean(0)),
        torch.tensor(actions.std(0)),
        frame_skip=5,
        planner=CEMPlanner(num_samples=24, num_iterations=4, num_elites=5),
        generator=torch.Generator().manual_seed(0),
    )
    results = run_policy(policy, protocol, num_tasks=2, progress=False)
    assert results.success.all() and (results.plans >= 1).all() and results.seconds_per_plan > 0


@pytest.mark.parametrize("size", [64, 96])
def test_goals_and_frames_are_drawn_as_large_as_the_models_encoder_takes_them(protocol, size):
    seen = []

    class Still:
        """A policy that does nothing and keeps what it sees."""

        model = SimpleNamespace(slot_encoder=SimpleNamespace(config=SimpleNamespace(image_size=size)))
        needs_observation, num_plans = True, np.zeros(2, int)

        def reset(self, goal):
            seen.append(goal["pixels"])

        def act(self, observation, active):
            seen.append(observation["pixels"])
            return np.zeros((2, 2))

    run_policy(Still(), protocol | {"budget": 1}, num_tasks=2, progress=False)
    assert [pixels.shape for pixels in seen] == [(2, size, size, 3)] * 2


def test_more_tasks_than_there_are_is_an_error(protocol):
    with pytest.raises(ValueError, match="200 tasks"):
        select_tasks(protocol, 201)
    with pytest.raises(ValueError, match="pusht-25"):
        load_protocol("pusht-24")


@pytest.mark.parametrize(
    ("change", "message"),
    [({}, "holds no slot encoder"), ({"action_size": 15}, "those of Push-T have 2 numbers each")],
)
def test_a_model_that_cannot_play_push_t_from_images_is_told_why(tmp_path, change, message):
    size = dict(slot_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=16, action_size=10)
    encoder = {"slot_encoder_config": ColorIsaConfig(slot_size=16)} if change else {}
    CJepaModel(CJepaConfig(**(size | encoder | change))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate_push_t(str(tmp_path), num_tasks=1, progress=False)


def test_the_simulator_in_the_models_place_plans_without_gradients_on_the_schedule_asked_for(monkeypatch):
    policies = []

    def keep(policy, *args, **kwargs):
        policies.append(policy)
        return SimpleNamespace(success=np.ones(1, bool), summary=lambda: {"rate": 1.0})

    monkeypatch.setattr(suite, "run_policy", keep)
    model = str(bundled_checkpoint())
    results = evaluate_push_t(model, planners=["default/receding"], num_tasks=1, simulator_tasks=1, progress=False)
    assert [row["name"] for row in results["rows"]] == ["default/receding", "true simulator, sampling/receding"]
    of_model, of_simulator = policies
    assert type(of_model.planner) is CEMGDPlanner and type(of_simulator.planner) is CEMPlanner
    assert of_simulator.schedule == "receding"


def test_validation_tasks_are_other_tasks(protocol):
    validation = load_protocol("pusht-25-validation")["tasks"]["state"]
    assert validation.shape == (200, 7)
    both = np.concatenate([validation, protocol["tasks"]["state"]])
    assert len(np.unique(both, axis=0)) == 400


def test_policies_are_named_by_what_they_do():
    model = CJepaModel(CJepaConfig(slot_size=16, num_attention_heads=4, action_size=10, num_hidden_layers=1)).eval()
    model.set_statistics(action_mean=np.zeros(10), action_std=np.ones(10))
    policy = make_policy(model, "cem:100x10:15/receding/window=2")
    planner = policy.planner
    assert (planner.num_samples, planner.num_iterations, planner.num_elites) == (100, 10, 15)
    assert policy.schedule == "receding" and policy.rollout_options["window"] == 2
    paper = make_policy(model, "paper")
    assert (paper.planner.num_iterations, paper.schedule, paper.rollout_options["match_slots"]) == (
        30,
        "receding",
        True,
    )
    assert make_policy(model, "default").schedule == "shrinking"
    held = make_policy(model, "cem:100x10:15/held=5").planner
    assert (held.num_samples, held.held_steps) == (100, 5)
    model.config.planning_window = 1
    windows = {name: make_policy(model, name).rollout_options["window"] for name in ("default", "paper")}
    assert windows == {"default": 1, "paper": None}
    for wrong in ("cem:100", "default/sometimes", "default/held=5", "best"):
        with pytest.raises(ValueError, match=wrong.split("/")[-1]):
            make_policy(model, wrong)
