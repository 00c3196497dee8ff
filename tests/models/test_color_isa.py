"""The color-prototype slot encoder: geometry, losses, saving, images in, errors, and that it learns without labels."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.training.color_isa import (
    ColorIsaTrainArguments,
    FrameDataset,
    calibrate_content,
    dataset_frames,
    main,
    scene_statistics,
    train_slot_encoder,
)

TINY = dict(
    num_slots=3,
    slot_size=12,
    image_size=32,
    stem_channels=8,
    hidden_size=16,
    mlp_size=24,
    num_position_waves=4,
    num_moment_waves=9,
    num_orientation_waves=4,
    num_decoder_waves=4,
    decoder_grid_size=8,
    decoder_hidden_size=16,
)


def tiny(seed=0, **config) -> ColorIsaModel:
    torch.manual_seed(seed)
    model = ColorIsaModel(ColorIsaConfig(**(TINY | config))).eval()
    for name, parameter in model.named_parameters():  # nothing at its initial zero: every path must matter
        if name not in ("colors", "shades"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def scenes(count, seed=0, size=32):
    """uint8 [count, size, size, 3]: a red 6 x 6 square and a blue 4 x 8 bar on white, and their corners [count, 2, 2]
    (x, y) in pixels. The bar is in front."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(3, size - 11, (count, 2, 2))
    frames = np.full((count, size, size, 3), 255, dtype=np.uint8)
    for frame, ((x, y), (u, v)) in zip(frames, corners):
        frame[y : y + 6, x : x + 6] = (220, 40, 30)
        frame[v : v + 8, u : u + 4] = (40, 70, 230)
    return frames, corners


