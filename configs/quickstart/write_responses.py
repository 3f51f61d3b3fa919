"""Lets the quickstart's verifier answer freshly drawn problems, and writes the conversations as training data.

A draft model has to predict what its verifier writes, so the data set holds the verifier's own greedy responses, right
or wrong, together with the exact tokens that it read and wrote.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from problems import Problem, generate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specforge.verifier.fingerprint import fingerprint

HERE = Path(__file__).parent
SEEDS = {"train": 101, "validation": 102}  # far from the seeds of the verifier's training and validation problems


@dataclass(frozen=True)
class Verifier:
    """The model that writes the responses, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: dict[str, Any]


def load_verifier(folder: Path) -> Verifier:
    """Loads the verifier in float32, in which greedy choices do not depend on how prompts are batched."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # It shows specforge that acceptance lengths on these rows are exact for this verifier.
    origin = {"model": "specforge quickstart", "fingerprint": fingerprint(str(folder)), "temperature": 0.0}
    return Verifier(model, tokenizer, origin)


def render(verifier: Verifier, messages: list[dict[str, str]], is_open: bool) -> list[int]:
    """Turns messages into tokens; an open conversation ends where the response begins."""
    return verifier.tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, return_dict=False)


def respond(verifier: Verifier, problems: list[Problem], max_new_tokens: int) -> list[dict[str, Any]]:
    """Answers a batch of problems greedily and returns one row for each."""
    questions = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = [render(verifier, question, is_open=True) for question in questions]
    batch = verifier.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    written = verifier.model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
    responses = written[:, batch["input_ids"].shape[1] :].tolist()
    return [
        make_row(verifier, problem.source, question, prompt, response)
        for problem, question, prompt, response in zip(problems, questions, prompts, responses, strict=True)
    ]


def make_row(
    verifier: Verifier, source: str, question: list[dict[str, str]], prompt: list[int], response: list[int]
) -> dict[str, Any]:
    """Puts one conversation into the form of the data set.

    Args:
        verifier: The verifier that wrote the response.
        source: Name of the task or template that the question comes from.
        question: The message of the user.
        prompt: The tokens that the verifier read, without padding.
        response: The tokens that it wrote, including those after the end of its turn.

    Returns:
        The row; its loss mask is 1 exactly on the tokens that the verifier wrote.
    """
    end = verifier.tokenizer.eos_token_id
    if end in response:
        response = response[: response.index(end) + 1]
    answer = {"role": "assistant", "content": verifier.tokenizer.decode(response, skip_special_tokens=True)}
    return {
        "source": source,
        "origin": verifier.origin,
        "messages": [*question, answer],
        "input_ids": prompt + response,
        "loss_mask": [0] * len(prompt) + [1] * len(response),
    }


def is_faithful(verifier: Verifier, row: dict[str, Any]) -> bool:
    """Tells whether a response has ended and whether its text is tokenised into exactly the written tokens."""
    rendered = render(verifier, row["messages"], is_open=False)
    ended = row["input_ids"][-1] == verifier.tokenizer.eos_token_id
    return ended and rendered[: len(row["input_ids"])] == row["input_ids"]


def write_split(
    verifier: Verifier, problems: list[Problem], path: Path, max_new_tokens: int, batch_size: int = 32
) -> None:
    """Answers the problems and writes the rows, one JSON object a line, except those that are not faithful."""
    # Prompts of similar length share a batch, which needs little padding.
    order = sorted(range(len(problems)), key=lambda position: len(problems[position].question))
    rows: dict[int, dict[str, Any]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=path.stem, unit="batch"):
        positions = order[start : start + batch_size]
        answered = respond(verifier, [problems[position] for position in positions], max_new_tokens)
        rows.update(zip(positions, answered, strict=True))
    kept = [rows[position] for position in sorted(rows) if is_faithful(verifier, rows[position])]
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept))
    tokens = sum(sum(row["loss_mask"]) for row in kept)
    print(
        f"{path.name}: {len(kept)} of {len(problems)} rows kept, {tokens} response tokens, {path.stat().st_size} bytes"
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", type=Path, default=HERE / "verifier", help="folder of the verifier")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--train-rows", type=int, default=2000, help="problems of train.jsonl")
    parser.add_argument("--validation-rows", type=int, default=150, help="problems of validation.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest response")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Writes both splits; no prompt occurs in both."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    verifier = load_verifier(arguments.verifier)
    train = generate(arguments.train_rows, SEEDS["train"])
    validation = generate(
        arguments.validation_rows, SEEDS["validation"], exclude={problem.question for problem in train}
    )
    write_split(verifier, train, arguments.out / "train.jsonl", arguments.max_new_tokens)
    write_split(verifier, validation, arguments.out / "validation.jsonl", arguments.max_new_tokens)


if __name__ == "__main__":
    main()
