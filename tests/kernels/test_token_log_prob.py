"""Laws of the log probability of tokens, from logits and through the output layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meme_kernels import projected_token_log_prob as projected
from meme_kernels.projected_token_log_prob import projected_token_log_prob
from meme_kernels.token_log_prob import token_log_prob
from tests.kernels.catalogue import LANE

WIDE = torch.float64
PADDING = 0


def drawn(device: torch.device, num: int = 2, rows: int = 3, length: int = 4, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    """Tokens with some padding in each row, and logits."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, (rows, length), generator=generator)
    tokens[:, -1] = PADDING
    logits = 3 * torch.randn(num, rows, length, vocabulary, generator=generator, dtype=WIDE)
    return tokens.to(device), logits.to(device)


def layer(device: torch.device, biased: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tokens, hidden, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 9, (3, 4), generator=generator)
    tokens[:, -1] = PADDING
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=WIDE) for shape in ((2, 3, 4, 5), (9, 5)))
    bias = torch.randn(9, generator=generator, dtype=WIDE).to(device).requires_grad_() if biased else None
    return tokens.to(device), hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), bias


@pytest.mark.parametrize("vocabulary", [2, 11, 64, 2049])
def test_value_equals_torch_distributions_and_cross_entropy(device: torch.device, vocabulary: int) -> None:
    tokens, logits = drawn(device, vocabulary=vocabulary)
    logits.requires_grad_()
    found = token_log_prob(tokens, logits, PADDING)
    kept = tokens != PADDING
    torch.testing.assert_close(found, (Categorical(logits=logits).log_prob(tokens) * kept).sum(-1))
    loss = F.cross_entropy(logits.flatten(0, 2), tokens.expand(2, -1, -1).flatten(), ignore_index=PADDING, reduction="sum")
    torch.testing.assert_close(found.sum(), -loss)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(-loss, logits))


@pytest.mark.parametrize("at", [0, 2047, 2048, 4999])
def test_the_largest_logit_may_be_anywhere(device: torch.device, at: int) -> None:
    tokens, logits = drawn(device, 1, 1, 2, vocabulary=5000)
    logits[..., at] += 20.0
    torch.testing.assert_close(token_log_prob(tokens, logits, PADDING)[:, 0], Categorical(logits=logits[:, 0, 0]).log_prob(tokens[0, 0]))


def test_gradient_is_one_hot_minus_softmax_times_the_upstream_one(device: torch.device) -> None:
    tokens, logits = drawn(device)
    upstream = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]], dtype=WIDE, device=device)
    (found,) = torch.autograd.grad(token_log_prob(tokens, logits.requires_grad_(), PADDING), logits, upstream)
    expected = (F.one_hot(tokens, 11) - logits.softmax(-1)) * (tokens != PADDING)[..., None] * upstream[..., None, None]
    torch.testing.assert_close(found, expected)


def test_a_common_shift_of_the_logits_changes_nothing(device: torch.device) -> None:
    tokens, logits = drawn(device)
    answers = []
    for shift in (0.0, 1024.0, -1024.0):
        x = (logits.float().mul(64).round() / 64 + shift).requires_grad_()  # these numbers shift without rounding
        value = token_log_prob(tokens, x, PADDING)
        answers.append((value, *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])


