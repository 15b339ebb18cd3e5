"""Text with masked tokens: blocks between the tokenizer's special tokens, and masks that a resumed run draws again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling

from mlp_fusion.errors import InputError
from mlp_fusion.finetuning.data import Rows, blocks


def masked_blocks(rows: Rows, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Texts end to end, a separator between them, in blocks with the special tokens that a text of its own would have.

    Args:
        rows: the texts.
        tokenizer: its end-of-text token separates texts; where it has none, its separator.
        length: tokens of a block, special ones among them.

    Returns:
        Token ids `(blocks, length)`, and True where they are the text's own and may be masked. What does not fill a
        block at the end is left out; text shorter than one block is one shorter block.

    Raises:
        InputError: there is no token, or no place for one.
    """
    # Long documents are meant here: the tokenizer's warning about its model's length would mislead.
    encoded = tokenizer(rows.texts, return_special_tokens_mask=True, verbose=False)
    texts = list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
    known = next(((ids, special) for ids, special in texts if not all(special)), None)
    if known is None:
        raise InputError(f"{rows.source}: no token in it: there is nothing to predict")
    ids, special = known
    before, behind = (sum(1 for _ in itertools.takewhile(bool, side)) for side in (special, special[::-1]))
    if length <= before + behind:
        raise InputError(f"{length} tokens hold the tokenizer's {before + behind} special ones alone: give more")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream: list[int] = []
    for found, _ in texts:
        stream += found[before : len(found) - behind] + ([] if end is None else [end])
    inner = blocks(stream, length - before - behind)
    parts = (torch.tensor(ids[:before]), torch.tensor(ids[len(ids) - behind :]))
    first, last = (part.long().expand(len(inner), -1) for part in parts)
    own = inner != (-1 if end is None else end)
    sides = (torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(last, dtype=torch.bool))
    return torch.cat([first, inner, last], 1), torch.cat([sides[0], own, sides[1]], 1)


class MaskedText(Dataset[dict[str, Tensor]]):
    """Blocks of text with masks that are a function of the seed, the epoch and the block alone.

    Entry `epoch * len(self) + block` is the block as it is masked in that epoch, by transformers'
    `DataCollatorForLanguageModeling`. (A mask drawn where batches are collated would differ in a run that is resumed:
    batches are fetched ahead of the step that a checkpoint is made at.)

    Args:
        ids, own: as :func:`masked_blocks` gives them.
        tokenizer: that made them.
        share: of the text's tokens that are masked.
        seed: of the masks.
        name: of the data; masks of other data are others.

    Raises:
        InputError: the tokenizer has no token to mask with.
    """

    def __init__(self, ids: Tensor, own: Tensor, tokenizer: Any, share: float, seed: int, name: str) -> None:
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token: set one that the teacher was trained with")
        self.ids, self.special, self.seed, self.name = ids, ~own, seed, name
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
        self.collator.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        words = f"{self.name} {self.seed} {number}".encode()
        # Four bytes are all that the generator takes of a seed.
        seed = int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big")
        self.collator.generator.manual_seed(seed)
        at = slice(number % len(self), number % len(self) + 1)
        ids, labels = self.collator.torch_mask_tokens(self.ids[at].clone(), special_tokens_mask=self.special[at])
        return {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": labels[0]}

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Entries together."""
        rows = [self[number] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
