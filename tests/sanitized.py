"""Every Triton kernel once on small rows: what compute-sanitizer watches."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from loss_cases import Case, loss_options, make_case, ours  # noqa: E402

from unlearn_ds import ops  # noqa: E402
from unlearn_ds.types import ReferenceRows  # noqa: E402


def main() -> None:
    maps = ({}, {"softcap": 3.0, "logit_scale": 0.5})
    for options, smoothing in itertools.product(maps, (None, torch.full((9,), 0.1))):
        case = make_case(5, 4, 20011, dtype=torch.bfloat16)
        case.batch.smoothing_N = smoothing
        reference = ReferenceRows(*(x.cuda() for x in case.reference))
        case = Case(case.hidden_NH.cuda(), case.weight_VH.cuda(), case.batch.to(torch.device("cuda")), reference)
        result = ours(case, kernel="triton", outer=-0.5, **options)
        assert torch.isfinite(result.loss)
        ops.token_statistics(
            case.hidden_NH, case.weight_VH, case.batch.targets_N, loss_options(kernel="triton", **options)
        )
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
