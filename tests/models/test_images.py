"""What all encoders of images say of images and pixels that are not what they take."""

import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.models.savi import SaviConfig, SaviImageProcessor, SaviModel
from cjepa_hf.models.videosaur import VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel

PROCESSORS = (ColorIsaImageProcessor, SaviImageProcessor, VideoSaurImageProcessor)
every_processor = pytest.mark.parametrize("processor", PROCESSORS)


@pytest.fixture(scope="module", params=["color-isa", "savi", "videosaur"])
def model(request):
    """An encoder of frames of 16 pixels."""
    if request.param == "color-isa":
        return ColorIsaModel(ColorIsaConfig(image_size=16, hidden_size=16, mlp_size=16))
    if request.param == "savi":
        return SaviModel(SaviConfig(image_size=16, slot_size=8, slot_mlp_size=8, decoder_channels=[8]))
    backbone = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    return VideoSaurModel(VideoSaurConfig(image_size=16, slot_size=16, renderer_size=16, backbone_config=backbone))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.zeros((32, 32), dtype=np.uint8), "gray"),
        (np.zeros((32, 32, 1), dtype=np.uint8), "gray"),
        (np.zeros((32, 32, 4), dtype=np.uint8), "alpha"),
        (np.zeros((3, 32, 32), dtype=np.uint8), "channels first"),
        (np.zeros((2, 3, 32, 32), dtype=np.uint8), "channels first"),
        (np.zeros((2, 2, 32, 32, 3), dtype=np.uint8), r"shape \(2, 2, 32, 32, 3\)"),
        (np.full((32, 32, 3), 200.0), "uint8"),
        (np.full((32, 32, 3), np.nan), "0, 1"),
        (np.zeros((32, 32, 3), dtype=np.int64), "int64"),
        (torch.zeros((32, 32, 3), dtype=torch.int64), "int64"),
        (np.zeros((0, 32, 32, 3), dtype=np.uint8), "empty"),
        (Image.new("L", (32, 32)), 'convert\\("RGB"\\)'),
        (Image.new("RGBA", (32, 32)), 'convert\\("RGB"\\)'),
        ([], "No images"),
        ([np.zeros((2, 32, 32, 3), np.uint8), np.zeros((3, 32, 32, 3), np.uint8)], "different lengths"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)], "different lengths"),
        ("frame.png", "str"),
    ],
)
@every_processor
def test_wrong_images_are_errors_that_say_what_to_do(processor, wrong, message):
    with pytest.raises(ValueError, match=message):
        processor()(wrong)


@every_processor
def test_wrong_settings_of_an_image_processor_are_errors(processor):
    for size in (0, True, 64.0, None):
        with pytest.raises(ValueError, match="size="):
            processor(size=size)
    with pytest.raises(ValueError, match=rf"Unknown options \['crop'\]; {processor.__name__}"):
        processor()(np.zeros((8, 8, 3), np.uint8), crop=True)


@every_processor
def test_images_of_any_memory_layout_type_and_size_can_be_in_one_list(processor):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 24, 3), np.uint8)
    pixels = processor(size=16)(frames)["pixel_values"]
    constant = np.broadcast_to(frames[:1], frames.shape)  # read-only
    mixed = [frames[::-1], constant, frames.astype(np.float64) / 255, torch.from_numpy(frames / np.float32(255))]
    found = processor(size=16)(mixed)["pixel_values"]
    assert found.shape == (4, 4, 3, 16, 16)
    torch.testing.assert_close(found[0], pixels.flip(0))
    torch.testing.assert_close(found[1], pixels[:1].expand_as(pixels))
    for row in found[2:]:  # cv2 rounds bytes to bytes
        torch.testing.assert_close(row, pixels, atol=0.003, rtol=0)
    sizes = processor(size=16)([frames[0], frames[0, :20]])["pixel_values"]
    assert torch.equal(sizes[0], pixels[0]) and sizes.shape == (2, 3, 16, 16)
    half = processor(size=16)(torch.full((32, 32, 3), 0.5, dtype=torch.bfloat16))["pixel_values"]
    torch.testing.assert_close(half, processor(size=16)(np.full((32, 32, 3), 0.5))["pixel_values"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8), "uint8.*ImageProcessor"),
        (torch.zeros(3, 16, 16), "batch axis"),
        (torch.zeros(1, 2, 16, 16, 3), "Channels come last"),
        (torch.zeros(1, 2, 1, 16, 16), "Convert the images to RGB"),
        (torch.zeros(1, 2, 3, 64, 64), r"Resize with \w+ImageProcessor\(size=16\)"),
        (torch.zeros(1, 0, 3, 16, 16), "no frames"),
        (torch.full((1, 2, 3, 16, 16), 200.0), "range from 200 to 200"),
        (torch.full((1, 2, 3, 16, 16), float("nan")), "NaN"),
        (np.zeros((1, 2, 3, 16, 16), dtype=np.float32), "ImageProcessor"),
    ],
)
def test_wrong_pixels_are_errors_that_say_what_to_do(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(wrong)


def test_only_a_memoryless_encoder_takes_images_without_a_time_axis(model):
    images = torch.zeros(2, 3, 16, 16)
    if model.config.model_type == "color-isa":
        assert model(images).slots.shape[:1] == (2,)
    else:
        with pytest.raises(ValueError, match="a frame also T = 1"):
            model(images)
