"""The bugs that mutants.py plants in the kernels of the pointer-generator's decoder; see planted.py."""

from __future__ import annotations

from planted import Mutant


def _bug(name: str, what: str, file: str, old: str, new: str, build: str = "plain") -> Mutant:
    return Mutant(name, what, f"decoder_{file}.cuh", old, new, "pointer_cuda_decoder_test", build, "pointer/cuda")


MUTANTS = [
    # ---- decoder_block.cuh
    _bug(
        "group-lanes",
        "the lanes 4 apart do not add their parts of a row",
        "block",
        "for (int step = kGroup / 2; step > 0; step /= 2) value +=",
        "for (int step = kGroup / 4; step > 0; step /= 2) value +=",
    ),
    _bug(
        "group-mask",
        "all groups of a warp use the lanes of the first",
        "block",
        "((1u << kGroup) - 1) << lane() / kGroup * kGroup",
        "((1u << kGroup) - 1)",
    ),
    _bug(
        "block-sum-reused",
        "a sum over the block overwrites the one before, which others still read",
        "block",
        "__syncthreads(); // whoever still reads the scratch of the call before",
        "",
    ),
    _bug(
        "slices-lost",
        "the last slice of the rows is not added",
        "block",
        "slice == 0 && s < slices; ++s) sum += scratch",
        "slice == 0 && s < slices - 1; ++s) sum += scratch",
    ),
    _bug(
        "slices-unordered",
        "all slices add to one place at once, in any order",
        "block",
        "scratch[rank()] = sum; __syncthreads();"
        " for (int s = 1; slice == 0 && s < slices; ++s) sum += scratch[s * width + column];",
        "scratch[rank()] = 0; __syncthreads(); atomicAdd(scratch + column, sum); __syncthreads();"
        " sum = scratch[column];",
    ),
    _bug(
        "mask-one-late",
        "the mask is read one position too late",
        "block",
        "load_int(mask + i)",
        "load_int(mask + i + (i + 1 < S))",
    ),
    _bug(
        "positions-short",
        "shared memory for the positions is one number short",
        "block",
        "(S * int64_t(2 * sizeof(R) + sizeof(int)) + sizeof(int) + 15) / 16 * 16",
        "(S * int64_t(2 * sizeof(R) + sizeof(int)) - 1) / 16 * 16",
    ),
    # ---- decoder_forward.cuh
    _bug(
        "state-stale",
        "a step begins from the state that it is to write",
        "forward",
        "*after = own.states + (1 - t % 2) * 2 * n.H;",
        "*after = before;",
    ),
    _bug(
        "coverage-stale",
        "coverage is never added up",
        "forward",
        "positions.second[p] = coverage + a;",
        "positions.second[p] = coverage;",
    ),
    _bug(
        "energies-barrier",
        "attention is made of scores of which some are not yet written",
        "forward",
        "if (part() == 0) positions.first[p] = sum; } __syncthreads();",
        "if (part() == 0) positions.first[p] = sum; }",
        build="thread",  # few schedules give wrong numbers
    ),
    _bug(
        "context-barrier",
        "the next step reads a context of which some is not yet written",
        "forward",
        "store(out.contexts + at(t, n.M) + m, sum); }); __syncthreads();",
        "store(out.contexts + at(t, n.M) + m, sum); });",
    ),
    _bug(
        "beam-source",
        "each row of a beam reads a source of its own",
        "forward",
        "memory(in.memory + int64_t(n.source(b)) * n.S * n.M)",
        "memory(in.memory + int64_t(b % n.Bm) * n.S * n.M)",
    ),
    # ---- decoder_recompute.cuh, decoder_sweep.cuh
    _bug(
        "step-before",
        "gates are made of the hidden state of their own step",
        "recompute",
        "saved.hiddens + (step - 1) * n.H",
        "saved.hiddens + step * n.H",
    ),
    _bug(
        "first-step",
        "the way back ends one step too early",
        "sweep",
        "for (int t = n.T - 1; t >= 0; --t)",
        "for (int t = n.T - 1; t > 0; --t)",
    ),
    _bug(
        "coverage-order",
        "a step's attention counts as coverage before it",
        "sweep",
        "store(scratch.coverage + at(t, n.S) + i, coverage); coverage += load<R>(saved.attention + at(t, n.S) + i);",
        "coverage += load<R>(saved.attention + at(t, n.S) + i); store(scratch.coverage + at(t, n.S) + i, coverage);",
    ),
    _bug(
        "tie-of-least",
        "at a tie the gradient of the least is the coverage's",
        "sweep",
        "a <= load<R>(scratch.coverage + place)",
        "a < load<R>(scratch.coverage + place)",
    ),
    _bug(
        "piece-barrier",
        "a piece's sums are overwritten by those of the next while they are still read",
        "sweep",
        "store(out.query + at(t, n.A) + k, sum); } __syncthreads(); } }",
        "store(out.query + at(t, n.A) + k, sum); } } __syncthreads(); }",
    ),
    _bug(
        "cell-race",
        "the cell's gradient is taken before that of the query has been added: right numbers, but for luck",
        "sweep",
        "[&](int j, R sum) { own.state[j] += sum; }); __syncthreads();",
        "[&](int j, R sum) { own.state[j] += sum; });",
        build="thread",
    ),
    # ---- decoder_positions.cuh
    _bug(
        "steps-barrier",
        "the next steps are staged while some threads still read these",
        "positions",
        "__syncthreads(); // whoever still reads the steps before",
        "",
    ),
    _bug(
        "tile-off",
        "positions that are off take part in the sums over steps",
        "positions",
        "s < steps(begin) && is_on(p)",
        "s < steps(begin)",
    ),
    _bug(
        "share-lost",
        "the last share of v and w_coverage is lost",
        "positions",
        "k < 2 * A && o < owners; o += kSlices",
        "k < 2 * A && o < owners - 1; o += kSlices",
    ),
]
