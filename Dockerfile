# The service of docs/deploying.md:
#   docker build -t spar_d2 .
#   docker run -p 127.0.0.1:8000:8000 -v "$PWD/student.safetensors:/models/student.safetensors:ro" spar_d2
# With a GPU, PyTorch's default packages contain CUDA, so that the base needs nothing. A base with CUDA works, too:
#   docker build -t spar_d2 --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 .
ARG BASE=python:3.12-slim
FROM ${BASE}

# URL of another index for PyTorch, such as that of its CPU builds, which are 4.5 GB smaller; see pytorch.org.
ARG TORCH_INDEX=
# 1: also install Detectron2, which only format=overlay needs.
ARG OVERLAYS=0

# OpenCV needs libgl1 and libglib2.0-0. Bases of CUDA have no Python.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && { command -v python3 || apt-get install --yes --no-install-recommends python3 python3-venv; } \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY configs configs
COPY spar_d2 spar_d2
RUN pip install ".[web]" \
    && if [ "$OVERLAYS" = 1 ]; then spar-d2 install-detectron2 --source wheel; fi

RUN useradd --create-home --uid 10001 spar
USER spar
WORKDIR /home/spar

EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=10s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["spar-d2"]
CMD ["serve", "--host", "0.0.0.0", "--encoder", "ViT-B-16", "--pretrained", "/models/student.safetensors"]
