"""VideoSAUR: reproducible slots, long videos in parts, what trains and what does not, saving, frames in, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model, ViTConfig

from cjepa_hf import CJepaConfig, CJepaModel, VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel

BACKBONE = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14)
TINY = dict(num_slots=3, slot_size=16, image_size=28, renderer_size=32, backbone_config=BACKBONE)
WORLD = dict(num_slots=3, slot_size=16, num_hidden_layers=1, intermediate_size=16)
CLOSE = dict(atol=1e-5, rtol=1e-4)


def tiny(seed=0, **config) -> VideoSaurModel:
    torch.manual_seed(seed)
    model = VideoSaurModel(VideoSaurConfig(**(TINY | config))).eval()
    for parameter in model.parameters():  # nothing at its initial zero or one: every path must matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def videos(count=3, steps=4, seed=0):
    return torch.randn(count, steps, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- initial slots


def test_a_videos_slots_depend_on_its_seed_and_not_on_the_batch_its_order_or_its_chunks():
    model, x = tiny(), videos(5)
    with torch.no_grad():
        whole = model(x, seeds=[7, 1, 7, 0, 3])
        assert whole.slots.shape == (5, 4, 3, 16) and whole.masks.shape == (5, 4, 3, 2, 2)
        torch.testing.assert_close(whole.masks.sum(2), torch.ones(5, 4, 2, 2))
        turned = model(x.flip(0), seeds=[3, 0, 7, 1, 7], chunk_size=2)
        torch.testing.assert_close(turned.slots.flip(0), whole.slots, **CLOSE)
        for index, seed in enumerate([7, 1, 7, 0, 3]):
            alone = model(x[index : index + 1], seeds=[seed], chunk_size=3)
            torch.testing.assert_close(alone.slots[0], whole.slots[index], **CLOSE)
        other = model(x, seeds=[8, 1, 7, 0, 3]).slots
        assert (other[0] - whole.slots[0]).abs().max() > 0.01


def test_the_noise_of_a_seed_is_what_torch_draws_with_it():
    model = tiny()
    start = model.initial_slots(2, seeds=[10042, np.int64(5)])
    for slots, seed in zip(start, (10042, 5)):
        torch.manual_seed(seed)
        expected = model.initializer.mean[0] + torch.randn(3, 16) * model.initializer.log_std[0].exp()
        assert torch.equal(slots, expected)


def test_evaluation_without_seeds_is_deterministic_and_training_is_not():
    model, x = tiny(), videos(2)
    with torch.no_grad():
        assert torch.equal(model(x).slots, model(x, seeds=[0, 0]).slots)
        model.train()
        assert not torch.equal(model(x).slots, model(x).slots)
        drawn = [model(x, generator=torch.Generator().manual_seed(4)).slots for _ in range(2)]
        assert torch.equal(*drawn)
        start = model.initial_slots(2, generator=torch.Generator().manual_seed(4))
        assert not torch.equal(start[0], start[1])
        assert torch.equal(model(x, initial_slots=start).slots, drawn[0])


def test_learned_slots_need_no_noise():
    model, x = tiny(initial_slots="learned"), videos(2)
    model.train()
    with torch.no_grad():
        assert torch.equal(model.initial_slots(2), model.initializer.slots.expand(2, 3, 16))
        assert torch.equal(model(x).slots, model(x, seeds=[1, 2]).slots)
    assert not hasattr(model.initializer, "mean")


def test_the_first_frame_of_a_video_takes_its_own_number_of_iterations():
    x, start = videos(1, steps=2), torch.randn(1, 3, 16)
    with torch.no_grad():
        three = tiny(num_iterations=1, first_frame_iterations=3)(x, initial_slots=start)
        one = tiny(num_iterations=1, first_frame_iterations=1)(x, initial_slots=start)
        later = tiny(num_iterations=1, first_frame_iterations=3)(x, state=start)
    assert torch.equal(later.slots, one.slots) and not torch.equal(three.slots[:, 0], one.slots[:, 0])


def test_a_video_in_parts_is_the_unbroken_run():
    model, x = tiny(), videos(2, steps=5)
    with torch.no_grad():
        whole, state, parts = model(x, seeds=[1, 2]), None, []
        for part in x.split([1, 3, 1], dim=1):
            output = model(part, **({"seeds": [1, 2]} if state is None else {"state": state}))
            state = output.state
            parts.append(output.slots)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.slots, **CLOSE)
    torch.testing.assert_close(state, whole.state, **CLOSE)


# --------------------------------------------------------------------------------------------------------- backbone


@pytest.mark.parametrize("image_size", [28, 56])  # smaller than the table of positions, and as large
def test_features_and_keys_are_those_of_transformers_dinov2(image_size):
    frames = torch.randn(2, 3, image_size, image_size)
    for kind in ("after_norm", "before_norm"):
        model = tiny(image_size=image_size, backbone_features=kind)
        with torch.no_grad():
            features, keys = model._backbone(frames, True)
            output = model.backbone(frames, output_hidden_states=True)
            layer = model.backbone.encoder.layer[-1]
            expected = layer.attention.k_proj(layer.norm1(output.hidden_states[-2]))
        hidden = output.last_hidden_state if kind == "after_norm" else output.hidden_states[-1]
        torch.testing.assert_close(features, hidden[:, 1:])
        torch.testing.assert_close(keys, expected[:, 1:])
        assert model._backbone(frames, False)[1] is None


def test_the_backbone_stays_frozen_and_in_evaluation_mode(tmp_path):
    model = tiny(backbone_config=BACKBONE | {"hidden_dropout_prob": 0.5}).train()
    assert model.training and not model.backbone.training
    model.save_pretrained(tmp_path)
    world = CJepaModel(CJepaConfig(**WORLD, slot_encoder_config=model.config))
    world.save_pretrained(tmp_path / "world")
    loaded = CJepaModel.from_pretrained(tmp_path / "world").slot_encoder
    for one in (model, VideoSaurModel.from_pretrained(tmp_path), loaded):
        assert not any(p.requires_grad for p in one.backbone.parameters())
        one(videos(), return_loss=True).loss.backward()
        assert all(p.grad is None for p in one.backbone.parameters())
        for name, parameter in one.named_parameters():
            if not name.startswith("backbone."):
                assert parameter.grad.abs().max() > 0, name


def test_a_model_starts_from_a_pretrained_backbone(tmp_path):
    torch.manual_seed(0)
    backbone = Dinov2Model(Dinov2Config(**BACKBONE))
    backbone.save_pretrained(tmp_path)
    config = {name: value for name, value in TINY.items() if name != "backbone_config"}
    model = VideoSaurModel.from_pretrained_backbone(tmp_path, **config)
    assert model.config.backbone_config.hidden_size == 24 and model.config.transform_size == 48
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.backbone.get_parameter(name), value), name
    assert not any(p.requires_grad for p in model.backbone.parameters())
    with pytest.raises(ValueError, match=r"image_size=30.*28 and 42"):
        VideoSaurModel.from_pretrained_backbone(tmp_path, image_size=30)
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'vit' model; expected a 'dinov2'"):
        VideoSaurModel.from_pretrained_backbone(tmp_path / "vit")


# --------------------------------------------------------------------------------------------------------- training


def test_training_steps_lower_both_losses():
    torch.manual_seed(0)
    model, x = VideoSaurModel(VideoSaurConfig(**TINY)).train(), videos(4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    history = []
    for _ in range(10):
        output = model(x, seeds=range(4), return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append([output.loss.item(), output.feature_loss.item(), output.similarity_loss.item()])
    (loss, feature, similarity), last = history[0], history[-1]
    assert loss == pytest.approx(feature + 0.25 * similarity, rel=1e-5)
    assert history[1][0] < loss and last[0] < 0.95 * loss and last[1] < 0.95 * feature and last[2] < similarity


def test_losses_are_weighted_as_asked():
    model, x = tiny(feature_loss_weight=2.0, similarity_loss_weight=0.0, similarity_time_shift=3), videos()
    output = model(x, return_loss=True)
    torch.testing.assert_close(output.loss, 2 * output.feature_loss)
    assert output.decoder_masks.shape == (3, 4, 3, 2, 2) and output.reconstruction.shape == (3, 4, 4, 24)
    decoded = model.decode(output.slots[0])
    torch.testing.assert_close(decoded.masks, output.decoder_masks[0])
    torch.testing.assert_close(decoded.reconstruction, output.reconstruction[0], **CLOSE)
    assert decoded.similarity_logits.shape == (4, 4, 4)
    plain = model(x)
    assert plain.loss is None and plain.reconstruction is None


def test_bfloat16_weights_and_autocast_give_nearly_the_same_slots():
    model, x = VideoSaurModel(VideoSaurConfig(**TINY)).eval(), videos()
    exact = model(x, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x, return_loss=True)
    mixed.loss.backward()
    half = model.to(torch.bfloat16)(x.bfloat16(), return_loss=True)
    assert half.slots.dtype == half.masks.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    for output in (mixed, half):
        assert (output.slots.float() - exact.slots).abs().max() < 0.1
        assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


# ----------------------------------------------------------------------------------------------------------- saving


def test_saving_and_loading_keeps_model_config_and_processor(tmp_path):
    model, x = tiny(backbone_features="before_norm", use_mlp=True, residual_scale=0.5), videos()
    model.save_pretrained(tmp_path)
    VideoSaurImageProcessor(size=28, resample="bicubic", antialias=False, center_crop=True).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is VideoSaurModel and not loaded.training
    assert torch.equal(loaded(x, seeds=[1, 2, 3]).slots, model(x, seeds=[1, 2, 3]).slots)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.backbone_features, config.use_mlp, config.residual_scale) == ("before_norm", True, 0.5)
    assert isinstance(config.backbone_config, Dinov2Config) and config.backbone_config.hidden_size == 24
    assert "_name_or_path" not in json.loads((tmp_path / "config.json").read_text())["backbone_config"]
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is VideoSaurImageProcessor
    assert (processor.size, processor.resample, processor.antialias, processor.center_crop) == (
        28, "bicubic", False, True,
    )  # fmt: skip
    # no weight depends on the number of random slots
    assert VideoSaurModel.from_pretrained(tmp_path, num_slots=5)(x).slots.shape == (3, 4, 5, 16)


def test_a_world_model_carries_it_as_slot_encoder():
    config = VideoSaurConfig(**TINY)
    world = CJepaModel(CJepaConfig(**WORLD, slot_encoder_config=config.to_dict())).eval()
    with torch.no_grad():
        assert torch.equal(world.encode(videos()), world.slot_encoder(videos(), seeds=[0, 0, 0]).slots)


def test_the_default_is_the_full_size_model():
    with torch.device("meta"):
        model = VideoSaurModel(VideoSaurConfig())
    assert len(model.state_dict()) == 307  # as in the released checkpoints

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model) == 26_277_956
    assert count(model.backbone) == 22_056_576 and count(model.output_transform) == 394_880
    assert count(model.corrector) == 148_736 and count(model.predictor) == 198_272
    assert count(model.decoder) == 3_479_236 and count(model.initializer) == 256
    assert model.decoder.position_embedding.shape == (1, 196, 128) and model.decoder.head.weight.shape == (580, 1024)


# ----------------------------------------------------------------------------------------------------------- errors


def test_unknown_or_impossible_settings_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match=r"num_slot'.*Did you mean 'num_slots'"):
        VideoSaurConfig(num_slot=3)
    with pytest.raises(ValueError, match="'savi' model; expected 'videosaur'"):
        VideoSaurConfig(model_type="savi")
    for wrong, message in (
        (dict(num_slots=0), "num_slots"),
        (dict(image_size=200), r"image_size=200 .*patch_size=14.*196 and 210"),
        (dict(slot_size=30), "num_attention_heads"),
        (dict(first_frame_iterations=0), "first_frame_iterations"),
        (dict(similarity_temperature=0.0), "similarity_temperature"),
        (dict(similarity_loss_weight=-1.0), "similarity_loss_weight"),
        (dict(backbone_config={"model_type": "vit"}), "'vit'"),
        (dict(backbone_config=ViTConfig()), "'vit'"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoSaurConfig(**wrong)
    written = json.loads(VideoSaurConfig(**TINY).to_json_string(use_diff=False))
    assert VideoSaurConfig(**written).to_dict() == VideoSaurConfig(**TINY).to_dict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seeds=[1]), "1 seeds for 3 videos"),
        (dict(seeds=[1, 2, 3], generator=torch.Generator()), "seeds and generator"),
        (dict(seeds=[1, 2, 3], state=torch.zeros(3, 3, 16)), "state and seeds"),
        (dict(initial_slots=torch.zeros(2, 3, 16)), r"initial_slots.*\[3, N, 16\]"),
        (dict(state=torch.zeros(3, 3, 8)), r"state.*\[3, N, 16\]"),
        (dict(state=torch.zeros(3, 3, 16, dtype=torch.int64)), "int64"),
        (dict(labels=None), "Unexpected inputs"),
        (dict(chunk_size=0), "chunk_size"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(videos(), **arguments)


def test_a_single_frame_has_slots_but_no_losses():
    model = tiny()
    assert model(videos(2, steps=1)).slots.shape == (2, 1, 3, 16)
    with pytest.raises(ValueError, match="at least 2"):
        model(videos(2, steps=1), return_loss=True)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., N, 16\]"):
        model.decode(torch.zeros(3, 8))


# ----------------------------------------------------------------------------------------------------------- images


def test_images_of_every_kind_give_the_same_pixels():
    processor = VideoSaurImageProcessor(size=16)
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    clip = processor(frames)["pixel_values"]
    assert clip.shape == (3, 3, 16, 16) and clip.dtype == torch.float32
    images = [Image.fromarray(frame) for frame in frames]
    for same in (images, list(frames), torch.from_numpy(frames)):
        assert torch.equal(processor(same)["pixel_values"], clip)
    assert torch.equal(processor(images[0])["pixel_values"], clip[:1])
    assert torch.equal(processor([frames, frames])["pixel_values"], torch.stack([clip, clip]))
    torch.testing.assert_close(processor(frames / 255.0)["pixel_values"], clip, **CLOSE)
    assert processor(frames, return_tensors="np")["pixel_values"].shape == (3, 3, 16, 16)
    long = np.repeat(frames[:1], 70, axis=0)  # more than are resized at once
    assert torch.equal(processor(long)["pixel_values"], clip[:1].expand(70, -1, -1, -1))


def test_frames_that_are_not_square_are_squeezed_or_cropped_and_normalized_as_imagenet():
    frame = np.zeros((30, 60, 3), dtype=np.uint8)
    frame[:, 15:45] = (255, 51, 102)  # the central square
    pixels = VideoSaurImageProcessor(size=30, center_crop=True)(frame)["pixel_values"][0]
    expected = (torch.tensor([1, 0.2, 0.4]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(pixels, expected.view(3, 1, 1).expand(3, 30, 30), **CLOSE)
    squeezed = VideoSaurImageProcessor(size=30)(frame)["pixel_values"][0]
    torch.testing.assert_close(squeezed[:, :, 10:20], pixels[:, :, 10:20], **CLOSE)
    assert squeezed[0, 0, 0] == pytest.approx(-0.485 / 0.229)


def test_bicubic_overshoot_at_sharp_edges_is_cut_off():
    frames = np.zeros((1, 20, 20, 3), np.uint8)
    frames[:, :, 10:] = 255
    options = dict(resample="bicubic", antialias=False, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    pixels = VideoSaurImageProcessor(size=16, **options)(frames, return_tensors="np")["pixel_values"]
    assert pixels.min() == 0 and pixels.max() == 1


def test_wrong_processor_settings_are_errors():
    for wrong in (dict(size=0), dict(resample="nearest"), dict(image_std=[1.0, 1.0, 0.0])):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VideoSaurImageProcessor(**wrong)
