import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, ColorIsaImageProcessor
from cjepa_hf.imagination import Drop, Empty, Replace, imagine
from cjepa_hf.models.crop_slots import CropSlotsConfig, CropSlotsModel
from cjepa_hf.slot_probe import SlotProbe

N, D = 4, 16


def build(**kwargs):
    torch.manual_seed(0)
    config = dict(num_slots=N, slot_size=D, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    config |= dict(history_length=3, prediction_length=2, frame_skip=2)
    return CJepaModel(CJepaConfig(**{**config, **kwargs})).eval()


def draw(frames=9):
    """Slots of a video: object k is near the k-th axis; and a probe that knows the colors of the objects."""
    noise = 0.1 * torch.randn(frames, N, D, generator=torch.Generator().manual_seed(1))
    slots = noise + 2 * torch.eye(N, D)
    slots[:, 3] = 0
    present = torch.tensor([True, True, True, False]).expand(frames, -1)
    label = torch.tensor([0, 1, 1, 0]).expand(frames, -1)
    probe = SlotProbe.fit(
        slots.flatten(0, 1), present=present.flatten(), positions=slots.flatten(0, 1)[:, 4:6],
        labels={"color": label.flatten()}, attributes={"color": ("red", "blue")},
    )  # fmt: skip
    return slots, probe


@pytest.fixture(scope="module")
def what_if():
    _, probe = draw()
    return pipeline("counterfactual-rollout", model=build(), probe=probe, device="cpu")


def test_it_returns_what_imagine_does_with_interventions_in_words(what_if, tmp_path):
    slots, probe = draw()
    other = np.ones(D, np.float32)
    given = ["drop:1", "empty:red object", ["mask:2", {"kind": "replace", "slot": 0, "by": other}]]
    result = what_if(slots.numpy(), interventions=given, num_frames=5, gif=tmp_path / "a.gif", effect_threshold=0.0)
    same = imagine(
        what_if.model, slots[None], [Drop(1), Empty(0)], num_frames=5, frame_skip=2, empty_slot=probe.empty_slot
    )
    np.testing.assert_allclose(result["factual"], same.factual[0], atol=1e-5)
    np.testing.assert_allclose(result["slots"][:2], same.slots[0], atol=1e-5)
    assert result["slots"].shape == (3, 5, N, D) and result["start"] == 9 and result["history"] == 3
    assert not result["short_history"]
    drop = result["interventions"][0]
    assert drop["intervention"] == "drop:1" and {row["slot"] for row in drop["affected"]} == {0, 2, 3}
    assert all(row["from_frame"] == 9 for row in drop["affected"])
    sizes = [row["largest_effect"] for row in drop["affected"]]
    assert sizes == sorted(sizes, reverse=True)
    assert result["objects"][0] == {"color": "red"} and result["objects"][3] is None
    assert result["paths"]["slots"].shape == (3, 5, N, 2)
    there = probe.present(same.factual[0])  # what is not there is nowhere
    nowhere = probe.positions(same.factual[0]).masked_fill(~there[..., None], torch.nan)
    assert there.any() and not there.all()
    np.testing.assert_allclose(result["paths"]["factual"], nowhere, atol=1e-4)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 2 and picture.size[0] == 4 * 196  # the last of every 2 frames
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"]


def test_an_encoder_beside_the_model_tells_what_is_empty_and_what_is_nowhere(tmp_path):
    torch.manual_seed(0)
    encoder = CropSlotsModel(CropSlotsConfig(num_slots=N, slot_size=32, hidden_size=16, channels=(4, 8))).eval()
    encoder.set_background(torch.full((3, 64, 64), 0.5))
    frames = np.full((6, 64, 64, 3), 128, np.uint8)
    for t, frame in enumerate(frames):
        frame[10:18, 10 + t : 15 + t] = [200, 0, 0]
        frame[40:48, 40:45] = [0, 0, 200]
    model = build(slot_size=32, residual_prediction="last")
    torch.nn.init.zeros_(model.predictor.head.weight)  # it imagines that nothing changes
    torch.nn.init.zeros_(model.predictor.head.bias)
    what_if = pipeline("counterfactual-rollout", model=model, slot_encoder=encoder, device="cpu")
    result = what_if(frames, interventions=["empty:0"], num_frames=3, gif=tmp_path / "c.gif")
    with Image.open(tmp_path / "c.gif") as picture:  # in the shape of the view, 6 to 4, under 18 rows of words
        assert picture.size == (2 * 196, 128 + 18 + 4)
    there = np.isfinite(result["paths"]["slots"][0, 0]).all(-1)
    assert list(there) == [False, True, False, False]
    factual = what_if(frames, num_frames=3)["paths"]["factual"]
    assert list(np.isfinite(factual[0]).all(-1)) == [True, True, False, False]


def test_a_list_of_inputs_and_a_short_video(what_if):
    slots, _ = draw()
    long, short = what_if([{"slots": slots}, {"slots": slots[:3], "interventions": ["drop:0"]}], num_frames=2)
    assert len(long["slots"]) == 0 and short["slots"].shape == (1, 2, N, D)
    assert short["history"] == 1 and short["short_history"]
    assert what_if([]) == []


def test_a_video_goes_through_the_models_encoder_and_is_drawn(tmp_path):
    encoder = ColorIsaConfig(
        num_slots=N, slot_size=D, image_size=32, hidden_size=16, mlp_size=16, stem_channels=8, stem_stride=4
    )
    model = build(slot_encoder_config=encoder)
    frames = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    what_if = pipeline("counterfactual-rollout", model=model, device="cpu")
    result = what_if(frames, interventions=[Drop(2)], num_frames=3, gif=tmp_path / "b.gif")
    pixels = ColorIsaImageProcessor(size=32)(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        slots = model.encode(pixels[None])[0]
    np.testing.assert_allclose(result["observed"], slots, atol=1e-4)
    assert result["paths"]["factual"].shape == (3, N, 2)
    assert np.isnan(result["paths"]["slots"][0, :, 2]).all() and np.isfinite(result["paths"]["slots"][0, :, 3]).all()
    with Image.open(tmp_path / "b.gif") as picture:
        assert picture.n_frames == 1  # the last of every 2
    for index, frame in enumerate(frames):
        (tmp_path / "video").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "video" / f"{index}.png")
    from_path = what_if(str(tmp_path / "video"), num_frames=3)
    np.testing.assert_allclose(from_path["factual"], result["factual"], atol=1e-5)
    images = [Image.fromarray(frame) for frame in frames]
    np.testing.assert_allclose(what_if(images, num_frames=3)["factual"], result["factual"], atol=1e-5)


def test_actions_are_in_environment_units():
    model = build(action_size=6, num_attention_heads=2)
    model.set_statistics(action_mean=torch.full((6,), 0.5), action_std=torch.full((6,), 2.0))
    what_if = pipeline("counterfactual-rollout", model=model, device="cpu")
    slots, _ = draw(frames=3)
    actions = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    other = actions.copy()
    other[-4:-2] += 1  # block 4 of 6; a pass of the model predicts two frames, 5 and 6 the first to know of it
    result = what_if({"slots": slots, "actions": actions}, interventions=[{"kind": "act", "actions": other}])
    blocks = (torch.from_numpy(actions).reshape(1, 6, 6) - 0.5) / 2
    with torch.no_grad():
        expected = model.rollout(slots[None], actions=blocks, num_steps=4).slots
    np.testing.assert_allclose(result["factual"], expected[0], atol=1e-5)
    assert np.abs(result["effect"][0, :2]).max() < 1e-4 < np.abs(result["effect"][0, 3]).max()
    with pytest.raises(ValueError, match="this model takes actions"):
        what_if(slots)


@pytest.mark.parametrize(
    "inputs, options, match",
    [
        ({}, dict(interventions=["drop:blue"]), '2 objects of the video fit "blue"'),
        ({}, dict(interventions=["empty:3"]), "slot 3 of scene 0 is empty"),
        ({}, dict(interventions=["lift:3"]), "'lift:3' is no intervention"),
        ({}, dict(interventions=["delay:0"]), "delay takes"),
        ({}, dict(interventions=["drop:9"]), "must lie in"),
        ({}, dict(frames=3), "unknown option"),
        ({"slots": np.zeros((4, N, 3), np.float32)}, {}, "should be float slots"),
        ({"slots": np.zeros((4, N), np.float32)}, {}, "a video is a path"),
        ({"video": np.zeros((4, 8, 8, 3), np.uint8)}, {}, "no slot encoder"),
        ({"actions": np.zeros((4, 2))}, {}, "takes none"),
        ({"frames": 3}, {}, "expected a dictionary"),
        ({"slots": np.zeros((1, N, D), np.float32)}, {}, "observed frames before start"),
    ],
)
def test_bad_input_is_refused(what_if, inputs, options, match):
    slots, _ = draw()
    inputs = inputs if "video" in inputs else {"slots": slots, **inputs}
    with pytest.raises(ValueError, match=match):
        what_if(inputs, **options)


def test_objects_in_words_need_a_probe_and_pictures_something_to_draw():
    what_if = pipeline("counterfactual-rollout", model=build(), device="cpu")
    slots, _ = draw()
    with pytest.raises(ValueError, match="there is no probe that reads attributes"):
        what_if(slots, interventions=["drop:red object"])
    with pytest.raises(ValueError, match="nothing can be drawn"):
        what_if(slots, gif="x.gif")
    assert what_if(slots, interventions=[Replace(0, slots[:, 1])], num_frames=2)["paths"] is None


def test_model_and_probe_are_loaded_from_one_folder(what_if, tmp_path):
    what_if.save_pretrained(tmp_path)
    again = pipeline("counterfactual-rollout", model=str(tmp_path), device="cpu")
    slots, _ = draw()
    options = dict(interventions=["empty:red object"], num_frames=2)
    np.testing.assert_allclose(again(slots, **options)["slots"], what_if(slots, **options)["slots"], atol=1e-5)
