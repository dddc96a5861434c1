"""A kernel that was compiled where nobody has tried it -> whether it may be used.

Comes in: what it gives, and what it should. Goes out: yes, or a warning. torch only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The dtypes that kernels take, and the most that rounding in them may make a result
differ, as a share of the largest value."""


def is_right(
    name: str,
    run: Callable[[], Tensor],
    expected: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Tell whether a kernel runs here, and gives what it should; warn if not.

    :param run: the kernel on its trial input, in ``dtype`` on ``device``.
    :param expected: in float32 on the CPU; what is zero there is not compared.
    """
    try:
        actual = run().float().cpu()
        difference = (actual - expected).masked_fill(expected == 0, 0)
        share = float(difference.abs().max() / expected.abs().max())
        reason = f"its result is off by {share:.1e}"
        if share <= TOLERANCES[dtype]:
            return True
    except torch.cuda.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as ex:
        reason = f"{type(ex).__name__}: {ex}"

    warnings.warn(
        f"The fused {name} does not run on {device} in {dtype} ({reason}); a slower "
        "way is taken, with the same results.",
        stacklevel=5,
    )

    return False
