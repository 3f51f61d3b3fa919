"""Third-party plugins: found, listed, run, and their faults reported without affecting anything else."""

from __future__ import annotations

import re
from itertools import takewhile

import pytest

from specforge import __version__
from specforge.__main__ import main

HOOKS = "from specforge.hookspecs import Algorithm, CheckpointFormat, Command, Objective, ProposalMethod, hookimpl\n"
GOOD = (
    HOOKS
    + """
@hookimpl
def specforge_algorithms():
    return [Algorithm("toyalgo", "a toy", "toy_heavy:ToyConfig", "toy_heavy:ToyDraft")]

@hookimpl
def specforge_objectives():
    return [Objective("toyloss", "a loss for play", "toy_heavy:toy_loss")]

@hookimpl
def specforge_checkpoint_formats():
    return [CheckpointFormat("toyformat", "a layout for play", algorithm="toyalgo", layout="toy_heavy:ToyLayout")]

@hookimpl
def specforge_proposals():
    return [ProposalMethod("toychain", "a chain for play", "toy_heavy:ToyConfig", "toy_heavy:ToyDraft")]

@hookimpl
def specforge_commands():
    return (Command("hello", "greet", "toy:hello") for _ in range(1))

def hello(arguments):
    print("hello", arguments)
    return 3
"""
)
HEAVY = """
import torch
class ToyConfig: ...
class ToyDraft: ...
def toy_loss(rows): ...
class ToyLayout: ...
"""
HELLO = """
@hookimpl
def specforge_commands():
    return [Command("{name}", "greet", "{module}:run")]

def run(arguments):
    print("hello from {module}")
    return 0
"""
SHARED = """
@hookimpl
def specforge_algorithms():
    return [Algorithm("shared", "claimed twice", "{module}:Config", "{module}:Draft")]

class Config: ...
class Draft: ...
"""
TWICE = """
@hookimpl
def specforge_commands():
    return [Command("hello", "one", "toy:one"), Command("hello", "two", "toy:two")]

def run(arguments): return 0
def two(arguments): return 0
"""


def section(listing: str, head: str) -> list[str]:
    """Return the lines that ``specforge plugins`` prints for one plugin, without the heading."""
    lines = listing.splitlines()
    return [line.strip() for line in takewhile(lambda line: line.startswith("  "), lines[lines.index(head) + 1 :])]


class TestGoodPlugin:
    @pytest.fixture(autouse=True)
    def _install(self, toys):
        toys.install("toy-package", GOOD)
        toys.write("toy_heavy.py", HEAVY)

    def test_is_listed_with_package_version_and_contributions(self, toys):
        done = toys.run("plugins")
        assert (done.returncode, done.stderr) == (0, "")
        rows = [re.split(r"\s{2,}", line) for line in section(done.stdout, "toy  (toy-package 0.1)")]
        assert rows == [
            ["algorithm", "toyalgo", "a toy [loads; training is not provided]"],
            ["proposal method", "toychain", "a chain for play"],
            ["objective", "toyloss", "a loss for play"],
            ["checkpoint format", "toyalgo/toyformat", "a layout for play"],
            ["command", "hello", "greet"],
        ]
        assert "FAULT" not in done.stdout

    def test_help_shows_its_command_and_algorithm(self, toys):
        done = toys.run("--help")
        assert done.returncode == 0
        assert re.search(r"^  hello +greet$", done.stdout, re.MULTILINE)
        assert "toyalgo" in done.stdout
        assert "have faults" not in done.stdout

    def test_its_command_gets_the_arguments_and_returns_the_status(self, toys):
        done = toys.run("hello", "a", "--b")
        assert (done.returncode, done.stdout, done.stderr) == (3, "hello ['a', '--b']\n", "")

    def test_algorithm_without_training_cannot_be_fitted(self, toys):
        done = toys.run("fit", "--algorithm", "toyalgo")
        assert done.returncode == 2
        assert "toyalgo" in done.stderr and "does not train" in done.stderr
        assert "Traceback" not in done.stderr

    def test_its_algorithm_is_listed_by_fit_help(self, toys):
        done = toys.run("fit", "--help")
        assert done.returncode == 0
        assert re.search(r"^  toyalgo +a toy$", done.stdout, re.MULTILINE)


