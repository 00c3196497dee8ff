"""The C-JEPA model: masks, flags, losses, rollout, saving, and errors that say what to do."""

import json

import numpy as np
import pytest
import torch
from golden import original_key
from scipy.optimize import linear_sum_assignment
from transformers import AutoConfig, AutoModel

from cjepa_hf import CJepaConfig, CJepaModel
from cjepa_hf.models.cjepa.modeling_cjepa import (
    _heads_first,
    _tokens_first,
    assign_slots,
    cpu_attention,
    fast_dropout,
    reorder_slots,
    solve_assignment,
)

TINY = dict(
    slot_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, action_size=10, proprio_size=4
)
OURS = dict(norm_first=True, residual_prediction="last", anchor="last_visible")


def tiny(seed=0, **config) -> CJepaModel:
    torch.manual_seed(seed)
    model = CJepaModel(CJepaConfig(**(TINY | config))).eval()
    for parameter in model.parameters():  # nothing at its initial zero: every path must matter
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def window(batch=3, steps=3, slots=4, seed=1, **extra):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    return (
        dict(slots=draw(batch, steps, slots, 32), actions=draw(batch, steps, 10), proprio=draw(batch, steps, 4))
        | extra
    )


def targets(batch=3, slots=4, horizon=1, seed=2):
    g = torch.Generator().manual_seed(seed)
    return dict(
        future_slots=torch.randn(batch, horizon, slots, 32, generator=g),
        future_proprio=torch.randn(batch, horizon, 4, generator=g),
    )


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("strategy", ["object", "token", "tube"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_masks_hide_the_declared_number_of_tokens_and_never_the_visible_prefix(strategy, prefix):
    model = tiny(mask_strategy=strategy, num_masked_slots=[0, 2], visible_prefix=prefix, history_length=6)
    mask = model.draw_slot_mask(torch.randn(500, 6, 4, 32), torch.Generator().manual_seed(0))
    assert not mask[:, :prefix].any()
    counts = mask.sum((1, 2))
    assert set(counts.tolist()) == {0, 6 - prefix, 2 * (6 - prefix)}
    share = torch.stack([(counts == m * (6 - prefix)).float().mean() for m in range(3)])
    assert (share - 1 / 3).abs().max() < 0.08  # |M| uniform on {0, 1, 2}
    per_slot = mask.float().mean((0, 1))
    assert (per_slot / per_slot.mean() - 1).abs().max() < 0.15  # no slot is favoured


def test_object_masks_hide_whole_objects_and_differ_between_samples():
    model = tiny(num_masked_slots=2)
    mask = model.draw_slot_mask(torch.randn(200, 3, 4, 32), torch.Generator().manual_seed(0))
    assert (mask[:, 1] == mask[:, 2]).all() and (mask[:, 1].sum(-1) == 2).all()
    assert len({tuple(row.tolist()) for row in mask[:, 1]}) == 6  # all pairs of four slots occur


def test_tubes_are_contiguous_in_time_unless_they_spill():
    model = tiny(mask_strategy="tube", num_masked_slots=1, history_length=7)
    mask = model.draw_slot_mask(torch.randn(300, 7, 8, 32), torch.Generator().manual_seed(0))[:, 1:].int()
    starts = (torch.diff(mask, dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).sum(1)
    assert starts.max() == 1
    assert {int(n) for n in mask.any(1).sum(-1)} >= {1, 2, 3, 6}  # one long slot up to many short ones


def test_mask_probability_leaves_samples_unmasked():
    model = tiny(mask_probability=0.25)
    mask = model.draw_slot_mask(torch.randn(2000, 3, 4, 32), torch.Generator().manual_seed(0))
    assert abs(mask.any((1, 2)).float().mean() - 0.25) < 0.03


def test_static_slots_are_not_masked_when_told_so():
    model = tiny(num_masked_slots=2, mask_static_slots=False)
    slots = torch.randn(100, 1, 4, 32).repeat(1, 3, 1, 1)
    slots[:, 1:, 2] += 0.1
    mask = model.draw_slot_mask(slots, torch.Generator().manual_seed(0))
    assert mask[:, 1:, 2].all() and not mask[:, :, [0, 1, 3]].any()


@pytest.mark.parametrize("flags", [{}, OURS])
def test_a_hidden_token_cannot_reach_the_output(flags):
    model = tiny(**flags)
    inputs = window()
    mask = torch.zeros(3, 3, 4, dtype=torch.bool)
    mask[:, 1:, 2] = True
    changed = dict(inputs, slots=inputs["slots"].clone())
    changed["slots"][:, 1:, 2] += 5.0
    with torch.no_grad():
        a, b = (model(**x, slot_mask=mask).predicted_slots for x in (inputs, changed))
        c = model(**changed).predicted_slots
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (a - c).abs().max() > 1e-2


def test_a_frame_that_was_hidden_tells_no_velocity_of_the_one_after_it():
    """Hidden, visible, hidden: the change between the first two is unknown."""
    model = tiny(history_length=4, **(OURS | dict(residual_prediction="velocity")))
    inputs = window(steps=4)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, [1, 3], 2] = True
    changed = dict(inputs, slots=inputs["slots"].clone())
    changed["slots"][:, [1, 3], 2] += 5.0
    with torch.no_grad():
        a, b = (model(**x, slot_mask=mask).predicted_slots for x in (inputs, changed))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_mask_of_whole_objects_may_be_given_as_batch_by_slots():
    model = tiny()
    objects = torch.tensor([[True, False, False, False]] * 3)
    full = objects[:, None].repeat(1, 3, 1)
    full[:, 0] = False
    with torch.no_grad():
        a, b = (model(**window(), slot_mask=m) for m in (objects, full))
    torch.testing.assert_close(a.predicted_slots, b.predicted_slots)
    assert torch.equal(a.slot_mask, full)


def test_masks_are_drawn_in_training_and_nothing_is_hidden_in_evaluation():
    model = tiny()
    assert model(**window()).slot_mask is None
    assert model.train()(**window()).slot_mask.any()


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("residual", ["last", "velocity"])
def test_residual_prediction_starts_from_the_last_visible_state(residual):
    torch.manual_seed(0)
    model = CJepaModel(CJepaConfig(**(TINY | OURS | dict(residual_prediction=residual)))).eval()
    torch.nn.init.zeros_(model.predictor.head.bias)
    inputs = window()
    slots = inputs["slots"]
    mask = torch.zeros(3, 3, 4, dtype=torch.bool)
    mask[:, 1:, 1] = True
    with torch.no_grad():
        predicted = model(**inputs, slot_mask=mask).predicted_slots
        future = model.predict(**inputs)
    step = slots[:, 2] - slots[:, 1] if residual == "velocity" else 0.0
    torch.testing.assert_close(future[:, 0], slots[:, 2] + step)
    torch.testing.assert_close(predicted[:, 3, [0, 2, 3]], (slots[:, 2] + step)[:, [0, 2, 3]])
    # the hidden slot was last seen in frame 0, and its velocity was never seen
    for t in (1, 2, 3):
        torch.testing.assert_close(predicted[:, t, 1], slots[:, 0, 1])


def test_a_jump_tells_no_velocity():
    config = CJepaConfig(**(TINY | OURS | dict(residual_prediction="velocity", velocity_limit=0.5)))
    model = CJepaModel(config).eval()
    torch.nn.init.zeros_(model.predictor.head.bias)
    inputs = window()
    slots = inputs["slots"][:, :1].repeat(1, 3, 1, 1)
    slots[:, 2, 0] += 0.4  # moves
    slots[:, 2, 1] += 0.6  # enters
    with torch.no_grad():
        inputs["slots"] = slots
        future = model.predict(**inputs)[:, 0]
        no_mask = model(**inputs, slot_mask=torch.zeros(3, 3, 4, dtype=torch.bool)).predicted_slots[:, 3]
    for predicted in (future, no_mask):
        torch.testing.assert_close(predicted[:, 0], slots[:, 2, 0] + 0.4)
        torch.testing.assert_close(predicted[:, 1:], slots[:, 2, 1:])
    with pytest.raises(ValueError, match="velocity_limit=0 must be positive"):
        CJepaConfig(velocity_limit=0)


def test_a_velocity_map_decides_what_goes_on_changing(tmp_path):
    config = CJepaConfig(**(TINY | OURS | dict(residual_prediction="velocity", velocity_map=True)))
    model = CJepaModel(config).eval()
    torch.nn.init.zeros_(model.predictor.head.bias)
    slots = torch.randn(2, 3, 4, 32)
    inputs = window() | {"slots": slots}
    inputs = {name: None if value is None else value[:2] for name, value in inputs.items()}
    moved = slots[:, 2] - slots[:, 1]
    with torch.no_grad():
        torch.testing.assert_close(model.predict(**inputs)[:, 0], slots[:, 2] + moved)  # the identity at first
        model.predictor.velocity_map.weight[16:] = 0
        moved[..., 16:] = 0
        torch.testing.assert_close(model.predict(**inputs)[:, 0], slots[:, 2] + moved)
        hidden = model(**inputs, slot_mask=torch.zeros(2, 3, 4, dtype=torch.bool)).predicted_slots[:, 3]
        torch.testing.assert_close(hidden, slots[:, 2] + moved)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        CJepaModel.from_pretrained(tmp_path).predictor.velocity_map.weight, model.predictor.velocity_map.weight
    )
    with pytest.raises(ValueError, match='velocity_map needs residual_prediction="velocity"'):
        CJepaConfig(velocity_map=True)


@pytest.mark.parametrize("flags", [{}, OURS, OURS | dict(residual_prediction="velocity", velocity_limit=0.3)])
def test_the_shortcut_for_future_frames_equals_the_full_forward(flags):
    model = tiny(**flags)
    for steps in (1, 2, 3):
        inputs = window(steps=steps)
        with torch.no_grad():
            full = model(**inputs).predicted_slots[:, steps:]
            no_mask = model(**inputs, slot_mask=torch.zeros(3, steps, 4, dtype=torch.bool)).predicted_slots[:, steps:]
            torch.testing.assert_close(model.predict(**inputs), full, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(no_mask, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        OURS | dict(anchor_in_history_loss=False),
        OURS | dict(residual_prediction="velocity", velocity_limit=0.3, velocity_map=True, visible_prefix=2),
        dict(auxiliary_fusion="concat", action_embedding_size=8, proprio_embedding_size=8, anchor="last_visible"),
    ],
)
@pytest.mark.parametrize("mask", ["tokens", "one sample alone", "everything after the prefix", None])
def test_what_no_loss_reads_may_be_left_out_without_a_change_of_losses_and_gradients(flags, mask):
    dropout = dict(hidden_dropout=0.0, attention_dropout=0.0)
    model = tiny(history_length=5, prediction_length=2, num_masked_slots=2, **flags, **dropout).train()
    inputs = window(steps=4) | targets(horizon=2)
    hidden = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    if mask == "one sample alone":
        hidden[1:] = False
    if mask == "everything after the prefix":
        hidden[:] = True
    hidden[:, : model.config.visible_prefix] = False
    if mask is None:
        model.config.num_masked_slots = 0
        hidden = None
    computed, length = [], []
    for spared in (False, True):
        model.zero_grad()
        handle = model.predictor.layers[-1].mlp.fc1.register_forward_hook(lambda *a: length.append(a[-1].shape[1]))
        output = model(**inputs, slot_mask=hidden, trained_only=spared)
        handle.remove()
        output.loss.backward()
        losses = {name: getattr(output, name) for name in ("loss", "history_loss", "future_loss", "proprio_loss")}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        computed.append({name: value.detach() for name, value in losses.items() if value is not None} | gradients)
        assert output.predicted_slots.shape == (3, 6, 4, 32)
    torch.testing.assert_close(computed[1], computed[0], rtol=1e-4, atol=1e-5)
    assert length[1] < length[0] or mask == "everything after the prefix"


def test_leaving_out_what_no_loss_reads_needs_a_loss():
    with pytest.raises(ValueError, match=r"trained_only=True .* without future_slots"):
        tiny()(**window(), trained_only=True)


@pytest.mark.parametrize("flags", [{}, OURS])
def test_slots_are_a_set(flags):
    model = tiny(**flags)
    inputs = window()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight = model.predict(**inputs)
        permuted = model.predict(**dict(inputs, slots=inputs["slots"][:, :, order]))
        torch.testing.assert_close(permuted, straight[:, :, order], atol=1e-5, rtol=1e-5)
        assert model.predict(**dict(inputs, slots=inputs["slots"][:, :, :3])).shape == (3, 1, 3, 32)


def test_history_loss_counts_hidden_tokens_and_optionally_the_anchor():
    inputs = window() | targets()
    mask = torch.zeros(3, 3, 4, dtype=torch.bool)
    mask[0, 1:, 2] = mask[1, 2, 0] = True
    for anchor in (True, False):
        model = tiny(anchor_in_history_loss=anchor)
        output = model(**inputs, slot_mask=mask)
        error = (output.predicted_slots[:, :3] - inputs["slots"]).square().mean(-1)
        first = [error[0, int(not anchor) :, 2], error[1, [0, 2] if anchor else [2], 0]]
        expected = sum(x.mean() for x in first) / 3  # the third sample hides nothing
        torch.testing.assert_close(output.history_loss, expected)
        torch.testing.assert_close(output.loss, output.future_loss + output.history_loss + output.proprio_loss)
        model.config.history_loss_weight = 0.25
        weighted = model(**inputs, slot_mask=mask)
        torch.testing.assert_close(weighted.loss, output.loss - 0.75 * output.history_loss)


def test_huber_equals_mse_for_small_errors_and_grows_linearly_for_large_ones():
    model = tiny(loss_type="huber", huber_delta=0.1)
    target = torch.zeros(2, 4, 32)
    small, large = torch.full((2, 4, 32), 1e-3), torch.full((2, 4, 32), 50.0)
    torch.testing.assert_close(model.token_loss(small, target), torch.full((2, 4), 1e-6), rtol=1e-3, atol=0)
    ratio = model.token_loss(2 * large, target) / model.token_loss(large, target)
    torch.testing.assert_close(ratio, torch.full((2, 4), 2.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_declared_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, requires_grad=True)
    y = fast_dropout(x, p, training=True)
    assert abs((y == 0).float().mean() - p) < 3e-3 and abs(y.mean() - 1) < 5e-3
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    assert abs((y[::2] == 0).float().mean() - p) < 4e-3  # no pattern within the drawn words
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(fast_dropout(x, p, training=True), y)
    assert fast_dropout(x, p, training=False) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.9])
