#!/usr/bin/env bash
# Builds the image and runs it as production does, with buildah, podman and runc: no Docker engine, no registry.
# Prints PASS or FAIL for each promise; exits 1 if one is not kept. Needs root and (Debian, Ubuntu):
#   apt-get install buildah podman runc netavark aardvark-dns iptables mmdebstrap
# and a Python with the client installed (pip install -e .). Settings, all optional, by environment variable:
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
IMAGE=${IMAGE:-localhost/saeguard:check}    # what to build; with SKIP_BUILD=1 what to check
SKIP_BUILD=${SKIP_BUILD:-}
BASE_IMAGE=${BASE_IMAGE:-}                  # default: the Dockerfile's; where that cannot be pulled, one is made
DEBIAN_SUITE=${DEBIAN_SUITE:-bookworm}      # of the base that is made
TORCH_WHEELS=${TORCH_WHEELS:-}              # folder with a torch wheel, for builds that cannot reach torch's index
TORCH_SOURCE=${TORCH_SOURCE:-}              # or any other place, as options of "uv pip install"
CA_FILE=${CA_FILE:-${SSL_CERT_FILE:-}}      # authorities for downloads during the build, behind a proxy
BUILD_ISOLATION=${BUILD_ISOLATION:-chroot}  # works inside containers and virtual machines too
MEMORY=${MEMORY:-2g}
CPUS=${CPUS:-1}                             # few: the model is small, and a stream must still run when the stop comes
STOP_S=${STOP_S:-45}                        # how long a stop may take; above the server's drain of 30 s
READY_S=${READY_S:-120}
PYTHON=${PYTHON:-$repo/.venv/bin/python}
[[ -x $PYTHON ]] || PYTHON=python3

work=$(mktemp -d)
container=saeguard-check-$$
failures=0

if [[ -z ${CONTAINERS_CONF:-} ]]; then
    # runc, cgroupfs and the low limits also work without systemd, on hybrid cgroups and without CAP_SYS_RESOURCE.
    export CONTAINERS_CONF=$work/containers.conf
    cat >"$CONTAINERS_CONF" <<'CONF'
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
fi

clean_up() {
    podman rm --force --ignore --time 0 "$container" >"$work/cleaned" 2>&1
    rm -rf "$work"
}
trap clean_up EXIT

# check WHAT COMMAND...: runs the command; shows its last line when it passes, all of it when it fails.
check() {
    local what=$1 began=$EPOCHREALTIME verdict=PASS
    shift
    "$@" >"$work/out" 2>"$work/err" || verdict=FAIL
    printf '%s  %-44s %6.1f s  ' "$verdict" "$what" "$(seconds_since "$began")"
    tail -n 1 "$work/out" | cut -c 1-160
    [[ -s $work/out ]] || echo
    if [[ $verdict == FAIL ]]; then
        failures=$((failures + 1))
        sed 's/^/      /' "$work/out" "$work/err" | tail -n 40
    fi
}

seconds_since() { awk -v began="$1" -v now="$EPOCHREALTIME" 'BEGIN { print now - began }'; }

inside() { podman exec "$container" "$@"; }

# ---- build

find_base() {
    if [[ -z $BASE_IMAGE ]]; then
        BASE_IMAGE=$(sed -n 's/^ARG BASE_IMAGE=//p' "$repo/deploy/Dockerfile")
        has_image "$BASE_IMAGE" || timeout 300 podman pull --quiet "$BASE_IMAGE" || make_base || return 1
    fi
    echo "$BASE_IMAGE"
}

make_base() {
    BASE_IMAGE=localhost/saeguard-base:$DEBIAN_SUITE
    has_image "$BASE_IMAGE" && return 0
    local packages=python3,python3-venv,ca-certificates
    mmdebstrap --quiet --variant=minbase --include="$packages" "$DEBIAN_SUITE" "$work/base.tar" \
        && podman import --quiet "$work/base.tar" "$BASE_IMAGE" \
        && rm "$work/base.tar"
}

has_image() { podman image exists "$1"; }

build() {
    local options=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    if git -C "$repo" rev-parse HEAD >"$work/revision"; then
        options+=(--build-arg "REVISION=$(cat "$work/revision")")
    fi
    [[ -z $CA_FILE ]] || options+=(--secret "id=ca,src=$CA_FILE")
    if [[ -n $TORCH_WHEELS ]]; then
        # Mounted, not served: the layer's key stays the same from one run to the next, and no port is needed.
        options+=(--volume "$(realpath "$TORCH_WHEELS"):/wheels:ro")
        options+=(--build-arg "TORCH_SOURCE=--no-index --find-links /wheels")
    elif [[ -n $TORCH_SOURCE ]]; then
        options+=(--build-arg "TORCH_SOURCE=$TORCH_SOURCE")
    fi
    # The docker format, because the OCI one has no HEALTHCHECK.
    buildah bud --isolation "$BUILD_ISOLATION" --network host --format docker --layers \
        --ignorefile "$repo/deploy/Dockerfile.dockerignore" --file "$repo/deploy/Dockerfile" \
        --tag "$IMAGE" "${options[@]}" "$repo"
}

# ---- promises

arguments_can_be_replaced() { podman run --rm "$IMAGE" --version; }

