"""The slot encoder that follows objects: identity over time, empty slots, geometry, parts of videos, saving, errors."""

import numpy as np
import pytest
import torch

from cjepa_hf.models.crop_slots import CropSlotsConfig, CropSlotsImageProcessor, CropSlotsModel

SIZE, VIEW = 32, (6.0, 4.0)
SMALL = dict(
    num_slots=3,
    slot_size=16,
    image_size=SIZE,
    object_radius=0.4,
    crop_size=12,
    channels=(4, 8),
    hidden_size=16,
    appearance_size=4,
    pose_size=2,
    num_waves=4,
)


def small(**config) -> CropSlotsModel:
    """With random weights; offsets of the position are small, as after training."""
    torch.manual_seed(0)
    model = CropSlotsModel(CropSlotsConfig(**(SMALL | {"max_offset": 0.02} | config))).eval()
    model.set_background(torch.full((3, SIZE, SIZE), 0.5))
    return model


def frames_of(centers, colors) -> torch.Tensor:
    """float [1, T, 3, SIZE, SIZE]: discs of radius 0.4 at centers [T, n, 2], of colors [n, 3], on gray; NaN: not there."""
    line = (torch.arange(4 * SIZE) + 0.5) / (4 * SIZE) - 0.5
    x, y = line * VIEW[0], line[:, None] * VIEW[1]
    frames = []
    for places in torch.as_tensor(centers, dtype=torch.float32):
        picture = torch.full((3, 4 * SIZE, 4 * SIZE), 0.5)
        for (u, v), color in zip(places, torch.as_tensor(colors, dtype=torch.float32)):
            picture = torch.where((x - u) ** 2 + (y - v) ** 2 < 0.4**2, color[:, None, None], picture)
        frames.append(torch.nn.functional.avg_pool2d(picture, 4))
    return torch.stack(frames)[None]


RED, BLUE = (0.8, 0.1, 0.1), (0.1, 0.2, 0.9)


def meeting(num_frames=24):
    """Two red discs that come together until they touch, and part again the way they came: centers [T, 2, 2]."""
    t = np.linspace(-1, 1, num_frames)
    distance = 0.42 + 1.2 * np.abs(t)
    return np.stack([np.stack([-distance, 0.3 * t], -1), np.stack([distance, -0.2 + 0 * t], -1)], 1)


@torch.no_grad()
def slots_of(model, centers, colors=(RED, RED, RED), **options):
    return model(frames_of(centers, colors), **options)


def test_equal_objects_that_touch_keep_their_slots():
    model, centers = small(), meeting()
    output = slots_of(model, centers)
    positions = model.positions(output.slots)[0].numpy()  # [T, N, 2]
    first = np.linalg.norm(positions[0][None, :] - centers[0][:, None], axis=-1).argmin(1)
    assert sorted(first) == [0, 1]
    assert np.linalg.norm(positions[:, first] - centers, axis=-1).max() < 0.06
    assert output.present[0, :, first].all() and not output.present[0, :, 2].any()


def test_every_slot_without_an_object_is_the_same_vector():
    model, centers = small(), np.stack([meeting()[:, 0], np.full((24, 2), np.nan)], 1)
    slots = slots_of(model, centers).slots
    assert (slots[0, :, 1:] == model.empty_slot).all()
    assert (slots[0, :, 0] != model.empty_slot).any(-1).all()
    empty = model(torch.full((1, 3, 3, SIZE, SIZE), 0.5))
    assert (empty.slots == model.empty_slot).all() and not empty.masks.any()


def test_an_object_is_there_while_its_position_is_in_the_view():
    x = np.linspace(2.3, 3.6, 27)
    model = small()
    output = slots_of(model, np.stack([x, 0 * x], -1)[:, None], [RED])
    present = output.present[0].any(-1).numpy()
    assert present[: (x < 2.6).sum()].all() and not present[x > 3.4].any()
    assert (output.slots[0][~output.present[0]] == model.empty_slot).all()


