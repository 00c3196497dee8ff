import pytest
import torch
from safetensors.torch import save

from cjepa_hf.slot_probe import SlotProbe, in_words

COLORS, SHAPES = ("gray", "red", "blue"), ("cube", "sphere")
D = 12
MIXING = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]


def make_slots(present, positions, color, shape):
    """Slots that hold what they should linearly, rotated; those without object are one point."""
    one_hot = torch.nn.functional.one_hot
    raw = torch.cat([positions, one_hot(color, 3), one_hot(shape, 2), torch.zeros(*color.shape, D - 7)], dim=-1)
    empty = torch.zeros(D)
    empty[-1] = 2.0
    return torch.where(present[..., None], raw, empty) @ MIXING


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(*shape, generator=generator) < 0.8
    positions = torch.rand(*shape, 2, generator=generator) * 2 - 1
    color, shapes = (torch.randint(n, shape, generator=generator) for n in (3, 2))
    return present, positions, color, shapes


@pytest.fixture(scope="module")
def probe():
    present, positions, color, shapes = draw(400)
    return SlotProbe.fit(
        make_slots(present, positions, color, shapes),
        present=present,
        positions=positions,
        labels={"color": color, "shape": shapes},
        attributes={"color": COLORS, "shape": SHAPES},
    )


def video(colors, shapes, present=None, frames=5):
    colors, shapes = (torch.tensor(x).expand(frames, -1) for x in (colors, shapes))
    present = torch.ones_like(colors, dtype=torch.bool) if present is None else present
    positions = draw(*colors.shape, seed=1)[1]
    return make_slots(present, positions, colors, shapes), positions


def test_it_reads_presence_positions_and_attributes_of_new_slots(probe):
    present, positions, color, shapes = draw(300, seed=7)
    slots = make_slots(present, positions, color, shapes)
    assert torch.equal(probe.present(slots), present)
    assert (probe.positions(slots) - positions)[present].abs().max() < 0.05
    scores = probe.scores(slots)
    assert torch.equal(scores["color"].argmax(-1)[present], color[present])
    assert torch.equal(scores["shape"].argmax(-1)[present], shapes[present])
    torch.testing.assert_close(probe.empty_slot, slots[~present][0], atol=1e-4, rtol=0)


def test_attributes_need_not_be_linear_in_slots():
    generator = torch.Generator().manual_seed(0)
    color, shapes = (torch.randint(2, (400,), generator=generator) for _ in range(2))
    corner = torch.tensor([[[0.0, 0], [1, 0]], [[1, 1], [0, 1]]])[color, shapes]  # a color is a diagonal of a square
    slots = torch.cat([corner, torch.randn(400, 2, generator=generator)], dim=1)
    slots += 0.02 * torch.randn(slots.shape, generator=generator)
    probe = SlotProbe.fit(
        slots[:300],
        present=torch.ones(300, dtype=torch.bool),
        labels={"color": (color ^ shapes)[:300], "shape": shapes[:300]},
        attributes={"color": ("red", "blue"), "shape": SHAPES},
    )
    scores = probe.scores(slots[300:])
    assert torch.equal(scores["color"].argmax(-1), (color ^ shapes)[300:])
    torch.testing.assert_close(scores["color"].sum(-1), torch.ones(100))
    assert not probe.has_positions


def test_objects_are_found_by_their_words(probe):
    present = torch.ones(5, 4, dtype=torch.bool)
    present[:, 3] = False
    slots, _ = video([0, 1, 1, 2], [0, 0, 1, 1], present)
    assert probe.describe(slots)[1:] == [{"color": "red", "shape": "cube"}, {"color": "red", "shape": "sphere"}, None]
    assert probe.find(slots, "the red cube") == 1 and probe.find(slots, "sphere") == 2
    with pytest.raises(ValueError, match=r'2 objects of the video fit "red object"; it shows gray cube \(slot 0\)'):
        probe.find(slots, "red object")
    with pytest.raises(ValueError, match='no object of the video fit "blue sphere"'):
        probe.find(slots, "blue sphere")
    with pytest.raises(ValueError, match="'wooden' is no attribute"):
        probe.find(slots, "wooden cube")


def test_it_survives_saving(probe, tmp_path):
    probe.save_pretrained(tmp_path)
    again = SlotProbe.from_pretrained(tmp_path)
    slots, _ = video([0, 1], [1, 0])
    assert torch.equal(again.positions(slots), probe.positions(slots)) and again.describe(slots) == probe.describe(
        slots
    )
    assert torch.equal(again.empty_slot, probe.empty_slot)
    assert [file.name for file in tmp_path.iterdir()] == ["slot_probe.safetensors"]
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "slot_probe.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="holds no slot_probe"):
        SlotProbe.from_pretrained(tmp_path / "other")
    whole = (tmp_path / "slot_probe.safetensors").read_bytes()
    other = save({"weight": torch.zeros(2)}, {"attributes": "null"})
    for content in (b"", b"garbage", whole[:-10], other, whole.replace(b"attributes", b"attribute5")):
        (tmp_path / "slot_probe.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is no slot probe"):
            SlotProbe.from_pretrained(tmp_path)


def test_an_object_is_called_as_one_says_it():
    assert in_words({"shape": "cube", "color": "red", "material": "metal"}) == "red metal cube"


def test_bad_input_is_refused(probe):
    with pytest.raises(ValueError, match="outside of the attributes"):
        SlotProbe(torch.zeros(5, 3), None, {"a": ("x", "y")}, torch.tensor([[2]]), torch.zeros(5, 1))
    with pytest.raises(ValueError, match=r"expected \(K, 1\) and \(5, K\)"):
        SlotProbe(torch.zeros(5, 3), None, {"a": ("x", "y")}, torch.tensor([[1]]), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="reads slots of size 12"):
        probe.positions(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="no object to learn from"):
        SlotProbe.fit(torch.zeros(4, 3), present=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        SlotProbe.fit(
            torch.randn(4, 3), present=torch.ones(4, dtype=torch.bool), labels={"a": torch.full((4,), 2)},
            attributes={"a": ("x", "y")},
        )  # fmt: skip
