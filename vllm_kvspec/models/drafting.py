# SPDX-License-Identifier: Apache-2.0
"""Drafts of any head, in torch: the logits of its blocks and the candidates of its trees. Evaluation uses these."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from vllm_kvspec.models.assistant_head import AssistantHead
from vllm_kvspec.models.draft_head import KVSpecDraftModel, Previous
from vllm_kvspec.models.target import TargetView, head_logits, row_logits, uncapped_logits
from vllm_kvspec.tree import expand_tree, plan_levels

Head = KVSpecDraftModel | AssistantHead


def _whole_vocabulary(head: KVSpecDraftModel, logits: torch.Tensor) -> torch.Tensor:
    """Logits over a reduced draft vocabulary [..., Vd] -> [..., V], -inf where the head has no score."""
    if head.draft_token_ids is None:
        return logits
    whole = logits.new_full((*logits.shape[:-1], head.config.vocab_size), float("-inf"))
    return whole.index_copy(-1, head.draft_token_ids, logits)


def draft_logits(
    head: Head,
    target: PreTrainedModel,
    view: TargetView,
    input_ids: torch.Tensor,
    base: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Logits [A, R, V] of the tokens at ``base + 1 ..``, given the path ``tokens`` [A, R] int64 at ``base ..``.

    ``input_ids`` [1, S]: the sequence of ``view``; ``base`` int64 [A]. R is the block size, or less with
    autoregressive drafting. The path's first token is the anchor. -inf outside a reduced draft vocabulary.
    """
    if isinstance(head, AssistantHead):
        return head.logits(view, base, tokens)
    embed = target.get_input_embeddings()
    rows = tokens if head.config.drafting == "autoregressive" else tokens[:, :1]
    hidden = head(view, base[None], embed(rows)[None])[0]
    return _row_logits(head, target, hidden, tokens)


