"""``specforge medusa-heads``: what each head proposes after a text."""

from __future__ import annotations

import argparse

import torch

from specforge.config import SpeculatorModelConfig
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import UsageError
from specforge.verifier.features import capture
from specforge.verifier.loading import load_verifier
from specforge_medusa.config import MedusaConfig
from specforge_medusa.model import MedusaModel


def run(arguments: list[str]) -> int:
    """Show the most probable tokens of each Medusa head after a prompt and the verifier's next token."""
    found = command_line().parse_args(arguments)
    draft = load_draft(found.draft)
    if not 1 <= found.top <= draft.config.vocab_size:
        raise UsageError(f"--top {found.top}: allowed are 1 to {draft.config.vocab_size:,}")
    print("\n".join(describe_heads(draft, found.prompt, found.top)))
    print(f"Decode with them: specforge generate {found.draft} --prompt ...")
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments, which shells use for completion."""
    parser = argparse.ArgumentParser(prog="specforge medusa-heads", description=run.__doc__)
    parser.add_argument("draft", metavar="DRAFT", help="folder or hub id of the draft")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to answer, as one turn of a chat")
    parser.add_argument("--top", metavar="N", type=int, default=3, help="tokens to show of each head (default: 3)")
    return parser


def load_draft(name: str) -> MedusaModel:
    """Load Medusa heads with their verifier.

    Raises:
        UsageError: It is a draft of another algorithm, or names no verifier.
    """
    config = SpeculatorModelConfig.from_pretrained(name)
    if not isinstance(config, MedusaConfig):
        raise UsageError(f"{name} holds a draft of {config.speculators_model_type!r}; medusa-heads reads 'medusa'")
    if config.speculators_config is None or config.speculators_config.verifier.name_or_path is None:
        raise UsageError(f"{name}: speculators_config.verifier.name_or_path is missing in its config.json")
    verifier = load_verifier(config.speculators_config.verifier.name_or_path)
    return MedusaModel.from_pretrained(name, verifier=verifier, dtype=verifier.dtype)


@torch.no_grad()
def describe_heads(draft: MedusaModel, prompt: str, top: int) -> list[str]:
    """Return one line for the verifier's next token and one for each head.

    Args:
        draft: Medusa heads, with the complete verifier attached.
        prompt: One turn of a chat.
        top: Number of tokens per line.
    """
    assert draft.verifier is not None
    tokenizer = VerifierTokenizer(draft.verifier.name_or_path).tokenizer
    chat = [{"role": "user", "content": prompt}]
    tokens = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    features = capture(draft.verifier, tokens, torch.arange(tokens.shape[1])[None], draft.aux_layers)
    states = draft.first_state(features)[0, -1]
    predictions = {"verifier": draft.verifier_parts.logits(features.last[0, -1])}
    predictions |= {
        f"head {head}": draft.logits(draft.advance(states, head), head) for head in range(draft.config.num_heads)
    }
    lines = []
    for name, logits in predictions.items():
        best = logits.float().softmax(-1).topk(top)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        shown = "  ".join(f"{tokenizer.decode([token])!r} {share:.1%}" for token, share in pairs)
        lines.append(f"{name:<9} {shown}")
    return lines
