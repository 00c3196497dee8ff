"""With default flags the predictor is the released code's: outputs, attention, masks, rollouts, losses, gradients."""

import pytest
import torch
from golden import golden_model, original_key, read

CLEVRER = dict(num_slots=7, slot_size=32, history_length=6, prediction_length=10, num_hidden_layers=2)
CLEVRER |= dict(num_attention_heads=4, intermediate_size=64)
PUSH_T = dict(num_slots=4, slot_size=32, history_length=3, prediction_length=1, num_attention_heads=16)
PUSH_T |= dict(action_size=10, proprio_size=4)
TOLERANCE = dict(atol=5e-5, rtol=1e-4)


def mask_of(indices, batch, steps, slots):
    mask = torch.zeros(batch, steps, slots, dtype=torch.bool)
    mask[:, 1:, indices.tolist()] = True
    return mask


@pytest.mark.parametrize("run", ["mask0", "mask2", "mask4"])
def test_clevrer_forward_inference_and_attention_equal_the_released_code(run):
    data = read("cjepa_clevrer.safetensors")
    model = golden_model(data, **CLEVRER)
    slots = data["inputs.slots"]
    mask = mask_of(data[f"outputs.{run}.forward.masked_indices"], *slots.shape[:3])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        output = model(slots, slot_mask=mask)
        future = model.predict(slots)
    torch.testing.assert_close(output.predicted_slots, data[f"outputs.{run}.forward.pred"], **TOLERANCE)
    torch.testing.assert_close(future, data[f"outputs.{run}.inference"], **TOLERANCE)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(slots, slot_mask=mask, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.predicted_slots, data[f"outputs.{run}.forward.pred"], **TOLERANCE)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    queries = [(t, i) for i in data[f"outputs.{run}.forward.masked_indices"].tolist() for t in range(1, 6)]
    queries += [(6, slot) for slot in range(7)]
    for layer in (0, -1):
        weights = output.attentions[layer].mean(dim=1)  # over heads: [B, (T + P) * N, (T + P) * N]
        rows = torch.stack([weights[:, t * 7 + i].reshape(-1, 16, 7) for t, i in queries], dim=1)
        torch.testing.assert_close(rows, data[f"outputs.{run}.attention.layer{layer}.stacked"], **TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_histories_are_aligned_to_the_right_as_the_released_inference_is(steps):
    data = read("cjepa_clevrer.safetensors")
    model = golden_model(data, **CLEVRER)
    with torch.no_grad():
        future = model.predict(data["inputs.slots"][:, :steps])
    torch.testing.assert_close(future, data[f"outputs.hist{steps}.inference"], **TOLERANCE)


@pytest.mark.parametrize("run", ["mask0", "mask1", "mask2"])
def test_push_t_predictor_with_six_tokens_equals_the_released_code(run):
    """The released predictor takes embedded tokens; here they are the slots of a model without auxiliaries."""
    data = read("cjepa_push_t.safetensors")
    size = dict(PUSH_T, num_slots=6, action_size=0, proprio_size=0, num_hidden_layers=3, intermediate_size=96)
    model = golden_model(data, **size)
    slots = data["inputs.slots"]
    mask = mask_of(data[f"outputs.{run}.forward.masked_indices"], *slots.shape[:3])
    with torch.no_grad():
        output = model(slots, slot_mask=mask)
        torch.testing.assert_close(model.predict(slots[:, :1]), data["outputs.hist1.inference"], **TOLERANCE)
        torch.testing.assert_close(model.predict(slots[:, :2]), data["outputs.hist2.inference"], **TOLERANCE)
        torch.testing.assert_close(model.predict(slots), data[f"outputs.{run}.inference"], **TOLERANCE)
    torch.testing.assert_close(output.predicted_slots, data[f"outputs.{run}.forward.pred"], **TOLERANCE)


def test_rollout_equals_the_released_video_rollout_with_frame_skip():
    """Frame OBS + i of the released rollout comes from offset i % frame_skip, position i // frame_skip."""
    data = read("cjepa_rollout.safetensors")
    config = dict(num_slots=3, slot_size=16, history_length=5, prediction_length=2, num_hidden_layers=2)
    model = golden_model(data, **config, num_attention_heads=4, intermediate_size=32, frame_skip=3)
    for video in ("0_pixels.mp4", "1_pixels.mp4"):
        observed, extended = data[f"inputs.slots.{video}"], data[f"outputs.extended.{video}"]
        skip, seen, total = 3, len(observed), len(extended)
        history = torch.stack([observed[seen - 5 * skip + o :: skip][:5] for o in range(skip)])
        with torch.no_grad():
            imagined = model.rollout(history, num_steps=-(-(total - seen) // skip)).slots
        interleaved = imagined.transpose(0, 1).flatten(0, 1)[: total - seen]
        torch.testing.assert_close(interleaved, extended[seen:], atol=5e-5, rtol=5e-4)


@pytest.mark.parametrize("run, indices", [("mask0_direct", []), ("mask1_direct", [1]), ("mask2_direct", [1, 3])])
def test_push_t_losses_and_gradients_equal_the_released_code(run, indices):
    data = read("cjepa_push_t_loss.safetensors")
    model = golden_model(data, **PUSH_T, num_hidden_layers=2, intermediate_size=64)
    slots, actions, proprio = (data[f"inputs.{name}"] for name in ("pixels_embed", "action", "proprio"))
    mask = mask_of(torch.tensor(indices, dtype=torch.long), 3, 3, 4) if indices else None
    output = model(
        slots[:, :3],
        actions=actions[:, :3].nan_to_num(0.0),
        proprio=proprio[:, :3].nan_to_num(0.0),
        future_slots=slots[:, 3:],
        future_proprio=proprio[:, 3:].nan_to_num(0.0),
        slot_mask=mask,
    )
    torch.testing.assert_close(output.loss, data[f"outputs.{run}.loss"], **TOLERANCE)
    torch.testing.assert_close(output.future_loss, data[f"outputs.{run}.loss_future"], **TOLERANCE)
    torch.testing.assert_close(output.proprio_loss, data[f"outputs.{run}.proprio_loss"], **TOLERANCE)
    if indices:
        torch.testing.assert_close(output.history_loss, data[f"outputs.{run}.loss_masked_history"], **TOLERANCE)
    output.loss.backward()
    gradients = {k: v for k, v in data.items() if k.startswith(f"outputs.{run}.grad.")}
    assert len(gradients) >= 3
    for key, expected in gradients.items():
        grad = model.get_parameter(original_key(key.removeprefix(f"outputs.{run}.grad."))).grad
        torch.testing.assert_close(grad.reshape(expected.shape), expected, atol=2e-5, rtol=1e-3)
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(total, data[f"outputs.{run}.total_grad_norm"], atol=1e-4, rtol=1e-4)


def test_clevrer_losses_equal_the_released_code():
    data = read("cjepa_clevrer_loss.safetensors")
    model = golden_model(data, **CLEVRER)
    embed = data["inputs.embed"]
    for run, indices in (("mask0", []), ("mask2", [0, 1]), ("mask4", [0, 1, 5, 2])):
        mask = mask_of(torch.tensor(indices, dtype=torch.long), 3, 6, 7) if indices else None
        output = model(embed[:, :6], future_slots=embed[:, 6:], slot_mask=mask)
        torch.testing.assert_close(output.loss, data[f"outputs.{run}.loss"], **TOLERANCE)
        if indices:
            torch.testing.assert_close(output.history_loss, data[f"outputs.{run}.loss_masked_history"], **TOLERANCE)
