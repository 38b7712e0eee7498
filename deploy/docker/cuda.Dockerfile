# For NVIDIA GPUs: the stock SGLang package with the CUDA packages it asks for. From the root of the checkout:
#   docker build -f deploy/docker/cuda.Dockerfile -t chimera:cuda .
# A devel image, since SGLang compiles kernels with nvcc when it first needs them.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libnuma1 ninja-build python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home chimera \
 && python3 -m venv /opt/chimera
ENV PATH=/opt/chimera/bin:$PATH

WORKDIR /srv/chimera

COPY requirements/cuda.txt requirements/
RUN pip install --no-cache-dir -r requirements/cuda.txt

COPY pyproject.toml README.md LICENSE ./
COPY python python
RUN pip install --no-cache-dir .

COPY model_configs model_configs

# By number, so that Kubernetes sees that it is not root.
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["chimera"]
# Mount your placement file here, and keys beside it: chimera keys alice >> keys.jsonl
CMD ["serve", "/etc/chimera/placement.json", "--host", "0.0.0.0", "--keys", "/etc/chimera/keys.jsonl"]
