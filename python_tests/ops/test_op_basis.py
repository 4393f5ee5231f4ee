"""change_basis against float64, beside eager torch in the same dtype."""

import pytest
import torch

from smartkv_ext import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "num_heads", "num_kv_heads", "n", "head_dim"),
    [(1, 9, 3, 1, 64), (1, 3, 3, 1, 64), (2, 12, 2, 1, 128), (3, 4, 4, 65, 80), (1, 8, 2, 700, 96), (1, 2, 1, 3, 256)],
)
def test_change_basis(batch: int, num_heads: int, num_kv_heads: int, n: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(head_dim + n)
    x = torch.randn(batch, n, num_heads, head_dim + 16).to(dtype)[..., 16:].transpose(1, 2)  # as a projection leaves it
    matrix = torch.randn(num_kv_heads, head_dim, head_dim) * head_dim**-0.5
    shift = torch.randn(num_kv_heads, head_dim)
    origin = 100 * torch.randn(num_kv_heads, head_dim)  # as the mean keys of a model with key biases
    x += origin.repeat_interleave(num_heads // num_kv_heads, 0)[:, None].to(dtype)
    for less, added in ((origin, shift), (None, None)):
        got = ops.change_basis(x, matrix, less, added)
        each = matrix.double().repeat_interleave(num_heads // num_kv_heads, 0)
        of_heads = [y if y is None else y.double().repeat_interleave(len(each) // len(y), 0) for y in (less, added)]
        want = x.double() @ each if less is None else (x.double() - of_heads[0][:, None]) @ each
        want = want if added is None else want + of_heads[1][:, None]
        assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
        eager = reference.change_basis(x, matrix, less, added)
        assert (got.double() - want).norm() <= 2 * (eager.double() - want).norm() + 1e-7 * want.norm()
    assert torch.equal(ops.change_basis(x, matrix), ops.change_basis(x.contiguous(), matrix))


def test_rows_are_independent() -> None:
    """What one row holds, NaN say, shows in no other; no row gives no row."""
    x, matrix = torch.randn(1, 4, 200, 64), torch.randn(2, 64, 64)
    want = ops.change_basis(x, matrix)
    x[0, 1, 70] = torch.nan
    got = ops.change_basis(x, matrix)
    assert got[0, 1, 70].isnan().all()
    got[0, 1, 70] = want[0, 1, 70]
    assert torch.equal(got, want)
    assert ops.change_basis(x[:, :, :0], matrix).shape == (1, 4, 0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_change_basis_on_cuda(dtype: torch.dtype) -> None:
    args = [torch.randn(2, 6, 33, 80).to(dtype), torch.randn(3, 80, 80), torch.randn(3, 80), torch.randn(3, 80)]
    torch.testing.assert_close(ops.change_basis(*[y.cuda() for y in args]).cpu(), ops.change_basis(*args))
