"""A submit becomes a job with nothing left to decide: names become digests, defaults and the seed are filled in."""

from __future__ import annotations

from collections.abc import Iterator

from api.context import Context, Limits
from api.problems import FieldProblem, FieldsInvalid
from api.schemas import LoraUse, SubmitRequest
from core.catalogue.names import check_name
from core.catalogue.records import LoraRecord, ModelRecord
from core.job import JobSpec
from core.lora import LoraRef, LoraSet
from core.prompt_tags import PromptTag, extract, refuse_tags


def resolve(asked: SubmitRequest, tenant: str, context: Context) -> tuple[str, JobSpec]:
    """Give the pool and the spec of what was asked.

    Raises ``InvalidRequest`` (``FieldsInvalid`` where fields are to blame), ``InvalidPromptTag``, ``UnknownModel``,
    ``UnknownLora`` and what the catalogue raises.
    """
    _refuse(_beyond_limits(asked, context.limits))
    prompt, tags = extract(asked.prompt)
    refuse_tags("negative_prompt", asked.negative_prompt)
    uses: tuple[PromptTag | LoraUse, ...] = (*tags, *asked.loras)
    if len(uses) > context.limits.max_loras:
        _refuse([FieldProblem(field="loras", message=f"{len(uses)} LoRAs; at most {context.limits.max_loras}")])
    for tag in tags:
        check_name(tag.name)
    model = _model(asked.model, context)
    width, height = asked.width or model.width, asked.height or model.height
    _refuse(_beyond_model(width, height, model))
    spec = JobSpec(
        model=model.name,
        model_digest=model.digest,
        prompt=prompt,
        negative_prompt=asked.negative_prompt,
        loras=_loras(uses, tenant, context),
        width=width,
        height=height,
        steps=asked.steps or model.steps,
        guidance=model.guidance if asked.guidance is None else asked.guidance,
        sampler=asked.sampler or model.sampler,
        seed=context.draw_seed() if asked.seed < 0 else asked.seed,
        images=asked.images,
        format=asked.format,
        on_lora_error=asked.on_lora_error,
        metadata=asked.metadata,
    )
    return model.pool, spec


def _refuse(problems: Iterator[FieldProblem] | list[FieldProblem]) -> None:
    found = tuple(problems)
    if found:
        raise FieldsInvalid(*found)


def _beyond_limits(asked: SubmitRequest, limits: Limits) -> Iterator[FieldProblem]:
    """Check first what bounds the work of all that follows."""
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(asked, name))
        if length > limits.max_prompt_chars:
            yield FieldProblem(field=name, message=f"{length} characters; at most {limits.max_prompt_chars}")
    for name, most in (("steps", limits.max_steps), ("images", limits.max_images)):
        value = getattr(asked, name)
        if value is not None and value > most:
            yield FieldProblem(field=name, message=f"{value} is too many; at most {most}")


def _beyond_model(width: int, height: int, model: ModelRecord) -> Iterator[FieldProblem]:
    for name, pixels in (("width", width), ("height", height)):
        if pixels % model.size_multiple:
            yield FieldProblem(field=name, message=f"{pixels} is no multiple of {model.size_multiple}")
    if width * height > model.max_pixels:
        message = f"{width} × {height} = {width * height} pixels; {model.name!r} draws at most {model.max_pixels}"
        yield FieldProblem(field="width", message=message)


def _model(name: str | None, context: Context) -> ModelRecord:
    if name is not None:
        return context.catalogue.get_model(name)
    models = tuple(context.catalogue.list_models())
    if len(models) != 1:
        names = ", ".join(model.name for model in models[:20]) or "none"
        raise FieldsInvalid(FieldProblem(field="model", message=f"name one; registered are: {names}"))
    return models[0]


def _loras(uses: tuple[PromptTag | LoraUse, ...], tenant: str, context: Context) -> LoraSet:
    records = {name: context.catalogue.get_lora(tenant, name) for name in dict.fromkeys(use.name for use in uses)}
    return LoraSet.of(_ref(use, records[use.name]) for use in uses)


def _ref(use: PromptTag | LoraUse, record: LoraRecord) -> LoraRef:
    both = use.scale if isinstance(use, LoraUse) and use.scale is not None else record.default_scale
    return LoraRef(
        digest=record.digest,
        unet=both if use.unet is None else use.unet,
        te=both if use.te is None else use.te,
        name=record.name,
        key=record.key,
        size_bytes=record.size_bytes,
    )
