"""Influence: what the measures say of models whose use of others is known, and truths against simulations."""

import json

import numpy as np
import pytest
import torch

from cjepa_hf import CJepaConfig, CJepaModel
from cjepa_hf.analysis import (
    analyze,
    collision_interventions,
    influence,
    matched_pairs,
    plot_influence,
    push_t_interventions,
    windows_of,
)
from cjepa_hf.cli import main
from cjepa_hf.data.slots import load_slot_dataset, write_slot_dataset
from cjepa_hf.data.state_slots import OBJECT_PAIRS, state_slots
from cjepa_hf.simulators.collisions import CollisionObject, CollisionWorld
from cjepa_hf.simulators.push_t import PushTWorld

N, D = 4, 16


def tiny_model(**changes) -> CJepaModel:
    torch.manual_seed(0)
    config = {
        "num_slots": N, "slot_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "action_size": 2, "proprio_size": 3, "history_length": 3, "prediction_length": 2, "num_masked_slots": 1,
    }  # fmt: skip
    return CJepaModel(CJepaConfig(**(config | changes))).eval()


def scene(model, count=3, steps=3):
    generator = torch.Generator().manual_seed(1)
    config = model.config
    inputs = {"slots": torch.randn(count, steps, N, D, generator=generator)}
    for name in ("action", "proprio"):
        if size := getattr(config, f"{name}_size"):
            key = "actions" if name == "action" else name
            inputs[key] = torch.randn(count, steps, size, generator=generator)
    return inputs


def one_step(model, inputs, slots=None):
    inputs = inputs if slots is None else {**inputs, "slots": slots}
    with torch.no_grad():
        return model.predict(**inputs)


@pytest.mark.parametrize("fusion", ["tokens", "concat"])
def test_leave_one_out_is_the_change_of_what_the_model_itself_predicts(fusion):
    size = {} if fusion == "tokens" else {"action_embedding_size": 4, "proprio_embedding_size": 4}
    model = tiny_model(auxiliary_fusion=fusion, **size)
    inputs = scene(model)
    found = influence(model, **inputs, setting="future")["leave_one_out"]
    assert found.shape == (3, N, N + 2 * (fusion == "tokens"))
    whole = one_step(model, inputs)
    for j in range(N):
        keep = [k for k in range(N) if k != j]
        change = one_step(model, inputs, inputs["slots"][:, :, keep]) - whole[:, :, keep]
        torch.testing.assert_close(found[:, keep, j], change.square().mean((1, 3)).sqrt(), atol=1e-6, rtol=1e-4)
    assert found[:, :, :N].diagonal(dim1=1, dim2=2).isnan().all()
    assert found.isnan().sum() == 3 * N


@pytest.mark.parametrize("anchor", ["first", "last_visible"])
def test_a_hidden_target_is_explained_in_its_hidden_frames(anchor):
    model = tiny_model(anchor=anchor, action_size=0, proprio_size=0, visible_prefix=2)
    inputs = scene(model)
    found = influence(model, **inputs, setting="masked")["leave_one_out"]
    for target in range(N):
        mask = torch.zeros(3, 3, N, dtype=torch.bool)
        mask[:, 2:, target] = True
        with torch.no_grad():
            whole = model(**inputs, slot_mask=mask).predicted_slots[:, 2, target]
        for j in set(range(N)) - {target}:
            keep = [k for k in range(N) if k != j]
            with torch.no_grad():
                without = model(inputs["slots"][:, :, keep], slot_mask=mask[:, :, keep]).predicted_slots
            change = without[:, 2, keep.index(target)] - whole
            torch.testing.assert_close(found[:, target, j], change.square().mean(1).sqrt(), atol=1e-6, rtol=1e-4)


