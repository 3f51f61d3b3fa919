"""Noise on a draft's input features in training, to make it robust to its own imprecise features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Length at which the noise has its full amplitude (https://github.com/SafeAILab/EAGLE: 512 / T).
FULL_LENGTH = 512


def feature_noise(features: Tensor, document_ids: Tensor, amplitude: float, seed: int) -> Tensor:
    """Return uniform noise for features, [B, T, H]: within plus or minus ``amplitude * 512 / L``.

    Args:
        features: The features, [B, T, H].
        document_ids: Which document a token belongs to, [B, T]; L is its document's length.
        amplitude: The bound for a document of 512 tokens (arXiv 2401.15077, section 4: 0.1).
        seed: Random seed; a resumed run uses the same seeds and thus the same noise.
    """
    generator = torch.Generator(features.device).manual_seed(seed)
    uniform = torch.rand(features.shape, generator=generator, device=features.device, dtype=torch.float32)
    documents = F.pad(document_ids.diff(dim=1) != 0, (1, 0)).cumsum(1)  # padding counts as a separate document
    counts = torch.zeros_like(documents)
    lengths = counts.scatter_add(1, documents, torch.ones_like(documents)).gather(1, documents)
    bound = amplitude * FULL_LENGTH / lengths
    return ((2 * uniform - 1) * bound[..., None]).to(features.dtype)
