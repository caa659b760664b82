"""What stands in golden files: each name with the function that makes its content."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from api.app import create_app
from tests.integration.api_parts import Parts

FOLDER = Path(__file__).parent


def openapi() -> str:
    """The API's description, as clients are generated from it."""
    schema = create_app(Parts().context).openapi()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


GOLDEN: Mapping[str, Callable[[], str]] = {"openapi.json": openapi}
