#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh runuploadDocker.sh`
# As runupload.sh, but in a container: needs Docker or Podman, and no Python.
# Fill in the settings, or set variables of the same names in the environment (they win), then
#   ./runuploadDocker.sh [further options of dicomUpload.py, such as --dry-run]
set -u

URL="${URL:-}"              # where XNAT is, such as https://xnat.example.org
USER_NAME="${USER_NAME:-}"  # your login there
PROJECT="${PROJECT:-}"      # the ID of the project that gets the data
ROOTDIR="${ROOTDIR:-}"      # the folder with one folder per subject in it; only read
CONFIG="${CONFIG:-}"        # what to leave out, such as Exclusions.json; empty: nothing
WORKDIR="${WORKDIR:-work}"  # for zips, log and report; made if missing
IMAGE="${IMAGE:-aacazxnat/dicomupload:0.1}"  # built from the Dockerfile beside this file
ENGINE="${ENGINE:-docker}"                   # or podman
ENGINE_OPTIONS="${ENGINE_OPTIONS:-}"         # more options of its run, such as --network=host

refuse() {  # STATUS SENTENCE; the statuses are those of dicomUpload.py
  printf '%s: %s\n' "${0##*/}" "$2" >&2
  exit "$1"
}

csv() {  # FIELD; quoted only where it must be, since podman before 4.1 knows no quotes
  local q='"' qq='""'
  case $1 in *[,\"$'\n']*) printf '"%s"' "${1//$q/$qq}" ;; *) printf '%s' "$1" ;; esac
}

bind() {  # SOURCE TARGET [,readonly]; -v would split at colons, and make a missing source as root
  local source=$1
  case $source in /*) ;; *) source=$PWD/$source ;; esac
  run+=(--mount "type=bind,$(csv "source=$source"),$(csv "target=$2")${3-}")
}

for name in URL USER_NAME PROJECT ROOTDIR; do
  [ -n "${!name}" ] ||
    refuse 2 "$name: not set: write it at the top of $0, or set it in the environment"
done
[ -d "$ROOTDIR" ] || refuse 2 "ROOTDIR: no such folder ($ROOTDIR): correct it"
[ -z "$CONFIG" ] || [ -f "$CONFIG" ] || refuse 2 "CONFIG: no such file ($CONFIG): correct it"
mkdir -p -- "$WORKDIR" || refuse 2 "WORKDIR: cannot be made ($WORKDIR): choose another"
command -v "$ENGINE" >/dev/null ||
  refuse 3 "$ENGINE: not found: install Docker or Podman, and set ENGINE to docker or podman"
# The label tells this image from the original one of the same name, which knows no PASS of -.
build="$ENGINE build -t $IMAGE $(printf %q "$(dirname -- "$0")")"
label='{{index .Config.Labels "org.opencontainers.image.title"}}'
if [ "$("$ENGINE" image inspect --format "$label" "$IMAGE")" != dicomUpload ]; then
  case $("$ENGINE" image inspect "$IMAGE" 2>&1 >/dev/null) in *"annot connect"*)
    refuse 3 "$ENGINE: does not run, or you may not use it: start it, or ask the admin" ;;
  esac
  refuse 3 "$IMAGE: not there, or not built from the Dockerfile here: run  $build"
fi

# As the caller, so that the caller's rights to the files apply; with no rights beyond these.
# label=disable: SELinux would otherwise forbid all of ROOTDIR, and relabelling is not ours to do.
run=(--rm --init --read-only --cap-drop ALL --security-opt no-new-privileges
     --security-opt label=disable --user "$(id -u):$(id -g)" --env HOME=/home
     --env TERM --env NO_COLOR)
case $("$ENGINE" --version) in
  *podman*) [ "$(id -u)" = 0 ] || run+=(--userns keep-id --group-add keep-groups) ;;
  *) for group in $(id -G); do run+=(--group-add "$group"); done ;;
esac
bind "$ROOTDIR" /dicom ,readonly
bind "$WORKDIR" /work
[ -z "$CONFIG" ] || bind "$CONFIG" "/input/${CONFIG##*/}" ,readonly
[ -z "$CONFIG" ] || set -- "--config=/input/${CONFIG##*/}" "$@"
read -ra more <<<"$ENGINE_OPTIONS"
run+=(${more[@]+"${more[@]}"})
call=(python /src/dicomUpload.py --workdir /work "$@" -- "$URL" "$USER_NAME" - "$PROJECT" /dicom)

# The password: XNAT_PASS, else ~/.netrc, else asked for without echo, by dicomUpload.py where it
# gets a terminal, and here where output goes elsewhere. It goes in through standard input, or as
# the mounted .netrc: never in argv or --env, which ps and "inspect" show, nor in a file of its own.
# From here on exec: signals and status are the engine's, and so dicomUpload.py's.
pass=${XNAT_PASS:-} terminal=
[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && terminal=-it
if [ -z "$pass" ] && [ -f "${HOME:-}/.netrc" ]; then
  bind "$HOME/.netrc" /home/.netrc ,readonly
elif [ -z "$pass$terminal" ]; then
  {
    IFS= read -rsp "Password of $USER_NAME at $URL: " pass 2>/dev/tty
    echo >/dev/tty
  } 2>/dev/null </dev/tty  # if there is one
fi
if [ -n "$pass" ]; then  # takes standard input, so there can be no terminal
  # shellcheck disable=SC2016  # these are for the container's shell
  exec "$ENGINE" run -i "${run[@]}" "$IMAGE" \
    sh -c 'XNAT_PASS=$(cat); export XNAT_PASS; exec "$@" </dev/null' sh "${call[@]}" \
    < <(printf %s "$pass")
fi
exec "$ENGINE" run $terminal "${run[@]}" "$IMAGE" "${call[@]}"
