"""CF-rollout: controls score what they must, and models see what they may."""

import json

import datasets
import numpy as np
import pytest
import torch

from cjepa_hf import bundled_checkpoint
from cjepa_hf.cli import main
from cjepa_hf.data.slots import write_slot_dataset
from cjepa_hf.data.state_slots import OBJECT_PAIRS, empty_slot, state_slots
from cjepa_hf.evaluation import counterfactual, protocols
from cjepa_hf.evaluation.counterfactual import (
    STEPS,
    Paths,
    VideoBootstrap,
    constant_velocity,
    evaluate_cf_rollout,
    imagined_paths,
    interval,
    make_pair_questions,
    observe,
    score_positions,
    simulate_protocol,
)
from cjepa_hf.evaluation.object_slots import PixelSlots, StateSlots
from cjepa_hf.evaluation.protocols import cf_rollout_world, load_protocol, make_cf_rollout_scene
from cjepa_hf.imagination import Empty
from cjepa_hf.models.aloe import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from cjepa_hf.models.cjepa import CJepaConfig, CJepaModel
from cjepa_hf.slot_probe import SlotProbe

TEST, TRAIN, VALIDATION = 12, range(40, 90), range(90, 110)


@pytest.fixture(scope="module")
def protocol():
    return load_protocol("cf-rollout")


@pytest.fixture(scope="module")
def dataset(protocol, tmp_path_factory):
    """State slots of scenes that the tests do not evaluate on."""
    root = tmp_path_factory.mktemp("cf")

    def row(number):
        episode = cf_rollout_world(protocol["tasks"][number]["objects"]).simulate(128)
        contacts = np.zeros((128, 15), bool)
        for c in episode.collisions:
            contacts[c.frame, OBJECT_PAIRS.index(c.pair)] = True
        states = episode.states.astype(np.float32)
        return {"episode_id": f"{number}", "slots": state_slots(states), "state": states, "contacts": contacts}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        encoder = {"name": "state", "velocities": False, "empty_slot": empty_slot().tolist()}
        splits = {"train": map(row, TRAIN), "validation": map(row, VALIDATION)}
        write_slot_dataset(root / "slots", splits, frame_skip=4, encoder=encoder)
        yield root / "slots"


@pytest.fixture(scope="module")
def truth(protocol):
    return simulate_protocol(protocol, TEST)


@pytest.fixture(scope="module")
def probe(truth):
    return StateSlots().fit(truth[0].states)


def flying_model(**changes) -> CJepaModel:
    """Untrained, but exact: with a head of zeros, what it predicts is constant velocity."""
    torch.manual_seed(0)
    config = CJepaConfig(
        num_slots=6, slot_size=64, history_length=6, prediction_length=2, frame_skip=4, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=32, residual_prediction="velocity", anchor="last_visible",
        visible_prefix=2, num_masked_slots=1, **changes,
    )  # fmt: skip
    return CJepaModel(config).eval()


