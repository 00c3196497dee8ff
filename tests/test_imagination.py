import numpy as np
import pytest
import torch
from golden import golden_model, read

from cjepa_hf import CJepaConfig, CJepaModel
from cjepa_hf.imagination import (
    Act,
    Delay,
    Drop,
    Empty,
    Mask,
    Replace,
    extend_video,
    first_contact,
    imagine,
    is_empty,
)
from cjepa_hf.simulators.collisions import sample_scene

N, D = 4, 16
EMPTY = torch.full((D,), 3.0)


def build(**kwargs):
    torch.manual_seed(0)
    config = dict(num_slots=N, slot_size=D, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32)
    config |= dict(history_length=4, prediction_length=2)
    return CJepaModel(CJepaConfig(**{**config, **kwargs})).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def slots():
    return torch.randn(3, 8, N, D, generator=torch.Generator().manual_seed(1))


def rollout(model, slots, steps, **kwargs):
    with torch.no_grad():
        return model.rollout(slots[:, -model.config.history_length :], num_steps=steps, **kwargs).slots


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def test_without_interventions_it_is_the_models_rollout(model, slots):
    result = imagine(model, slots, num_frames=5)
    close(result.factual, rollout(model, slots, 5))
    assert result.slots.shape == (3, 0, 5, N, D) and result.history.tolist() == [4, 4, 4]
    assert result.start.tolist() == [8, 8, 8]


def test_removals_mean_what_they_say(model, slots):
    result = imagine(model, slots, [Drop(1), Empty(1), Mask(1)], num_frames=5, empty_slot=EMPTY)
    others = [0, 2, 3]
    close(result.slots[:, 0, :, others], rollout(model, slots[:, :, others], 5))
    assert result.slots[:, 0, :, 1].isnan().all() and not result.slots[:, 1:].isnan().any()
    emptied = slots.clone()
    emptied[:, :, 1] = EMPTY
    close(result.slots[:, 1], rollout(model, emptied, 5))
    hidden = torch.zeros(3, N, dtype=torch.bool)
    hidden[:, 1] = True
    with torch.no_grad():
        filled = model(slots[:, -4:], slot_mask=hidden).predicted_slots[:, :4]
    unobserved = slots[:, -4:].clone()
    unobserved[:, 1:, 1] = filled[:, 1:, 1]
    close(result.slots[:, 2], rollout(model, unobserved, 5))
    assert result.present[:, 0].tolist() == [[True, False, True, True]] * 3 and result.present[:, 1:].all()
    assert result.changed.sum() == 9 and result.changed[:, :, 1].all()


def test_every_scene_may_lose_another_object_and_interventions_combine(model, slots):
    result = imagine(
        model, slots, [Drop(torch.tensor([0, 1, 3])), [Drop(0), Empty(2)]], num_frames=3, empty_slot=EMPTY
    )
    for scene, gone in enumerate([0, 1, 3]):
        keep = [k for k in range(N) if k != gone]
        alone = imagine(model, slots[scene : scene + 1], [Drop(gone)], num_frames=3, batch_size=1)
        close(result.slots[scene, 0, :, keep], alone.slots[0, 0, :, keep])
    both = slots.clone()
    both[:, :, 2] = EMPTY
    close(result.slots[:, 1, :, 1:], rollout(model, both[:, :, 1:], 3))


def test_replace_swaps_in_slots(model, slots):
    other = torch.randn(8, D, generator=torch.Generator().manual_seed(5))
    result = imagine(model, slots, [Replace(2, other), Replace(2, other[0])], num_frames=3)
    changed = slots.clone()
    changed[:, :, 2] = other
    close(result.slots[:, 0], rollout(model, changed, 3))
    changed[:, :, 2] = other[0]
    close(result.slots[:, 1], rollout(model, changed, 3))


def test_delay_moves_the_entry(model, slots):
    later = slots.clone()
    later[:, 2:, 0], later[:, :2, 0] = slots[:, :-2, 0], EMPTY
    result = imagine(model, slots, [Delay(0, 2)], num_frames=3, empty_slot=EMPTY, start=6)
    # it was there from frame 2 on, so nothing is given to the rollout
    single = torch.cat([later[:, :6], torch.empty(3, 0, N, D)], dim=1)
    for _ in range(3):
        single = torch.cat([single, rollout(model, single, 1)], dim=1)
    close(result.slots[:, 0, 0], single[:, 6])
    # an object that enters at frame 7 instead of 0: first as it was seen at frame 0
    late = imagine(model, slots, [Delay(0, 7)], num_frames=4, empty_slot=EMPTY, start=6)
    close(late.slots[:, 0, 1:4, 0], slots[:, 0:3, 0])
    assert not torch.allclose(late.slots[:, 0, 0, 0], slots[:, 0, 0])
    earlier = imagine(model, slots, [Delay(0, -2)], num_frames=2, empty_slot=EMPTY, start=6)
    ahead = slots[:, :6].clone()
    ahead[:, :, 0] = slots[:, 2:8, 0]
    close(earlier.slots[:, 0, 0], rollout(model, ahead, 1)[:, 0])
    with pytest.raises(ValueError, match="needs frame 9"):
        imagine(model, slots, [Delay(0, -2)], num_frames=2, empty_slot=EMPTY)


