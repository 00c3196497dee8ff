"""The released files become models and slot datasets that compute what they computed, or are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import cjepa_hf.models.aloe
from cjepa_hf import CJepaConfig, CJepaModel, convert_original_checkpoint, convert_original_slots
from cjepa_hf.cli import main
from cjepa_hf.data.slots import load_slot_dataset
from cjepa_hf.hub.convert import ConversionError
from cjepa_hf.models.savi import SaviConfig, SaviModel
from cjepa_hf.models.videosaur import VideoSaurConfig, VideoSaurModel
from cjepa_hf.planning import SlotGoalCost

DATA = Path(__file__).parents[1] / "data"
# the look-alike CLEVRER predictor
CLEVRER = dict(num_slots=7, slot_size=32, history_length=6, prediction_length=10, num_masked_slots=4, frame_skip=2)
CLEVRER |= dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=16)
DINOV2 = dict(hidden_size=12, num_hidden_layers=12, num_attention_heads=3, image_size=70, patch_size=14)
TOLERANCE = dict(atol=1e-5, rtol=1e-5)
VIDEOSAUR = dict(num_slots=4, slot_size=16, image_size=42, backbone_config=DINOV2, renderer_size=16)
SAVI = dict(num_slots=4, slot_size=16, slot_mlp_size=32, encoder_channels=(8,) * 4, decoder_channels=(8,) * 4)


@pytest.fixture
def clevrer(tmp_path):
    path = tmp_path / "clevrer_savi_2_epoch_30_object.ckpt"
    path.write_bytes(np.load(DATA / "original_cjepa.npz")["clevrer"].tobytes())
    return path


@pytest.fixture
def push_t(tmp_path):
    path = tmp_path / "pusht_videosaur_1_epoch_30_object.ckpt"
    path.write_bytes(np.load(DATA / "original_cjepa.npz")["push_t"].tobytes())
    return path


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def weights(name):
    with safe_open(DATA / name, "pt") as file:
        keys = [key for key in file.keys() if key.startswith("weights.")]  # noqa: SIM118
        return {key.removeprefix("weights."): file.get_tensor(key).float() for key in keys}


def test_a_clevrer_predictor_keeps_every_tensor(clevrer, tmp_path):
    model = reloaded(convert_original_checkpoint(clevrer, CJepaConfig(**CLEVRER)), tmp_path / "model")
    original = torch.load(clevrer, weights_only=True)
    state = model.state_dict()
    assert len(state) == len(original) and not model.training
    predictor = model.predictor
    assert torch.equal(predictor.time_embedding, original["time_pos_embed"][0, :, 0])
    assert torch.equal(predictor.mask_token, original["mask_token"].flatten())
    for i in range(2):
        ours, theirs = f"predictor.layers.{i}", f"transformer.layers.{i}"
        assert torch.equal(state[f"{ours}.attention.qkv.weight"], original[f"{theirs}.0.in_proj_weight"])
        assert torch.equal(state[f"{ours}.attention.out_proj.bias"], original[f"{theirs}.0.out_proj.bias"])
        for name, index in (("norm", 0), ("fc1", 1), ("fc2", 4)):
            assert torch.equal(state[f"{ours}.mlp.{name}.weight"], original[f"{theirs}.1.{index}.weight"])
    assert torch.equal(predictor.head.weight, original["to_out.weight"])
    assert torch.equal(predictor.anchor_projection.bias, original["id_projector.bias"])


@pytest.mark.parametrize("format", ["old format", "wrapped", "data parallel", "half"])
def test_the_same_predictor_in_another_wrapping(clevrer, tmp_path, format):
    state = torch.load(clevrer, weights_only=True)
    expected = convert_original_checkpoint(clevrer, CJepaConfig(**CLEVRER))
    path = tmp_path / "other.pt"
    if format == "old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif format == "wrapped":
        torch.save({"state_dict": state, "epoch": 30}, path)
    elif format == "data parallel":
        torch.save({f"module.{key}": tensor for key, tensor in state.items()}, path)
    else:
        torch.save({key: tensor.half() for key, tensor in state.items()}, path)
    model = convert_original_checkpoint(path, CJepaConfig(**CLEVRER))
    tolerance = 1e-3 if format == "half" else 0
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("given", ["object", "dictionary", "file", "folder"])
def test_the_configuration_may_be_given_in_any_form(clevrer, tmp_path, given):
    config = CJepaConfig(**CLEVRER)
    config.save_pretrained(tmp_path / "folder")
    forms = {"object": config, "dictionary": config.to_dict(), "folder": str(tmp_path / "folder")}
    forms["file"] = tmp_path / "folder" / "config.json"
    model = convert_original_checkpoint(clevrer, forms[given])
    assert model.config.num_masked_slots == 4 and model.config.history_length == 6


def test_a_pickled_world_model_says_itself_what_it_is(push_t, tmp_path):
    statistics = {"action_mean": [0.5] * 10, "action_std": [2.0] * 10}
    model = convert_original_checkpoint(push_t, statistics=statistics)
    model = reloaded(model, tmp_path / "model")
    config = model.config
    assert (config.num_slots, config.slot_size, config.num_attention_heads) == (4, 32, 16)
    assert (config.history_length, config.prediction_length, config.frame_skip) == (3, 1, 5)
    assert (config.action_size, config.proprio_size, config.auxiliary_fusion) == (10, 4, "tokens")
    assert config.num_masked_slots == 1 and model.action_std.tolist() == [2.0] * 10 and model.proprio_std.isnan().all()
    expected = load_file(DATA / "original_world_model.safetensors")
    found = released(
        {key: t for key, t in model.state_dict().items() if key.startswith(("predictor", "action_e", "proprio_e"))}
    )
    assert set(found) == set(expected) and all(
        torch.equal(found[key], expected[key].view_as(found[key])) for key in found
    )
    encoder = model.slot_encoder
    assert isinstance(encoder, VideoSaurModel) and encoder.config.num_slots == 4 and encoder.decoder is None
    assert encoder.config.first_frame_iterations == 3 and encoder.config.image_size == 196
    with torch.no_grad():
        rollout = model.rollout(torch.zeros(1, 1, 4, 32), actions=torch.zeros(1, 3, 10), proprio=torch.zeros(1, 1, 4))
        assert model.encode(torch.zeros(1, 1, 3, 196, 196)).shape == (1, 1, 4, 32)
    assert torch.isfinite(rollout.slots).all()


def test_a_world_model_without_its_encoder(push_t):
    given = convert_original_checkpoint(push_t).config.to_dict() | {"slot_encoder_config": None}
    model = convert_original_checkpoint(push_t, given)
    assert model.slot_encoder is None and model.config.num_slots == 4


@pytest.mark.parametrize("field", ["num_attention_heads", "num_slots", "num_masked_slots", "intermediate_size"])
def test_a_configuration_that_contradicts_the_file_is_refused(push_t, field):
    given = convert_original_checkpoint(push_t).config.to_dict()
    given[field] = {"num_attention_heads": 8, "num_masked_slots": 2}.get(field, given[field] + 1)
    with pytest.raises(ConversionError, match=f"{push_t.name}.*{field}"):
        convert_original_checkpoint(push_t, given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"history_length": 5}, "frames"),
        ({"action_size": 10}, "action_size"),
        ({"norm_first": True}, "norm_first"),
        ({"residual_prediction": "last"}, "residual_prediction"),
        ({"anchor": "last_visible"}, "anchor"),
        ({"slot_encoder_config": {"model_type": "videosaur"}}, "no encoder"),
    ],
)
def test_a_predictor_under_the_wrong_configuration_is_refused(clevrer, change, message):
    with pytest.raises(ConversionError, match=message):
        convert_original_checkpoint(clevrer, CJepaConfig(**(CLEVRER | change)))


def test_what_tensors_do_not_say_has_to_be_given(clevrer):
    with pytest.raises(ConversionError, match=r"num_attention_heads, num_slots.*hub_configs/.*cjepa-clevrer"):
        convert_original_checkpoint(clevrer)
    with pytest.raises(ConversionError, match=r"'cjepa'.*'videosaur'"):
        convert_original_checkpoint(clevrer, VideoSaurConfig())


@pytest.mark.parametrize("change", ["missing", "unused", "shape", "nan", "object"])
def test_a_file_that_is_not_whole_is_refused(clevrer, tmp_path, change):
    state = torch.load(clevrer, weights_only=True)
    if change == "missing":
        del state["to_out.bias"]
    elif change == "unused":
        state["to_in.bias"] = torch.zeros(3)
    elif change == "shape":
        state["to_out.bias"] = torch.zeros(31)
    elif change == "nan":
        state["to_out.bias"][3] = torch.nan
    else:
        state["to_out.bias"] = [0.0]
    torch.save(state, tmp_path / "changed.ckpt")
    with pytest.raises(ConversionError, match="head.bias" if change == "missing" else "to_(out|in).bias"):
        convert_original_checkpoint(tmp_path / "changed.ckpt", CJepaConfig(**CLEVRER))


def released(state):
    """Tensors of our world model under the names, and in the shapes, of the released code's."""
    names = {"time_embedding": "time_pos_embed", "anchor_projection": "id_projector", "head": "to_out"}
    names |= {"attention.qkv.": "0.in_proj_", "attention.out_proj": "0.out_proj", "mlp.norm": "1.0", "mlp.fc1": "1.1"}
    names |= {"mlp.fc2": "1.4", "predictor.norm": "predictor.transformer.norm", ".layers.": ".transformer.layers."}
    names |= {"_embedding.": "_encoder.patch_embed."}
    result = {}
    for key, tensor in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key.endswith("patch_embed.weight"):
            tensor = tensor[..., None]
        result[f"model.{key}"] = tensor[None, :, None] if key.endswith("time_pos_embed") else tensor
    return result