def test_a_row_of_padding_gives_zero_and_no_gradient(device: torch.device) -> None:
    tokens, logits = drawn(device)
    tokens[1] = PADDING
    value = token_log_prob(tokens, logits.requires_grad_(), PADDING)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert bool((value[:, 1] == 0).all()) and bool((gradient[:, 1] == 0).all()) and bool((value[:, 0] < 0).all())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_logits_at_padding_reach_nothing(device: torch.device, garbage: float) -> None:
    tokens, logits = drawn(device)
    answers = []
    for content in (0.0, garbage):
        x = torch.where((tokens == PADDING)[..., None], content, logits).requires_grad_()
        value = token_log_prob(tokens, x, PADDING)
        answers.append((value, *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


@pytest.mark.parametrize("padding", [-100, -1, 3, 11, 10**12])
def test_padding_may_be_any_number(device: torch.device, padding: int) -> None:
    tokens, logits = drawn(device)
    tokens[tokens == 3] = 4
    marked = tokens.masked_fill(tokens == PADDING, padding)
    torch.testing.assert_close(token_log_prob(marked, logits, padding), token_log_prob(tokens, logits, PADDING))


def test_forbidden_entries_have_no_probability(device: torch.device) -> None:
    """As if they were not in the vocabulary; a whole chunk of it may be forbidden."""
    tokens, logits = drawn(device, vocabulary=2060)
    tokens = tokens.clamp(max=9)
    forbidden = torch.full((2, 3, 4, 2050), -torch.inf, dtype=WIDE, device=device)
    x = torch.cat([logits[..., :10], forbidden], -1).requires_grad_()
    few = logits[..., :10].detach().requires_grad_()
    found, expected = token_log_prob(tokens, x, PADDING), token_log_prob(tokens, few, PADDING)
    torch.testing.assert_close(found, expected)
    (gradient,), (right,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(gradient[..., :10], right)
    assert bool((gradient[..., 10:] == 0).all())
    last = torch.cat([forbidden, logits[..., :10]], -1)
    torch.testing.assert_close(token_log_prob(torch.where(tokens == PADDING, PADDING, tokens + 2050), last, PADDING), expected)


def test_a_forbidden_token_is_impossible(device: torch.device) -> None:
    tokens, logits = drawn(device)
    logits[0, 0, 0, tokens[0, 0]] = -torch.inf
    value = token_log_prob(tokens, logits, PADDING)
    assert value[0, 0] == -torch.inf and bool(value.flatten()[1:].isfinite().all())


def test_packed_rows_take_the_tokens_of_their_source(device: torch.device) -> None:
    tokens, _ = drawn(device, rows=5)
    row = torch.tensor([4, 0, 0, 2, 3, 4, 1], device=device)
    _, logits = drawn(device, rows=7)
    torch.testing.assert_close(token_log_prob(tokens, logits, PADDING, row=row), token_log_prob(tokens[row], logits, PADDING))


@pytest.mark.parametrize("wrong", [-1, 11, 2**40])
def test_ids_outside_the_vocabulary_do_not_pass_unnoticed(device: torch.device, wrong: int) -> None:
    tokens, logits = drawn(device)
    tokens[1, 2] = wrong
    if LANE == "plain":
        with pytest.raises(ValueError, match="expected ids from 0 to 10"):
            token_log_prob(tokens, logits, PADDING)
    else:
        value = token_log_prob(tokens, logits, PADDING)
        assert bool(value[:, 1].isnan().all()) and bool(value[:, [0, 2]].isfinite().all())


@pytest.mark.parametrize("padding", [PADDING, -1])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_source_rows_that_do_not_exist_do_not_pass_unnoticed(device: torch.device, wrong: int, projected: bool, padding: int) -> None:
    row = torch.tensor([0, wrong, 2], device=device)

    def call() -> Tensor:
        if not projected:
            return token_log_prob(*drawn(device), padding, row=row)
        return projected_token_log_prob(*layer(device), padding, row=row)

    if LANE == "plain":
        with pytest.raises(ValueError, match=r"row: expected numbers of the 3 rows, from 0 to 2, got"):
            call()
    else:
        value = call()
        assert bool(value[:, 1].isnan().all()) and bool(value[:, [0, 2]].isfinite().all())


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    tokens, logits = drawn(device)
    row = torch.zeros(2, dtype=torch.int64, device=device)
    for arguments, settings in (
        ((tokens[:2], logits, 0), {}),
        ((tokens[:, :2], logits, 0), {}),
        ((tokens.int(), logits, 0), {}),
        ((tokens, logits, 0), {"row": row}),
        ((tokens, logits[0], 0), {}),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            token_log_prob(*arguments, **settings)


# ---- through the output layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 9, 40, 100, 2**25])
@pytest.mark.parametrize("biased", [False, True])
def test_projected_equals_unprojected_in_value_and_gradients(device: torch.device, chunk: int, biased: bool) -> None:
    tokens, hidden, weight, bias = layer(device, biased)
    row = torch.tensor([2, 0, 1], device=device)
    upstream = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]], dtype=WIDE, device=device)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    found = projected_token_log_prob(tokens, hidden, weight, bias, PADDING, row=row, chunk=chunk)
    expected = token_log_prob(tokens, F.linear(hidden, weight, bias), PADDING, row=row)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_hidden_at_padding_reaches_nothing(device: torch.device, garbage: float) -> None:
    tokens, hidden, weight, bias = layer(device)
    assert bias is not None
    answers = []
    for content in (0.0, garbage):
        x = torch.where((tokens == PADDING)[..., None], content, hidden.detach()).requires_grad_()
        value = projected_token_log_prob(tokens, x, weight, bias, PADDING, chunk=30)
        answers.append((value, *torch.autograd.grad(value.sum(), (x, weight, bias))))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


def test_no_more_logits_are_held_than_a_chunk(device: torch.device) -> None:
    tokens = torch.randint(1, 64, (8, 16), device=device)
    hidden = torch.randn(2, 8, 16, 4, device=device, requires_grad=True)
    weight = torch.randn(64, 4, device=device, requires_grad=True)
    with Largest() as largest:
        value = projected_token_log_prob(tokens, hidden, weight, None, PADDING, chunk=2048)
        value.sum().backward()
    assert largest.bytes == 4 * 2048  # of 2 * 8 * 16 * 64 = 16384 logits


def test_logits_are_not_kept_for_the_backward_pass(device: torch.device) -> None:
    tokens = torch.randint(1, 64, (8, 16), device=device)
    hidden = torch.randn(2, 8, 16, 4, device=device, requires_grad=True)
    weight = torch.randn(64, 4, device=device, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        projected_token_log_prob(tokens, hidden, weight, None, PADDING, chunk=2048)
    assert sum(kept) < 4096  # of 16384 logits


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, *(x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)), 0)
        return result


