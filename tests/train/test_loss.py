"""The loss of each supervised token: plain cross-entropy, made in pieces, told apart by document."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.profile import IGNORE_INDEX
from omniprep.stream.batch import pack, pad
from tests.train.batches import batch_of

torch = pytest.importorskip("torch")

from omniprep.train.loss import document_sums, documents_of, token_losses  # noqa: E402

HIDDEN, WORDS = 6, 50


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def problem(num_tokens: int, seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, requires_grad=True)
    return hidden, torch.nn.Linear(HIDDEN, WORDS, bias=False), torch.randint(0, WORDS, (num_tokens,))


@given(num_tokens=st.integers(0, 20), chunk_tokens=st.integers(1, 25), seed=st.integers(0, 99))
def test_losses_and_gradients_are_those_of_plain_cross_entropy(num_tokens: int, chunk_tokens: int, seed: int) -> None:
    hidden, head, targets = problem(num_tokens, seed)
    weights = torch.rand(num_tokens)  # each token's loss may count differently, as those of a rejected answer do

    def gradients(losses: Any) -> tuple[Any, Any]:
        head.zero_grad()
        hidden.grad = None
        (losses * weights).sum().backward()
        return hidden.grad, head.weight.grad

    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    ours = token_losses(hidden, head, targets, chunk_tokens=chunk_tokens)
    assert ours.shape == (num_tokens,)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(ours), gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def largest_logits(compute: Any) -> int:
    """Return the most rows of logits that any operation gave."""
    rows = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == WORDS:
                    rows.append(tensor.shape[0])
            return out

    with Watch():
        compute()
    return max(rows)


def test_logits_of_one_chunk_live_at_a_time() -> None:
    hidden, head, targets = problem(num_tokens=20)
    assert largest_logits(lambda: torch.nn.functional.cross_entropy(head(hidden), targets).backward()) == 20
    assert largest_logits(lambda: token_losses(hidden, head, targets, chunk_tokens=8).sum().backward()) == 8


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """300 equal gradients, each far below half a unit in the last place of what bfloat16 would have summed up before."""
    hidden = torch.ones(300, HIDDEN, dtype=torch.bfloat16)
    head = torch.nn.Linear(HIDDEN, WORDS, bias=False).bfloat16()
    torch.nn.init.zeros_(head.weight)
    token_losses(hidden, head, torch.zeros(300, dtype=torch.int64), chunk_tokens=1).sum().backward()
    torch.testing.assert_close(head.weight.grad[1].float(), torch.full((HIDDEN,), 300 / WORDS), rtol=2**-8, atol=0)


def test_a_frozen_head_and_a_frozen_model_have_no_gradients() -> None:
    hidden, head, targets = problem(num_tokens=5)
    head.requires_grad_(False)
    token_losses(hidden, head, targets, chunk_tokens=2).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    hidden, head, targets = problem(num_tokens=5)
    token_losses(hidden.detach(), head, targets, chunk_tokens=2).sum().backward()
    assert head.weight.grad is not None


def test_half_precision_weights_give_float32_losses() -> None:
    hidden, head, targets = problem(num_tokens=9)
    exact = token_losses(hidden, head, targets, chunk_tokens=4)
    rounded = token_losses(hidden.bfloat16(), head.bfloat16(), targets, chunk_tokens=4)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_a_chunk_of_nothing_is_a_mistake() -> None:
    hidden, head, targets = problem(3)
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        token_losses(hidden, head, targets, chunk_tokens=0)


@pytest.mark.parametrize("make", [pack, lambda records: pack(records, pad_to=1200), pad], ids=["packed", "tail", "padded"])
@pytest.mark.parametrize("names", [("text", "dialogue", "audio", "text pair", "document"), ("media pair",), ()], ids=len)
def test_each_supervised_token_belongs_to_its_document(make: Any, names: Sequence[str]) -> None:
    batch = batch_of(*names, make=make)
    alone = [int((batch_of(name)["shift_labels"] != IGNORE_INDEX).sum()) for name in names if "pair" not in name]
    documents = documents_of(batch)
    assert documents.dtype == torch.int64
    assert len(documents) == batch["num_supervised"] == int((batch["shift_labels"] != IGNORE_INDEX).sum())
    counts = torch.bincount(documents, minlength=len(batch["documents"])).tolist()
    assert [count for count, one in zip(counts, batch["documents"], strict=True) if one.sequence == "tokens"] == alone
    assert documents.tolist() == sorted(documents.tolist())


@given(documents=st.lists(st.integers(0, 4), max_size=12))
def test_sums_are_over_the_tokens_of_each_document(documents: list[int]) -> None:
    losses = torch.arange(1.0, len(documents) + 1)
    sums = document_sums(losses, torch.tensor(documents, dtype=torch.int64), 6).tolist()
    assert sums == [sum(place + 1.0 for place, one in enumerate(documents) if one == number) for number in range(6)]