@pytest.mark.parametrize("fusion", ["tokens", "concat"])
@pytest.mark.parametrize("observed", ["nobs1", "nobs3"])
def test_a_world_model_imagines_and_costs_what_was_recorded(tmp_path, fusion, observed):
    data = load_file(DATA / f"planning_{fusion}.safetensors")
    state = {key.removeprefix("weights."): t.float() for key, t in data.items() if key.startswith("weights.")}
    torch.save(released(state), tmp_path / "world.ckpt")
    sizes = dict(num_hidden_layers=2, intermediate_size=64, action_size=10, proprio_size=4, auxiliary_fusion=fusion)
    if fusion == "tokens":
        sizes |= dict(slot_size=32, num_attention_heads=16)
    else:
        sizes |= dict(slot_size=24, num_attention_heads=4, action_embedding_size=4, proprio_embedding_size=4)
    model = reloaded(convert_original_checkpoint(tmp_path / "world.ckpt", CJepaConfig(**sizes)), tmp_path / "model")
    want = {key.removeprefix(f"{observed}."): tensor for key, tensor in data.items()}
    with torch.no_grad():
        imagined = model.rollout(
            want["pixels"], actions=want["action_candidates"], proprio=want["proprio"], match_slots=True
        )
        goal = want["goal"][:, -1], model.embed_proprio(want["goal_proprio"][:, -1])
        cost = SlotGoalCost()(imagined.slots, imagined.proprio_embeddings, *goal)
    torch.testing.assert_close(imagined.slots, want["slots"], **TOLERANCE)
    torch.testing.assert_close(cost, want["cost"], **TOLERANCE)
    other = dict(num_hidden_layers=2, intermediate_size=64, action_size=10, proprio_size=4, num_attention_heads=4)
    other |= dict(slot_size=24, auxiliary_fusion="tokens" if fusion == "concat" else "concat")
    with pytest.raises(ConversionError, match="auxiliary_fusion"):
        convert_original_checkpoint(tmp_path / "world.ckpt", CJepaConfig(**other))