def test_dropout_of_any_type_and_share_keeps_or_drops(dtype, p):
    torch.manual_seed(0)
    y = fast_dropout(torch.ones(300, 101, dtype=dtype), p, training=True)
    assert y.dtype == dtype and abs((y == 0).float().mean() - p) < 6e-3
    expected = torch.tensor(1 / (1 - p), dtype=dtype)
    torch.testing.assert_close(y[y != 0], expected.expand_as(y[y != 0]), rtol=1e-6, atol=0)


def test_targets_give_no_gradient():
    model = tiny()
    inputs = window() | targets()
    inputs["future_slots"].requires_grad_()
    model(**inputs).loss.backward()
    assert inputs["future_slots"].grad is None


def test_equal_shards_of_a_batch_give_the_loss_of_the_whole():
    model = tiny()
    inputs = window(batch=4) | targets(batch=4)
    mask = model.draw_slot_mask(inputs["slots"], torch.Generator().manual_seed(3))
    mask[0] = False
    whole = model(**inputs, slot_mask=mask).loss
    halves = [
        model(**{k: v[part] for k, v in inputs.items()}, slot_mask=mask[part]).loss
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves) / 2, whole)


# ------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("fusion", ["tokens", "concat"])
def test_candidates_of_a_rollout_do_not_influence_each_other(fusion):
    extra = dict(action_embedding_size=8, proprio_embedding_size=8) if fusion == "concat" else {}
    model = tiny(auxiliary_fusion=fusion, **OURS, **extra)
    inputs = window(batch=2, steps=2)
    actions = torch.randn(2, 5, 2 + 3, 10)
    with torch.no_grad():
        together = model.rollout(inputs["slots"], actions=actions, proprio=inputs["proprio"])
        alone = model.rollout(inputs["slots"], actions=actions[:, 3], proprio=inputs["proprio"])
    assert together.slots.shape == (2, 5, 4, 4, 32)
    torch.testing.assert_close(together.slots[:, 3], alone.slots, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.proprio_embeddings[:, 3], alone.proprio_embeddings, atol=1e-5, rtol=1e-5)