def pixels(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------------ geometry


def test_clips_and_single_frames_give_the_same_slots_with_the_axes_of_the_input():
    model, x = tiny(), pixels(scenes(6)[0])
    single, clip = model(x), model(x.view(2, 3, 3, 32, 32))
    assert single.slots.shape == (6, 3, 12) and single.masks.shape == (6, 3, 16, 16)
    assert clip.slots.shape == (2, 3, 3, 12) and clip.masks.shape == (2, 3, 3, 16, 16)
    assert torch.equal(clip.slots.flatten(0, 1), single.slots)
    torch.testing.assert_close(single.masks.sum(1), torch.ones(6, 16, 16))


def test_chunks_bound_memory_without_changing_results():
    model, x = tiny(), pixels(scenes(7)[0])
    with torch.no_grad():
        whole, parts = model(x, chunk_size=100), model(x, chunk_size=2)
        torch.testing.assert_close(whole.slots, parts.slots, rtol=1e-5, atol=1e-5)
        drawn, drawn_parts = model.decode(whole.slots, chunk_size=100), model.decode(whole.slots, chunk_size=3)
        torch.testing.assert_close(drawn.reconstruction, drawn_parts.reconstruction, rtol=1e-5, atol=1e-5)


def moments_of(masks):
    """Centroids, skewness and moments of masks [n, 16, 16]."""
    model = tiny()
    weights = masks.flatten(1)[:, None] / masks.sum((1, 2))[:, None, None]
    return (x[:, 0] for x in model.encoder.layers[0]._moments(weights, model._features(masks.device)["moment"]))


def test_a_mask_and_its_shifted_copy_differ_only_in_their_centroids():
    masks = torch.zeros(2, 16, 16)
    masks[0, 3:7, 4:10] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    masks[1, 8:12, 6:12] = masks[0, 3:7, 4:10]  # 5 tokens down, 2 to the right
    center, skewness, moments = moments_of(masks)
    torch.testing.assert_close(center[1] - center[0], torch.tensor([2.0, 5.0]) * 2 / 16, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(skewness[1], skewness[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-4)
    assert moments[0].abs().max() > 0.01


def test_the_skewness_of_a_mask_turns_with_it_and_is_zero_for_a_symmetric_one():
    masks = torch.zeros(3, 16, 16)
    masks[0, 3:7, 4:10] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    masks[1] = masks[0].rot90(-1)  # clockwise, as angles go on a screen
    masks[2] = masks[0] + masks[0].rot90(2)
    _, skewness, _ = moments_of(masks)
    x, y = skewness[0]
    assert skewness[0].norm() > 0.01
    torch.testing.assert_close(skewness[1], torch.stack([-y, x]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(skewness[2], torch.zeros(2), rtol=0, atol=1e-5)


def draw_logits(position, content):
    """Mask logits [B, N, H, W] of objects alone."""
    model = tiny()
    features = model._features(position.device)
    logits, _ = model.decoder(position, content, False, features["grid"], features["waves"], features["patch"])
    return model._from_patches(logits)


def test_an_object_moved_in_its_slot_is_drawn_moved():
    g = torch.Generator().manual_seed(1)
    position, content = torch.randn(1, 2, 2, generator=g) * 0.2, torch.randn(1, 2, 10, generator=g)
    still = draw_logits(position, content)
    moved = draw_logits(position + torch.tensor([1.0, 2.0]) * 2 / 8, content)  # patches: 1 to the right, 2 down
    torch.testing.assert_close(moved[..., 8:, 4:], still[..., :-8, :-4], rtol=1e-4, atol=1e-4)


def test_an_object_turned_in_its_slot_is_drawn_turned():
    g = torch.Generator().manual_seed(1)
    position, content = torch.zeros(1, 2, 2), torch.randn(1, 2, 10, generator=g)
    turned = content.clone()
    turned[..., 0], turned[..., 1] = -content[..., 1], content[..., 0]  # a quarter, clockwise
    still = draw_logits(position, content)
    torch.testing.assert_close(draw_logits(position, turned), still.rot90(-1, (2, 3)), rtol=1e-4, atol=1e-4)
    assert (still - still.rot90(-1, (2, 3))).abs().max() > 0.1


def test_only_the_background_is_in_the_middle_and_positions_follow_a_bright_object():
    model = tiny(max_offset=0.0)
    position, _ = model.split_slots(model(pixels(scenes(3)[0])).slots)
    torch.testing.assert_close(position[:, 0], torch.zeros(3, 2), rtol=0, atol=1e-6)
    assert position[:, 1:].abs().min() > 1e-4


def test_slots_invert_to_position_and_content_with_their_weights():
    model = tiny(position_scale=3.0, scene_size=512.0)
    model.set_content_scale(0.5)
    g = torch.Generator().manual_seed(0)
    position, content = torch.randn(4, 3, 2, generator=g), torch.randn(4, 3, 10, generator=g)
    slots = model._to_latent(position, content)
    back = model.split_slots(slots)
    torch.testing.assert_close(back[0], position, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back[1], content, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.positions(slots), 256 * (position + 1), rtol=1e-4, atol=1e-3)
    squared = 9 * position[0].square().sum() + 0.25 * content[0].square().sum()
    torch.testing.assert_close(slots[0].square().sum(), squared, rtol=1e-4, atol=1e-4)
    identity = model.rotation @ model.rotation.T
    torch.testing.assert_close(identity, torch.eye(12), rtol=0, atol=1e-5)
    assert torch.equal(model.rotation, tiny(seed=5).rotation)


def test_a_slot_that_is_left_out_is_not_drawn_and_the_others_keep_their_colors():
    model = tiny()
    model.set_scene(torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1]]), torch.ones(3, 32, 32))
    torch.nn.init.constant_(model.shades, 0.0)
    slots = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    drawn = model.decode(slots[:, [0, 2]], slot_indices=[0, 2])
    assert drawn.masks.shape == (2, 2, 32, 32) and drawn.reconstruction.shape == (2, 3, 32, 32)
    expected = torch.stack([drawn.masks[:, 0], drawn.masks[:, 0], torch.ones(2, 32, 32)], dim=1)  # white and blue
    torch.testing.assert_close(drawn.reconstruction, expected, rtol=1e-4, atol=1e-5)
    whole = model.decode(slots).masks
    ratio = whole[:, [0, 2]] / whole[:, [0, 2]].sum(1, keepdim=True)
    torch.testing.assert_close(drawn.masks, ratio, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- losses


def test_losses_are_the_weighted_squared_errors_of_what_is_drawn_and_recolored():
    model = tiny(content_loss_weight=0.01, color_loss_weight=2.0)
    frames = scenes(40)[0]
    model.set_scene(*scene_statistics(frames, 3))
    x = pixels(frames[:5])
    out = model(x, return_loss=True)
    drawn = model.decode(out.slots)
    weight = 1 + 5.0 * ((1 - x - model.background).abs().amax(1, keepdim=True) > 0.12)
    position, content = model.split_slots(out.slots)
    image, _ = model._decode(position, content, [0, 1, 2])
    image = 1 - model._from_patches(image)
    torch.testing.assert_close(drawn.reconstruction, image.clamp(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.reconstruction_loss, (weight * (image - x) ** 2).mean(), rtol=1e-4, atol=1e-6)
    # the background paints the empty scene, which is white here
    recolored = torch.einsum("bnhw,nc->bchw", out.masks[:, 1:], 1 - model.colors[1:]) + out.masks[:, :1]
    small = torch.nn.functional.interpolate(x, size=16, mode="area")
    small_weight = torch.nn.functional.interpolate(weight, size=16, mode="area")
    torch.testing.assert_close(out.color_loss, (small_weight * (recolored - small) ** 2).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.content_loss, content.square().sum(-1).mean(), rtol=1e-3, atol=1e-5)
    total = out.reconstruction_loss + 2 * out.color_loss + 0.01 * out.content_loss
    torch.testing.assert_close(out.loss, total)


def test_the_target_is_what_is_drawn_and_the_input_what_is_recolored():
    model, (seen, drawn) = tiny(), pixels(scenes(8)[0]).chunk(2)
    plain, paired = model(seen, return_loss=True), model(seen, target_pixel_values=drawn, return_loss=True)
    assert torch.equal(plain.slots, paired.slots) and plain.color_loss == paired.color_loss
    assert plain.reconstruction_loss != paired.reconstruction_loss
    assert model(seen, target_pixel_values=seen.clone(), return_loss=True).loss == plain.loss
    with pytest.raises(ValueError, match="target_pixel_values has shape"):
        model(seen, target_pixel_values=drawn[:1], return_loss=True)


def test_the_loss_reaches_every_parameter():
    model = tiny().train()
    model.set_scene(*scene_statistics(scenes(40)[0], 3))
    model(pixels(scenes(4)[0]), return_loss=True).loss.backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untouched == []


def test_a_model_first_used_in_inference_mode_can_be_trained_afterwards():
    model, x = tiny(), pixels(scenes(2)[0])
    with torch.inference_mode():
        model(x)
    model(x).slots.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_content_noise_is_drawn_in_training_only():
    model, x = tiny(content_noise=0.5), pixels(scenes(4)[0])
    first, second = (model.train()(x, return_loss=True) for _ in range(2))
    assert first.reconstruction_loss != second.reconstruction_loss
    assert torch.equal(first.slots, second.slots)  # what is returned carries no noise
    first, second = (model.eval()(x, return_loss=True) for _ in range(2))
    assert first.reconstruction_loss == second.reconstruction_loss


def test_bfloat16_stays_close_to_float32():
    model, x = tiny(), pixels(scenes(4)[0])
    slots, masks = model(x).slots, model(x).masks
    half = tiny().bfloat16()
    out = half(x.bfloat16())
    assert out.slots.dtype == out.masks.dtype == torch.bfloat16
    assert half.decode(out.slots).reconstruction.dtype == torch.bfloat16
    assert (out.slots.float() - slots).norm() < 0.05 * slots.norm()
    assert (out.masks.float() - masks).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, return_loss=True).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(x, return_loss=True).loss, rtol=0.05, atol=0)


# ------------------------------------------------------------------------------------------------ saving, config


def test_saved_folder_gives_the_same_slots_back(tmp_path):
    model, x = tiny(), pixels(scenes(3)[0])
    model.set_scene(*scene_statistics(scenes(40)[0], 3))
    model.set_content_scale(1.7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = ColorIsaModel.from_pretrained(tmp_path)
    named = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    before, after = (
        {k: list(v) if isinstance(v, tuple) else v for k, v in c.to_dict().items() if k not in named}
        for c in (model.config, loaded.config)
    )
    assert before == after
    assert torch.equal(loaded(x).slots, model(x).slots)
    assert torch.equal(loaded.background, model.background)
    assert torch.equal(loaded.decode(model(x).slots).masks, model.decode(model(x).slots).masks)


def test_weights_missing_from_a_checkpoint_get_their_start_values(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("rotation", "content_scale", "encoder.layers.0.position_key"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lack 3 tensors"):
        ColorIsaModel.from_pretrained(tmp_path)
    loaded, _ = ColorIsaModel.from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(loaded.rotation, tiny().rotation)
    assert loaded.content_scale == 1
    assert 0 < loaded.encoder.layers[0].position_key.abs().max() < 2


def test_unknown_or_impossible_settings_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match=r"num_slot'.*Did you mean 'num_slots'"):
        ColorIsaConfig(num_slot=3)
    for wrong, field in (
        (dict(num_slots=1), "num_slots"),
        (dict(image_size=63), "image_size"),
        (dict(stem_kernel_size=4), "stem_kernel_size"),
        (dict(slot_size=4), "slot_size"),
        (dict(num_orientation_waves=24), "num_orientation_waves"),
        (dict(moment_wavelengths=[300.0, 80.0]), "moment_wavelengths"),
        (dict(content_noise=-1.0), "content_noise"),
        (dict(position_scale=0.0), "position_scale"),
    ):
        with pytest.raises(ValueError, match=field):
            ColorIsaConfig(**wrong)
    written = json.loads(ColorIsaConfig().to_json_string(use_diff=False))
    assert ColorIsaConfig(**written).to_dict() == ColorIsaConfig().to_dict()


# -------------------------------------------------------------------------------------------------------- errors


def test_wrong_slots_are_errors_that_say_what_to_do():
    model = tiny()
    with pytest.raises(ValueError, match=r"expected \[\.\.\., N, 12\]"):
        model.positions(torch.zeros(2, 3, 64))
    with pytest.raises(ValueError, match="slot_indices"):
        model.decode(torch.zeros(2, 2, 12))
    with pytest.raises(ValueError, match="increasing"):
        model.decode(torch.zeros(2, 2, 12), slot_indices=[2, 0])
    with pytest.raises(ValueError, match="positive"):
        model.set_content_scale(float("nan"))
    with pytest.raises(ValueError, match="Unexpected inputs"):
        model(pixels(scenes(1)[0]), labels=None)


# --------------------------------------------------------------------------------------------------------- images


def test_images_of_every_kind_give_the_same_pixels():
    processor, frames = ColorIsaImageProcessor(size=16), scenes(3)[0]
    expected = frames.reshape(3, 16, 2, 16, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255  # area averages
    clip = processor(frames)["pixel_values"]
    assert clip.shape == (3, 3, 16, 16) and clip.dtype == torch.float32
    np.testing.assert_allclose(clip.numpy(), expected, atol=0.003)  # cv2 rounds to uint8
    images = [Image.fromarray(frame) for frame in frames]
    for same in (images, list(frames), torch.from_numpy(frames)):
        assert torch.equal(processor(same)["pixel_values"], clip)
    assert torch.equal(processor(images[0])["pixel_values"], clip[:1])
    assert torch.equal(processor([frames, frames])["pixel_values"], torch.stack([clip, clip]))
    np.testing.assert_allclose(processor(frames / 255.0)["pixel_values"].numpy(), expected, atol=1e-6)
    assert processor(frames, return_tensors="np")["pixel_values"].shape == (3, 3, 16, 16)
    assert processor(np.zeros((7, 9, 3), dtype=np.uint8))["pixel_values"].shape == (1, 3, 16, 16)  # enlarged


def test_processor_saves_and_loads(tmp_path):
    ColorIsaImageProcessor(size=32).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ColorIsaImageProcessor" and saved["size"] == 32
    assert ColorIsaImageProcessor.from_pretrained(tmp_path).size == 32


# ------------------------------------------------------------------------------------------------------- training


def arguments(folder, **settings):
    defaults = dict(batch_size=16, log_every=5, eval_every=0, save_every=0, ema_decay=0.0, warmup_steps=10)
    return ColorIsaTrainArguments(output_dir=str(folder), use_cpu=True, **(defaults | settings))


def test_frames_with_targets_come_in_pairs():
    seen, drawn = scenes(6)[0], scenes(3, seed=1)[0]
    batch = FrameDataset.collate(FrameDataset(seen, drawn).__getitems__([4, 1]))
    assert torch.equal(batch["pixel_values"], pixels(seen[[4, 1]]))
    expected = pixels(np.stack([seen[4], drawn[1]]))  # only the first three have a target
    assert torch.equal(batch["target_pixel_values"], expected)
    assert set(FrameDataset.collate(FrameDataset(seen).__getitems__([0]))) == {"pixel_values"}
    with pytest.raises(ValueError, match="do not fit"):
        FrameDataset(drawn, seen)
    with pytest.raises(ValueError, match="uint8"):
        FrameDataset(seen / 255)


def test_colors_are_found_and_ordered_whatever_the_seed():
    frames = scenes(60)[0]
    for seed in range(3):
        colors, background = scene_statistics(frames, 3, seed)
        expected = torch.tensor([[255, 255, 255], [220, 40, 30], [40, 70, 230]]) / 255  # most saturated first
        torch.testing.assert_close(colors, expected, rtol=0, atol=1e-6)
        assert torch.equal(background, torch.ones(3, 32, 32))


def test_it_learns_where_two_objects_are_without_labels(tmp_path):
    frames, _ = scenes(1000)
    args = arguments(tmp_path, max_steps=160, learning_rate=3e-3, muon_learning_rate=1e-2)
    model, result = train_slot_encoder(
        ColorIsaConfig(**TINY), FrameDataset(frames), FrameDataset(scenes(50, seed=9)[0]), args
    )
    assert result.step == 160
    held_out, corners = scenes(200, seed=5)
    slots = model(pixels(held_out)).slots
    positions = model.positions(slots)[:, 1:] / 512 * 32
    middles = torch.from_numpy(corners + np.array([[3, 3], [2, 4]])).float()
    apart = (middles[:, 0] - middles[:, 1]).abs().amax(-1) > 8  # nothing hidden
    errors = (positions - middles).norm(dim=-1)[apart]
    assert errors.median(0).values.max() < 1.0, errors.median(0)
    # the saved folder is the trained model, content scaled
    loaded = ColorIsaModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels(held_out)).slots, slots)
    assert ColorIsaImageProcessor.from_pretrained(tmp_path).size == 32
    statistics = json.loads((tmp_path / "latent_statistics.json").read_text())
    assert max(statistics["content_variance"][1:]) == pytest.approx(41, rel=1e-3)
    assert json.loads((tmp_path / "training_args.json").read_text())["max_steps"] == 160


def test_content_scale_gives_the_most_variable_object_the_asked_variance():
    model, frames = tiny(content_variance=7.0), scenes(50)[0]
    model.set_content_scale(3.0)  # of an earlier calibration: must not matter
    statistics = calibrate_content(model, FrameDataset(frames))
    _, content = model.split_slots(model(pixels(frames)).slots)
    variance = (content * model.content_scale).var(0).sum(-1)
    torch.testing.assert_close(variance[1:].max(), torch.tensor(7.0), rtol=1e-4, atol=0)
    np.testing.assert_allclose(statistics["content_variance"], variance.detach(), rtol=1e-4)


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    data, config = (FrameDataset(scenes(100)[0]), FrameDataset(scenes(20, seed=1)[0])), ColorIsaConfig(**TINY)
    whole, _ = train_slot_encoder(config, *data, arguments(tmp_path / "a", max_steps=6, save_every=3))
    # as after a kill at step 3: only that checkpoint is there
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "step-000003").rename(tmp_path / "b" / "checkpoints" / "step-000003")
    resumed, result = train_slot_encoder(config, *data, arguments(tmp_path / "b", max_steps=6, save_every=3))
    assert result.resumed_from.name == "step-000003"
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_frames_of_a_dataset_folder_are_read_from_images_and_from_clips(tmp_path):
    from datasets import Array4D, Dataset, Features
    from datasets import Image as ImageFeature

    frames = scenes(24)[0]
    images = [{"image": Image.fromarray(frame)} for frame in frames]
    (tmp_path / "images" / "data").mkdir(parents=True)
    Dataset.from_list(images, features=Features({"image": ImageFeature()})).to_parquet(
        tmp_path / "images" / "data" / "train-00000-of-00001.parquet"
    )
    (tmp_path / "clips" / "data").mkdir(parents=True)
    clips = Features({"frames": Array4D((None, 32, 32, 3), "uint8")})
    Dataset.from_dict({"frames": frames.reshape(4, 6, 32, 32, 3)}, features=clips).to_parquet(
        tmp_path / "clips" / "data" / "train-00000-of-00001.parquet"
    )
    for source, extra in (("images", []), ("clips", ["--column", "frames"])):
        argv = ["--dataset", str(tmp_path / source), "--output_dir", str(tmp_path / f"run_{source}"), "--use_cpu"]
        argv += ["--max_steps", "2", "--batch_size", "4", "--num_frames", "20", "--num_eval_frames", "4"]
        result = main([*argv, "--num_slots", "3", *extra])
        assert result.step == 2
        model = ColorIsaModel.from_pretrained(tmp_path / f"run_{source}")
        colors = scene_statistics(frames, 3)[0]
        torch.testing.assert_close(1 - model.colors.detach()[1:], colors[1:], rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"columns.*--column"):
        main(["--dataset", str(tmp_path / "clips"), "--output_dir", str(tmp_path / "x"), "--column", "pictures"])


def test_frames_mean_the_same_as_bytes_and_as_floats_and_other_numbers_are_refused(tmp_path):
    from datasets import Array3D, Array4D, Dataset, Features

    frames = scenes(6)[0]
    clip = Array4D((None, 32, 32, 3), "float32")
    kinds = {
        "floats": (frames.reshape(3, 2, 32, 32, 3) / np.float32(255), clip),
        "images": (frames, Array3D((32, 32, 3), "uint8")),
        "wide": (frames.reshape(3, 2, 32, 32, 3) * np.float32(1), clip),
        "large": (frames.reshape(3, 2, 32, 32, 3) * np.int32(4), Array4D((None, 32, 32, 3), "int32")),
    }
    for name, (values, feature) in kinds.items():
        (tmp_path / name / "data").mkdir(parents=True)
        dataset = Dataset.from_dict({"frames": values}, features=Features({"frames": feature}))
        dataset.to_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet")

    def read(name):
        arguments = ColorIsaTrainArguments(output_dir="x", dataset=str(tmp_path / name), num_frames=5)
        return np.concatenate(dataset_frames(arguments, 32))

    for name in ("floats", "images"):
        np.testing.assert_array_equal(read(name), frames)
    with pytest.raises(ValueError, match=r"floats must be in \[0, 1\]"):
        read("wide")
    with pytest.raises(ValueError, match="expected 0 to 255"):
        read("large")


def test_few_frames_of_each_clip_come_from_all_of_it(tmp_path):
    from datasets import Array4D, Dataset, Features

    time = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 32, 32, 3))
    features = Features({"frames": Array4D((None, 32, 32, 3), "uint8")})
    for split, rows in (("train", 40), ("validation", 10)):
        dataset = Dataset.from_dict({"frames": [time] * rows}, features=features)
        dataset.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    arguments = ColorIsaTrainArguments(output_dir="x", dataset=str(tmp_path), num_frames=40, num_eval_frames=200)
    one_each, all_frames = (frames[:, 0, 0, 0] for frames in dataset_frames(arguments, 32))
    assert len(one_each) == 40 and len(np.unique(one_each)) > 15
    np.testing.assert_array_equal(all_frames, np.tile(np.arange(20), 10))


