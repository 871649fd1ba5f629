# One image, four commands: up | api | poller | worker. `docker build -t call-relay .`, or podman, or buildah.
#
# The base image is selected by tag or, for reproducible builds, by digest:
#   docker build --build-arg PYTHON_DIGEST=@sha256:<64 hex digits> -t call-relay .
# To find the digest of a tag: docker buildx imagetools inspect python:3.13-slim-trixie
ARG PYTHON_TAG=3.13-slim-trixie
ARG PYTHON_DIGEST=

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv /opt/relay
# All packages are wheels with hashes from the lock, so no compiler is needed.
COPY .ci/runtime.lock .ci/build.lock .ci/
RUN /opt/relay/bin/python -m pip install --require-hashes --only-binary=:all: -r .ci/runtime.lock \
 && python -m pip install --require-hashes --only-binary=:all: -r .ci/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY relay relay
COPY workers workers
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/relay/bin/python -m pip install --no-deps --no-index /wheels/*.whl \
 && /opt/relay/bin/python -m pip uninstall --yes pip \
 && /opt/relay/bin/python -m compileall -q /opt/relay/lib

FROM python:${PYTHON_TAG}${PYTHON_DIGEST}
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Call Relay" \
      org.opencontainers.image.description="Polls phone-system call records and delivers signed webhooks" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=build /opt/relay /opt/relay
RUN install -d -o 10001 -g 10001 -m 0750 /var/lib/relay
ENV PATH=/opt/relay/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/relay \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RELAY_API__HOST=0.0.0.0 \
    RELAY_DATA_DIR=/var/lib/relay
WORKDIR /var/lib/relay
# Nothing else but /tmp is written to, so the root file system may be read-only.
VOLUME ["/var/lib/relay"]
# 8080: API and recording links. 9090, internal only: /livez /readyz /metrics.
EXPOSE 8080 9090
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 CMD ["relay", "healthcheck"]
ENTRYPOINT ["relay"]
CMD ["up", "--config", "/etc/relay/relay.yaml"]
