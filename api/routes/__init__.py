"""One file per resource."""

from __future__ import annotations

from api.routes import files, health, jobs, loras, models

ROUTERS = (jobs.router, loras.router, models.router, files.router, health.router)
"""Every route of the API."""
