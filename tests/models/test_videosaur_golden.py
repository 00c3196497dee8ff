"""VideoSAUR is the released code's: frames in, slots, masks, reconstructions, losses, gradients, restarts."""

import numpy as np
import pytest
import torch
from golden import DATA, read
from videosaur_golden import load_original_state_dict, original_key

from cjepa_hf.models.videosaur import VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel
from cjepa_hf.models.videosaur.modeling_videosaur import VideoSaurSlotAttention, time_similarity

TOLERANCE = dict(atol=2e-5, rtol=1e-4)
BACKBONE = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=98, patch_size=14)


@pytest.fixture(scope="module")
def chain():
    """The whole model after the backbone, its features and keys [2, 4, 16, 24] recorded, and the recorded results."""
    data = read("videosaur_chain.safetensors")
    model = VideoSaurModel(VideoSaurConfig(slot_size=32, image_size=56, renderer_size=64, backbone_config=BACKBONE))
    state = {original_key(k.removeprefix("weights.")): v for k, v in data.items() if k.startswith("weights.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("backbone.") for key in missing)
    recorded = [data[f"outputs.encoder.{k}"] for k in ("backbone_features", "vit_block_keys12")]

    def backbone(frames, with_keys):  # frames that hold the number of the recorded one
        index = frames[:, 0, 0, 0].long()
        return tuple(values.flatten(0, 1)[index] for values in recorded)

    model._backbone = backbone
    frames = torch.arange(8.0).view(2, 4, 1, 1, 1).expand(2, 4, 3, 56, 56)
    return model, frames, data


@pytest.mark.parametrize("chunk_size", [128, 3, 1])
def test_slots_masks_losses_and_gradients_equal_the_released_code(chain, chunk_size):
    model, frames, data = chain
    model.zero_grad()
    start = model.initializer(2, data["inputs.noise"])
    output = model(frames, initial_slots=start, return_loss=True, chunk_size=chunk_size)
    for ours, theirs in (
        ("slots", "processor.state"),
        ("predicted_slots", "processor.state_predicted"),
        ("masks", "processor.corrector.masks"),
        ("decoder_masks", "decoder.masks"),
        ("feature_loss", "loss_featrec"),
        ("similarity_loss", "loss_timesim"),
        ("loss", "total_loss"),
    ):
        expected = data[f"outputs.{theirs}"]
        torch.testing.assert_close(output[ours].reshape(expected.shape), expected, **TOLERANCE)
    assert torch.equal(output.state, output.predicted_slots[:, -1])
    output.loss.backward()
    names = [key.removeprefix("outputs.grad.") for key in data if key.startswith("outputs.grad.")]
    assert len(names) == 11
    for name in names:
        gradient = model.get_parameter(original_key(name)).grad
        torch.testing.assert_close(gradient, data[f"outputs.grad.{name}"], **TOLERANCE)


def test_a_restart_from_the_last_slots_equals_the_released_codes_chunks_and_the_state_carries_on_unbroken(chain):
    model, frames, data = chain
    with torch.no_grad():
        first = model(frames[:, :2], initial_slots=model.initializer(2, data["inputs.noise"]))
        restarted = model(frames[:, 2:], initial_slots=first.slots[:, -1])
        carried = model(frames[:, 2:], state=first.state)
    torch.testing.assert_close(restarted.slots, data["outputs.chunked.state_from_last_state"], **TOLERANCE)
    torch.testing.assert_close(carried.slots, data["outputs.processor.state"][:, 2:], **TOLERANCE)
    assert (restarted.slots - carried.slots)[:, 0].abs().max() > 1


@pytest.mark.parametrize(
    "case, config",
    [
        ("kvq_hidden", dict(attention_size=16, use_mlp=True, mlp_size=48)),
        ("nogru", dict(use_gru=False)),
    ],
)
def test_slot_attention_and_its_options_equal_the_released_code(case, config):
    data = {k.removeprefix(f"{case}."): v for k, v in read("videosaur_parts.safetensors").items() if case in k}
    attention = VideoSaurSlotAttention(VideoSaurConfig(slot_size=32, feature_size=24, **config))
    load_original_state_dict(attention, data)
    slots, features = (data[f"inputs.{k}"].requires_grad_() for k in ("slots", "features"))
    once, _ = attention(slots, *attention.project(features), 1)
    torch.testing.assert_close(once, data["outputs.iter1.slots"], **TOLERANCE)
    thrice, masks = attention(slots, *attention.project(features), 3)
    torch.testing.assert_close(thrice, data["outputs.iter3.slots"], **TOLERANCE)
    torch.testing.assert_close(masks, data["outputs.iter3.masks"], **TOLERANCE)
    (thrice.square().sum() + masks[..., 0].sum()).backward()
    torch.testing.assert_close(slots.grad, data["outputs.grad.slots"], **TOLERANCE)
    torch.testing.assert_close(attention.key.weight.grad, data["outputs.grad.to_k.weight"], **TOLERANCE)
    expected = data["outputs.grad.norm_features.bias"]
    torch.testing.assert_close(attention.feature_norm.bias.grad, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "name, options",
    [
        ("thr02_t05", dict(temperature=0.5, threshold=0.2)),
        ("shift2_nothr", dict(temperature=0.25, threshold=None, time_shift=2)),
        ("diag", dict(temperature=0.25, mask_diagonal=True)),
    ],
)
def test_similarity_targets_and_their_options_equal_the_released_code(name, options):
    data = read("videosaur_parts.safetensors")
    target = time_similarity(data["similarity.keys"], **options)
    torch.testing.assert_close(target, data[f"similarity.{name}"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.sum(-1), torch.ones(target.shape[:-1]))


@pytest.mark.parametrize(
    "image, height, width, options, name",
    [
        ("push_t", 56, 56, {}, "extract"),
        ("push_t", 56, 56, dict(resample="bicubic", antialias=False), "train"),
        ("clevrer", 49, 49, {}, "extract"),  # squeezed: 80 x 120 of 320 x 480
    ],
)
def test_frames_are_prepared_as_in_the_released_extraction_and_training(image, height, width, options, name):
    data = np.load(DATA / "videosaur_pixels.npz")
    expected = data[f"{image}_{name}"]  # every second pixel of a part of the whole result
    pixels = VideoSaurImageProcessor(size=height, **options)(data[image], return_tensors="np")["pixel_values"][0]
    assert pixels.shape == (3, height, width)
    # The rim of the part was interpolated with pixels beyond it.
    np.testing.assert_allclose(pixels[:, 2:-2:2, 2:-2:2], expected[:, 1:-1, 1:-1], **TOLERANCE)
