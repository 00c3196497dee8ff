"""A linear probe that reads position, presence and attributes of an object from its slot."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

__all__ = ["SlotProbe"]

_FILE = "slot_probe.safetensors"
_MIN_FRAMES = 3  # an object seen in fewer is taken for noise


class SlotProbe:
    """
    Ridge regression from slots to what is known of their objects, fitted in closed form (no randomness). It is stored
    beside a model (`slot_probe.safetensors`), and pipelines load it from there.

    Anything with the same methods can take its place where a linear read-out is not enough.

    Attributes:
        weight: float32 [D + 1, outputs]; the last row is the bias. Outputs: presence, x, y if positions were known, one
            per value of every attribute.
        empty_slot: float32 [D], mean of the slots without object, or None if there were none.
        attributes: names of the values of each attribute.
        has_positions: whether positions were fitted.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        empty_slot: torch.Tensor | None,
        attributes: Mapping[str, Sequence[str]],
        has_positions: bool,
    ):
        self.weight, self.empty_slot, self.has_positions = weight, empty_slot, has_positions
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        outputs = 1 + 2 * has_positions + sum(map(len, self.attributes.values()))
        if weight.ndim != 2 or weight.shape[1] != outputs:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (D + 1, {outputs})")

    @classmethod
    def fit(
        cls,
        slots: torch.Tensor,
        *,
        present: torch.Tensor,
        positions: torch.Tensor | None = None,
        labels: Mapping[str, torch.Tensor] | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
        ridge: float = 1e-3,
    ) -> "SlotProbe":
        """
        Args:
            slots: [n, D], slots of any frames and places.
            present: bool [n], whether the slot holds an object (not the background).
            positions: [n, 2], any unit; those of slots without object are not read.
            labels: for each attribute int [n], place in `attributes`; not read where there is no object.
            attributes: names of the values, such as {"color": ("gray", "red", ...)}.
            ridge: weight of the penalty, relative to the mean variance of a slot's numbers.
        """
        labels, attributes = dict(labels or {}), dict(attributes or {})
        if slots.ndim != 2 or present.shape != slots.shape[:1] or present.dtype != torch.bool:
            raise ValueError(
                f"slots {tuple(slots.shape)} and present {present.dtype} {tuple(present.shape)}: expected (n, D) and bool (n,)"
            )
        if set(labels) != set(attributes):
            raise ValueError(f"labels of {sorted(labels)}, but names of the values of {sorted(attributes)}")
        if not present.any():
            raise ValueError("present is False everywhere: there is no object to learn from")
        x = slots.detach().double().cpu()
        present = present.cpu()
        columns = [] if positions is None else [positions.double().cpu()]
        for name, values in attributes.items():
            label = labels[name].long().cpu().where(present, 0)
            if label.shape != present.shape or label.min() < 0 or label.max() >= len(values):
                raise ValueError(f"labels of {name!r} must be {len(present)} numbers from 0 to {len(values) - 1}")
            columns.append(torch.nn.functional.one_hot(label, len(values)).double())
        parts = [_ridge(x, present.double()[:, None], ridge)]
        if columns:
            parts.append(_ridge(x[present], torch.cat(columns, dim=1)[present], ridge))
        empty = x[~present].mean(0).float() if (~present).any() else None
        return cls(torch.cat(parts, dim=1).float(), empty, attributes, positions is not None)

    def _read(self, slots: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(slots.device)
        if slots.shape[-1] != len(weight) - 1:
            raise ValueError(
                f"slots have shape {tuple(slots.shape)}: this probe reads slots of size {len(weight) - 1}"
            )
        return slots.float() @ weight[:-1] + weight[-1]

    def present(self, slots: torch.Tensor) -> torch.Tensor:
        """Whether slots [..., D] hold an object, bool [...]."""
        return self._read(slots)[..., 0] > 0.5

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the objects of slots [..., D] are, [..., 2], in the unit of the fit."""
        if not self.has_positions:
            raise ValueError("this probe was fitted without positions")
        return self._read(slots)[..., 1:3]

    def scores(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each attribute, how much slots [..., D] look like each of its values, [..., values]; about 0 to 1."""
        sizes = [len(values) for values in self.attributes.values()]
        parts = self._read(slots)[..., 1 + 2 * self.has_positions :].split(sizes, dim=-1)
        return dict(zip(self.attributes, parts, strict=True))

    def describe(self, slots: torch.Tensor) -> list[dict[str, str] | None]:
        """
        What each slot of a video [T, N, D] holds, in words: {"color": "red", ...}, averaged over the frames in which it
        holds an object; None where that is in less than 3 frames. A slot must stay with its object.
        """
        there = self.present(slots)  # [T, N]
        seen = there.sum(0)
        best = {
            name: (score * there[..., None]).sum(0).argmax(-1).tolist() for name, score in self.scores(slots).items()
        }
        enough = (seen >= min(_MIN_FRAMES, len(slots))).tolist()
        return [
            {name: self.attributes[name][best[name][k]] for name in self.attributes} if enough[k] else None
            for k in range(slots.shape[1])
        ]

    def find(self, slots: torch.Tensor, words: str) -> int:
        """
        The slot of a video [T, N, D] whose object the words describe, such as "red metal cube" or "the cylinder".

        Raises `ValueError`, which lists the objects of the video, for none or several.
        """
        known = {value: name for name, values in self.attributes.items() for value in values}
        fillers = {"the", "a", "object"}
        wanted = {}
        for word in words.lower().split():
            if word not in known and word not in fillers:
                raise ValueError(f"{words!r}: {word!r} is no attribute; known are {', '.join(known)}")
            if word in known:
                if wanted.get(known[word], word) != word:
                    raise ValueError(f"{words!r} names two values of {known[word]}")
                wanted[known[word]] = word
        objects = self.describe(slots)
        fits = [k for k, found in enumerate(objects) if found is not None and wanted.items() <= found.items()]
        if len(fits) != 1:
            here = ", ".join(f"{' '.join(found.values())} (slot {k})" for k, found in enumerate(objects) if found)
            how_many = "no object" if not fits else f"{len(fits)} objects"
            raise ValueError(f'{how_many} of the video fit "{words}"; it shows {here or "none"}')
        return fits[0]

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `slot_probe.safetensors` into a folder, usually that of the model. Returns its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.cpu().contiguous()}
        if self.empty_slot is not None:
            tensors["empty_slot"] = self.empty_slot.cpu().contiguous()
        metadata = {"attributes": json.dumps(self.attributes), "has_positions": json.dumps(self.has_positions)}
        temporary = folder / f".{_FILE}.{os.getpid()}.tmp"
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, folder / _FILE)
        finally:
            temporary.unlink(missing_ok=True)
        return folder / _FILE

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "SlotProbe":
        """Read it from a folder. Raises `FileNotFoundError` if there is none."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {_FILE}: fit a SlotProbe and save it there")
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        try:
            attributes, has_positions = json.loads(metadata["attributes"]), json.loads(metadata["has_positions"])
            return cls(tensors["weight"], tensors.get("empty_slot"), attributes, has_positions)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no slot probe ({error!r})") from error


def _ridge(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """[D + 1, outputs] of the regression of y [n, outputs] on x [n, D]; the bias is not penalised."""
    mean, target = x.mean(0), y.mean(0)
    centered = x - mean
    gram = centered.T @ centered / len(x)
    gram = gram + (ridge * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centered.T @ (y - target) / len(x))
    return torch.cat([weight, (target - mean @ weight)[None]])
