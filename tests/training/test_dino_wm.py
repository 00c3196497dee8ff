"""Frames to patch tokens to a trained DINO-WM that plans, along the same path as slots."""

import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array4D, Dataset, DatasetDict, Features, Value
from transformers import AutoModel, pipeline

from cjepa_hf import (
    CJepaModel,
    ColorIsaConfig,
    ColorIsaImageProcessor,
    ColorIsaModel,
    DinoWmModel,
    PatchEncoderModel,
)
from cjepa_hf.data.extract import extract_slots
from cjepa_hf.data.slots import load_slot_dataset, window_statistics
from cjepa_hf.evaluation.suite import make_policy
from cjepa_hf.planning import default_policy
from cjepa_hf.training.cjepa import main as train_cjepa
from cjepa_hf.training.dino_wm import main

SIZE, TOKENS, WIDTH = 16, 64, 36


def episode(index: int, frames: int = 12) -> dict:
    """A dark square that the actions move."""
    random = np.random.default_rng(index)
    actions = random.uniform(-1, 1, (frames, 2)).astype(np.float32)
    corner = (random.uniform(3, 9, 2) + np.concatenate([np.zeros((1, 2)), actions[:-1]]).cumsum(0)).round().astype(int)
    images = np.full((frames, SIZE, SIZE, 3), 255, np.uint8)
    for image, (x, y) in zip(images, corner.clip(0, SIZE - 4)):
        image[y : y + 4, x : x + 4] = (20, 40, 200)
    return {"episode_id": f"e{index}", "frames": images, "actions": actions, "proprio": corner.astype(np.float32)}


def split(indices) -> Dataset:
    features = Features(
        episode_id=Value("string"),
        frames=Array4D((None, SIZE, SIZE, 3), "uint8"),
        actions=Array2D((None, 2), "float32"),
        proprio=Array2D((None, 2), "float32"),
    )
    rows = [episode(i) for i in indices]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An encoder of 8 x 8 patch tokens, and what it makes of a few episodes."""
    root = tmp_path_factory.mktemp("patches")
    torch.manual_seed(0)
    encoder = PatchEncoderModel.from_backbone(ColorIsaModel(ColorIsaConfig(image_size=SIZE)), grid_size=8)
    processor = ColorIsaImageProcessor(size=SIZE)
    encoder.set_feature_statistics(processor(episode(0)["frames"])["pixel_values"])
    encoder.save_pretrained(root / "encoder")
    processor.save_pretrained(root / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        source = DatasetDict(train=split(range(12)), validation=split(range(20, 23)))
        extract_slots(source, str(root / "encoder"), root / "data", frame_skip=2, dtype="float16", progress=False)
        yield root


def command(root, output, *more: str) -> list[str]:
    words = f"--dataset {root / 'data'} --output_dir {output} --max_steps 3 --batch_size 8 --learning_rate 1e-2 "
    words += "--warmup_steps 2 --eval_every 0 --eval_rollout_steps 2 --use_cpu --num_hidden_layers 1 "
    words += "--num_attention_heads 2 --intermediate_size 32 --hidden_dropout 0 --attention_dropout 0"
    return [*words.split(), *more]


@pytest.fixture(scope="module")
def trained(folders):
    """A DINO-WM on patches with its encoder inside, trained a little, and its validation metrics."""
    more = f"--max_steps 40 --head_dim 8 --residual_prediction last --slot_encoder {folders / 'encoder'}"
    metrics = main(command(folders, folders / "model", *more.split())).metrics
    return folders / "model", metrics


def test_patch_tokens_train_along_the_path_of_slots_and_beat_copying(folders, trained):
    folder, metrics = trained
    assert metrics["mse_1"] < 0.9 * metrics["copy_mse_1"] and metrics["mse_2"] < 0.9 * metrics["copy_mse_2"]
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, DinoWmModel) and isinstance(model.slot_encoder, PatchEncoderModel)
    config = model.config
    assert (config.num_slots, config.slot_size, config.action_size, config.proprio_size) == (TOKENS, WIDTH, 4, 2)
    data = load_slot_dataset(folders / "data")
    for name, value in window_statistics(data, 3, 1, 2).items():
        assert getattr(model, name).tolist() == pytest.approx(value)
    stored = np.asarray(data.data.with_format("numpy")[0]["slots"], np.float32)
    pixels = ColorIsaImageProcessor(size=SIZE)([episode(0)["frames"]])["pixel_values"]
    with torch.no_grad():
        np.testing.assert_allclose(model.encode(pixels)[0].numpy(), stored, atol=2e-2, rtol=2e-3)  # float16
    card = (folder / "README.md").read_text()
    assert "A DINO-WM world model" in card and "64 patches" in card and "DinoWmModel.from_pretrained" in card
    assert json.loads((folder / "training_args.json").read_text())["head_dim"] == 8


def test_planners_and_the_pipeline_take_the_trained_model(trained):
    folder, _ = trained
    model = DinoWmModel.from_pretrained(folder).eval()
    start, goal = episode(1)["frames"][0], episode(1)["frames"][4]
    planner = pipeline("goal-planning", model=str(folder), device="cpu")
    for name in ("cem", "icem", "mppi"):
        plan = planner(
            {"start": start, "goal": goal, "proprio": [3.0, 4.0]}, planner=name, num_samples=12, num_iterations=2,
            num_elites=6, horizon=2,
        )  # fmt: skip
        assert plan["actions"].shape == (4, 2) and plan["slots"].shape == (2, TOKENS, WIDTH)
    processor = ColorIsaImageProcessor(size=SIZE)
    for policy in (default_policy(model, image_processor=processor), make_policy(model, "paper")):
        assert not policy.cost.match_slots and not policy.rollout_options["match_slots"]
    policy = default_policy(model, image_processor=processor, history_length=2)
    policy.reset({"pixels": goal[None]})
    for _ in range(3):  # the second plan sees two frames and the block between them
        actions = policy.act({"pixels": start[None], "proprio": np.array([[3.0, 4.0]])})
    assert actions.shape == (1, 2) and policy.num_plans[0] == 2 and np.isfinite(actions).all()


def test_slots_of_the_same_data_train_as_a_set(folders, tmp_path):
    main(command(folders, tmp_path, "--token_type", "slots", "--head_dim", "8", "--history_crop_probability", "0.5"))
    model = DinoWmModel.from_pretrained(tmp_path)
    assert model.config.token_type == "slots" and model.predictor.position_embedding.shape[1] == 1
    assert "object slots" in (tmp_path / "README.md").read_text()


def test_the_masked_predictor_takes_the_same_tokens(folders, tmp_path):
    train_cjepa(command(folders, tmp_path, "--num_masked_slots", "8"))
    assert CJepaModel.from_pretrained(tmp_path).config.num_slots == TOKENS


def test_a_field_of_another_model_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="num_masked_slots"):
        main(command(folders, tmp_path, "--num_masked_slots", "1"))
