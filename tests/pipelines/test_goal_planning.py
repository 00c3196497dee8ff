import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from cjepa_hf import CJepaConfig, CJepaModel
from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor
from cjepa_hf.pipelines import register_pipelines
from cjepa_hf.planning import CEMPlanner

SMALL = dict(num_samples=20, num_iterations=2, num_elites=5)
ENCODER = ColorIsaConfig(num_slots=4, slot_size=16, image_size=32, hidden_size=16, mlp_size=16, stem_channels=8)


def build(encoder=False, **kwargs):
    torch.manual_seed(0)
    config = dict(slot_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, action_size=10)
    if encoder:
        config["slot_encoder_config"] = ENCODER
    model = CJepaModel(CJepaConfig(**{**config, "proprio_size": 4, **kwargs})).eval()
    model.set_statistics(action_mean=torch.full((10,), 0.01), action_std=torch.full((10,), 0.2))
    if model.config.proprio_size:
        model.set_statistics(proprio_mean=torch.tensor([250.0, 250.0, 0.0, 0.0]), proprio_std=torch.full((4,), 50.0))
    return model


@pytest.fixture(scope="module")
def planner():
    register_pipelines()
    return pipeline("goal-planning", model=build(), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that holds a slot encoder, with its image processor beside it."""
    register_pipelines()
    path = tmp_path_factory.mktemp("model")
    build(encoder=True).save_pretrained(path)
    ColorIsaImageProcessor(size=32).save_pretrained(path)
    return path


def scenes(seed=0):
    generator = np.random.default_rng(seed)
    start, goal = generator.normal(size=(2, 4, 16)).astype(np.float32)
    return {"start": start, "goal": goal, "proprio": [200.0, 300.0, 5.0, 0.0]}


def images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, (2, 48, 48, 3), dtype=np.uint8)


def test_slots_give_actions_in_environment_units(planner):
    plan = planner(scenes(), **SMALL)
    assert set(plan) == {"actions", "slots", "cost", "proprio"}
    assert plan["actions"].shape == (25, 2) and plan["actions"].dtype == np.float32
    assert np.abs(plan["actions"]).max() <= 1
    assert plan["slots"].shape == (5, 4, 16)
    assert isinstance(plan["cost"], float) and plan["cost"] > 0
    np.testing.assert_array_equal(plan["proprio"], np.float32([200, 300, 5, 0]))


def test_imagined_slots_and_cost_belong_to_the_actions(planner):
    scene, model = scenes(), planner.model
    plan = planner(scene, **SMALL)
    actions = model.normalize_actions(torch.from_numpy(plan["actions"]).reshape(1, 5, 10))
    proprio = model.normalize_proprio(torch.tensor([[scene["proprio"]]]))
    with torch.no_grad():
        start = torch.from_numpy(scene["start"])[None, None]
        slots = model.rollout(start, actions=actions, proprio=proprio, match_slots=True).slots
    np.testing.assert_allclose(plan["slots"], slots[0].numpy(), atol=1e-4)
    unmatched = planner(scene, match_slots=False, **SMALL)
    error = np.square(unmatched["slots"][-1] - scene["goal"]).mean()
    assert unmatched["cost"] == pytest.approx(error, rel=1e-4)


def test_more_search_lowers_the_cost(planner):
    costs = [planner(scenes(), num_samples=n, num_iterations=i, num_elites=5)["cost"] for n, i in ((5, 1), (100, 10))]
    assert costs[1] < costs[0]


def test_a_list_gives_one_plan_each_and_seeds_fix_them(planner):
    both = planner([scenes(0), scenes(1)], seed=3, **SMALL)
    alone = planner(scenes(1), seed=3, **SMALL)
    assert len(both) == 2
    np.testing.assert_array_equal(both[1]["actions"], alone["actions"])
    assert not np.array_equal(alone["actions"], planner(scenes(1), seed=4, **SMALL)["actions"])
    assert planner([], **SMALL) == []


@pytest.mark.parametrize("choice", ["cem", "icem", "mppi", CEMPlanner(**SMALL)], ids=str)
def test_planners_by_name_or_object(planner, choice):
    plan = planner(scenes(), planner=choice, horizon=3, **SMALL)
    assert plan["actions"].shape == (15, 2) and plan["slots"].shape == (3, 4, 16)


def test_missing_proprioception_is_the_mean_with_a_warning(planner):
    scene = scenes()
    del scene["proprio"]
    with pytest.warns(UserWarning, match="trained with proprioception"):
        plan = planner(scene, **SMALL)
    np.testing.assert_array_equal(plan["proprio"], np.float32([250, 250, 0, 0]))


def test_goal_proprioception_adds_to_the_cost(planner):
    far = {**scenes(), "goal_proprio": [5000.0, 5000.0, 0.0, 0.0]}
    assert planner(far, **SMALL)["cost"] > planner(scenes(), **SMALL)["cost"] + 1
    assert planner(far, proprio_weight=0.0, **SMALL)["cost"] == planner(scenes(), **SMALL)["cost"]


def test_a_folder_plans_from_images_of_every_kind(folder, tmp_path):
    planner = pipeline("goal-planning", model=str(folder), device="cpu", **SMALL)
    assert isinstance(planner.image_processor, ColorIsaImageProcessor) and planner.image_processor.size == 32
    start, goal = images()
    Image.fromarray(start).save(tmp_path / "start.png")
    Image.fromarray(goal).save(tmp_path / "goal.png")
    kinds = [
        {"start": start, "goal": goal},
        {"start": Image.fromarray(start), "goal": Image.fromarray(goal)},
        {"start": str(tmp_path / "start.png"), "goal": tmp_path / "goal.png"},
        {"start": start[..., ::-1].copy()[..., ::-1], "goal": torch.from_numpy(goal)},  # as turned from BGR: a view
    ]
    plans = planner([{**kind, "proprio": [200.0, 300.0, 5.0, 0.0]} for kind in kinds])
    for plan in plans:
        np.testing.assert_array_equal(plan["actions"], plans[0]["actions"])
    with torch.no_grad():
        pixels = ColorIsaImageProcessor(size=32)([start, goal], return_tensors="pt")["pixel_values"]
        slots = planner.model.encode(pixels.unsqueeze(1))[:, 0].numpy()
    from_slots = planner({"start": slots[0], "goal": slots[1], "proprio": [200.0, 300.0, 5.0, 0.0]})
    np.testing.assert_allclose(from_slots["actions"], plans[0]["actions"], atol=1e-4)


def test_the_encoders_own_processor_serves_where_none_was_saved(tmp_path):
    register_pipelines()
    build(encoder=True).save_pretrained(tmp_path)
    planner = pipeline("goal-planning", model=str(tmp_path), device="cpu")
    assert isinstance(planner.image_processor, ColorIsaImageProcessor) and planner.image_processor.size == 32


def test_a_saved_pipeline_loads_again_without_trusting_code(folder, tmp_path):
    planner = pipeline("goal-planning", model=str(folder), device="cpu", **SMALL)
    planner.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline("goal-planning", model=str(tmp_path), device="cpu", **SMALL)
    start, goal = images()
    scene = {"start": start, "goal": goal, "proprio": [200.0, 300.0, 5.0, 0.0]}
    np.testing.assert_array_equal(again(scene)["actions"], planner(scene)["actions"])


def test_a_model_without_auxiliary_inputs_plans_without_warnings():
    register_pipelines()
    planner = pipeline("goal-planning", model=build(proprio_size=0), device="cpu")
    scene = scenes()
    with pytest.raises(ValueError, match="takes no proprioception"):
        planner(scene, **SMALL)
    del scene["proprio"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert planner(scene, **SMALL)["proprio"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": images()[0]}, "holds no slot encoder"),
        ({"goal": np.zeros((4, 8), np.float32)}, r"float slots \[N, D=16\]"),
        ({"goal": np.zeros((4, 16), np.uint8)}, r"float slots \[N, D=16\]"),
        ({"goal": np.full((4, 16), np.nan, np.float32)}, "goal_slots holds NaN"),
        ({"goal": np.zeros((5, 16), np.float32)}, "goal_slots"),
        ({"proprio": [1.0, 2.0]}, "proprio must be 4 finite numbers"),
        ({"proprio": [1.0, 2.0, 3.0, np.nan]}, "proprio must be 4 finite numbers"),
        ({"proprioception": [0.0] * 4}, 'expected a dictionary with "start", "goal"'),
    ],
)
def test_wrong_inputs_are_explained(planner, change, message):
    with pytest.raises(ValueError, match=message):
        planner({**scenes(), **change}, **SMALL)


def test_what_is_no_color_image_is_explained(folder, tmp_path):
    planner = pipeline("goal-planning", model=str(folder), device="cpu", **SMALL)
    start, goal = images()
    Image.fromarray(start).convert("L").save(tmp_path / "gray.png")
    Image.fromarray(start).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    wrong = [
        (None, "start is NoneType of shape"),
        (start[None], r"shape \[1, 48, 48, 3\]: give one image"),
        (tmp_path / "gray.png", "gray.png is an image of mode 'L'"),
        (tmp_path / "cut.png", "cut.png cannot be read as an image"),
        (start.transpose(2, 0, 1), "channels first"),
    ]
    for image, message in wrong:
        with pytest.raises(ValueError, match=message):
            planner({"start": image, "goal": goal, "proprio": [200.0, 300.0, 5.0, 0.0]})


def test_wrong_options_and_models_are_explained(planner):
    with pytest.raises(ValueError, match="unknown option"):
        planner(scenes(), samples=3)
    with pytest.raises(ValueError, match="planner must be one of"):
        planner(scenes(), planner="shooting")
    with pytest.raises(ValueError, match="num_elites"):
        planner(scenes(), num_samples=3)
    bare = CJepaModel(planner.model.config).eval()
    with pytest.raises(ValueError, match="set_statistics"):
        pipeline("goal-planning", model=bare, device="cpu")(scenes(), **SMALL)
    with pytest.raises(FileNotFoundError):
        pipeline("goal-planning", model=build(encoder=True), device="cpu")({"start": "none.png", "goal": "none.png"})
