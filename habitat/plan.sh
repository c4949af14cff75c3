#!/bin/bash
# shellcheck disable=SC2034,SC2154 # the build reads these variables, and sets others

pkg_name=warm-spare
# The site's own: HAB_ORIGIN, or `hab origin`'s default, takes its place.
pkg_origin=${HAB_ORIGIN:-site}
pkg_description="Keeps a spare Habitat Builder cluster at a checked point of the primary's history"
pkg_maintainer="The operators of this site's Habitat Builder"
# As Habitat's and Builder's own.
pkg_license=('Apache-2.0')
# It has no page of its own; this is what it keeps a spare of.
pkg_upstream_url="https://github.com/habitat-sh/builder"

# bash and coreutils: the hooks. The schema is carried by pg_dump and pg_restore of a major version that is not older than
# the primary's server and not newer than the spare's. builder-datastore of the same node brings one that fits, for it is
# the spare's own; the client here is the one for nodes without a datastore, of the version that Builder is released with.
pkg_deps=(
  core/bash
  core/coreutils
  core/gcc-base
  core/glibc
  core/postgresql17-client
)
# Cargo.toml's rust-version: an older compiler of a depot would fail far into the build, this one fails by its name.
pkg_build_deps=(
  core/gcc
  core/rust/1.95.0
)

pkg_bin_dirs=(bin)

pkg_exports=(
  [port]=http.port
)
pkg_exposes=(port)

# All optional: on a stock node builder-api's own configuration says more than they do, and a database or a bucket may be
# nobody's service.
pkg_binds_optional=(
  [datastore]="port"
  [minio]="port bucket-name"
  [peer-datastore]="port"
  [peer-minio]="port bucket-name"
)

pkg_svc_user=hab
pkg_svc_group=hab

# It ends at once. The Launcher kills after 8 s when the whole Supervisor is stopped, whatever stands here.
pkg_shutdown_signal=TERM
pkg_shutdown_timeout_sec=8

pkg_version() {
  sed -n 's/^version = "\(.*\)"$/\1/p' "$PLAN_CONTEXT/../Cargo.toml" | head -n 1
}

do_before() {
  update_pkg_version
}

# The sources lie beside the plan.
do_download() { return 0; }
do_verify() { return 0; }
do_unpack() { return 0; }
do_prepare() { return 0; }

# Beside the other sources of this build, not among ours.
target_dir() {
  echo "${CARGO_TARGET_DIR:-$HAB_CACHE_SRC_PATH/$pkg_dirname/target}"
}

do_build() {
  CARGO_TARGET_DIR=$(target_dir) \
    cargo build --release --locked --bin "$pkg_name" --manifest-path "$PLAN_CONTEXT/../Cargo.toml"
}

do_check() {
  "$(target_dir)/release/$pkg_name" --version
}

do_install() {
  install -D -m 0755 "$(target_dir)/release/$pkg_name" "$pkg_prefix/bin/$pkg_name"
}

# Names are enough for a backtrace, and they go with the debug information.
do_strip() { return 0; }
