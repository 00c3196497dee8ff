"""Slots get their objects: the assignment, the probe that learns from masks, and what a poor encoder is told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cjepa_hf.data.state_slots import state_slots
from cjepa_hf.evaluation.object_slots import (
    PixelSlots,
    StateSlots,
    mask_centers,
    match_objects,
    object_truth,
    reorder,
    slot_quality,
)
from cjepa_hf.evaluation.protocols import cf_rollout_world, load_protocol

FRAMES = 16


@pytest.fixture(scope="module")
def states():
    tasks = load_protocol("cf-rollout")["tasks"][:6]
    videos = [cf_rollout_world(task["objects"]).simulate(128).states[::8] for task in tasks]
    return np.stack(videos).astype(np.float32)


class Shuffled(nn.Module):
    """An encoder that sees true states, with its slots in an order of each video's own, and masks around the objects."""

    memoryless = False

    def __init__(self, states):
        super().__init__()
        self.slots, self.states, self.calls = torch.from_numpy(state_slots(states)), states, 0
        self.orders = [np.random.default_rng(k).permutation(7) for k in range(len(states))]
        self.config = SimpleNamespace(slot_size=64, _name_or_path="")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values):
        video = self.calls % len(self.slots)
        self.calls += 1
        order = self.orders[video]
        background = torch.full((1, FRAMES, 1, 64), 0.3)
        slots = torch.cat([self.slots[video][None], background], dim=2)[:, :, order]
        positions, in_view, _ = object_truth(self.states[video : video + 1])
        y, x = np.meshgrid((np.arange(32) + 0.5) / 32 * 4 - 2, (np.arange(48) + 0.5) / 48 * 6 - 3, indexing="ij")
        grid = np.stack([x, y], axis=-1)[None, None]
        near = (np.linalg.norm(grid - positions[0][:, :, None, None], axis=-1) < 0.3) & in_view[0][..., None, None]
        rest = ~near.any(axis=1, keepdims=True)
        masks = torch.from_numpy(np.concatenate([near, rest], axis=1).astype(np.float32))[None, :, order]
        return SimpleNamespace(slots=slots, masks=masks)


def test_slots_in_any_order_come_back_as_the_objects(states):
    encoder = Shuffled(states)
    source = PixelSlots(encoder, resolution=16)
    probe = source.fit(states)
    found = source.slots(states)
    _, in_view, _ = object_truth(states)
    expected = torch.from_numpy(state_slots(states))
    assert found.shape == (6, FRAMES, 7, 64)
    torch.testing.assert_close(found[:, :, :6][torch.from_numpy(in_view)], expected[torch.from_numpy(in_view)])
    assert probe.present(torch.full((64,), 0.3)) == torch.tensor(False)  # the background is no object
    quality = source.quality(found, states)
    assert quality["missed"] == 0 and quality["elsewhere"] < 0.02 and quality["attributes"] > 0.98


def test_scenes_are_drawn_as_large_as_the_encoder_takes_them(states):
    encoder, sizes = Shuffled(states), []
    encoder.register_forward_pre_hook(
        lambda _, words, named: sizes.append(named["pixel_values"].shape), with_kwargs=True
    )
    encoder.config.image_size = 24
    PixelSlots(encoder).fit(states[:2])
    assert set(sizes) == {(1, FRAMES, 3, 24, 24)}


def test_what_an_encoder_misses_is_measured(states):
    source = StateSlots()
    probe, slots = source.fit(states), source.slots(states)
    assert slot_quality(probe, slots, states)["position_error_p90"] < 1e-3
    worse = slots.clone()
    worse[:, 8:, 0] = probe.empty_slot  # an object vanishes
    worse[:, :, [1, 2]] = worse[:, :, [2, 1]]  # two are swapped
    quality = slot_quality(probe, worse, states)
    _, in_view, _ = object_truth(states)
    assert quality["missed"] >= in_view[:, 8:, 0].sum() / in_view.sum() - 1e-6
    assert quality["elsewhere"] > 0.2 and quality["attributes"] < 0.9


def test_the_assignment_weighs_frames_in_view_and_attributes():
    positions = torch.zeros(1, 2, 7, 2)
    positions[0, :, :, 0] = torch.arange(7.0)
    true = positions[:, :, [3, 1, 0, 2, 4, 5]].clone()
    present, in_view = torch.ones(1, 2, 7, dtype=torch.bool), torch.ones(1, 2, 6, dtype=torch.bool)
    assert match_objects(positions, present, true, in_view)[0].tolist() == [3, 1, 0, 2, 4, 5, 6]
    true[0, 1, 0], in_view[0, 1, 0] = 100.0, False  # out of view it may be anywhere
    order = match_objects(positions, present, true, in_view)
    assert order[0, 0] == 3
    assert torch.equal(reorder(positions, order)[0, 0, :6, 0], torch.tensor([3.0, 1, 0, 2, 4, 5]))
    same = torch.zeros(1, 2, 7, 2)  # all at one place: attributes decide
    mismatch = 1 - torch.eye(7)[torch.tensor([5, 4, 3, 2, 1, 0])][None]
    assert match_objects(same, present, same[:, :, :6], in_view, mismatch)[0, :6].tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="5 slots cannot hold 6 objects"):
        match_objects(positions[:, :, :5], present[:, :, :5], true, in_view)


def test_centers_of_masks_are_in_world_units():
    masks = np.zeros((1, 2, 4, 6))
    masks[0, 0, 0, 0] = 1
    masks[0, 1, 1:3, 2:4] = 1
    expected = [[-2.5, -1.5, 1 / 24], [0.0, 0.0, 4 / 24]]
    np.testing.assert_allclose(mask_centers(masks)[0], expected, atol=1e-12)


def test_matching_needs_the_probe(states):
    with pytest.raises(ValueError, match="fit\\(\\) comes before"):
        PixelSlots(Shuffled(states), resolution=16).slots(states)
