"""Where the next token goes, on the device: what a decode step needs to know and what no two steps share."""

from __future__ import annotations

import torch

POSITION = 0  # entry of the position; a layer's slot is behind it


class StepClock:
    """Per device (1 + num_layers,) int64: the position of the newest token, and its slot in the window of each layer.

    Kernels read it, so a step that was recorded in a CUDA graph can be replayed for the tokens that follow. The host
    knows what the device holds and writes only what is wrong: nothing in a decode step behind another one.
    """

    def __init__(self, num_layers: int) -> None:
        self._entries = 1 + num_layers
        self._held: dict[torch.device, torch.Tensor] = {}
        self._known: dict[torch.device, list[int]] = {}

    def entry(self, device: torch.device, index: int, value: int) -> torch.Tensor:
        """(1,) view of an entry, which holds ``value``."""
        if device not in self._held:
            self._held[device] = torch.full((self._entries,), -1, dtype=torch.int64, device=device)
            self._known[device] = [-1] * self._entries
        view = self._held[device][index : index + 1]
        if self._known[device][index] != value:
            view.fill_(value)
            self._known[device][index] = value
        return view

    def advance(self) -> None:
        """One token further, in all layers."""
        for held in self._held.values():
            held += 1
        self.follow()

    def follow(self) -> None:
        """The host's part of ``advance``: the device was advanced by a replay."""
        self._known = {device: [x + 1 for x in known] for device, known in self._known.items()}

    @property
    def nbytes(self) -> int:
        """Bytes on all devices, also while no step has asked for them."""
        return 8 * self._entries * max(len(self._held), 1)