class TestClashes:
    def test_two_plugins_with_one_name(self, toys):
        toys.install("alpha", HOOKS + HELLO.format(name="one", module="toy_a"), module="toy_a")
        toys.install("beta", HOOKS + HELLO.format(name="two", module="toy_b"), module="toy_b")
        listing = toys.run("plugins").stdout
        faults = [line for line in listing.splitlines() if "FAULT" in line]
        assert len(faults) == 2
        assert all("plugin 'toy'" in line and "alpha 0.1" in line and "beta 0.1" in line for line in faults)
        assert "2 of" in toys.run("--help").stdout

    def test_two_packages_with_one_algorithm(self, toys):
        toys.install(
            "alpha",
            HOOKS + SHARED.format(module="toy_a") + HELLO.format(name="hello", module="toy_a"),
            module="toy_a",
            plugin="a",
        )
        toys.install("beta", HOOKS + SHARED.format(module="toy_b"), module="toy_b", plugin="b")
        done = toys.run("fit", "--algorithm", "shared")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        for part in ("'shared'", "alpha 0.1", "beta 0.1"):
            assert part in done.stderr
        other = toys.run("hello")
        assert (other.returncode, other.stdout) == (0, "hello from toy_a\n")
        for head in ("a  (alpha 0.1)", "b  (beta 0.1)"):
            faults = [line for line in section(toys.run("plugins").stdout, head) if line.startswith("FAULT")]
            assert len(faults) == 1 and "alpha" in faults[0] and "beta" in faults[0]

    def test_a_package_cannot_take_over_a_command_of_the_core(self, toys):
        toys.install("alpha", HOOKS + HELLO.format(name="fit", module="toy"))
        done = toys.run("fit", "--help")
        assert done.returncode == 2
        assert "'fit'" in done.stderr and "alpha 0.1" in done.stderr and "specforge" in done.stderr
        assert "hello" not in done.stdout

    def test_one_plugin_that_claims_a_name_twice(self, toys):
        toys.install("alpha", HOOKS + TWICE)
        assert "FAULT" in toys.run("plugins").stdout


class TestMissingTargets:
    ALGORITHM = """
@hookimpl
def specforge_algorithms():
    return [Algorithm("toyalgo", "a toy", "{target}", "toy:ToyDraft", "toy:ToyDraft", "toy:ToyDraft")]

class ToyConfig: ...
class ToyDraft: ...
"""

    @pytest.mark.parametrize("target", ["toy:ToyConfg", "toy_heavyy:ToyConfig", "toy.deep.er:ToyConfig", "toy", "toy:"])
    def test_are_listed_by_plugins(self, toys, target):
        toys.install("toy-package", HOOKS + self.ALGORITHM.format(target=target))
        done = toys.run("plugins")
        assert done.returncode == 0
        faults = [line for line in section(done.stdout, "toy  (toy-package 0.1)") if line.startswith("FAULT")]
        assert faults == [f"FAULT: algorithm 'toyalgo' names {target}, which does not exist"]

    def test_missing_class_is_reported_with_the_nearest_name(self, toys):
        toys.install("toy-package", HOOKS + self.ALGORITHM.format(target="toy:ToyConfg"))
        code = (
            "from specforge.config import SpeculatorModelConfig as C\n"
            "from specforge.errors import UsageError\n"
            "try: C.from_dict({'speculators_model_type': 'toyalgo'})\n"
            "except UsageError as error: print(error)\n"
        )
        message = toys.python("-c", code).stdout
        for part in ("toy-package 0.1", "'toyalgo'", "toy:ToyConfg", "'ToyConfig'"):
            assert part in message

    def test_missing_function_of_a_command(self, toys):
        toys.install("toy-package", HOOKS + HELLO.format(name="hello", module="toy").replace("toy:run", "toy:rum"))
        done = toys.run("hello")
        assert done.returncode == 2
        assert "toy:rum" in done.stderr and "Did you mean 'run'?" in done.stderr
        assert "Traceback" not in done.stderr

    def test_missing_module_of_a_command(self, toys):
        toys.install("toy-package", HOOKS + HELLO.format(name="hello", module="toy").replace("toy:run", "toyy:run"))
        done = toys.run("hello")
        assert done.returncode == 2
        assert "toyy:run" in done.stderr and "No module named 'toyy'" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("fault", ["syntax error here", "raise RuntimeError('no GPU library')"])
    def test_a_broken_module_of_a_descriptor_affects_only_its_user(self, toys, fault):
        toys.install("toy-package", HOOKS + HELLO.format(name="hello", module="toy").replace("toy:run", "broken:run"))
        toys.write("broken.py", fault)
        self._check_only_hello_fails(toys)

    def test_a_broken_parent_package_of_a_descriptor_affects_only_its_user(self, toys):
        source = HELLO.format(name="hello", module="toy").replace("toy:run", "broken.inner:run")
        toys.install("toy-package", HOOKS + source)
        toys.write("broken/__init__.py", "raise RuntimeError('no GPU library')")
        toys.write("broken/inner.py", "def run(arguments): return 0")
        self._check_only_hello_fails(toys)

    def _check_only_hello_fails(self, toys):
        others = [toys.run("--help"), toys.run("plugins")]
        assert [other.returncode for other in others] == [0, 0], others[0].stderr
        done = toys.run("hello")
        assert done.returncode == 2
        assert "toy-package" in done.stderr and "broken" in done.stderr
        assert "Traceback" not in done.stderr


