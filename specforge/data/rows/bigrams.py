"""Bigram table: the most frequent successor of each token in the training rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge.data.rows.cache import ensure_folder
from specforge.data.rows.reading import TokenRows

_TABLE = "bigrams.safetensors"


def count_successors(rows: TokenRows) -> Tensor:
    """Return the most frequent supervised successor of each token, int64 [V]; -1 if there is none.

    Ties go to the lowest id.
    """
    size = rows.vocabulary_size
    pairs = []
    for number in range(len(rows)):
        row = rows[number]
        ids = row["input_ids"].numpy()
        pairs.append((ids[:-1] * size + ids[1:])[row["loss_mask"].numpy()[1:]])
    found, counts = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]), return_counts=True)
    # Stable: among equal counts the lowest pair stays first.
    order = np.argsort(-counts, kind="stable")
    tokens, indices = np.unique(found[order] // size, return_index=True)
    successors = torch.full((size,), -1, dtype=torch.int64)
    successors[torch.from_numpy(tokens)] = torch.from_numpy(found[order][indices] % size)
    return successors


def bigram_table(rows: TokenRows, identity: str, cache_dir: Path) -> Path:
    """Return the table file for the proposal method ``bigram``; count it if the cache has none.

    Args:
        rows: The training rows.
        identity: Identity of the rows.
        cache_dir: Folder of the caches.

    Raises:
        SpecforgeError: The cache cannot be written.
    """
    key = hashlib.sha256(json.dumps([identity, len(rows), rows.summary.tokens]).encode()).hexdigest()
    folder = cache_dir / key
    ensure_folder(
        folder,
        lambda target: save_file({"successors": count_successors(rows)}, target / _TABLE),
        lambda existing: (existing / _TABLE).is_file(),
    )
    return folder / _TABLE
