# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers with the number of nodes per step chosen by the load (``budget: "auto"``), and a watch over
acceptance.

vLLM asks a table by batch size for the length of the next drafts (``dynamic_sd_lookup``). Here the table looks at the
batch's context and at the running acceptance as well; everything else, asynchronous scheduling included, is vLLM's.
Accepted counts come from where vLLM has them on the host anyway, so nothing waits for the device.
"""

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kvspec.engine.batch_sizes import max_step_rows
from vllm_kvspec.engine.budget.choice import (
    NO_PASS,
    Acceptance,
    MeasuredCosts,
    NodeBudget,
    Roofline,
    acceptance_profile,
    decoder_pass,
    read_costs,
)

logger = init_logger("vllm.kvspec.budget")

# Fewer accepted tokens than this, per draft of the first so many, is no acceptance to speak of.
LEAST_ACCEPTED, WATCHED_DRAFTS = 0.1, 200
WITH_HEAD = (
    "Likely causes: the head was trained for other weights of this target (another fine-tune, quantised), with another "
    "chat template or thinking mode, or on other text (language, domain). `vllm-kvspec eval` measures a head on your "
    "text, `vllm-kvspec train` makes one for it."
)
WITHOUT_HEAD = (
    "Little of this text repeats what the target or the prompts said before; a head trained for the target does not "
    "depend on that: `vllm-kvspec prepare` and `vllm-kvspec train` make one."
)


def create_budget(vllm_config) -> NodeBudget:
    """The budget of an engine: its roofline, or the cost table that the user gave."""
    config = vllm_config.speculative_config
    head = config.head_config
    if config.budget_costs:
        costs = read_costs(config.budget_costs)
    else:
        shards = vllm_config.parallel_config.tensor_parallel_size
        element_bytes = vllm_config.model_config.dtype.itemsize
        target = decoder_pass(vllm_config.model_config.hf_text_config, element_bytes, shards)
        if head is None:
            costs = Roofline(target, NO_PASS, 0)
        else:
            by_level = config.has_assistant or head.drafting == "autoregressive"
            costs = Roofline(
                target,
                decoder_pass(head, element_bytes, shards),
                config.max_depth(head),
                beam=config.beam if by_level else 0,
            )
    acceptance = Acceptance(acceptance_profile(head))
    return NodeBudget(costs, acceptance, config.node_sizes, max_step_rows(vllm_config))


class NodesByLoad:
    """Takes the place of the scheduler's table: ``[batch]`` -> nodes per request for the next step."""

    def __init__(self, scheduler: Scheduler, budget: NodeBudget):
        self.scheduler = scheduler
        self.budget = budget
        self._last = -1
        self._logged: set[int] = set()

    def __getitem__(self, batch: int) -> int:
        context = sum(request.num_computed_tokens for request in self.scheduler.running)
        nodes = self.budget.nodes(batch, context)
        if nodes != self._last:
            log = logger.debug if nodes in self._logged else logger.info
            log("kvspec: %s", self.budget.describe(batch, context, nodes))
            self._logged.add(nodes)
            self._last = nodes
        if nodes == 0:
            self.budget.acceptance.forget(batch)
        return nodes


class TellsSalts:
    """Tells the workers each new request's ``cache_salt``, which stays in the scheduler otherwise."""

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            # A plain attribute on vLLM's dataclass: pickled with it.
            new.kvspec_salt = self.requests[new.req_id].cache_salt
        return output


class WatchesAcceptance:
    """Says once when next to nothing is accepted: the text is right then too, so nothing else would."""

    _drafts = _accepted = 0

    def make_spec_decoding_stats(self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
        if num_draft_tokens and self._drafts < WATCHED_DRAFTS:
            self._drafts += 1
            self._accepted += num_accepted_tokens
            if self._drafts == WATCHED_DRAFTS and self._accepted < LEAST_ACCEPTED * WATCHED_DRAFTS:
                without_head = self.vllm_config.speculative_config.head_config is None
                logger.warning(
                    "kvspec: of the first %d drafts only %d tokens were accepted. The text is right, but drafting "
                    "costs time for nothing. %s",
                    self._drafts,
                    self._accepted,
                    WITHOUT_HEAD if without_head else WITH_HEAD,
                )
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )


class ChoosesNodes:
    """Put before ``Scheduler`` or ``AsyncScheduler`` in the bases."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.budget = create_budget(self.vllm_config)
        self.dynamic_sd_lookup = NodesByLoad(self, self.budget)

    def update_from_output(self, scheduler_output, model_runner_output):
        if table := getattr(model_runner_output, "kvspec_step_costs", None):
            self.budget.costs = MeasuredCosts(**table)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
        if num_draft_tokens:
            self.budget.acceptance.observe(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )


def create_scheduler(vllm_config, *args, **kwargs) -> Scheduler:
    """``--scheduler-cls`` is set to this by the speculative config. A function, because whether scheduling is
    asynchronous is known only once the engine is configured."""
    stock = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    chooses = [ChoosesNodes] if vllm_config.speculative_config.budget == "auto" else []
    return type("KVSpecScheduler", (WatchesAcceptance, TellsSalts, *chooses, stock), {})(vllm_config, *args, **kwargs)
