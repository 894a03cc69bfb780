"""All squared 2-Wasserstein distances between two sets of diagonal Normals:

    W2^2(a_s, b_t) = ||mean_s - mean_t||^2 + ||scale_s - scale_t||^2

Reads 2 (S + T) D numbers, writes S T; 4 S T D floating point operations. (Appendix F of Joy et al. 2022 prints a plus sign in the first
norm: a slip.) One Euclidean distance of the concatenated parameters, so [S, T, D] is never held.
"""

import torch
from torch import Tensor


def pairwise_w2(mean_a: Tensor, scale_a: Tensor, mean_b: Tensor, scale_b: Tensor) -> Tensor:
    """mean_a, scale_a [S, D], mean_b, scale_b [T, D] -> [S, T], float32."""
    a, b = torch.cat([mean_a, scale_a], -1).float(), torch.cat([mean_b, scale_b], -1).float()
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
