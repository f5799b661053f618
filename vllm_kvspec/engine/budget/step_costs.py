# SPDX-License-Identifier: Apache-2.0
"""Times whole engine steps at start, for the node budget: what a step costs by batch size, number of nodes and context.

The steps are real ones (verification, sampling, compaction, the head's pass and the tree) of made-up requests whose
context is declared computed, so that no prefill is needed. They run after CUDA graphs are captured and before the
scheduler exists, when every KV block is free. The scheduler lives in another process and gets the table with the first
step's output.
"""

import time
from collections.abc import Sequence

import torch
from vllm import SamplingParams
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

logger = init_logger("vllm.kvspec.budget")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Beyond this many rows every device is bound by compute, so the table goes on as a straight line.
MAX_ROWS = 1024
SHORT_CONTEXT = 16
# Of several requests: on a GPU one's context hides behind the weights, on a CPU the threads share the requests out.
LONG_CONTEXT, LONG_CONTEXT_BATCH = (1024, 4) if current_platform.is_cpu() else (4096, 8)
WARM_UP_STEPS, TIMED_STEPS = 1, 3
# The whole table is timed this often, and the shortest times count: a busy moment of the machine hits only one.
ROUNDS = 2
# After a step that took longer no larger batch is timed, so that a slow device starts in seconds.
SLOW_STEP_SECONDS = 0.15


def slowest_rank(seconds: float) -> float:
    """Of all tensor-parallel ranks. What is timed next depends on it, so all must see the same number: a rank that went
    on alone would wait for the others forever."""
    group = get_tp_group()
    if group.world_size == 1:
        return seconds
    slowest = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group.cpu_group)
    return slowest.item()


