"""Which expert's rows the tiles of grouped products have: found on the device, once for all products of a pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion_kernels.mlp import _triton_tiles as kernels
from fusion_kernels.mlp.triton_launch import start

#: Tiles that a program enters at a time.
_ENTERED = 128


@dataclass(frozen=True, eq=False)
class ExpertTiles:
    """Which rows each expert owns, and the tiles of them.

    The host does not read the offsets, and experts without rows are fine. Rows that no expert owns are in no tile.

    Attributes:
        offsets: (E + 1,) int32 on the device; expert e owns the rows `offsets[e]` to `offsets[e + 1]`.
        rows: how many there are, owned or not.
    """

    offsets: Tensor
    rows: int
    _maps: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    def count(self, height: int) -> int:
        """How many tiles of at most `height` rows there are, at most: each expert's last one may not be full."""
        return self.rows // height + min(self.experts, self.rows)

    def map(self, height: int) -> Tensor:
        """(count, 3) int32: expert, first row and end of the rows of every tile of at most `height` rows.

        First those of the first expert with rows, in their order, and so on; tiles that are left over end at row 0.
        """
        if height not in self._maps:
            tiles, E = self.count(height), self.experts
            found = torch.empty(tiles, 3, dtype=torch.int32, device=self.offsets.device)
            start(
                kernels._tile_map_kernel,
                0 if tiles == 0 else E + 1,
                self.offsets,
                offsets_ptr=self.offsets,
                map_ptr=found,
                tiles=tiles,
                height=height,
                E=E,
                BE=1 << (E - 1).bit_length(),
                BT=_ENTERED,
                num_warps=4,
                num_stages=1,
            )
            self._maps[height] = found
        return self._maps[height]