def test_an_object_that_enters_later_gets_a_slot_that_had_none():
    x = np.linspace(2.0, 4.2, 23)
    leaving, entering = np.stack([x, 0 * x - 1], -1), np.stack([-x[::-1], 0 * x + 1], -1)
    output = slots_of(small(), np.stack([leaving, entering], 1), [RED, BLUE])
    alive = output.present[0].any(0).tolist()
    assert alive == [True, True, False]
    assert output.present[0, 0].tolist() == [True, False, False] and output.present[0, -1].tolist()[:2] == [
        False,
        True,
    ]


def test_an_object_that_is_hidden_for_a_moment_comes_back_to_its_slot():
    centers = meeting()
    centers[10:14, 0] = np.nan
    present = slots_of(small(), centers).present[0]
    gone = present[11]
    assert gone.sum() == 1 and present[[0, -1]].sum(1).tolist() == [2, 2] and not present[:, 2].any()


def test_a_video_in_parts_gives_what_it_gives_in_one_piece():
    model, pixels = small(), frames_of(meeting(), [RED, BLUE])
    with torch.no_grad():
        whole, first = model(pixels), model(pixels[:, :7])
        second = model(pixels[:, 7:], state=first.state, seeds=[3])
        chunks = model(pixels, chunk_size=5)
    torch.testing.assert_close(torch.cat([first.slots, second.slots], 1), whole.slots)
    torch.testing.assert_close(chunks.slots, whole.slots)
    assert second.state.frame.tolist() == [24]


def test_videos_of_a_batch_do_not_depend_on_each_other():
    model = small()
    a, b = frames_of(meeting(), [RED, BLUE]), frames_of(meeting()[::-1, :1].copy(), [BLUE])
    with torch.no_grad():
        both = model(torch.cat([a, b])).slots
        torch.testing.assert_close(both[:1], model(a).slots)
        torch.testing.assert_close(both[1:], model(b).slots)


def test_masks_are_the_pixels_of_each_object():
    centers = meeting()
    masks = slots_of(small(), centers).masks[0, 0]
    assert masks.shape == (3, SIZE, SIZE) and not masks[2].any() and (masks.sum(0) <= 1).all()
    area = np.pi * 0.4**2 * SIZE**2 / (VIEW[0] * VIEW[1])
    columns = (centers[0][:, 0] / VIEW[0] + 0.5) * SIZE - 0.5
    for k in range(2):
        column = (masks[k].sum(0) * torch.arange(SIZE)).sum() / masks[k].sum()
        assert np.abs(columns - column.item()).min() < 0.3
        assert 0.8 * area < masks[k].sum() < 1.6 * area


def test_slots_split_into_what_they_were_made_of_and_keep_distances_of_the_view():
    model, centers = small(), meeting()
    output = slots_of(model, centers)
    position, empty, content = model.split_slots(output.slots)
    assert torch.equal((empty > 0.5), ~output.present) and content.shape == (1, 24, 3, 6)
    moved = position[0, 5, 0] - position[0, 0, 0]
    appearance = torch.where(output.present.unsqueeze(-1), content, 0.0)
    same = model._to_slots(position, appearance[..., :4], appearance[..., 4:], output.present)
    torch.testing.assert_close(same, output.slots, rtol=1e-4, atol=1e-5)
    shifted = model._to_slots(position + moved, appearance[..., :4], appearance[..., 4:], output.present)
    distance = (shifted - same).norm(dim=-1)[output.present]
    torch.testing.assert_close(distance, moved.norm().expand_as(distance), rtol=1e-4, atol=1e-4)


def test_drawing_a_moved_slot_moves_the_drawing_and_an_empty_one_draws_nothing():
    model = small()
    position = torch.tensor([[[-1.5, 0.5]], [[-1.5 + 3 * 6 / SIZE, 0.5 - 2 * 4 / SIZE]]])
    content = torch.randn(1, 1, 6).expand(2, 1, 6)
    there = torch.ones(2, 1, dtype=torch.bool)
    slots = model._to_slots(position, content[..., :4], content[..., 4:], there)
    drawn = model.decode(slots)
    torch.testing.assert_close(drawn.masks[1], drawn.masks[0].roll((-2, 3), (-2, -1)), rtol=1e-4, atol=1e-4)
    assert drawn.masks.max() > 0.5
    nothing = model.decode(model.empty_slot.expand(2, 5, 16))
    assert torch.equal(nothing.reconstruction, torch.full((2, 3, SIZE, SIZE), 0.5)) and not nothing.masks.any()