class StepTimer:
    """Runs steps of made-up requests on a model runner of vLLM's V2."""

    def __init__(self, runner):
        self.runner = runner
        self.block_sizes = [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
        self.free_blocks = runner.kv_cache_config.num_blocks - 1

    def positions(self, context: int, nodes: int) -> int:
        """Positions that a request may touch: its context, one first token, and every row of every step."""
        return context + 1 + (WARM_UP_STEPS + TIMED_STEPS + 1) * (nodes + 1)

    def fits(self, batch: int, context: int, nodes: int) -> bool:
        """Whether the requests fit the sequence length, the step's rows and the KV cache."""
        positions = self.positions(context, nodes)
        blocks = sum(-(-positions // size) for size in self.block_sizes)
        rows = batch * (nodes + 1)
        return (
            positions <= self.runner.max_model_len
            and batch <= self.runner.max_num_reqs
            and rows <= min(MAX_ROWS, self.runner.max_num_tokens)
            and batch * blocks <= self.free_blocks
        )

    def seconds(self, batch: int, context: int, nodes: int) -> float:
        """Mean time of a step of ``batch`` requests with ``context`` tokens each that verifies ``nodes`` nodes."""
        names = [f"_kvspec_cost_{i}_" for i in range(batch)]
        self._step(self._first_step(names, context, nodes))
        for i in range(WARM_UP_STEPS + TIMED_STEPS):
            if i == WARM_UP_STEPS:
                torch.accelerator.synchronize()
                start = time.perf_counter()
            self._step(self._decode_step(names, context + 1 + i * (nodes + 1), nodes))
        torch.accelerator.synchronize()
        elapsed = time.perf_counter() - start
        done = SchedulerOutput.make_empty()
        done.finished_req_ids = set(names)
        self.runner.execute_model(done)
        return slowest_rank(elapsed / TIMED_STEPS)

    def _step(self, scheduler_output: SchedulerOutput) -> None:
        self.runner.execute_model(scheduler_output)
        self.runner.sample_tokens(None)

    def _first_step(self, names: list[str], context: int, nodes: int) -> SchedulerOutput:
        """One token of each request, after ``context`` tokens that count as computed."""
        prompt = [0] * (context + 1)
        counts = [-(-self.positions(context, nodes) // size) for size in self.block_sizes]
        free = iter(range(1, self.free_blocks + 1))
        output = _scheduled(names, 1, nodes)
        output.scheduled_new_reqs = [
            NewRequestData(
                req_id=name,
                prompt_token_ids=prompt,
                prefill_token_ids=prompt,
                mm_features=[],
                # A seed of its own: the engine's generator must not be advanced.
                sampling_params=SamplingParams(temperature=1.0, seed=0),
                pooling_params=None,
                block_ids=tuple([next(free) for _ in range(count)] for count in counts),
                num_computed_tokens=context,
                lora_request=None,
            )
            for name in names
        ]
        return output

    def _decode_step(self, names: list[str], computed: int, nodes: int) -> SchedulerOutput:
        """``computed``: what an asynchronous scheduler knows, as if every node had been accepted."""
        cached = CachedRequestData.make_empty()
        cached.req_ids = names
        cached.num_computed_tokens = [computed] * len(names)
        cached.num_output_tokens = [1] * len(names)
        cached.new_block_ids = [None] * len(names)
        output = _scheduled(names, nodes + 1, nodes)
        output.scheduled_cached_reqs = cached
        if nodes:
            output.scheduled_spec_decode_tokens = {name: [-1] * nodes for name in names}
        return output


def _scheduled(names: list[str], rows: int, nodes: int) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = dict.fromkeys(names, rows)
    output.total_num_scheduled_tokens = rows * len(names)
    output.num_spec_tokens_to_schedule = nodes
    return output


def measure_step_costs(timer: StepTimer, sizes: Sequence[int]) -> dict[str, dict] | None:
    """The arguments of ``budget.MeasuredCosts`` for every number of nodes in ``sizes`` (0 included), in seconds.

    None when not even one request fits, as with a tiny KV cache.
    """
    if not all(timer.fits(1, SHORT_CONTEXT, nodes) for nodes in sizes):
        return None
    rounds = [{nodes: _times_by_batch(timer, nodes) for nodes in sizes} for _ in range(ROUNDS)]
    steps = {nodes: sorted(_shortest([times[nodes] for times in rounds]).items()) for nodes in sizes}
    batch, context = _longest(timer, max(sizes))
    context_seconds = dict.fromkeys(sizes, 0.0)
    if context > SHORT_CONTEXT:
        for nodes in sizes:
            long, short = (
                min(timer.seconds(batch, length, nodes) for _ in range(ROUNDS)) for length in (context, SHORT_CONTEXT)
            )
            context_seconds[nodes] = max(0.0, (long - short) / (batch * (context - SHORT_CONTEXT)))
    return {"steps": steps, "context": context_seconds}


def _times_by_batch(timer: StepTimer, nodes: int) -> dict[int, float]:
    """Two batches at least, where two fit: the table goes on as a line through the last two."""
    times: dict[int, float] = {}
    for batch in BATCHES:
        is_slow = len(times) > 1 and max(times.values()) > SLOW_STEP_SECONDS
        if is_slow or not timer.fits(batch, SHORT_CONTEXT, nodes):
            break
        times[batch] = timer.seconds(batch, SHORT_CONTEXT, nodes)
    return times


def _shortest(rounds: Sequence[dict[int, float]]) -> dict[int, float]:
    """By batch, over the rounds that have it."""
    return {batch: min(times[batch] for times in rounds if batch in times) for times in rounds for batch in times}


def _longest(timer: StepTimer, nodes: int) -> tuple[int, int]:
    """(batch, context) with the most context that fits: where its cost shows best."""
    context = LONG_CONTEXT
    while context > SHORT_CONTEXT:
        batch = LONG_CONTEXT_BATCH
        while batch >= 1:
            if timer.fits(batch, context, nodes):
                return batch, context
            batch //= 2
        context //= 2
    return 1, SHORT_CONTEXT


class MeasuresStepCosts:
    """For the runner: measures on request, and sends the table along with the next step's output."""

    _unsent_step_costs: dict | None = None

    @torch.inference_mode()
    def measure_step_costs(self) -> None:
        """Called by the worker once it is warm. Every tensor-parallel rank runs the same steps."""
        start = time.perf_counter()
        self._unsent_step_costs = measure_step_costs(StepTimer(self), self.speculative_config.node_sizes)
        logger.info("kvspec timed engine steps for the node budget in %.1f s", time.perf_counter() - start)

    def sample_tokens(self, grammar_output):
        output = super().sample_tokens(grammar_output)
        if self._unsent_step_costs is not None and output is not None:
            # A plain attribute on vLLM's dataclass: pickled with it, and read by our scheduler only.
            output.model_runner_output.kvspec_step_costs = self._unsent_step_costs
            self._unsent_step_costs = None
        return output