def draft_candidates(
    head: Head,
    target: PreTrainedModel,
    view: TargetView,
    input_ids: torch.Tensor,
    base: torch.Tensor,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    beam: int,
    width: int,
    num_nodes: int | None = None,
    chain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates (score, token, parent) of a tree at each anchor, as ``tree.expand_tree`` gives them.

    ``input_ids`` [1, S]: the sequence of ``view``; ``base`` int64 [A]. The other arguments are those of
    ``tree.expand_tree`` for A requests, over the whole vocabulary. Autoregressive heads run once per level over the
    beam's paths.
    """
    options = {"noise": noise, "scale": scale, "chain": chain}
    options |= {"beam": beam, "width": width, "num_nodes": num_nodes}
    if isinstance(head, AssistantHead):
        return head.candidates(view, input_ids, base, **options)
    anchor = input_ids[0, base]
    if head.config.drafting == "autoregressive":
        return _expand_paths(head, target, view, base, anchor, options)
    return expand_block(head, target, block_rows(head, target, view, input_ids, base), anchor, **options)


class BlockRows(NamedTuple):
    """What one pass of a block head says of the positions after each anchor, before the transition.

    ``logits`` [A, G, Vd] over the draft vocabulary; ``gate`` [A, G, r] of a tied transition, or None.
    """

    logits: torch.Tensor
    gate: torch.Tensor | None

    def left(self, skip: int) -> "BlockRows":
        """The rows from the one at ``base + skip`` on."""
        return BlockRows(self.logits[:, skip:], None if self.gate is None else self.gate[:, skip:])


def block_rows(
    head: KVSpecDraftModel, target: PreTrainedModel, view: TargetView, input_ids: torch.Tensor, base: torch.Tensor
) -> BlockRows:
    """The pass of a block head at the anchors ``base`` int64 [A] of the sequence ``input_ids`` [1, S]."""
    embeds = target.get_input_embeddings()(input_ids[0, base])
    hidden = head(view, base[None], embeds[None, :, None])[0]
    gate = head.gate(hidden) if head.config.has_tied_transition else None
    return BlockRows(head_logits(target, hidden, head.draft_token_ids), gate)


def expand_block(
    head: KVSpecDraftModel,
    target: PreTrainedModel,
    rows: BlockRows,
    anchor: torch.Tensor,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates of trees under the tokens ``anchor`` int64 [A], of as many levels as there are ``rows``.

    ``noise`` [A, G, V] over the whole vocabulary; the other arguments are those of ``tree.expand_tree``.
    """
    draft_ids = head.draft_token_ids
    if noise is not None and draft_ids is not None:
        noise = noise[..., draft_ids]
    factors = transition_factors(head, target)
    return expand_tree(rows.logits, anchor, *factors, noise, scale, draft_ids=draft_ids, gate=rows.gate, **options)


def _row_logits(head: KVSpecDraftModel, target: PreTrainedModel, hidden: torch.Tensor, tokens: torch.Tensor):
    """Logits [..., V] of rows ``hidden`` [..., H] after the ``tokens`` int64 [...]."""
    transition = head.transition(Previous(tokens, target.get_input_embeddings()(tokens)), hidden)
    return _whole_vocabulary(head, row_logits(target, hidden, transition, head.config, head.draft_token_ids))


def transition_factors(
    head: KVSpecDraftModel, target: PreTrainedModel
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Both factors of the bias, [V, r] and [Vd, r]; (None, None) without a bias."""
    if not head.config.transition_rank:
        return None, None
    if head.config.has_tied_transition:
        return _tied_tables(head, target)
    return head.transition_in.weight, head.transition_out.weight


@torch.no_grad()
def _tied_tables(head: KVSpecDraftModel, target: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables that a tied transition is served as, kept with the head as long as its weights stay the same."""
    made_of = (head.transition_token.weight._version, head.transition_hidden.weight._version, id(target))
    if getattr(head, "_tables", (None,))[0] != made_of:
        every = torch.arange(head.config.vocab_size, device=target.device)
        rows = head.token_rows(target.get_input_embeddings()(every))
        columns = head.transition_hidden.weight.T
        out = uncapped_logits(target, columns, head.draft_token_ids, with_bias=False).T.to(rows.dtype)
        head._tables = (made_of, rows, out)
    return head._tables[1:]


def _expand_paths(head, target, view, base, anchor, options) -> tuple[torch.Tensor, ...]:
    """Level by level: score the children of the beam's paths, each path with a forward of its own."""
    anchors, noise, scale = len(base), options["noise"], options["scale"]
    paths, path_index = anchor.view(-1, 1, 1), torch.full((anchors, 1), -1, device=base.device)
    path_score = torch.zeros(anchors, 1, device=base.device)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    offset = 0
    levels = plan_levels(head.config.draft_block_size, options["beam"], options["width"], options["num_nodes"])
    for depth, level in enumerate(levels):
        beam = paths.shape[1]
        rows = target.get_input_embeddings()(paths.flatten(0, 1))
        last = head(view, base.repeat_interleave(beam)[None], rows[None])[0, :, -1].view(anchors, beam, -1)
        logits = _row_logits(head, target, last, paths[..., -1])
        if noise is not None:
            logits = logits + noise[:, depth, None]
        if scale is not None:
            logits = logits / scale.view(-1, 1, 1)
        child_score, child_token = logits.log_softmax(dim=-1).topk(level.width, dim=-1)
        score, token = (path_score[..., None] + child_score).flatten(1), child_token.flatten(1)
        if options["chain"] is not None:
            off_chain = options["chain"][:, None] & (torch.arange(score.shape[1], device=base.device) > 0)
            score = score.masked_fill(off_chain, float("-inf"))
        found.append((score, token, path_index.repeat_interleave(level.width, dim=1).int()))
        if level.num_next == 0:
            break
        path_score, best = score.topk(level.num_next, dim=-1)
        path_index = best + offset
        offset += score.shape[1]
        parent = paths.gather(1, (best // level.width)[..., None].expand(-1, -1, paths.shape[2]))
        paths = torch.cat((parent, token.gather(1, best)[..., None]), dim=-1)
    return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