def test_weight_gradients_of_narrow_types_are_summed_in_float32(device: torch.device) -> None:
    """First 256, then 256 times 1: in bfloat16 256 + 1 is 256."""
    tokens = torch.ones(1, 514, dtype=torch.int64, device=device)
    hidden = torch.ones(1, 1, 514, 1, dtype=torch.bfloat16, device=device)
    hidden[:, :, :2] = 256.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(projected_token_log_prob(tokens, hidden, weight, None, PADDING, chunk=4).sum(), weight)
    assert gradient.flatten().tolist() == [-512.0, 512.0]


@pytest.mark.parametrize("upstream", [2.0**-12, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_narrow_layers_keep_their_digits_whatever_the_upstream_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, upstream: float
) -> None:
    """In float16 probabilities of 32,000 tokens times 1/4096 are zero, and 65536 is infinite."""
    if device.type == "cpu":  # as on a GPU: narrow factors, results in float32
        monkeypatch.setattr(projected, "_stays_narrow", lambda x, wide: x.dtype != wide)
        monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype: (a.double() @ b.double()).to(out_dtype))
    tokens = torch.tensor([[3, 17], [5, 4000]], device=device)
    hidden = torch.randn(1, 2, 2, 4, device=device).to(dtype).requires_grad_()
    weight = ((1 + 0.5 * torch.rand(32000, 4, device=device)) / 4).to(dtype).requires_grad_()  # the softmax's part does not cancel
    gradients = []
    for h, w in ((hidden, weight), (x.detach().double().requires_grad_() for x in (hidden, weight))):
        value = projected_token_log_prob(tokens, h, w, None, PADDING)
        gradients.append(torch.autograd.grad(value, (h, w), torch.full_like(value, upstream)))
    for found, exact in zip(*gradients, strict=True):
        fits = exact.abs() < torch.finfo(dtype).max
        lost = (found.double() - exact)[fits].norm() / exact[fits].norm()
        assert lost < 2e-2  # of float16's steps, where the gradient itself is near their size


def test_wrong_layers_are_refused(device: torch.device) -> None:
    tokens, hidden, weight, bias = layer(device)
    for arguments in ((tokens, hidden, weight[:, :3], None), (tokens, hidden, weight, weight[0]), (tokens, hidden[0], weight, bias)):
        with pytest.raises(ValueError, match="expected hidden"):
            projected_token_log_prob(*arguments, PADDING)
    with pytest.raises(ValueError, match="expected int64 tokens"):
        projected_token_log_prob(tokens[:2], hidden, weight, bias, PADDING)
