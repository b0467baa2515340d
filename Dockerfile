# dicomUpload.py with all it needs, as  python /src/dicomUpload.py  with /dicom, /input and /work
# to mount folders on:  docker build -t aacazxnat/dicomupload:0.1 .
#
# The tag gets Ubuntu's security updates with each build. For a build that never changes, pin the
# digest too (FROM ubuntu:24.04@sha256:...), which "docker images --digests ubuntu" shows.
FROM ubuntu:24.04

LABEL org.opencontainers.image.title="dicomUpload" \
      org.opencontainers.image.description="Uploads folders of dicom series to XNAT" \
      org.opencontainers.image.version="2.0"

# No versions: Ubuntu's archive keeps only the newest of each, so a pinned build soon fails.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates curl python-is-python3 python3 zip \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/* \
 && mkdir /dicom /input \
 && mkdir -m 1777 /work \
 && chown 10001:10001 /work

# A mode of its own: a clone made under umask 077 would make a file that no other user can read.
COPY --chmod=0755 dicomUpload.py /src/

# Started as root, it gives its rights up at once and runs as the owner of /work, so that what it
# writes there belongs to whom the folder belongs to. With --user it stays that user.
# hadolint ignore=SC2016
RUN printf '%s\n' '#!/bin/sh' \
      'grep -q " /work " /proc/self/mountinfo ||' \
      '  echo "/work: is no mount, so log, report and ledger go with this container" >&2' \
      'as="setpriv --reuid $(stat -c %u /work) --regid $(stat -c %g /work) --clear-groups --"' \
      '[ "$(id -u)" = 0 ] && $as true 2>/dev/null && HOME=/tmp exec $as "$@"' \
      'exec "$@"' >/src/as-owner \
 && chmod 0755 /src/as-owner

# Names of any language; every line out at once; no write to the read-only root.
ENV LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
STOPSIGNAL SIGTERM
# The command is given in full, as it always was.
ENTRYPOINT ["/src/as-owner"]
CMD ["python", "/src/dicomUpload.py", "--help"]
