# docker build -t lrd . && docker run --rm lrd              the demonstration (make demo)
# docker run --rm lrd make test                             the tests
# docker run --rm --gpus all -v $PWD/runs:/home/lrd/src/runs -v $PWD/data:/home/lrd/src/data lrd \
#   .venv/bin/accelerate launch --config_file launch/accelerate/gpu.yaml -m lrd.train recipes/cifar10_resnet34_sgd_lrd.yaml
#
# No data and no weights are baked in. The base may be any image with Python 3.11 or newer and apt.
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home lrd
USER lrd
WORKDIR /home/lrd/src

# The dependencies are a layer of their own: a change of the code does not install them again.
COPY --chown=lrd pyproject.toml constraints.txt Makefile LICENSE README.md ./
RUN mkdir lrd && touch lrd/__init__.py && PIP_NO_CACHE_DIR=1 make .venv/installed
COPY --chown=lrd . .
RUN touch .venv/installed

ENV PATH=/home/lrd/src/.venv/bin:${PATH}
CMD ["make", "demo"]
