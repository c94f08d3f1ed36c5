# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gradient flow
#
# **Whose gradient shapes the table, and when?** Each role's exact [V, D] gradient, over the steps: norms, shares,
# their cosine, by token frequency; and the ratio of arXiv 2603.26663 beside the exact one.
#
# Needs a finished study (`tiedjax study`) and of it the metrics alone. Takes seconds.

# %% tags=["parameters"]
import os

STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")  # a folder, or gs://BUCKET/STUDY

# %%
import matplotlib.pyplot as plt
import numpy as np

import tiedjax
from tiedjax.analysis import gradients, interval, output_share, published, read_results, smooth

study = read_results(STUDY)["study"]
reference, baseline, arms, seeds = study["reference"], study["baseline"], list(study["arms"]), study["seeds"]
runs = {(arm, seed): tiedjax.load_run(f"{STUDY}/runs/{arm}-{seed}") for arm in arms for seed in seeds}
flow = {key: gradients(run.metrics) for key, run in runs.items()}
colour = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys([baseline, reference, *arms]))}
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})


# %% [markdown]
# One curve over the seeds: each run smoothed (a step 10 steps ago weighs half), then the mean and the range of runs.


# %%
def over_seeds(ax, arm, values, **style):
    steps = np.array(flow[arm, seeds[0]].steps)
    each = np.array([smooth(steps, np.array(values(flow[arm, seed]), float)) for seed in seeds])
    style = {"color": colour[arm], "label": arm} | style
    ax.plot(steps, each.mean(axis=0), **style)
    ax.fill_between(steps, each.min(axis=0), each.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)


# %% [markdown]
# ## Norms
# L2 norms of the two role gradients of the baseline's and of the reference's tables, before any role scaling, summed
# over the whole batch.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, arm in zip(axes, [baseline, reference], strict=True):
    over_seeds(ax, arm, lambda f: f.output_norm, label="output role")
    over_seeds(ax, arm, lambda f: f.input_norm, label="input role", linestyle="--")
    ax.set(xscale="log", xlabel="step", title=arm, ylim=(0, None))
    ax.legend()
axes[0].set_ylabel("L2 norm of the gradient (nats per unit)")
plt.show()

# %% [markdown]
# ## Shares
# output / (input + output). At one half the roles are in balance.

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
for arm in arms:
    over_seeds(ax, arm, lambda f: f.output_share)
ax.axhline(0.5, color="gray", linestyle="--", label="balance")
ax.set(xscale="log", xlabel="step", ylabel="output role's share of the norms", ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## Do the roles pull the same way?
# The cosine between the two role gradients. Two random directions in V × D dimensions have a cosine within
# ±1.96 / sqrt(V D) of 0 in 95 of 100 cases: the grey band, of single steps. Smoothed curves scatter less, gradients
# that lie on few rows scatter more.

# %%
model = runs[baseline, seeds[0]].config.model
chance = 1.96 / np.sqrt(model.vocab_size * model.d_model)

fig, ax = plt.subplots(figsize=(6, 3.6))
for arm in arms:
    over_seeds(ax, arm, lambda f: f.cosine)
ax.axhspan(-chance, chance, color="gray", alpha=0.4, label="chance, one step")
ax.set(xscale="log", xlabel="step", ylabel="cosine of the role gradients")
ax.legend()
plt.show()

# %% [markdown]
# ## By token frequency
# The same share within each tenth of the tokens, rarest to most frequent, at the steps where it was logged. Only rows
# of tokens in the batch have an input gradient; every row has an output gradient.

# %%
logged = [d.step for d in flow[baseline, seeds[0]].deciles]
share = np.array([[d.output_share for d in flow[baseline, s].deciles] for s in seeds])

fig, ax = plt.subplots(figsize=(6.5, 3.8))
image = ax.imshow(share.mean(axis=0).T, origin="lower", aspect="auto", cmap="RdBu_r", vmin=0, vmax=1)
ax.set_xticks(range(len(logged)), [f"{step:,}" for step in logged], rotation=60)
ax.set_yticks(range(10), range(1, 11))
ax.set(xlabel="step", ylabel="frequency decile (10: most frequent)", title=f"{baseline}: output role's share")
ax.grid(False)
fig.colorbar(image, label="share (0.5: balance)")
plt.show()

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, role in zip(axes, ["input_norm", "output_norm"], strict=True):
    for at in np.unique(np.linspace(0, len(logged) - 1, 4).astype(int)):
        norms = np.mean([getattr(flow[baseline, s].deciles[at], role) for s in seeds], axis=0)
        ax.plot(range(1, 11), norms, "o-", color=plt.cm.viridis(at / len(logged)), label=f"step {logged[at]:,}")
    ax.set(yscale="log", xlabel="frequency decile (10: most frequent)", title=role.replace("_norm", " role"))
    ax.set_xticks(range(1, 11))
axes[0].set_ylabel("L2 norm of the gradient (nats per unit)")
axes[1].legend()
plt.show()

# %% [markdown]
# ## The paper's ratio beside the exact one
# The paper divides by the gradient of the looked-up vectors, [B, T, D], in which a token's positions do not add up: two
# objects of different kinds. Exact is [V, D] over [V, D]. Its published values are of OLMo-1B.

# %%
windows = {(w.first, w.last): [] for w in flow[baseline, seeds[0]].windows}
for s in seeds:
    for w in flow[baseline, s].windows:
        windows[w.first, w.last].append(w)

columns = ("output_share", "paper_output_share", "activation_ratio")
print(f"{'steps':>12}  exact   paper's form   its input norm / exact   published")
theirs = {first: value for (first, _), value in published.OUTPUT_SHARE.items()}
for (first, last), found in windows.items():
    values = [interval(getattr(w, name) for w in found).mean for name in columns]
    cells = ["  -" if v is None else f"{v:.3f}" for v in [*values, theirs.get(first)]]
    print(f"{f'{first:,}-{last:,}':>12}  {cells[0]:8}{cells[1]:15}{cells[2]:25}{cells[3]}")

# %%
fig, ax = plt.subplots(figsize=(6, 3.6))
over_seeds(ax, baseline, lambda f: f.output_share, label="exact: [V, D] over [V, D]")
if all(flow[baseline, s].activation_norm for s in seeds):
    paper = lambda f: output_share(np.array(f.activation_norm), np.array(f.output_norm))
    over_seeds(ax, baseline, paper, color="black", linestyle="--", label="the paper's form: [V, D] over [B, T, D]")
last_step = flow[baseline, seeds[0]].steps[-1]
for (first, last), value in published.OUTPUT_SHARE.items():
    if first <= last_step:
        label = "published, OLMo-1B" if first == 1 else None
        ax.plot([first, min(last, last_step)], [value, value], color="C3", label=label)
ax.axhline(0.5, color="gray", linestyle=":", label="balance")
ax.set(xscale="log", xlabel="step", ylabel="output role's share of the norms", ylim=(0, 1), title=baseline)
ax.legend(fontsize="small")
plt.show()
