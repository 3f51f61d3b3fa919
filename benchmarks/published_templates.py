"""The chat templates inside published packages, and a tokenizer for each.

The repository stores only their names and digests.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# These folders hold templates of rerankers and embedders, which are not chat templates.
_NO_CHATS = re.compile(r"/(pooling|embed|score)/|(rerank|/template_basic|/template_blip2|_ocr|_audio)[^/]*$")


@dataclass(frozen=True)
class Package:
    """A package with chat templates.

    Attributes:
        requirement: Requirement for pip.
        source: Whether the templates are in the source package only.
        variables: Environment variables for its build to report its version.
        needs: Packages that its build needs for that; pip would install all build requirements.
    """

    requirement: str
    source: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name without the version."""
        return self.requirement.partition("==")[0]

    def unpack(self, folder: Path) -> Path:
        """Download it into a folder unless it exists; return where it is unpacked."""
        target = folder / self.requirement
        if not target.exists():
            archives = folder / "archives" / self.requirement
            self._download(archives, folder / "build")
            _extract(next(archives.iterdir()), target)
        return target

    def _download(self, folder: Path, build: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), self.requirement]
        environment = dict(os.environ)
        command += ["--no-binary" if self.source else "--only-binary", ":all:"]
        if self.needs:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(build), *self.needs]
            subprocess.run(pip, check=True)
            command += ["--no-build-isolation"]
            environment |= {"PYTHONPATH": str(build), **dict(self.variables)}
        subprocess.run(command, check=True, env=environment)


PACKAGES = (
    Package("llama-cpp-python==0.3.36", source=True, needs=("scikit-build-core", "pathspec", "packaging")),
    Package("trl==1.16.0"),
    Package("axolotl==0.19.0"),
    Package(
        "vllm==0.33.0",
        source=True,
        variables=(("VLLM_TARGET_DEVICE", "empty"), ("VLLM_VERSION_OVERRIDE", "0.33.0")),
        needs=("setuptools-scm", "setuptools-rust", "packaging", "wheel", "jinja2"),
    ),
    Package("unsloth==2026.10.9"),
)


@dataclass(frozen=True)
class Template:
    """A published template.

    Attributes:
        package: The first package that has it.
        name: Name of the file or variable in it.
        text: Its text.
    """

    package: str
    name: str
    text: str

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def read_templates(folder: Path, packages: tuple[Package, ...] = PACKAGES) -> list[Template]:
    """Return the distinct chat templates of some packages, which are downloaded into a folder if missing."""
    found: dict[str, Template] = {}
    for package in packages:
        root = package.unpack(folder)
        for name, text in sorted(_texts(root)):
            template = Template(package.name, name, text)
            found.setdefault(template.digest, template)
    return list(found.values())


def _texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.jinja")):
        if not _NO_CHATS.search(str(path)):
            yield path.stem, path.read_text(encoding="utf-8")
    for path in sorted(root.rglob("*chat_templates.py")):
        yield from _constants(path.read_text(encoding="utf-8"))


def _constants(source: str) -> Iterator[tuple[str, str]]:
    """Yield the templates that a module assigns to names."""
    for node in ast.parse(source).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.targets[0], ast.Name)
        ):
            text = node.value.value
            if isinstance(text, str) and "{%" in text and "message" in text and "{{" in text:
                yield node.targets[0].id, text


def _extract(archive: Path, target: Path) -> None:
    """Unpack the files that may hold templates."""
    endings = (".jinja", "chat_templates.py")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if name.endswith(endings)])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(
                target, [member for member in tar.getmembers() if member.name.endswith(endings)], filter="data"
            )


# Control tokens of the families. Some templates concatenate them: '<|' + message['role'] + '|>'.
_CONTROL = re.compile(
    r"<\|[^|<>\s'\"{}]+\|?>|<[a-z_]+\|>|<｜[^｜<>'\"{}]+｜>|\[/?[A-Z_]{2,}\]|\[\|[a-z]+\|\]|</?s>|</?[a-z]+:[a-z_]+>"
    r"|<(?:start|end|begin)_of_\w+>|<SPECIAL_\d+>|<sep>|</assistant>|\]~!?b?\[|\[e~\[|\]~b\]|<unused\d+>"
)
_PUT_TOGETHER = re.compile(r"'<\|'|\"<\|\"|<\|\{\{")
_ROLES = ("system", "user", "assistant", "observation", "tool", "developer")
# The end tokens of each family's generation configuration; the first entry whose first token is in the template
# applies.
_END_TOKENS: tuple[tuple[str, ...], ...] = (
    ("<|return|>", "<|call|>", "<|endoftext|>"),
    ("<|observation|>", "<|user|>", "<|endoftext|>"),
    ("<|message_sep|>", "</s>"),
    ("<|role_end|>",),
    ("<|end_of_msg|>",),
    ("<|eot|>", "<|eom|>", "<|end_of_text|>"),
    ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ("<|assistant_end|>",),
    ("<|im_end|>", "<|endoftext|>"),
    ("<|end_of_turn|>",),
    ("<turn|>", "<|tool_response>", "<eos>"),
    ("<end_of_turn>", "<start_function_response>", "<eos>"),
    ("<|END_OF_TURN_TOKEN|>",),
    ("<｜end▁of▁sentence｜>",),
    ("<|end_of_text|>",),
    ("<end_of_utterance>",),
    ("<seed:eos>",),
    ("[e~[",),
    ("<end_of_sentence>",),
    ("[|endofturn|]",),
    ("<SPECIAL_12>",),
    ("<|EOT|>",),
    ("<|eom|>",),
    ("<|eos|>",),
    ("<|end|>", "<|endoftext|>"),
    ("</assistant>",),
    ("<sep>",),
    ("<|endoftext|>",),
)
_HUNYUAN = "<｜hy_eos:opensource｜>"  # its template concatenates the names of its tokens
# Training words for a tokenizer, so that its tokens are longer than a byte and may straddle a boundary.
_CORPUS = [
    "What is seven times eight? The product is 56.\n\n",
    "```python\nprint(1)\n```\n\n\n",
    'user\nassistant\n {"town"',
] * 8


def end_tokens(text: str) -> tuple[str, ...]:
    """Return the tokens that a verifier with this template ends a reply with."""
    if "hy_eos" in text:
        return (_HUNYUAN,)
    return next((tokens for tokens in _END_TOKENS if tokens[0] in text), ("</s>",))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with a template and its control tokens."""
    ends = end_tokens(text)
    control = {*_CONTROL.findall(text), *ends, "<s>", "</s>"}
    if _PUT_TOGETHER.search(text):
        control |= {f"<|{role}|>" for role in _ROLES}
    backend = _base_tokenizer()
    backend.add_special_tokens(sorted(control))
    words = [word for word in ("<think>", "</think>", "<tool_call>", "</tool_call>") if word in text]
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    bos = next(
        (
            candidate
            for candidate in ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "[gMASK]")
            if candidate in control
        ),
        "<s>",
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=ends[0], chat_template=text)


def _base_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend
