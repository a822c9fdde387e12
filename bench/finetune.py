"""Fine-tuning beside transformers and the strongest plain torch, side by side in one process.

    python -m bench.finetune                        on a GPU, every workload and peer
    python -m bench.finetune --minutes 8            the most important ones first, in that time
    python -m bench.finetune --tiny                 a small model, on anything, in seconds
    python -m bench.finetune --device cpu           beside transformers' Trainer: bench/trainers.py

All peers train the same random weights on the same rows in the same order, with the same dropout,
clipping, schedule and decay, in blocks of steps in turn (A B C A B C ...). Moments and masters are
fp32, but for the peer that is named for its bf16 ones. The peers' batches are put together before
the clock starts and wait in pinned memory, as a loader that is never late would have it; minift's
loop makes its own as it goes. Peers are in `bench.peers`, models and lengths in `bench.workloads`,
the clocks in `bench.rounds`, whether all learn alike in `bench.learning`, floors in `bench.floors`.

Each workload and peer is one JSON line of --out (default bench/results/finetune_gpu.jsonl):

    bench, workload, model, data    "finetune", "BERT-base SST-2", "BERT-base", "SST-2"
    peer, status, reason            status "timed", "unavailable" or "failed"; reason: why not timed
    note                            what this peer does not share with the others; "" if nothing
    comparable                      false: lower precision or no attention dropout, a row of its own
    device, dtype, states           "cuda", "bf16", "fp32": of the moments and masters
    batch, tokens_per_step          sequences in a step; real tokens, the mean of the timed steps
    tokens_per_second               real tokens by the wall clock, median over the blocks: headline
    sequences_per_second            likewise
    p10, p50, p90                   ms of a step between device events, over all blocks that count
    wall_ms, event_ms               a step by the wall clock and by events: means of those blocks
    block_ms, spread                medians of each block; (highest - lowest) / median
    blocks, thrown_away, steps      timed; beside a slow canary; steps that count
    warm_up_steps, prepare_seconds  untimed steps; seconds of all compiling, capturing, warming up
    peak_allocated_mib, peak_reserved_mib    beyond what lay there before the peer was made
    model_tflop                     a step's, on real tokens, backward twice forward
    mfu_nominal, nominal_tflops     of the datasheet's 989
    mfu_measured, measured_tflops   of the matmul measured in this run
    floor_ms, target_ms             bench.floors, of the same lengths without padding
    of_floor, of_target             floor_ms / p50, target_ms / p50
    kernels                         launched or replayed in a step; null: not counted
    sm_mhz, watts                   while this peer was warming up; null: nothing told
    first_loss, last_loss           of the run; the first before any update
    check                           dropout off: {dtype, loss_difference, cosine, passed}, or null
    learning                        {inside, passed} of --learning, or null
    best_peer, ratio_to_best_peer, ratio_to_default_peer    minift's row: quotients of tokens/s
    trusted, doubts                 false with the reasons; a doubtful row is shown, not hidden
    seed, utc, commit, gpu, driver, cpu, cores, threads, torch, triton, python, transformers

A row that was not timed has only the keys up to `batch`, `trusted` false and what it ran on. With
--learning there are rows of bench "learning" as well: workload, peer, seeds, steps, window, loss
(means over windows of steps, each a list over the seeds), inside, passed.
"""
