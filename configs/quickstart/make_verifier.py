"""Trains the quickstart's verifier, a tiny Llama model, on templated word problems, and saves it with a model card.

The verifier is the large, frozen model of speculative decoding in miniature: small enough to train in a few minutes on
one CPU core, and trained well enough that a draft model has something to learn from it.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from problems import Problem, generate
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 1280
MAX_POSITIONS = 512
IGNORED = -100  # the label that the loss of transformers ignores
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# One word, digit, run of punctuation or run of whitespace is one piece; single digits keep the arithmetic learnable.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MODEL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Quickstart verifier

A Llama model of {parameters:,} parameters that answers templated word problems in worked sentences. It exists so that
the quickstart of this repository has a verifier that was really trained, loads in a moment and runs on a CPU. It is of
no use for anything else: it knows only these templates, and its arithmetic is often wrong.

| | |
| --- | --- |
| Architecture | Llama, {layers} layers, hidden size {hidden}, {heads} heads, {key_value_heads} key-value heads, \
tied embeddings |
| Parameters | {parameters:,}, stored in bfloat16 |
| Tokenizer | byte-level BPE, {vocabulary:,} tokens, ChatML |
| Context | {positions} positions; trained on conversations of at most {longest} tokens |
| Training data | {train_problems:,} problems ({train_tokens:,} tokens), drawn by `problems.py` with seed {seed}; \
half of them are tasks of the package reasoning-gym (Apache-2.0) |
| Training | {steps:,} steps of {batch_size} conversations, loss on all tokens, Muon at a peak learning rate of \
{matrix_learning_rate:g} for the matrices of the layers, AdamW at {learning_rate:g} for the rest, cosine schedule |
| Time | {seconds:.0f} seconds in float32, {threads} CPU thread(s) |
| Validation loss | {validation_loss:.3f} nats per token on {validation_problems:,} unseen problems, with the weights \
rounded to bfloat16; {answer_loss:.3f} on only the tokens of the answers |
| Licence | Apache-2.0 |

Made by `python configs/quickstart/make_verifier.py`.
"""


@dataclass(frozen=True)
class Conversation:
    """One tokenized problem with its answer.

    Attributes:
        input_ids: The tokens of the complete conversation.
        prompt_length: Number of tokens before the answer.
    """

    input_ids: list[int]
    prompt_length: int


def train_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with a ChatML chat template on the text of the problems."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PADDING, "<|im_start|>", END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["system\nuser\nassistant\n", *(f"{problem.question}\n{problem.answer}" for problem in problems)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> Conversation:
    """Turns a problem into the tokens of a conversation of one turn."""
    question = [{"role": "user", "content": problem.question}]
    answer = [{"role": "assistant", "content": problem.answer}]
    prompt_ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    input_ids = tokenizer.apply_chat_template(question + answer, return_dict=False)
    return Conversation(input_ids, len(prompt_ids))


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Builds a Llama model of about half a million parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=8,  # EAGLE-3 reads three different depths of the verifier
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def collate(conversations: list[Conversation], padding_id: int) -> dict[str, Tensor]:
    """Pads conversations on the right, which causal attention never sees, and excludes padding from the loss."""
    length = max(len(conversation.input_ids) for conversation in conversations)
    rows = [conversation.input_ids for conversation in conversations]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([row + [padding_id] * (length - len(row)) for row in rows])
    labels = input_ids.masked_fill(torch.arange(length) >= lengths[:, None], IGNORED)
    return {"input_ids": input_ids, "labels": labels}


def batches(conversations: list[Conversation], size: int, random: Random) -> Iterator[list[Conversation]]:
    """Yields batches of conversations of similar length without end, which keeps the padding small."""
    while True:
        pool = random.sample(conversations, min(len(conversations), 32 * size))
        pool.sort(key=lambda conversation: len(conversation.input_ids))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        random.shuffle(groups)
        yield from groups


