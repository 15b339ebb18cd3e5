"""Which way to a product costs less, and how large the pieces are: functions of shapes alone."""

from __future__ import annotations

#: Bytes of temporaries of one block of rows, where a computation goes by blocks of rows.
ROW_BLOCK_BYTES = 64 << 20


def tile_edge(rows: int) -> int:
    """Edge of the largest square tiles of a kernel on a CPU.

    A product of large tiles packs less of its operands per multiplication: with 768 columns and AVX2, 512 rows reach
    95 % of the speed of whole matrices, 256 rows 92 %, 128 rows 83 %. Few rows get smaller tiles, so that threads have
    some to share. The edge is a function of the shape alone: the bits of the result may depend on it.
    """
    return 512 if rows > 2048 else 256 if rows > 512 else 128


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

    Through products of tokens it takes 2 S^2 (di + do) operations per sample, through the gradient 2 S di do.
    """
    return tokens * (inputs + outputs) < inputs * outputs


def ghost_gram_is_cheaper(samples: int, tokens: int, inputs: int, outputs: int) -> bool:
    """The same for all inner products among `samples` gradients.

    Through products of tokens it takes 2 N^2 S^2 (di + do) operations, through gradients 2 N S di do + 2 N^2 di do.
    """
    return samples * tokens**2 * (inputs + outputs) < (tokens + samples) * inputs * outputs
