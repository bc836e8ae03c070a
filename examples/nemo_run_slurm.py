"""The training of slurm/train.sbatch, submitted by NeMo-Run: its SlurmExecutor writes and submits the batch scripts.

    python examples/nemo_run_slurm.py --account ACCOUNT --partition PARTITION --image IMAGE --data DATA --run RUN \\
        --hf-home HF_HOME [--nodes 2] [--gpus-per-node 8] [--dryrun] CONF [key=value ...]

Two jobs: `import` converts the model and prepares the rows on one GPU, then `train` runs one torchrun a node. IMAGE,
DATA, RUN, HF_HOME and CONF are those of train.sbatch; RUN/home holds the converted checkpoint. SLURM's warning becomes
a checkpoint and a requeue, `touch RUN/stop` stops the run for good; `--retries N` starts a job that failed again, up
to N times, requeues after a warning counted. Run it on a login node, or change `tunnel` to an SSHTunnel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote

import nemo_run as run

EXAMPLES = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("account", "partition", "image", "data", "run", "hf-home"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--warn", type=int, default=600, help="seconds before the end of the job that SLURM warns it")
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--dryrun", action="store_true", help="write and print the batch scripts, submit nothing")
    parser.add_argument("conf")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    settings = [arguments.conf, *arguments.overrides, f"trainer.num_nodes={arguments.nodes}"]
    settings += [f"trainer.gpus_per_node={arguments.gpus_per_node}", "run.dir=/results"]
    with run.Experiment("nemo-eaft") as experiment:
        imported = experiment.add(
            # Quoted here, for only torchrun's words are quoted by NeMo-Run.
            run.Script(
                path="nemo_eaft.cli", m=True, entrypoint="python", args=["import", "--data", *map(quote, settings)]
            ),
            executor=importing(arguments),
            name="import",
        )
        experiment.add(
            run.Script(path="nemo_eaft.train", m=True, entrypoint="python", args=settings),
            executor=training(arguments),
            name="train",
            dependencies=[imported],
        )
        if arguments.dryrun:
            experiment.dryrun(delete_exp_dir=False)
        else:
            experiment.run(detach=True)


def executor(arguments: argparse.Namespace) -> run.SlurmExecutor:
    """What both jobs have in common."""
    hf_home = quote(arguments.hf_home)
    return run.SlurmExecutor(
        account=arguments.account,
        partition=arguments.partition,
        time=arguments.time,
        # Quoted, for NeMo-Run 0.7.0 quotes nothing on the line of srun, nor values of the environment.
        container_image=quote(arguments.image),
        container_mounts=[f"{quote(arguments.data)}:/data", f"{quote(arguments.run)}:/results", f"{hf_home}:{hf_home}"],
        srun_args=["--no-container-mount-home"],
        env_vars={"HF_HOME": hf_home, "NEMO_EAFT_HOME": "/results/home", "NEMO_HOME": "/results/home/nemo"},
        container_env=["HF_HOME", "NEMO_EAFT_HOME", "NEMO_HOME"],
        # The image holds the package: a copy of the working folder would be imported instead.
        packager=run.Packager(),
        # A folder that is not there cannot be mounted.
        setup_lines=f"mkdir -p {quote(arguments.run)} {hf_home}",
    )


def importing(arguments: argparse.Namespace) -> run.SlurmExecutor:
    one = executor(arguments)
    one.gpus_per_node = 1
    # As import.sbatch: a model of 32B parameters, twice.
    one.mem, one.cpus_per_task = "256G", 8
    # Since SLURM 22.05 srun does not take over what the job asked for.
    one.env_vars["SRUN_CPUS_PER_TASK"] = "8"
    return one


def training(arguments: argparse.Namespace) -> run.SlurmExecutor:
    """One torchrun a node, in an allocation that is told before its end and requeued."""
    several = executor(arguments)
    several.launcher = run.Torchrun()
    several.nodes = arguments.nodes
    several.gpus_per_node = several.torchrun_nproc_per_node = arguments.gpus_per_node
    several.mem, several.exclusive = "0", True
    several.signal = f"B:USR1@{arguments.warn}"
    several.retries = arguments.retries
    # By now every file is local.
    several.env_vars |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment, stop = (EXAMPLES / name for name in ("environment.sh", "slurm/stop.sh"))
    # NeMo-Run has `srun` in the foreground, where the shell hears of the warning only when it is over.
    several.setup_lines += f"""
RUN={quote(arguments.run)}
{environment.read_text()}
{stop.read_text()}
srun() {{
  in_background command srun "--container-env=$ENVIRONMENT,HF_HOME,NEMO_EAFT_HOME,NEMO_HOME" "$@" || return
  end_if_stopped
}}
"""
    several.container_env = None
    return several


if __name__ == "__main__":
    main()
