# Two images of one site:
#   docker build --target cpu -t fomoe:cpu .
#   docker build --target cuda -t fomoe:cuda .      (the default)
# Neither has been built by the project: hadolint has read this file, and no more.
#   docker run --rm -v "$PWD/runs:/work/runs" fomoe:cpu train quickstart
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY configs configs
COPY fomoe fomoe
COPY sim sim
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS base
RUN useradd --create-home --uid 1000 fomoe && mkdir /work && chown fomoe /work
WORKDIR /work

FROM base AS cpu
COPY --from=wheel /wheels /wheels
COPY constraints-cpu.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints-cpu.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl
USER 1000
ENTRYPOINT ["fomoe"]
CMD ["--help"]

# torch's wheels of the package index bring the CUDA libraries; the host gives the driver.
FROM base AS cuda
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl
USER 1000
ENTRYPOINT ["fomoe"]
CMD ["--help"]
