#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh runupload.sh`
# Upload the dicom folders under ROOTDIR to a project on XNAT.
# Fill in the settings, or set variables of the same names in the environment (they win), then
#   ./runupload.sh [further options of dicomUpload.py, such as --dry-run]
set -u

URL="${URL:-}"              # where XNAT is, such as https://xnat.example.org
USER_NAME="${USER_NAME:-}"  # your login there
PROJECT="${PROJECT:-}"      # the ID of the project that gets the data
ROOTDIR="${ROOTDIR:-}"      # the folder with one folder per subject in it
CONFIG="${CONFIG:-}"        # what to leave out, such as Exclusions.json; empty: nothing
WORKDIR="${WORKDIR:-work}"  # for zips, log and report; made if missing, beside this file

refuse() {  # STATUS SENTENCE; the statuses are those of dicomUpload.py
  printf '%s: %s\n' "${0##*/}" "$2" >&2
  exit "$1"
}

for name in URL USER_NAME PROJECT ROOTDIR; do
  [ -n "${!name}" ] ||
    refuse 2 "$name: not set: write it at the top of $0, or set it in the environment"
done
command -v python3 >/dev/null ||
  refuse 3 "python3: not found: install Python 3.8 or newer, or use runuploadDocker.sh"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
  refuse 3 "python3: is too old: install Python 3.8 or newer, or use runuploadDocker.sh"

here=$0  # dicomUpload.py lies beside this file; a link to this file may lie anywhere
while [ -L "$here" ]; do
  link=$(readlink "$here")
  case $link in /*) here=$link ;; *) here=$(dirname "$here")/$link ;; esac
done

case $WORKDIR in /*) ;; *) WORKDIR=$(dirname "$here")/$WORKDIR ;; esac
case $WORKDIR in /*) ;; *) WORKDIR=$PWD/$WORKDIR ;; esac
echo "Log and report: $WORKDIR" >&2

[ -z "$CONFIG" ] || set -- "--config=$CONFIG" "$@"
# The password stays off the command line, where anyone could read it: for - dicomUpload.py takes
# XNAT_PASS from the environment, then ~/.netrc, and else asks, without echo.
# After -- a setting stays one even if it begins with a dash.
exec python3 "$(dirname "$here")/dicomUpload.py" "--workdir=$WORKDIR" "$@" -- \
  "$URL" "$USER_NAME" - "$PROJECT" "$ROOTDIR"