def test_appearance_is_averaged_over_the_frames_of_an_object_and_starts_anew_with_another():
    model = small()
    centers = np.repeat(meeting()[:1, :1], 30, 0)
    pixels = frames_of(centers, [RED])
    pixels[:, 15:] = frames_of(centers[:15] + np.array([1.8, 1.0]), [BLUE])  # another object, elsewhere
    with torch.no_grad():
        output = model(pixels)
        alone = model(pixels[:, 15:])
    which = output.present[0].float().argmax(-1)
    assert which[0] != which[-1]
    content = model.split_slots(output.slots[0])[2]
    own = model.split_slots(alone.slots[0])[2]
    torch.testing.assert_close(content[-1, which[-1], :4], own[-1, 0, :4], rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # one red frame among blue ones hardly changes what is remembered
        mixed = frames_of(centers, [BLUE])
        mixed[:, 20] = pixels[:, 0]
        steady = model.split_slots(model(mixed).slots[0])[2][:, 0, :4]
    assert (steady[20] - steady[19]).norm() < 0.1 * (content[0, which[0], :4] - steady[19]).norm()


def test_the_loss_has_gradients_for_every_weight_and_needs_no_labels():
    model = small().train()
    output = model(frames_of(meeting(2), [RED, BLUE]), return_loss=True)
    output.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing and output.loss > 0


def test_calibration_puts_positions_on_centroids_and_keeps_the_drawings():
    model, pixels = small(max_offset=0.3), frames_of(meeting(), [RED, BLUE])
    tracks = model.follow(pixels)
    with torch.no_grad():
        before = model(pixels)
        drawn = model.decode(before.slots).reconstruction
        variances = model.calibrate(pixels, tracks)
        after = model(pixels)
        torch.testing.assert_close(model.decode(after.slots).reconstruction, drawn, rtol=1e-3, atol=1e-4)
    for output, close in ((before, False), (after, True)):
        away = (model.split_slots(output.slots)[0] - tracks.centers)[output.present].mean(0).norm()
        assert (away < 1e-4) == close
    content = model.split_slots(after.slots)[2][after.present]
    assert variances["pose_variance"] == pytest.approx(content[:, 4:].var(0).sum().item(), rel=1e-3)
    scaled = (content[:, 4:] - model.pose_mean) * model.pose_scale
    assert scaled.var(0).sum().item() == pytest.approx(model.config.pose_variance, rel=1e-3)


def test_saved_and_loaded_it_gives_the_same_slots(tmp_path):
    model, pixels = small(), frames_of(meeting(4), [RED, BLUE])
    model.save_pretrained(tmp_path)
    loaded = CropSlotsModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels).slots, model(pixels).slots)
    processor = CropSlotsImageProcessor(size=SIZE)
    assert processor([np.zeros((2, 48, 72, 3), np.uint8)]).pixel_values.shape == (1, 2, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"slot_size": 8}, "slot_size=8 must be at least 9"),
        ({"crop_size": 8}, "crop_size=8 does not hold an object"),
        ({"birth_share": 0.05}, "must be shares of an object's area"),
        ({"view_size": (6.0,)}, "view_size"),
        ({"num_slot": 3}, "num_slots"),
    ],
)
def test_configurations_that_cannot_work_say_why(config, message):
    with pytest.raises(ValueError, match=message):
        CropSlotsConfig(**(SMALL | config))


def test_bad_inputs_say_what_was_expected():
    model, pixels = small(), frames_of(meeting(3), [RED, BLUE])
    for bad, message in [
        (pixels[0], "needs a batch axis"),
        (pixels * 255, "range from"),
        (pixels[..., :16], "Resize with CropSlotsImageProcessor"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(bad)
    with pytest.raises(ValueError, match="tracks of"):
        model(pixels, tracks=model.follow(pixels[:, :2]))
    with pytest.raises(ValueError, match="slots have shape"):
        model.decode(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="background has shape"):
        model.set_background(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="fewer than two whole objects"):
        nothing = torch.full((1, 2, 3, SIZE, SIZE), 0.5)
        model.calibrate(nothing, model.follow(nothing))
