# A CUDA node with everything: docker build -t eclipse . && docker run --gpus all -v /data:/data eclipse run -w /data/ws
# The wheels of torch bring CUDA's libraries along; the host needs a driver, and the NVIDIA container toolkit.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/eclipse
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/eclipse/.venv/bin:$PATH
# The pinned packages are a layer of their own: a change of the code does not fetch them again.
COPY requirements.lock ./
RUN pip install --no-cache-dir uv && uv venv .venv && uv pip install --no-cache --require-hashes -r requirements.lock
COPY . .
RUN uv pip install --no-cache --no-deps -e .
# Shared memory of the host, or --ipc=host, is what processes of one training exchange batches through.
WORKDIR /data
ENTRYPOINT ["eclipse"]
CMD ["--help"]