class TestFaultyPlugin:
    @pytest.mark.parametrize(
        ("source", "last_line"),
        [
            ("raise RuntimeError('no such accelerator')", "RuntimeError: no such accelerator"),
            ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
            ("def broken(:", "SyntaxError: invalid syntax"),
            ("import sys; sys.exit('stopped while importing')", "SystemExit: stopped while importing"),
        ],
    )
    def test_import_that_fails(self, toys, source, last_line):
        toys.install("broken-package", source, module="toy_broken", plugin="broken")
        toys.install("toy-package", HOOKS + HELLO.format(name="hello", module="toy"))
        listing = toys.run("plugins")
        assert listing.returncode == 0, listing.stderr
        assert section(listing.stdout, "broken  (broken-package 0.1)") == [f"FAULT: {last_line}"]
        assert toys.run("hello").returncode == 0
        assert "1 of" in toys.run("--help").stdout
        needing = toys.run("fit", "--algorithm", "of_the_broken_one")
        assert needing.returncode == 2
        assert "'of_the_broken_one'" in needing.stderr
        assert "broken-package 0.1" in needing.stderr and last_line in needing.stderr
        assert "Traceback" not in needing.stderr

    def test_misspelt_hook(self, toys):
        toys.install("toy-package", HOOKS + "@hookimpl\ndef specforge_algorithm():\n    return []\n")
        toys.install(
            "other-package", HOOKS + HELLO.format(name="hello", module="toy_o"), module="toy_o", plugin="zzz_other"
        )
        faults = section(toys.run("plugins").stdout, "toy  (toy-package 0.1)")
        assert len(faults) == 1 and "specforge_algorithm'" in faults[0] and "unknown hook" in faults[0]
        assert toys.run("hello").returncode == 0

    def test_hook_with_an_unknown_argument(self, toys):
        toys.install("toy-package", HOOKS + "@hookimpl\ndef specforge_algorithms(trainer):\n    return []\n")
        listing = toys.run("plugins").stdout
        assert "FAULT" in listing and "specforge_algorithms" in listing and "trainer" in listing

    @pytest.mark.parametrize("answer", ["['eagle9']", "[{'name': 'eagle9'}]", "'eagle9'", "[Algorithm]", "None", "7"])
    def test_hook_that_returns_no_descriptors(self, toys, answer):
        toys.install("toy-package", HOOKS + f"@hookimpl\ndef specforge_algorithms():\n    return {answer}\n")
        done = toys.run("plugins")
        assert done.returncode == 0
        lines = section(done.stdout, "toy  (toy-package 0.1)")
        assert len(lines) == 1 and lines[0].startswith("FAULT")
        assert "specforge_algorithms" in lines[0]

    def test_hook_that_raises(self, toys):
        toys.install("toy-package", HOOKS + "@hookimpl\ndef specforge_algorithms():\n    return [1 / 0]\n")
        assert section(toys.run("plugins").stdout, "toy  (toy-package 0.1)") == [
            "FAULT: ZeroDivisionError: division by zero"
        ]

    @pytest.mark.parametrize("name", ["aa_first", "zz_last"])  # plugins are loaded by name
    def test_a_wrapper_changes_the_contributions_of_others(self, toys, name):
        wrapper = """
from dataclasses import replace

@hookimpl(wrapper=True)
def specforge_commands():
    answers = yield
    return [[replace(item, name=item.name.replace("hello", "bonjour")) for item in answer] for answer in answers]
"""
        toys.install("french", HOOKS + wrapper, module="french", plugin=name)
        toys.install("toy-package", HOOKS + HELLO.format(name="hello", module="toy"))
        listing = toys.run("plugins").stdout
        assert section(listing, "toy  (toy-package 0.1)") == ["command            bonjour             greet"]
        assert section(listing, f"{name}  (french 0.1)") == ["contributes nothing yet"]
        assert toys.run("bonjour").stdout == "hello from toy\n"

    def test_plugin_that_adds_nothing(self, toys):
        toys.install("toy-package", HOOKS)
        assert section(toys.run("plugins").stdout, "toy  (toy-package 0.1)") == ["contributes nothing yet"]


