"""Keys of tasks: what enters them, and that they are those under which finished work lies."""

from __future__ import annotations

from typing import Any

import pytest

from counterweight.workers.formats import ModuleFormat
from counterweight.workers.methods.compensations import SVD
from counterweight.workers.methods.distillation import Distillation
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.recipe import ModuleRecipe, Recipe
from counterweight.workers.tasks import setting
from counterweight.workers.tasks.block import BlockRecord, BlockSpec
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.distill import Distill
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.epoch import Epoch, EpochRecord
from counterweight.workers.tasks.gains import Gains
from counterweight.workers.tasks.original import Original
from counterweight.workers.tasks.replica import Replica
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.tasks.training import StoredBlock, TrainingSpec
from counterweight.workers.workspace import Blob

BLOBS = (Blob(sha256="1" * 64, size=1), Blob(sha256="2" * 64, size=2))
SETTING = Setting(
    source="file:///model",
    config={"model_type": "llama"},
    workspace="file:///work",
    compute_dtype="float32",
    device="cpu",
)
WEIGHTS = {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}}
LINEAR = "mlp.up_proj"


def part(*, weights: dict[str, Any] = WEIGHTS, **compensation: Any) -> ModuleRecipe:
    asked = compensation or {"kind": "svd", "rank": {"count": 4}}
    found = Recipe.model_validate({"weights": weights, "compensation": asked}).for_module(f"model.layers.3.{LINEAR}")
    assert found is not None
    return found


def spec(recipe: ModuleRecipe | None = None, **changes: Any) -> BlockSpec:
    values = {
        "setting": SETTING,
        "index": 3,
        "tensors": {"a": "0" * 64},
        "inputs": BLOBS,
        "recipe": {LINEAR: recipe or part()},
        "propagate": "original",
    }
    return BlockSpec.model_validate({**values, **changes})


def test_keys_are_those_of_the_revision_before_tasks_were_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded then, with these versions: finished work of users is found again."""
    monkeypatch.setattr(setting, "numerics", lambda: {"counterweight": 2, "torch": "2", "transformers": "5"})
    monkeypatch.setattr(SVD, "VERSION", 1)
    embed = Embed(setting=SETTING, tokens=BLOBS[0], tensor=("e", "3" * 64))
    assert embed.key() == "eae75e8488f5038edc0a6e68f9f9c2d2074323a5f291bedc4542421593606512"
    assert spec().calibrate_key() == "d1cdb2663f047bb2536bb9775a40034518f7482ac62bf90048520b3ef3ae9f43"
    assert spec().key() == "6ad85eb6fc714883af33c0295d139b4541811211f95cb481890c2cf32bf760e8"
    compressed = spec(propagate="compressed")
    assert compressed.key() == "8923a15e337135e33bc31eeedc9e36be34fd4dc44392ef5bb6b5b5a45daa9369"


def test_two_streams_are_not_one_of_double_length() -> None:
    paired = spec(original_inputs=BLOBS, propagate="compressed")
    assert paired.key() != spec(inputs=BLOBS * 2, propagate="compressed").key()
    assert paired.statistics_key() != spec(inputs=BLOBS * 2, propagate="compressed").statistics_key()


def test_a_record_of_the_last_revision_is_read() -> None:
    old = {
        "index": 0,
        "checkpoint": BLOBS[0].model_dump(),
        "adapter": None,
        "outputs": [],
        "tensors": {},
        "factors": {},
        "modules": [],
        "formats": {},
        "kept_bits": 0,
        "ledger": [],
        "timing": {},
    }
    record = BlockRecord.model_validate(old)
    assert record.stored == (BLOBS[0],)
    assert record.hidden_states == ()


def test_whether_statistics_are_kept_does_not_enter_the_key() -> None:
    assert Gains(block=spec(), keep=True).key() == Gains(block=spec(), keep=False).key()


def test_statistics_serve_every_rank() -> None:
    keys = {spec(part(kind="svd", rank=rank)).statistics_key() for rank in ({"count": 2}, {"budget_bits": 1.0})}
    assert len(keys) == 1
    assert spec(part(kind="none")).statistics_key() not in keys  # nothing looks at second moments
    gptq = {**WEIGHTS, "quantizer": {"kind": "gptq"}}
    without, svd = (
        spec(part(weights=gptq, **asked)) for asked in ({"kind": "none"}, {"kind": "svd", "rank": {"count": 2}})
    )
    assert without.statistics_key() == svd.statistics_key()
    assert (
        Compress(block=spec(part(kind="svd", rank={"count": 2}))).key() != Compress(block=spec(part(kind="none"))).key()
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # sum |x| is gathered for one of them
        ({"kind": "svd", "whitening": "magnitude"}, {"kind": "svd"}),
        # how many channels are taken out depends on the rank
        ({"kind": "aser", "rank": {"count": 8}}, {"kind": "aser", "rank": {"count": 16}}),
    ],
)
def test_statistics_that_differ_have_other_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert spec(part(**one)).statistics_key() != spec(part(**other)).statistics_key()


def test_other_inputs_are_other_statistics() -> None:
    keys = {
        found.statistics_key()
        for found in (spec(), spec(inputs=BLOBS[:1]), spec(propagate="compressed"), spec(tensors={"a": "1" * 64}))
    }
    assert len(keys) == 4


FORMAT = ModuleFormat(bits=4, group_size=None, symmetric=True, activation_bits=4, rank=2)
BLOCK = StoredBlock(index=0, checkpoint=BLOBS[0], adapter=BLOBS[1], formats={LINEAR: FORMAT})
TRAINING = TrainingSpec(
    setting=SETTING,
    options=Distillation(),
    tensors={"a": "0" * 64},
    outside=BLOBS,
    blocks=(BLOCK,),
    tokens=BLOBS[0],
    targets=BLOBS,
    trained=4,
    held_out=(2, 1),
)
FIRST = EpochRecord(state=BLOBS[0], best=1, divergences=((0.2,), (0.1,)), losses=(0.3,))


def test_keys_of_a_training_are_those_of_the_revision_that_knew_no_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded then: a training that was finished, and epochs of one that was not, are found again."""
    monkeypatch.setattr(setting, "numerics", lambda: {"counterweight": 2, "torch": "2", "transformers": "5"})
    done = "2ea90f6eb7d56c3e4988d6cea1e62499c86817f7cb9d093d630bab070cd1b94a"
    assert (Distill.kind, Distill(training=TRAINING, last=FIRST).key()) == ("distill", done)
    epochs = [
        "0f24d9910e97524ee94dadb7b06e05e7eed8b7497cb0edf436801138d1581c6d",
        "28cd8cee47e1dc232a005275ce2f999851702184abaa8087293a90c48ce85135",
    ]
    found = [Epoch(training=TRAINING, before=before, states=BLOBS, loss=0.0).key() for before in (None, FIRST)]
    assert (Epoch.kind, found) == ("distill-epoch", epochs)


