"""Row sums of log softmax(logits)[token] over the positions that hold a token: padding counts nowhere.

    tokens [P, T], logits [K, P, T, V] -> [K, P];   log p = sum_{t: token != padding} logit[token] - logsumexp_v logit[v]

Reads K P T V logits; holds no table of probabilities beyond what cross entropy itself saves.
"""

import torch.nn.functional as F
from torch import Tensor


def token_log_prob(tokens: Tensor, logits: Tensor, padding: int) -> Tensor:
    """Categorical log probability of token rows; `padding` is the id that is skipped."""
    num, rows, length, vocabulary = logits.shape
    target = tokens.expand(num, rows, length).reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, vocabulary), target, ignore_index=padding, reduction="none")
    return -loss.view(num, rows, length).sum(-1)
