#!/usr/bin/env bash
# shellcheck disable=SC2016,SC2329  # what is quoted is for the shell inside; clean is called by the trap
# Builds the images without a Docker engine and tries them: buildah takes the Dockerfiles as they are, and debootstrap
# makes the base image, of the same Debian release, where no registry of images can be reached. As root, on Debian, with
# `apt-get install buildah podman debootstrap`. Up to 25 GB below $TMPDIR, which are removed again.
#
#   BASE_FILES=DIR   files to lay over the base: a certificate or pip.conf that leads to the package registries
#   TORCH=pypi       installs PyPI's torch in the CPU image too, where PyTorch's own index cannot be reached
#   IMAGES="cuda"    which to try, of cuda, cpu and notebook (a target of cpu.Dockerfile; with TORCH=pypi 35 GB)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(df --output=avail -BG "${TMPDIR:-/var/tmp}" | tail -1 | tr -dc 0-9)" -lt 30 ]; then
  echo "less than 30 GB are free in ${TMPDIR:-/var/tmp}; name another place in TMPDIR" >&2
  exit 1
fi
: "${MIRROR:=http://deb.debian.org/debian}" "${IMAGES:=cuda cpu notebook}" "${TORCH:=}" "${BASE_FILES:=}"
work=$(mktemp -d "${TMPDIR:-/var/tmp}/featstore-check.XXXXXX")
export CONTAINERS_STORAGE_CONF=$work/storage.conf TMPDIR=$work BUILDAH_ISOLATION=chroot
cat >"$CONTAINERS_STORAGE_CONF" <<END
[storage]
driver = "overlay"
graphroot = "$work/images"
runroot = "$work/run"
END
clean() {
  buildah rm --all >/dev/null 2>&1 || true
  umount "$work/images/overlay" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap clean EXIT

base=$(sed -n 's/^ARG BASE=//p' docker/cpu.Dockerfile)
echo "## base: debootstrap's bookworm in place of $base"
debootstrap --variant=minbase bookworm "$work/base" "$MIRROR" >"$work/debootstrap.log"
rm -rf "$work/base"/var/lib/apt/lists/* "$work/base"/var/cache/apt/archives/*.deb  # nor has the real one any
if [ -n "$BASE_FILES" ]; then cp -a "$BASE_FILES/." "$work/base/"; fi
tar -C "$work/base" -c . | podman import --quiet - "docker.io/library/$base" >/dev/null
rm -rf "$work/base"

# What the build sees; a copy, so that the CPU list can be exchanged.
mkdir "$work/context"
git ls-files -z --cached --others --exclude-standard -- LICENSE README.md pyproject.toml .dockerignore cli featstore \
  pipelines docker | xargs -0 cp -a --parents -t "$work/context"
if [ "$TORCH" = pypi ]; then
  cp docker/torch-cuda.txt "$work/context/docker/torch-cpu.txt"
  echo "## torch-cpu.txt: replaced by torch-cuda.txt (TORCH=pypi)"
fi

failed=0
# tini is not the first process here, as it is in a container; the variable tells it that this is meant.
within() { buildah run --user 1000:1000 --env HOME=/home/featstore --env TINI_SUBREAPER=1 "$container" -- "$@"; }
# Runs a command in the image as its user and says how that went; the others are tried all the same.
try() {
  local what=$1 status=0
  shift
  within "$@" >"$work/try.log" 2>&1 || status=$?
  echo "-- $what: exit $status"
  tail -6 "$work/try.log"
  if [ "$status" != 0 ]; then failed=1; fi
}

for image in $IMAGES; do
  file=cpu.Dockerfile target=featstore
  case $image in
    cuda) file=cuda.Dockerfile ;;
    notebook) target=notebook ;;
  esac
  echo "## $image: buildah bud -f docker/$file --target $target"
  SECONDS=0
  if ! buildah bud -f "$work/context/docker/$file" --target "$target" -t "featstore:$image" "$work/context" \
    >"$work/$image.log" 2>&1; then
    tail -40 "$work/$image.log"
    exit 1
  fi
  grep -E 'No broken requirements|Successfully installed featstore' "$work/$image.log"
  echo "built in $SECONDS s"
  container=$(buildah from "localhost/featstore:$image")
  try 'who and where' sh -c 'id; pwd; cat /etc/debian_version'
  try 'size' du -sh /opt/featstore /usr
  try 'no pip, no compiler, no lists of packages' sh -c \
    '! command -v pip && ! command -v gcc && [ -z "$(ls -A /var/lib/apt/lists /var/cache/apt/archives | grep -i deb)" ]'
  try 'no weights of 50 MB or more' sh -c '[ -z "$(find /opt /data /home -name "*.safetensors" -size +50M)" ]'
  try 'featstore --version' tini -- featstore --version
  try 'featstore demo --help' tini -- featstore demo --help
  try 'extract 4 images' tini -- featstore extract --dataset toyhorse --techniques prompt --limit 4
  try 'info' tini -- featstore info
  buildah copy --quiet "$container" docker/try_cluster.py /tmp/ >/dev/null
  try 'scheduler and worker, their health, extract --scheduler' python /tmp/try_cluster.py
  if [ "$image" = notebook ]; then
    try 'jupyter lab' jupyter lab --version
    try 'the notebook' sh -c 'cd /tmp && FEATSTORE_STORE=/data/features.zarr \
      jupyter execute /opt/notebooks/example.ipynb --output /tmp/ran && grep -c image/png /tmp/ran.ipynb'
  fi
  buildah rm "$container" >/dev/null
  buildah rmi --prune --force >/dev/null 2>&1 || true
  buildah rmi "featstore:$image" >/dev/null
done
echo "## done, $([ "$failed" = 0 ] && echo all well || echo NOT all well)"
exit "$failed"
