# The program for CPUs: one binary for all roles, and the demo's model. Nothing else but glibc, not even a shell. It writes
# no file, so its root may be read-only.
#
#   docker build --tag moesaic:0.1.0 .
#   docker run --rm --publish 8080:8080 moesaic:0.1.0 up --listen 0.0.0.0:8080 --allow-anyone
# The oldest glibc of all bases that the program runs on.
FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
COPY . .
ENV CARGO_INCREMENTAL=0 CARGO_PROFILE_RELEASE_STRIP=debuginfo
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package moesaic --bin moesaic \
    && install -D --mode=0755 target/release/moesaic /out/bin/moesaic \
    && install -D --mode=0644 --target-directory=/out/share/moesaic/tiny-r1 \
       crates/moesaic/models/tiny-r1/config.json \
       crates/moesaic/models/tiny-r1/generation_config.json \
       crates/moesaic/models/tiny-r1/model.safetensors \
       crates/moesaic/models/tiny-r1/tokenizer.json \
       crates/moesaic/models/tiny-r1/tokenizer_config.json \
    && install -D --mode=0644 LICENSE /out/share/doc/moesaic/LICENSE

FROM gcr.io/distroless/cc-debian13:nonroot
LABEL org.opencontainers.image.title="moesaic" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out /usr/local
# By number, so that Kubernetes sees that it is not root.
USER 65532:65532
EXPOSE 7000 8080 9090
ENTRYPOINT ["/usr/local/bin/moesaic"]
CMD ["--help"]
