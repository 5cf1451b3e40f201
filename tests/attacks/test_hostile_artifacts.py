"""Artifacts made by an enemy, and artifacts that rotted: refused by name, nothing written outside, nothing loaded
silently wrong."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterweight import load_model
from counterweight.pipeline.artifact import DOCUMENT, LATEST, pull, resolve, verify
from counterweight.pipeline.evaluate import evaluate_artifact
from counterweight.workers.checkpoint import tensor_digest
from counterweight.workers.errors import CheckpointError, CounterweightError, IntegrityError, RequestError, StorageError
from counterweight.workers.storage import sha256_hex
from tests.pipeline.tiny import job_of, local_path, run_local, write_job

REFUSED = (RequestError, IntegrityError)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an honest artifact, never changed."""
    manifest = write_job(tmp_path_factory.mktemp("job"), layers=2)
    return local_path(run_local(job_of(manifest)).uri)


@pytest.fixture
def artifact(published: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    shutil.copytree(published, tmp_path / "artifact")
    return tmp_path / "artifact"


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes artifact.json."""
    document = json.loads((artifact / DOCUMENT).read_text())
    change(document)
    (artifact / DOCUMENT).write_text(json.dumps(document))


def replace(artifact: Path, name: str, data: bytes) -> None:
    """Changes a file, and artifact.json with it: what an enemy would do."""
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_bytes(data)
    entry = {"size": len(data), "sha256": sha256_hex(data)}
    rewrite(artifact, lambda document: document["files"].__setitem__(name, entry))


def replace_json(artifact: Path, name: str, change: Callable[[Any], None]) -> None:
    value = json.loads((artifact / name).read_text())
    change(value)
    replace(artifact, name, json.dumps(value).encode())


# -- artifact.json --------------------------------------------------------------------------------------------------

PATHS = [
    "../evil.txt",
    "a/../../evil.txt",
    "/tmp/evil.txt",
    "//evil.txt",
    "..",
    ".",
    "",
    "a//b",
    "a/./b",
    "a\\..\\evil.txt",
    "evil\0.txt",
    "evil\n.txt",
    "evil\x1b[2J.txt",
    "x" * 300,
    "a/" * 600 + "b",
    ".counterweight-tmp-evil",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leads_elsewhere_is_refused_before_anything_is_fetched(
    artifact: Path, tmp_path: Path, path: str
) -> None:
    entry = {"size": 4, "sha256": sha256_hex(b"evil")}
    rewrite(artifact, lambda document: document["files"].__setitem__(path, entry))
    (tmp_path / "evil.txt").write_bytes(b"evil")
    before = sorted(tmp_path.rglob("*"))
    for act in (verify, load_model, lambda uri: pull(uri, tmp_path / "deep" / "down")):
        with pytest.raises(REFUSED) as caught:
            act(artifact.as_uri())
        assert all(line.isprintable() and len(line) < 600 for line in str(caught.value).splitlines())
    assert sorted(tmp_path.rglob("*")) == before


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["files"]["config.json"].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


DOCUMENTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "negative size": entry(size=-1),
    "size a text": entry(size="large"),
    "size a list": entry(size=[1]),
    "size a fraction": entry(size=1.5),
    "digest of 63": entry(sha256="a" * 63),
    "digest in capitals": entry(sha256="A" * 64),
    "digest a number": entry(sha256=5),
    "a key more in a file": entry(mode=0o777),
    "files a list": top(files=[]),
    "files missing": lambda document: document.pop("files"),
    "files null": top(files=None),
    "name that the terminal obeys": top(name="\x1b]0;evil\x07"),
    "name with a slash": top(name="../tiny"),
    "id that is no digest": top(id="../../x"),
    "later schema": top(schema_version=2),
    "schema a text": top(schema_version="1"),
    "a key more": top(postinstall="rm -rf /"),
    "figures that are none": top(baseline={"perplexity": "NaN", "kl": 0, "top1_agreement": 0}),
    "ledger of texts": top(ledger={"quantized": "all", "kept": 0, "dropped": 0}),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_document_of_the_wrong_shape_is_refused_in_one_line(artifact: Path, tmp_path: Path, case: str) -> None:
    rewrite(artifact, DOCUMENTS[case])
    for act in (verify, load_model, lambda uri: pull(uri, tmp_path / "pulled")):
        with pytest.raises(CheckpointError, match=r"artifact\.json: not an artifact's: ") as caught:
            act(artifact.as_uri())
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"files":{"a":NaN}}'],
    ids=["empty", "cut", "a list", "null", "no UTF-8", "deep", "deep objects", "NaN"],
)
@pytest.mark.parametrize("name", [DOCUMENT, LATEST])
def test_a_text_that_is_no_document_is_refused(artifact: Path, text: bytes, name: str) -> None:
    if name == LATEST:
        (artifact / DOCUMENT).unlink()
    (artifact / name).write_bytes(text)
    with pytest.raises(RequestError, match=name) as caught:
        resolve(artifact.as_uri())
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", [DOCUMENT, LATEST])
def test_a_gigantic_document_is_not_even_read(artifact: Path, name: str) -> None:
    if name == LATEST:
        (artifact / DOCUMENT).unlink()
    with (artifact / name).open("wb") as file:
        file.truncate(1 << 36)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="68719476736 bytes, expected at most"):
            resolve(artifact.as_uri())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("identity", ["../artifact", "/etc", "..", "", None, 5, {"id": "x"}, "a\0b", "x" * 2000])
def test_a_pointer_that_leads_elsewhere_is_refused(artifact: Path, tmp_path: Path, identity: Any) -> None:
    name = tmp_path / "name"
    name.mkdir()
    (name / LATEST).write_text(json.dumps({"id": identity}))
    with pytest.raises(REFUSED):
        resolve(name.as_uri())


def test_a_million_wrong_entries_make_one_line(artifact: Path) -> None:
    wrong = {f"file-{number}": {"size": -1, "sha256": "x"} for number in range(20_000)}
    rewrite(artifact, top(files=wrong))
    with pytest.raises(CheckpointError, match="40000 problems in all") as caught:
        resolve(artifact.as_uri())
    assert len(str(caught.value)) < 700


def test_a_size_that_lies_is_found_before_the_bytes_are_read(artifact: Path, tmp_path: Path) -> None:
    rewrite(artifact, entry(size=1 << 50))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        pull(artifact.as_uri(), tmp_path / "pulled")
    with pytest.raises(IntegrityError, match=rf"config\.json: .* bytes, expected {1 << 50}"):
        verify(artifact.as_uri())


@pytest.mark.parametrize("name", ["config.json", "ledger.json", "model.safetensors.index.json"])
def test_a_document_that_leaves_out_a_file_that_matters_is_refused(artifact: Path, name: str) -> None:
    rewrite(artifact, lambda document: document["files"].pop(name))
    for act in (load_model, evaluate_artifact):
        with pytest.raises(CheckpointError, match=f"files: no {name}"):
            act(artifact.as_uri())


def test_a_document_without_a_report_cannot_be_evaluated(artifact: Path) -> None:
    rewrite(artifact, lambda document: document["files"].pop("report/report.json"))
    with pytest.raises(CheckpointError, match=r"files: no report/report\.json"):
        evaluate_artifact(artifact.as_uri())


REPORTS: dict[str, bytes] = {
    "no JSON": b"{",
    "empty": b"{}",
    "a list": b"[]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_report_that_is_none_is_refused(artifact: Path, case: str) -> None:
    replace(artifact, "report/report.json", REPORTS[case])
    with pytest.raises(CheckpointError, match=r"report\.json: not a report: "):
        evaluate_artifact(artifact.as_uri())


def test_a_report_whose_text_is_no_source_is_refused(artifact: Path) -> None:
    source = {"kind": "exec", "uri": "rm -rf"}
    replace_json(artifact, "report/report.json", lambda report: report["validation"].update(source=source))
    with pytest.raises(CheckpointError, match=r"validation\.source"):
        evaluate_artifact(artifact.as_uri())


# -- what the tensors are read by -----------------------------------------------------------------------------------


def logits(uri: str) -> torch.Tensor:
    ids = torch.arange(32)[None]
    with torch.no_grad():
        found: torch.Tensor = load_model(uri)(ids).logits
    return found


def test_the_honest_artifact_loads(published: Path) -> None:
    """The control: what the cases below are mutations of is accepted by the same way in."""
    assert bool(torch.isfinite(logits(published.as_uri())).all())


def formats(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], None]:
    return lambda ledger: change(ledger["formats"]["model.layers.0.mlp.up_proj"])


LEDGERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "bits 5": (formats(lambda form: form.update(bits=5)), "bits"),
    "bits of another packing": (formats(lambda form: form.update(bits=8)), "up_proj"),
    "another group size": (formats(lambda form: form.update(group_size=64)), "up_proj"),
    "group size of nothing": (formats(lambda form: form.update(group_size=0)), "up_proj"),
    "asymmetric": (formats(lambda form: form.update(symmetric=False)), "up_proj"),
    "a rank more": (formats(lambda form: form.update(rank=5)), "up_proj"),
    "no rank": (formats(lambda form: form.update(rank=0)), "unexpected"),
    "negative rank": (formats(lambda form: form.update(rank=-4)), ""),
    "a format less": (lambda ledger: ledger["formats"].pop("model.layers.0.mlp.up_proj"), "up_proj"),
    "a digest less": (lambda ledger: ledger["tensors"].pop("model.norm.weight"), "no digest of model.norm.weight"),
    "a digest more": (lambda ledger: ledger["tensors"].update(ghost="0" * 64), "missing tensor ghost"),
    "another digest": (
        lambda ledger: ledger["tensors"].update({"model.norm.weight": "0" * 64}),
        "model.norm.weight",
    ),
    "digests swapped": (
        lambda ledger: ledger["tensors"].update(
            {
                "model.layers.0.mlp.up_proj.weight_packed": ledger["tensors"][
                    "model.layers.0.mlp.gate_proj.weight_packed"
                ],
                "model.layers.0.mlp.gate_proj.weight_packed": ledger["tensors"][
                    "model.layers.0.mlp.up_proj.weight_packed"
                ],
            }
        ),
        "weight_packed",
    ),
    "entries a text": (lambda ledger: ledger.update(entries="all"), "entries"),
}


@pytest.mark.parametrize("case", LEDGERS)
def test_a_ledger_that_lies_is_refused(artifact: Path, case: str) -> None:
    change, names = LEDGERS[case]
    replace_json(artifact, "ledger.json", change)
    with pytest.raises((CheckpointError, StorageError)) as caught:
        logits(artifact.as_uri())
    assert names in str(caught.value)


def quantization(**changes: Any) -> Callable[[Any], None]:
    return lambda config: config["quantization_config"].update(changes)


CONFIGS: dict[str, Callable[[Any], None]] = {
    "no quantization": lambda config: config.pop("quantization_config"),
    "code to run": lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Model"}),
    "unknown family": lambda config: config.update(model_type="evil"),
    "more layers": lambda config: config.update(num_hidden_layers=3),
    "a width more": lambda config: config.update(intermediate_size=97),
    "gigantic": lambda config: config.update(hidden_size=1 << 40),
    "layers a text": lambda config: config.update(num_hidden_layers="2"),
    "hidden family": quantization(quant_method="counterweight", base_model_type="evil"),
    "no family": quantization(quant_method="counterweight"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_lies_is_refused(artifact: Path, case: str) -> None:
    replace_json(artifact, "config.json", CONFIGS[case])
    with pytest.raises(CounterweightError) as caught:
        logits(artifact.as_uri())
    assert len(str(caught.value)) < 3000


def spoil_tensor(artifact: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes one stored tensor and all digests of files, but not the ledger's of the tensor."""
    shard = next(path for path in sorted(artifact.rglob("*.safetensors")) if name in load_file(path))
    tensors = load_file(shard)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    replace(artifact, shard.relative_to(artifact).as_posix(), shard.read_bytes())


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{UP}.weight_packed", lambda tensor: tensor ^ 1),
        (f"{UP}.weight_packed", lambda tensor: tensor[:, :-1]),
        (f"{UP}.weight_packed", lambda tensor: tensor.float()),
        (f"{UP}.weight_scale", lambda tensor: -tensor),
        (f"{UP}.weight_scale", lambda tensor: tensor.float()),
        (f"{UP}.weight_shape", lambda tensor: tensor.flip(0)),
        ("model.norm.weight", lambda tensor: tensor * 2),
        ("model.embed_tokens.weight", lambda tensor: tensor[:-1]),
        (f"base_model.model.{UP}.lora_A.weight", lambda tensor: tensor * 2),
        (f"base_model.model.{UP}.lora_B.weight", lambda tensor: tensor.T),
    ],
)
def test_a_tensor_that_is_not_the_ledgers_is_refused_by_name(
    artifact: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    spoil_tensor(artifact, name, change)
    for act in (verify, logits):  # the files are what artifact.json says: the ledger is the second line
        with pytest.raises((CheckpointError, StorageError)) as caught:
            act(artifact.as_uri())
        assert name.removeprefix("base_model.model.").split(".lora")[0] in str(caught.value)


def test_an_adapter_that_is_gone_is_an_error_and_not_a_model_without_branches(artifact: Path) -> None:
    (artifact / "compensation" / "adapter_model.safetensors").unlink()
    with pytest.raises(StorageError, match="adapter_model"):
        logits(artifact.as_uri())


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_that_turned_anywhere_is_found_or_changes_nothing(artifact: Path, seed: int) -> None:
    """Bits of the files that a model is loaded from, chosen at random: never other logits in silence."""
    import random

    draw = random.Random(seed)
    expected = logits(artifact.as_uri())
    names = ["config.json", "ledger.json", "model.safetensors.index.json", "generation_config.json"]
    names += [path.relative_to(artifact).as_posix() for path in artifact.rglob("*.safetensors")]
    path = artifact / draw.choice(names)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    try:
        found = logits(artifact.as_uri())
    except CounterweightError:
        return
    assert torch.equal(found, expected)


# -- re-signed: every digest is that of the file, and still it is no artifact of that model ------------------------------------


def resign(artifact: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes one stored tensor, its digest in the ledger and all digests of files."""
    spoil_tensor(artifact, name, change)
    shard = next(path for path in sorted(artifact.rglob("*.safetensors")) if name in load_file(path))
    digest = tensor_digest(load_file(shard)[name])
    replace_json(artifact, "ledger.json", lambda ledger: ledger["tensors"].__setitem__(name, digest))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


ADAPTER_UP = f"base_model.model.{UP}"
RESIGNED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer less": (
        lambda a: replace_json(a, "config.json", lambda c: c.update(num_hidden_layers=1)),
        r"unexpected model\.layers\.1\.",
    ),
    "many layers": (
        lambda a: replace_json(a, "config.json", lambda c: c.update(num_hidden_layers=1024)),
        "num_hidden_layers: 1024: the checkpoint has tensors of 2 layers",
    ),
    "a row for all outputs": (lambda a: resign(a, f"{ADAPTER_UP}.lora_B.weight", lambda t: t[:1]), r"factors \[1, 4\]"),
    "a column for all inputs": (lambda a: resign(a, f"{ADAPTER_UP}.lora_A.weight", lambda t: t[:, :1]), r"x \[4, 1\]"),
    "NaN in a factor": (lambda a: resign(a, f"{ADAPTER_UP}.lora_A.weight", with_nan), "lora_A.*holds NaN"),
    "NaN in a norm": (lambda a: resign(a, "model.norm.weight", with_nan), r"model\.norm\.weight: holds NaN"),
    "NaN in a scale": (lambda a: resign(a, f"{UP}.weight_scale", with_nan), "up_proj.weight_scale: holds NaN"),
    "a token less": (
        lambda a: resign(a, "model.embed_tokens.weight", lambda t: t[:-1]),
        r"model\.embed_tokens\.weight: shape \[127, 64\]: expected \[128, 64\]",
    ),
    "another vocabulary": (
        lambda a: replace_json(a, "config.json", lambda c: c.update(vocab_size=129)),
        r"expected \[129, 64\]",
    ),
    "another width": (lambda a: replace_json(a, "config.json", lambda c: c.update(hidden_size=128)), "shape|expected"),
    "an activation of 99 bits": (
        lambda a: replace_json(a, "ledger.json", formats(lambda form: form.update(activation_bits=99))),
        "activation_bits",
    ),
    "a transform of any size": (
        lambda a: replace_json(
            a, "ledger.json", formats(lambda form: form.update(online={"size": 10**9 + 7, "seed": 1, "inner": 1}))
        ),
        "up_proj|online",
    ),
}


@pytest.mark.parametrize("case", RESIGNED)
def test_a_resigned_artifact_that_is_not_its_model_is_refused_by_everyone(artifact: Path, case: str) -> None:
    spoil, said = RESIGNED[case]
    spoil(artifact)
    for act in (verify, load_model, evaluate_artifact):
        with pytest.raises(RequestError, match=said) as caught:
            act(artifact.as_uri())
        assert len(str(caught.value).splitlines()) == 1


def test_nobody_takes_a_document_without_files_for_an_artifact(artifact: Path, tmp_path: Path) -> None:
    rewrite(artifact, top(files={}))
    for act in (verify, load_model, evaluate_artifact, lambda uri: pull(uri, tmp_path / "pulled")):
        with pytest.raises(CheckpointError, match=r"files: no config\.json: expected every file"):
            act(artifact.as_uri())


def test_a_key_said_twice_is_refused(artifact: Path) -> None:
    text = (artifact / DOCUMENT).read_text()
    (artifact / DOCUMENT).write_text(text.rstrip().removesuffix("}") + ',"files":{}}')
    with pytest.raises(CheckpointError, match="key 'files' occurs twice"):
        verify(artifact.as_uri())
    (artifact / DOCUMENT).write_text(text)
    for name in ("ledger.json", "report/report.json", "config.json"):
        honest = (artifact / name).read_bytes()
        replace(artifact, name, honest.rstrip().removesuffix(b"}") + b',"twice":1,"twice":2}')
        with pytest.raises(CheckpointError, match="key 'twice' occurs twice"):
            evaluate_artifact(artifact.as_uri())
        replace(artifact, name, honest)


@pytest.mark.parametrize("name", ["compensation/adapter_model.safetensors", "model-00002-of-00004.safetensors"])
def test_a_file_that_the_others_speak_of_must_be_named(artifact: Path, name: str) -> None:
    rewrite(artifact, lambda document: document["files"].pop(name))
    for act in (verify, load_model):
        with pytest.raises(CheckpointError, match=f"files: no {name}"):
            act(artifact.as_uri())


def test_sizes_and_numbers_of_files_are_bounded(artifact: Path) -> None:
    rewrite(artifact, entry(size=10**400))
    with pytest.raises(CheckpointError, match="size"):
        verify(artifact.as_uri())
    one = {"size": 1, "sha256": "0" * 64}
    rewrite(artifact, top(files={f"file-{number}": one for number in range(20_000)}))
    with pytest.raises(CheckpointError, match="files: 20000 of them: expected at most"):
        verify(artifact.as_uri())


@pytest.mark.parametrize("text", [b"[]", b"null", b"5", b'"x"', b"{", b"\xff"])
def test_generation_settings_that_are_none_are_refused(artifact: Path, text: bytes) -> None:
    replace(artifact, "generation_config.json", text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_model(artifact.as_uri())


@pytest.mark.parametrize("field", ["sequence_length", "sequences"])
def test_a_report_without_windows_is_refused(artifact: Path, field: str) -> None:
    replace_json(artifact, "report/report.json", lambda report: report["validation"].update({field: 0}))
    with pytest.raises(CheckpointError, match=rf"report\.json: .*{field}: 0: expected at least"):
        evaluate_artifact(artifact.as_uri())


@pytest.mark.parametrize("name", [DOCUMENT, "config.json", "report/report.json"])
def test_a_pipe_is_no_file_and_nobody_waits_for_it(artifact: Path, tmp_path: Path, name: str) -> None:
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    for act in (verify, evaluate_artifact, lambda uri: pull(uri, tmp_path / "pulled")):
        with pytest.raises(RequestError, match="a named pipe: expected a regular file"):
            act(artifact.as_uri())
