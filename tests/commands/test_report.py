"""Output and files of an evaluation: every figure, the right warnings, and a self-contained page."""

from __future__ import annotations

import functools
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from rich.cells import cell_len
from rich.console import Console

from specforge.commands.evaluate.plots import plots
from specforge.commands.evaluate.report import page, write_report
from specforge.commands.evaluate.table import print_table
from specforge.errors import SpecforgeError
from specforge.evaluation.expecting import expectations
from specforge.evaluation.results import ContenderResult, Measurement, Results, Span
from specforge.evaluation.served import Percentiles, Served, ServedMeasurement, ServerResult
from specforge.sampling import Sampling

VOID = {"meta", "br", "link", "img"}
LONG_NAME = "runs/a-long-name-without-any-space/version_3/checkpoints/epoch=2-step=12000"


def measurement(prompt_set: str, rate: float, depth: int = 5, drafts: int = 1234) -> Measurement:
    """Made-up figures that are almost all different; ``rate`` of the tokens are accepted at each position."""
    rng = random.Random(f"{prompt_set} {rate} {depth}")
    conditional = [rate * rng.uniform(0.9, 1.0) for _ in range(depth)]
    joint = [1.0]
    for value in conditional:
        joint.append(joint[-1] * value)
    length = sum(joint)
    accepted = round(drafts * (length - 1))
    return Measurement(
        prompt_set=prompt_set,
        responses=37,
        tokens=drafts + accepted,
        acceptance_length=length,
        confidence_interval=(length - 0.123, length + 0.134),
        accept_rate_pos=joint[1:],
        accept_rate_cond=conditional,
        histogram=[round(drafts * (a - b)) for a, b in zip(joint, [*joint[1:], 0.0], strict=True)],
        num_drafts=drafts,
        num_draft_tokens=drafts * depth,
        num_accepted_tokens=accepted,
        draft_acceptance_rate=accepted / (drafts * depth),
        draft_milliseconds=rng.uniform(2, 4),
        verifier_milliseconds=rng.uniform(11, 13),
        other_milliseconds=rng.uniform(0.1, 0.9),
        tokens_per_second=rng.uniform(100, 200),
        tokens_per_second_alone=rng.uniform(50, 100),
        speedup=rng.uniform(1, 3),
        identical_responses=37,
        by_stretch=[
            Span(begin=begin, end=begin + 32, drafts=rng.randrange(100, 900), acceptance_length=length - begin / 999)
            for begin in range(0, 160, 32)
        ],
        by_chain_length=[sum(joint[: k + 2]) for k in range(depth)],
    )


def contender(name: str, rate: float, sets: tuple[str, ...], depth: int = 5, baseline: bool = False) -> ContenderResult:
    return ContenderResult(
        name=name,
        draft=None if baseline else f"drafts/{name}",
        proposal={"proposal_type": "chain", "speculative_tokens": depth},
        is_baseline=baseline,
        is_lossy=False,
        sets=[measurement(prompt_set, rate, depth) for prompt_set in sets],
        all_sets=measurement("all", rate, depth, drafts=3702),
    )


def results(*contenders: ContenderResult) -> Results:
    return Results(
        verifier="some/verifier",
        verifier_parameters=134_515_008,
        sampling=Sampling(temperature=0.75, top_k=40, top_p=0.875),
        verification="token",
        max_new_tokens=161,
        batch_size=3,
        seed=987,
        machine="cpu, 1 thread, float32",
        versions={"torch": "2.11.0", "transformers": "5.16.1"},
        prompt_sets=[result.prompt_set for result in contenders[0].sets] if contenders else [],
        contenders=list(contenders),
    )


def usual() -> Results:
    """Four contenders, one of them a baseline, on three prompt sets."""
    sets = ("chat", "code", "summaries of long articles")
    return results(
        contender("good", 0.8, sets),
        contender("fair", 0.6, sets),
        contender(LONG_NAME, 0.5, sets),
        contender("prompt lookup", 0.3, sets, baseline=True),
    )


def bare() -> Results:
    """One contender on one prompt set, without optional figures."""

    only = contender("only", 0.5, ("chat",), depth=1)
    for each in (only.all_sets, *only.sets):
        each.confidence_interval = None
        each.identical_responses = None
        each.by_stretch = []
        each.by_chain_length = []
    return results(only)


