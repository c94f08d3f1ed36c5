# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lens
#
# **What does each layer already predict, tied against untied?** The logit lens reads a hidden state with the final
# norm and the output table; the tuned lens maps it first by a translator that is fitted to the model's own final
# prediction. Beside them what uniform, unigram, bigram and trigram predictors reach.
#
# Needs a finished study (`tiedjax study`) and the text that it was trained on, which is prepared again if it is not in
# the cache. Fits layers × runs translators: about a minute for the quick study on a laptop.

# %% tags=["parameters"]
import os

STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")  # a folder, or gs://BUCKET/STUDY

# %%
import matplotlib.pyplot as plt
import numpy as np

import tiedjax
from tiedjax.analysis import FrozenModel, data_of, held_out_windows, lens, paired, read_results, token_texts

study = read_results(STUDY)["study"]
reference, baseline, seeds = study["reference"], study["baseline"], study["seeds"]
colour = {baseline: "C0", reference: "C1"}
runs = {(arm, seed): tiedjax.load_run(f"{STUDY}/runs/{arm}-{seed}") for arm in colour for seed in seeds}
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Fit and score
# Translators are fitted on text that the run was trained on and scored on held-out windows.

# %%
found, beside = {}, {}
for key, run in runs.items():
    found[key] = lens(FrozenModel(run), run, data_of(run))
    beside[key] = found[key].baselines
    fits = [state.fit for state in found[key].states if state.fit]
    print(f"{run.name}: {sum(fit.converged for fit in fits)} of {len(fits)} translators converged")

# %% [markdown]
# A score at every state, [seeds, layers + 1], and a panel per lens: thin lines are seeds, grey ones predictors that
# see no hidden state.


# %%
def curve(arm, kind, score):
    return np.array([[getattr(getattr(s, kind), score).mean for s in found[arm, seed].states] for seed in seeds])


def state_axis(ax):
    states = found[baseline, seeds[0]].states
    every = max(1, len(states) // 8)
    ax.set_xticks(range(0, len(states), every), [s.name.removeprefix("layer ") for s in states[::every]])
    ax.set_xlabel("after layer")


def draw(ax, kind, score, levels):
    for arm in colour:
        values = curve(arm, kind, score)
        ax.plot(values.T, color=colour[arm], linewidth=0.6, alpha=0.5)
        ax.plot(values.mean(axis=0), "o-", markersize=4, color=colour[arm], label=arm)
    for name, value in levels.items():
        style = {"uniform": "-.", "unigram": "--", "bigram": ":", "trigram": (0, (1, 4))}[name]
        ax.axhline(value, color="gray", linestyle=style, label=f"{name}: {value:.2f}")
    state_axis(ax)
    ax.set_title(f"{kind} lens")


mean = lambda pick: np.mean([pick(b).mean for b in beside.values()])

# %% [markdown]
# ## How far from the final prediction?
# KL(final || lens), held-out text. The last state is read as it is: exactly 0. Mind the two scales.

# %%
levels = {"uniform": mean(lambda b: b.uniform.kl), "unigram": mean(lambda b: b.unigram.kl)}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
draw(axes[0], "logit", "kl", levels)
draw(axes[1], "tuned", "kl", {"unigram": levels["unigram"]})
for ax in axes:
    ax.set_ylim(0, None)
axes[0].set_ylabel("KL(final || lens) (bits per token)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## How well does it predict the text?
# Cross-entropy with the next token. A lens above the unigram line says less than token frequencies do.

# %%
levels = {
    "uniform": mean(lambda b: b.uniform.cross_entropy),
    "unigram": mean(lambda b: b.unigram.cross_entropy),
    "bigram": mean(lambda b: b.bigram_cross_entropy),
    "trigram": mean(lambda b: b.trigram_cross_entropy),
}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
draw(axes[0], "logit", "cross_entropy", levels)
draw(axes[1], "tuned", "cross_entropy", {name: levels[name] for name in ("unigram", "bigram", "trigram")})
axes[0].set_ylabel("cross-entropy (bits per token)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Tied less untied
# Differences between twins, paired by seed, with 95 % intervals. What crosses 0 is not measurably different.

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
for ax, kind in zip(axes, ["logit", "tuned"], strict=True):
    for score, style in [("kl", "o-"), ("cross_entropy", "s:")]:
        a, b = curve(baseline, kind, score), curve(reference, kind, score)
        spans = [paired(dict(enumerate(x)), dict(enumerate(y))) for x, y in zip(a.T, b.T, strict=True)]
        half = [span.half_width or 0 for span in spans]
        ax.errorbar(range(len(spans)), [span.mean for span in spans], half, fmt=style, capsize=3, label=score)
    ax.axhline(0, color="gray", linestyle="--", label="no difference")
    state_axis(ax)
    ax.set_title(f"{kind} lens")
axes[0].set_ylabel(f"{baseline} less {reference} (bits per token)")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Token by token
# A piece of held-out text through the logit lens of one pair of twins: in each cell the likeliest next token, its
# colour the probability; below, what really came. Where a tied input is read before any layer, look for the token that
# was just read: its own row is the nearest.


# %%
def grid(ax, run, first=8, length=10):
    model = FrozenModel(run)
    window_1S = held_out_windows(data_of(run), run.config.model.seq_len, 1)
    at = slice(min(first, window_1S.shape[1] - 1 - length), None)
    x_LTD = model.states(window_1S)[:, at][:, :length]
    p_LTV = np.exp([np.asarray(model.log_probabilities(model.normed(x_TD))) for x_TD in x_LTD])
    image = ax.imshow(p_LTV.max(-1), origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for layer, position in np.ndindex(p_LTV.shape[:2]):
        p_V = p_LTV[layer, position]
        shade = "white" if p_V.max() > 0.6 else "black"
        ax.text(position, layer, word(run, p_V.argmax()), ha="center", va="center", fontsize=8, color=shade)
    came = window_1S[0, 1:][at][:length]
    ax.set_xticks(range(length), [word(run, i) for i in came], fontsize=8, rotation=45)
    ax.set_yticks(range(len(x_LTD)), ["input", *range(1, len(x_LTD))])
    ax.set(title=run.name, xlabel="next token", ylabel="after layer")
    ax.grid(False)
    return image


def word(run, token):
    text = token_texts(run.tokenizer_path, [int(token)])[0]
    return repr(text)[1:-1].replace(" ", "␣").replace("$", r"\$")[:10]


fig, axes = plt.subplots(2, 1, figsize=(9, 6.5))
for ax, arm in zip(axes, colour, strict=True):
    image = grid(ax, runs[arm, seeds[0]])
fig.colorbar(image, ax=axes, label="probability of the likeliest token")
plt.show()