def test_the_first_imagined_frame_is_the_prediction_and_each_action_acts_from_its_frame_on():
    model = tiny()
    inputs = window(batch=2, steps=3)
    actions = torch.cat([inputs["actions"], torch.randn(2, 3, 10)], dim=1)
    later = actions.clone()
    later[:, 4] += 1.0  # belongs to the second imagined frame: the third is the first it can change
    with torch.no_grad():
        a = model.rollout(inputs["slots"], actions=actions, proprio=inputs["proprio"]).slots
        b = model.rollout(inputs["slots"], actions=later, proprio=inputs["proprio"]).slots
        torch.testing.assert_close(a[:, :1], model.predict(**inputs))
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert (a[:, 2] - b[:, 2]).abs().max() > 1e-3


def test_longer_predictions_are_cut_to_the_number_of_steps():
    model = tiny(action_size=0, proprio_size=0, prediction_length=4)
    slots = torch.randn(2, 3, 4, 32)
    with torch.no_grad():
        long, short = (model.rollout(slots, num_steps=k).slots for k in (6, 5))
    assert long.shape == (2, 6, 4, 32)
    torch.testing.assert_close(long[:, :5], short)


def test_matching_undoes_a_permutation_of_the_predicted_slots():
    slots = torch.randn(7, 6, 16)
    shuffled = slots[:, [3, 1, 0, 5, 4, 2]] + 0.01 * torch.randn(7, 6, 16)
    torch.testing.assert_close(reorder_slots(shuffled, assign_slots(shuffled, slots)), slots, atol=0.1, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8])