def test_parts_of_an_epoch_have_keys_of_their_own_whatever_state_they_are_handed() -> None:
    part = Replica(training=TRAINING, epoch=1, round=0, replica=0, states=())
    changes: list[dict[str, Any]] = [{}, {"epoch": 2}, {"round": 1}, {"replica": 1}]
    assert len({part.model_copy(update=change).key() for change in changes}) == 4
    assert part.model_copy(update={"states": BLOBS}).key() == part.key()


@pytest.mark.parametrize(
    "change",
    [
        {"options": Distillation(seed=1)},
        {"options": Distillation(replicas=2)},
        {"tensors": {"a": "1" * 64}},
        {"outside": BLOBS[::-1]},
        {"blocks": (BLOCK.model_copy(update={"adapter": BLOBS[0]}),)},
        {"blocks": (BLOCK.model_copy(update={"formats": {LINEAR: FORMAT.model_copy(update={"activation_bits": 8})}}),)},
        {"tokens": BLOBS[1]},
        {"targets": BLOBS[:1]},
        {"trained": 5},
        {"held_out": (3,)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_decides_a_training_enters_its_key(change: dict[str, Any]) -> None:
    assert TRAINING.model_copy(update=change).key() != TRAINING.key()


def test_what_the_original_makes_does_not_depend_on_the_recipes_coordinates() -> None:
    original = Original(setting=SETTING, tensors={"a": "0" * 64}, tokens=BLOBS[0], start=0, stop=4)
    rotated = SETTING.model_copy(update={"rotation": Rotation(), "compute_dtype": "bfloat16"})
    assert original.model_copy(update={"setting": rotated}).key() == original.key()
    keys = {
        original.model_copy(update=change).key() for change in ({}, {"start": 1}, {"stop": 3}, {"tokens": BLOBS[1]})
    }
    assert len(keys) == 4
