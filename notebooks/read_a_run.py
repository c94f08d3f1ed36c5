# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read a run
#
# **What does a run directory hold, and how do I get it into NumPy?** The config, the columns of the metrics, token
# counts, the two tables at every snapshot, and hidden states from the parameters and the model.
#
# Needs a finished study (`tiedjax study`), and for the last cells the text that it was trained on, which is prepared
# again if it is not in the cache. Takes seconds for the quick study on a laptop.

# %% tags=["parameters"]
import os

STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")  # a folder, or gs://BUCKET/STUDY

# %% [markdown]
# `load_run` reads nothing before it is asked for. Any run directory will do; here it is the first run of the study's
# baseline arm.

# %%
import matplotlib.pyplot as plt
import numpy as np

import tiedjax
from tiedjax.analysis import data_of, distinct, held_out_windows, most_frequent, read_results, token_texts

study = read_results(STUDY)["study"]
arm, seed = study["baseline"], study["seeds"][0]
run = tiedjax.load_run(f"{STUDY}/runs/{arm}-{seed}")
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Config
# Every field has its value here, also those that the config file left at their defaults.

# %%
print(run.config.tying)
print(run.config.model)
print(run.config.optimizer)

# %% [markdown]
# ## Metrics
# Columns as arrays, a line per logged step; NaN where a step has no value. Columns of deciles are [steps, 10], from the
# rarest tenth of the tokens to the most frequent.

# %%
for name, column in run.metrics.items():
    print(f"{name:25} {column.dtype!s:8} {column.shape!s:10} last {np.round(column[-1], 3)}")

# %% [markdown]
# ## Loss
# Chance levels: every token equally likely, and every token as likely as it is frequent (the entropy of the training
# text's token counts).

# %%
V, frequency = run.config.model.vocab_size, run.token_counts[1] / run.token_counts[1].sum()
seen = frequency > 0
entropy = -(frequency[seen] * np.log2(frequency[seen])).sum()

fig, ax = plt.subplots(figsize=(6, 3.6))
ax.plot(run.metrics["step"], run.metrics["loss"] / np.log(2), label="training batch")
ax.axhline(np.log2(V), color="gray", linestyle=":", label=f"uniform: {np.log2(V):.2f}")
ax.axhline(entropy, color="gray", linestyle="--", label=f"token frequencies: {entropy:.2f}")
if "eval_loss" in run.metrics:
    ax.plot(run.metrics["step"], run.metrics["eval_loss"] / np.log(2), "o", label="held out")
ax.set(xlabel="step", ylabel="loss (bits per token)", xscale="log", title=run.name)
ax.legend()
plt.show()

# %% [markdown]
# ## Token counts
# `token_counts[0]` counts a token as input, `[1]` as target, in one pass over the training windows.

# %%
for i in most_frequent(run.token_counts, 8):
    print(f"{token_texts(run.tokenizer_path, [i])[0]!r:12} {run.token_counts[1][i]:>10,}")
print(f"{(run.token_counts.sum(axis=0) == 0).sum():,} of {run.token_counts.shape[1]:,} rows never seen")

fig, ax = plt.subplots(figsize=(6, 3.6))
for counts, role, style in zip(run.token_counts, ["as input", "as target"], ["-", "--"], strict=True):
    ax.loglog(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], style, label=role)
ax.axhline(counts.mean(), color="gray", linestyle=":", label="if all were equally frequent")
ax.set(xlabel="rank of the token", ylabel="occurrences", title="token frequencies")
ax.legend()
plt.show()

# %% [markdown]
# ## Tables over training
# `run.tables(step)` gives `input` and `output`, float32 [V, D], and `tied`: whether they are one array. `distinct`
# names the distinct ones. The dashed line is where the table began.

# %%
steps = run.snapshot_steps
by_role = {role: [] for role in distinct(run.tables(steps[0]))}
for step in steps:
    for role, table_VD in distinct(run.tables(step)).items():
        by_role[role].append(np.percentile(np.linalg.norm(table_VD, axis=1), [25, 50, 75]))

fig, ax = plt.subplots(figsize=(6, 3.6))
for role, found in by_role.items():
    low, middle, high = np.transpose(found)
    ax.plot(steps, middle, "o-", label=f"{role}: median and quartiles of the rows")
    ax.fill_between(steps, low, high, alpha=0.2)
    ax.axhline(middle[0], color="gray", linestyle="--")
