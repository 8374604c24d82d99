# The trainer with everything it needs but the driver and the models:
#   docker build -t ltxv2 .
#   docker run --rm --gpus all -v "$PWD":/work ltxv2 doctor
#   docker run --rm --gpus all --shm-size 2g -v "$PWD":/work ltxv2 train --config_file ...
# torch's wheel brings CUDA; the host needs NVIDIA's driver and container toolkit. A C compiler is there for torch.compile.
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ltxv2
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt ".[bitsandbytes,tensorboard]"

RUN useradd --create-home --uid 1000 user
USER user
ENV PYTHONUTF8=1 PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["ltxv2"]
CMD ["--help"]
