"""Values published with arXiv 2603.26663, to stand beside ours: facts with their source, used for nothing else."""

from __future__ import annotations

SOURCE = "arXiv 2603.26663"

# (table that is mapped, table it is compared with): identity, orthogonal, linear. Uncorrected, all rows, in sample.
ALIGNMENT_PAIR = "OLMo-1B (tied) and OLMo-1B-0724 (untied); V = 50,304, D = 2,048"
ALIGNMENT_SHAPE = (50_304, 2_048)
ALIGNMENT = {
    ("input", "output"): {"identity": 0.012, "orthogonal": 0.440, "linear": 0.574},
    ("output", "tied"): {"identity": 0.014, "orthogonal": 0.669, "linear": 0.719},
    ("input", "tied"): {"identity": 0.001, "orthogonal": 0.420, "linear": 0.525},
}

# Input-gradient scale: orthogonal score of tied OLMo-1B at step 10,000 with each table of OLMo-1B-0724; one seed.
SCALING = {1: {"input": 0.216, "output": 0.384}, 5: {"input": 0.222, "output": 0.369}}

# (first step, last step): output share of the gradient norms, tied OLMo-1B.
OUTPUT_SHARE = {
    (1, 10): 0.874,
    (11, 50): 0.928,
    (51, 100): 0.888,
    (101, 200): 0.825,
    (201, 500): 0.718,
    (501, 1000): 0.630,
    (1001, 2000): 0.614,
    (5001, 10_000): 0.629,
}

# Mean cosine of rows to step 0, OLMo-1B-0724 (untied).
EVOLUTION_STEP = 20_000
EVOLUTION = {"input": 0.865, "output": 0.561}

# KL(final || lens) in bits on WikiText-2 test, at the input and after each layer; one affine translator per layer, each
# read with the state after the one it was fitted on.
LENS_PAIR = "OLMo-1B (tied) and OLMo-1B-0724 (untied); 16 layers"
LENS = {
    "untied": (7.01, 6.64, 4.84, 4.21, 3.90, 3.74, 3.52, 3.28, 3.11, 2.88, 2.53, 2.14, 1.98, 1.68, 1.31, 0.83, 0.18),
    "tied": (8.86, 9.61, 6.42, 4.91, 4.37, 4.06, 3.61, 3.41, 3.30, 2.95, 2.72, 2.30, 2.18, 2.52, 2.79, 1.37, 2.06),
}

# Overlap of the 10 nearest neighbours by cosine, uncorrected, all rows; ALIGNMENT_PAIR. The tied table with each table
# of the untied model; and that model's two tables.
KNN_SHARED = {"input": 0.496, "output": 0.733}
KNN_OWN = 0.455
