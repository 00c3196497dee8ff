"""True states as slots: what a slot tells, absent objects, and the dataset that trainings read."""

import json

import datasets
import numpy as np
import pytest
import torch

from cjepa_hf.cli import main
from cjepa_hf.data.clevrer import scene_annotation, scene_path
from cjepa_hf.data.slots import SlotWindows, load_slot_dataset
from cjepa_hf.data.state_slots import OBJECT_PAIRS, annotation_states, empty_slot, state_slots, write_state_slots
from cjepa_hf.simulators.collisions import VISIBLE_FRAMES, sample_scene
from cjepa_hf.simulators.rendering import COLORS, MATERIALS, SHAPES
from cjepa_hf.slot_probe import SlotProbe


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    """The annotations of two training videos and one for validation, as the collection writes them."""
    root = tmp_path_factory.mktemp("scenes")
    for number, (split, scene) in enumerate(zip(("train", "train", "validation"), scenes)):
        path = root / scene_path("annotation", split, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scene_annotation(scene, number)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


def visible(scene):
    return scene.episode.states[:VISIBLE_FRAMES]


def test_a_linear_probe_reads_positions_presence_and_attributes(scenes):
    states = np.concatenate([visible(scene) for scene in scenes])
    slots = torch.from_numpy(state_slots(states)).flatten(0, 1)
    rows = torch.from_numpy(states).reshape(-1, 10)
    seen = np.concatenate(
        [np.pad(s.episode.in_view[:VISIBLE_FRAMES], ((0, 0), (0, 6 - len(s.world.ids)))) for s in scenes]
    )
    present = torch.from_numpy(seen).flatten()
    names = {"shape": SHAPES, "color": COLORS, "material": MATERIALS}
    labels = {name: rows[:, 7 + k].long() for k, name in enumerate(names)}
    probe = SlotProbe.fit(slots, present=present, positions=rows[:, 1:3], labels=labels, attributes=names, ridge=1e-9)
    assert torch.equal(probe.present(slots), present)
    assert (probe.positions(slots)[present] - rows[present, 1:3]).abs().max() < 1e-3
    for name, score in probe.scores(slots).items():
        assert torch.equal(score.argmax(-1)[present], labels[name][present])


def test_out_of_view_unused_and_empty_are_one_state(scenes):
    scene = next(s for s in scenes if not s.episode.in_view[:VISIBLE_FRAMES].all())
    slots = state_slots(visible(scene))
    seen = np.pad(scene.episode.in_view[:VISIBLE_FRAMES], ((0, 0), (0, 6 - len(scene.world.ids))))
    assert (~seen).any()
    np.testing.assert_array_equal(slots[~seen], np.broadcast_to(empty_slot(), slots[~seen].shape))
    # an object is far from it wherever it is: the nearest one differs by its attributes and the flag
    assert np.linalg.norm(slots[seen] - empty_slot(), axis=-1).min() > 1.5


def test_distances_are_those_of_the_features(scenes):
    states = visible(scenes[0])[:1].copy().reshape(1, 6, 10)
    states[:, 0, 1:3] = 0.0
    moved = states.copy()
    moved[:, 0, 1:3] = 0.3, 0.4
    a, b = (state_slots(x.reshape(1, 60), slot_size=128) for x in (states, moved))
    assert np.linalg.norm(a - b) == pytest.approx(0.5, abs=1e-6)
    assert not np.isclose(a[0, 0], b[0, 0]).any()  # no number of a slot is a feature by itself


def test_velocities_are_there_only_when_asked_for(scenes):
    states = visible(scenes[0])[60:61].reshape(1, 6, 10)
    states[:, 0, 1:3] = 0.0  # in view
    faster = states.copy()
    faster[:, 0, 4] += 1.0
    a, b = states.reshape(1, 60), faster.reshape(1, 60)
    np.testing.assert_array_equal(state_slots(a), state_slots(b))
    assert np.linalg.norm(state_slots(a, velocities=True) - state_slots(b, velocities=True)) == pytest.approx(0.5)


def test_an_annotation_says_what_the_simulator_did(scenes):
    for number, scene in enumerate(scenes):
        states, in_view, contacts = annotation_states(scene_annotation(scene, number))
        np.testing.assert_allclose(states, visible(scene), atol=1e-5)
        n = len(scene.world.ids)
        np.testing.assert_array_equal(in_view[:, :n], scene.episode.in_view[:VISIBLE_FRAMES])
        found = {(int(t), OBJECT_PAIRS[p]) for t, p in zip(*contacts.nonzero())}
        assert found == {(c.frame, c.pair) for c in scene.episode.collisions if c.frame < VISIBLE_FRAMES} != set()


def test_the_dataset_loads_resumes_and_feeds_windows(folder, scenes, tmp_path, monkeypatch):
    output = tmp_path / "slots"
    arguments = dict(frames_per_file=100, progress=False)
    from cjepa_hf.data import state_slots as module

    calls = []

    def broken(annotation):
        calls.append(annotation["scene_index"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return annotation_states(annotation)

    with monkeypatch.context() as patch:
        patch.setattr(module, "annotation_states", broken)
        with pytest.raises(KeyboardInterrupt):
            write_state_slots(folder, output, **arguments)
        calls.append(None)
        assert write_state_slots(folder, output, **arguments) == output
    assert calls == [0, 1, None, 1, 2]  # the finished file was not made again
    dataset = load_slot_dataset(output, "train")
    assert (dataset.num_slots, dataset.slot_size, dataset.frame_skip) == (6, 64, 4)
    np.testing.assert_array_equal(dataset.metadata["encoder"]["empty_slot"], empty_slot())
    row = dataset.data.with_format("numpy")[0]
    np.testing.assert_allclose(row["slots"], state_slots(visible(scenes[0])), atol=1e-5)
    assert row["contacts"].sum() == len(scenes[0].episode.pairs(0, VISIBLE_FRAMES))
    assert SlotWindows(dataset, 6, 2, 4)[0]["slots"].shape == (8, 6, 64)
    before = (output / "slot_dataset.json").stat().st_mtime_ns
    assert write_state_slots(folder, output, **arguments) == output  # a finished one is left alone
    assert (output / "slot_dataset.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other arguments"):
        write_state_slots(folder, output, velocities=True, **arguments)


def test_extract_takes_the_state_as_its_encoder(folder, tmp_path, capsys):
    output = str(tmp_path / "slots")
    words = ["extract", str(folder), "--encoder", "state", "--output-dir", output, "--num-frames", "100", "--json"]
    assert main(words) == 0
    metadata = json.loads(capsys.readouterr().out)
    assert metadata["splits"]["train"] == {"num_episodes": 1, "num_frames": 128} and metadata["frame_skip"] == 4


def test_bad_sources_are_named(tmp_path, scenes):
    with pytest.raises(ValueError, match="has no annotations"):
        write_state_slots(tmp_path, tmp_path / "out")
    annotation = scene_annotation(scenes[0], 7)
    annotation["object_property"][0]["object_id"] = 9
    with pytest.raises(ValueError, match=r"video_00007\.mp4 has objects .*ids from 0 to 5"):
        annotation_states(annotation)
    del annotation["motion_trajectory"]
    annotation["object_property"] = []
    with pytest.raises(ValueError, match=r"video_00007\.mp4 is no annotation.*motion_trajectory"):
        annotation_states(annotation)
    with pytest.raises(ValueError, match="power of two"):
        empty_slot(48)
    with pytest.raises(ValueError, match=r"\[\.\.\., 60\]"):
        state_slots(np.zeros((3, 70)))