def test_attention_is_that_of_the_targets_queries_over_all_frames_of_an_entity():
    model = tiny_model()
    inputs = scene(model)
    found = influence(model, **inputs, setting="future")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for layer, weights in enumerate(maps, start=1):
        grid = weights.mean(1).unflatten(1, (5, 6)).unflatten(3, (5, 6))  # frames and tokens of queries and keys
        own = grid[:, 3:, :N].mean(1).sum(2)  # [B, N, M]
        expected = own.masked_fill(torch.eye(N, 6, dtype=torch.bool), torch.nan)
        torch.testing.assert_close(found[f"attention_{layer}"], expected, equal_nan=True)
    # rollout: (I + A2) / 2 (I + A1) / 2
    eye = torch.eye(30)
    flow = (eye + maps[1].mean(1)) / 2 @ ((eye + maps[0].mean(1)) / 2)
    flow = flow.unflatten(1, (5, 6)).unflatten(3, (5, 6))[:, 3:, :N].mean(1).sum(2)
    flow = flow.masked_fill(torch.eye(N, 6, dtype=torch.bool), torch.nan)
    torch.testing.assert_close(found["attention_rollout"], flow, equal_nan=True)


def test_gradient_x_input_is_that_of_the_predicted_motion():
    model = tiny_model(action_size=0, proprio_size=0)
    slots = scene(model)["slots"].requires_grad_(True)
    found = influence(model, slots.detach(), setting="future")["gradient_x_input"]
    for target in range(N):
        moved = model.predict(slots)[:, :, target] - slots.detach()[:, -1:, target]
        (gradient,) = torch.autograd.grad(moved.norm(dim=-1).sum(), slots)
        expected = (gradient * slots).sum(-1).abs().sum(1).detach()
        others = [k for k in range(N) if k != target]
        torch.testing.assert_close(found[:, target, others], expected[:, others])


def test_a_model_that_exchanges_nothing_uses_nobody():
    model = tiny_model()
    for layer in model.predictor.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
    inputs = scene(model)
    for setting in ("masked", "future"):
        found = influence(model, **inputs, setting=setting)
        for name in ("leave_one_out", "gradient_x_input"):
            assert torch.nan_to_num(found[name]).abs().max() < 1e-6


def test_entities_of_several_tokens_are_left_out_together_and_their_attention_adds_up():
    model = tiny_model()
    inputs = scene(model)
    alone = influence(model, **inputs, setting="future")
    groups = [[0, 4, 5], [1], [2], [3]]
    together = influence(model, **inputs, setting="future", entities=groups)
    torch.testing.assert_close(
        together["attention_1"][:, 1:, 0], alone["attention_1"][:, 1:, [0, 4, 5]].sum(-1)
    )  # fmt: skip
    torch.testing.assert_close(together["leave_one_out"][:, 1, 2], alone["leave_one_out"][:, 1, 2])
    assert together["leave_one_out"].shape == (3, 4, 4)
    assert (together["leave_one_out"][:, 1, 0] - alone["leave_one_out"][:, 1, 0]).abs().min() > 1e-4


