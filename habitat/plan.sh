#!/bin/bash
# shellcheck disable=SC2034,SC2154 # the build reads these variables, and sets others

pkg_name=warm-spare
# The origin of the site: HAB_ORIGIN, or the default of `hab origin`, replaces this one.
pkg_origin=${HAB_ORIGIN:-site}
pkg_description="Keeps a spare Habitat Builder cluster at a checked point of the primary's history"
pkg_maintainer="The operators of this site's Habitat Builder"
# The same licence as Habitat and Builder.
pkg_license=('Apache-2.0')
# The project has no page of its own; this is the page of Builder.
pkg_upstream_url="https://github.com/habitat-sh/builder"

# The hooks use bash and coreutils. The schema is copied with pg_dump and pg_restore of a major
# version that is not older than the primary's server and not newer than the spare's.
# builder-datastore on the same node brings a version that fits, because it is the spare's own. The
# client here is for nodes without a datastore, in the version with which Builder is released.
pkg_deps=(
  core/bash
  core/coreutils
  core/gcc-base
  core/glibc
  core/postgresql17-client
)
# The rust-version of Cargo.toml. An older compiler of a depot would fail late in the build; this
# one fails at once, by its name.
pkg_build_deps=(
  core/gcc
  core/rust/1.91.1
)

pkg_bin_dirs=(bin)

pkg_exports=(
  [port]=http.port
)
pkg_exposes=(port)

# All binds are optional. On a usual node builder-api's own configuration says more than they do,
# and a database or a bucket may be no Habitat service at all.
pkg_binds_optional=(
  [datastore]="port"
  [minio]="port bucket-name"
  [peer-datastore]="port"
  [peer-minio]="port bucket-name"
)

pkg_svc_user=hab
pkg_svc_group=hab

# The service ends at once. If the whole Supervisor is stopped, the Launcher kills after 8 s,
# whatever value is set here.
pkg_shutdown_signal=TERM
pkg_shutdown_timeout_sec=8

pkg_version() {
  sed -n 's/^version = "\(.*\)"$/\1/p' "$PLAN_CONTEXT/../Cargo.toml" | head -n 1
}

do_before() {
  update_pkg_version
}

# The sources are beside the plan.
do_download() { return 0; }
do_verify() { return 0; }
do_unpack() { return 0; }
do_prepare() { return 0; }

# The build directory is beside the other sources of this build, not inside our source tree.
target_dir() {
  echo "${CARGO_TARGET_DIR:-$HAB_CACHE_SRC_PATH/$pkg_dirname/target}"
}

# `cargo vendor` in the project's folder makes the folder `vendor`. With it the build needs no
# network.
do_build() {
  local vendor=$PLAN_CONTEXT/../vendor
  local -a sources=()
  if [ -d "$vendor" ]; then
    sources=(
      --offline
      --config 'source.crates-io.replace-with="vendored"'
      --config "source.vendored.directory=\"$(cd "$vendor" && pwd)\""
    )
  fi
  CARGO_TARGET_DIR=$(target_dir) \
    cargo build --release --locked "${sources[@]}" --bin "$pkg_name" --manifest-path "$PLAN_CONTEXT/../Cargo.toml"
}

do_check() {
  "$(target_dir)/release/$pkg_name" --version
}

do_install() {
  install -D -m 0755 "$(target_dir)/release/$pkg_name" "$pkg_prefix/bin/$pkg_name"
}

# Symbol names are enough for a backtrace, and stripping would remove them with the debug
# information.
do_strip() { return 0; }
