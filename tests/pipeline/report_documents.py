"""Reports for the tests, and a reader of the page that insists on balanced tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

from counterweight.pipeline.artifact.report import BitsPerWeight, ModelReport, Quality, Report, TaskReport, TokensReport
from counterweight.pipeline.artifact.report_html import render
from counterweight.workers.tasks.records import FallbackReport, ModuleReport, Timing

DIGEST = "0123456789abcdef" * 4
DENSE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
VOID = {"meta", "link"}

BASELINE = Quality(perplexity=12.310234567, kl=0.0, top1_agreement=1.0)
QUANTIZED = Quality(perplexity=14.801234567, kl=0.18123456, top1_agreement=0.78125)
COMPENSATED = Quality(perplexity=13.271234567, kl=0.07123456, top1_agreement=0.8623)
PREFILL = Quality(perplexity=14.302234567, kl=0.12123456, top1_agreement=0.8123)
BITS = BitsPerWeight(weights=3.0, scales=0.125, factors=0.25, residual=0.0625, total=3.4375, model=5.912345)


def module(
    name: str,
    before: float | None = 0.02,
    after: float | None = 0.01,
    *,
    tokens: int = 4096,
    columns: int = 128,
    rank: int = 16,
    fallbacks: Sequence[FallbackReport] = (),
    residual_bits: int = 0,
) -> ModuleReport:
    """A linear of 64 rows."""
    return ModuleReport(
        name=name,
        rows=64,
        columns=columns,
        bits=3,
        group_size=None,
        rank=rank,
        tokens=tokens,
        code_bits=64 * columns * 3,
        scale_bits=64 * 16,
        factor_bits=(64 + columns) * rank * 16,
        residual_bits=residual_bits,
        error_quantized=before,
        error_compensated=after,
        fallbacks=tuple(fallbacks),
        seconds=0.25,
    )


def task(name: str, *, reused: bool = False, host: int = 600 << 20, device: int = 0, **seconds: float) -> TaskReport:
    """seconds: load, forward, solve, write."""
    timing = Timing(**seconds, host_peak_bytes=host, device_peak_bytes=device)  # type: ignore[arg-type]
    return TaskReport(name=name, reused=reused, timing=timing)


def dense(
    blocks: int, error: Callable[[int], float] = lambda i: 0.01 + 0.001 * i, *, rank: int = 16
) -> list[ModuleReport]:
    """Every linear of a Llama with these errors, by ordinal; compensation halves them."""
    names = [f"model.layers.{block}.{name}" for block in range(blocks) for name in DENSE]
    return [module(name, error(i), error(i) / 2 if rank else error(i), rank=rank) for i, name in enumerate(names)]


def mixtral(blocks: int = 6, experts: int = 8) -> list[ModuleReport]:
    """Every linear of a Mixtral as the artifact names them: 4 of attention, 3 per expert."""
    modules: list[ModuleReport] = []
    for block in range(blocks):
        modules += [module(f"model.layers.{block}.{name}") for name in DENSE[:4]]
        for expert in range(experts):
            tokens = 100 * (expert + 1)
            for part, columns in (("w1", 128), ("w3", 128), ("w2", 352)):
                name = f"model.layers.{block}.block_sparse_moe.experts.{expert}.{part}"
                error = 0.02 * (1 + expert) * (1 + block)
                modules.append(module(name, error, error / 2, tokens=tokens, columns=columns))
    return modules


def report(
    modules: Sequence[ModuleReport] | None = None,
    tasks: Sequence[TaskReport] | None = None,
    *,
    validated: bool = True,
    compensated: Quality = COMPENSATED,
    prefill: Quality | None = None,
) -> Report:
    """A report of a job that was validated, of two dense blocks unless said otherwise. prefill: with residual stores."""
    if tasks is None:
        tasks = [task(f"block {i}", load=0.1, forward=0.4, solve=1.0, write=0.1) for i in range(2)]
    return Report(
        name="demo",
        id="3f9a1c07be52d481",
        created="2026-11-22T04:47:10+00:00",
        model=ModelReport(uri="file:///models/demo", model_type="llama", parameters=1412352, digest=DIGEST),
        recipe={
            "calibration": {"sequences": 64, "source": {"kind": "text", "uri": "file:///train.txt"}},
            "recipe": {
                "weights": {"bits": 3, "group_size": None, "symmetric": True, "quantizer": {"kind": "gptq"}},
                "compensation": {"kind": "svd", "whitening": "full", "rank": {"count": 16}},
                "keep": ["lm_head"],
            },
        },
        calibration=TokensReport(
            source={"kind": "text", "uri": "file:///train.txt"}, sequences=64, sequence_length=256, digest=DIGEST
        ),
        validation=TokensReport(
            source={"kind": "text", "uri": "file:///test.txt"}, sequences=32, sequence_length=512, digest=DIGEST[::-1]
        )
        if validated
        else None,
        baseline=BASELINE if validated else None,
        quantized=QUANTIZED if validated else None,
        compensated=compensated if validated else None,
        compensated_prefill=prefill if validated else None,
        bits_per_weight=BITS,
        modules=tuple(dense(2) if modules is None else modules),
        tasks=tuple(tasks),
        stages={"tokens": 1.5, "blocks": 13.75},
        software={"torch": "2.13.0", "ray": "2.60.0"},
    )


@dataclass(slots=True)
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        """All text inside."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def number(self, name: str) -> float:
        """An attribute that is a number."""
        return float(self.attributes[name])

    def walk(self) -> Iterator[Node]:
        """This element and all inside it, in the order of the page."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, *classes: str) -> list[Node]:
        """Elements inside that have this tag and all these classes."""
        return [node for node in self.walk() if node.tag == tag and set(classes) <= set(node.classes)]

    def section(self, title: str) -> Node:
        """The section under this heading."""
        return next(s for s in self.all("section") if s.all("h2")[0].text == title)

    def figure(self, title: str) -> Node:
        """The figure with this title."""
        return next(f for f in self.all("figure") if f.all("h3") and f.all("h3")[0].text == title)

    def rows(self) -> list[list[str]]:
        """Text of every cell of the tables inside, without their heads."""
        return [
            [c.text for c in r.children if isinstance(c, Node)] for body in self.all("tbody") for r in body.all("tr")
        ]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("root")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        # An HTML parser takes `<div/>` for an opening tag: only void elements and SVG's may be written so.
        assert tag in VOID or any(node.tag == "svg" for node in self.open), f"<{tag}/>"
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Node:
    """The page as a tree; AssertionError when its tags are not balanced."""
    assert page.startswith("<!DOCTYPE html>\n")
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"not closed: {[node.tag for node in reader.open[1:]]}"
    return reader.root


def marks(node: Node, *classes: str) -> dict[str, Node]:
    """Circles inside that have these classes, by the module that their titles name."""
    found = {re.split(": ", circle.text)[0]: circle for circle in node.all("circle", *classes) if circle.text}
    assert found
    return found


def page(made: Report) -> Node:
    """The page of a report, read."""
    return read(render(made))