def without_drafts() -> Results:
    """A method that never proposed anything, and one that did."""
    idle = contender("idle", 0.5, ("chat", "code"))
    for each in (idle.all_sets, *idle.sets):
        each.acceptance_length = each.draft_acceptance_rate = 0.0
        each.confidence_interval = None
        each.accept_rate_pos = each.accept_rate_cond = each.by_chain_length = []
        each.histogram = each.by_stretch = []
        each.num_drafts = each.num_draft_tokens = each.num_accepted_tokens = 0
        each.draft_milliseconds = each.verifier_milliseconds = each.other_milliseconds = 0.0
    return results(idle, contender("busy", 0.5, ("chat", "code")))


def many() -> Results:
    """More contenders than colors, more prompt sets than fit the width, long chains."""
    sets = tuple(f"prompt set {number}" for number in range(6))
    return results(*(contender(f"contender {number}", 0.3 + 0.05 * number, sets, depth=16) for number in range(9)))


def served_measurement(prompt_set: str, load: int, drafted: int) -> ServedMeasurement:
    """Made-up figures of a server; with drafted tokens it is faster."""
    rng = random.Random(f"{prompt_set} {load} {drafted}")
    rates = [0.8 ** (k + 1) for k in range(drafted)]
    times = Percentiles(p50=rng.uniform(10, 20), p90=rng.uniform(20, 30), p99=rng.uniform(30, 40))
    return ServedMeasurement(
        prompt_set=prompt_set,
        concurrency=load,
        responses=37,
        tokens=4321,
        seconds=8.0,
        tokens_per_second=load * rng.uniform(100, 200),
        request_tokens_per_second=(1 + sum(rates)) * rng.uniform(20, 21),
        first_token=times,
        per_token=times,
        whole=times,
        acceptance_length=1 + sum(rates) if drafted else None,
        accept_rate_pos=rates,
        num_drafts=999 if drafted else None,
        speedup=1.25 if drafted else None,
    )


def only_served() -> Results:
    """Two servers and one without speculation, at two loads, on two prompt sets; nothing in process."""
    servers = [
        ServerResult(
            url=f"https://a-server-with-a-long-name.example:{8000 + drafted}/<v1>",
            engine="vLLM",
            is_baseline=not drafted,
            draft_tokens=drafted or None,
            measurements=[
                served_measurement(name, load, drafted) for load in (1, 8) for name in ("chat", "code", "all")
            ],
        )
        for drafted in (3, 5, 0)
    ]
    what = results()
    what.verifier, what.verifier_parameters, what.prompt_sets = "<served>", None, ["chat", "code"]
    expected = expectations(servers, [1, 8], [1.0 + 0.5 * k for k in range(1, 7)])
    what.served = Served(model="<served>", concurrencies=[1, 8], servers=servers, expectations=expected)
    return what


def with_served() -> Results:
    """Contenders in process, and a server of unknown draft length, about which nothing can be expected."""
    what, served = usual(), only_served().served
    assert served is not None
    server = served.servers[0].model_copy(update={"draft_tokens": None})
    what.served = served.model_copy(update={"servers": [server], "expectations": []})
    return what


MADE_UP = {
    "usual": usual,
    "bare": bare,
    "without drafts": without_drafts,
    "many": many,
    "empty": results,
    "only served": only_served,
    "with served": with_served,
}


@functools.cache
def made_up_page(kind: str) -> str:
    return page(MADE_UP[kind]())


@pytest.fixture
def without_plots(monkeypatch):
    """Pages are quick to render without plots."""
    monkeypatch.setattr("specforge.commands.evaluate.report.plots", lambda results: [])


