"""Benchmarks of fastseq against its peers; `fastseq bench` is the command (see `cli`).

The modules, each of which can be read by itself:

    runner     Case, Rival: the correctness gate, interleaved rounds, intervals; knows no operator
    clock      the time of a call that leaves nothing running: the host's, or a GPU's own
    measure    operators run, bytes kept for backward, peak memory; launches and kernels on a GPU
    floor      the multiply-adds and bytes a second that this machine reaches, measured in the same rounds
    crf        shapes and rivals of the CRF family, and nothing else; crf_truth is its float64 definition
    report     tables, JSON, comparison with an earlier run; plot draws it; machine describes where it ran
"""
