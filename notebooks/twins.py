# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Twins
#
# **To which of its untied twin's tables is a tied table nearer, when, and at which tokens?** Twins share body
# initialisation and data order. Alignment with its floor, neighbours, single tokens, and the course over training.
#
# Needs a finished study (`tiedjax study`). Takes under a minute for the quick study on a laptop.

# %% tags=["parameters"]
import os

STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")  # a folder, or gs://BUCKET/STUDY

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np

import tiedjax
from tiedjax.analysis import (
    align,
    distinct,
    fits_of,
    interval,
    knn,
    neighbours,
    read_results,
    seen_rows,
    shared,
    token_texts,
)

study = read_results(STUDY)["study"]
reference, baseline, arms, seeds = study["reference"], study["baseline"], list(study["arms"]), study["seeds"]
runs = {(arm, seed): tiedjax.load_run(f"{STUDY}/runs/{arm}-{seed}") for arm in arms for seed in seeds}
tables = {key: run.tables() for key, run in runs.items()}
token_counts = runs[baseline, seeds[0]].token_counts
seen = seen_rows(token_counts)
colour = {"output": "C1", "input": "C0"}
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## One pair
# How well the tied table, once mapped, lies on each table of its twin: mean cosine of the rows. A map is fitted on the
# rows that it is scored on, so unrelated tables score above 0 too: that is the floor. `corrected` is 0 at the floor
# and 1 for identical tables. Held out, the map has not seen the rows, and the floor is 0 but for noise.

# %%
tied, untied = tables[baseline, seeds[0]], tables[reference, seeds[0]]
pairs = {
    "to output": align(tied.input, untied.output, kept_V=seen, counts=token_counts),
    "to input": align(tied.input, untied.input, kept_V=seen, counts=token_counts),
    "input to output": align(untied.input, untied.output, kept_V=seen, counts=token_counts),
}
print(f"{'':17}{'fit':12}{'score':>8}{'floor':>8}{'corrected':>11}{'held out':>10}")
for name, pair in pairs.items():
    for fit, s in pair.alignment.scores.items():
        held_out = pair.alignment.held_out[fit].score
        print(f"{name:17}{fit:12}{s.score:8.3f}{s.floor:8.3f}{s.corrected:11.3f}{held_out:10.3f}")

# %% [markdown]
# ## Row by row
# The cosines that the score is the mean of, and its floor.

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for role in colour:
    alignment = pairs[f"to {role}"].alignment
    cosines, score = alignment.cosines["orthogonal"], alignment.scores["orthogonal"]
    ax.hist(cosines, bins=60, density=True, histtype="stepfilled", alpha=0.35, color=colour[role])
    ax.axvline(score.score, color=colour[role], label=f"to {role}: mean")
    ax.axvline(score.floor, color=colour[role], linestyle="--", label=f"to {role}: floor")
ax.set(xlabel="cosine of a row with its twin's, after the best rotation", ylabel="density of rows", title=baseline)
ax.legend()
plt.show()

# %% [markdown]
# ## Which tokens?
# One rotation for all tokens, scored within each third of them by frequency; each third has a floor of its own, for
# which rows are shuffled among tokens of like frequency only.

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for role in colour:
    by = pairs[f"to {role}"].strata["orthogonal"]
    ax.plot(list(by), [s.score for s in by.values()], "o-", color=colour[role], label=f"to {role}")
    ax.plot(list(by), [s.floor for s in by.values()], "--", color=colour[role], label="floor")
ax.set(xlabel="third of the tokens by frequency", ylabel="mean cosine (orthogonal)", ylim=(-0.05, 1))
ax.legend(ncols=2)
plt.show()

# %% [markdown]
# ## Every arm and seed
# Corrected scores. Small dots are seeds, bars 95 % intervals over them. The dotted lines are a yardstick: how near one
# of the reference's tables comes to itself trained from another seed.


# %%
def nearness(x_VD, y_VD, fit="orthogonal"):
    return fits_of(x_VD, y_VD, fits=(fit,), kept_V=seen).scores[fit].corrected


def dot(ax, at, values, color, **style):
    mean = interval(values)
    ax.plot([at + 0.05] * len(values), values, ".", color=color, alpha=0.5)
    ax.errorbar(at, mean.mean, mean.half_width or 0, fmt="o", color=color, capsize=4, **style)


near = {
    (arm, own, role): [nearness(distinct(tables[arm, s])[own], getattr(tables[reference, s], role)) for s in seeds]
    for arm in arms
    if arm != reference
    for own in distinct(tables[arm, seeds[0]])
    for role in colour
}

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
subjects = list(dict.fromkeys((arm, own) for arm, own, _ in near))
for at, subject in enumerate(subjects):
    for shift, role in [(-0.1, "output"), (0.1, "input")]:
        label = f"to {reference}'s {role} table" if not at else None
        dot(ax, at + shift, near[*subject, role], colour[role], label=label)
