"""A trained draft in Python, cell by cell: load it, generate, read the statistics, plot them.

Train it first, from the root of the repository: specforge fit --config configs/quickstart.yaml
Editors (VS Code, PyCharm, Spyder) and Jupyter (with jupytext) run the cells between the ``# %%`` lines one by one;
``python examples/use_a_draft.py`` runs them all.
"""

# %% Load the draft. It brings its verifier, which checks every token.
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoTokenizer

from specforge import SpeculatorModel

DRAFT = "runs/quickstart/version_0/draft"
VERIFIER = "configs/quickstart/verifier"
draft = SpeculatorModel.from_pretrained(DRAFT, verifier=VERIFIER)
tokenizer = AutoTokenizer.from_pretrained(VERIFIER, padding_side="left")

# %% Let it answer. The text is the verifier's own, token for token.
QUESTION = "It is 60 km to the library. Maya cycles 20 km per hour. How long is the way?"
chat = [{"role": "user", "content": QUESTION}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
found = draft.generate(prompt, max_new_tokens=96, return_dict_in_generate=True)
answer = tokenizer.decode(found.sequences[0, prompt.shape[1] :], skip_special_tokens=True)
print(answer)
print(f"{found.acceptance_length:.2f} tokens per verifier forward pass")

# %% Compare ways to draft, on several prompts at once. Prompt lookup needs no draft: it is what to beat.
ROWS = Path("configs/quickstart/validation.jsonl").read_text(encoding="utf-8").splitlines()[:16]
chats = [json.loads(row)["messages"][:1] for row in ROWS]
prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
results = {
    proposal: draft.generate(**prompts, max_new_tokens=96, proposal=proposal, return_dict_in_generate=True)
    for proposal in ("greedy:speculative_tokens=5", "dynamic_tree:depth=5", "prompt_lookup")
}
for proposal, result in results.items():
    assert torch.equal(result.sequences, results["prompt_lookup"].sequences)  # lossless, however it is drafted
    print(f"{proposal:<28} {result.acceptance_length:.2f}")

# %% Plot how often at least k drafted tokens are accepted.
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for proposal, result in results.items():
    rates = result.accepted_by_position.sum(0) / result.rounds.sum()
    axes.plot(range(1, len(rates) + 1), rates, marker="o", label=proposal)
axes.set(xlabel="k", ylabel="share of rounds", ylim=(0, 1.03), title="Rounds that accept at least k drafted tokens")
axes.legend(frameon=False)
figure.savefig("acceptance.png", dpi=120)
