# Without a GPU: SGLang on the CPU, and small models that answer. From the root of the checkout:
#   docker build -f deploy/docker/cpu.Dockerfile -t chimera:cpu .
FROM python:3.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home chimera

WORKDIR /srv/chimera

# The packages first: they change seldom and weigh 1.7 GB. TORCH_INDEX is where pip finds torch's CPU build.
ARG TORCH_INDEX=
COPY requirements/cpu.txt requirements/
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements/cpu.txt

COPY pyproject.toml README.md LICENSE ./
COPY python python
RUN pip install --no-cache-dir --no-deps .

COPY model_configs model_configs
COPY examples/tiny_models examples/tiny_models

# By number, so that Kubernetes sees that it is not root.
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=2m --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["chimera"]
# Whoever reaches the port is let in: publish it to this machine only, or give --keys.
CMD ["serve", "examples/tiny_models/sums", "examples/tiny_models/shell", "examples/tiny_models/stories", "--host", "0.0.0.0", "--open"]
