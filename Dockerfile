# Two images: `api` carries no torch; `worker` carries torch as constraints.txt pins it (with CUDA, on Linux).
#
#   docker build --target api    -t fuseline-api .
#   docker build --target worker -t fuseline-worker .
#
# Another torch: --build-arg TORCH_INDEX=<an index of torch wheels>, --build-arg TORCH="torch==<version>".
# The same Python as the tests run on.
ARG PYTHON_TAG=3.11-slim-bookworm

FROM python:${PYTHON_TAG} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# tini is process 1: it passes SIGTERM on to the server and reaps what the server's children leave behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fuseline \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fuseline \
    && install --directory --owner=10001 --group=10001 /var/cache/fuseline
WORKDIR /app
ENTRYPOINT ["/usr/bin/tini", "--"]

# The dependencies are installed before any of our code is there, so that a change of code rebuilds one small layer.
FROM base AS build
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml README.md constraints.txt ./

FROM build AS build-api
RUN pip install --no-cache-dir --constraint constraints.txt .

FROM build AS build-worker
ARG TORCH_INDEX=""
ARG TORCH=""
RUN sed --in-place "s|^torch==.*|${TORCH:-&}|" constraints.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--no-deps --index-url "${TORCH_INDEX}"} --constraint constraints.txt torch
RUN pip install --no-cache-dir --constraint constraints.txt ".[worker]"

FROM base AS api
COPY --from=build-api /opt/venv /opt/venv
COPY core core
COPY api api
COPY cli cli
ENV FUSELINE_API_HOST=0.0.0.0 \
    FUSELINE_API_PORT=8000
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"FUSELINE_API_PORT\"]}/healthz', timeout=4)"]
CMD ["python", "-m", "api.main"]

FROM base AS worker
COPY --from=build-worker /opt/venv /opt/venv
COPY core core
COPY worker worker
# Weights come from the store alone: no library may fetch any from elsewhere.
ENV FUSELINE_WORKER_METRICS_HOST=0.0.0.0 \
    FUSELINE_WORKER_METRICS_PORT=9808 \
    FUSELINE_CACHE_DIR=/var/cache/fuseline \
    HF_HUB_OFFLINE=1
VOLUME /var/cache/fuseline
EXPOSE 9808
USER 10001:10001
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"FUSELINE_WORKER_METRICS_PORT\"]}/metrics', timeout=4)"]
CMD ["python", "-m", "worker.main"]