def test_batched_assignment_is_as_cheap_as_scipys(n):
    cost = torch.rand(20, 3, n, n, generator=torch.Generator().manual_seed(n))
    columns = solve_assignment(cost)
    assert (columns.sort(-1).values == torch.arange(n)).all()
    for got, matrix in zip(columns.flatten(0, 1), cost.flatten(0, 1).numpy()):
        rows, best = linear_sum_assignment(matrix)
        np.testing.assert_allclose(matrix[rows, got.numpy()].sum(), matrix[rows, best].sum(), rtol=1e-6)


# ------------------------------------------------------------------------------------- transformers conventions


def test_a_saved_folder_loads_through_the_auto_classes_with_equal_outputs_and_statistics(tmp_path):
    model = tiny(**OURS, num_masked_slots=[0, 2])
    model.set_statistics(action_mean=np.arange(10.0), action_std=np.ones(10))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, CJepaModel) and AutoConfig.from_pretrained(tmp_path).num_masked_slots == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(again.predict(**window()), model.predict(**window()))
    torch.testing.assert_close(again.action_mean, torch.arange(10.0))
    assert again.proprio_mean.isnan().all()


def test_weights_that_lack_tensors_are_refused_or_initialised_and_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny(**OURS)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in ("predictor.mask_token", "predictor.age_embedding", "action_mean"):
        state.pop(key)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for loader in (CJepaModel, AutoModel):
        with pytest.raises(OSError, match=r"lack 3 tensors.*action_mean first"):
            loader.from_pretrained(tmp_path)
    again, report = CJepaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == 3
    assert again.predictor.mask_token.abs().max() < 0.05
    assert (again.predictor.age_embedding == 0).all() and again.action_mean.isnan().all()


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for loader in (CJepaModel, AutoModel):
        with pytest.raises(OSError, match="safetensors"):
            loader.from_pretrained(tmp_path)


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs = window() | targets()
    grads = []
    for checkpointing in (False, True):
        model = tiny(hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, slot_mask=torch.tensor([[False, True, False, False]] * 3)).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("flags", [{}, OURS])