def test_the_example_runs_the_training_script(monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "train_slot_encoder.py"
    monkeypatch.setattr("sys.argv", [str(example), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(example), run_name="__main__")
    assert stopped.value.code == 0 and "--content_loss_weight" in capsys.readouterr().out


@pytest.mark.slow
def test_push_t_encoder_reads_agent_and_block_after_a_short_training(tmp_path):
    """800 steps (about two minutes): far from the shipped encoder, and already useful."""
    from cjepa_hf.data.collect import sample_encoder_frames

    main(["--output_dir", str(tmp_path), "--max_steps", "800", "--num_frames", "20000", "--use_cpu"])
    model = ColorIsaModel.from_pretrained(tmp_path).eval()
    frames, states, _ = sample_encoder_frames(3000, seed=77)
    with torch.no_grad():
        slots = model(pixels(frames)).slots.flatten(1).double().numpy()
    x = np.concatenate([slots, np.ones((3000, 1))], axis=1)
    y = np.concatenate([states[:, :4], np.cos(states[:, 4:5]), np.sin(states[:, 4:5])], axis=1)
    weights = np.linalg.solve(x[:2000].T @ x[:2000] + 0.2 * np.eye(x.shape[1]), x[:2000].T @ y[:2000])
    p, y = x[2000:] @ weights, y[2000:]
    angle = np.degrees(np.arctan2(p[:, 5], p[:, 4]) - np.arctan2(y[:, 5], y[:, 4]))
    assert np.median(np.linalg.norm(p[:, :2] - y[:, :2], axis=1)) < 3
    assert np.median(np.linalg.norm(p[:, 2:4] - y[:, 2:4], axis=1)) < 8
    assert np.median(np.abs((angle + 180) % 360 - 180)) < 10