def test_objects_that_enter_later_can_be_shown(model, slots):
    slots[:, :7, 3] = EMPTY
    result = imagine(model, slots, [Empty(0)], num_frames=4, start=6, entries=True, empty_slot=EMPTY)
    close(result.factual[:, 1, 3], slots[:, 7, 3])
    close(result.slots[:, 0, 1, 3], slots[:, 7, 3])
    assert not torch.allclose(result.factual[:, 1, 2], slots[:, 7, 2])
    without = imagine(model, slots, num_frames=4, start=6, empty_slot=EMPTY)
    assert not torch.allclose(without.factual[:, 1, 3], slots[:, 7, 3])


def test_what_enters_is_seen_at_once_and_nothing_else_changes(model, slots):
    """Passes predict 2 steps: those after an object is shown are predicted again, the others are the model's rollout."""
    slots[1:, :7, 3] = EMPTY  # enters at frame 7 in two scenes
    result = imagine(model, slots, [Empty(0)], num_frames=5, start=3, entries=True, empty_slot=EMPTY)
    close(result.factual[0], rollout(model, slots[:1, :3], 5)[0])  # and its history grows
    whole = slots[1:, :3]
    for _ in range(2):
        whole = torch.cat([whole, rollout(model, whole, 2)], dim=1)  # frames 3-4, 5-6
    whole = torch.cat([whole, rollout(model, whole, 1)], dim=1)
    whole[:, 7, 3] = slots[1:, 7, 3]
    close(result.factual[1:], whole[:, 3:])
    six = imagine(model, slots, num_frames=6, start=3, entries=True, empty_slot=EMPTY)
    close(six.factual[1:, 5], rollout(model, whole, 1)[:, 0])  # frame 8 of the pass that began with frame 7


def test_scenes_start_where_they_should(model, slots):
    result = imagine(model, slots, [Drop(0)], num_frames=2, start=torch.tensor([2, 5, 8]))
    assert result.history.tolist() == [2, 4, 4]
    for scene, start in enumerate([2, 5, 8]):
        close(result.factual[scene], rollout(model, slots[scene : scene + 1, :start], 2)[0])


def test_effects_say_who_is_affected_and_when(model, slots):
    result = imagine(model, slots, [Empty(1), Replace(1, slots[0, :, 1])], num_frames=4, empty_slot=EMPTY)
    close(result.effect, (result.slots - result.factual[:, None]).norm(dim=-1))
    effect = result.effect[1, 0]
    limit = float(effect[:, 2].max() + effect[:, 2].sort().values[-2]) / 2
    judged = imagine(model, slots, [Empty(1)], num_frames=4, empty_slot=EMPTY, effect_threshold=limit)
    assert judged.affected_from[1, 0, 2] == effect[:, 2].argmax() and judged.affected[1, 0, 2]
    assert not judged.affected[:, :, 1].any() and (judged.affected_from[:, :, 1] == -1).all()
    assert not result.affected[0, 1].any()  # replaced by itself


def test_other_actions_are_an_intervention():
    model = build(action_size=3, proprio_size=2, auxiliary_fusion="tokens")
    torch.manual_seed(2)
    slots, actions, proprio = torch.randn(2, 5, N, D), torch.randn(2, 8, 3), torch.randn(2, 5, 2)
    other = actions.clone()
    other[:, 6] += 1
    result = imagine(model, slots, [Act(other), [Act(other), Drop(1)]], num_frames=4, actions=actions, proprio=proprio)
    for index, acts in ((None, actions), (0, other)):
        with torch.no_grad():
            expected = model.rollout(slots[:, 1:], actions=acts[:, 1:], proprio=proprio[:, 1:], num_steps=4).slots
        close(result.factual if index is None else result.slots[:, index], expected)
    assert result.effect[:, 0, :2].max() < 1e-4 and result.effect[:, 0, 2:].max() > 1e-3
    with pytest.raises(ValueError, match=r"expected \(2, 8, 3\)"):
        imagine(model, slots, [Act(other[:, :7])], num_frames=4, actions=actions, proprio=proprio)


