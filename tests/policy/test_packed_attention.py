"""Attention over a packed row, against plain attention with a mask over the whole row."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from worker.policy.packed_attention import Layout, attend

torch.set_num_threads(1)

SIZE = 8  # of a head
Groups = tuple[tuple[int, tuple[int, ...]], ...]


def visible(layout: Layout, window: int | None) -> Tensor:
    """Return which token (S, S) of the row sees which, from where each piece begins."""
    num_tokens = sum(layout.sizes)
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    prefix = list(range(layout.prefix))

    def see(own: list[int], before: list[int]) -> None:
        line = before + own
        for place in range(len(before), len(line)):
            start = 0 if window is None else max(0, place - window + 1)
            mask[line[place], line[start : place + 1]] = True

    see(prefix, [])
    at = layout.prefix
    for length, completions in layout.groups:
        prompt = list(range(at, at + length))
        see(prompt, prefix)
        at += length
        for size in completions:
            see(list(range(at, at + size)), prefix + prompt)
            at += size
    return mask


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def tensors(layout: Layout, heads: int, key_heads: int, size_v: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(layout.sizes)
    shapes = [
        (1, heads, num_tokens, SIZE),
        (1, key_heads, num_tokens, SIZE),
        (1, key_heads, num_tokens, size_v),
    ]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def compare(
    layout: Layout, inputs: list[Tensor], window: int | None, softcap: float | None
) -> None:
    """Assert that output and gradients are those of plain attention."""
    out, _ = attend(
        torch.nn.Identity(),
        *inputs,
        None,
        layout=layout,
        scaling=0.4,
        sliding_window=window,
        softcap=softcap,
    )
    expected = plain(*inputs, visible(layout, window), 0.4, softcap)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


_GROUPS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), max_size=4).map(tuple)),
    min_size=1,
    max_size=3,
).map(tuple)


@hypothesis_settings(max_examples=30, deadline=None, database=None)
@given(
    groups=_GROUPS,
    prefix=st.sampled_from([0, 1, 9]),
    window=st.sampled_from([None, 1, 4, 50]),
    softcap=st.sampled_from([None, None, 2.0]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_row_of_any_layout_is_plain_attention_with_a_mask(
    groups: Groups,
    prefix: int,
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    seed: int,
) -> None:
    layout = Layout(groups, prefix)
    compare(layout, tensors(layout, *heads, SIZE, seed), window, softcap)


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_may_have_another_size_than_keys(prefix: int, softcap: float | None) -> None:
    layout = Layout(((4, (3, 3, 9)), (1, (2,))), prefix)
    compare(layout, tensors(layout, 4, 2, 2 * SIZE if softcap is None else SIZE, 1), None, softcap)


def test_empty_completion_takes_no_place() -> None:
    layout = Layout(((3, (0, 0)), (2, (0, 4))), 2)
    compare(layout, tensors(layout, 2, 2, SIZE, 3), None, None)


def test_usual_scaling_is_that_of_the_head_size() -> None:
    layout = Layout(((3, (2, 2)),))
    inputs = tensors(layout, 2, 2, SIZE, 5)
    out, weights = attend(torch.nn.Identity(), *inputs, None, layout=layout)
    assert weights is None
    expected = plain(*inputs, visible(layout, None), SIZE**-0.5, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("before", "length", "window", "expected"),
    [
        (0, 2, None, [[1, 0], [1, 1]]),
        (2, 2, None, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (2, 2, 2, [[0, 1, 1, 0], [0, 0, 1, 1]]),
        (2, 1, 1, [[0, 0, 1]]),
        (2, 0, None, []),
    ],
)
def test_token_sees_itself_and_what_is_before_it(
    before: int, length: int, window: int | None, expected: list[list[int]]
) -> None:
    layout = Layout(((1, ()),))
    mask = layout.mask(before, length, window, torch.device("cpu"))
    assert mask.int().tolist() == expected
    assert layout.mask(before, length, window, torch.device("cpu")) is mask


def test_sizes_are_the_pieces_in_order() -> None:
    assert Layout(((4, (1, 2)), (3, ())), 5).sizes == [5, 4, 1, 2, 3]