def test_an_algorithm_whose_configuration_has_another_name_is_refused(toys):
    source = """
from specforge.hookspecs import Algorithm, hookimpl

@hookimpl
def specforge_algorithms():
    return [Algorithm("toyalgo", "a toy", "toy_heavy:ToyConfig", "toy_heavy:ToyDraft", "toy_heavy:M", "toy_heavy:D")]
"""
    toys.install("toy-package", source)
    toys.write(
        "toy_heavy.py",
        """
from typing import ClassVar
from specforge.config import SpeculatorModelConfig

class ToyConfig(SpeculatorModelConfig):
    model_type_name: ClassVar[str] = "toy"

class ToyDraft: ...
class M: ...
class D: ...
""",
    )
    done = toys.run("fit", "--algorithm", "toyalgo")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "'toyalgo' is inconsistent: model_type_name of toy_heavy:ToyConfig is 'toy'" in done.stderr


def test_a_plugin_adds_a_family_of_draft_layers(toys):
    toys.install(
        "toy-package",
        """
from specforge.hookspecs import LayerFamily, hookimpl

@hookimpl
def specforge_layer_families():
    return [LayerFamily("mistral", "Mistral's layers", "toy_heavy:MISTRAL")]
""",
    )
    toys.write(
        "toy_heavy.py",
        """
from transformers import MistralConfig
from transformers.models.mistral import modeling_mistral as m
from specforge.models.base_components import Family

MISTRAL = Family(
    MistralConfig, m.MistralAttention, m.MistralMLP, m.MistralRMSNorm, m.MistralRotaryEmbedding, m.MistralDecoderLayer
)
""",
    )
    code = (
        "from transformers import LlamaConfig\n"
        "from specforge_eagle3.model import Eagle3DraftModel\n"
        "from specforge_eagle3.module import Eagle3DraftSettings\n"
        "verifier = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)\n"
        "settings = Eagle3DraftSettings(layer_type='mistral')\n"
        "draft = Eagle3DraftModel.from_training_args(verifier, layer_type=settings.layer_type)\n"
        "draft.save_pretrained('draft')\n"
        "again = Eagle3DraftModel.from_pretrained('draft')\n"
        "print(again.config.transformer_layer_config.model_type, type(again.layers[0].self_attn).__name__)\n"
    )
    done = toys.python("-c", code)
    assert done.stdout == "mistral MistralAttention\n", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["plugins"],
        ["plugins", "--help"],
        ["nosuch"],
        ["fit"],
        ["fit", "--help"],
        ["fit", "--algorithm", "nosuch"],
    ],
)
def test_light_commands_import_nothing_heavy(toys, words):
    toys.install("toy-package", GOOD)
    toys.write("toy_heavy.py", HEAVY)
    code = (
        "import sys\n"
        "from specforge.__main__ import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = toys.python("-c", code)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"specforge {__version__}\n"


def test_no_arguments_print_help(capsys):
    assert main([]) == 0
    assert "usage: specforge COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "nearest"), [("fti", "fit"), ("plugin", "plugins"), ("validat", "validate")])
def test_unknown_command_gives_the_nearest_name(capsys, word, nearest):
    assert main([word]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("specforge: error: ") and len(shown.err.splitlines()) == 1
    assert f"Did you mean {nearest!r}?" in shown.err


def test_unknown_option_gives_the_nearest_name(capsys):
    assert main(["--verison"]) == 2
    assert capsys.readouterr().err == (
        "specforge: error: unknown option '--verison'. Did you mean '--version'? See: specforge --help\n"
    )


def test_unknown_command_far_from_all_lists_them(capsys):
    assert main(["xyzzy"]) == 2
    message = capsys.readouterr().err
    assert "Did you mean" not in message
    assert all(name in message for name in ("fit", "plugins", "test", "validate"))


def test_a_closed_pipe_is_not_a_failure(toys):
    code = (
        "import subprocess, sys\n"
        "one = subprocess.Popen([sys.executable, '-m', 'specforge', 'plugins'], stdout=subprocess.PIPE,"
        " stderr=subprocess.PIPE)\n"
        "one.stdout.close()\n"
        "message = one.stderr.read().decode()\n"
        "print(one.wait(), message)\n"
    )
    assert toys.python("-c", code).stdout == "0 \n"
