"""Every environment variable, typed, with its default and unit. Read by the ``main.py`` files and the CLI only.

Each field is the environment variable ``FUSELINE_<NAME>``; units stand in the names.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of API, worker and command line."""

    model_config = SettingsConfigDict(env_prefix="FUSELINE_", extra="ignore", frozen=True)

    # queue
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Queue, catalogue and worker registry. TLS, user and password go into the URL (rediss://user:password@host)."""
    broker_url: str = ""
    """Celery's Redis; empty = ``redis_url``."""
    redis_timeout_s: float = Field(default=0.8, gt=0)
    """Connect and read timeout of one Redis call. The API answers 503 after two such timeouts at the latest."""
    require_durable_redis: bool = True
    """Refuse to start on a Redis that may evict keys."""
    pool: str = "default"
    """The pool that this worker serves."""
    lease_s: float = Field(default=15.0, ge=1)
    """A lease not renewed for this long is taken back."""
    slack: float = Field(default=64 * 20 * 512 * 512, ge=0)
    """How much later work, in cost units (steps × pixels × images), may overtake a job."""
    max_attempts: int = Field(default=5, ge=1)
    retry_base_s: float = Field(default=5.0, gt=0)
    """Delay before the first retry; doubled for each further one, with jitter."""
    retry_max_s: float = Field(default=60.0, gt=0)
    max_queued_per_tenant: int = Field(default=100_000, ge=1)
    result_ttl_s: int = Field(default=7 * 86_400, ge=60)
    """How long a finished job is remembered."""

    # storage
    store_url: str = "file://./var/store"
    """``file:///path`` or ``s3://bucket/prefix``. Credentials by the usual AWS variables or role."""
    s3_endpoint: str = ""
    """S3 endpoint of another vendor, such as http://minio:9000; empty = AWS."""
    s3_public_endpoint: str = ""
    """Endpoint that clients reach, for presigned URLs; empty = ``s3_endpoint``."""
    s3_region: str = "us-east-1"
    url_expires_s: int = Field(default=900, ge=1, le=7 * 86_400)
    """Life of a result URL."""
    url_secret: SecretStr = SecretStr("")
    """Signs the URLs of a local-directory store; empty = drawn at start."""

    # API
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65_535)
    public_url: str = ""
    """Base URL that clients use for this API; empty = http://api_host:api_port."""
    api_tokens: SecretStr = SecretStr("")
    """``tenant=token,tenant=token``. Empty = open: every caller is the tenant ``default``, on loopback only."""
    max_body_bytes: int = Field(default=256 * 1024, ge=1024)
    max_prompt_chars: int = Field(default=8_000, ge=1)
    max_steps: int = Field(default=500, ge=1)
    max_images: int = Field(default=16, ge=1)
    max_loras: int = Field(default=16, ge=1, le=64)
    max_lora_bytes: int = Field(default=2 * 1024**3, ge=1)

    # worker
    worker_name: str = ""
    """Unique name of this worker; empty = host and process."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    dtype: str = "auto"
    """``auto`` (bfloat16 on CUDA, float32 elsewhere), ``float32``, ``bfloat16``, ``float16``."""
    batch_max: int = Field(default=4, ge=1)
    """Most images in one forward pass, and most jobs in one claim."""
    cache_dir: Path = Path("./var/cache")
    """Files fetched from the store. Workers of one host should share it."""
    cache_max_bytes: int = Field(default=20 * 1024**3, ge=1)
    ticket_budget_s: float = Field(default=300.0, gt=0)
    """How long one Celery task goes on taking batches before it makes room for a new one."""
    stall_s: float = Field(default=600.0, gt=0)
    """A batch that makes no progress for this long loses its lease, and its process is replaced."""
    worker_metrics_port: int = Field(default=9808, ge=0, le=65_535)
    """Prometheus port of a worker; 0 = any free one."""
    worker_metrics_host: str = "127.0.0.1"
    """Address that a worker's metrics are served on."""
    engine: str = "diffusers"
    """``diffusers``, or ``noop`` for load tests of everything around it."""
    drain_file: Path | None = None
    """Set by a worker's parent for its child: once this file exists, the child takes no more work."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 = torch's own choice."""

    log_level: str = "INFO"
    log_json: bool = False
    """One JSON object a line instead of text."""
