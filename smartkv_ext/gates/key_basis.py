"""A basis for keys in which quantisation noise falls where queries are small.

A cache holds A (k - c) for a key k, and its queries come as A^-T q. A score q.k then only loses q.c, which is the same
for all keys of a query: softmax does not see it. What changes is where the noise of quantised keys goes: it is
isotropic in the new basis, so in the old one it is small where queries are large. No byte is spent.
"""

from __future__ import annotations

from typing import Any

import torch

from smartkv_ext import ops

MAX_CONDITION = 1e3  # of a matrix: above, keys rounded to bfloat16 would lose more than their codes


class LayerBasis:
    """The basis of one layer's keys. This one is the model's own: all stays as it is."""

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        """Keys (batch, num_kv_heads, n, head_dim) -> the same in the basis, in their dtype."""
        return k

    def model_keys(self, k: torch.Tensor) -> torch.Tensor:
        """Inverse of ``keys``."""
        return k

    def differences(self, k: torch.Tensor) -> torch.Tensor:
        """Differences of keys (batch, num_kv_heads, n, head_dim) -> the same in the basis, in their dtype."""
        return k

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries (batch, num_heads, n, head_dim) -> the same in the basis, in their dtype."""
        return q

    def model_lse(self, lse: torch.Tensor, q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        """Log-sum-exp (batch, num_heads, n) of scores in the basis -> of the scores of q, as the model has it."""
        del q, softmax_scale
        return lse


class _Affine(LayerBasis):
    """matrix (num_kv_heads, head_dim, head_dim), centre (num_kv_heads, head_dim), float64."""

    def __init__(self, matrix: torch.Tensor, centre: torch.Tensor, device: torch.device) -> None:
        inverse = torch.linalg.inv(matrix)
        self._to, self._from, self._queries, self._centre = (
            x.float().contiguous().to(device) for x in (matrix.mT, inverse.mT, inverse, centre)
        )

    def keys(self, k: torch.Tensor) -> torch.Tensor:
        # The centre first: it may be a hundred times what is left, and a product of it would round what is left away.
        return ops.change_basis(k, self._to, origin=self._centre)

    def model_keys(self, k: torch.Tensor) -> torch.Tensor:
        return ops.change_basis(k, self._from, shift=self._centre)

    def differences(self, k: torch.Tensor) -> torch.Tensor:
        return ops.change_basis(k, self._to)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return ops.change_basis(q, self._queries)

    def model_lse(self, lse: torch.Tensor, q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        grouped = q.float().unflatten(1, (len(self._centre), -1))
        gone: torch.Tensor = (grouped * self._centre[:, None, None]).sum(-1)
        return lse + softmax_scale * gone.view(lse.shape)


class KeyBasis:
    """One basis per layer and KV head. Immutable.

    Args:
        packed: (num_layers, num_kv_heads, head_dim + 1, head_dim): the rows of A, and c below them.

    Raises ValueError for another shape, for what is not finite and for matrices that are all but singular.
    """

    def __init__(self, packed: torch.Tensor) -> None:
        if packed.dim() != 4 or packed.shape[2] != packed.shape[3] + 1:
            raise ValueError(
                "key_basis must be (num_layers, num_kv_heads, head_dim + 1, head_dim); got " + str(tuple(packed.shape))
            )
        self.packed = packed.half().contiguous().cpu()  # a device may know no float64
        if not bool(self.packed.isfinite().all()):
            raise ValueError("key_basis must be finite numbers, as float16 too")
        condition = torch.linalg.cond(self.packed[:, :, :-1].double())
        if not bool((condition < MAX_CONDITION).all()):
            raise ValueError(f"key_basis must have matrices of condition below {MAX_CONDITION:g}")
        self._placed: dict[tuple[int, torch.device, int, int], LayerBasis] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices that caches use, which all caches of a process share."""
        layers, heads, _, head_dim = self.packed.shape
        return 4 * layers * heads * (3 * head_dim * head_dim + head_dim)

    def of_layer(self, layer_idx: int, device: torch.device, first_head: int, num_kv_heads: int) -> LayerBasis:
        """The basis of some heads of a layer, copied to a device once."""
        where = (layer_idx, device, first_head, num_kv_heads)
        if where not in self._placed:
            with torch.inference_mode(False):  # made once, for callers outside of that mode too
                mine = self.packed[layer_idx, first_head : first_head + num_kv_heads].double()
                self._placed[where] = _Affine(mine[:, :-1], mine[:, -1], device)
        return self._placed[where]

    def __deepcopy__(self, memo: Any) -> KeyBasis:
        return self  # immutable: copies of a cache share it


def _power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """Symmetric positive matrices (..., n, n) to a power; eigenvalues are kept away from zero. A matrix of zeros counts
    as a small multiple of the unit matrix."""
    values, vectors = torch.linalg.eigh(x)
    values = values.clamp(min=(values.amax(-1, keepdim=True) * 1e-6).clamp(min=1e-30)) ** exponent
    out: torch.Tensor = vectors @ (values[..., None] * vectors.mT)
    return out


def balancing_map(of_queries: torch.Tensor, of_keys: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Symmetric A (..., head_dim, head_dim) of determinant 1, from second moments of queries and of centred keys.

    For isotropic noise as strong as the mapped keys, the expected score error tr(A^-1 A^-T Cq) tr(A Ck A^T) is least
    where A^T A is the geometric mean of Cq and Ck^-1 (``strength`` 1). On another text than the moments' a smaller
    power of that A is better.
    """
    root = _power(of_queries, 0.5)
    found = _power(root @ _power(root @ of_keys @ root, -0.5) @ root, 0.5 * strength)
    determinant = torch.linalg.slogdet(found)[1] / found.shape[-1]
    out: torch.Tensor = found / determinant.exp()[..., None, None]
    return out
