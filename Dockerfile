# The server, without root and without a model. docs/scale.md shows how to build and run it.
#   docker build -t qwen-vllm .                                for machines without a GPU
#   docker build -t qwen-vllm --build-arg HARDWARE=gpu .       for NVIDIA GPUs; the driver comes from the host
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG HARDWARE=cpu

# What the wheels expect of the system: vLLM's CPU build libnuma, Triton on a GPU a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && if [ "$HARDWARE" = gpu ]; then set -- gcc libc6-dev; else set -- libnuma1; fi \
    && apt-get install -y --no-install-recommends "$@" \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 qwen \
    && install -d -o qwen /home/qwen/.cache

WORKDIR /app
# A layer of its own for what changes seldom: all packages, as locked.
COPY pyproject.toml README.md requirements.txt requirements-cpu.txt setup.sh ./
RUN UV_NO_CACHE=1 ./setup.sh && rm -rf .tools
COPY *.py ./
COPY qwen_vllm qwen_vllm

USER 10001
# Models, fetched or converted, and what vLLM compiles.
VOLUME /home/qwen/.cache
EXPOSE 8000
# Whether it lives, not /ready: a server that is stopping must not be replaced before its answers have ended.
HEALTHCHECK --start-period=15m --interval=10s --timeout=5s --retries=3 CMD [".venv/bin/python", "-Ic", \
    "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# The server itself gets the signals. 8: docker stop kills after 10 seconds, unless it is told otherwise.
ENTRYPOINT [".venv/bin/python", "vllm_server.py", "--host", "0.0.0.0", "--shutdown-timeout", "8"]
