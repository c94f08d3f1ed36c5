# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Who wrote the table
#
# **Which role's updates made a shared table what it is, when, and at whose cost?** Every update is split exactly into
# what each role's gradient wrote through the optimizer; their sums and what is left of the initial table are the table.
#
# Needs a finished study (`tiedjax study`) and of it metrics and snapshots. Takes seconds.

# %% tags=["parameters"]
import os

STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")  # a folder, or gs://BUCKET/STUDY

# %%
import matplotlib.pyplot as plt
import numpy as np

import tiedjax
from tiedjax.analysis import account, interval, read_results, smooth

study = read_results(STUDY)["study"]
baseline, seeds = study["baseline"], study["seeds"]
runs = {seed: tiedjax.load_run(f"{STUDY}/runs/{baseline}-{seed}") for seed in seeds}
accounts = {seed: account(run) for seed, run in runs.items()}
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Shares
# Inner products of each part with the table, over the table's squared norm: they sum to 1, over all rows and over those
# of rare, middle and frequent tokens.

# %%
parts = ("initial", "input", "output")
rows = {"all": [a.shares for a in accounts.values()]}
for name in next(iter(accounts.values())).strata:
    rows[name] = [a.strata[name] for a in accounts.values()]
fig, ax = plt.subplots(figsize=(6, 2.4))
left = np.zeros(len(rows))
for part, colour in zip(parts, ["0.8", "C0", "C1"], strict=True):
    widths = np.array([np.mean([getattr(shares, part) for shares in each]) for each in rows.values()])
    ax.barh(list(rows), widths, left=left, color=colour, label=part)
    left += widths
ax.invert_yaxis()
ax.set_xlabel("share of the squared norm")
ax.legend()
plt.show()

# %%
for part in parts:
    span = interval(getattr(shares, part) for shares in rows["all"])
    print(f"{part:8} {span.mean:.3f}", "" if span.half_width is None else f"+- {span.half_width:.3f}")

# %% [markdown]
# ## When
# What each stretch between snapshots wrote and is left at the end, beside its share of the summed learning rate.

# %%
spans = [a.spans for a in accounts.values()]
ends = [span.last for span in spans[0]]
fig, ax = plt.subplots(figsize=(6, 3.2))
for name, style in {"input": "C0", "output": "C1", "rate": "k--"}.items():
    ax.plot(
        ends, np.cumsum(np.mean([[getattr(span, name) for span in each] for each in spans], axis=0)), style, label=name
    )
ax.set_xscale("log")
ax.set_xlabel("step")
ax.set_ylabel("sum so far")
ax.legend()
plt.show()

# %% [markdown]
# ## The compromise
# How an update changes the next batch's loss, to first order: through the use that one role makes of the table, of what
# one role wrote into it. Above 0 the writer harms the reader. Smoothed: a step 10 steps ago weighs half.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for ax, reader, title in zip(axes, ["in", "out"], ["through the lookup", "through the prediction"], strict=True):
    for writer, colour in {"in": "C0", "out": "C1"}.items():
        curves = []
        for a in accounts.values():
            values = np.array([np.nan if x is None else x for x in getattr(a.curve, f"{reader}_{writer}")])
            curves.append(smooth(np.array(a.curve.steps), 1000 * values))
        ax.plot(a.curve.steps, np.mean(curves, axis=0), color=colour, label=f"{writer}put role wrote")
    ax.axhline(0, color="0.5", linewidth=1)
    ax.set_xlabel("step")
    ax.set_title(title)
axes[0].set_ylabel("thousandths of a nat")
axes[1].legend()
plt.show()
