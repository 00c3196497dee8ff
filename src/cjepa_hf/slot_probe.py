"""A probe that reads position, presence and attributes of an object from its slot."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .models.cjepa.modeling_cjepa import is_broken_connection

__all__ = ["SlotProbe"]

_FILE = "slot_probe.safetensors"
_MIN_FRAMES = 3  # an object seen in fewer is taken for noise


class SlotProbe:
    """
    What is known of objects, read from their slots: presence and position by ridge regression, attributes by linear
    discriminant analysis over kinds of objects (values of all attributes together: one color may look different on every
    shape). Fitted in closed form, without randomness. It is stored beside a model (`slot_probe.safetensors`), and pipelines
    load it from there. Anything with the same methods can take its place.

    Attributes:
        weight: float32 [D + 1, outputs]; the last row is the bias. Outputs: presence, then x, y if positions were known.
        empty_slot: float32 [D], mean of the slots without object, or None if there were none.
        attributes: names of the values of each attribute.
        kinds: int64 [K, attributes], the kinds of objects that it has seen, by places in `attributes`.
        kind_weight: float32 [D + 1, K], log likelihoods of the kinds up to a constant.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        empty_slot: torch.Tensor | None,
        attributes: Mapping[str, Sequence[str]],
        kinds: torch.Tensor,
        kind_weight: torch.Tensor,
    ):
        self.weight, self.empty_slot, self.kinds, self.kind_weight = weight, empty_slot, kinds, kind_weight
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        if weight.ndim != 2 or weight.shape[1] not in (1, 3):
            raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (D + 1, 1) or (D + 1, 3)")
        if kinds.ndim != 2 or kinds.shape[1] != len(self.attributes) or kind_weight.shape != (len(weight), len(kinds)):
            raise ValueError(
                f"kinds {tuple(kinds.shape)} and kind_weight {tuple(kind_weight.shape)}: expected "
                f"(K, {len(self.attributes)}) and ({len(weight)}, K)"
            )
        sizes = torch.tensor([len(values) for values in self.attributes.values()], dtype=torch.long)
        if kinds.numel() and (kinds.min() < 0 or bool((kinds >= sizes).any())):
            raise ValueError(f"kinds names values outside of the attributes {self.attributes}")

    @property
    def has_positions(self) -> bool:
        """Whether positions were fitted."""
        return self.weight.shape[1] == 3

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
        columns = []
        for name, values in attributes.items():
            label = labels[name].long().cpu().where(present, 0)
            if label.shape != present.shape or label.min() < 0 or label.max() >= len(values):
                raise ValueError(f"labels of {name!r} must be {len(present)} numbers from 0 to {len(values) - 1}")
            columns.append(label[present])
        parts = [_ridge(x, present.double()[:, None], ridge)]
        if positions is not None:
            parts.append(_ridge(x[present], positions.double().cpu()[present], ridge))
        empty = x[~present].mean(0).float() if (~present).any() else None
        kinds, kind_weight = torch.zeros(0, 0, dtype=torch.long), x.new_zeros(x.shape[1] + 1, 0)
        if columns:
            kinds, kind_weight = _discriminants(x[present], torch.stack(columns, dim=1))
        return cls(torch.cat(parts, dim=1).float(), empty, attributes, kinds, kind_weight.float())

    def _read(self, slots: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(slots.device)
        if slots.shape[-1] != len(weight) - 1:
            raise ValueError(
                f"slots have shape {tuple(slots.shape)}: this probe reads slots of size {len(weight) - 1}"
            )
        return slots.float() @ weight[:-1] + weight[-1]

    def present(self, slots: torch.Tensor) -> torch.Tensor:
        """Whether slots [..., D] hold an object, bool [...]."""
        return self._read(slots, self.weight)[..., 0] > 0.5

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the objects of slots [..., D] are, [..., 2], in the unit of the fit."""
        if not self.has_positions:
            raise ValueError("this probe was fitted without positions")
        return self._read(slots, self.weight)[..., 1:]

    def scores(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each attribute, how likely each of its values is in slots [..., D] that hold an object, [..., values]."""
        likely = self._read(slots, self.kind_weight).softmax(dim=-1)  # [..., K]
        scores = {}
        for column, (name, values) in zip(self.kinds.T.to(slots.device), self.attributes.items(), strict=True):
            score = likely.new_zeros(*likely.shape[:-1], len(values))
            scores[name] = score.index_add(-1, column, likely)
        return scores

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
            here = ", ".join(f"{in_words(found)} (slot {k})" for k, found in enumerate(objects) if found)
            how_many = "no object" if not fits else f"{len(fits)} objects"
            raise ValueError(f'{how_many} of the video fit "{words}"; it shows {here or "none"}')
        return fits[0]

    def fingerprint(self) -> str:
        """A hash of what the probe has learned."""
        found = hashlib.sha256(json.dumps(self.attributes).encode())
        for part in (self.weight, self.kinds, self.kind_weight, self.empty_slot):
            found.update(b"" if part is None else part.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `slot_probe.safetensors` into a folder, usually that of the model. Returns its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, "kinds": self.kinds, "kind_weight": self.kind_weight}
        if self.empty_slot is not None:
            tensors["empty_slot"] = self.empty_slot
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        metadata = {"attributes": json.dumps(self.attributes)}
        temporary = folder / f".{_FILE}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(save(tensors, metadata))  # a file of save_file its owner alone could read
            os.replace(temporary, folder / _FILE)
        finally:
            temporary.unlink(missing_ok=True)
        return folder / _FILE

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, revision: str | None = None, **hub) -> "SlotProbe":
        """
        Read it from a folder, or from a model repository on the Hub.

        Args:
            revision: branch, tag or commit on the Hub.
            hub: `token`, `cache_dir`, `local_files_only` of `huggingface_hub.hf_hub_download`.

        Raises `FileNotFoundError` if there is none, `ConnectionError` if the Hub does not say whether there is one, and
        `ValueError` if the file is something else.
        """
        path = Path(name) / _FILE
        if not Path(name).is_dir():
            path = _download(str(name), revision, hub)
        if not path.is_file():
            raise FileNotFoundError(f"{name} holds no {_FILE}: fit a SlotProbe and save it there")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            attributes = json.loads(metadata["attributes"])
            return cls(
                tensors["weight"], tensors.get("empty_slot"), attributes, tensors["kinds"], tensors["kind_weight"]
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{path} is no slot probe ({error!r})") from error


def in_words(found: Mapping[str, str]) -> str:
    """What [`SlotProbe.describe`] tells of an object, as one says it: the shape comes last."""
    return " ".join(found[name] for name in sorted(found, key=lambda name: name == "shape"))


def _download(name: str, revision: str | None, hub: dict) -> Path:
    """The file of a repository; errors as of [`SlotProbe.from_pretrained`]."""
    try:
        return Path(hf_hub_download(name, _FILE, revision=revision, **hub))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{name} holds no {_FILE}: it is neither a folder nor a model on the Hub") from error
    except EntryNotFoundError as error:
        known = try_to_load_from_cache(name, _FILE, cache_dir=hub.get("cache_dir"), revision=revision)
        if isinstance(error, LocalEntryNotFoundError) and known is not _CACHED_NO_EXIST:
            raise _unknown(name, error) from error
        raise FileNotFoundError(f"{name} holds no {_FILE}: fit a SlotProbe and publish it there") from error
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not is_broken_connection(error):
            raise
        raise _unknown(name, error) from error


def _unknown(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"whether {name} holds a {_FILE} is not known: the Hub did not say, and it is not among the files kept from there "
        f"({type(error).__name__}: {str(error).splitlines()[0]}). Try again, or give the folder of a probe"
    )


def _discriminants(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kinds int64 [K, attributes] in labels [n, attributes], and [D + 1, K] of their discriminants in slots x [n, D]."""
    kinds, member = labels.unique(dim=0, return_inverse=True)
    means = x.new_zeros(len(kinds), x.shape[1]).index_add_(0, member, x) / torch.bincount(member)[:, None]
    rest = x - means[member]
    within = rest.T @ rest / len(x)
    # shrunk a little: slots may not use all their numbers
    shrinkage = (1e-3 * x.var(dim=0, correction=0).mean()).clamp(min=1e-12)
    within = within + shrinkage * torch.eye(len(within), dtype=x.dtype)
    weight = torch.linalg.solve(within, means.T)  # [D, K]
    return kinds, torch.cat([weight, -0.5 * (means.T * weight).sum(0, keepdim=True)])


def _ridge(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """[D + 1, outputs] of the regression of y [n, outputs] on x [n, D]; the bias is not penalised."""
    mean, target = x.mean(0), y.mean(0)
    centered = x - mean
    gram = centered.T @ centered / len(x)
    gram = gram + (ridge * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centered.T @ (y - target) / len(x))
    return torch.cat([weight, (target - mean @ weight)[None]])
