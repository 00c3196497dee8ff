"""SAVi: equality with recorded outputs, seeds and chunks, losses, saving, images in, and errors."""

import json

import numpy as np
import pytest
import torch
from golden import DATA, read
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import cjepa_hf  # noqa: F401 (registers the AutoClasses)
from cjepa_hf.models.savi import SaviConfig, SaviImageProcessor, SaviModel, SaviState
from cjepa_hf.models.savi.modeling_savi import SaviSlotAttention

TINY = dict(
    num_slots=3,
    slot_size=8,
    image_size=16,
    encoder_channels=[4, 6],
    encoder_kernel_size=3,
    slot_mlp_size=12,
    decoder_channels=[6, 4],
    decoder_kernel_size=3,
    decoder_grid_size=4,
)
RNN = dict(predictor_type="transformer", predictor_rnn=True, predictor_num_heads=2, predictor_ffn_size=12)


def tiny(**config) -> SaviModel:
    torch.manual_seed(0)
    return SaviModel(SaviConfig(**(TINY | config))).eval()


def clips(batch=2, length=5, size=16):
    return torch.rand(batch, length, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(got, want, atol=5e-5, rtol=1e-3):
    torch.testing.assert_close(got, want, atol=atol, rtol=rtol)


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------ recorded outputs


def test_slot_attention_equals_the_recorded_one_and_its_gradients():
    tensors = read("savi_slot_attention.safetensors")
    module = SaviSlotAttention(input_size=20, slot_size=32, mlp_size=64, num_iterations=2, eps=1e-6)
    module.load_state_dict(part(tensors, "weights."))
    inputs, slots = tensors["inputs.inputs"].requires_grad_(), tensors["inputs.slots"].requires_grad_()
    out, attention = module(*module.project(inputs), slots)
    close(out, tensors["outputs.slots"], 1e-5, 1e-4)
    close(attention.sum(dim=1), torch.ones(2, 25))
    out.square().sum().backward()
    gradients = {"slots": slots.grad, "inputs": inputs.grad} | {n: p.grad for n, p in module.named_parameters()}
    recorded = part(tensors, "outputs.grad.")
    assert len(recorded) == 15
    for name, gradient in recorded.items():
        close(gradients[name], gradient, 2e-5, 1e-4)


def test_a_large_attention_eps_lets_every_slot_look_everywhere_alike():
    torch.manual_seed(0)
    values, slots = torch.randn(1, 25, 8), torch.randn(1, 3, 8)
    module = SaviSlotAttention(input_size=8, slot_size=8, mlp_size=8, num_iterations=1, eps=1e6)
    seen = []
    module.gru.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    module(torch.randn(1, 25, 8), values, slots)
    close(seen[0].detach(), values.mean(dim=1).expand(3, -1))


def recorded_video(monkeypatch):
    """A small model with the recorded weights, which draws the recorded noise."""
    tensors = read("savi_video.safetensors")
    channels = (8, 8, 8, 8)
    model = SaviModel(
        SaviConfig(num_slots=4, slot_size=16, slot_mlp_size=32, encoder_channels=channels, decoder_channels=channels)
    )
    model.load_state_dict(part(tensors, "weights."))  # strict: the names are those of the released code
    noise = iter(tensors["inputs.noise"].unbind(1))
    monkeypatch.setattr(model, "_noise", lambda *_: next(noise))
    return model.eval(), tensors


def test_slots_of_a_video_equal_the_recorded_ones(monkeypatch):
    model, tensors = recorded_video(monkeypatch)
    with torch.no_grad():
        out = model(tensors["inputs.img"])
    close(out.slots, tensors["outputs.post_slots"])
    close(out.kernels, tensors["outputs.kernel_dist"])


def test_slots_of_a_video_in_parts_equal_the_recorded_ones(monkeypatch):
    model, tensors = recorded_video(monkeypatch)
    with torch.no_grad():
        first = model(tensors["inputs.img"][:, :1])
        # the predictor is applied to what is carried, not to the first part's kernels
        second = model(tensors["inputs.img"][:, 1:], state=SaviState(slots=first.slots[:, -1]))
    close(torch.cat([first.slots, second.slots], dim=1), tensors["outputs.post_slots"])


@pytest.mark.parametrize(
    "name, config",
    [
        ("kernel_mlp", dict(num_slots=4, slot_size=32, kernel_mlp=True, predictor_norm_first=False)),
        (
            "transformer",
            dict(num_slots=3, slot_size=16, predictor_type="transformer", predictor_rnn=True, predictor_ffn_size=64),
        ),
    ],
)
def test_kernels_of_the_second_frame_equal_the_recorded_ones(name, config):
    tensors = part(read("savi_parts.safetensors"), f"{name}.")
    model = SaviModel(SaviConfig(**config)).eval()
    weights = {
        k: v for k, v in part(tensors, "weights.").items() if k.startswith(("predictor.", "kernel_dist_layer."))
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not any(key.startswith(("predictor", "kernel")) for key in missing)
    slots, kernels = tensors["outputs.post_slots"], tensors["outputs.kernel_dist"]
    with torch.no_grad():
        predicted, _ = model._predict(slots[:, 0], None)
        close(model.kernel_dist_layer(predicted), kernels[:, 1])


def test_the_kernel_loss_equals_the_recorded_one(monkeypatch):
    for name, slots in (("kernel_mlp", 4), ("transformer", 3)):
        tensors = part(read("savi_parts.safetensors"), f"{name}.")
        kernels = tensors["outputs.kernel_dist"]
        model = tiny(num_slots=slots, slot_size=kernels.shape[-1] // 2)
        # the distribution is all that the loss looks at: let the layer return what was recorded
        recorded = iter(kernels.unbind(1))
        monkeypatch.setattr(model.kernel_dist_layer, "forward", lambda _, recorded=recorded: next(recorded))
        out = model(clips(1, 2), return_loss=True)
        close(out.kernel_loss.detach(), tensors["outputs.kld_loss"], 2e-3, 1e-6)


def test_drawn_slots_equal_the_recorded_ones_at_128_pixels():
    tensors = part(read("savi_parts.safetensors"), "transformer.")
    model = SaviModel(SaviConfig(num_slots=3, slot_size=16, image_size=128, decoder_channels=(8, 8, 8, 8))).eval()
    assert model.config.decoder_strides == (2, 2, 2, 2)
    weights = {k: v for k, v in part(tensors, "weights.").items() if k.startswith("decoder")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not any(key.startswith("decoder") for key in missing)
    with torch.no_grad():
        drawn = model.decode(tensors["outputs.post_slots"][0, 0])
    close(drawn.images[..., ::4, ::4], tensors["outputs.post_recons_b0_t0_every4"])
    close(drawn.masks[..., ::4, ::4], tensors["outputs.post_masks_b0_t0_every4"][:, 0])


def test_pixels_equal_the_recorded_ones():
    recorded = np.load(DATA / "savi_pixels.npz")
    frame = np.zeros((224, 224, 3), np.uint8)
    frame[:32] = recorded["frame"]  # all that the first rows of the result depend on
    pixels = SaviImageProcessor()(frame).pixel_values
    assert pixels.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(pixels[0, :, :8], recorded["pixel_values"], atol=2e-5)


# ---------------------------------------------------------------------------------- seeds, chunks and the state


@pytest.mark.parametrize("config", [{}, RNN], ids=["mlp", "transformer and rnn"])
def test_a_video_in_parts_gives_what_it_gives_in_one_piece(config):
    model, x = tiny(**config), clips(2, 7)
    with torch.no_grad():
        whole = model(x, seeds=[3, 4])
        parts, state = [], None
        for piece in x.split((3, 1, 3), dim=1):
            parts.append(model(piece, state=state, seeds=None if state else [3, 4]))
            state = parts[-1].state
    for name in ("slots", "masks", "kernels"):
        close(torch.cat([p[name] for p in parts], dim=1), whole[name], 1e-5, 1e-5)
    close(state.slots, whole.state.slots, 1e-5, 1e-5)
    assert torch.equal(state.generator_states, whole.state.generator_states)
    with torch.no_grad():
        forgetful = model(x[:, 3:4], state=SaviState(slots=parts[0].state.slots), sample=False)
        remembers = model(x[:, 3:4], state=parts[0].state, sample=False)
    assert torch.equal(forgetful.slots, remembers.slots) == (config == {})  # only the LSTM has a memory of its own


def test_slots_of_a_seeded_video_depend_on_nothing_else():
    model, x = tiny(), clips(3, 4)
    with torch.no_grad():
        together = model(x, seeds=[5, 6, 7])
        torch.manual_seed(99)
        chunked = model(x, seeds=[5, 6, 7], chunk_size=2)
        for b, seed in enumerate((5, 6, 7)):
            alone = model(x[b : b + 1], seeds=[seed])
            close(alone.slots[0], together.slots[b], 1e-5, 1e-5)
        other = model(x, seeds=[5, 6, 8])
    close(chunked.slots, together.slots, 1e-5, 1e-5)
    close(other.slots[:2], together.slots[:2], 1e-5, 1e-5)
    assert (other.slots[2] - together.slots[2]).abs().max() > 1e-3


def test_noise_comes_from_the_generator_and_is_drawn_in_eval_too():
    model, x = tiny(), clips(1, 3)
    with torch.no_grad():
        first, again = (model(x, generator=torch.Generator().manual_seed(7)).slots for _ in range(2))
        assert torch.equal(first, again)
        close(first, model(x, seeds=[7]).slots, 1e-6, 1e-6)  # of one video, the same numbers
        assert not torch.equal(model(x).slots, model(x).slots)
        deterministic = model(x, sample=False).slots
        assert torch.equal(deterministic, model(x, sample=False).slots)
        quiet = tiny(sample_in_eval=False)
        assert torch.equal(quiet(x).slots, deterministic) and not torch.equal(quiet.train()(x).slots, deterministic)
        assert torch.equal(tiny(kernel_prior_variance=None).train()(x).slots, deterministic)


def test_the_noise_has_the_standard_deviation_that_the_kernels_say():
    model, x = tiny(), clips(1, 1)
    model.slot_attention.forward = lambda keys, values, slots: (slots, keys.new_ones(1, 3, keys.shape[1]))
    with torch.no_grad():
        model.kernel_dist_layer[0].bias[8:] = 2 * np.log(0.3)
        model.kernel_dist_layer[0].weight[8:] = 0
        out = model(x.expand(1000, 1, 3, 16, 16), chunk_size=1000)
    mean = out.kernels[0, 0].chunk(2, dim=-1)[0]
    close(out.slots[:, 0].mean(0), mean, 0.05, 0)
    close(out.slots[:, 0].std(0), torch.full((3, 8), 0.3), 0.04, 0)


def test_initial_slots_replace_the_learned_start_of_the_first_frame():
    model, x = tiny(), clips(2, 2)
    with torch.no_grad():
        usual = model(x, seeds=[0, 1]).slots
        same = model(x, seeds=[0, 1], initial_slots=model.init_latents.expand(2, -1, -1)).slots
        turned = model(x, seeds=[0, 1], initial_slots=model.init_latents.flip(1).expand(2, -1, -1), sample=False)
        plain = model(x, sample=False)
    assert torch.equal(usual, same)
    close(turned.slots.flip(2), plain.slots, 1e-5, 1e-5)  # without noise, slots are interchangeable
    close(turned.masks.flip(2), plain.masks, 1e-5, 1e-5)


def test_later_frames_do_not_change_earlier_slots():
    model, x = tiny(), clips(1, 4)
    with torch.no_grad():
        close(model(x, seeds=[0]).slots[:, :2], model(x[:, :2], seeds=[0]).slots, 1e-5, 1e-5)


def test_axes_and_sizes_of_the_output():
    out = tiny(encoder_stride=2)(clips(2, 3), return_loss=True)
    assert out.slots.shape == (2, 3, 3, 8) and out.masks.shape == (2, 3, 3, 8, 8)
    assert out.reconstruction.shape == (2, 3, 3, 16, 16) and out.decoder_masks.shape == (2, 3, 3, 16, 16)
    close(out.masks.sum(dim=2), torch.ones(2, 3, 8, 8))
    close(out.decoder_masks.sum(dim=2), torch.ones(2, 3, 16, 16))
    assert not SaviModel.memoryless and not SaviModel.slots_keep_roles


# -------------------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_drawn_frames_and_of_the_kernels():
    model, x = tiny(kernel_loss_weight=0.01, reconstruction_loss_weight=2.0), clips()
    with torch.no_grad():
        out = model(x, seeds=[0, 1], return_loss=True, chunk_size=3)
        drawn = model.decode(out.slots)
    close(out.reconstruction, drawn.reconstruction, 1e-5, 1e-5)
    close(out.reconstruction, (drawn.images * drawn.masks[:, :, :, None]).sum(2), 1e-5, 1e-5)
    close(out.reconstruction_loss, (drawn.reconstruction - x).square().mean())
    kernels = out.kernels.double()
    posterior = torch.distributions.Normal(torch.zeros(2, 5, 3, 8), (0.5 * kernels[..., 8:]).exp().float())
    prior = torch.distributions.Normal(0.0, 0.1)
    close(out.kernel_loss, torch.distributions.kl_divergence(posterior, prior).sum(-1).mean(), 1e-3, 1e-4)
    close(out.loss, 2 * out.reconstruction_loss + 0.01 * out.kernel_loss)
    without = tiny(kernel_prior_variance=None)(x, return_loss=True)
    assert without.kernel_loss is None and torch.equal(without.loss, without.reconstruction_loss)


@pytest.mark.parametrize("config", [{}, RNN | dict(kernel_mlp=True)], ids=["mlp", "transformer and rnn"])
def test_the_loss_reaches_every_parameter(config):
    model = tiny(**config).train()
    model(clips(), return_loss=True).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_training_lowers_the_loss():
    model = tiny().train()
    x = torch.zeros(4, 3, 3, 16, 16) - 1
    x[..., 0, 2:8, 4:10] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(x, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_bfloat16_stays_close_to_float32():
    model, x = tiny(sample_in_eval=False), clips()
    exact = model(x)
    half = tiny(sample_in_eval=False).bfloat16()(x.bfloat16(), return_loss=True)
    assert half.slots.dtype == half.masks.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    assert (half.slots.float() - exact.slots).norm() < 0.05 * exact.slots.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, return_loss=True).loss
    close(loss, model(x, return_loss=True).loss, 0, 0.05)


# ------------------------------------------------------------------------------------------------ saving, config


def test_saved_folder_gives_the_same_slots_back_through_the_auto_classes(tmp_path):
    model, x = tiny(**RNN), clips()
    model.save_pretrained(tmp_path)
    SaviImageProcessor(size=16).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SaviModel
    with torch.no_grad():
        assert torch.equal(loaded(x, seeds=[1, 2]).slots, model(x, seeds=[1, 2]).slots)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is SaviImageProcessor and processor.size == 16
    assert type(AutoModel.from_config(SaviConfig(**TINY))) is SaviModel
    reproducible = AutoModel.from_pretrained(tmp_path, sample_in_eval=False)
    with torch.no_grad():
        assert torch.equal(reproducible(x).slots, reproducible(x).slots)


def test_weights_missing_from_a_checkpoint_get_their_start_values(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny(**RNN).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k.startswith("encoder")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = SaviModel.from_pretrained(tmp_path, output_loading_info=True)
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name])
        assert 0 <= parameter.abs().max() < 5 and ("bias" in name or parameter.abs().max() > 0.01), name


def test_start_values_are_those_of_torch():
    torch.manual_seed(0)
    model = SaviModel(SaviConfig())
    for ours, theirs in (
        (model.encoder[1][0], torch.nn.Conv2d(64, 64, 5)),
        (model.decoder[0][0], torch.nn.ConvTranspose2d(128, 64, 5)),
        (model.slot_attention.gru, torch.nn.GRUCell(128, 128)),
        (model.encoder_out_layer[1], torch.nn.Linear(64, 128)),
    ):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            close(a.std(), b.std(), 0, 0.25 if "bias" in name else 0.05)
    assert abs(model.init_latents.std() - 1) < 0.1


def test_the_defaults_are_the_full_size_model():
    assert (
        sum(p.numel() for p in SaviModel(SaviConfig()).parameters()) == 1_198_980 - 33_280
    )  # less what is never used
    written = json.loads(SaviConfig().to_json_string(use_diff=False))
    assert SaviConfig(**written).to_dict() == SaviConfig().to_dict() | {
        "encoder_channels": [64] * 4,
        "decoder_channels": [64] * 4,
    }


def test_unknown_or_impossible_settings_are_errors_that_name_the_field():
    with pytest.raises(ValueError, match=r"num_slot'.*Did you mean 'num_slots'"):
        SaviConfig(num_slot=3)
    for wrong, field in (
        (dict(num_slots=0), "num_slots"),
        (dict(image_size=48), "image_size=48 cannot be drawn"),
        (dict(image_size=256), "image_size=256 cannot be drawn"),
        (dict(encoder_stride=3), "encoder_stride"),
        (dict(encoder_kernel_size=4), "encoder_kernel_size"),
        (dict(encoder_channels=[]), "encoder_channels"),
        (dict(predictor_type="gru"), "predictor_type"),
        (dict(predictor_type="transformer", predictor_num_heads=3), "predictor_num_heads"),
        (dict(kernel_prior_variance=0.0), "kernel_prior_variance"),
        (dict(kernel_loss_weight=-1.0), "kernel_loss_weight"),
    ):
        with pytest.raises(ValueError, match=field):
            SaviConfig(**wrong)


# -------------------------------------------------------------------------------------------------------- errors


def test_arguments_that_do_not_fit_are_errors():
    model, x = tiny(), clips()
    state = model(x, seeds=[0, 1]).state
    for wrong, message in (
        (dict(seeds=[1]), "1 seeds for 2 videos"),
        (dict(seeds=[1, 2], generator=torch.Generator()), "pass one of them"),
        (dict(initial_slots=torch.zeros(2, 4, 8)), r"expected \(2, 3, 8\)"),
        (dict(initial_slots=torch.zeros(2, 3, 8), state=state), "both given"),
        (dict(state=SaviState(slots=torch.zeros(1, 3, 8))), "same videos"),
        (dict(state=SaviState(slots=state.slots, generator_states=state.generator_states[:1])), "1 generators for 2"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(labels=None), "Unexpected inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, **wrong)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., N, 8\]"):
        model.decode(torch.zeros(2, 3, 64))


# --------------------------------------------------------------------------------------------------------- images


def test_images_of_every_kind_give_the_same_pixels():
    processor = SaviImageProcessor(size=16)
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 32, 3), np.uint8)
    clip = processor(frames).pixel_values
    assert clip.shape == (3, 3, 16, 16) and clip.dtype == torch.float32 and clip.min() >= -1 and clip.max() <= 1
    images = [Image.fromarray(frame) for frame in frames]
    for same in (images, list(frames), torch.from_numpy(frames)):
        assert torch.equal(processor(same).pixel_values, clip)
    assert torch.equal(processor(images[0]).pixel_values, clip[:1])
    assert torch.equal(processor([frames, frames]).pixel_values, torch.stack([clip, clip]))
    assert torch.equal(processor([frames, frames[:, ::3, ::2]]).pixel_values[0], clip)  # sizes may differ
    close(processor(frames / 255.0).pixel_values, clip, 1e-6, 0)
    assert isinstance(processor(frames, return_tensors="np").pixel_values, np.ndarray)
    exact = processor(frames[:, :16, :16]).pixel_values  # nothing to resize
    close(exact, torch.from_numpy(frames[:, :16, :16]).permute(0, 3, 1, 2) / 127.5 - 1, 1e-6, 0)
