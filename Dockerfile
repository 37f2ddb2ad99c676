# `softprompt serve` on the CPU; see docs/guides/serving.md.
#   docker build --build-arg PIP_EXTRA_INDEX_URL=… -t softprompt .
# The argument is PyTorch's index of CPU builds (see its install page): without it, torch brings gigabytes of CUDA.
FROM python:3.12-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    SOFTPROMPT_HOME=/data/store \
    SOFTPROMPT_CACHE=/data/cache \
    HF_HOME=/data/cache/huggingface

RUN useradd --uid 10001 --create-home softprompt \
    && install --directory --owner=softprompt /data/store /data/cache

# torch in a layer of its own: it is the largest and changes least
WORKDIR /app
COPY constraints.txt ./
RUN pip install -c constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[serve]"

USER 10001
VOLUME ["/data/store", "/data/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# The process itself gets SIGTERM, and finishes what it has begun: give it time (docker stop --time 130).
ENTRYPOINT ["softprompt", "serve", "--host", "0.0.0.0", "--port", "8000"]