def learning_rate_factor(step: int, steps: int) -> float:
    """Warms up over the first 5 % of the steps and then follows a cosine down to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, conversations: list[Conversation], padding_id: int, batch_size: int = 32
) -> tuple[float, float]:
    """Measures the mean loss per token.

    Args:
        model: The model to measure.
        conversations: The conversations to measure on.
        padding_id: Token that pads shorter conversations.
        batch_size: Number of conversations that run at once.

    Returns:
        The mean over all tokens and the mean over the tokens of the answers.
    """
    model.eval()
    ordered = sorted(conversations, key=lambda conversation: len(conversation.input_ids))
    losses, answer_losses = [], []
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        batch = collate(group, padding_id)
        logits = model(input_ids=batch["input_ids"]).logits
        labels = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        prompt_lengths = torch.tensor([conversation.prompt_length for conversation in group])
        is_answer = torch.arange(1, labels.shape[1] + 1) >= prompt_lengths[:, None]
        losses.append(loss[labels != IGNORED])
        answer_losses.append(loss[(labels != IGNORED) & is_answer])
    model.train()
    return torch.cat(losses).mean().item(), torch.cat(answer_losses).mean().item()


def train(
    model: LlamaForCausalLM,
    training: list[Conversation],
    validation: list[Conversation],
    padding_id: int,
    arguments: argparse.Namespace,
) -> None:
    """Trains the model in place on the loss of all tokens and reports the losses during training."""
    # Muon learns the matrices of the layers in fewer steps than AdamW, which updates embeddings and norms.
    matrices = [parameter for name, parameter in model.named_parameters() if "proj" in name]
    others = [parameter for name, parameter in model.named_parameters() if "proj" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    factor = partial(learning_rate_factor, steps=arguments.steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    source = batches(training, arguments.batch_size, Random(arguments.seed))
    progress = tqdm(range(1, arguments.steps + 1), desc="verifier", unit="step")
    for step in progress:
        loss = model(**collate(next(source), padding_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 250 == 0:
            validation_loss, answer_loss = evaluate(model, validation[:250], padding_id)
            progress.write(
                f"step {step}: training loss {loss.item():.3f}, validation loss {validation_loss:.3f}, "
                f"on answers {answer_loss:.3f}"
            )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16 together with its tokenizer."""
    model.generation_config.do_sample = False
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Versions of transformers before 5 and most serving engines know the tokenizer's class only by this name.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "verifier", help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="conversations per step")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak for embeddings and norms")
    parser.add_argument("--matrix-learning-rate", type=float, default=2e-2, help="peak for the matrices of the layers")
    parser.add_argument("--problems", type=int, default=30_000, help="problems to train on")
    parser.add_argument("--validation-problems", type=int, default=1000, help="problems to validate on")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems and of the training")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more hardly help so small a model")
    return parser.parse_args()


def main() -> None:
    """Makes the problems, the tokenizer, the model and its card."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    problems = generate(arguments.problems, arguments.seed)
    known = {problem.question for problem in problems}
    unseen = generate(arguments.validation_problems, arguments.seed + 1, exclude=known)
    tokenizer = train_tokenizer(problems)
    training = [tokenize(tokenizer, problem) for problem in tqdm(problems, desc="tokenize")]
    validation = [tokenize(tokenizer, problem) for problem in unseen]
    padding_id = tokenizer.pad_token_id
    model = build_model(tokenizer, arguments.seed)

    started = time.perf_counter()
    train(model, training, validation, padding_id, arguments)
    seconds = time.perf_counter() - started
    save(model, tokenizer, arguments.out)
    # The card states the loss of the saved weights, not of those before rounding.
    validation_loss, answer_loss = evaluate(model.float(), validation, padding_id)
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        key_value_heads=model.config.num_key_value_heads,
        vocabulary=len(tokenizer),
        positions=MAX_POSITIONS,
        longest=max(len(conversation.input_ids) for conversation in training),
        train_problems=len(training),
        train_tokens=sum(len(conversation.input_ids) for conversation in training),
        seed=arguments.seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        matrix_learning_rate=arguments.matrix_learning_rate,
        seconds=seconds,
        threads=arguments.threads,
        validation_loss=validation_loss,
        validation_problems=len(validation),
        answer_loss=answer_loss,
    )
    (arguments.out / "README.md").write_text(card)
    print(f"validation loss {validation_loss:.3f}, on answers {answer_loss:.3f}, {seconds:.0f} seconds")


if __name__ == "__main__":
    main()