def test_it_compiles_without_graph_breaks_in_training_and_inference(flags, dynamic):
    torch._dynamo.reset()
    model = tiny(**flags)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**window()).predicted_slots, model(**window()).predicted_slots)
    model.train()
    assert torch.isfinite(compiled(**window(), **targets()).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_attention_of_any_size_is_that_of_the_eager_implementation(scale):
    """Small scores take a path of their own, large ones would overflow on it."""
    model, inputs = tiny(), window()
    inputs["slots"] = inputs["slots"] * scale
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model.predict(**inputs))
        assert results[-1].isfinite().all()
    results.append(model.predict(**inputs).detach())  # with gradients
    torch.testing.assert_close(*results[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*results[1:], rtol=1e-4, atol=1e-4)


def test_autocast_leaves_attention_in_float32():
    query, key, value = torch.randn(3, 8, 6, 8)
    plain = cpu_attention(query, key, value, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cpu_attention(query, key, value, 0.3)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("gradients", [False, True])
def test_heads_are_moved_to_the_front_and_back_exactly(dtype, head_dim, gradients):
    parts = torch.randn(2, 5, 3 * 4 * head_dim).to(dtype).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        heads = _heads_first(parts, 4, head_dim)
        back = _tokens_first(heads[2], 4)
    if gradients:
        (gradient,) = torch.autograd.grad(back.sum(), parts)
        assert gradient.chunk(3, -1)[2].eq(1).all()
    torch.testing.assert_close(heads[1][6, 3], parts[1, 3, (4 + 2) * head_dim :][:head_dim], rtol=0, atol=0)
    expected = parts.unflatten(-1, (3, 4, head_dim)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    torch.testing.assert_close(heads, expected, rtol=0, atol=0)
    torch.testing.assert_close(back, parts.chunk(3, -1)[2], rtol=0, atol=0)


def test_bfloat16_inference_equals_bfloat16_with_gradients():
    model = tiny(**OURS).bfloat16()
    with torch.no_grad():
        fused = model.predict(**window())
    torch.testing.assert_close(fused, model.predict(**window()).detach(), rtol=0.05, atol=0.05)


def test_bfloat16_stays_close_to_float32():
    model = tiny(**OURS)
    inputs = window()
    with torch.no_grad():
        exact = model.predict(**inputs)
        half = model.bfloat16().predict(**inputs)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.02


def test_export_with_code_loads_in_a_process_without_this_package(tmp_path):
    import subprocess
    import sys

    model = tiny(**OURS)
    script = (
        "from cjepa_hf import CJepaConfig, CJepaModel\n"
        "CJepaConfig.register_for_auto_class(); CJepaModel.register_for_auto_class('AutoModel')\n"
        f"m = CJepaModel.from_pretrained({str(tmp_path / 'plain')!r}); m.save_pretrained({str(tmp_path / 'code')!r})\n"
    )
    model.save_pretrained(tmp_path / "plain")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert json.loads((tmp_path / "code" / "config.json").read_text())["auto_map"]["AutoModel"].endswith("CJepaModel")
    script = (
        "import sys, torch\nfrom transformers import AutoModel\n"
        f"m = AutoModel.from_pretrained({str(tmp_path / 'code')!r}, trust_remote_code=True)\n"
        "assert 'cjepa_hf' not in sys.modules\n"
        "print(m.predict(torch.ones(1, 1, 4, 32), actions=torch.ones(1, 1, 10), proprio=torch.ones(1, 1, 4)).sum().item())"
    )
    env = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "PATH": ""}
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env
    ).stdout
    with torch.no_grad():
        ones = dict(slots=torch.ones(1, 1, 4, 32), actions=torch.ones(1, 1, 10), proprio=torch.ones(1, 1, 4))
        np.testing.assert_allclose(float(printed), model.predict(**ones).sum().item(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(slots=torch.randn(3, 4, 4, 32)), "history_length=3"),
        (dict(slots=torch.randn(3, 3, 4, 16)), "last axis 32"),
        (dict(slots=torch.randn(3, 4, 32)), "B, T, N, D"),
        (dict(slots=torch.zeros(3, 3, 4, 32, dtype=torch.long)), "int64"),
        (dict(slots=torch.full((3, 3, 4, 32), float("nan"))), "NaN"),
        (dict(slots=np.zeros((3, 3, 4, 32))), "ndarray"),
        (dict(actions=None), "pass actions"),
        (dict(actions=torch.randn(3, 2, 10)), "3 frames"),
        (dict(proprio=torch.randn(3, 3, 5)), "last axis 4"),
        (dict(slot_mask=torch.ones(3, 3, 4, dtype=torch.bool)), "visible prefix"),
        (dict(slot_mask=torch.zeros(3, 3, 4)), "torch.bool"),
        (dict(slot_mask=torch.zeros(3, 3, 5, dtype=torch.bool)), "(3, 3, 4)"),
        (dict(future_slots=torch.randn(3, 2, 4, 32)), "(3, 1, 4, 32)"),
        (dict(output_attentions=True), "eager"),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    with pytest.raises(ValueError) as error:
        tiny()(**(window() | change))
    assert message in str(error.value)


def test_actions_for_a_model_without_them_are_refused():
    with pytest.raises(ValueError, match="without actions"):
        tiny(action_size=0)(**window())


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(num_slot=4), "num_slots"),
        (dict(hidden_size=64), "derived"),
        (dict(model_type="color-isa"), "color-isa"),
        (dict(slot_size=30), "num_attention_heads"),
        (dict(num_masked_slots=[2, 1]), "low <= high"),
        (dict(num_masked_slots=5), "num_slots=4"),
        (dict(mask_probability=1.5), "mask_probability"),
        (dict(visible_prefix=3), "nothing to hide"),
        (dict(planning_window=4), "planning_window=4 must lie in 1..history_length=3"),
        (dict(action_size=10, action_embedding_size=10), "concat"),
    ],
)
def test_a_wrong_config_names_the_field(config, message):
    with pytest.raises(ValueError, match=message):
        CJepaConfig(**config)