class Page(HTMLParser):
    """A parsed page; parsing fails if tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self._keep(attrs)

    def handle_startendtag(self, tag, attrs):
        self._keep(attrs)

    def _keep(self, attrs):
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def printed(what: Results, width: int = 80, **options) -> str:
    stream = StringIO()
    print_table(what, Console(file=stream, width=width, **options))
    return stream.getvalue()


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def series(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


class TestPage:
    @pytest.mark.parametrize("kind", MADE_UP)
    def test_is_well_formed(self, kind):
        html = made_up_page(kind)
        read = Page(html)
        assert len(read.ids) == len(set(read.ids)), "identifiers are unique in a page"
        for svg in re.findall(r"<svg .*?</svg>", html, re.DOTALL):
            ElementTree.fromstring(svg)

    @pytest.mark.parametrize("kind", MADE_UP)
    def test_is_self_contained(self, kind):
        html = made_up_page(kind)
        namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        read = Page(html)
        assert all(value in namespaces for _, value in read.attributes if "//" in value)
        assert not re.search(r"//", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
        assert "<script" not in html and "<link" not in html and "@import" not in html
        assert all(value.startswith("#") for name, value in read.attributes if name in ("href", "xlink:href", "src"))

    @pytest.mark.parametrize("kind", ["usual", "bare", "many"])
    def test_every_figure_is_there(self, kind):
        what = MADE_UP[kind]()
        rows = {(row[0], index): row[1:] for index, row in enumerate(Page(made_up_page(kind)).rows)}
        tables = [index for name, index in rows if name == "Figure"]
        assert len(tables) == len(what.contenders)
        for each_contender, begin in zip(what.contenders, tables, strict=True):
            measured = (
                each_contender.sets
                if len(each_contender.sets) == 1
                else [*each_contender.sets, each_contender.all_sets]
            )
            assert rows["Figure", begin] == [each.prompt_set for each in measured]
            # Tables come one after the other, so the next row of a name is this contender's.
            own = {name: cells for (name, index), cells in reversed(rows.items()) if index > begin}
            for index, each in enumerate(measured):
                self.compare({name: cells[index] for name, cells in own.items() if len(cells) == len(measured)}, each)

    def compare(self, shown: dict[str, str], each: Measurement) -> None:
        interval = each.confidence_interval
        same = each.identical_responses
        expected = {
            "Responses": str(each.responses),
            "Tokens": f"{each.tokens:,}",
            "Mean acceptance length": f"{each.acceptance_length:.3f}",
            "95 % confidence interval": "–" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]",
            "Per-position acceptance rate": series(each.accept_rate_pos, 3),
            "Conditional acceptance rate": series(each.accept_rate_cond, 3),
            "Drafts": f"{each.num_drafts:,}",
            "Draft tokens": f"{each.num_draft_tokens:,}",
            "Accepted tokens": f"{each.num_accepted_tokens:,}",
            "Avg Draft acceptance rate": f"{100 * each.draft_acceptance_rate:.1f} %",
            "Drafts by accepted tokens, 0, 1, …": ", ".join(f"{count:,}" for count in each.histogram),
            "Draft, ms per round": f"{each.draft_milliseconds:.3f}",
            "Verifier, ms per round": f"{each.verifier_milliseconds:.3f}",
            "Other, ms per round": f"{each.other_milliseconds:.3f}",
            "Other / verifier time": f"{100 * each.other_milliseconds / each.verifier_milliseconds:.1f} %",
            "Tokens per second": f"{each.tokens_per_second:.1f}",
            "Tokens per second, verifier alone": f"{each.tokens_per_second_alone:.1f}",
            "Speedup": f"{each.speedup:.3f}×",
            "Identical responses": "–" if same is None else f"{same} of {each.responses}",
            "Acceptance length by position in the response (drafts)": "\n".join(
                f"{stretch.begin}–{stretch.end - 1}: {stretch.acceptance_length:.2f} ({stretch.drafts})"
                for stretch in each.by_stretch
            )
            or "–",
            "Acceptance length with chains of K = 1, 2, …": series(each.by_chain_length, 3) or "–",
        }
        assert expected == {name: shown[name] for name in expected}

    def test_servers_are_there(self):
        what = only_served()
        assert what.served is not None
        read = Page(made_up_page("only served"))
        shown = [row for row in read.rows if row[0].startswith("a-server-with-a-long-name")]
        assert len(shown) == 3 * 2 * 3 and all(len(row) == 8 for row in shown)
        for expected in what.served.expectations:
            best = expected.best
            assert best.draft_tokens not in (3, 5) and best.measured_speedup is None
            advice = (
                f"draft {best.draft_tokens} tokens, and expect {best.speedup:.2f}× the speed without (not measured)"
            )
            assert advice in read.text
        assert "No contender" not in read.text and "token verification" not in read.text

    def test_settings_are_there(self):
        text = Page(made_up_page("usual")).text
        for expected in (
            "some/verifier (134.5 M weights)",
            "temperature 0.75, top-k 40, top-p 0.875",
            "token verification",
            "161",
            "batch size 3",
            "987",
            "cpu, 1 thread, float32",
            "torch 2.11.0, transformers 5.16.1",
            "drafts/fair; chain, speculative_tokens 5",
        ):
            assert expected in text

    @pytest.mark.usefixtures("without_plots")
    def test_the_best_are_named(self):
        what = usual()
        what.contenders[1].all_sets.speedup = 9.87
        length = what.contenders[0].all_sets.acceptance_length
        best = f"Highest acceptance: good, {length:.2f} tokens per verifier pass"
        expected = f"{best}. Fastest: fair, 9.87 times the verifier alone."
        assert expected in Page(page(what)).text

    def test_names_are_text(self):
        name, prompt_set = "<b>&\"'$x_1$</b>", "</text><script>alert(1)</script>"
        what = results(
            contender(name, 0.2, (prompt_set, "chat")), contender("look", 0.5, (prompt_set, "chat"), baseline=True)
        )
        what.verifier, what.machine = "<i>verifier", "<u>machine"
        html = page(what)
        read = Page(html)
        assert "<b>" not in html and "<i>" not in html and "<u>" not in html and "<script" not in html
        assert read.text.count(name) >= 6 and read.text.count(prompt_set) >= 3
        assert "<i>verifier" in read.text and "<u>machine" in read.text

    def test_equal_results_give_equal_pages_in_another_process(self, tmp_path):
        write_report(usual(), tmp_path)
        program = (
            "import sys; from pathlib import Path; from specforge.commands.evaluate.report import write_report;"
            "from specforge.evaluation.results import Results;"
            "assert not {'matplotlib', 'torch'} & set(sys.modules), 'importing is cheap';"
            "here = Path(sys.argv[1]); write_report(Results.read(here / 'results.json'), here / 'again')"
        )
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
        )
        for name in ("results.json", "report.html"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()

    def test_the_users_matplotlib_settings_are_neither_used_nor_changed(self):
        expected = made_up_page("bare")
        with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.fonttype": "path"}):
            before = dict(matplotlib.rcParams)
            assert page(bare()) == expected
            assert dict(matplotlib.rcParams) == before


class TestPlots:
    def test_all_of_them(self):
        drawn = plots(usual())
        assert [plot.title for plot in drawn] == [
            "Acceptance by position",
            "Acceptance length by prompt set",
            "Acceptance length by position in the text",
            "Acceptance length by chain length",
            "Accepted tokens per draft",
            "Time per round",
        ]
        assert made_up_page("usual").count("<svg") == len(drawn)
        names = [each.name for each in usual().contenders]
        assert all([mark.name for mark in plot.legend] == names for plot in drawn[:-1])
        assert [mark.name for mark in drawn[-1].legend] == ["draft", "verifier", "other"]

    def test_unknown_figures_are_not_drawn(self):
        titles = {plot.title for plot in plots(bare())}
        assert not titles & {"Acceptance length by position in the text", "Acceptance length by chain length"}
        assert len(titles) == 4

    def test_a_contender_without_chain_lengths_is_not_in_that_legend(self):
        what = results(contender("one", 0.5, ("chat",)), contender("other", 0.4, ("chat",)))
        what.contenders[0].all_sets.by_chain_length = []
        by_chain_length = plots(what)[3]
        assert [mark.name for mark in by_chain_length.legend] == ["other"]

    def test_a_contender_without_drafts_is_not_drawn(self):
        for plot in plots(without_drafts())[:-1]:
            assert [mark.name for mark in plot.legend] == ["busy"]

    def test_no_two_contenders_look_alike(self):
        legend = plots(results(*(contender(f"contender {number}", 0.5, ("chat",)) for number in range(9))))[0].legend
        assert len({(mark.color, mark.sign) for mark in legend}) == len(legend) == 9

    def test_bars_have_lengths_and_names(self):
        what = usual()
        svg = made_up_page("usual")
        for measured in what.contenders:
            for each in (*measured.sets, measured.all_sets):
                assert f">{each.acceptance_length:.2f}<" in svg
        assert all(f">{name}<" in svg for name in (*what.prompt_sets, "all"))

    def test_an_interval_without_the_estimate(self):
        """With few prompts, the resampled interval may not contain the estimate."""
        what = bare()
        what.contenders[0].sets[0].confidence_interval = (1.6, 1.7)
        assert len(plots(what)) == 4

    def test_characters_without_glyphs_in_matplotlib(self, recwarn):
        svg = plots(results(contender("草稿", 0.5, ("问答",))))[1].svg
        assert ">问答<" in svg and not recwarn.list


@pytest.mark.usefixtures("without_plots")
class TestWarnings:
    """The terminal and the page show the same warnings."""

    def shown_warnings(self, what: Results) -> tuple[list[str], str]:
        text = unwrapped(printed(what, width=1000))
        html = page(what)
        shown = re.search(r'<ul class="warnings">(.*?)</ul>', html, re.DOTALL)
        listed = [] if shown is None else re.findall(r"<li>(.*?)</li>", shown[1])
        assert text.count("WARNING: ") == len(listed)
        for item in listed:
            assert f"WARNING: {item}".replace("&#39;", "'") in text
        return listed, html

    @pytest.mark.parametrize("kind", MADE_UP)
    def test_none_without_problems(self, kind):
        assert self.shown_warnings(MADE_UP[kind]())[0] == []

    def test_of_servers(self):
        what = only_served()
        assert what.served is not None
        first, second, _ = what.served.servers
        first.url, second.url = "http://first:1", "http://second:2"
        first.measurements[0].other_tokens = 55
        first.measurements[0].responses = 1
        second.engine = "SGLang"
        listed, _ = self.shown_warnings(what)
        named = (
            "fewer responses than 2 for each of 1 requests",
            "55 tokens for other clients",
            "SGLang, which reports",
        )
        assert len(listed) == 3 and all(part in line for part, line in zip(named, listed, strict=True))

    def test_a_draft_that_a_baseline_beats(self):
        what = usual()
        best, beaten = what.contenders[3].all_sets, what.contenders[1].all_sets
        best.acceptance_length, beaten.acceptance_length = 2.5, 2.25
        what.contenders[2].all_sets.acceptance_length = 2.6
        listed, html = self.shown_warnings(what)
        assert listed == [
            "fair does not beat the baseline prompt lookup, which needs no draft: "
            "2.250 tokens per verifier pass against 2.500."
        ]
        assert html.index(listed[0]) < html.index("Decoding:") < html.index("<table")

    def test_a_draft_that_a_baseline_equals(self):
        what = usual()
        what.contenders[3].all_sets.acceptance_length = what.contenders[2].all_sets.acceptance_length
        listed, _ = self.shown_warnings(what)
        assert len(listed) == 1 and listed[0].startswith(f"{LONG_NAME} does not beat")

    def test_a_verifier_as_cheap_as_its_draft(self):
        what = usual()
        what.contenders[1].all_sets.draft_milliseconds = 15.0
        what.contenders[1].all_sets.verifier_milliseconds = 12.0
        listed, _ = self.shown_warnings(what)
        assert len(listed) == 1 and listed[0].startswith("fair: its speed here says nothing") and "125.0 %" in listed[0]

    def test_lossy(self):
        what = usual()
        what.contenders[1].is_lossy = True
        what.contenders[1].all_sets.identical_responses = 30
        assert self.shown_warnings(what)[0] == ["fair is LOSSY: output may differ from the verifier&#39;s own."]

    def test_lossless_but_different(self):
        what = usual()
        what.contenders[0].all_sets.identical_responses = 35
        listed, _ = self.shown_warnings(what)
        assert len(listed) == 1 and listed[0].startswith("good is lossless, but 2 of 37 responses differ")


class TestTable:
    @pytest.mark.parametrize("kind", MADE_UP)
    def test_fits_80_columns(self, kind):
        assert all(cell_len(line) <= 80 for line in printed(MADE_UP[kind]()).splitlines())

    def test_long_names_are_numbers_that_are_explained_below(self):
        what = usual()
        names = ["runs-of-one-model/version_0 greedy", "short", "runs-of-a-second/version_0 greedy"]
        for contender, name in zip(what.contenders, names, strict=False):
            contender.name = name
        text = unwrapped(printed(what))
        compared, _, below = text.partition(f"(1) {names[0]} (draft")
        assert " (1) " in compared and " short " in compared and " (3) " in compared
        assert f"(3) {names[2]} (draft" in below and " short (draft" in below

    @pytest.mark.parametrize("kind", ["usual", "bare", "many"])
    def test_nothing_of_a_row_is_cut_off_at_80_columns(self, kind):
        what = MADE_UP[kind]()
        lines = iter(printed(what).splitlines())
        for measured in what.contenders:
            for each in measured.sets if len(measured.sets) == 1 else [*measured.sets, measured.all_sets]:
                interval = each.confidence_interval
                length = f"{each.acceptance_length:.2f}"
                length += "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
                rates = " ".join(f"{100 * rate:.0f}" for rate in each.accept_rate_pos)
                row = next(line for line in lines if f" {length} " in line)
                assert row.startswith(f"  {each.prompt_set[:6]}")
                speeds = f"{each.tokens_per_second:.1f} {each.tokens_per_second_alone:.1f} {each.speedup:.2f}×"
                assert unwrapped(row).endswith(speeds)
                # Long chains continue in the lines below.
                begin = unwrapped(row).split(length)[1].removesuffix(speeds).strip()
                assert rates.startswith(begin)
                while begin != rates:
                    begin += " " + next(lines).strip()
                    assert rates.startswith(begin)

    def test_pooled_figures_in_vllms_terms(self):
        what = usual()
        pooled = what.contenders[0].all_sets
        text = unwrapped(printed(what))
        block = text[text.index("good (draft: chain, speculative_tokens 5)") : text.index("fair (draft")]
        share = 100 * pooled.other_milliseconds / pooled.verifier_milliseconds
        for expected in (
            f"Mean acceptance length {pooled.acceptance_length:.2f}",
            f"Drafts {pooled.num_drafts:,}",
            f"Draft tokens {pooled.num_draft_tokens:,}",
            f"Accepted tokens {pooled.num_accepted_tokens:,}",
            f"Per-position acceptance rate {series(pooled.accept_rate_pos, 3)}",
            f"Avg Draft acceptance rate {100 * pooled.draft_acceptance_rate:.1f} %",
            f"Milliseconds per round {pooled.draft_milliseconds:.2f} draft "
            f"+ {pooled.verifier_milliseconds:.2f} verifier + {pooled.other_milliseconds:.2f} other",
            f"Other / verifier time {share:.1f} %",
            f"Acceptance length, K = 1, 2, … {series(pooled.by_chain_length, 2)}",
            "Identical responses 37 of 37",
        ):
            assert expected in block

    def test_without_drafts_there_is_no_length(self):
        text = unwrapped(printed(without_drafts()))
        assert "Mean acceptance length –" in text and not re.search(r"\bnan\b", text)

    def test_names_are_not_markup(self):
        text = printed(results(contender("[red]a[/red] :smile:", 0.5, ("[bold]b",))))
        assert "[red]a[/red] :smile: (draft" in text and "  [bold]b" in text

    def test_no_colors_without_a_terminal(self, capsys):
        print_table(usual())
        assert "\x1b" not in capsys.readouterr().out

    def test_no_colors_with_no_color(self, monkeypatch):
        what = usual()
        what.contenders[0].is_lossy = True
        colored = re.compile(r"\x1b\[[\d;]*3\d")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert colored.search(printed(what, force_terminal=True, color_system="standard"))
        monkeypatch.setenv("NO_COLOR", "1")
        assert not colored.search(printed(what, force_terminal=True, color_system="standard"))


@pytest.mark.usefixtures("without_plots")
class TestWriting:
    @pytest.mark.parametrize("kind", MADE_UP)
    def test_json_can_be_read_back(self, tmp_path, kind):
        what = MADE_UP[kind]()
        write_report(what, tmp_path / "new" / "folder")
        assert Results.read(tmp_path / "new" / "folder" / "results.json") == what
        assert (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8") == page(what)

    def test_a_file_instead_of_the_folder(self, tmp_path):
        (tmp_path / "report").write_text("mine")
        with pytest.raises(SpecforgeError) as caught:
            write_report(bare(), tmp_path / "report")
        assert str(tmp_path / "report") in str(caught.value) and "cannot be written" in str(caught.value)
        assert (tmp_path / "report").read_text() == "mine"

    @pytest.mark.parametrize("failing", ["results.json", "report.html"])
    def test_a_full_disk_leaves_an_earlier_report_intact(self, tmp_path, monkeypatch, failing):
        write_report(bare(), tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        write_text = Path.write_text

        def fill_up(path: Path, text: str, **options: str) -> int:
            if failing not in path.name:
                return write_text(path, text, **options)
            write_text(path, text[:100], **options)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", fill_up)
        with pytest.raises(SpecforgeError, match="No space left"):
            write_report(usual(), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_second_report_replaces_the_first(self, tmp_path):
        write_report(bare(), tmp_path)
        write_report(usual(), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]
        assert Results.read(tmp_path / "results.json") == usual()
