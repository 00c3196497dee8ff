"""DINO-WM: frame-causal prediction over patches or slots, the interface of the other world models, patch encoders."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2WithRegistersConfig, ResNetConfig

from cjepa_hf import (
    CJepaConfig,
    CJepaModel,
    ColorIsaConfig,
    ColorIsaModel,
    DinoWmConfig,
    DinoWmModel,
    PatchEncoderConfig,
    PatchEncoderModel,
)
from cjepa_hf.models.cjepa.modeling_cjepa import eager_attention_forward
from cjepa_hf.models.dino_wm import modeling_dino_wm
from cjepa_hf.models.dino_wm.modeling_dino_wm import DinoWmAttention

N, D = 9, 12
TINY = dict(
    num_slots=N, slot_size=D, num_hidden_layers=2, num_attention_heads=2, head_dim=8, intermediate_size=24,
    action_size=10, proprio_size=4, action_embedding_size=3, proprio_embedding_size=3,
)  # fmt: skip


def tiny(seed=0, **config) -> DinoWmModel:
    torch.manual_seed(seed)
    model = DinoWmModel(DinoWmConfig(**(TINY | config))).eval()
    for parameter in model.parameters():  # nothing at its initial zero: every path must matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def window(batch=2, steps=3, seed=1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"slots": (N, D), "actions": (10,), "proprio": (4,)}
    return {name: torch.randn(batch, steps, *shape, generator=g) for name, shape in shapes.items()}


def targets(batch=2, seed=2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "future_slots": torch.randn(batch, 1, N, D, generator=g),
        "future_proprio": torch.randn(batch, 1, 4, generator=g),
    }


# ------------------------------------------------------------------------------------------------------ predictor


@pytest.mark.parametrize("token_type", ["patches", "slots"])
@pytest.mark.parametrize("name", ["slots", "actions", "proprio"])
@torch.no_grad()
def test_a_later_frame_never_alters_earlier_predictions_and_does_alter_its_own(name, token_type):
    model, inputs = tiny(token_type=token_type), window()
    changed = dict(inputs, **{name: inputs[name].clone()})
    changed[name][:, 1] += 1.0
    a, b = (model(**x).predicted_slots for x in (inputs, changed))
    assert torch.equal(a[:, 0], b[:, 0])
    for frame in (1, 2):
        assert (a[:, frame] - b[:, frame]).abs().max() > 1e-3


@torch.no_grad()
def test_every_token_sees_all_tokens_of_its_own_frame():
    model, inputs = tiny(), window(steps=1)
    changed = dict(inputs, slots=inputs["slots"].clone())
    changed["slots"][:, 0, -1] += 1.0
    difference = (model(**inputs).predicted_slots - model(**changed).predicted_slots).abs().amax(dim=(0, 1, 3))
    assert (difference > 1e-4).all()


@torch.no_grad()
def test_attention_weights_are_frame_causal_and_attention_kernels_agree():
    model = tiny()
    fused = model(**window()).predicted_slots
    model.set_attn_implementation("eager")
    output = model(**window(), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.predicted_slots, fused, atol=1e-5, rtol=1e-5)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    frame = torch.arange(3).repeat_interleave(N)
    later = frame[None, :] > frame[:, None]
    for weights in output.attentions:
        assert (weights[..., later] == 0).all() and (weights[..., ~later] > 0).all()


@pytest.mark.parametrize("residual", [None, "last"])
@torch.no_grad()
def test_the_shortcut_for_the_next_frame_equals_the_full_forward(residual):
    model = tiny(residual_prediction=residual)
    for steps in (1, 2, 3):
        inputs = window(steps=steps)
        full = model(**inputs).predicted_slots[:, -1:]
        torch.testing.assert_close(model.predict(**inputs), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slots_are_a_set_and_patches_are_not():
    inputs, order = window(), torch.randperm(N, generator=torch.Generator().manual_seed(0))
    permuted = dict(inputs, slots=inputs["slots"][:, :, order])
    model = tiny(token_type="slots")
    expected = model.predict(**inputs)[:, :, order]
    torch.testing.assert_close(model.predict(**permuted), expected, atol=1e-5, rtol=1e-5)
    assert model.predict(**dict(inputs, slots=inputs["slots"][:, :, :4])).shape == (2, 1, 4, D)
    model = tiny()
    assert (model.predict(**permuted) - model.predict(**inputs)[:, :, order]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="num_slots=9"):
        model.predict(**dict(inputs, slots=inputs["slots"][:, :, :4]))


@torch.no_grad()
def test_residual_prediction_starts_as_nothing_changes():
    torch.manual_seed(0)
    model = DinoWmModel(DinoWmConfig(**TINY, residual_prediction="last")).eval()
    inputs = window()
    torch.testing.assert_close(model(**inputs).predicted_slots, inputs["slots"])


# --------------------------------------------------------------------------------------------------------- losses


def test_losses_are_teacher_forced_means_over_the_predicted_frames():
    model, inputs, future = tiny(proprio_loss_weight=0.5), window(), targets()
    output = model(**inputs, **future)
    target = torch.cat([inputs["slots"][:, 1:], future["future_slots"]], dim=1)
    error = (output.predicted_slots - target).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(output.future_loss, error[2])
    torch.testing.assert_close(output.history_loss, error[:2].mean())
    torch.testing.assert_close(output.loss, error.mean() + 0.5 * output.proprio_loss)
    # the first frame's loss is that of a model that sees the first frame alone
    alone = model(**{name: value[:, :1] for name, value in inputs.items()}, future_slots=inputs["slots"][:, 1:2])
    torch.testing.assert_close(alone.loss, error[0])
    assert alone.history_loss is None


def test_targets_give_no_gradient():
    model, inputs, future = tiny(), window(steps=1), targets()
    future["future_slots"].requires_grad_()
    model(**inputs, **future).loss.backward()
    assert future["future_slots"].grad is None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("residual", [None, "last"])
def test_losses_fall_in_a_few_steps(residual):
    torch.manual_seed(0)
    model = DinoWmModel(DinoWmConfig(**TINY, residual_prediction=residual)).train()
    inputs = window(batch=8)
    # the world: tokens move with the action
    moved = inputs["slots"][:, :1] + inputs["actions"].cumsum(1)[:, :, None, :1]
    slots = torch.cat([inputs["slots"][:, :1], moved], dim=1)
    batch = dict(inputs, slots=slots[:, :3], future_slots=slots[:, 3:], future_proprio=inputs["proprio"][:, :1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append([output.future_loss.item(), output.history_loss.item(), output.proprio_loss.item()])
    first, last = torch.tensor(losses[0]), torch.tensor(losses[-1])
    assert (last < 0.6 * first).all(), (first, last)


# ------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("steps", [1, 2, 3])
@torch.no_grad()
def test_candidates_of_a_rollout_equal_those_imagined_one_by_one(steps):
    model, inputs = tiny(), window(steps=steps)
    actions = torch.randn(2, 5, steps + 3, 10, generator=torch.Generator().manual_seed(3))
    together = model.rollout(inputs["slots"], actions=actions, proprio=inputs["proprio"])
    assert together.slots.shape == (2, 5, 4, N, D)
    for candidate in range(5):
        alone = model.rollout(inputs["slots"], actions=actions[:, candidate], proprio=inputs["proprio"])
        torch.testing.assert_close(together.slots[:, candidate], alone.slots, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            together.proprio_embeddings[:, candidate], alone.proprio_embeddings, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_a_rollout_feeds_predictions_back_and_a_window_cuts_what_is_seen():
    model, inputs = tiny(), window(steps=3)
    actions = torch.cat([inputs["actions"], torch.randn(2, 1, 10)], dim=1)
    imagined = model.rollout(inputs["slots"], actions=actions, proprio=inputs["proprio"])
    torch.testing.assert_close(imagined.slots[:, :1], model.predict(**inputs))
    one = model.rollout(inputs["slots"], actions=actions, proprio=inputs["proprio"], window_length=1)
    last = {name: value[:, -1:] for name, value in inputs.items()}
    torch.testing.assert_close(one.slots[:, :1], model.predict(**last))
    assert (one.slots - imagined.slots).abs().max() > 1e-2
    # the second imagined frame depends on the first one's own proprioception and on the action given for it
    other = actions.clone()
    other[:, 3] += 1.0
    changed = model.rollout(inputs["slots"], actions=other, proprio=inputs["proprio"]).slots
    assert torch.equal(changed[:, 0], imagined.slots[:, 0])
    assert (changed[:, 1] - imagined.slots[:, 1]).abs().max() > 1e-3


def test_slots_are_matched_unless_they_are_patches():
    assert tiny().slots_keep_roles and not tiny(token_type="slots").slots_keep_roles
    encoder = ColorIsaConfig(image_size=16)
    assert DinoWmModel(DinoWmConfig(**TINY, token_type="slots", slot_encoder_config=encoder)).slots_keep_roles


# ------------------------------------------------------------------------------------ transformers conventions


def test_a_saved_folder_loads_through_the_auto_classes_with_equal_outputs_and_statistics(tmp_path):
    torch.manual_seed(0)
    backbone = Dinov2Config(hidden_size=D, num_hidden_layers=1, num_attention_heads=2, image_size=21, patch_size=7)
    encoder = PatchEncoderConfig(backbone_config=backbone, image_size=21)
    model = DinoWmModel(DinoWmConfig(**TINY, slot_encoder_config=encoder)).eval()
    model.set_statistics(action_mean=torch.arange(10.0), action_std=torch.ones(10))
    model.slot_encoder.set_feature_statistics(torch.rand(5, 3, 21, 21))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, DinoWmModel)
    loaded, saved = (c.to_dict() | {"_name_or_path": ""} for c in (AutoConfig.from_pretrained(tmp_path), model.config))
    assert loaded == saved
    pixels = torch.rand(2, 3, 3, 21, 21)
    with torch.no_grad():
        assert model.encode(pixels).shape == (2, 3, N, D)
        torch.testing.assert_close(again.encode(pixels), model.encode(pixels))
        torch.testing.assert_close(again.predict(**window()), model.predict(**window()))
    torch.testing.assert_close(again.action_mean, torch.arange(10.0))
    assert again.proprio_mean.isnan().all()


def test_parameters_missing_from_a_checkpoint_are_initialised_not_left_as_memory(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny(residual_prediction="last").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in ("predictor.position_embedding", "predictor.head.weight", "action_mean"):
        state.pop(key)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, _ = DinoWmModel.from_pretrained(tmp_path, output_loading_info=True)
    assert 0.5 < again.predictor.position_embedding.std() < 1.5
    assert (again.predictor.head.weight == 0).all() and again.action_mean.isnan().all()


@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_the_statistics_exact():
    model = tiny()
    exact = model.predict(**window())
    model.set_statistics(action_mean=torch.full((10,), 0.1234567), action_std=torch.ones(10))
    half = model.to(torch.bfloat16)
    predicted = half.predict(**window())
    assert predicted.dtype == torch.bfloat16 and half.action_mean.dtype == torch.float32
    assert (predicted.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_on_a_cpu_attention_is_in_float32_also_under_autocast(monkeypatch):
    seen = []

    def noting(module, query, key, value, mask, **options):
        seen.append({query.dtype, key.dtype, value.dtype, mask.dtype})
        weights = torch.matmul(query, key.transpose(2, 3))
        seen.append({weights.dtype})  # of a product, which autocast would turn into bfloat16
        return eager_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(modeling_dino_wm, "eager_attention_forward", noting)
    model = tiny()
    model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**window(), **targets())
    assert len(seen) == 2 * model.config.num_hidden_layers and all(types == {torch.float32} for types in seen)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_losses_and_gradients_under_autocast_stay_close(implementation):
    model = tiny()
    model.set_attn_implementation(implementation)
    exact = model(**window(), **targets()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**window(), **targets()).loss
    loss.backward()
    assert abs(loss.item() / exact.item() - 1) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_forward_and_rollout_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    model, inputs = tiny(), window()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    loss = model(**inputs, **targets()).loss
    torch.testing.assert_close(compiled(**inputs, **targets()).loss, loss)
    actions = torch.randn(2, 4, 3, 10)
    rollout = torch.compile(model.rollout, fullgraph=True, backend="eager", dynamic=dynamic)
    arguments = dict(actions=actions, proprio=inputs["proprio"][:, :1])
    torch.testing.assert_close(
        rollout(inputs["slots"][:, :1], **arguments).slots, model.rollout(inputs["slots"][:, :1], **arguments).slots
    )


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(hidden_dropout=0, attention_dropout=0).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**window(), **targets()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_interface_is_that_of_the_masked_predictor():
    sizes = dict(num_slots=N, slot_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    other = CJepaModel(CJepaConfig(**sizes, action_size=10, proprio_size=4)).eval()
    model = DinoWmModel(DinoWmConfig(**TINY | sizes)).eval()
    slots, actions, proprio = torch.randn(2, 1, N, 16), torch.randn(2, 3, 5, 10), torch.randn(2, 1, 4)
    with torch.no_grad():
        for name in ("slots", "proprio_embeddings"):
            a, b = (getattr(m.rollout(slots, actions=actions, proprio=proprio), name) for m in (other, model))
            assert a.shape[:3] == b.shape[:3] == (2, 3, 5)
    used = {"history_length", "prediction_length", "frame_skip", "num_slots", "slot_size", "hidden_size"}
    used |= {"num_auxiliary_tokens", "intermediate_size", "num_attention_heads", "slot_encoder_config"}
    assert all(hasattr(m.config, name) for name in used for m in (other, model))


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_slot=3), "Did you mean 'num_slots'"),
        (dict(hidden_size=3), "set slot_size"),
        (dict(prediction_length=2), "must be 1"),
        (dict(head_dim=0), "head_dim=0"),
        (dict(model_type="cjepa"), "expected 'dino-wm'"),
        (dict(slot_encoder_config={"image_size": 3}), "no model_type"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        DinoWmConfig(**fields)


def test_wrong_inputs_say_what_is_wrong():
    model, inputs = tiny(), window()
    with pytest.raises(ValueError, match="hides nothing"):
        model(**inputs, slot_mask=torch.zeros(2, 3, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="future_slots has shape"):
        model(**inputs, future_slots=torch.zeros(2, 2, N, D))
    with pytest.raises(ValueError, match="pass proprio"):
        model(inputs["slots"], actions=inputs["actions"])
    with pytest.raises(ValueError, match="history_length=3"):
        model(**window(steps=4))


# -------------------------------------------------------------------------------------------------- patch encoder

BACKBONES = {
    "dinov2": (
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7),
        16,
    ),
    "registers": (
        Dinov2WithRegistersConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            num_register_tokens=3,
        ),
        16,
    ),
    "resnet": (ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]), 16),
}


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_tokens_are_the_patches_of_any_backbone_row_by_row(name):
    torch.manual_seed(0)
    config, tokens = BACKBONES[name]
    grid = {"grid_size": 4} if name == "resnet" else {}
    size = 32 if name == "resnet" else 28
    encoder = PatchEncoderModel(PatchEncoderConfig(backbone_config=config, image_size=size, **grid)).eval()
    pixels = torch.rand(2, 3, 3, size, size)
    slots = encoder(pixels).slots
    assert slots.shape == (2, 3, tokens, 8) == (2, 3, encoder.config.num_slots, encoder.config.slot_size)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = encoder.backbone((pixels[1, 2:] - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(slots[1, 2], features[0, -tokens:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(pixels, chunk_size=4).slots, slots, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(pixels[:, 0]).slots, slots[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merging_keeps_where_in_its_cell_something_is():
    torch.manual_seed(0)
    encoder = PatchEncoderModel.from_backbone(ColorIsaModel(ColorIsaConfig(image_size=32)), grid_size=4, merge=2)
    pixels = torch.rand(2, 3, 32, 32)
    slots = encoder(pixels).slots
    assert slots.shape == (2, 16, 36 * 4)
    grid = encoder.backbone.grid_features(pixels)  # [2, 36, 16, 16]: cells of 4 x 4, parts of 2 x 2
    row, column, part_row, part_column = 2, 1, 1, 0
    y, x = 4 * row + 2 * part_row, 4 * column + 2 * part_column
    expected = grid[:, :, y : y + 2, x : x + 2].mean(dim=(2, 3))
    part = slots[:, 4 * row + column].unflatten(-1, (36, 4))[..., 2 * part_row + part_column]
    torch.testing.assert_close(part, expected)
    torch.testing.assert_close(grid[:, 32:].sum(dim=1), torch.ones(2, 16, 16))  # attention masks share every place


@torch.no_grad()
def test_feature_statistics_standardize_the_tokens():
    torch.manual_seed(0)
    encoder = PatchEncoderModel.from_backbone(ColorIsaModel(ColorIsaConfig(image_size=16)), grid_size=4)
    frames = torch.rand(20, 3, 16, 16)
    encoder.set_feature_statistics(frames)
    slots = encoder(frames).slots.flatten(0, 1)
    std = slots.std(dim=0)
    assert slots.mean(dim=0).abs().max() < 1e-3 and std.max() < 1.01 and (std > 0.9).float().mean() > 0.5
    with pytest.raises(ValueError, match="do not vary"):
        PatchEncoderModel.from_backbone(encoder.backbone, grid_size=1).set_feature_statistics(frames[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(grid_sise=3), "Did you mean 'grid_size'"),
        (dict(image_size=30), "multiple of the backbone's patch_size=7"),
        (dict(grid_size=3), "must divide the backbone's grid of 4 x 4"),
        (dict(merge=3), "must divide"),
    ],
)
def test_wrong_encoder_configurations_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        PatchEncoderConfig(**(dict(backbone_config=BACKBONES["dinov2"][0], image_size=28) | fields))


def test_an_encoder_of_another_size_is_refused():
    encoder = PatchEncoderModel(PatchEncoderConfig(backbone_config=BACKBONES["dinov2"][0], image_size=28))
    with pytest.raises(ValueError, match=r"size=28"):
        encoder(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no slot encoder"):
        PatchEncoderModel.from_backbone(tiny())


def test_attention_takes_heads_of_any_width():
    attention = DinoWmAttention(DinoWmConfig(**TINY | dict(num_attention_heads=3, head_dim=5)))
    assert attention(torch.zeros(2, N, 18), None)[0].shape == (2, N, 18)