own = [nearness(tables[reference, s].input, tables[reference, s].output) for s in seeds]
dot(ax, len(subjects), own, "black", label=f"{reference}: input to output")
for role in colour:
    again = [
        nearness(getattr(tables[reference, a], role), getattr(tables[reference, b], role))
        for a, b in itertools.combinations(seeds, 2)
    ]
    if again:
        ax.axhline(np.mean(again), color=colour[role], linestyle=":", label=f"{role} tables of two seeds")
ax.axhline(0, color="gray", linestyle="--", label="chance")
ax.set_xticks(range(len(subjects) + 1), [*(f"{a}\n({o})" for a, o in subjects), reference])
ax.set(ylabel="corrected score (orthogonal)", xlim=(-0.5, len(subjects) + 0.5))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
plt.show()

# %% [markdown]
# ## Over training
# Both twins at the same step, at the snapshots that all runs have.

# %%
steps = sorted(set.intersection(*(set(runs[arm, s].snapshot_steps) for arm in (baseline, reference) for s in seeds)))
course = {role: np.empty((len(seeds), len(steps))) for role in colour}
for i, s in enumerate(seeds):
    for j, step in enumerate(steps):
        mine, twin = runs[baseline, s].tables(step).input, runs[reference, s].tables(step)
        for role in colour:
            course[role][i, j] = nearness(mine, getattr(twin, role))

fig, ax = plt.subplots(figsize=(6, 3.6))
for role, values in course.items():
    ax.plot(steps, values.mean(axis=0), "o-", color=colour[role], label=f"to {role}")
    ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour[role], alpha=0.2, linewidth=0)
ax.axhline(0, color="gray", linestyle="--", label="chance")
ax.set(xlabel="step", ylabel="corrected score (orthogonal)", title=f"{baseline}: mean and range over seeds")
ax.set_xscale("symlog", linthresh=1)
ax.set_xlim(left=-0.2)
ax.legend()
plt.show()

# %% [markdown]
# ## Neighbours
# No map at all: of a token's 10 nearest tokens by cosine in one table, how many are so in the other? By chance
# k / (V - 1).

# %%
k = 10
overlap = {
    f"{baseline} and\nits twin's output": knn(tied.input, untied.output, k=k, kept_V=seen, counts=token_counts),
    f"{baseline} and\nits twin's input": knn(tied.input, untied.input, k=k, kept_V=seen, counts=token_counts),
    f"{reference}: input\nand output": knn(untied.input, untied.output, k=k, kept_V=seen, counts=token_counts),
}

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for at, pair in enumerate(overlap.values()):
    first, half = not at, pair.interval.half_width
    ax.bar(
        at, pair.overlap.score, yerr=half, color="C7", alpha=0.5, capsize=4, label="all seen tokens" if first else None
    )
    for i, (name, stratum) in enumerate(pair.strata.items()):
        ax.plot(at - 0.2 + 0.2 * i, stratum.score, "o", color=f"C{i + 2}", label=name if first else None)
    ax.plot([at - 0.4, at + 0.4], [pair.overlap.floor] * 2, "k--", label="chance" if first else None)
ax.set_xticks(range(len(overlap)), list(overlap))
ax.set(ylabel="share of common 10 nearest neighbours", ylim=(0, None), title=f"seed {seeds[0]}; bars: 95 % over tokens")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Who is nearer to what
# Per token: neighbours shared with the twin's output table less those shared with its input table. If the tied table
# leaned to neither, as many tokens would lie left of 0 as right of it.

# %%
ids, counts = np.flatnonzero(seen), token_counts[:, seen]
near_VK = {
    "tied": neighbours(tied.input[seen], k).indices_VK,
    "output": neighbours(untied.output[seen], k).indices_VK,
    "input": neighbours(untied.input[seen], k).indices_VK,
}
lean = shared(near_VK["tied"], near_VK["output"]) - shared(near_VK["tied"], near_VK["input"])

fig, ax = plt.subplots(figsize=(6, 3.6))
ax.hist(lean, bins=np.arange(-k - 0.5, k + 1), color="C1", alpha=0.6, rwidth=0.9)
ax.axvline(0, color="gray", linestyle="--", label="no lean")
ax.axvline(lean.mean(), color="C1", label=f"mean: {lean.mean():.2f}")
ax.set(xlabel="common neighbours: with output less with input", ylabel="tokens")
ax.legend()
plt.show()


# %%
def words(rows):
    found = token_texts(runs[baseline, seeds[0]].tokenizer_path, [int(i) for i in ids[rows]])
    return "  ".join(repr(text) for text in found)


frequent = np.flatnonzero(counts[1] >= np.median(counts[1]))
order = frequent[np.argsort(-lean[frequent], kind="stable")]
print("Of the more frequent half of the tokens,")
print("nearest to the output table:", words(order[:12]))
print("nearest to the input table: ", words(order[::-1][:12]))

# %% [markdown]
# The neighbours themselves, nearest first, of the token that leans most to either side.

# %%
for row in (order[0], order[-1]):
    print(f"{words([row])} (lean {lean[row]:+d})")
    for label, indices_VK in near_VK.items():
        print(f"  {label:7}", words(indices_VK[row, :8]))