ax.set(xlabel="step", ylabel="L2 norm of a row", title=run.name)
ax.set_xscale("symlog", linthresh=1)
ax.set_xlim(left=-0.2)
ax.legend()
plt.show()

# %% [markdown]
# ## Norm and frequency
# If length had nothing to do with frequency, the median per bin would stay on the dashed line.

# %%
count_V = run.token_counts[1]
edges = np.arange(0, np.log10(count_V.max() + 1) + 0.5, 0.5)
bins = np.digitize(np.log10(count_V + 1), edges)
middle = 10 ** (edges + 0.25)

fig, ax = plt.subplots(figsize=(6, 3.6))
for role, table_VD in distinct(run.tables()).items():
    norm_V = np.linalg.norm(table_VD, axis=1)
    points = ax.plot(count_V + 1, norm_V, ".", markersize=3, alpha=0.3)
    used = [i for i in range(1, len(edges) + 1) if (bins == i).any()]
    medians = [np.median(norm_V[bins == i]) for i in used]
    ax.plot(middle[np.array(used) - 1], medians, "k-", label=f"{role}: median by bin")
    ax.axhline(np.median(norm_V), color="gray", linestyle="--", label="median of all rows")
ax.set(xscale="log", xlabel="occurrences as target + 1", ylabel="L2 norm of the row", title=f"step {steps[-1]:,}")
ax.legend()
plt.show()

# %% [markdown]
# ## Hidden states
# The body takes token vectors [B, T, D] and gives the states that the output table predicts from. With
# `hidden_states=True` it also gives the residual stream: the input and the output of every layer.

# %%
step = run.checkpoint_steps[-1]
tables, params = run.tables(step), run.params(step)
tokens_WS = held_out_windows(data_of(run), run.config.model.seq_len, tokens=2048)
inputs_BT, targets_BT = tokens_WS[:, :-1], tokens_WS[:, 1:]
h_BTD, x_LBTD = run.model().apply(params["body"], tables.input[inputs_BT], hidden_states=True)
h_BTD, x_LBTD = np.asarray(h_BTD, np.float32), np.asarray(x_LBTD, np.float32)
print("h_BTD", h_BTD.shape, " x_LBTD", x_LBTD.shape)

# %% [markdown]
# How the stream grows, and how soon it points to where it ends. Chance: the final state of another position.

# %%
x_LND = x_LBTD.reshape(len(x_LBTD), -1, x_LBTD.shape[-1])
norm_LN = np.linalg.norm(x_LND, axis=-1)
unit_LND = x_LND / norm_LN[..., None]
elsewhere = np.random.default_rng(0).permutation(unit_LND.shape[1])

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
left.plot(norm_LN.mean(axis=1), "o-")
left.set(xlabel="after layer (0: input)", ylabel="L2 norm, mean over positions", ylim=(0, None))
right.plot((unit_LND * unit_LND[-1]).sum(-1).mean(axis=1), "o-", label="same position")
right.plot((unit_LND * unit_LND[-1][elsewhere]).sum(-1).mean(axis=1), "--", color="gray", label="another position")
right.set(xlabel="after layer (0: input)", ylabel="cosine to the final state", ylim=(-0.1, 1.05))
right.legend()
for ax in (left, right):
    ax.set_xticks(range(len(x_LBTD)))
plt.show()

# %% [markdown]
# ## Predictions
# The states times the output table are the logits, with `model.output_bias` plus the run's bias. The loss of
# these windows, then what the model expects next.

# %%
logits_BTV = h_BTD @ tables.output.T + params.get("output_bias", 0)
log_p_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, axis=-1, keepdims=True)
nll_BT = -np.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
print(f"{nll_BT.mean() / np.log(2):.3f} bits per held-out token (uniform: {np.log2(V):.3f})\n")

for t in np.linspace(0, inputs_BT.shape[1] - 1, 6).astype(int):
    likely = np.argsort(-log_p_BTV[0, t])[:4]
    guesses = "  ".join(
        f"{word!r} {np.exp(log_p_BTV[0, t, i]):.2f}"
        for word, i in zip(token_texts(run.tokenizer_path, list(likely)), likely, strict=True)
    )
    now, following = token_texts(run.tokenizer_path, [inputs_BT[0, t], targets_BT[0, t]])
    print(f"after {now!r:12} comes {following!r:12} expected: {guesses}")
