"""What a catalogue is: one suite over the in-memory twin and Redis."""

from collections.abc import Iterator

import pytest
import redis

from core.catalogue.memory import MemoryCatalogue
from core.catalogue.names import check_name
from core.catalogue.records import PUBLIC, LoraRecord, ModelFile, ModelRecord
from core.catalogue.redis import RedisCatalogue
from core.errors import InvalidRequest, NameTaken, QueueUnavailable, UnknownLora, UnknownModel
from core.ports import Catalogue

A, B = "a" * 64, "b" * 64


@pytest.fixture(params=["memory", "redis"])
def catalogue(request: pytest.FixtureRequest) -> Iterator[Catalogue]:
    if request.param == "memory":
        yield MemoryCatalogue()
        return
    with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
        yield RedisCatalogue(client)


def lora(name: str = "ink", owner: str = "ann", digest: str = A, **more: object) -> LoraRecord:
    fields = {"name": name, "owner": owner, "key": f"tenants/{owner}/{name}", "digest": digest, "size_bytes": 7}
    return LoraRecord.model_validate(fields | more)


def model(name: str = "shapes", digest: str = A) -> ModelRecord:
    return ModelRecord(name=name, files=(ModelFile(path="unet/x", key="models/x", digest=digest, size_bytes=3),))


def test_a_lora_comes_back_as_it_was_entered(catalogue: Catalogue) -> None:
    record = lora(name="墨 水.v2", base="sd15", trigger_words=("a", "ß"), default_scale=0.7, tensors=3, created_ms=9)
    catalogue.add_lora(record)
    assert catalogue.get_lora("ann", "墨 水.v2") == record


@pytest.mark.parametrize("name", ["Ink", "ink ", "in", "in\u212a", "*", ""])
def test_names_are_compared_exactly(catalogue: Catalogue, name: str) -> None:
    catalogue.add_lora(lora("ink"))
    with pytest.raises(UnknownLora, match="GET /v1/loras"):
        catalogue.get_lora("ann", name)


def test_a_tenant_sees_its_own_and_the_public_ones_and_its_own_wins(catalogue: Catalogue) -> None:
    # Given one name owned by ann, by bob and publicly, and a public one besides
    catalogue.add_lora(lora("ink", "ann", A))
    catalogue.add_lora(lora("ink", "bob", B))
    catalogue.add_lora(lora("ink", PUBLIC, B))
    catalogue.add_lora(lora("chalk", PUBLIC))
    # Expect
    assert [(r.name, r.owner) for r in catalogue.list_loras("ann")] == [("chalk", PUBLIC), ("ink", "ann")]
    assert catalogue.get_lora("ann", "ink").owner == "ann"
    assert catalogue.get_lora("eve", "ink").owner == PUBLIC
    assert [r.owner for r in catalogue.list_loras("eve")] == [PUBLIC, PUBLIC]


def test_a_private_lora_is_unknown_to_others(catalogue: Catalogue) -> None:
    catalogue.add_lora(lora("ink", "ann"))
    with pytest.raises(UnknownLora):
        catalogue.get_lora("bob", "ink")
    assert list(catalogue.list_loras("bob")) == []


def test_a_name_never_changes_its_file(catalogue: Catalogue) -> None:
    # Given
    catalogue.add_lora(lora(digest=A))
    # If another file is entered under the name
    with pytest.raises(NameTaken, match="another file"):
        catalogue.add_lora(lora(digest=B))
    # Expect the first to stand; the same file may be entered again, with other settings
    assert catalogue.get_lora("ann", "ink").digest == A
    catalogue.add_lora(lora(digest=A, default_scale=0.5))
    assert catalogue.get_lora("ann", "ink").default_scale == 0.5


def test_models_are_entered_replaced_and_listed_by_name(catalogue: Catalogue) -> None:
    catalogue.add_model(model("shapes", A))
    catalogue.add_model(model("anime"))
    catalogue.add_model(model("shapes", B))
    assert [m.name for m in catalogue.list_models()] == ["anime", "shapes"]
    assert catalogue.get_model("shapes").digest == model("shapes", B).digest != model("shapes", A).digest
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        catalogue.get_model("Shapes")


def test_a_model_that_lost_its_name_is_still_found_by_its_content(catalogue: Catalogue) -> None:
    # Given jobs that were accepted for the first content of a name
    first, second = model("shapes", A), model("shapes", B)
    catalogue.add_model(first)
    # If the name is given to another content
    catalogue.add_model(second)
    # Expect both to be found by digest
    assert catalogue.get_model_version(first.digest) == first
    assert catalogue.get_model_version(second.digest) == second
    with pytest.raises(UnknownModel):
        catalogue.get_model_version("0" * 64)


def test_an_empty_catalogue_lists_nothing(catalogue: Catalogue) -> None:
    assert list(catalogue.list_models()) == []
    assert list(catalogue.list_loras("ann")) == []


def test_a_dead_redis_is_queue_unavailable() -> None:
    # Given a port where nothing listens
    client = redis.Redis(port=1, socket_connect_timeout=0.5, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    catalogue = RedisCatalogue(client)
    # Expect
    calls = (
        lambda: catalogue.add_lora(lora()),
        lambda: catalogue.get_lora("ann", "ink"),
        lambda: list(catalogue.list_loras("ann")),
        lambda: catalogue.add_model(model()),
        lambda: catalogue.get_model("shapes"),
        lambda: catalogue.get_model_version(A),
        lambda: list(catalogue.list_models()),
    )
    for call in calls:
        with pytest.raises(QueueUnavailable):
            call()


@pytest.mark.parametrize("name", ["ink", "add detail (v1.2)+", "水彩", "हिन्दी", "a" * 128, "_x-", "2"])
def test_names_that_may_be(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a" * 129, ".", "..", " a", "a ", "../etc/passwd", "a/b", "a\\b", "C:x"),
        *("a:b", "a=b", "<a", "a>", "a\nb", "a\x00", "a\x1b", "😀", "a\u202eb", "a\ud800"),
    ],
)
def test_names_that_may_not_be(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)
