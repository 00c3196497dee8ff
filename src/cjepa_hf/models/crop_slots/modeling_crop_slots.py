"""Slots of similar objects that move in front of a known, constant background, small enough for one CPU core.

Two steps. Following is a fixed procedure without learned parts: pixels that differ from the background are shared among
centers that are carried from frame to frame (k-means in which every center has a reach); what no center explains makes a
new one, a center without pixels is given up. Reading is learned, without labels: a small convolutional network looks at a
crop around every center and tells the object's position, its appearance, which an object keeps (a frame is drawn with the
appearance that its objects have in another frame of the video), and its pose, which changes. A decoder that knows only
these draws the objects on the background; the loss is the error of that picture.

Assumptions: the camera does not move and the background is constant and known (`CropSlotsModel.background`, the median of
the training frames); objects are of similar, known size, hardly hide each other, and move by less than a radius per frame.
Colors and shapes may repeat. For other scenes use an encoder with pretrained features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..cjepa.modeling_cjepa import SafePreTrainedModel
from ..images import check_pixel_values
from .configuration_crop_slots import CropSlotsConfig

_ROTATION_SEED = 2603  # one rotation for all models, so that their slots are comparable
_RECENT = 12  # frames after which an object that was lost is not looked for any more


@dataclass
class CropSlotsState(ModelOutput):
    """
    What a video carries from its last frame to the next: `model(later_frames, state=output.state)`.

    Args:
        centers (`torch.Tensor` of shape `[B, N, 2]`): Centroids of the objects' pixels, in units of the view.
        alive (`torch.Tensor` of shape `[B, N]`, bool): Slots that follow an object.
        born, seen (`torch.Tensor` of shape `[B, N]`, int64): Frame in which the slot got its object, and last frame in
            which it was seen; -1: never.
        frame (`torch.Tensor` of shape `[B]`, int64): Frames so far.
        appearance (`torch.Tensor` of shape `[B, N, appearance_size]`): Mean appearance so far.
        weight (`torch.Tensor` of shape `[B, N]`): Frames that this mean is worth.
    """

    centers: torch.Tensor | None = None
    alive: torch.Tensor | None = None
    born: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    frame: torch.Tensor | None = None
    appearance: torch.Tensor | None = None
    weight: torch.Tensor | None = None


@dataclass
class CropSlotsTracks(ModelOutput):
    """
    Which pixels objects have, before anything learned: output of [`CropSlotsModel.follow`].

    Args:
        centers (`torch.Tensor` of shape `[B, T, N, 2]`): Centroids of the objects' pixels, in units of the view.
        alive (`torch.Tensor` of shape `[B, T, N]`, bool): Slots that follow an object.
        born (`torch.Tensor` of shape `[B, T, N]`, int64): Frame in which the slot got this object.
        state ([`CropSlotsState`], *optional*): After the last frame.
    """

    centers: torch.Tensor | None = None
    alive: torch.Tensor | None = None
    born: torch.Tensor | None = None
    state: CropSlotsState | None = None


@dataclass
class CropSlotsOutput(ModelOutput):
    """
    Output of [`CropSlotsModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Sum of the weighted losses, with `return_loss=True`.
        reconstruction_loss (`torch.Tensor` of shape `()`, *optional*): Squared error of the drawn frames, per pixel of an
            object.
        content_loss (`torch.Tensor` of shape `()`, *optional*): Mean squared length of appearance and pose.
        slots (`torch.Tensor` of shape `[B, T, N, D]`): `[position, empty, appearance, pose]`, rotated. A slot without an
            object is `model.empty_slot`, the same in every frame.
        masks (`torch.Tensor` of shape `[B, T, N, H, W]`): Pixels of each object; zero for slots without one.
        present (`torch.Tensor` of shape `[B, T, N]`, bool): Slots that hold an object: its position is inside the view.
        state ([`CropSlotsState`]): For the next frames of the same videos.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    content_loss: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    present: torch.Tensor | None = None
    state: CropSlotsState | None = None


@dataclass
class CropSlotsDecoderOutput(ModelOutput):
    """
    Output of [`CropSlotsModel.decode`].

    Args:
        reconstruction (`torch.Tensor` of shape `[..., 3, H, W]`): The drawn image, RGB in [0, 1].
        masks (`torch.Tensor` of shape `[..., N, H, W]`): How much of each pixel each object covers; the rest is
            background.
    """

    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None


def _random_rotation(size: int) -> torch.Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(_ROTATION_SEED))
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()


def _wave_vectors(count: int, wavelengths) -> torch.Tensor:
    """[count, 2]: geometric wavelengths, directions by the golden ratio."""
    shortest, longest = wavelengths
    index = torch.arange(count, dtype=torch.float64)
    number = 2 * math.pi / (shortest * (longest / shortest) ** (index / max(count - 1, 1)))
    angle = math.pi * ((index * (math.sqrt(5) - 1) / 2) % 1)
    return torch.stack([number * angle.cos(), number * angle.sin()], dim=-1).float()


class CropSlotsEncoder(nn.Module):
    """Crops [K, 5, C, C] (RGB minus background, the object's pixels, inside the picture) -> offset [K, 2], appearance
    [K, appearance_size], pose [K, pose_size]."""

    def __init__(self, config: CropSlotsConfig):
        super().__init__()
        self.config = config
        first, second = config.channels
        self.conv1 = nn.Conv2d(5, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.dense = nn.Linear(second * (config.crop_size // 2) ** 2, config.hidden_size)
        self.read = nn.Linear(config.hidden_size, 2 + config.appearance_size + config.pose_size)

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = F.relu(self.conv2(F.relu(self.conv1(crops), inplace=True)), inplace=True)
        x = self.read(F.relu(self.dense(x.flatten(1)), inplace=True))
        offset, appearance, pose = x.split([2, self.config.appearance_size, self.config.pose_size], dim=-1)
        return self.config.max_offset * torch.tanh(offset), appearance, pose


class CropSlotsDecoder(nn.Module):
    """Points about the middle of each object [K, P, 2] and contents [K, appearance_size + pose_size] -> how much of each
    pixel the object covers [K, P] and its color there [K, P, 3]. It knows no absolute position."""

    def __init__(self, config: CropSlotsConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.place = nn.Linear(5 + 2 * config.num_waves, hidden)
        self.film = nn.ModuleList(
            [nn.Linear(config.appearance_size + config.pose_size, hidden), nn.Linear(hidden, 2 * hidden)]
        )
        self.mlp = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, 4)])

    def forward(
        self, points: torch.Tensor, content: torch.Tensor, waves: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        near = points / self.config.object_radius
        x, y = near.unbind(-1)
        phase = points @ waves.T
        features = torch.cat([near, torch.stack([x * x, y * y, x * y], dim=-1), phase.cos(), phase.sin()], dim=-1)
        scale, shift = self.film[1](F.relu(self.film[0](content))).unsqueeze(1).chunk(2, dim=-1)
        # scaling the projection instead of its result: no pass over the large result
        weight = self.place.weight.T * (1 + scale)
        hidden = F.relu(torch.baddbmm(self.place.bias * (1 + scale) + shift, features, weight), inplace=True)
        drawn = self.mlp[1](F.relu(self.mlp[0](hidden.flatten(0, 1)), inplace=True)).view(*points.shape[:2], 4)
        # objects start as discs
        return (drawn[..., 0] + 3 * (1 - x * x - y * y).clamp(min=-4)).sigmoid(), drawn[..., 1:].sigmoid()


class CropSlotsPreTrainedModel(SafePreTrainedModel):
    config: CropSlotsConfig
    base_model_prefix = "crop_slots"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = False
    memoryless = False
    slots_keep_roles = False  # a slot keeps its object within a video; which object that is depends on the video

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CropSlotsModel):
            init.constant_(module.background, 0.5)
            init.copy_(module.rotation, _random_rotation(self.config.slot_size))
            for buffer in (module.shift, module.appearance_mean, module.pose_mean):
                init.zeros_(buffer)
            for buffer in (module.appearance_scale, module.pose_scale):
                init.ones_(buffer)


class CropSlotsModel(CropSlotsPreTrainedModel):
    r"""
    Slot encoder and decoder for similar objects in front of a constant background (model type `"crop-slots"`).

    A slot keeps its object from frame to frame. An object is there while its position is inside the view; a slot without
    one is exactly `model.empty_slot`. An object that comes in later gets a slot that had none before, if there is one.

    ```python
    processor = CropSlotsImageProcessor.from_pretrained(folder)
    model = CropSlotsModel.from_pretrained(folder)
    slots = model(processor([frames]).pixel_values).slots  # [1, T, N, D] for frames [T, H, W, 3]
    model.positions(slots), model.decode(slots).masks      # [1, T, N, 2] in units of the view, [1, T, N, 64, 64]
    ```
    """

    def __init__(self, config: CropSlotsConfig):
        super().__init__(config)
        self.encoder = CropSlotsEncoder(config)
        self.decoder = CropSlotsDecoder(config)
        self.register_buffer("background", torch.empty(3, config.image_size, config.image_size))  # RGB in [0, 1]
        self.register_buffer("rotation", torch.empty(config.slot_size, config.slot_size))
        # from where the decoder draws objects to the positions in the slots: it may take any point of them for the middle
        self.register_buffer("shift", torch.empty(2))
        self.register_buffer("appearance_mean", torch.empty(config.appearance_size))
        self.register_buffer("pose_mean", torch.empty(config.pose_size))
        self.register_buffer("appearance_scale", torch.empty(()))
        self.register_buffer("pose_scale", torch.empty(()))
        self.post_init()

    @property
    def empty_slot(self) -> torch.Tensor:
        """[D], the slot without an object."""
        return self.rotation[2]

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        state: CropSlotsState | None = None,
        seeds: Sequence[int] | None = None,
        tracks: CropSlotsTracks | None = None,
        return_loss: bool = False,
        chunk_size: int = 256,
        **kwargs,
    ) -> CropSlotsOutput:
        """
        Args:
            pixel_values: float [B, T, 3, H, W], RGB in [0, 1], H = W = image_size (what [`CropSlotsImageProcessor`] returns
                for a list of clips): frames that follow each other.
            state: of the frames before, to go on with a video. A video in parts gives what it gives in one piece.
            seeds: as other video encoders take them; not read, as nothing is random.
            tracks: what [`follow`] found in these frames, where it is known already. Frames then need not follow each other.
            return_loss: also draw the frames and return the (self-supervised) losses. Objects that are in two frames of a
                clip are drawn with each other's appearance.
            chunk_size: frames read at once when no gradient is needed, which bounds memory.

        Returns:
            [`CropSlotsOutput`] with slots [B, T, N, D], masks [B, T, N, H, W] and the state after the last frame (None with
            `tracks`).

        Raises:
            ValueError: wrong shape, channel order, dtype or range, or NaN.
        """
        if kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}:
            raise ValueError(
                f"Unexpected inputs {sorted(kwargs)}; CropSlotsModel takes pixel_values, state, seeds, tracks, "
                "return_loss and chunk_size."
            )
        config = self.config
        check_pixel_values(pixel_values, config.image_size, "CropSlotsImageProcessor", "RGB in [0, 1]", -0.01, 1.01)
        if tracks is not None and (state is not None or tracks.alive.shape[:2] != pixel_values.shape[:2]):
            raise ValueError(
                f"tracks of {tuple(tracks.alive.shape[:2])} frames for pixel_values {tuple(pixel_values.shape)}: give "
                "those of these frames, and no state."
            )
        batch, frames = pixel_values.shape[:2]
        foreground = self._foreground(pixel_values)  # [B, T, H, W]
        start, followed = state, tracks
        if followed is None:
            start = self._start(batch, pixel_values.device) if state is None else state
            followed = self._follow(foreground, start)
        alive = followed.alive
        # crops of all frames at once; only those with an object
        flat = pixel_values.flatten(0, 1).float(), foreground.flatten(0, 1)
        pieces, size = (followed.centers.flatten(0, 1), alive.flatten(0, 1)), batch * frames
        step = size if return_loss or torch.is_grad_enabled() else max(1, chunk_size)
        parts = [self._read(*(x[i : i + step] for x in (*flat, *pieces))) for i in range(0, size, step)]
        position, appearance, pose, share, masks = (torch.cat(p).unflatten(0, (batch, frames)) for p in zip(*parts))

        loss = {}
        if return_loss:
            loss = self._losses(pixel_values, followed, position, appearance, pose, share)
        later = None
        if tracks is None:
            appearance, later = self._remember(followed, appearance, share, start)
        half = position.new_tensor(config.view_size) / 2
        present = alive & (position.abs() < half).all(dim=-1)
        return CropSlotsOutput(
            **loss,
            slots=self._to_slots(position, appearance, pose, present),
            masks=masks * present[..., None, None],
            present=present,
            state=later,
        )

    def follow(self, pixel_values: torch.Tensor, state: CropSlotsState | None = None) -> CropSlotsTracks:
        """Where objects are in pixel_values [B, T, 3, H, W], without anything learned but the background."""
        config = self.config
        check_pixel_values(pixel_values, config.image_size, "CropSlotsImageProcessor", "RGB in [0, 1]", -0.01, 1.01)
        state = self._start(len(pixel_values), pixel_values.device) if state is None else state
        return self._follow(self._foreground(pixel_values), state)

    def decode(self, slots: torch.Tensor, *, chunk_size: int = 256) -> CropSlotsDecoderOutput:
        """
        Draw slots, observed or imagined, on the background. Any number of slots can be drawn together: leave some out to
        draw a scene without them. Slots nearer to an empty one than to an object are not drawn.

        Args:
            slots: [..., N, D].
            chunk_size: scenes drawn at once when no gradient is needed.

        Returns:
            [`CropSlotsDecoderOutput`]: reconstruction [..., 3, H, W] RGB in [0, 1], masks [..., N, H, W].
        """
        position, empty, content = self.split_slots(slots)
        leading = slots.shape[:-2]
        position, content = (x.reshape(-1, *x.shape[-2:]) for x in (position, content))
        present = empty.reshape(len(position), -1) < 0.5
        step = len(position) if torch.is_grad_enabled() else max(1, chunk_size)
        parts = [
            self._draw(*(x[i : i + step] for x in (position, content, present)), masks=True)
            for i in range(0, len(position), step)
        ]
        image, masks = (torch.cat(part) for part in zip(*parts))
        return CropSlotsDecoderOutput(
            reconstruction=image.clamp(0, 1).to(slots.dtype).view(*leading, *image.shape[1:]),
            masks=masks.to(slots.dtype).view(*leading, *masks.shape[1:]),
        )

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the objects of slots [..., N, D] are: [..., N, 2] x (right) and y (down) in units of the view, from its
        middle. An empty slot is in the middle."""
        return self.split_slots(slots)[0].to(slots.dtype)

    def split_slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots [..., N, D] -> positions [..., N, 2], 1 for an empty slot and 0 for an object [..., N], and contents
        [..., N, appearance_size + pose_size], as the decoder takes them (float32)."""
        if slots.dim() < 2 or slots.shape[-1] != self.config.slot_size:
            raise ValueError(f"slots have shape {tuple(slots.shape)}; expected [..., N, {self.config.slot_size}].")
        config = self.config
        with torch.autocast(slots.device.type, enabled=False):
            values = slots.float() @ self.rotation.float().T
        position, empty, appearance, pose, _ = values.split(
            [2, 1, config.appearance_size, config.pose_size, config.slot_size - self._used], dim=-1
        )
        appearance = appearance / self.appearance_scale.float() + self.appearance_mean.float()
        pose = pose / self.pose_scale.float() + self.pose_mean.float()
        return position, empty[..., 0], torch.cat([appearance, pose], dim=-1)

    def set_background(self, background: torch.Tensor):
        """The scene without objects, [3, H, W], RGB in [0, 1]."""
        if background.shape != self.background.shape:
            raise ValueError(
                f"background has shape {tuple(background.shape)}; expected {tuple(self.background.shape)}."
            )
        self.background.copy_(background)

    @torch.no_grad()
    def calibrate(self, pixel_values: torch.Tensor, tracks: CropSlotsTracks) -> dict[str, float]:
        """Set what slots are measured from, by frames [B, T, 3, H, W] with objects: the position of whole objects is, in the
        mean, the centroid of their pixels; appearance and pose have the variances (summed over their numbers) of the
        configuration. Changes every slot the model returns."""
        frames, foreground = pixel_values.flatten(0, 1).float(), self._foreground(pixel_values).flatten(0, 1)
        alive = tracks.alive.flatten(0, 1)
        position, appearance, pose, share, _ = self._read(frames, foreground, tracks.centers.flatten(0, 1), alive)
        whole = alive & (share > 0.9)
        if whole.sum() < 2:
            raise ValueError("fewer than two whole objects in the frames: nothing to take a variance of")
        self.shift.copy_(self.shift + (tracks.centers.flatten(0, 1) - position)[whole].mean(dim=0))
        found = {}
        for name, values in (("appearance", appearance[whole]), ("pose", pose[whole])):
            variance = values.var(dim=0).sum().item()
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            wanted = getattr(self.config, f"{name}_variance")
            getattr(self, f"{name}_scale").fill_((wanted / variance) ** 0.5 if variance > 1e-8 else 1.0)
            found[f"{name}_variance"] = variance
        return found

    # ------------------------------------------------------------------------------------------------- following

    @property
    def _used(self) -> int:
        return 3 + self.config.appearance_size + self.config.pose_size

    def _foreground(self, pixel_values):
        """How much each pixel is of an object, [B, T, H, W] in [0, 1]."""
        difference = (pixel_values.float() - self.background.float()).abs().amax(dim=-3)
        return (difference / self.config.foreground_threshold - 0.5).clamp(0, 1)

    def _lines(self, device):
        """x [W] and y [H] of the pixels, in units of the view."""
        line = (torch.arange(self.config.image_size, device=device) + 0.5) / self.config.image_size - 0.5
        width, height = self.config.view_size
        return line * width, line * height

    def _windows(self, places, height, width):
        """Pixels about places [..., 2]: columns [..., P] and rows [..., P] (int64, some outside of the picture) of windows
        of height x width pixels, and the points they are at [..., P, 2]."""
        view = places.new_tensor(self.config.view_size)
        size = self.config.image_size
        extent = places.new_tensor([width, height])
        first = ((places / view + 0.5) * size - extent / 2).round().clamp(-2 * size, 2 * size).long()
        column, row = torch.arange(width, device=places.device), torch.arange(height, device=places.device)
        columns = (first[..., :1] + column).unsqueeze(-2).expand(*first.shape[:-1], height, width).flatten(-2)
        rows = (first[..., 1:] + row).unsqueeze(-1).expand(*first.shape[:-1], height, width).flatten(-2)
        points = ((torch.stack([columns, rows], dim=-1) + 0.5) / size - 0.5) * view
        return columns, rows, points

    def _inside(self, columns, rows):
        size = self.config.image_size
        inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
        return inside, rows.clamp(0, size - 1) * size + columns.clamp(0, size - 1)

    def _own_pixels(self, foreground, centers, alive):
        """Shares of the pixels about the centers that belong to each object [B, N, P] (of crop_size x crop_size windows),
        their points [B, N, P, 2], places in the picture [B, N, P] and whether these are inside [B, N, P]."""
        config = self.config
        columns, rows, points = self._windows(centers, config.crop_size, config.crop_size)
        inside, index = self._inside(columns, rows)
        weight = foreground.flatten(1).gather(1, index.flatten(1)).view_as(index) * inside
        # |p - c|^2 - |p|^2 of all points p and centers c, [B, N, N * P]
        length = centers.square().sum(dim=-1, keepdim=True).masked_fill(~alive.unsqueeze(-1), math.inf)
        distance = torch.baddbmm(length, centers, points.flatten(1, 2).mT, alpha=-2).unflatten(2, index.shape[1:])
        own = distance.diagonal(dim1=1, dim2=2).mT  # [B, N, P]
        reach = (config.gate * config.object_radius) ** 2
        mine = (own <= distance.amin(dim=1)) & (own + points.square().sum(dim=-1) < reach)
        return weight * mine, points, index, inside

    def _shift(self, foreground, centers, alive, rounds):
        """Move centers to the centroids of their pixels; returns them and the numbers of their pixels."""
        for _ in range(rounds):
            weight, points, _, _ = self._own_pixels(foreground, centers, alive)
            mass = weight.sum(dim=-1)
            moved = (weight.unsqueeze(-1) * points).sum(dim=-2) / mass.clamp(min=1e-6).unsqueeze(-1)
            centers = torch.where((alive & (mass > 0)).unsqueeze(-1), moved, centers)
        return centers, mass

    def _unexplained(self, foreground, centers, alive):
        """Where the most foreground without an object is, which takes a whole picture: its place [B, 2] and how many pixels
        it has."""
        config = self.config
        (x, y), (wide, high) = self._lines(foreground.device), config.view_size
        reach = torch.where(alive, (config.gate * config.object_radius) ** 2, -1.0)[:, :, None, None]
        dx, dy = (x - centers[..., :1]).square(), (y - centers[..., 1:]).square()
        explained = (dx.unsqueeze(-2) + dy.unsqueeze(-1) < reach).any(dim=1)
        rest = foreground * ~explained
        radius = config.object_radius * config.image_size
        half = max(1, round(radius / high)), max(1, round(radius / wide))
        box = [2 * h + 1 for h in half]
        rows = F.avg_pool2d(rest.unsqueeze(1), (box[0], 1), stride=1, padding=(half[0], 0))
        pooled = F.avg_pool2d(rows, (1, box[1]), stride=1, padding=(0, half[1]))
        most, place = (pooled.flatten(1) * (box[0] * box[1])).max(dim=1)
        return torch.stack([x[place % config.image_size], y[place // config.image_size]], dim=-1), most

    def _start(self, batch, device) -> CropSlotsState:
        shape = batch, self.config.num_slots
        never = torch.full(shape, -1, device=device)
        return CropSlotsState(
            centers=torch.zeros(*shape, 2, device=device),
            alive=torch.zeros(shape, dtype=torch.bool, device=device),
            born=never,
            seen=never,
            frame=torch.zeros(batch, dtype=torch.int64, device=device),
            appearance=torch.zeros(*shape, self.config.appearance_size, device=device),
            weight=torch.zeros(shape, device=device),
        )

    @torch.no_grad()
    def _follow(self, foreground, state: CropSlotsState) -> CropSlotsTracks:
        config = self.config
        centers, alive, born, seen, now = state.centers, state.alive, state.born, state.seen, state.frame
        slot = torch.arange(config.num_slots, device=foreground.device)
        pair = slot[:, None] > slot
        least, total = config.birth_share * config.object_area, foreground.sum(dim=(-2, -1))
        history = []
        for t, frame in enumerate(foreground.unbind(1)):
            centers, mass = self._shift(frame, centers, alive, 2)
            alive = alive & (mass > config.death_share * config.object_area)
            for _ in range(config.num_slots):
                # a pixel within reach of an object is one object's: what is left needs no look at the picture
                birth = (total[:, t] - (mass * alive).sum(dim=1) > least) & ~alive.all(dim=1)
                if not birth.any():
                    break
                place, most = self._unexplained(frame, centers, alive)
                birth = birth & (most > least)
                if not birth.any():
                    break
                # An object that was just lost here; else a slot that had none; else the one that is empty for longest.
                away = (centers - place[:, None]).square().sum(dim=-1).sqrt()
                lost = (seen >= 0) & (now[:, None] - seen <= _RECENT) & (away < 2 * config.object_radius)
                cost = torch.where(seen < 0, 100.0 + slot, 1000.0 + seen)
                cost = torch.where(lost, away, cost).masked_fill(alive, math.inf)
                new = birth[:, None] & (slot == cost.argmin(dim=1, keepdim=True))
                born = torch.where(new & ~lost, now[:, None], born)
                alive, centers = alive | new, torch.where(new.unsqueeze(-1), place[:, None], centers)
                centers, mass = self._shift(frame, centers, alive, 3)
            # two centers on one object: the younger one goes
            near = (centers.unsqueeze(2) - centers.unsqueeze(1)).square().sum(dim=-1) < config.object_radius**2
            younger = (born.unsqueeze(2) > born.unsqueeze(1)) | ((born.unsqueeze(2) == born.unsqueeze(1)) & pair)
            alive = alive & ~(near & younger & alive.unsqueeze(1)).any(dim=2)
            seen = torch.where(alive, now[:, None], seen)
            history.append((centers, alive, born))
            now = now + 1
        followed = (torch.stack(x, dim=1) for x in zip(*history))
        later = CropSlotsState(
            centers=centers, alive=alive, born=born, seen=seen, frame=now,
            appearance=state.appearance, weight=state.weight,
        )  # fmt: skip
        return CropSlotsTracks(*followed, state=later)

    def _spread(self, values, index):
        """Values [B, N, P] of pixels, put at their places in pictures [B, N, H, W]."""
        size = self.config.image_size
        pictures = values.new_zeros(*values.shape[:2], size * size)
        return pictures.scatter_add_(2, index, values).unflatten(-1, (size, size))

    # --------------------------------------------------------------------------------------------------- reading

    def _read(self, frames, foreground, centers, alive):
        """frames [B, 3, H, W], foreground [B, H, W], centers [B, N, 2], alive [B, N] -> position [B, N, 2], appearance
        [B, N, ...], pose [B, N, ...], share of the object that is visible [B, N] and its pixels [B, N, H, W]; zero where there
        is no object."""
        config, size = self.config, self.config.crop_size
        weight, _, index, inside = self._own_pixels(foreground, centers, alive)
        masks = self._spread(weight, index)
        which = alive.flatten().nonzero()[:, 0]
        picture = which // config.num_slots
        weight, index, inside = (x.flatten(0, 1)[which] for x in (weight, index, inside))
        difference = (frames - self.background.float()).flatten(2)
        pixels = difference[picture[:, None], :, index] * inside.unsqueeze(-1)  # [K, P, 3]
        crops = torch.cat([pixels, weight.unsqueeze(-1), inside.unsqueeze(-1)], dim=-1)
        crops = crops.transpose(1, 2).unflatten(-1, (size, size)).to(self.dtype)
        offset, appearance, pose = (x.float() for x in self.encoder(crops))
        share = weight.sum(dim=-1) / config.object_area

        def spread(values):
            shape = alive.shape + values.shape[1:]
            return values.new_zeros(alive.numel(), *values.shape[1:]).index_copy(0, which, values).view(shape)

        return (
            centers + spread(offset + self.shift.float()),
            spread(appearance),
            spread(pose),
            spread(share),
            masks.to(self.dtype),
        )

    def _remember(self, followed, appearance, share, state):
        """Running means of the appearance [B, T, N, A], in which frames count that show a whole object, and the state."""
        mean, total = state.appearance.to(appearance), state.weight.to(appearance)
        weights = share.clamp(0, 1).square() * followed.alive + 1e-4
        before, means = state.born, []
        for t in range(appearance.shape[1]):
            born, alive = followed.born[:, t], followed.alive[:, t]
            total = torch.where(born == before, total, 0.0)
            total = torch.where(alive, (total + weights[:, t]).clamp(max=self.config.memory), total)
            change = torch.where(alive, weights[:, t] / total.clamp(min=1e-6), 0.0)
            mean = mean + change.unsqueeze(-1) * (appearance[:, t] - mean)
            before = born
            means.append(mean)
        later = followed.state
        later.appearance, later.weight = mean.detach(), total.detach()
        return torch.stack(means, dim=1), later

    def _to_slots(self, position, appearance, pose, present):
        with torch.autocast(position.device.type, enabled=False):
            appearance = (appearance - self.appearance_mean.float()) * self.appearance_scale.float()
            pose = (pose - self.pose_mean.float()) * self.pose_scale.float()
            values = torch.cat([position, torch.zeros_like(position[..., :1]), appearance, pose], dim=-1)
            slots = values @ self.rotation[: self._used].float()
        return torch.where(present.unsqueeze(-1), slots.to(self.dtype), self.empty_slot.to(self.dtype))

    # --------------------------------------------------------------------------------------------------- drawing

    def _draw(self, position, content, present, *, masks=False):
        """position [B, N, 2], content [B, N, C], present [B, N] -> pictures [B, 3, H, W] and, if asked for, how much of
        every pixel each object covers [B, N, H, W]."""
        config, size = self.config, self.config.image_size
        batch, num_slots = present.shape
        reach = config.gate * config.object_radius * size
        width, height = (2 * math.ceil(reach / extent) + 1 for extent in config.view_size)
        which = present.flatten().nonzero()[:, 0]
        position, content = position.flatten(0, 1)[which] - self.shift.float(), content.flatten(0, 1)[which]
        columns, rows, points = self._windows(position.detach(), height, width)
        inside, index = self._inside(columns, rows)
        cover, color = self.decoder(
            (points - position.unsqueeze(1)).to(self.dtype),
            content.to(self.dtype),
            _wave_vectors(config.num_waves, config.wavelengths).to(position.device, self.dtype),
        )
        cover, color = cover.float() * inside, color.float()
        painted = torch.cat([cover.unsqueeze(-1), cover.unsqueeze(-1) * color], dim=-1).flatten(0, 1)
        place = ((which // num_slots)[:, None] * size**2 + index).flatten()
        canvas = painted.new_zeros(batch * size**2, 4).index_add(0, place, painted)
        canvas = canvas.view(batch, size, size, 4).permute(0, 3, 1, 2)
        covered = canvas[:, :1]
        image = canvas[:, 1:] / covered.clamp(min=1) + self.background.float() * (1 - covered.clamp(max=1))
        if not masks:
            return image, None
        alone = cover.new_zeros(batch * num_slots, size, size)
        alone[which] = self._spread(cover[None], index[None])[0]
        return image, alone.view(batch, num_slots, size, size) / covered.clamp(min=1)

    def _losses(self, pixel_values, followed, position, appearance, pose, share):
        config, alive = self.config, followed.alive
        # each frame of a clip is drawn with the appearances that its objects have in another frame, if they are well seen
        other = (x.roll(1, dims=1) for x in (appearance, alive, followed.born, share))
        other_appearance, other_alive, other_born, other_share = other
        same = alive & other_alive & (followed.born == other_born) & (other_share > 0.5)
        content = torch.cat([torch.where(same.unsqueeze(-1), other_appearance, appearance), pose], dim=-1)
        noisy = content + config.content_noise * torch.randn_like(content) if self.training else content
        image, _ = self._draw(*(x.flatten(0, 1) for x in (position, noisy, alive)))
        error = (image - pixel_values.flatten(0, 1).float()).square().sum()
        count = alive.sum().clamp(min=1)
        reconstruction = error / (3 * config.object_area * count)
        size = (content.square().sum(dim=-1) * alive).sum() / count
        return {
            "loss": reconstruction + config.content_loss_weight * size,
            "reconstruction_loss": reconstruction,
            "content_loss": size,
        }


__all__ = [
    "CropSlotsDecoderOutput",
    "CropSlotsModel",
    "CropSlotsOutput",
    "CropSlotsPreTrainedModel",
    "CropSlotsState",
    "CropSlotsTracks",
]