def test_chunks_change_nothing_and_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.predictor.mask_token.requires_grad_(False)
    inputs = scene(model)
    before = model.config._attn_implementation
    one, many = influence(model, **inputs, batch_size=4), influence(model, **inputs)
    for name in one:
        torch.testing.assert_close(one[name], many[name], equal_nan=True)
    assert model.training and model.config._attn_implementation == before
    assert not model.predictor.mask_token.requires_grad and model.predictor.head.weight.requires_grad
    assert not model.predictor.layers[0].attention._forward_hooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "past"}, "expected one of"),
        ({"entities": [[0], [0]]}, "different tokens"),
        ({"entities": [[4], [0]]}, "come first"),
        ({"entities": [[9]]}, "from 0 to 5"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        influence(model, **scene(model), **changes)


def test_a_history_without_a_hidden_frame_is_refused():
    model = tiny_model(action_size=0, proprio_size=0)
    with pytest.raises(ValueError, match="nothing can be hidden"):
        influence(model, **scene(model, steps=1))
    with pytest.raises(ValueError, match="not a Linear"):
        influence(torch.nn.Linear(1, 1), torch.zeros(1, 2, 1, 1))


# ----------------------------------------------------------------------------------------------------------- truths


def test_push_t_without_its_agent_stands_still_and_without_the_block_the_agent_goes_its_way():
    world = PushTWorld((256, 200, 256, 230, 0, 0, 0))
    start = world.state
    actions = np.tile([0.0, 0.3], (8, 1))
    for action in actions:
        world.step(action)
    assert np.linalg.norm(world.state[2:4] - start[2:4]) > 20  # it is pushed
    without_agent, without_block = push_t_interventions(start, actions)
    np.testing.assert_allclose(without_agent[2:5], start[2:5], atol=1e-9)
    np.testing.assert_allclose(without_block[:2], world.state[:2], atol=1e-9)


def ball(x, y, vx=0.0, vy=0.0, **kind) -> CollisionObject:
    return CollisionObject(**({"shape": "sphere", "color": "red", "material": "metal"} | kind), position=(x, y),
                           velocity=(vx, vy))  # fmt: skip


def test_an_object_changes_whom_it_hits_directly_and_through_others():
    # 0 hits 1, which hits 2; 3 is near and untouched
    world = CollisionWorld([ball(-1, 0, 3.0), ball(0, 0), ball(0.9, 0), ball(0, 0.75)])
    objects = world.simulate(1).states[0].reshape(6, -1)
    found = collision_interventions(objects, 25)
    assert found[1, 0] == 1 and found[2, 0] == 1 and found[2, 1] == 1 and found[0, 1] == 1
    assert (found[3, :3] == 0).all() and (found[:3, 3] == 0).all()
    assert np.isnan(found[4]).all() and np.isnan(np.diagonal(found)).all()
    assert (np.nan_to_num(collision_interventions(objects, 1)) == 0).all()  # too soon


def test_matched_distractors_come_as_near_and_are_of_the_same_stratum():
    closest = np.array([1.0, 2.0, 1.1, 2.2, 5.0, 1.0])
    labels = np.array([True, True, False, False, False, False])
    stratum = np.array([0, 0, 0, 0, 0, 1])
    assert matched_pairs(closest, labels, stratum, 0.5).tolist() == [True, True, True, True, False, False]
    assert matched_pairs(closest, labels, stratum, 0.15).tolist() == [True, False, True, False, False, False]


@pytest.fixture(scope="module")
def collision_slots(tmp_path_factory):
    def episode(number, rng):
        places = [(-2.2, 0.0), (0.0, 0.1), (1.6, 1.2), (-0.5, -1.4)]
        speeds = [(rng.uniform(2, 3), rng.normal(0, 0.1)), (0, 0), (rng.normal(0, 0.3), -0.5), (0.8, 0)]
        world = CollisionWorld([ball(*p, *v) for p, v in zip(places, speeds)])
        simulated = world.simulate(60)
        contacts = np.zeros((60, 15), bool)
        for c in simulated.collisions:
            contacts[c.frame, OBJECT_PAIRS.index(c.pair)] = True
        states = simulated.states
        return {
            "episode_id": f"{number}",
            "slots": state_slots(states, slot_size=32),
            "state": states.astype(np.float32),
            "contacts": contacts,
        }

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("collisions") / "slots"
    splits = {"train": [episode(0, rng)], "validation": [episode(k, rng) for k in range(12)]}
    return write_slot_dataset(folder, splits, frame_skip=4)


def collision_model() -> CJepaModel:
    return tiny_model(num_slots=6, slot_size=32, action_size=0, proprio_size=0, frame_skip=4, history_length=4,
                      visible_prefix=2)  # fmt: skip


def test_collision_windows_say_who_touches_whom_and_who_would_go_elsewhere(collision_slots):
    dataset = load_slot_dataset(collision_slots, "validation")
    windows = windows_of(collision_model(), dataset, num_windows=150, seed=1)
    assert windows.slots.shape == (150, 4, 6, 32)
    for truth in windows.truths.values():
        both = np.isfinite(truth.touches) & np.isfinite(truth.touches.swapaxes(1, 2))
        assert np.array_equal(truth.touches[both], truth.touches.swapaxes(1, 2)[both])
        assert np.isnan(truth.touches[:, 4:]).all()  # there are four objects
        touched, known = truth.touches == 1, np.isfinite(truth.changes)
        assert touched.sum() > 10 and (truth.changes == 1).sum() > 10
        # whoever is not touched by anybody goes where it would go
        alone = known & ~touched.any(2, keepdims=True)
        assert (truth.changes[alone] == 0).all()
        assert (truth.closest[touched] < 0.65).all() and (truth.baselines["distance"][touched] < 0).all()
    near, far = windows.truths["future"].closest[0], -windows.truths["future"].baselines["distance"][0]
    assert (near[:4, :4] <= far[:4, :4] + 1e-9).all()
    frame = windows.frames(0)
    assert frame.shape == (320, 480, 3)
    # objects are drawn where the places say
    x, y = np.rint(windows.places[0, 0] * [480, 320]).astype(int)
    assert frame[y, x, 0] > frame[y, x, 2] + 50


def test_analyze_scores_models_of_two_kinds_and_writes_json(collision_slots, tmp_path, capsys):
    model = collision_model()
    model.save_pretrained(tmp_path / "cj")
    model.config.num_masked_slots = 0
    model.save_pretrained(tmp_path / "oc")
    output, picture = tmp_path / "results" / "influence.json", tmp_path / "influence.png"
    code = main(
        ["analyze", "--model", str(tmp_path / "cj"), str(tmp_path / "oc"), "--dataset", str(collision_slots),
         "--num-windows", "60", "--output", str(output), "--plot", str(picture), "--device", "cpu"]
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert "C-JEPA" in printed and "OC-JEPA" in printed and "leave_one_out" in printed
    results = json.loads(output.read_text())
    assert {row["kind"] for row in results["models"]} == {"C-JEPA", "OC-JEPA"}
    assert results["seed"] == 0 and "hardware" in results and results["num_windows"] == 60
    distance = [row for row in results["means"] if row["measure"] == "distance"]
    assert len(distance) == 8 and all(0.5 < row["auroc"]["value"] <= 1 for row in distance)
    # both have the same weights and windows: nothing differs, whatever the resample
    assert len(results["differences"]) == len(results["means"]) / 2
    for row in results["differences"]:
        assert row["auroc"] == {"value": 0, "low": 0, "high": 0}
    counts = results["counts"][0]
    assert counts["windows"] == 60 or counts["windows"] < 60 < counts["pairs"]
    assert picture.is_file()


def test_other_slots_than_the_models_and_unknown_simulators_are_errors(collision_slots, tmp_path):
    dataset = load_slot_dataset(collision_slots, "validation")
    with pytest.raises(ValueError, match="the slots it was trained on"):
        windows_of(tiny_model(), dataset)
    folder = write_slot_dataset(
        tmp_path / "other",
        {"train": [{"episode_id": "0", "slots": np.zeros((40, N, D)), "state": np.zeros((40, 3)),
                    "contacts": np.zeros((40, 1), bool)}]},
        frame_skip=5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="states of 3 numbers"):
        windows_of(tiny_model(action_size=0, proprio_size=0), load_slot_dataset(folder, "train"))
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no column 'state'"):
        plain = write_slot_dataset(
            tmp_path / "plain", {"train": [{"episode_id": "0", "slots": np.zeros((40, N, D))}]}, frame_skip=5
        )
        analyze([str(tmp_path / "model")], str(plain), split="train", progress=False)


def test_the_picture_shows_the_strongest_influence_as_the_thickest_arrow():
    frame = np.full((100, 100, 3), 255, np.uint8)
    places = np.array([[0.2, 0.2], [0.8, 0.2], [0.2, 0.8]])
    matrix = np.array([[np.nan, 4.0, 1.0], [0.0, np.nan, 0.0], [0.0, 0.0, np.nan]])
    image = np.asarray(plot_influence(matrix, frame, places, ["a", "b", "c"], title="leave_one_out"))
    shown = image[:, -384:].astype(int)
    red = (shown[..., 0] > 180) & (shown[..., 1] < 80)
    across, down = red[40:120, 150:250], red[150:250, 40:120]  # the middle of the arrows b -> a and c -> a
    assert across.sum() > 2 * down.sum() > 0
    assert not red[300:, 300:].any()
    with pytest.raises(ValueError, match="expected"):
        plot_influence(matrix, frame, places[:2], ["a", "b", "c"])
