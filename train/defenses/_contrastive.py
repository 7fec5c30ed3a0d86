"""The symmetric contrastive loss over the pairs of all ranks, between any two views and of any part of a batch.

Trade-off: open_clip's ClipLoss knows no masks, so this is our own; without one it is ClipLoss(local_loss=True,
gather_with_grad=True). Every rank has as many pairs as the others, as batches are cut.
"""

import torch
import torch.distributed as dist


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] of every rank, one below the other, [world * n, ...]; gradients flow back to where the rows are from."""
    if world() == 1:
        return rows
    if not rows.requires_grad:
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a tensor without gradient."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def average(losses: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """This rank's share of the mean of all ranks' kept losses; 0 where none is kept. losses [n], keep bool[n].

    DistributedDataParallel divides gradients by the number of ranks, hence the factor.
    """
    count = summed(keep.sum().float())
    return (losses * keep).sum() * world() / count.clamp_min(1)


def contrastive(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean of `finding` in both directions; without `keep` it is ClipLoss."""
    return (finding(a, b, scale, keep) + finding(b, a, scale, keep)) / 2


def finding(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy of finding b_i among all b by a_i. a, b unit rows [n, d] of this rank.

    `keep` bool[n]: only these pairs, with only these as negatives. The loss of no pairs is 0, with gradients of 0.
    """
    n = len(a)
    first = n * dist.get_rank() if world() > 1 else 0
    truth = torch.arange(first, first + n, device=a.device)
    logits = scale * a @ gathered(b).T
    if keep is None:
        keep = torch.ones(n, dtype=torch.bool, device=a.device)
    else:
        out = (~gathered(keep)).expand(n, -1).clone()
        out[torch.arange(n), truth] = False  # the loss of a pair that is not kept stays finite, and is not counted
        logits = logits.masked_fill(out, float("-inf"))
    return average(torch.nn.functional.cross_entropy(logits, truth, reduction="none"), keep)


def push(pool: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """A FIFO of at most `size` rows after those of every rank were added, [<= size, d], without gradient."""
    return torch.cat([pool, gathered(rows.detach())])[-size:]


def nearest(rows: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """For each unit row [n, d] the row of the pool with the highest cosine, [n, d], without gradient."""
    return pool[(rows.detach() @ pool.T).argmax(1)]
