# shellcheck shell=bash
# Sourced by the batch scripts of this folder: what the user must set, the environment, the container.

: "${IMAGE:?set IMAGE to the container}"
: "${DATA:?set DATA to the folder with the training files}"
: "${RUN:?set RUN to the folder of this run}"
: "${HF_HOME:?set HF_HOME to a Hugging Face cache on a shared file system}"
[ "$#" -ge 1 ] || { echo "usage: sbatch SCRIPT CONF [key=value ...]" >&2; exit 2; }
# As in a container they are seen from another folder, and pyxis cuts the list of mounts at `,` and `:`.
for name in DATA RUN HF_HOME ${NEMO_EAFT_HOME:+NEMO_EAFT_HOME}; do
  case ${!name} in *[,:]*)
    echo "$name=${!name}: a folder of a container's mounts cannot have , or : in its name" >&2
    exit 2
  esac
  printf -v "$name" %s "$(realpath -ms -- "${!name}")"
done
mkdir -p "$RUN" "$HF_HOME"

# shellcheck source-path=SCRIPTDIR source=../environment.sh
. "$EXAMPLES/environment.sh"
export HF_HOME

# Converted checkpoints belong on shared storage: a folder that the user named, or beside the run.
mounts="$DATA:/data,$RUN:/results,$HF_HOME:$HF_HOME"
if [ -n "${NEMO_EAFT_HOME:-}" ]; then
  mkdir -p "$NEMO_EAFT_HOME"
  mounts+=",$NEMO_EAFT_HOME:$NEMO_EAFT_HOME"
fi
export NEMO_EAFT_HOME=${NEMO_EAFT_HOME:-/results/home}
export NEMO_HOME=$NEMO_EAFT_HOME/nemo

# shellcheck disable=SC2034
container=(
  "--container-image=$IMAGE"
  # One list each: pyxis keeps only the last of an option.
  "--container-mounts=$mounts"
  "--container-env=$ENVIRONMENT,HF_HOME,NEMO_EAFT_HOME,NEMO_HOME"
  # A package in somebody's ~/.local would be imported instead of the container's.
  --no-container-mount-home
)
