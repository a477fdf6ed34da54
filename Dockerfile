# docker build -t lrd .                                              torch with CUDA in it, 5.8 GB; runs on CPUs too
# docker build -t lrd --build-arg PIP_EXTRA_INDEX_URL=ADDRESS .      ADDRESS of PyTorch's wheels for CPUs: 1.8 GB
# docker build -t lrd:dev --build-arg EXTRAS=[dev] .                 with what the tests need
#
# docker run --rm lrd                                              the demonstration (make demo)
# docker run --rm lrd:dev make test
# docker run --rm --gpus all -v lrd-runs:/lrd/runs -v lrd-data:/lrd/data lrd \
#   accelerate launch --config_file launch/accelerate/gpu.yaml -m lrd.train recipes/cifar10_resnet34_sgd_lrd.yaml
#
# Several hosts: launch/compose.yaml, launch/kubernetes/. No data and no weights are baked in.
# The base may be any Debian or Ubuntu that has Python 3.11 or newer or gets it by apt:
#   --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
ARG BASE=python:3.12-slim
FROM ${BASE}

# The user is a number because Kubernetes' runAsNonRoot believes no name, and a high one because Ubuntu has a user 1000.
# A named volume takes its owner from the folder that it covers: runs and data have to be there.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make $(python3 -c 'import ensurepip, venv' || echo python3-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 lrd \
    && install --directory --owner lrd --group lrd /lrd /lrd/runs /lrd/data
USER 10001
WORKDIR /lrd
ENV PATH=/lrd/.venv/bin:${PATH} PYTHONUNBUFFERED=1

# The dependencies are a layer of their own: a change of the code does not install them again.
ARG PIP_EXTRA_INDEX_URL=
ARG EXTRAS=
COPY --chown=lrd:lrd pyproject.toml constraints.txt ./
RUN mkdir lrd && touch lrd/__init__.py README.md LICENSE \
    && python3 -m venv .venv \
    && pip install --no-cache-dir --quiet --constraint constraints.txt --editable ".${EXTRAS}"
COPY --chown=lrd:lrd . .
RUN touch .venv/installed

CMD ["make", "demo"]