def test_video_rollout_equals_the_released_code_with_frame_skip():
    data = read("cjepa_rollout.safetensors")
    config = dict(num_slots=3, slot_size=16, history_length=5, prediction_length=2, num_hidden_layers=2)
    model = golden_model(data, **config, num_attention_heads=4, intermediate_size=32, frame_skip=3)
    videos = ("0_pixels.mp4", "1_pixels.mp4")
    observed, extended = (
        torch.stack([data[f"{k}.{v}"] for v in videos]) for k in ("inputs.slots", "outputs.extended")
    )
    count = extended.shape[1] - observed.shape[1]
    result = extend_video(model, observed, num_frames=count, batch_size=4)
    torch.testing.assert_close(result, extended, atol=5e-5, rtol=5e-4)
    torch.testing.assert_close(result[:, : observed.shape[1]], observed, atol=0, rtol=0)


def test_video_rollout_equals_the_released_128_to_160():
    data = read("cjepa_rollout_128_160.safetensors")
    config = dict(num_slots=7, slot_size=16, history_length=6, prediction_length=10, num_hidden_layers=1)
    model = golden_model(data, **config, num_attention_heads=4, intermediate_size=32, frame_skip=2)
    result = extend_video(model, data["inputs.slots"])  # the last 12 of the 128 frames are all that counts
    torch.testing.assert_close(result[:, 12:], data["outputs.imagined"], atol=5e-5, rtol=5e-4)


def test_contacts_of_the_collision_world_are_found_in_time():
    generator, contacts = np.random.default_rng(1), 0
    for _ in range(4):
        episode = sample_scene(generator).episode
        positions = torch.tensor(episode.positions[:128])
        count = positions.shape[1]
        found = first_contact(positions.expand(count, -1, -1, -1), torch.arange(count), 0.75).tolist()
        for k, object_id in enumerate(episode.ids):
            true = [c.frame for c in episode.collisions if object_id in c.pair and c.frame < 128]
            contacts += len(true[:1])
            assert not true or 0 <= found[k] <= true[0]
    assert contacts > 5


def test_contacts_and_empty_slots_are_found():
    positions = torch.tensor([[[0.0, 0], [3, 0], [9, 9]], [[1, 0], [3, 0], [9, 9]], [[2, 0], [3, 0], [2, 0.5]]])[None]
    slot = torch.tensor([0])
    assert first_contact(positions, slot, 1.5).tolist() == [2]
    assert first_contact(positions, slot, 2.5).tolist() == [1]
    assert first_contact(positions, slot, 0.2).tolist() == [-1]
    present = torch.ones(1, 3, 3, dtype=torch.bool)
    present[:, :, 1:] = False
    assert first_contact(positions, slot, 2.5, present).tolist() == [-1]
    scene = torch.randn(1, 2, 3, D, generator=torch.Generator().manual_seed(0))
    scene[0, 1, 2] = EMPTY + 0.01
    assert is_empty(scene, EMPTY).nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(interventions=[Drop(4)]), r"slot=4 must lie in 0 \.\.\. 3"),
        (dict(interventions=[Empty(1.0)]), "must be an integer"),
        (dict(interventions=[Drop(torch.tensor([0, 1]))]), r"or \[3\] integers"),
        (dict(interventions=["remove"]), "no intervention"),
        (dict(interventions=[[Drop(k) for k in range(N)]]), "keep at least one"),
        (dict(interventions=[Replace(0, torch.zeros(5, D))]), "by has shape"),
        (dict(interventions=[Mask(0)], start=1), "Mask hides frames after the first 1"),
        (dict(interventions=[Drop(3)], empty_slot=EMPTY), r"slot 3 of scene 1 is empty.*\[0, 1, 2\]"),
        (dict(start=9), "must lie in 1"),
        (dict(frame_skip=9), "observed frames before start"),
        (dict(num_frames=0), "positive integer"),
        (dict(entries=True), "pass empty_slot"),
        (dict(interventions=[Empty(0)]), "pass empty_slot"),
        (dict(empty_slot=torch.zeros(3)), "empty_slot has shape"),
        (dict(actions=torch.zeros(3, 9, 2)), "built without actions"),
        (dict(interventions=[Act(torch.zeros(3, 9, 2))]), "none were given"),
        (dict(slots=torch.zeros(3, 8, N, 5)), r"expected a tensor \(B, T, N, D=16\)"),
    ],
)
def test_bad_input_is_refused(model, slots, change, match):
    slots[1, :, 3] = EMPTY
    arguments = {"slots": slots, "num_frames": 2, **change}
    with pytest.raises(ValueError, match=match):
        imagine(model, **arguments)


def test_a_video_shorter_than_the_history_is_refused(model, slots):
    with pytest.raises(ValueError, match="at least 12 are needed"):
        extend_video(model, slots, frame_skip=3)
