"""The bugs that mutants.py plants in the CRF's kernels, by their file, and what each would do on a GPU.

`old` is source text that is there exactly once; between words and signs any whitespace will do, so that a formatter
does not matter. `build` is the build that sees the bug first: "plain" by wrong numbers, by the emulator's errors, by
bytes behind shared memory or by a crash; "address" and "thread" by a sanitizer alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug: in `file` of a folder of csrc, `old` becomes `new`; `test` must then fail."""

    name: str
    what: str
    file: str
    old: str
    new: str
    test: str = "crf_cuda_test"
    build: str = "plain"
    folder: str = "crf/cuda"


VITERBI = "crf_cuda_viterbi_test"

MUTANTS = [
    # ---- team.cuh: what waits for what
    Mutant(
        "block-barrier",
        "teams of a block do not wait: __syncthreads is missing",
        "team.cuh",
        "__syncwarp(lanes()); else __syncthreads();",
        "__syncwarp(lanes());",
    ),
    Mutant(
        "warp-barrier",
        "teams within a warp do not wait: __syncwarp is missing",
        "team.cuh",
        "if constexpr (kInWarp) __syncwarp(lanes()); else",
        "if constexpr (!kInWarp)",
    ),
    Mutant(
        "lane-mask",
        "the second team of a warp uses the lanes of the first",
        "team.cuh",
        "- 1) << (int(threadIdx.x) % 32 / kGroup * kGroup)",
        "- 1)",
    ),
    Mutant(
        "scratch-reused",
        "a sum over a team overwrites the one before, which others still read",
        "team.cuh",
        "sync(); // whoever still reads the scratch of the call before",
        "",
    ),
    # ---- batch.cuh, nll.cuh: how long a row is
    Mutant(
        "past-the-end",
        "positions from T on are looked at, in the last segment",
        "batch.cuh",
        "if (t >= T || (mask.data && !load_int(mask.at(b, t))))",
        "if (mask.data && !load_int(mask.at(b, t)))",
    ),
    Mutant(
        "segments-by-floor",
        "the positions behind the last full segment are forgotten",
        "nll.cuh",
        "sweeps.segments = int(ceil_div(T, Regime::kSegment));",
        "sweeps.segments = T / Regime::kSegment;",
    ),
    # ---- segment.cuh
    Mutant(
        "shared-memory-short",
        "a row too little of shared memory is asked for",
        "segment.cuh",
        "(3 * C + 3) * Regime::row(K)",
        "(3 * C + 2) * Regime::row(K)",
    ),
    Mutant(
        "rows-overlap",
        "the first beta lies on the last alpha",
        "segment.cuh",
        "beta = alpha + (C + 1) * ld;",
        "beta = alpha + C * ld;",
    ),
    Mutant(
        "over-read",
        "one word behind shared memory is read, and not used",
        "segment.cuh",
        "for (int l = 0; l < C; ++l) bits |= unsigned(state[l] != kOff) << l;",
        "for (int l = 0; l <= C; ++l) bits |= unsigned(state[l] != kOff && l < C) << l % C;",
        build="address",
    ),
    Mutant(
        "state-barrier",
        "which positions are on is read before all of it is written",
        "segment.cuh",
        "state[Team::rank()] = batch.state(b, s * C + Team::rank()); Team::sync();",
        "state[Team::rank()] = batch.state(b, s * C + Team::rank());",
    ),
    Mutant(
        "divergent-barrier",
        "only some threads of a team come to a barrier",
        "segment.cuh",
        "if (Team::rank() < C) state[Team::rank()] = batch.state(b, s * C + Team::rank()); Team::sync();",
        "if (Team::rank() < C) { state[Team::rank()] = batch.state(b, s * C + Team::rank()); Team::sync(); }",
    ),
    Mutant(
        "step-barrier",
        "a forward step reads a vector of which some is not yet written",
        "segment.cuh",
        "from = alpha + (l + 1) * ld; Team::sync(); });",
        "from = alpha + (l + 1) * ld; });",
    ),
    Mutant(
        "row-index",
        "a forward step reads the row before the one that was written last",
        "segment.cuh",
        "from = alpha + (l + 1) * ld; Team::sync(); });",
        "from = alpha + l * ld; Team::sync(); });",
    ),
    Mutant(
        "stale-message",
        "the backward recursion writes the buffer that others still read: no turns",
        "segment.cuh",
        "turn ^= 1;",
        "",
    ),
    Mutant(
        "lost-forward",
        "a path that underflows forward does not mark its row",
        "segment.cuh",
        "lost |= !(value >= kTiny) && reached != 0 && x_k != 0;",
        "",
    ),
    Mutant(
        "lost-backward",
        "a path that underflows backward does not mark its row",
        "segment.cuh",
        "lost |= !(m >= kTiny) && value != 0 && x_k != 0;",
        "",
    ),
    # ---- sweep.cuh
    Mutant(
        "emissions-barrier",
        "the recursion reads exponentiated emissions before all are there",
        "sweep.cuh",
        "gather_gold(batch, b, s, segment, bits, g); Team::sync();",
        "gather_gold(batch, b, s, segment, bits, g);",
    ),
    Mutant(
        "gap-ignored",
        "nobody answers for edges that were left out",
        "sweep.cuh",
        "regret + 30 < g.gap",
        "true",
    ),
    Mutant(
        "stale-marks",
        "a value alone reads marks that nobody wrote",
        "sweep.cuh",
        "if (gridDim.y == 1) sweeps.marks[2 * b + 1] = 0;",
        "",
    ),
    Mutant(
        "first-position",
        "a row is taken to begin one position later",
        "sweep.cuh",
        "+ __ffs(int(bits)) - 1;",
        "+ __ffs(int(bits));",
    ),
    # ---- posterior.cuh
    Mutant(
        "wrong-checkpoint",
        "a segment goes on from the checkpoint of the one before",
        "posterior.cuh",
        "sweeps.alpha + task * segment.ld",
        "sweeps.alpha + (task - 1) * segment.ld",
    ),
    Mutant(
        "row-not-fresh",
        "a row that begins with its segment goes on from a checkpoint that nobody wrote",
        "posterior.cuh",
        "sweeps.first[b] >= s * Segment<Regime>::C",
        "sweeps.first[b] > s * Segment<Regime>::C",
    ),
    Mutant(
        "marked-row-twice",
        "rows that are done exactly are added by the scaled kernels too",
        "posterior.cuh",
        "if (sweeps.marked(b)) continue;",
        "",
    ),
    Mutant(
        "share-twice",
        "the sums so far are added after each segment",
        "posterior.cuh",
        "take_off_gold(segment, bits, fresh, before, weight, K, partial); } Team::sync();",
        "take_off_gold(segment, bits, fresh, before, weight, K, partial);"
        " pairs.write(forward, K, partial); } Team::sync();",
    ),
    Mutant(
        "gold-by-two",
        "two threads take the same tag off the same entry, without an atomic",
        "posterior.cuh",
        "to % Team::kThreads == Team::rank()",
        "to % Team::kThreads / 2 == Team::rank() / 2",
    ),
    Mutant(
        "weight-ignored",
        "the weight of a row does not reach its posteriors",
        "posterior.cuh",
        "weight / Team::over_group(sum, Sum())",
        "1.f / Team::over_group(sum, Sum())",
    ),
    Mutant(
        "share-race",
        "a thread adds to entries from which others have just taken tags off: right numbers, but for luck",
        "posterior.cuh",
        "Team::sync(); pairs.write(forward, K, partial);",
        "pairs.write(forward, K, partial);",
        build="thread",
    ),
    # ---- exact.cuh
    Mutant(
        "tile-barrier",
        "the next tile of sums is written while one warp still reads this one",
        "exact.cuh",
        "if (writes) to[j] = join_sources() + emission; Block::sync();",
        "if (writes) to[j] = join_sources() + emission;",
    ),
    Mutant(
        "exact-checkpoint",
        "a segment begins from its own checkpoint",
        "exact.cuh",
        "work.checkpoints + int64_t(s - 1) * batch.K",
        "work.checkpoints + int64_t(s) * batch.K",
    ),
    Mutant(
        "exact-end",
        "the last position of a row is left out",
        "exact.cuh",
        "s == last_segment() ? last + 1",
        "s == last_segment() ? last",
    ),
    Mutant(
        "backward-mark",
        "rows that were marked backward alone are not done exactly",
        "exact.cuh",
        "!(marks[2 * b] | marks[2 * b + 1])",
        "!marks[2 * b]",
    ),
    Mutant(
        "share-not-cleared",
        "a block adds to what its share of the gradient held before",
        "exact.cuh",
        "if (fresh && partial) exact::fill(partial, batch.K, 0.0);",
        "",
    ),
    # ---- reduce.cuh
    Mutant(
        "last-share",
        "the share of the last owner is lost",
        "reduce.cuh",
        "o < owners; o += kSlices",
        "o < owners - 1; o += kSlices",
    ),
    Mutant(
        "slices-barrier",
        "the slices are added before all are there",
        "reduce.cuh",
        "shares.slice_sum(n, slice, size) : 0.0; Block::sync();",
        "shares.slice_sum(n, slice, size) : 0.0;",
    ),
    # ---- viterbi
    Mutant(
        "tie",
        "of two equal sources the later wins",
        "viterbi_recursion.cuh",
        "return b.value > a.value ? b : a;",
        "return b.value >= a.value ? b : a;",
        VITERBI,
    ),
    Mutant(
        "tie-of-lanes",
        "of two equal sources of two lanes the later wins",
        "viterbi_recursion.cuh",
        "value == best.value && tag < best.tag",
        "value == best.value && tag > best.tag",
        VITERBI,
    ),
    Mutant(
        "stale-scores",
        "a step writes the scores that others still read: no turns",
        "viterbi_recursion.cuh",
        "now_ = 1 - now_; if (part() == 0) {",
        "if (part() == 0) {",
        VITERBI,
    ),
    Mutant(
        "scores-barrier",
        "a step reads scores of which some are not yet written",
        "viterbi_recursion.cuh",
        "memory_.pointers(l)[tag()] = Pointer(best.tag); } Team::sync();",
        "memory_.pointers(l)[tag()] = Pointer(best.tag); }",
        VITERBI,
    ),
    Mutant(
        "lanes-barrier",
        "lanes of one tag read emissions that their neighbours have not yet written",
        "viterbi_recursion.cuh",
        "if constexpr (G > 1) __syncwarp(Team::lanes());",
        "",
        VITERBI,
    ),
    Mutant(
        "window-checkpoint",
        "a window leaves its checkpoint where the next one's belongs",
        "viterbi.cuh",
        "int64_t(w - 1) * batch.K",
        "int64_t(w) * batch.K",
        VITERBI,
    ),
    Mutant(
        "trace-short",
        "the path is not followed to a window's first position",
        "viterbi_window.cuh",
        "for (int l = on - 1; l >= 0; --l)",
        "for (int l = on - 1; l > 0; --l)",
        VITERBI,
    ),
    Mutant(
        "pointers-short",
        "shared memory for the pointers is one position too small",
        "viterbi_window.cuh",
        "M * of_position + 15",
        "(M - 1) * of_position + 15",
        VITERBI,
    ),
]
