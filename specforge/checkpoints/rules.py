"""Rules for the files of a draft that hold whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specforge.checkpoints.layout import StoredDraft


def file_faults(stored: StoredDraft) -> Iterator[str]:
    """Yield tensors that are no numbers, and types that are not what ``config.json`` says."""
    floating = {name: one for name, one in stored.tensors.items() if one.is_floating_point()}
    for name, tensor in floating.items():
        if not bool(torch.isfinite(tensor).all()):
            yield f"{name} holds values that are not finite, such as {float(tensor[~torch.isfinite(tensor)][0])}"
    types = sorted({str(one.dtype).removeprefix("torch.") for one in floating.values()})
    said = stored.config.get("dtype") or stored.config.get("torch_dtype")
    if types != [said]:
        yield f"config.json says the dtype {said!r}, but the tensors are {' and '.join(types)}"