def test_a_clevrer_predictor_computes_the_recorded_frames(tmp_path):
    data = load_file(DATA / "cjepa_clevrer.safetensors")
    torch.save(weights("cjepa_clevrer.safetensors"), tmp_path / "predictor.ckpt")
    config = CJepaConfig(**(CLEVRER | dict(num_masked_slots=2, intermediate_size=64)))
    model = reloaded(convert_original_checkpoint(tmp_path / "predictor.ckpt", config), tmp_path / "model")
    with torch.no_grad():
        future = model.predict(data["inputs.slots"])
    torch.testing.assert_close(future, data["outputs.mask2.inference"], atol=5e-5, rtol=1e-4)


def test_videosaur_computes_the_recorded_slots(tmp_path):
    data = load_file(DATA / "original_videosaur.safetensors")
    torch.save({"state_dict": weights("original_videosaur.safetensors"), "epoch": 1}, tmp_path / "v.ckpt")
    model = convert_original_checkpoint(tmp_path / "v.ckpt", VideoSaurConfig(**VIDEOSAUR))
    model = reloaded(model, tmp_path / "model")
    with torch.no_grad():
        start = model.initializer(1, data["inputs.noise"])
        slots = model(data["inputs.video"], initial_slots=start).slots
    torch.testing.assert_close(slots, data["outputs.state"], atol=2e-5, rtol=1e-4)
    with pytest.raises(ConversionError, match="before_norm"):
        convert_original_checkpoint(tmp_path / "v.ckpt", VideoSaurConfig(**VIDEOSAUR, backbone_features="before_norm"))
    with pytest.raises(ConversionError, match="videosaur-pusht"):
        convert_original_checkpoint(tmp_path / "v.ckpt")


