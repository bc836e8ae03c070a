# nemo_eaft on top of an NGC NeMo image, with the image's own torch, Transformer Engine, Megatron-Core and NeMo.
#
#   docker build -t nemo_eaft .
#   docker build -t nemo_eaft --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo:25.09 .    # clusters on CUDA 12
#   docker build -t nemo_eaft-bridge --target bridge .                              # Megatron-Bridge
#
# 25.11.01: NeMo 2.6, Megatron-Core 0.15, CUDA 13. 25.09: NeMo 2.5, Megatron-Core 0.14, CUDA 12.9. From 26.04 on the
# images have Python 3.12, Megatron-Core 0.17 or later, Megatron-Bridge in an environment that uv made in /opt/venv, and
# no nemo.collections.llm: there nemo_eaft.megatron and nemo_eaft.bridge work, and `nemo-eaft train` does not.
# BuildKit and buildah build the wanted target alone; Docker's old builder would fetch both images.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11.01
ARG BRIDGE_IMAGE=nvcr.io/nvidia/nemo:26.04

FROM ${BRIDGE_IMAGE} AS bridge

LABEL org.opencontainers.image.title="nemo_eaft-bridge" \
      org.opencontainers.image.description="Entropy-Adaptive Fine-Tuning for Megatron-Bridge and Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/nemo_eaft
COPY pyproject.toml README.md LICENSE ./
COPY nemo_eaft ./nemo_eaft

# An environment of uv has no pip of its own. The options are those of the other target, for the same reasons.
RUN uv pip install --python /opt/venv/bin/python --no-cache --no-deps --no-build-isolation .

# Not the source folder: Python would import the package from there and hide a broken install.
WORKDIR /workspace

RUN /opt/venv/bin/python -c "import nemo_eaft.megatron, nemo_eaft.bridge" && /opt/venv/bin/nemo-eaft --help > /dev/null

FROM ${BASE_IMAGE} AS nemo

LABEL org.opencontainers.image.title="nemo_eaft" \
      org.opencontainers.image.description="Entropy-Adaptive Fine-Tuning for NeMo and Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/nemo_eaft
COPY pyproject.toml README.md LICENSE ./
COPY nemo_eaft ./nemo_eaft

# --no-deps: a resolving install would replace the image's torch and Megatron-Core by others from the index.
# --no-build-isolation: build with the image's setuptools, so that nothing is downloaded.
# PIP_CONSTRAINT="": the image constrains pip to its own versions, which a local folder cannot satisfy.
RUN PIP_CONSTRAINT="" python -m pip install --no-cache-dir --no-deps --no-build-isolation .

# Not the source folder: Python would import the package from there and hide a broken install.
WORKDIR /workspace

# Some image variants cannot import nemo.collections.llm; better to learn that here than in a 16-GPU job.
RUN python -c "import nemo.collections.llm, nemo_eaft.nemo" && nemo-eaft --help > /dev/null
