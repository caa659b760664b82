"""Models: list. The operator enters them from the command line."""

from __future__ import annotations

from fastapi import APIRouter

from api.context import Caller, Parts
from api.problems import responses
from api.views import ModelList, ModelView
from core.errors import QueueUnavailable, Unauthorized

router = APIRouter(prefix="/v1/models", tags=["models"], responses=responses(Unauthorized, QueueUnavailable))


@router.get("")
def list_models(tenant: Caller, context: Parts) -> ModelList:
    """List the models with their defaults and bounds."""
    del tenant  # models are for all who may call
    return ModelList(models=[ModelView.of(record) for record in context.catalogue.list_models()])