def test_videosaur_without_its_decoder(tmp_path):
    """Slots need none; what needs it says so; nothing is made up where the file holds none."""
    data, state = load_file(DATA / "original_videosaur.safetensors"), weights("original_videosaur.safetensors")
    config = VideoSaurConfig(**VIDEOSAUR, use_decoder=False)
    without = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.")}
    for name, tensors in (("whole", state), ("part", without)):
        torch.save({"state_dict": tensors}, tmp_path / f"{name}.ckpt")
        model = reloaded(convert_original_checkpoint(tmp_path / f"{name}.ckpt", config), tmp_path / name)
        assert not [key for key in model.state_dict() if key.startswith("decoder")]
        with torch.no_grad():
            slots = model(data["inputs.video"], initial_slots=model.initializer(1, data["inputs.noise"])).slots
        torch.testing.assert_close(slots, data["outputs.state"], atol=2e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="use_decoder"):
            model.decode(slots)
        with pytest.raises(ValueError, match="use_decoder"):
            model(data["inputs.video"], return_loss=True)
    with pytest.raises(ConversionError, match="use_decoder=True"):
        convert_original_checkpoint(tmp_path / "part.ckpt", VideoSaurConfig(**VIDEOSAUR))


def test_upstream_videosaur_with_timm_names_becomes_the_same_backbone(tmp_path):
    state, upstream = weights("original_videosaur.safetensors"), {}
    prefix, target = "encoder.module.backbone.", "encoder.module.backbone.model."
    for key, tensor in state.items():
        if not key.startswith(prefix):
            upstream[key] = tensor
            continue
        key = key.removeprefix(prefix)
        if key.startswith("layernorm") or key == "embeddings.mask_token" or ".attention.attention." in key:
            continue
        for ours, theirs in (
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("encoder.layer", "blocks"),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ):
            key = key.replace(ours, theirs)
        upstream[target + key] = tensor
    for i in range(12):
        for kind in ("weight", "bias"):
            parts = [
                state[f"{prefix}encoder.layer.{i}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")
            ]
            upstream[f"{target}blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    config = VideoSaurConfig(**(VIDEOSAUR | {"image_size": 70}), backbone_features="before_norm")
    # the position table of the decoder follows the size of the frames
    upstream["decoder.module.pos_emb"] = torch.zeros(1, 25, 16)
    for kind in ("weight", "bias"):
        name = f"decoder.module.output_transform.{kind}"
        upstream[name] = torch.cat([upstream[name][:12], torch.zeros(25, *upstream[name].shape[1:])])
    torch.save({"state_dict": upstream}, tmp_path / "u.ckpt")
    model = convert_original_checkpoint(tmp_path / "u.ckpt", config)
    torch.save({"state_dict": state}, tmp_path / "v.ckpt")
    fork = convert_original_checkpoint(tmp_path / "v.ckpt", VideoSaurConfig(**VIDEOSAUR))
    for name, tensor in fork.state_dict().items():
        if not name.startswith(("decoder.", "backbone.layernorm", "backbone.embeddings.mask_token")):
            assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(ConversionError, match="position embedding"):
        convert_original_checkpoint(tmp_path / "u.ckpt", VideoSaurConfig(**VIDEOSAUR, backbone_features="before_norm"))


def test_savi_computes_the_recorded_slots(tmp_path, monkeypatch):
    data = load_file(DATA / "savi_video.safetensors")
    # dead weights and computed grids, which stand in every file
    dead = {"prior_slot_layer.0.weight": torch.ones(16, 16), "encoder_pos_embedding.grid": torch.zeros(1, 64, 64, 4)}
    torch.save({"state_dict": weights("savi_video.safetensors") | dead, "it": 3}, tmp_path / "s.pth")
    model = reloaded(convert_original_checkpoint(tmp_path / "s.pth", SaviConfig(**SAVI)), tmp_path / "model")
    noise = iter(data["inputs.noise"].unbind(1))
    monkeypatch.setattr(SaviModel, "_noise", staticmethod(lambda *_: next(noise)))
    with torch.no_grad():
        slots = model(data["inputs.img"]).slots
    torch.testing.assert_close(slots, data["outputs.post_slots"], atol=5e-5, rtol=1e-3)
    with pytest.raises(ConversionError, match="init_latents"):
        convert_original_checkpoint(tmp_path / "s.pth", SaviConfig(**(SAVI | {"num_slots": 5})))
    with pytest.raises(ConversionError, match="grid"):
        convert_original_checkpoint(tmp_path / "s.pth", SaviConfig(**(SAVI | {"image_size": 32})))


def test_aloe_computes_the_recorded_logits_and_its_constants_are_checked(tmp_path):
    config = cjepa_hf.AloeConfig(
        num_slots=7, slot_size=64, num_frames=25, hidden_size=72, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, answer_hidden_size=64,
    )  # fmt: skip
    state = {
        f"transformer_model.{k.removeprefix('transformer_model.')}": v for k, v in weights("aloe.safetensors").items()
    }
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    model = reloaded(convert_original_checkpoint(tmp_path / "a.pth", config), tmp_path / "model")
    total = sum(tensor.numel() for key, tensor in state.items() if not key.endswith("_token"))
    assert sum(p.numel() for p in model.parameters()) == total
    key = "transformer_model.transformer_encoder.layers.2.self_attn.in_proj_weight"
    assert torch.equal(model.layers[2].attention.qkv.weight, state[key])
    assert torch.equal(model.option_head.fc2.weight, state["transformer_model.mc_answer_mlp.2.weight"])
    data, rows = load_file(DATA / "aloe.safetensors"), torch.tensor([1, 4, 5, 6])  # a description, three options
    ids, padding = (
        torch.cat([data[f"inputs.{kind}_{name}"] for kind in ("cls", "mc")])[rows]
        for name in ("q_tokens", "q_pad_mask")
    )
    slots = torch.cat([data["inputs.cls_video_emb"], data["inputs.mc_video_emb"]]).float()
    with torch.no_grad():
        output = model(
            slots, ids.long(), ~padding, is_option=torch.tensor([False, True, True, True]),
            video_index=torch.tensor([0, 1, 1, 1]),
        )  # fmt: skip
    torch.testing.assert_close(output.answer_logits[:1], data["outputs.cls_answer_logits"][1:2], **TOLERANCE)
    torch.testing.assert_close(output.option_logits[1:], data["outputs.mc_answer_logits"][:3], **TOLERANCE)
    state["transformer_model.cls_token"] = torch.tensor([1.0, 1.0])
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="cls_token"):
        convert_original_checkpoint(tmp_path / "a.pth", config)


