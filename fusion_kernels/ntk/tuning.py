"""Which form of a product costs less, and how large the pieces are: functions of shapes alone."""

from __future__ import annotations

import torch

#: Bytes of temporaries of one block of rows, where a computation goes by blocks of rows.
ROW_BLOCK_BYTES = 64 << 20


def tile_edge(rows: int, dtype: torch.dtype) -> int:
    """Edge of the square tiles of a kernel on a CPU.

    Three tiles (inputs, slopes, sum) lie in a 2 MiB second-level cache beside the rows that they are products of. Few
    rows get smaller ones, so that half a symmetric kernel is nearer to half the work and threads have tiles to share.
    The edge is a function of the shape alone: the bits of the result may depend on it.
    """
    largest = 384 if dtype == torch.float32 else 256
    return largest if rows > 4 * largest else 128


def row_block(bytes_per_row: int) -> int:
    """How many rows at a time keep their temporaries below `ROW_BLOCK_BYTES`; at least one."""
    return max(1, ROW_BLOCK_BYTES // max(1, bytes_per_row))


def gram_is_cheaper(rows: int, width: int, columns: int, uses: int = 1) -> bool:
    """Whether F F' V, for F (rows, width) and V (rows, columns), costs less through the Gram matrix F F'.

    Through the factor it takes 4 rows width columns operations, through a Gram matrix that serves `uses` such products
    2 rows^2 columns and its share of 2 rows^2 width.
    """
    return rows * (columns * uses + width) < 2 * width * columns * uses


def ghost_norm_is_cheaper(tokens: int, inputs: int, outputs: int) -> bool:
    """Whether the norm of a linear layer's gradient over `tokens` costs less without forming the gradient.

    The ghost form takes 2 S^2 (di + do) operations per sample, the gradient 2 S di do.
    """
    return tokens * (inputs + outputs) < inputs * outputs


def ghost_gram_is_cheaper(samples: int, tokens: int, inputs: int, outputs: int) -> bool:
    """The same for all inner products among `samples` gradients.

    The ghost form takes 2 N^2 S^2 (di + do) operations, gradients 2 N S di do + 2 N^2 di do.
    """
    return samples * tokens**2 * (inputs + outputs) < (tokens + samples) * inputs * outputs