@pytest.fixture(scope="module")
def results(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    flying_model().save_pretrained(folder / "flying")
    aloe = AloeConfig(num_slots=6, slot_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AloeForVideoQuestionAnswering(aloe).save_pretrained(folder / "words")
    AloeProcessor().save_pretrained(folder / "words")
    output = folder / "results.json"
    words = f"evaluate --protocol cf-rollout --model {folder / 'flying'} --dataset {dataset} --num-tasks {TEST} "
    words += f"--text-only {folder / 'words'} --occluded --operator empty drop --output {output} --json --device cpu"
    assert main(words.split()) == 0
    return json.loads(output.read_text())


def row_of(results, name, start="B"):
    (row,) = [row for row in results["rows"] if row["name"] == name and row["start"] == start]
    return row


def test_the_frozen_scenes_are_those_of_its_recipe(protocol):
    assert len(protocol["tasks"]) == 500
    assert make_cf_rollout_scene(protocol["source"]["seed"], 0) == protocol["tasks"][0]
    outcomes = [answer for task in protocol["tasks"] for q in task["questions"] for answer in q["answers"]]
    assert 0.4 < outcomes.count("correct") / len(outcomes) < 0.6


def test_settings_are_chosen_on_other_scenes_by_the_same_recipe(protocol, monkeypatch):
    asked = []

    def scene(seed, index):
        asked.append((seed, index))
        return make_cf_rollout_scene(seed, 0) if len(asked) == 1 else {"objects": []}

    monkeypatch.setattr(protocols, "make_cf_rollout_scene", scene)
    validation = load_protocol("cf-rollout-validation")
    assert asked[0][0] != protocol["source"]["seed"] and len(asked) == len(validation["tasks"]) == 100
    assert validation["tasks"][0]["objects"] and validation["tasks"][0] not in protocol["tasks"]
    rules = {"tasks", "name", "description", "source"}
    assert {k: v for k, v in validation.items() if k not in rules} == {
        k: v for k, v in protocol.items() if k not in rules
    }


def test_both_worlds_are_the_same_until_the_first_contact(truth):
    scenes, removals = truth
    for row in range(len(removals.gone)):
        others = [k for k in range(6) if k != removals.gone[row]]
        until = removals.contact[row] + 1
        np.testing.assert_array_equal(
            removals.positions[row, :until, others], scenes.positions[removals.scene[row], :until, others]
        )
    assert ((removals.contact >= 8) & (removals.contact <= 112)).all()
    assert set(removals.wrong.tolist()) <= {-1, *range(6)} and (removals.wrong != removals.gone).all()


def test_the_truth_without_the_object_scores_best_and_copying_worst(results):
    for start in "BA":
        true, copied = row_of(results, "true positions", start), row_of(results, "copy the video", start)
        assert all(error["value"] < 1e-6 for error in true["position_error"].values())
        assert true["cell_mean"]["value"] > 0.9 and true["informative"]["rate"] > 0.85
        assert copied["informative"]["rate"] < 0.15 and copied["position_error"]["64"]["value"] > 0.5
        assert copied["cell_mean"]["value"] < 0.6
        assert true["questions"]["questions"]["rate"] > 0.5 > copied["questions"]["questions"]["rate"]
        assert true["position_error"]["64"]["n"] == copied["position_error"]["64"]["n"] > 10


def test_every_control_and_model_has_all_scores(results):
    names = ["copy the video", "constant velocity", "true positions"]
    names += [f"flying, {what}" for what in ("empty", "drop", "no removal", "wrong object")]
    for start in "BA":
        assert [row["name"] for row in results["rows"] if row["start"] == start] == names
        for name in names:
            row = row_of(results, name, start)
            assert set(row["position_error"]) == {"16", "32", "48", "64"}
            for key in ("cell_mean", "third_object", "informative", "questions"):
                assert row[key] is not None, (name, key)
            assert row["informative"]["low"] <= row["informative"]["rate"] <= row["informative"]["high"]
    assert [row["name"] for row in results["factual"]] == ["true video", "constant velocity", "flying"]
    assert results["factual"][0]["f1"]["value"] > 0.9
    words = row_of(results, "text only", None)
    assert words["questions"]["questions"]["n"] == row_of(results, "true positions")["questions"]["questions"]["n"]
    assert [row["name"] for row in results["occluded"]] == [
        "flying, hidden", "flying, filled in at constant velocity", "flying, seen", "constant velocity, hidden",
    ]  # fmt: skip
    assert results["num_videos"] == TEST and results["slots"]["encoder"] == "state"


def test_a_model_of_constant_velocity_scores_as_the_control(results):
    """It has no walls and no view, so that only objects on their way out differ."""
    control, model = row_of(results, "constant velocity"), row_of(results, "flying, empty")
    for horizon in ("16", "32"):
        assert model["position_error"][horizon]["value"] == pytest.approx(
            control["position_error"][horizon]["value"], rel=0.1
        )
    wrong = row_of(results, "flying, wrong object")["position_error"]  # nothing is pushed in it: the same, of fewer
    assert wrong["32"]["n"] < model["position_error"]["32"]["n"] and wrong["32"]["value"] < 0.3
    against = {row["control"]: row for row in results["against"] if row["start"] == "B"}
    assert against["constant velocity"]["position_error 16, quotient"]["value"] == pytest.approx(1, abs=0.1)


def test_models_are_compared_with_the_first_on_the_same_resampled_videos(dataset, tmp_path):
    flying_model().save_pretrained(tmp_path / "one")
    flying_model().save_pretrained(tmp_path / "two")
    models = [str(tmp_path / name) for name in ("one", "two")]
    results = evaluate_cf_rollout(models, dataset=str(dataset), num_tasks=TEST, starts=("B",), progress=False)
    pairs = [(row["name"], row["control"]) for row in results["against"]]
    assert ("two", "one") in pairs and ("one", "two") not in pairs
    (row,) = [row for row in results["against"] if row["control"] == "one"]
    assert row["position_error 32, quotient"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert row["cell_mean"] == pytest.approx({"value": 0.0, "low": 0.0, "high": 0.0})


def test_constant_velocity_in_slots_is_constant_velocity_in_space(truth, probe):
    scenes, removals = truth
    slots = StateSlots().slots(scenes.states)
    start = removals.contact // 4 + 1
    observed = observe(slots, probe, removals.scene, scenes.contact, start, removals.contact % 4, entry_steps=3)
    control = constant_velocity(observed)
    found = imagined_paths(flying_model(), observed, probe, {"empty": [(Empty, removals.gone)]}, batch_size=16)
    later = np.arange(STEPS)[None, :, None] >= start[:, None, None]
    both = control.present & later & found["none"].present
    assert both.mean() > 0.1
    np.testing.assert_allclose(found["none"].positions[both], control.positions[both], atol=2e-3)
    # what is removed is gone at once, and the others do not notice in a model without interactions
    rows = np.arange(len(start))
    assert not found["empty"].present[rows, start, removals.gone].any()
    both[rows, :, removals.gone] = False
    np.testing.assert_allclose(found["empty"].positions[both], control.positions[both], atol=2e-3)


def test_nothing_is_seen_after_the_start_but_who_enters_before_any_contact(truth, probe):
    scenes, removals = truth
    slots = StateSlots().slots(scenes.states)
    count = len(removals.gone)
    observed = observe(
        slots, probe, removals.scene, scenes.contact, np.full(count, 3), np.zeros(count, int), entry_steps=3
    )
    shown = (observed.slots - torch.from_numpy(empty_slot())).abs().amax(-1).numpy() > 1e-4  # [R, 32, 6]
    in_view = scenes.in_view[removals.scene][:, observed.frames[0, :32]]
    assert (shown <= in_view).all() and shown[:, :3].sum() == in_view[:, :3].sum()
    assert not shown[:, 3:][in_view[:, [0]].repeat(29, 1)].any()  # who was there at the beginning
    entered = ~in_view[:, 0] & in_view.any(1)
    assert entered.any() and shown.sum(1)[entered].max() <= 3
    late = observed.frames[:, :32, None] > scenes.contact[removals.scene][:, None]
    assert not (shown & late & (np.arange(32) >= 3)[None, :, None]).any()


def test_pairs_are_asked_about_only_where_the_outcome_is_open_and_sure(truth):
    scenes, removals = truth
    first = removals.contact
    questions = make_pair_questions(scenes, removals, first, np.ones((len(first), 6), bool))
    pairs = np.array(OBJECT_PAIRS)
    assert not questions.asked[(pairs[None] == removals.gone[:, None, None]).any(-1)].any()
    assert not (questions.asked & removals.unsure).any()
    assert not (questions.asked & (scenes.meetings[removals.scene] < first[:, None])).any()
    without = removals.meetings < 128
    assert np.array_equal(questions.truth, questions.asked & without)
    # a third object: by hand
    row, pair = np.argwhere(questions.third)[0]
    when = removals.meetings[row, pair] if questions.truth[row, pair] else scenes.meetings[removals.scene[row], pair]
    shared = [k for k, p in enumerate(OBJECT_PAIRS) if k != pair and set(p) & set(OBJECT_PAIRS[pair])]
    assert any(first[row] <= removals.meetings[row, k] < when for k in shared)
    assert questions.truth[row, pair] != questions.video[row, pair]


def test_absent_objects_are_held_where_they_were_seen():
    positions = np.zeros((1, STEPS, 6, 2), np.float32)
    positions[0, :, 0, 0] = np.arange(STEPS)
    present = np.zeros((1, STEPS, 6), bool)
    present[0, 3:6, 0] = True
    held = Paths(positions, present).held()[0, :, 0, 0]
    assert held.tolist() == [3] * 4 + [4, 5] + [5] * (STEPS - 6)
    assert not Paths(positions, present).without(np.array([0])).present.any()
    assert Paths(positions, present).without(np.array([-1])).present.any()


def test_intervals_resample_videos_not_rows():
    video = np.repeat(np.arange(20), 50)  # 50 equal rows per video carry no more than one
    values = np.random.default_rng(0).normal(size=20)[video]
    result = interval(VideoBootstrap(20).mean(values, video), len(video))
    assert result["value"] == pytest.approx(values.mean()) and result["n"] == 1000
    expected = 1.96 * values.std() / np.sqrt(20)
    assert (result["high"] - result["low"]) / 2 == pytest.approx(expected, rel=0.2)
    assert interval(np.full(5, np.nan)) == {"value": None, "low": None, "high": None}


def test_a_probe_is_fitted_and_measured_by_a_command(dataset, tmp_path, capsys):
    words = ["probe", str(dataset), "--encoder", "state", "--output-dir", str(tmp_path / "probe"), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missed"] == 0 and report["position_error_p90"] < 1e-3
    assert SlotProbe.from_pretrained(tmp_path / "probe").has_positions
    assert main([*words, "--num-videos", "0"]) == 2
    assert "--num-videos must be at least 1" in capsys.readouterr().err


def test_bad_arguments_are_named(dataset, tmp_path, capsys):
    flying_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="expected operators"):
        evaluate_cf_rollout([str(tmp_path / "model")], dataset=str(dataset), operators=["vanish"])
    model = flying_model()
    model.config.frame_skip = 2
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"steps of 2 frames.*takes steps of 4"):
        evaluate_cf_rollout([str(tmp_path / "other")], dataset=str(dataset))
    assert main(["evaluate", "--protocol", "cf-rollout", "--model", "x"]) == 2
    assert "--dataset STATE_SLOTS" in capsys.readouterr().err
    assert counterfactual._label("runs/a/final", {"final": 1}) == "a/final"


def test_the_shipped_model_knows_better_than_constant_velocity_where_displaced_objects_go():
    """From pixels, on the first scenes of the protocol, with the probe that ships."""
    folder = bundled_checkpoint("collisions")
    rules = load_protocol("cf-rollout")
    scenes, removals = simulate_protocol(rules, 8)
    source = PixelSlots(folder)
    source.probe = SlotProbe.from_pretrained(folder)
    slots = source.slots(scenes.states)
    assert source.quality(slots, scenes.states)["missed"] < 0.02
    start, phase = removals.contact // 4 + 1, removals.contact % 4
    observed = observe(slots, source.probe, removals.scene, scenes.contact, start, phase, entry_steps=3)
    model = CJepaModel.from_pretrained(folder)
    found = imagined_paths(model, observed, source.probe, {"empty": [(Empty, removals.gone)]})
    bootstrap = VideoBootstrap(len(scenes.states))

    def errors(paths):
        scores, _ = score_positions(
            paths.without(removals.gone), scenes, removals, observed, rules["horizons"], bootstrap
        )
        return np.array([scores[str(h)]["value"] for h in (32, 48, 64)])

    imagined, control = errors(found["empty"]), errors(constant_velocity(observed))
    assert (imagined < 0.8 * control).all() and (imagined < 0.5 * errors(found["none"])).all()


def test_true_videos_through_the_encoder_are_a_control_that_may_be_left_out(dataset, monkeypatch):
    encoded = []
    own = PixelSlots.slots

    def counting(self, states, **options):
        encoded.append(len(states))
        return own(self, states, **options)

    monkeypatch.setattr(PixelSlots, "slots", counting)
    options = dict(dataset=str(dataset), num_tasks=2, starts=("B",), num_training_videos=6, num_tuning_videos=3)
    rows = []
    for true_videos in (True, False):
        results = evaluate_cf_rollout(
            [str(bundled_checkpoint("collisions"))], true_videos=true_videos, progress=False, **options
        )
        rows.append({row["name"]: row for row in results["rows"]})
    removals = results["num_removals"]
    assert encoded == [6, 3, 2, removals, 6, 3, 2]
    control = rows[0].pop("true counterfactual video")
    assert control["position_error"]["32"]["value"] < 0.05
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[0][name]["position_error"] == rows[1][name]["position_error"] for name in rows[0])