# As it is it would be open to whoever reaches the container.
refuses_to_be_open_to_all() {
    if podman run --rm "$IMAGE" >"$work/refused" 2>&1; then return 1; fi
    tail -n 1 "$work/refused"
    grep -q 'identity.api_keys' "$work/refused"
}

start() {
    # Without --read-only-tmpfs=false podman adds writable places that Docker and Kubernetes do not have.
    podman run --detach --name "$container" --publish 127.0.0.1::50051 --publish 127.0.0.1::9464 \
        --read-only --read-only-tmpfs=false --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
        --memory "$MEMORY" --cpus "$CPUS" "$IMAGE" \
        serve --listen 0.0.0.0:50051 --metrics-listen 0.0.0.0:9464 --allow-anonymous
}

becomes_healthy() {
    local deadline=$((SECONDS + READY_S))
    until podman healthcheck run "$container" >&2; do
        if [[ $(podman inspect --format '{{.State.Running}}' "$container") != true ]]; then
            podman logs "$container"
            return 1
        fi
        ((SECONDS < deadline)) || return 1
        sleep 1 # each try starts a Python, which must not slow down what it waits for
    done
}

is_confined() {
    local status
    status=$(inside cat /proc/1/status) \
        && grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs):' <<<"$status" \
        && grep -Eq '^Uid:\s+[1-9]' <<<"$status" \
        && grep -Eq '^CapBnd:\s+0+$' <<<"$status" \
        && grep -Eq '^NoNewPrivs:\s+1$' <<<"$status"
}

is_read_only() {
    inside python -c '
import pathlib
pathlib.Path("/tmp/probe").touch()
for folder in ("/", "/opt/venv", "/var/cache/saeguard", "/var/tmp", "/run"):
    try:
        pathlib.Path(folder, "probe").touch()
    except OSError:
        continue
    raise SystemExit(f"{folder} is writable")
'
}

has_no_installer() {
    inside python -c '
import importlib.util, shutil
found = [name for name in ("pip", "uv") if importlib.util.find_spec(name) or shutil.which(name)]
raise SystemExit(f"found {found}" if found else 0)
'
}

# It names every package that is installed, in its version, but for the project itself.
has_a_bill_of_materials() {
    inside python -c '
import importlib.metadata, json
from packaging.utils import canonicalize_name
bill = json.load(open("/opt/venv/share/saeguard/sbom.cdx.json"))
named = {(canonicalize_name(part["name"]), part["version"]) for part in bill["components"]}
here = {(canonicalize_name(part.name), part.version) for part in importlib.metadata.distributions()}
here = {part for part in here if part[0] != "saeguard"}
print(len(named), "packages, of which", sum("licenses" in part for part in bill["components"]), "state a licence by name")
raise SystemExit(f"not the same: {sorted(named ^ here)}" if named != here else 0)
'
}

asks() { "$PYTHON" "$repo/deploy/check_requests.py" "$@"; }

left_in_order() {
    podman logs "$container" >"$work/log" 2>&1
    tail -n 4 "$work/log"
    [[ $(podman inspect --format '{{.State.ExitCode}} {{.State.OOMKilled}}' "$container") == "0 false" ]] || return 1
    # The stream's own line must come after "draining": otherwise it ended before the stop, and nothing was shown.
    awk '/"draining"/ { draining = 1 }
         draining && /GenerateStream/ && /"OK"/ { ended = 1 }
         ended && /"drained"/ { drained = 1 }
         drained && /"stopped"/ { stopped = 1 }
         END { exit !stopped }' "$work/log" && echo "draining, the stream's end, drained, stopped, exit code 0"
}

# ---- the run

for tool in buildah podman runc "$PYTHON"; do
    command -v "$tool" >"$work/out" || { echo "$tool is missing; the head of $0 says what to install" >&2; exit 2; }
done
"$PYTHON" -c 'import saeguard_client' || { echo "$PYTHON has no client: pip install -e $repo" >&2; exit 2; }

if [[ -z $SKIP_BUILD ]]; then
    check "a base image" find_base
    check "the image builds" build
    ((failures == 0)) || exit 1
fi
size=$(podman image inspect --format '{{.Size}}' "$IMAGE")
check "its arguments can be replaced" arguments_can_be_replaced
check "it refuses to be open to all" refuses_to_be_open_to_all
check "it starts with a read-only root" start
check "its health check says SERVING" becomes_healthy
((failures == 0)) || exit 1
grpc=$(podman port "$container" 50051/tcp)
metrics=$(podman port "$container" 9464/tcp)
check "neither root nor capabilities" is_confined
check "nothing but /tmp can be written" is_read_only
check "no pip and no uv" has_no_installer
check "a bill of materials, complete" has_a_bill_of_materials
check "an edit is applied, the receipt says so" asks steered "$grpc"
check "/metrics counts it" asks metrics "http://$metrics/metrics"
check "a running stream outlives the stop" asks drained "$grpc" podman stop --time "$STOP_S" "$container"
check "the server drained and left with 0" left_in_order

printf '\n%s: %s, %d MB unpacked, %d check(s) failed\n' \
    "$( ((failures == 0)) && echo PASS || echo FAIL)" "$IMAGE" "$((size / 1000000))" "$failures"
((failures == 0))
