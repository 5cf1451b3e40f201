"""What is fuzzed: each target makes one hostile input from a seed and gives it to the code that reads it.

Right is: nothing raised, or an error of ours with exit code 2 whose lines a terminal can show (4 for an artifact whose bytes
are not those of its document, which is damage); little CPU time; and where there is something independent to compare with, the
same result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from counterweight import load_model
from counterweight.pipeline.artifact import DOCUMENT, pull, verify
from counterweight.pipeline.manifest import parse_manifest
from counterweight.pipeline.model_files import check_files
from counterweight.pipeline.model_source import open_model
from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.encoder_process import Stream
from counterweight.workers.calibration.source import DatasetSource, TextSource
from counterweight.workers.calibration.texts import pieces_of
from counterweight.workers.errors import CounterweightError, RequestError
from counterweight.workers.storage import open_store, sha256_hex
from tests.fuzz.costs import Cost, metered
from tests.fuzz.mutations import Damage, Harmless, Hostile
from tests.inprocess import local, run_job
from tests.models import checkpoint
from tests.pipeline.tiny import MANIFEST

DEMO = Path(__file__).parents[2] / "manifests" / "demo" / "model"
HARMLESS = 4

FAMILIES = ("llama", "qwen3_moe", "gemma3_text")
RECIPE = {"weights": {"bits": 4, "group_size": 32}, "compensation": {"kind": "svd", "rank": {"count": 4}}}


class Fuzz:
    """The honest inputs, made once below `root`, and a target for each kind of hostile ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damage: Damage = Hostile()
        """What makes inputs hostile."""

    @property
    def targets(self) -> Mapping[str, Callable[[Random], None]]:
        """Name -> what is done with one seed."""
        return {
            "config": self.config,
            "weights": self.weights,
            "tokenizer": self.tokenizer,
            "text": self.text,
            "stream": self.stream,
            "dataset": self.dataset,
            "manifest": self.manifest,
            "artifact": self.artifact,
        }

    def normal(self, name: str) -> Cost:
        """What a harmless input of a target costs at most, of `HARMLESS`; one goes before, which makes the honest inputs and
        imports what is imported late."""
        found = Cost()
        self.damage = Harmless()
        try:
            self.targets[name](Random(0))
            for seed in range(HARMLESS):
                with metered() as cost:
                    self.targets[name](Random(seed))
                found = found.most(cost)
        finally:
            self.damage = Hostile()
        return found

    @cached_property
    def models(self) -> dict[str, Path]:
        """Family -> an honest checkpoint."""
        for family in FAMILIES:
            checkpoint(family, self.root / family, num_hidden_layers=2)
        return {family: self.root / family for family in FAMILIES}

    @cached_property
    def published(self) -> Path:
        """An honest artifact."""
        return local(run_job(self.models["llama"], self.root / "job", RECIPE, validation={}))

    def _copy(self, source: Path) -> Path:
        target = self.root / "spoiled"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def config(self, draw: Random) -> None:
        """config.json of a model."""
        spoiled = self._copy(self.models[draw.choice(FAMILIES)])
        config = json.loads((spoiled / "config.json").read_text())
        (spoiled / "config.json").write_bytes(self.damage.as_bytes(self.damage.mutated(config, draw), draw))
        opened = refused(lambda: open_model(spoiled.as_uri()))
        looked = refused(lambda: check_files(open_store(spoiled.as_uri())))
        assert opened or not looked, "the first look refuses what is opened"

    def weights(self, draw: Random) -> None:
        """Headers, and what an index says of them."""
        spoiled = self._copy(self.models[draw.choice(FAMILIES)])
        path = spoiled / "model.safetensors"
        data = path.read_bytes()
        if draw.random() < 0.7:
            path.write_bytes(self.damage.damaged(data, draw, end=8 + int.from_bytes(data[:8], "little")))
        else:
            index = {"weight_map": {f"model.layers.{draw.randrange(3)}.x": "model.safetensors" for _ in range(3)}}
            (spoiled / "model.safetensors.index.json").write_bytes(
                self.damage.as_bytes(self.damage.mutated(index, draw), draw)
            )
        refused(lambda: open_model(spoiled.as_uri()))

    def tokenizer(self, draw: Random) -> None:
        """tokenizer.json, which a process of its own meets."""
        document = json.loads((DEMO / "tokenizer.json").read_text())
        vocab = dict(list(document["model"]["vocab"].items())[:300])
        document["model"] |= {"vocab": vocab, "merges": []}
        if draw.random() < 0.5:
            document["model"] = {
                "type": draw.choice(["WordLevel", "WordPiece", "Unigram"]),
                "vocab": vocab,
                "unk_token": "?",
            }
        data = self.damage.as_bytes(self.damage.mutated(document, draw), draw)

        def encode() -> None:
            with Encoder(data) as running:
                running.ids(lambda: iter(["some text, é漢😀\n" * 100]), 50, "spec.calibration.source")

        refused(encode)

    def text(self, draw: Random) -> None:
        """A text of any bytes is what Python reads, or refused."""
        path = self.root / "text.txt"
        good = "".join(draw.choice(["a", "é", "漢", "\r\n", "\r", "\n", "😀"]) for _ in range(300)).encode()
        data = self.damage.damaged(good, draw) if draw.random() < 0.7 else good
        path.write_bytes(data)
        source = TextSource(uri=path.as_uri())
        try:
            expected = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            expected = f"not UTF-8 text at byte {error.start}"
        try:
            found = "".join(pieces_of(source, "field"))
        except RequestError as error:
            found = str(error)
            assert found.endswith(expected), (found, expected)
        else:
            assert found == expected

    def stream(self, draw: Random) -> None:
        """A text in pieces has the tokens of the whole."""
        tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        parts = [
            "word",
            " ",
            "  ",
            "\n",
            "\n\n",
            "é",
            "\u0301",
            "漢字",
            "😀",
            "'s",
            "123",
            "<|endoftext|>",
            "a" * 50,
            "\t",
        ]
        whole = "".join(draw.choice(parts) for _ in range(draw.randrange(10, 20_000)))
        cuts = sorted(draw.randrange(len(whole)) for _ in range(draw.randrange(4)))
        cuts = [cut for cut in cuts if cut > 4096]
        stream = Stream(tokenizer, whole=False)
        found = [
            token
            for begin, end in zip([0, *cuts], [*cuts, None], strict=True)
            for token in stream.add(whole[begin:end])
        ]
        assert found + stream.end() == tokenizer.encode(whole).ids

    def dataset(self, draw: Random) -> None:
        """Rows of a data set."""
        path = self.root / "rows" / "rows.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": f"w{index}"} for index in range(5)]
        lines = [
            self.damage.as_bytes(self.damage.mutated(row, draw) if draw.random() < 0.3 else row, draw) for row in rows
        ]
        path.write_bytes(self.damage.damaged(b"\n".join(lines), draw) if draw.random() < 0.3 else b"\n".join(lines))
        refused(lambda: list(pieces_of(DatasetSource(path=str(path)), "spec.calibration.source")))

    def manifest(self, draw: Random) -> None:
        """A manifest, as JSON or as damaged YAML."""
        import yaml

        if draw.random() < 0.5:
            data, name = self.damage.as_bytes(self.damage.mutated(yaml.safe_load(MANIFEST), draw), draw), "job.json"
        else:
            data, name = self.damage.damaged(MANIFEST.encode(), draw), "job.yaml"
        refused(lambda: parse_manifest(data, name=name, base=self.root.as_uri()))

    def artifact(self, draw: Random) -> None:
        """Any document of an artifact, signed anew: refused, or a model with finite logits."""
        spoiled = self._copy(self.published)
        name = draw.choice(
            [DOCUMENT, "config.json", "ledger.json", "model.safetensors.index.json", "generation_config.json"]
        )
        data = self.damage.as_bytes(self.damage.mutated(json.loads((spoiled / name).read_text()), draw), draw)
        (spoiled / name).write_bytes(data)
        if name != DOCUMENT:
            document = json.loads((spoiled / DOCUMENT).read_text())
            document["files"][name] = {"size": len(data), "sha256": sha256_hex(data)}
            (spoiled / DOCUMENT).write_text(json.dumps(document))
        wrong = refused(lambda: verify(spoiled.as_uri()), 4)
        refused(lambda: pull(spoiled.as_uri(), self.root / "pulled"), 4)

        def load() -> None:
            model = load_model(spoiled.as_uri())
            with torch.no_grad():
                logits = model(torch.arange(8)[None]).logits
            assert torch.isfinite(logits).all()

        # Files of another size than the document says are damage, and tensors are compared with the ledger all the same.
        assert refused(load, 4) or wrong != 2 or name == "generation_config.json", "verify refuses what loads"


def refused(act: Callable[[], object], *codes: int) -> int:
    """The exit code of an error of ours that `act` ends in, 2 or one of these; 0 without one; any other error leaves here."""
    try:
        act()
    except CounterweightError as error:
        if error.exit_code not in (2, *codes):
            raise AssertionError(f"exit code {error.exit_code}: {error}") from error
        if not all(line.isprintable() for line in str(error).splitlines()):
            raise AssertionError(f"not for a terminal: {str(error)!r}") from error
        return error.exit_code
    return 0
