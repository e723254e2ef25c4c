# syntax=docker/dockerfile:1.7
# featstore with CUDA. From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t featstore:cuda .
# cpu.Dockerfile with another list for torch, and without the notebook. PyPI's wheels of torch bring the CUDA libraries
# along as packages, so no base image with a second copy of them; the host gives the driver (NVIDIA Container Toolkit).

# Debian's own Python 3.11, so that one system's security updates cover all that is not a pinned package.
ARG BASE=debian:bookworm-20260824-slim

FROM ${BASE} AS build
# No versions: Debian's archive keeps only the newest of a release, and the base's date says which release.
# hadolint ignore=DL3008
RUN --mount=type=cache,id=apt-cache-build,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=apt-lists-build,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv
WORKDIR /src
COPY docker/build.txt docker/
# pip stays in an environment of its own: the one that is shipped holds what runs, and no installer.
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/featstore \
    && /opt/build/bin/python -m pip install --no-deps --require-hashes -r docker/build.txt
COPY docker/torch-cuda.txt docker/
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    /opt/build/bin/python -m pip --python /opt/featstore install --no-deps --require-hashes -r docker/torch-cuda.txt
COPY docker/requirements.txt docker/
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    /opt/build/bin/python -m pip --python /opt/featstore install --no-deps --require-hashes -r docker/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY featstore featstore
COPY pipelines pipelines
COPY cli cli
RUN /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/build/bin/python -m pip --python /opt/featstore install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/build/bin/python -m pip --python /opt/featstore check

FROM ${BASE} AS runtime
# Caches of its own: buildah 1.28 never gives back a lock that the other stage has taken.
# hadolint ignore=DL3008
RUN --mount=type=cache,id=apt-cache-runtime,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,id=apt-lists-runtime,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && groupadd --gid 1000 featstore \
    && useradd --uid 1000 --gid 1000 --create-home --shell /usr/sbin/nologin featstore \
    && install -d -o featstore -g featstore /data
ENV PATH=/opt/featstore/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FEATSTORE_STORE=/data/features.zarr \
    FEATSTORE_DATA=/data/datasets \
    FEATSTORE_WEIGHTS=/data/weights \
    HF_HOME=/data/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="featstore" \
      org.opencontainers.image.description="Diffusion features: extract once, train forever." \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.featstore.device="cuda"
# Weights, data sets and stores lie here, never in the image.
VOLUME /data
WORKDIR /data
USER 1000:1000

FROM runtime AS featstore
COPY --from=build /opt/featstore /opt/featstore
ENTRYPOINT ["tini", "--", "featstore"]
CMD ["--help"]