def test_statistics_stay_exact_when_the_model_is_cast(tmp_path):
    model = tiny(**OURS)
    std = np.linspace(0.1, 0.3, len(model.action_std)).astype(np.float32)
    model.set_statistics(action_mean=std, action_std=std)
    model.save_pretrained(tmp_path)
    for cast in (model.bfloat16(), CJepaModel.from_pretrained(tmp_path, dtype=torch.float16)):
        assert cast.dtype != torch.float32
        assert cast.action_std.dtype == torch.float32 and (cast.action_std.numpy() == std).all()


def test_environment_units_need_statistics():
    model = tiny()
    with pytest.raises(ValueError, match="set_statistics"):
        model.denormalize_actions(torch.zeros(1, 10))
    with pytest.raises(ValueError, match="positive"):
        model.set_statistics(action_std=np.zeros(10))
    model.set_statistics(action_mean=np.full(10, 2.0), action_std=np.full(10, 4.0))
    raw = torch.randn(5, 10)
    torch.testing.assert_close(model.denormalize_actions(model.normalize_actions(raw)), raw)
    torch.testing.assert_close(model.normalize_actions(torch.full((1, 10), 6.0)), torch.ones(1, 10))


def test_encoding_pixels_without_an_encoder_says_how_to_get_one():
    with pytest.raises(ValueError, match="slot_encoder"):
        tiny().encode(torch.zeros(1, 1, 3, 64, 64))


def test_the_map_from_released_names_refuses_what_it_does_not_know():
    assert original_key("predictor.to_out.weight") == "predictor.head.weight"
    with pytest.raises(KeyError):
        original_key("predictor.unknown.weight")