def test_malicious_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = np.load(DATA / "original_malicious.npz")
    for name in samples.files:
        (tmp_path / name).write_bytes(samples[name].tobytes())
        for convert in (convert_original_checkpoint, convert_original_slots):
            with pytest.raises(ConversionError, match=name):
                convert(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(samples.files)


# --------------------------------------------------------------------------------------------------------------------
# Slots


def slots_of(lengths, seed=0, width=(3, 8)):
    rng = np.random.default_rng(seed)
    return {f"{i}_pixels.mp4": rng.standard_normal((n, *width)).astype(np.float32) for i, n in lengths.items()}


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_slots_actions_and_states_become_a_slot_dataset(tmp_path, protocol):
    slots = {"train": slots_of({0: 6, 1: 300}), "val": slots_of({10: 5}, 1), "test": slots_of({20: 4}, 2)}
    actions = {"train": slots_of({0: 6, 1: 300, 2: 7}, 3, (2,)), "val": slots_of({10: 5}, 4, (2,))}
    actions["train"]["0_pixels.mp4"][-1] = np.nan
    states = {"train": slots_of({0: 6, 1: 300}, 5, (7,)), "val": slots_of({10: 5}, 6, (7,))}
    paths = [write(tmp_path / f"{n}.pkl", v, protocol) for n, v in (("slots", slots), ("a", actions), ("s", states))]
    with pytest.warns(UserWarning, match="lacks 1 videos"):
        folder = convert_original_slots(paths[0], actions=paths[1], states=paths[2])
    assert folder == tmp_path / "slots"
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        dataset = load_slot_dataset(folder, ours, cache_dir=str(tmp_path / "cache"))
        assert len(dataset) == len(slots[theirs]) and dataset.frame_skip == 5
        for row in dataset.data.with_format("numpy"):
            name = row["episode_id"]
            np.testing.assert_array_equal(row["slots"], slots[theirs][name])
            known = actions.get(theirs, {}).get(name, np.full((len(row["slots"]), 2), np.nan))
            np.testing.assert_array_equal(row["actions"], known)
    frames = np.concatenate([actions["train"]["0_pixels.mp4"], actions["train"]["1_pixels.mp4"]])
    metadata = json.loads((folder / "slot_dataset.json").read_text())
    np.testing.assert_allclose(metadata["statistics"]["action_mean"], np.nanmean(frames, 0), rtol=1e-4, atol=1e-6)
    assert np.isfinite(metadata["statistics"]["action_std"]).all()
    assert metadata["source"] == {"slots": "slots.pkl", "actions": "a.pkl", "state": "s.pkl"}


def test_slots_that_do_not_fit_are_refused(tmp_path):
    slots = {"train": slots_of({0: 6})}
    good = write(tmp_path / "slots.pkl", slots)
    cases = {
        "frames": dict(path=good, actions=write(tmp_path / "a.pkl", {"train": slots_of({0: 5}, width=(2,))})),
        "is empty": dict(path=write(tmp_path / "z.pkl", {"train": {"x": np.zeros((10**9, 0, 4), np.float32)}})),
        "share arrays": dict(
            path=write(
                tmp_path / "y.pkl", {"train": dict.fromkeys(map(str, range(50)), np.zeros((9, 3, 4), np.float32))}
            )
        ),
        "none of the videos": dict(
            path=good, states=write(tmp_path / "s.pkl", {"train": slots_of({9: 6}, width=(7,))})
        ),
        "axes": dict(path=write(tmp_path / "b.pkl", {"train": slots_of({0: 5}, width=(2,))})),
        "finite": dict(path=write(tmp_path / "c.pkl", {"train": {"x": np.full((2, 3, 4), np.nan, np.float32)}})),
        r"expected \[4, 8\]": dict(path=good, shape=(4, 8)),
        "no video": dict(path=write(tmp_path / "d.pkl", {"train": {}})),
        "by split": dict(path=write(tmp_path / "e.pkl", {"weights": 1})),
        "columns": dict(
            path=good,
            actions=write(
                tmp_path / "f.pkl", {"train": slots_of({0: 6}, width=(2,)), "val": slots_of({1: 6}, width=(3,))}
            ),
        ),
    }
    for number, (message, arguments) in enumerate(cases.items()):
        with pytest.raises(ConversionError, match=message):
            convert_original_slots(**arguments, output_dir=tmp_path / f"out{number}")


def test_an_interrupted_conversion_goes_on(tmp_path):
    slots = {"train": slots_of({0: 6, 1: 6, 2: 6})}
    slots["train"]["2_pixels.mp4"] = np.full((2, 3, 8), np.inf, np.float32)
    path = write(tmp_path / "slots.pkl", slots)
    with pytest.raises(ConversionError, match="2_pixels"):
        convert_original_slots(path, frames_per_file=6)
    slots["train"] |= slots_of({2: 6}, 9)
    write(path, slots)
    folder = convert_original_slots(path, frames_per_file=6)
    dataset = load_slot_dataset(folder, cache_dir=str(tmp_path / "cache"))
    assert [dataset.episode_id(i) for i in range(3)] == [f"{i}_pixels.mp4" for i in range(3)]


# --------------------------------------------------------------------------------------------------------------------
# Command line


def test_the_command_converts_checkpoints_and_slots(push_t, clevrer, tmp_path, capsys):
    assert main(["convert", str(push_t), "--output-dir", str(tmp_path / "model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert AutoImageProcessor.from_pretrained(report["folder"]).size == 196  # the encoder's, without --config
    assert report["model_type"] == "cjepa" and CJepaModel.from_pretrained(report["folder"]).config.num_slots == 4
    path = write(tmp_path / "slots.pkl", {"train": slots_of({0: 6})})
    assert main(["convert", str(path), "--output-dir", str(tmp_path / "slots")]) == 0
    assert (tmp_path / "slots" / "slot_dataset.json").is_file()
    assert main(["convert", str(clevrer), "--output-dir", str(tmp_path / "other")]) == 2
    assert "hub_configs/" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["convert", str(push_t), "--output-dir", str(tmp_path / "model")]) == 2
    assert "not empty" in capsys.readouterr().err
