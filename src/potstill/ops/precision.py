"""Sums need float32 at least: the dtype to compute in, and tensors in it.

Source: Mixed Precision Training (Micikevicius et al., arXiv:1710.03740), section 3.3.
"""

import torch
from torch import Tensor


def get_wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype` if it is float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """The same numbers in float32 at least."""
    return x.to(get_wide_dtype(x.dtype))


def get_product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of a product with `rows` in the present context: under autocast, autocast's."""
    device = rows.device.type
    uses_autocast = torch.is_autocast_enabled(device) and rows.dtype != torch.float64  # autocast leaves float64 alone
    return torch.get_autocast_dtype(device) if uses_autocast else rows.dtype
